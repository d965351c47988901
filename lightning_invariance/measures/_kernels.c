/* Sums over a block of rows of the ST matrix, with every value read once.
 *
 * What PyTorch takes ten operations for, each of which reads or writes the whole block, is one loop here. kernels.py
 * documents the two functions and checks what they are given; without this module the same sums are taken by PyTorch.
 *
 * A block x is (n, m, k) float32: n samples, m transformations and k activations, next to each other in memory.
 * WIDTH activations at a time go through all rows and columns, so that their sums stay in registers. The sums that a
 * walk adds to may lie WIDTH by WIDTH as well, so that all that is needed at a time is near. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define LANES 16       /* numbers in a register of AVX-512, or in two of AVX2 */
#define PARTS 4        /* registers at a time, so that the processor adds to several sums at once */
#define WIDTH (LANES * PARTS)
#define TILE 64        /* activations whose rows are sorted at a time: they stay in the first cache */
#define MOST_VALUES 256 /* of one activation in a block: rows times columns */
#define MOST_SORTED 64
#define SHARE 1024     /* activations that a thread takes at a time, a multiple of both */
/* The limits and flags that follow are those of spread.py and kernels.py, and have to stay so. */
#define SMALLEST 1e-24 /* of sums of float32 squares; some that are part of a smaller one may have been rounded to 0 */
#define LARGEST 1e30   /* of sums of squares */
#define CLEAR 1e-2     /* a spread of columns below this part of all squares drowns in the rounding of float32 */

enum { UNCLEAR = 1, LOST = 2 };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int bits __attribute__((vector_size(LANES * sizeof(int))));
typedef lanes loose __attribute__((aligned(sizeof(float)), may_alias)); /* in memory that begins anywhere */

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* PyTorch's own threads. A second set of threads would wait for these, which keep their cores busy for a while after
 * every operation. Where PyTorch does not use OpenMP, or not this one, everything happens in the calling thread. */
extern void GOMP_parallel(void (*task)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));

