/* The influence of each sample on what is made of squared deviations, once all sums are known.
 *
 * psi_i = (w sum_j (x_ij - mean of row i)^2 + v c_i - b) / (1 - s c_i) with c_i = sum_j (x_ij - mu_j)^2 for every
 * activation, with a w, a v, a b and an s of its own; 1 - s c_i is LEAST_LEFT at least. add_influences sums psi_i^2 and psi_i^4 over samples for each activation (squares, fourths), and psi_i over
 * activations for each sample (on_sum). Deviations within a row are taken from one of its values, as in deviations.c.
 *
 * With changes, also sum_u f_u (x_iju - x_iru)^2 over activations u for each sample and column j, r being a reference
 * column, with a factor f of each activation; and sum_j (x_ij - mu_j)^2 of each sample and activation (spreads). */

#include "tiles.h"

#include <string.h>

#define LEAST_LEFT .05f /* as in sample_influences.py */

/* The influences on WIDTH activations. Adding up the lanes of `changed` (n, m) gives the changes; `with_changes` is a
 * constant. */
INLINE void influences_of(const job *j, Py_ssize_t a, double *on_sum, lanes *changed, int with_changes)
{
    const Py_ssize_t k = j->k, m = j->m;
    const float inverse = 1 / (float)m;
    const lanes none = {0};
    double squares[WIDTH] = {0}, fourths[WIDTH] = {0};
    lanes means[MOST_VALUES][REGISTERS]; /* close together: columns may lie a power of 2 apart, in one set of a cache */
    for (Py_ssize_t t = 0; t < m; t++)
        for (int v = 0; v < REGISTERS; v++) {
            const unaligned *const mean = (const unaligned *)(j->means + t * k + a + v * LANES);
            means[t][v] = *mean;
            PREFETCH(mean, REGISTERS, 0);
        }
    for (Py_ssize_t i = 0; i < j->n; i++) {
        const float *const row = j->x + i * m * k + a;
        const float *const reference = row + (with_changes ? j->reference * k : 0);
        lanes first[REGISTERS], sum[REGISTERS], of_row[REGISTERS], of_columns[REGISTERS], factor[REGISTERS];
        lanes total = none;
        float influence[WIDTH];
        for (int v = 0; v < REGISTERS; v++) {
            first[v] = *(const unaligned *)(reference + v * LANES);
            sum[v] = of_row[v] = of_columns[v] = none;
            if (with_changes)
                factor[v] = *(const unaligned *)(j->factors + a + v * LANES);
        }
        for (Py_ssize_t t = 0; t < m; t++) {
            lanes of_column = none;
            for (int v = 0; v < REGISTERS; v++) {
                const unaligned *const value = (const unaligned *)(row + t * k + v * LANES);
                PREFETCH(value, 2 * REGISTERS, 0);
                const lanes d = *value - first[v], e = *value - means[t][v], square = d * d;
                sum[v] += d;
                of_row[v] += square;
                of_columns[v] += e * e;
                if (with_changes)
                    of_column += factor[v] * square;
            }
            if (with_changes)
                changed[i * m + t] += of_column;
        }
        lanes spread[REGISTERS];
        for (int v = 0; v < REGISTERS; v++)
            spread[v] = of_row[v] - sum[v] * sum[v] * inverse;
        keep_digits(row, k, m, first, sum, of_row, spread);
        for (int v = 0; v < REGISTERS; v++) {
            const Py_ssize_t at = a + v * LANES;
            const lanes w = *(const unaligned *)(j->weights + at), u = *(const unaligned *)(j->weights + k + at);
            const lanes expected = *(const unaligned *)(j->weights + 2 * k + at);
            const lanes s = *(const unaligned *)(j->weights + 3 * k + at), least = none + LEAST_LEFT;
            const lanes rest = 1 - s * of_columns[v];
            const bits enough = rest > least;
            const lanes left = (lanes)(((bits)rest & enough) | ((bits)least & ~enough));
            lanes psi = (w * spread[v] + u * of_columns[v] - expected) / left;
            psi = (lanes)((bits)psi & *(const unaligned_bits *)(j->counts + at));
            if (with_changes)
                *(unaligned *)(j->spreads + i * k + at) = of_columns[v];
            total += psi;
            memcpy(influence + v * LANES, &psi, sizeof psi);
        }
        for (int l = 0; l < WIDTH; l++) {
            const double square = (double)influence[l] * influence[l];
            squares[l] += square;
            fourths[l] += square * square;
        }
        float parts[LANES];
        memcpy(parts, &total, sizeof parts);
        for (int l = 0; l < LANES; l++)
            on_sum[i] += parts[l];
    }
    for (int l = 0; l < WIDTH; l++) {
        j->squares[a + l] += squares[l];
        j->fourths[a + l] += fourths[l];
    }
}

/* The influences on a single activation. */
INLINE void influence_of_one(const job *j, Py_ssize_t a, double *on_sum, lanes *changed)
{
    const Py_ssize_t k = j->k, m = j->m;
    for (Py_ssize_t i = 0; i < j->n; i++) {
        const float *const row = j->x + i * m * k + a, reference = row[changed ? j->reference * k : 0];
        double sum = 0, of_row = 0, of_columns = 0;
        for (Py_ssize_t t = 0; t < m; t++) {
            const double d = (double)row[t * k] - reference, e = (double)row[t * k] - j->means[t * k + a];
            sum += d;
            of_row += d * d;
            of_columns += e * e;
            if (changed)
                changed[i * m + t][0] += (float)(j->factors[a] * d * d);
        }
        if (changed)
            j->spreads[i * k + a] = (float)of_columns;
        if (!j->counts[a])
            continue;
        const double left = 1 - j->weights[3 * k + a] * of_columns;
        const double psi = (j->weights[a] * (of_row - sum * sum / (double)m) + j->weights[k + a] * of_columns
                            - j->weights[2 * k + a]) / (left > LEAST_LEFT ? left : LEAST_LEFT);
        on_sum[i] += psi;
        j->squares[a] += psi * psi;
        j->fourths[a] += psi * psi * psi * psi;
    }
}

FOR_EACH_PROCESSOR
void influences(job *j, Py_ssize_t from, Py_ssize_t to)
{
    double *const on_sum = j->on_sum + from / j->share * j->rows;
    lanes changed[MOST_VALUES];
    Py_ssize_t a = from;
    if (!j->factors) {
        for (; to - a >= WIDTH; a += WIDTH)
            influences_of(j, a, on_sum, NULL, 0);
        for (; a < to; a++)
            influence_of_one(j, a, on_sum, NULL);
        return;
    }
    memset(changed, 0, sizeof changed);
    for (; to - a >= WIDTH; a += WIDTH)
        influences_of(j, a, on_sum, changed, 1);
    for (; a < to; a++)
        influence_of_one(j, a, on_sum, changed);
    double *const changes = j->changes + from / j->share * j->rows * j->m;
    for (Py_ssize_t at = 0; at < j->n * j->m; at++)
        for (int l = 0; l < LANES; l++)
            changes[at] += changed[at][l];
}
