/* Sums over a block of rows of the ST matrix, with every value read once.
 *
 * What PyTorch takes ten operations for, each of which reads or writes the whole block, is one loop here. kernels.py
 * documents the two functions and checks what they are given; without this module the same sums are taken by PyTorch.
 *
 * A block x is (n, m, k) float32: n samples, m transformations and k activations, next to each other in memory.
 * WIDTH activations at a time go through all rows and columns, so that their sums stay in registers. What is kept for
 * each column may lie WIDTH by WIDTH as well, so that all that is needed at a time is near. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define LANES 16       /* numbers in a register of AVX-512, or in two of AVX2 */
#define PARTS 4        /* registers at a time, so that the processor adds to several sums at once */
#define WIDTH (LANES * PARTS)
#define TILE 64        /* activations whose rows are sorted at a time: they stay in the first cache */
#define MOST_VALUES 256 /* of one activation at a time: rows times columns */
#define MOST_SORTED 64
#define SHARE 1024     /* activations that a thread takes at a time, a multiple of both */
#define SMALLEST 1e-24f /* of sums of float32 squares; some that are part of a smaller one may have been rounded to 0 */
#define LARGEST 1e30f   /* of sums of squares */
#define FAR 1e-4       /* those of spread.py */
#define ROWS_THAT_TELL 8

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int bits __attribute__((vector_size(LANES * sizeof(int))));
typedef lanes loose __attribute__((aligned(sizeof(float)), may_alias)); /* in memory that begins anywhere */

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* Brings what lies so many numbers further, for the next activations, into the second cache; the first is too small for
 * it. That there may be nothing does no harm. */
#define FETCH(numbers, further, to_write)                                                                               \
    __builtin_prefetch((const void *)((uintptr_t)(numbers) + (uintptr_t)(further) * sizeof *(numbers)), (to_write), 2)

/* PyTorch's own threads. A second set of threads would wait for these, which keep their cores busy for a while after
 * every operation. Where PyTorch does not use OpenMP, or not this one, everything happens in the calling thread. */
extern void GOMP_parallel(void (*task)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));

typedef struct job {
    void (*part)(const struct job *, Py_ssize_t from, Py_ssize_t to);
    const float *x;
    Py_ssize_t n, m, k;
    double before, total; /* rows, without and with those of x */
    double *row_spread, *column_spread;
    const void *centres;
    void *offsets; /* (k / width, m, width) */
    Py_ssize_t width;
    int wide; /* whether centres and offsets are double, not float */
    const int *network;
    Py_ssize_t comparisons;
    double *differences;
    Py_ssize_t next;
    int far;
} job;

static void take_shares(void *data)
{
    job *j = data;
    for (;;) {
        Py_ssize_t from = __atomic_fetch_add(&j->next, SHARE, __ATOMIC_RELAXED);
        if (from >= j->k)
            return;
        j->part(j, from, from + SHARE < j->k ? from + SHARE : j->k);
    }
}

static void run(job *j, long threads)
{
    Py_BEGIN_ALLOW_THREADS
    if (threads > 1 && j->k > SHARE && GOMP_parallel)
        GOMP_parallel(take_shares, j, (unsigned)threads, 0);
    else
        take_shares(j);
    Py_END_ALLOW_THREADS
}

static inline __attribute__((always_inline)) int any(const bits *found)
{
    int one = 0;
    for (int a = 0; a < LANES; a++)
        one |= (*found)[a];
    return one != 0;
}

/* Where some activations and their sums lie. */
typedef struct place {
    const float *x;
    Py_ssize_t row, column; /* distances */
    double *row_spread, *column_spread;
    const void *centres;
    void *offsets;
    Py_ssize_t width; /* distance of two offsets of one activation */
} place;

/* Whether columns are so far apart, for their variance, that float32 does not do for their offsets. */
static inline __attribute__((always_inline)) int far_apart(const double *column_spread, const float *offset_squares,
                                                           const job *j, int width)
{
    int far = 0;
    for (int l = 0; l < width; l++)
        far |= (column_spread[l] > 0) & (column_spread[l] < FAR * j->total * offset_squares[l]);
    return far && j->total >= ROWS_THAT_TELL;
}

