/* Sums over a block of rows of the ST matrix (Quiroga, section 2.2), with every value read once.
 *
 * A block x is (n, m, k) float32: n samples, m transformations and k activations, contiguous. In differences.c it may
 * be a part of a larger tensor, whose rows and columns lie further apart than they are long. deviations.c,
 * differences.c and influences.c hold one kind of sum each, with its derivation; tiles.h and changes.h hold what they
 * share. module.c is the boundary to Python: it checks all sizes before a pointer is used. backends/c_kernels.py calls
 * it. */

#ifndef LIGHTNING_INVARIANCE_KERNELS_H
#define LIGHTNING_INVARIANCE_KERNELS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define LANES 16        /* numbers in a register of AVX-512, or in two of AVX2 */
#define REGISTERS 4     /* at a time, so that the processor adds to several sums at once */
#define WIDTH (LANES * REGISTERS)
#define MOST_VALUES 256 /* rows times columns of one step: bounds the rounding of a float32 sum */
#define MOST_ROWS 16    /* rows of one step, for the same reason */
#define MOST_SORTED 64  /* columns of a row that is sorted in the first cache */
#define SHARE 1024      /* activations that a thread takes at a time at least, a multiple of WIDTH */

/* A copy of a function for each generation of processors, of which the loader takes the best. */
#if defined(FOR_EACH_PROCESSOR) /* by whoever compiles */
#elif defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

/* When float32 sums are not good enough; the values come from c_kernels.py. */
typedef struct limits {
    float smallest; /* a sum of squares below this may have lost digits, if its terms are not 0 */
    float largest;  /* a sum of squares above this may overflow where it is multiplied */
    double far;     /* float32 offsets are too coarse where C < far * N * sum o_j^2 ... */
    double rows_for_far; /* ... and N is at least this: fewer may be alike by chance */
} limits;

typedef struct job {
    void (*task)(struct job *, Py_ssize_t from, Py_ssize_t to);
    const float *x;
    Py_ssize_t n, m, k;
    Py_ssize_t next;  /* the first activation that no thread has taken yet */
    Py_ssize_t share; /* activations that a thread takes at a time, a multiple of WIDTH: a part of the sums `parts` */
    /* of add_deviations */
    double before, total; /* N0 and N */
    double *row_spread, *column_spread;
    const void *centres;
    void *offsets;
    Py_ssize_t width;
    int wide; /* centres and offsets are double instead of float */
    limits limits;
    int far;
    /* of changes: in add_deviations and add_influences */
    double *changes;     /* (parts, m, channels) or (parts, rows, m); NULL without */
    Py_ssize_t reference; /* the column that changes are taken from */
    Py_ssize_t channels, inner; /* `inner`: neighbouring activations of one channel */
    int centred;   /* changes are deviations from the mean of the row, not from the reference */
    double factor; /* of their squares */
    /* of absolute_differences */
    Py_ssize_t row, column; /* how far rows, and columns, lie apart */
    const int *network;
    Py_ssize_t comparisons;
    double *differences; /* (k,), or (n, k) of each row */
    int of_rows;
    /* of add_influences */
    const float *means, *weights; /* (m, k); (4, k): w, v, b and s */
    const int *counts;            /* (k,): all bits where an activation counts, else none */
    double *squares, *fourths;    /* (k,) */
    double *on_sum;               /* (parts, rows) */
    Py_ssize_t rows;              /* of all steps */
    const float *factors;         /* (k,), or NULL: then there are no changes and no spreads */
    float *spreads;               /* (rows, k) */
} job;

/* Tasks of a job: the activations in [from, to). */
void deviations(job *j, Py_ssize_t from, Py_ssize_t to);
void differences(job *j, Py_ssize_t from, Py_ssize_t to);
void influences(job *j, Py_ssize_t from, Py_ssize_t to);

#endif
