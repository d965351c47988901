/* Squared deviations within the rows and columns of a block, and the means of the columns.
 *
 * add_deviations keeps, for each activation,
 *
 *     R = sum over rows i of    sum_j (x_ij - mean of row i)^2                         (row_spread; TV, eq. 2)
 *     C = sum over columns j of sum_i (x_ij - mu_j)^2                                  (column_spread; SV, eq. 3)
 *     mu_j = c + o_j, the mean of column j over the N0 rows so far                     (centre and offsets)
 *
 * Rows. With a_j = x_ij - x_i1 (or from another column), a row adds sum a_j^2 - (sum a_j)^2 / m. A constant row adds
 * exactly 0. No row adds less than 0: one of its m deviations is 0, so that (sum a_j)^2 <= (m - 1) sum a_j^2.
 *
 * Columns. float32 does not hold c + o_j exactly. Let M = fl(c + o_j) and r = (c + o_j) - M, its rounding error, which
 * float32 does hold (Knuth's two-sum). The deviations of the n new rows are taken from M: d_i = x_ij - M. The N0 rows
 * before have the mean M + r, so that over all N = N0 + n rows
 *
 *     D = sum (x_ij - M)   = N0 r   + sum d_i
 *     Q = sum (x_ij - M)^2 = C_j + N0 r^2 + sum d_i^2
 *
 * The new mean lies s = D / N above M, and moving the origin there leaves C_j' = Q + s (N s - 2 D). The new offset
 * o_j' = o_j + (D / N - r) is rounded to float32 first and s = (o_j' - o_j) + r computed from it, so that C is always
 * about the mean that is kept: rounding a mean costs next to nothing. Columns that never change keep o_j, and add
 * exactly 0.
 *
 * Changes. With a_j taken from a reference column, sum a_j^2 / 2 over rows and over the positions of a channel is what
 * each transformation changes in it: the variance of the pair of columns. What a row adds to R does not depend on the
 * column that its deviations are taken from. Without a reference, changes are m / (m - 1) sum (a_j - mean of a)^2,
 * whose mean over j is the variance; each row is then read once more, from the first cache.
 *
 * The first step begins with the means of its rows. Later ones take at most MOST_ROWS rows, and no more than there were
 * before, so that a mean moves at most half of the way to the new rows: Q is at most twice C', and no digits cancel. The
 * squares of each row are added up first.
 *
 * WIDTH activations at a time go through all rows and columns, so that their sums stay in registers. Offsets may lie
 * WIDTH by WIDTH, (k / width, m, width), so that all that is needed at a time is close together in memory. */

#include "changes.h"
#include "tiles.h"

#include <string.h>

INLINE int far_apart(const double *column_spread, const float *offset_squares, const job *j, int width)
{
    const double part = j->total >= j->limits.rows_for_far ? j->limits.far : 0;
    int far = 0;
    for (int l = 0; l < width; l++)
        far |= (column_spread[l] > 0) & (column_spread[l] < part * j->total * offset_squares[l]);
    return far;
}

/* The sums of up to WIDTH activations in double: where float32 does not hold all squares, where the means are wide, and
 * for the last activations, fewer than WIDTH. In double r is 0 to working precision. */
INLINE int deviations_in_double(tile p, const job *j, int width, int wide)
{
    double squares[WIDTH] = {0};
    float offset_squares[WIDTH] = {0};
    if (p.changes && j->centred)
        centred_in_double(p, j, width);
    else if (p.changes)
        changes_in_double(p, j, width);
    for (Py_ssize_t i = 0; i < j->n; i++) {
        const float *row = p.x + i * p.row_stride;
        double sum[WIDTH] = {0}, sum_of_squares[WIDTH] = {0};
        for (Py_ssize_t t = 1; t < j->m; t++)
            for (int l = 0; l < width; l++) {
                const double a = (double)row[t * p.column_stride + l] - row[l];
                sum[l] += a;
                sum_of_squares[l] += a * a;
            }
        for (int l = 0; l < width; l++)
            p.row_spread[l] += sum_of_squares[l] - sum[l] * sum[l] / (double)j->m;
    }
    for (Py_ssize_t t = 0; t < j->m; t++) {
        float *const narrow_offsets = (float *)p.offsets + t * p.offset_stride;
        double *const wide_offsets = (double *)p.offsets + t * p.offset_stride;
        double offset[WIDTH], mean[WIDTH], sum[WIDTH] = {0};
        for (int l = 0; l < width; l++) {
            offset[l] = wide ? wide_offsets[l] : narrow_offsets[l];
            mean[l] = offset[l] + (wide ? ((const double *)p.centres)[l] : ((const float *)p.centres)[l]);
        }
        for (Py_ssize_t i = 0; i < j->n; i++)
            for (int l = 0; l < width; l++) {
                const double d = p.x[i * p.row_stride + t * p.column_stride + l] - mean[l];
                sum[l] += d;
                squares[l] += d * d;
            }
        for (int l = 0; l < width; l++) {
            const double exact = offset[l] + sum[l] / j->total, moved = wide ? exact : (float)exact;
            const double shift = moved - offset[l];
            squares[l] += shift * (j->total * shift - 2 * sum[l]);
            offset_squares[l] += (float)(moved * moved);
            if (wide)
                wide_offsets[l] = moved;
            else
                narrow_offsets[l] = (float)moved;
        }
    }
    for (int l = 0; l < width; l++)
        p.column_spread[l] += squares[l];
    return !wide && far_apart(p.column_spread, offset_squares, j, width);
}