typedef struct job {
    void (*part)(const struct job *, Py_ssize_t from, Py_ssize_t to);
    const float *x;
    Py_ssize_t n, m, k, width; /* the sums are (k / width, ..., width) */
    const float *centres;
    double *moments;
    float *columns, sign;
    double rows; /* with those of x */
    const int *network;
    Py_ssize_t comparisons;
    double *total;
    Py_ssize_t next;
    int flags;
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

/* Where WIDTH activations and their sums lie, (rows, columns, WIDTH) and so on. */
typedef struct place {
    const float *x;
    Py_ssize_t row, column; /* distances */
    const float *centres;
    double *moments;
    float *columns;
    Py_ssize_t width; /* distance of two sums of one activation */
} place;

/* The sums of deviations of WIDTH activations; see add_deviations in kernels.py. */
static inline __attribute__((always_inline)) int deviations_at(place p, const job *j)
{
    const Py_ssize_t n = j->n, m = j->m;
    const float length = (float)m;
    const lanes none = {0};
    lanes columns[MOST_VALUES][PARTS], centre[PARTS], all_firsts[PARTS], all_spread[PARTS], all_squares[PARTS],
        column_squares[PARTS];
    bits any_further[PARTS], any_first[PARTS];
    for (int v = 0; v < PARTS; v++) {
        centre[v] = *(const loose *)(p.centres + v * LANES);
        all_firsts[v] = all_spread[v] = all_squares[v] = column_squares[v] = none;
        any_further[v] = any_first[v] = (bits)none;
    }
    for (Py_ssize_t t = 0; t < m; t++)
        for (int v = 0; v < PARTS; v++)
            columns[t][v] = j->sign * *(loose *)(p.columns + t * p.width + v * LANES);
    for (Py_ssize_t i = 0; i < n; i++) {
        const float *row = p.x + i * p.row;
        lanes first[PARTS], sum[PARTS], squares[PARTS];
        for (int v = 0; v < PARTS; v++) {
            first[v] = *(const loose *)(row + v * LANES);
            sum[v] = squares[v] = none;
        }
        for (Py_ssize_t t = 1; t < m; t++)
            for (int v = 0; v < PARTS; v++) {
                const lanes further = *(const loose *)(row + t * p.column + v * LANES) - first[v];
                sum[v] += further;
                squares[v] += further * further;
                columns[t][v] += further;
            }
        for (int v = 0; v < PARTS; v++) {
            first[v] -= centre[v];
            all_firsts[v] += first[v];
            all_spread[v] += squares[v] - sum[v] * sum[v] / length;
            all_squares[v] += squares[v] + first[v] * (2 * sum[v] + length * first[v]);
            any_further[v] |= (bits)sum[v];
            any_first[v] |= (bits)first[v];
        }
    }
    for (Py_ssize_t t = 0; t < m; t++)
        for (int v = 0; v < PARTS; v++) {
            columns[t][v] += all_firsts[v];
            column_squares[v] += columns[t][v] * columns[t][v];
        }
    int lost = 0, unclear = 0;
    for (int l = 0; l < WIDTH; l++) {
        const int v = l / LANES, a = l % LANES;
        all_spread[v][a] = all_spread[v][a] < 0 ? 0 : all_spread[v][a];
        const int varies = (any_further[v][a] << 1) != 0, shifted = (any_first[v][a] << 1) != 0; /* minus zero is 0 */
        lost |= (varies && all_spread[v][a] < SMALLEST) || (shifted && all_squares[v][a] < SMALLEST);
        lost |= !(all_squares[v][a] <= LARGEST); /* nor NaN */
        const double squares = p.moments[p.width + l] + j->sign * all_squares[v][a];
        unclear |= squares - (double)column_squares[v][a] / j->rows < CLEAR * squares;
    }
    if (lost)
        return LOST;
    for (Py_ssize_t t = 0; t < m; t++)
        for (int v = 0; v < PARTS; v++)
            *(loose *)(p.columns + t * p.width + v * LANES) = j->sign * columns[t][v];
    for (int l = 0; l < WIDTH; l++) {
        p.moments[l] += j->sign * all_spread[l / LANES][l % LANES];
        p.moments[p.width + l] += j->sign * all_squares[l / LANES][l % LANES];
    }
    return unclear ? UNCLEAR : 0;
}

/* The same for fewer activations, in copies that are as wide. */
static inline __attribute__((always_inline)) int deviations_of_few(place p, const job *j, int width)
{
    float x[MOST_VALUES * WIDTH] = {0}, columns[MOST_VALUES * WIDTH] = {0};
    float centres[WIDTH] = {0};
    double moments[2 * WIDTH] = {0};
    for (Py_ssize_t i = 0; i < j->n; i++)
        for (Py_ssize_t t = 0; t < j->m; t++)
            memcpy(x + (i * j->m + t) * WIDTH, p.x + i * p.row + t * p.column, width * sizeof(float));
    for (Py_ssize_t t = 0; t < j->m; t++)
        memcpy(columns + t * WIDTH, p.columns + t * p.width, width * sizeof(float));
    for (int s = 0; s < 2; s++)
        memcpy(moments + s * WIDTH, p.moments + s * p.width, width * sizeof(double));
    memcpy(centres, p.centres, width * sizeof(float));
    const place copy = {x, j->m * WIDTH, WIDTH, centres, moments, columns, WIDTH};
    const int found = deviations_at(copy, j);
    for (Py_ssize_t t = 0; t < j->m; t++)
        memcpy(p.columns + t * p.width, columns + t * WIDTH, width * sizeof(float));
    for (int s = 0; s < 2; s++)
        memcpy(p.moments + s * p.width, moments + s * WIDTH, width * sizeof(double));
    return found;
}

FOR_EACH_PROCESSOR
static void deviations(const job *j, Py_ssize_t from, Py_ssize_t to)
{
    int flags = 0;
    for (Py_ssize_t a = from; a < to; a += WIDTH) {
        const Py_ssize_t block = a - a % j->width, in_it = a % j->width;
        const place p = {j->x + a, j->m * j->k, j->k, j->centres + a, j->moments + 2 * block + in_it,
                         j->columns + j->m * block + in_it, j->width};
        flags |= a + WIDTH <= to ? deviations_at(p, j) : deviations_of_few(p, j, (int)(to - a));
    }
    __atomic_fetch_or(&((job *)j)->flags, flags, __ATOMIC_RELAXED);
}

/* The differences within rows; see absolute_differences in kernels.py. */
FOR_EACH_PROCESSOR
static void differences(const job *j, Py_ssize_t from, Py_ssize_t to)
{
    const Py_ssize_t n = j->n, m = j->m, k = j->k;
    float values[MOST_SORTED][TILE];
    for (Py_ssize_t at = from; at < to; at += TILE) {
        const Py_ssize_t a = at + TILE > k ? k - TILE : at;
        double total[TILE] = {0};
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
                total[l] += 2 * (double)sum[l];
        }
        for (int l = 0; l < TILE; l++)
            j->total[a + l] = total[l];
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

/* x, n, m, k, threads, rows, centres, moments, columns, width */
static PyObject *add_deviations(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[10];
    if (!read_numbers(args, given, 10, v))
        return NULL;
    int64_t *rows = (int64_t *)v[5];
    job j = {.part = deviations, .x = (const float *)v[0], .n = v[1], .m = v[2], .k = v[3], .width = v[9],
             .centres = (const float *)v[6], .moments = (double *)v[7], .columns = (float *)v[8],
             .rows = (double)(*rows + v[1]), .sign = 1};
    if (j.n * j.m > MOST_VALUES || (j.width % WIDTH && j.width != j.k))
        return PyErr_Format(PyExc_ValueError, "Expected at most %d values of each activation, and sums by %d or all.",
                            MOST_VALUES, WIDTH);
    run(&j, (long)v[4]);
    const int found = j.flags;
    if (found & LOST) { /* take away what was added where it holds them */
        j.sign = -1;
        j.next = 0;
        run(&j, (long)v[4]);
    } else
        *rows += v[1];
    return PyLong_FromLong(found);
}

/* x, n, m, k, threads, network, comparisons, total */
static PyObject *absolute_differences(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[8];
    if (!read_numbers(args, given, 8, v))
        return NULL;
    job j = {.part = differences, .x = (const float *)v[0], .n = v[1], .m = v[2], .k = v[3],
             .network = (const int *)v[5], .comparisons = v[6], .total = (double *)v[7]};
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