/* The sums of up to WIDTH activations in double: where float32 does not hold all squares, where the means are wide, and
 * for what is left over of the activations. */
static inline __attribute__((always_inline)) int deviations_in_double(place p, const job *j, int width, int wide)
{
    double squares[WIDTH] = {0};
    float offset_squares[WIDTH] = {0};
    for (Py_ssize_t i = 0; i < j->n; i++) {
        const float *row = p.x + i * p.row;
        double sum[WIDTH] = {0}, further[WIDTH] = {0};
        for (Py_ssize_t t = 1; t < j->m; t++)
            for (int l = 0; l < width; l++) {
                const double apart = (double)row[t * p.column + l] - row[l];
                sum[l] += apart;
                further[l] += apart * apart;
            }
        for (int l = 0; l < width; l++)
            p.row_spread[l] += further[l] - sum[l] * sum[l] / (double)j->m;
    }
    for (Py_ssize_t t = 0; t < j->m; t++) {
        float *const narrow_offsets = (float *)p.offsets + t * p.width;
        double *const wide_offsets = (double *)p.offsets + t * p.width;
        double offsets[WIDTH], means[WIDTH], sum[WIDTH] = {0};
        for (int l = 0; l < width; l++) {
            offsets[l] = wide ? wide_offsets[l] : narrow_offsets[l];
            means[l] = offsets[l] + (wide ? ((const double *)p.centres)[l] : ((const float *)p.centres)[l]);
        }
        for (Py_ssize_t i = 0; i < j->n; i++)
            for (int l = 0; l < width; l++) {
                const double deviation = p.x[i * p.row + t * p.column + l] - means[l];
                sum[l] += deviation;
                squares[l] += deviation * deviation;
            }
        for (int l = 0; l < width; l++) {
            const double mean = offsets[l] + sum[l] / j->total, to = wide ? mean : (float)mean;
            const double shift = to - offsets[l];
            squares[l] += shift * (j->total * shift - 2 * sum[l]);
            offset_squares[l] += (float)(to * to);
            if (wide)
                wide_offsets[l] = to;
            else
                narrow_offsets[l] = (float)to;
        }
    }
    for (int l = 0; l < width; l++)
        p.column_spread[l] += squares[l];
    return !wide && far_apart(p.column_spread, offset_squares, j, width);
}

/* Moves the means of WIDTH activations to those of all rows, and adds what that changes to the squares.
 *
 * The last digits of the means are lost. That costs next to nothing, as squared deviations are those about the means
 * that are kept. With a centre, float32 holds the means less well than the offsets: the deviations lack the rest. */
static inline __attribute__((always_inline)) void move_means(place p, const job *j, lanes means[][PARTS],
                                                             lanes columns[][PARTS], const lanes *centre, lanes *squares,
                                                             lanes *offset_squares, int centred)
{
    const float before = (float)j->before, total = (float)j->total, share = 1 / total;
    for (Py_ssize_t t = 0; t < j->m; t++)
        for (int v = 0; v < PARTS; v++) {
            loose *const offset = (loose *)((float *)p.offsets + t * p.width + v * LANES);
            const lanes from = *offset;
            lanes sum = columns[t][v], rest = {0};
            if (centred) {
                const lanes near = means[t][v] - centre[v];
                rest = (centre[v] - (means[t][v] - near)) + (from - near);
                sum += before * rest;
                squares[v] += before * rest * rest;
            }
            const lanes to = from + (sum * share - rest), shift = (to - from) + rest;
            squares[v] += shift * (total * shift - 2 * sum);
            offset_squares[v] += to * to;
            *offset = to;
        }
}

/* The sums of WIDTH activations. Rows are centred on their first value and columns on their means so far, so that what
 * is constant has a spread of exactly 0. None is below 0: with one of m deviations 0, the square of their sum is at most
 * m - 1 times the sum of their squares. */