/* Moves the means of WIDTH activations to the means of all rows: `sums` holds sum d_i of each column, `squares` the sum
 * of all d_i^2 and then C' - C. Without a centre r is 0. */
INLINE void move_means(tile p, const job *j, lanes means[][REGISTERS], lanes sums[][REGISTERS], const lanes *centre,
                       lanes *squares, lanes *offset_squares, int centred)
{
    const float before = (float)j->before, total = (float)j->total, inverse = 1 / total;
    for (Py_ssize_t t = 0; t < j->m; t++)
        for (int v = 0; v < REGISTERS; v++) {
            unaligned *const offset = (unaligned *)((float *)p.offsets + t * p.offset_stride + v * LANES);
            const lanes old = *offset;
            lanes sum = sums[t][v], rounding = {0};
            if (centred) {
                const lanes held = means[t][v] - centre[v]; /* the part of the offset that M holds */
                rounding = (centre[v] - (means[t][v] - held)) + (old - held);
                sum += before * rounding;
                squares[v] += before * rounding * rounding;
            }
            const lanes moved = old + (sum * inverse - rounding), shift = (moved - old) + rounding;
            squares[v] += shift * (total * shift - 2 * sum);
            offset_squares[v] += moved * moved;
            *offset = moved;
        }
}

/* Adds row i of WIDTH activations to sums in float32; constants are `changes`, whether they are `centred`, and whether
 * the first row `begins`. */
INLINE void add_row(tile p, const job *j, Py_ssize_t i, const lanes *centre, lanes means[][REGISTERS],
                    lanes sums[][REGISTERS], lanes changed[][REGISTERS], lanes *row_spread, lanes *squares,
                    bits *rows_vary, bits *columns_vary, enum changes changes, int centred, int begins)
{
    const float *const row = p.x + i * p.row_stride;
    const float inverse = 1 / (float)j->m;
    const lanes none = {0};
    lanes first[REGISTERS], sum[REGISTERS], sum_of_squares[REGISTERS], of_row[REGISTERS];
    for (int v = 0; v < REGISTERS; v++) {
        of_row[v] = none;
        first[v] = *(const unaligned *)(row + (changes ? j->reference * p.column_stride : 0) + v * LANES);
        sum[v] = sum_of_squares[v] = none;
    }
    for (Py_ssize_t t = 0; t < j->m; t++) {
        lanes of_channel = none;
        for (int v = 0; v < REGISTERS; v++) {
            const unaligned *const value = (const unaligned *)(row + t * p.column_stride + v * LANES);
            PREFETCH(value, 2 * REGISTERS, 0);
            if (begins) {
                const unaligned *const offset = (unaligned *)((float *)p.offsets + t * p.offset_stride + v * LANES);
                PREFETCH(offset, j->m * REGISTERS, 1); /* of the next tile */
                means[t][v] = centre[v] + *offset;
            }
            const lanes a = *value - first[v], d = *value - means[t][v], square = a * a;
            sum[v] += a;
            sum_of_squares[v] += square;
            if (changes == OF_CHANNELS && !centred)
                changed[t][v] = begins ? square : changed[t][v] + square;
            else if (changes == OF_ONE_CHANNEL)
                of_channel += square;
            sums[t][v] = begins ? d : sums[t][v] + d;
            of_row[v] += d * d;
            columns_vary[v] |= (bits)d;
        }
        if (changes == OF_ONE_CHANNEL && !centred)
            changed[t][0] = begins ? of_channel : changed[t][0] + of_channel;
    }
    for (Py_ssize_t t = 0; centred && t < j->m; t++) {
        lanes of_channel = none;
        for (int v = 0; v < REGISTERS; v++) {
            const unaligned *const value = (const unaligned *)(row + t * p.column_stride + v * LANES);
            const lanes c = (*value - first[v]) - sum[v] * inverse;
            of_channel += c * c;
            if (changes == OF_CHANNELS)
                changed[t][v] = begins ? c * c : changed[t][v] + c * c;
        }
        if (changes == OF_ONE_CHANNEL)
            changed[t][0] = begins ? of_channel : changed[t][0] + of_channel;
    }
    lanes spread[REGISTERS];
    for (int v = 0; v < REGISTERS; v++)
        spread[v] = sum_of_squares[v] - sum[v] * sum[v] * inverse;
    keep_digits(row, p.column_stride, j->m, first, sum, sum_of_squares, spread);
    for (int v = 0; v < REGISTERS; v++) {
        row_spread[v] += spread[v];
        squares[v] += of_row[v];
        rows_vary[v] |= (bits)sum[v];
    }
}

