/* Sums over a block of rows of the ST matrix, with every value read once.
 *
 * What PyTorch takes ten operations for, each of which reads or writes the whole block, is one loop here. kernels.py
 * documents the two functions and checks what they are given; without this module the same sums are taken by PyTorch.
 *
 * A block x is (n, m, k) float32: n samples, m transformations and k activations, next to each other in memory.
 * WIDTH activations at a time go through all rows and columns, so that their sums stay in registers. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#define WIDTH 16       /* activations at a time: one register of AVX-512, two of AVX2 */
#define TILE 64        /* activations whose rows are sorted at a time: they stay in the first cache */
#define MOST_VALUES 256 /* of one activation in a block: rows times columns */
#define MOST_SORTED 64
#define SHARE 1024     /* activations that a thread takes at a time, a multiple of both */
#define SMALLEST 1e-24 /* of sums of float32 squares; some that are part of a smaller one may have been rounded to 0 */
#define LARGEST 1e30   /* of sums of squares */
#define CLEAR 1e-2     /* a spread of columns below this part of all squares drowns in the rounding of float32 */

enum { UNCLEAR = 1, LOST = 2 };

typedef float lanes __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int bits __attribute__((vector_size(WIDTH * sizeof(int))));
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
    Py_ssize_t n, m, k;
    const double *centres;
    double *moments, all_rows;
    float *columns, sign;
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

/* One more value of each row: its distance from the first, which it adds to three sums. */
#define TAKE(t, sum, squares)                                                                                          \
    {                                                                                                                  \
        const lanes further = *(const loose *)(row + (t) * p.column) - first;                                           \
        sum += further;                                                                                                \
        squares += further * further;                                                                                  \
        columns[t] += further;                                                                                         \
    }

/* Where WIDTH activations and their sums lie, (rows, columns, WIDTH) and so on. */
typedef struct place {
    const float *x;
    Py_ssize_t row, column; /* distances */
    const double *centres;
    double *moments;
    Py_ssize_t moment;
    float *columns;
    Py_ssize_t column_sum;
} place;

/* The sums of deviations of WIDTH activations; see add_deviations in kernels.py. */
static inline __attribute__((always_inline)) int deviations_at(place p, const job *j)
{
    const Py_ssize_t n = j->n, m = j->m;
    const float length = (float)m;
    lanes columns[MOST_VALUES], centre, all_firsts = {0}, all_spread = {0}, all_squares = {0}, total = {0};
    bits any_further = {0}, any_first = {0};
    for (int l = 0; l < WIDTH; l++)
        centre[l] = (float)p.centres[l];
    for (Py_ssize_t t = 0; t < m; t++)
        columns[t] = j->sign * *(loose *)(p.columns + t * p.column_sum);
    for (Py_ssize_t i = 0; i < n; i++) {
        const float *row = p.x + i * p.row;
        lanes first = *(const loose *)row, sum = {0}, squares = {0}, more_sum = {0}, more_squares = {0};
        Py_ssize_t t = 1;
        for (; t + 1 < m; t += 2) { /* the processor adds to two sums at the same time */
            TAKE(t, sum, squares)
            TAKE(t + 1, more_sum, more_squares)
        }
        if (t < m)
            TAKE(t, sum, squares)
        sum += more_sum;
        squares += more_squares;
        first -= centre;
        all_firsts += first;
        all_spread += squares - sum * sum / length;
        all_squares += squares + first * (2 * sum + length * first);
        total += sum + length * first;
        any_further |= (bits)sum;
        any_first |= (bits)first;
    }
    lanes column_squares = {0};
    for (Py_ssize_t t = 0; t < m; t++) {
        columns[t] += all_firsts;
        column_squares += columns[t] * columns[t];
    }
    int lost = 0, unclear = 0;
    for (int l = 0; l < WIDTH; l++) {
        all_spread[l] = all_spread[l] < 0 ? 0 : all_spread[l];
        const int varies = (any_further[l] << 1) != 0, shifted = (any_first[l] << 1) != 0; /* minus zero is zero */
        lost |= (varies && all_spread[l] < SMALLEST) || (shifted && all_squares[l] < SMALLEST);
        lost |= !(all_squares[l] <= LARGEST); /* nor NaN */
        const double squares = p.moments[p.moment + l] + j->sign * all_squares[l];
        unclear |= squares - (double)column_squares[l] / j->all_rows < CLEAR * squares;
    }
    if (lost)
        return LOST;
    for (Py_ssize_t t = 0; t < m; t++)
        *(loose *)(p.columns + t * p.column_sum) = j->sign * columns[t];
    for (int l = 0; l < WIDTH; l++) {
        p.moments[l] += j->sign * all_spread[l];
        p.moments[p.moment + l] += j->sign * all_squares[l];
        p.moments[2 * p.moment + l] += j->sign * total[l];
    }
    return unclear ? UNCLEAR : 0;
}