static inline __attribute__((always_inline)) int deviations_at(place p, const job *j)
{
    const Py_ssize_t n = j->n, m = j->m;
    const float length = (float)m;
    const lanes none = {0};
    lanes means[MOST_VALUES][PARTS], columns[MOST_VALUES][PARTS];
    lanes centre[PARTS], row_spread[PARTS], squares[PARTS], offset_squares[PARTS];
    bits rows_vary[PARTS], columns_vary[PARTS], found = (bits)none;
    for (int v = 0; v < PARTS; v++) {
        centre[v] = *(const loose *)((const float *)p.centres + v * LANES);
        row_spread[v] = squares[v] = offset_squares[v] = none;
        rows_vary[v] = columns_vary[v] = (bits)none;
        found |= centre[v] != 0;
    }
    const int centred = any(&found);
    for (Py_ssize_t t = 0; t < m; t++)
        for (int v = 0; v < PARTS; v++) {
            means[t][v] = centre[v] + *(const loose *)((float *)p.offsets + t * p.width + v * LANES);
            columns[t][v] = none;
            FETCH((float *)p.offsets, (t + m) * p.width + v * LANES, 1);
        }
    for (int l = 0; l < WIDTH; l += 8) {
        FETCH(p.row_spread, 2 * WIDTH + l, 1);
        FETCH(p.column_spread, 2 * WIDTH + l, 1);
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        const float *row = p.x + i * p.row;
        lanes first[PARTS], sum[PARTS], further[PARTS];
        for (int v = 0; v < PARTS; v++) {
            first[v] = *(const loose *)(row + v * LANES);
            sum[v] = further[v] = none;
        }
        for (Py_ssize_t t = 0; t < m; t++)
            for (int v = 0; v < PARTS; v++) {
                const loose *const value = (const loose *)(row + t * p.column + v * LANES);
                FETCH(value, 2 * PARTS, 0);
                const lanes apart = *value - first[v], deviation = *value - means[t][v];
                sum[v] += apart;
                further[v] += apart * apart;
                columns[t][v] += deviation;
                squares[v] += deviation * deviation;
                columns_vary[v] |= (bits)deviation;
            }
        for (int v = 0; v < PARTS; v++) {
            row_spread[v] += further[v] - sum[v] * sum[v] / length;
            rows_vary[v] |= (bits)sum[v];
        }
    }
    found = (bits)none;
    for (int v = 0; v < PARTS; v++) {
        const bits held = (row_spread[v] <= LARGEST) & (squares[v] <= LARGEST); /* not so if NaN */
        const bits small_rows = ((rows_vary[v] & INT32_MAX) != 0) & (row_spread[v] < SMALLEST); /* minus zero is 0 */
        const bits small_columns = ((columns_vary[v] & INT32_MAX) != 0) & (squares[v] < SMALLEST);
        found |= ~held | small_rows | small_columns;
    }
    if (any(&found))
        return deviations_in_double(p, j, WIDTH, 0);
    if (centred)
        move_means(p, j, means, columns, centre, squares, offset_squares, 1);
    else
        move_means(p, j, means, columns, centre, squares, offset_squares, 0);
    float sums[3][WIDTH];
    memcpy(sums[0], row_spread, sizeof sums[0]);
    memcpy(sums[1], squares, sizeof sums[1]);
    memcpy(sums[2], offset_squares, sizeof sums[2]);
    for (int l = 0; l < WIDTH; l++)
        p.row_spread[l] += sums[0][l];
    for (int l = 0; l < WIDTH; l++)
        p.column_spread[l] += sums[1][l];
    return far_apart(p.column_spread, sums[2], j, WIDTH);
}

FOR_EACH_PROCESSOR
static void deviations(const job *j, Py_ssize_t from, Py_ssize_t to)
{
    int far = 0;
    for (Py_ssize_t a = from; a < to; a += WIDTH) {
        const Py_ssize_t part = a - a % j->width, in_it = a % j->width, size = j->wide ? sizeof(double) : sizeof(float);
        const place p = {j->x + a, j->m * j->k, j->k, j->row_spread + a, j->column_spread + a,
                         (const char *)j->centres + size * a, (char *)j->offsets + size * (j->m * part + in_it), j->width};
        const int width = to - a < WIDTH ? (int)(to - a) : WIDTH;
        if (j->wide)
            deviations_in_double(p, j, width, 1);
        else
            far |= width == WIDTH ? deviations_at(p, j) : deviations_in_double(p, j, width, 0);
    }
    __atomic_fetch_or(&((job *)j)->far, far, __ATOMIC_RELAXED);
}

