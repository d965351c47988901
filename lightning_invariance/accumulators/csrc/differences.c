/* Distances within the rows of a block.
 *
 * absolute_differences sums |x_ij - x_il| over all ordered pairs of a row (eq. 6): of the values in order, the r-th
 * smallest is larger than r - 1 others and smaller than m - r, so that the sum is 2 sum_r (2 r - 1 - m) x_(r). */

#include "kernels.h"

/* The differences of up to WIDTH activations; `width` is a constant for all but the last ones. */
INLINE void differences_of(const job *j, Py_ssize_t a, int width)
{
    const Py_ssize_t n = j->n, m = j->m, column = j->column;
    float values[MOST_SORTED][WIDTH];
    double differences[WIDTH] = {0};
    for (Py_ssize_t i = 0; i < n; i++) {
        const float *first = j->x + i * j->row + a;
        float sum[WIDTH] = {0};
        for (Py_ssize_t t = 0; t < m; t++)
            for (int l = 0; l < width; l++)
                values[t][l] = first[t * column + l] - first[l];
        for (Py_ssize_t c = 0; c < j->comparisons; c++) {
            float *restrict low = values[j->network[2 * c]], *restrict high = values[j->network[2 * c + 1]];
            for (int l = 0; l < width; l++) {
                const float one = low[l], other = high[l];
                low[l] = one < other ? one : other; /* NaN may change places with a number, and stays in the sum */
                high[l] = one < other ? other : one;
            }
        }
        for (Py_ssize_t t = 0; t < m; t++)
            for (int l = 0; l < width; l++)
                sum[l] += (float)(2 * t + 1 - m) * values[t][l];
        for (int l = 0; l < width; l++)
            differences[l] += 2 * (double)sum[l];
        for (int l = 0; j->of_rows && l < width; l++) {
            j->differences[i * j->k + a + l] = differences[l];
            differences[l] = 0;
        }
    }
    for (int l = 0; !j->of_rows && l < width; l++)
        j->differences[a + l] = differences[l];
}

FOR_EACH_PROCESSOR
void differences(job *j, Py_ssize_t from, Py_ssize_t to)
{
    for (Py_ssize_t a = from; a < to; a += WIDTH)
        if (to - a >= WIDTH)
            differences_of(j, a, WIDTH);
        else
            differences_of(j, a, (int)(to - a));
}

