/* What deviations.c and influences.c read together: WIDTH neighbouring activations of a block. */

#ifndef LIGHTNING_INVARIANCE_TILES_H
#define LIGHTNING_INVARIANCE_TILES_H

#include "kernels.h"

#include <stdint.h>

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int bits __attribute__((vector_size(LANES * sizeof(int))));
typedef lanes unaligned __attribute__((aligned(sizeof(float)), may_alias)); /* loads from any float address */
typedef bits unaligned_bits __attribute__((aligned(sizeof(int)), may_alias));

/* Prefetches an address `distance` elements further into the second cache. A prefetch of an address past the end of an
 * array has no effect; arithmetic on uintptr_t is defined there, arithmetic on pointers would not be. */
#define PREFETCH(pointer, distance, for_writing) \
    __builtin_prefetch((const void *)((uintptr_t)(pointer) + (uintptr_t)(distance) * sizeof *(pointer)), for_writing, 2)

INLINE int any(const bits *mask)
{
    int found = 0;
    for (int l = 0; l < LANES; l++)
        found |= (*mask)[l];
    return found != 0;
}

/* sum a^2 - (sum a)^2 / m loses up to a factor m of its digits, where one column alone differs. Where it loses more
 * than this factor, the row is read once more, and deviations are taken from its mean. */
enum { MOST_LOST = 20 };

/* sum (a_t - mean of a)^2 of WIDTH activations of a row, where `spread` has lost digits; a_t deviates from `first`. */
INLINE void keep_digits(const float *row, Py_ssize_t column_stride, Py_ssize_t m, const lanes *first, const lanes *sum,
                        const lanes *sum_of_squares, lanes *spread)
{
    const float inverse = 1 / (float)m;
    bits cancelled = {0};
    if (m <= MOST_LOST)
        return;
    for (int v = 0; v < REGISTERS; v++)
        cancelled |= spread[v] * MOST_LOST < sum_of_squares[v];
    if (!any(&cancelled))
        return;
    for (int v = 0; v < REGISTERS; v++) {
        const lanes mean = sum[v] * inverse;
        lanes rest = {0}, squares = {0};
        for (Py_ssize_t t = 0; t < m; t++) {
            const lanes c = (*(const unaligned *)(row + t * column_stride + v * LANES) - first[v]) - mean;
            rest += c;
            squares += c * c;
        }
        spread[v] = squares - rest * rest * inverse;
    }
}

/* Whether changes are wanted, and whether WIDTH neighbours belong to one channel. */
enum changes { NO_CHANGES, OF_ONE_CHANNEL, OF_CHANNELS };

/* Where up to WIDTH neighbouring activations and their sums lie. */
typedef struct tile {
    const float *x;
    Py_ssize_t first; /* which activation is the first one */
    double *changes;  /* (m, channels) of this part, or NULL */
    Py_ssize_t row_stride, column_stride;
    double *row_spread, *column_spread;
    const void *centres;
    void *offsets;
    Py_ssize_t offset_stride; /* from one column's offsets to the next one's */
} tile;

#endif
