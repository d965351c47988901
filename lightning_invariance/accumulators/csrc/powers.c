/* Powers of what each sample adds to a mean over samples.
 *
 * theta_i = w s_i is the value of sample i alone, with its share s_i of a sum. What is kept of each activation: the sums
 * over samples of d, d^2, d^3 and d^4 with d = theta_i - c, where c is theta of one of the samples, so that they lose few
 * digits; and of each sample, the sum over activations of theta_i. */

#include "kernels.h"

/* Those of up to WIDTH activations; `width` is a constant for all but the last ones. */
INLINE void powers_of(const job *j, Py_ssize_t a, double *on_mean, int width)
{
    const Py_ssize_t k = j->k;
    double sums[4][WIDTH] = {{0}};
    for (Py_ssize_t i = 0; i < j->n; i++) {
        double value[WIDTH], parts[8] = {0};
        for (int l = 0; l < width; l++)
            value[l] = j->weight * (j->x ? j->x[i * k + a + l] : j->shares[i * k + a + l]);
        for (int l = 0; l < width; l++) {
            const double d = value[l] - j->centre[a + l], square = d * d;
            sums[0][l] += d;
            sums[1][l] += square;
            sums[2][l] += square * d;
            sums[3][l] += square * square;
        }
        for (int l = 0; l < width; l++)
            parts[l % 8] += value[l];
        for (int l = 0; l < 8; l++)
            on_mean[i] += parts[l];
    }
    for (int p = 0; p < 4; p++)
        for (int l = 0; l < width; l++)
            j->powers[p * k + a + l] += sums[p][l];
}

FOR_EACH_PROCESSOR
void powers(job *j, Py_ssize_t from, Py_ssize_t to)
{
    double *const on_mean = j->on_mean + from / j->share * j->rows;
    Py_ssize_t a = from;
    for (; to - a >= WIDTH; a += WIDTH)
        powers_of(j, a, on_mean, WIDTH);
    if (a < to)
        powers_of(j, a, on_mean, (int)(to - a));
}