/* The sums of WIDTH activations in float32, or in double where it does not hold the squares.
 *
 * `means`, `sums` and `changed` take 192 kB of the stack of each thread. OpenMP's threads have at least 2 MB on Linux;
 * elsewhere this runs in the calling thread. `changes` and `centred` are constants. */
INLINE int deviations_of(tile p, const job *j, enum changes changes, int centred)
{
    const lanes none = {0};
    lanes means[MOST_VALUES][REGISTERS], sums[MOST_VALUES][REGISTERS];
    lanes changed[MOST_VALUES][REGISTERS];
    lanes centre[REGISTERS], row_spread[REGISTERS], squares[REGISTERS], offset_squares[REGISTERS];
    bits rows_vary[REGISTERS], columns_vary[REGISTERS], found = (bits)none;
    for (int v = 0; v < REGISTERS; v++) {
        centre[v] = *(const unaligned *)((const float *)p.centres + v * LANES);
        row_spread[v] = squares[v] = offset_squares[v] = none;
        rows_vary[v] = columns_vary[v] = (bits)none;
        found |= centre[v] != 0;
    }
    const int with_centres = any(&found);
    for (int l = 0; l < WIDTH; l += 8) {
        PREFETCH(p.row_spread, 2 * WIDTH + l, 1);
        PREFETCH(p.column_spread, 2 * WIDTH + l, 1);
    }
    add_row(p, j, 0, centre, means, sums, changed, row_spread, squares, rows_vary, columns_vary, changes, centred, 1);
    for (Py_ssize_t i = 1; i < j->n; i++)
        add_row(p, j, i, centre, means, sums, changed, row_spread, squares, rows_vary, columns_vary, changes, centred,
                0);
    found = (bits)none;
    for (int v = 0; v < REGISTERS; v++) { /* masked with INT32_MAX, -0 has the bits of 0 */
        const bits held = (row_spread[v] <= j->limits.largest) & (squares[v] <= j->limits.largest); /* false for NaN */
        const bits lost_rows = ((rows_vary[v] & INT32_MAX) != 0) & (row_spread[v] < j->limits.smallest);
        const bits lost_columns = ((columns_vary[v] & INT32_MAX) != 0) & (squares[v] < j->limits.smallest);
        found |= ~held | lost_rows | lost_columns;
    }
    if (any(&found))
        return deviations_in_double(p, j, WIDTH, 0);
    if (changes)
        add_changes(p, j, changed, changes);
    if (with_centres)
        move_means(p, j, means, sums, centre, squares, offset_squares, 1);
    else
        move_means(p, j, means, sums, centre, squares, offset_squares, 0);
    float added[3][WIDTH];
    memcpy(added[0], row_spread, sizeof added[0]);
    memcpy(added[1], squares, sizeof added[1]);
    memcpy(added[2], offset_squares, sizeof added[2]);
    for (int l = 0; l < WIDTH; l++)
        p.row_spread[l] += added[0][l];
    for (int l = 0; l < WIDTH; l++)
        p.column_spread[l] += added[1][l];
    return far_apart(p.column_spread, added[2], j, WIDTH);
}

FOR_EACH_PROCESSOR
void deviations(job *j, Py_ssize_t from, Py_ssize_t to)
{
    int far = 0;
    double *const changes = j->changes ? j->changes + from / j->share * j->m * j->channels : NULL;
    const Py_ssize_t size = j->wide ? sizeof(double) : sizeof(float);
    for (Py_ssize_t a = from; a < to; a += WIDTH) {
        const Py_ssize_t within = a % j->width, first = a - within;
        const tile p = {j->x + a, a, changes, j->m * j->k, j->k, j->row_spread + a, j->column_spread + a,
                        (const char *)j->centres + size * a, (char *)j->offsets + size * (j->m * first + within),
                        j->width};
        const int width = to - a < WIDTH ? (int)(to - a) : WIDTH;
        if (j->wide)
            deviations_in_double(p, j, width, 1);
        else
            far |= width < WIDTH ? deviations_in_double(p, j, width, 0)
                   : !changes    ? deviations_of(p, j, NO_CHANGES, 0)
                   : a / j->inner == (a + WIDTH - 1) / j->inner
                       ? (j->centred ? deviations_of(p, j, OF_ONE_CHANNEL, 1) : deviations_of(p, j, OF_ONE_CHANNEL, 0))
                       : (j->centred ? deviations_of(p, j, OF_CHANNELS, 1) : deviations_of(p, j, OF_CHANNELS, 0));
    }
    __atomic_fetch_or(&j->far, far, __ATOMIC_RELAXED);
}