/* The differences within rows; see absolute_differences in kernels.py. */
FOR_EACH_PROCESSOR
static void differences(const job *j, Py_ssize_t from, Py_ssize_t to)
{
    const Py_ssize_t n = j->n, m = j->m, k = j->k;
    float values[MOST_SORTED][TILE];
    for (Py_ssize_t at = from; at < to; at += TILE) {
        const Py_ssize_t a = at + TILE > k ? k - TILE : at;
        double differences[TILE] = {0};
        for (Py_ssize_t i = 0; i < n; i++) {
            const float *first = j->x + i * m * k + a;
            float sum[TILE] = {0};
            for (Py_ssize_t t = 0; t < m; t++)
                for (int l = 0; l < TILE; l++)
                    values[t][l] = first[t * k + l] - first[l];
            for (Py_ssize_t c = 0; c < j->comparisons; c++) {
                float *restrict low = values[j->network[2 * c]], *restrict high = values[j->network[2 * c + 1]];
                for (int l = 0; l < TILE; l++) {
                    const float one = low[l], other = high[l];
                    low[l] = one < other ? one : other; /* NaN only changes places, and stays in the sum */
                    high[l] = one < other ? other : one;
                }
            }
            /* Of the values in order, the r-th smallest is larger than r - 1 others and smaller than m - r. */
            for (Py_ssize_t t = 0; t < m; t++)
                for (int l = 0; l < TILE; l++)
                    sum[l] += (float)(2 * t + 1 - m) * values[t][l];
            for (int l = 0; l < TILE; l++)
                differences[l] += 2 * (double)sum[l];
        }
        for (int l = 0; l < TILE; l++)
            j->differences[a + l] = differences[l];
    }
}

static int read_numbers(PyObject *const *args, Py_ssize_t n, Py_ssize_t expected, Py_ssize_t *numbers)
{
    if (n != expected) {
        PyErr_Format(PyExc_TypeError, "Expected %zd arguments, but got %zd.", expected, n);
        return 0;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        numbers[i] = PyLong_AsSsize_t(args[i]);
        if (numbers[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

/* x, n, m, k, threads, rows, row_spread, column_spread, centres, offsets, width, wide */
static PyObject *add_deviations(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[12];
    if (!read_numbers(args, given, 12, v))
        return NULL;
    int64_t *rows = (int64_t *)v[5];
    job j = {.part = deviations, .x = (const float *)v[0], .m = v[2], .k = v[3], .row_spread = (double *)v[6],
             .column_spread = (double *)v[7], .centres = (const void *)v[8], .offsets = (void *)v[9], .width = v[10],
             .wide = v[11] != 0};
    if (j.m > MOST_VALUES || (j.width % WIDTH && j.width != j.k))
        return PyErr_Format(PyExc_ValueError, "Expected at most %d columns, and sums by %d or all.", MOST_VALUES, WIDTH);
    for (Py_ssize_t left = v[1]; left > 0; left -= j.n, j.x += j.n * j.m * j.k, j.next = 0) {
        j.n = left * j.m <= MOST_VALUES ? left : MOST_VALUES / j.m;
        j.before = (double)*rows;
        j.total = (double)(*rows += j.n);
        run(&j, (long)v[4]);
    }
    return PyLong_FromLong(j.far);
}

/* x, n, m, k, threads, network, comparisons, total */
static PyObject *absolute_differences(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[8];
    if (!read_numbers(args, given, 8, v))
        return NULL;
    job j = {.part = differences, .x = (const float *)v[0], .n = v[1], .m = v[2], .k = v[3],
             .network = (const int *)v[5], .comparisons = v[6], .differences = (double *)v[7]};
    if (j.m > MOST_SORTED || j.k < TILE)
        return PyErr_Format(PyExc_ValueError, "Expected at most %d columns of at least %d activations.", MOST_SORTED,
                            TILE);
    run(&j, (long)v[4]);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add_deviations", (PyCFunction)(void (*)(void))add_deviations, METH_FASTCALL, NULL},
    {"absolute_differences", (PyCFunction)(void (*)(void))absolute_differences, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModule_Create(&module);
}
