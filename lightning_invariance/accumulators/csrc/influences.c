/* The influence of each sample on what is made of squared deviations, once all sums are known.
 *
 * psi_i = w sum_j (x_ij - mean of row i)^2 + v sum_j (x_ij - mu_j)^2 - b for every activation, with a w, a v and a b of
 * its own. What is kept: sum_i psi_i^2 and sum_i psi_i^4 of each activation, and the sum over activations of each
 * sample's psi_i. Rows deviate from their first value, as in deviations.c. */

#include "kernels.h"

#include <stdint.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int bits __attribute__((vector_size(LANES * sizeof(int))));
typedef lanes unaligned __attribute__((aligned(sizeof(float)), may_alias));
typedef bits unaligned_bits __attribute__((aligned(sizeof(int)), may_alias));

/* Those of WIDTH activations. */
INLINE void influences_of(const job *j, Py_ssize_t a, double *on_mean)
{
    const Py_ssize_t k = j->k, m = j->m;
    const float length = (float)m;
    const lanes none = {0};
    double squares[WIDTH] = {0}, fourths[WIDTH] = {0};
    for (Py_ssize_t i = 0; i < j->n; i++) {
        const float *const row = j->x + i * m * k + a;
        lanes first[REGISTERS], sum[REGISTERS], of_row[REGISTERS], of_columns[REGISTERS], total = none;
        float influence[WIDTH];
        for (int v = 0; v < REGISTERS; v++) {
            first[v] = *(const unaligned *)(row + v * LANES);
            sum[v] = of_row[v] = of_columns[v] = none;
        }
        for (Py_ssize_t t = 0; t < m; t++)
            for (int v = 0; v < REGISTERS; v++) {
                const lanes value = *(const unaligned *)(row + t * k + v * LANES);
                const lanes d = value - first[v], e = value - *(const unaligned *)(j->means + t * k + a + v * LANES);
                sum[v] += d;
                of_row[v] += d * d;
                of_columns[v] += e * e;
            }
        for (int v = 0; v < REGISTERS; v++) {
            const Py_ssize_t at = a + v * LANES;
            const lanes w = *(const unaligned *)(j->weights + at), u = *(const unaligned *)(j->weights + k + at);
            const lanes expected = *(const unaligned *)(j->weights + 2 * k + at);
            lanes psi = w * (of_row[v] - sum[v] * sum[v] / length) + u * of_columns[v] - expected;
            psi = (lanes)((bits)psi & *(const unaligned_bits *)(j->counts + at));
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
            on_mean[i] += parts[l];
    }
    for (int l = 0; l < WIDTH; l++) {
        j->squares[a + l] += squares[l];
        j->fourths[a + l] += fourths[l];
    }
}

/* That of a single activation. */
INLINE void influence_of_one(const job *j, Py_ssize_t a, double *on_mean)
{
    const Py_ssize_t k = j->k, m = j->m;
    for (Py_ssize_t i = 0; j->counts[a] && i < j->n; i++) {
        const float *const row = j->x + i * m * k + a;
        double sum = 0, of_row = 0, of_columns = 0;
        for (Py_ssize_t t = 0; t < m; t++) {
            const double d = (double)row[t * k] - row[0], e = (double)row[t * k] - j->means[t * k + a];
            sum += d;
            of_row += d * d;
            of_columns += e * e;
        }
        const double psi = j->weights[a] * (of_row - sum * sum / (double)m) + j->weights[k + a] * of_columns
                           - j->weights[2 * k + a];
        on_mean[i] += psi;
        j->squares[a] += psi * psi;
        j->fourths[a] += psi * psi * psi * psi;
    }
}

FOR_EACH_PROCESSOR
void influences(job *j, Py_ssize_t from, Py_ssize_t to)
{
    double *const on_mean = j->on_mean + from / j->share * j->n;
    Py_ssize_t a = from;
    for (; to - a >= WIDTH; a += WIDTH)
        influences_of(j, a, on_mean);
    for (; a < to; a++)
        influence_of_one(j, a, on_mean);
}