/* The same for fewer activations, in copies that are as wide. */
static inline __attribute__((always_inline)) int deviations_of_few(place p, const job *j, int width)
{
    float x[MOST_VALUES * WIDTH] = {0}, columns[MOST_VALUES * WIDTH] = {0};
    double centres[WIDTH] = {0}, moments[3 * WIDTH] = {0};
    for (Py_ssize_t i = 0; i < j->n; i++)
        for (Py_ssize_t t = 0; t < j->m; t++)
            memcpy(x + (i * j->m + t) * WIDTH, p.x + i * p.row + t * p.column, width * sizeof(float));
    for (Py_ssize_t t = 0; t < j->m; t++)
        memcpy(columns + t * WIDTH, p.columns + t * p.column_sum, width * sizeof(float));
    for (int s = 0; s < 3; s++)
        memcpy(moments + s * WIDTH, p.moments + s * p.moment, width * sizeof(double));
    memcpy(centres, p.centres, width * sizeof(double));
    const place copy = {x, j->m * WIDTH, WIDTH, centres, moments, WIDTH, columns, WIDTH};
    const int found = deviations_at(copy, j);
    for (Py_ssize_t t = 0; t < j->m; t++)
        memcpy(p.columns + t * p.column_sum, columns + t * WIDTH, width * sizeof(float));
    for (int s = 0; s < 3; s++)
        memcpy(p.moments + s * p.moment, moments + s * WIDTH, width * sizeof(double));
    return found;
}

FOR_EACH_PROCESSOR
static void deviations(const job *j, Py_ssize_t from, Py_ssize_t to)
{
    int flags = 0;
    for (Py_ssize_t a = from; a < to; a += WIDTH) {
        const place p = {j->x + a, j->m * j->k, j->k, j->centres + a, j->moments + a, j->k, j->columns + a, j->k};
        flags |= a + WIDTH <= to ? deviations_at(p, j) : deviations_of_few(p, j, (int)(to - a));
    }
    __atomic_fetch_or(&((job *)j)->flags, flags, __ATOMIC_RELAXED);
}

/* The differences within rows; see add_absolute_differences in kernels.py. */
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

/* x, n, m, k, threads, centres, moments, columns, all rows, sign */
static PyObject *add_deviations(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[10];
    if (!read_numbers(args, given, 10, v))
        return NULL;
    job j = {.part = deviations, .x = (const float *)v[0], .n = v[1], .m = v[2], .k = v[3],
             .centres = (const double *)v[5], .moments = (double *)v[6], .columns = (float *)v[7],
             .all_rows = (double)v[8], .sign = (float)v[9]};
    if (j.n * j.m > MOST_VALUES)
        return PyErr_Format(PyExc_ValueError, "Expected at most %d values of each activation.", MOST_VALUES);
    run(&j, (long)v[4]);
    return PyLong_FromLong(j.flags);
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
