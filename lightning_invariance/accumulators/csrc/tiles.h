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
 * array has no effect; the arithmetic on uintptr_t is defined there, that on pointers would not be. */
#define PREFETCH(pointer, distance, for_writing)                                                                        \
    __builtin_prefetch((const void *)((uintptr_t)(pointer) + (uintptr_t)(distance) * sizeof *(pointer)), for_writing, 2)

INLINE int any(const bits *mask)
{
    int found = 0;
    for (int l = 0; l < LANES; l++)
        found |= (*mask)[l];
    return found != 0;
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
    float *spreads; /* of each row, k apart, or NULL */
    const void *centres;
    void *offsets;
    Py_ssize_t offset_stride; /* from one column's offsets to the next one's */
} tile;

#endif
