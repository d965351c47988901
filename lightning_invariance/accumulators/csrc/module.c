/* The boundary to Python. Each function takes the keyword arguments that backends/c_kernels.py passes, and checks that
 * all sizes fit together before a pointer is used. */

#include "kernels.h"

/* Runs a task on PyTorch's own OpenMP threads, which spin for a while after each of its operations: a second pool would
 * compete with them. Where this symbol is missing (PyTorch without GNU OpenMP), the calling thread does everything. */
extern void GOMP_parallel(void (*task)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));

static void take_shares(void *data)
{
    job *j = data;
    for (;;) {
        Py_ssize_t from = __atomic_fetch_add(&j->next, j->share, __ATOMIC_RELAXED);
        if (from >= j->k)
            return;
        j->task(j, from, from + j->share < j->k ? from + j->share : j->k);
    }
}

static void run(job *j, Py_ssize_t threads)
{
    Py_BEGIN_ALLOW_THREADS
    j->next = 0;
    if (threads > 1 && j->k > j->share && GOMP_parallel)
        GOMP_parallel(take_shares, j, (unsigned)threads, 0);
    else
        take_shares(j);
    Py_END_ALLOW_THREADS
}

/* Cuts the activations into a part for each thread. Each part has its own sums over activations, so that these do not
 * depend on which thread takes it. Returns the number of parts. */
static Py_ssize_t cut(job *j, Py_ssize_t threads)
{
    const Py_ssize_t most = (j->k - 1) / SHARE + 1, parts = threads < most ? (threads > 1 ? threads : 1) : most;
    j->share = ((j->k - 1) / parts / WIDTH + 1) * WIDTH;
    return parts;
}

/* Room for `size` sums of each part, which are 0; the sums themselves where there is one part. */
static double *apart(double *sums, Py_ssize_t parts, Py_ssize_t size)
{
    double *const own = parts == 1 || !sums ? sums : PyMem_Calloc((size_t)(parts * size), sizeof(double));
    if (sums && !own)
        PyErr_NoMemory();
    return own;
}

/* Adds what the parts came to, and frees their room. */
static void join(double *sums, double *own, Py_ssize_t parts, Py_ssize_t size)
{
    if (own == sums)
        return;
    for (Py_ssize_t part = 0; own && part < parts; part++)
        for (Py_ssize_t at = 0; at < size; at++)
            sums[at] += own[part * size + at];
    PyMem_Free(own);
}

/* A tensor: (address, number of values); no address for None. */
typedef struct tensor {
    void *values;
    Py_ssize_t length;
} tensor;

/* A block of rows: (address, number of values, n, m, k). */
typedef struct block {
    const float *values;
    Py_ssize_t length, n, m, k;
} block;

static int read_tensor(PyObject *given, void *into)
{
    tensor *const found = into;
    Py_ssize_t address;
    *found = (tensor){NULL, 0};
    if (given == Py_None)
        return 1;
    if (!PyArg_Parse(given, "(nn)", &address, &found->length))
        return 0;
    found->values = (void *)address;
    return 1;
}

static int read_block(PyObject *given, void *into)
{
    block *const found = into;
    Py_ssize_t address;
    if (!PyArg_Parse(given, "(nnnnn)", &address, &found->length, &found->n, &found->m, &found->k))
        return 0;
    found->values = (const float *)address;
    return 1;
}

/* Whether a tensor is there and has so many values. */
static int holds(tensor given, Py_ssize_t length)
{
    return given.values && given.length == length;
}

/* Whether a block is there and n, m and k are sizes whose product is the number of its values. */
static int is_whole(block x)
{
    Py_ssize_t row, all;
    return x.values && x.n >= 0 && x.m > 0 && x.k > 0 && !__builtin_mul_overflow(x.m, x.k, &row)
           && !__builtin_mul_overflow(x.n, row, &all) && all == x.length;
}

/* Whether a block is there and its last value, with rows and columns so far apart, within the number of its values. */
static int is_within(block x, Py_ssize_t row, Py_ssize_t column)
{
    Py_ssize_t rows, columns, all;
    return x.values && x.n > 0 && x.m > 0 && x.k > 0 && row >= 0 && column >= 0
           && !__builtin_mul_overflow(x.n - 1, row, &rows) && !__builtin_mul_overflow(x.m - 1, column, &columns)
           && !__builtin_add_overflow(rows, columns, &all) && !__builtin_add_overflow(all, x.k, &all)
           && all <= x.length;
}

static PyObject *refuse(const char *what)
{
    return PyErr_Format(PyExc_ValueError, "Expected a block and sums that fit together, but %s.", what);
}

/* Returns whether columns are far apart. `reference` is -1 where changes are taken from the mean of the row. */
static PyObject *add_deviations(PyObject *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"block", "before", "row_spread", "column_spread", "centres", "offsets", "width", "wide",
                            "limits", "changes", "inner", "reference", "threads", NULL};
    block x;
    tensor row_spread, column_spread, centres, offsets, changes;
    limits limits;
    Py_ssize_t before, width, inner, reference, threads;
    int wide;
    if (!PyArg_ParseTupleAndKeywords(args, named, "O&nO&O&O&O&np(ffdd)O&nnn", names, read_block, &x, &before,
                                     read_tensor, &row_spread, read_tensor, &column_spread, read_tensor, &centres,
                                     read_tensor, &offsets, &width, &wide, &limits.smallest, &limits.largest,
                                     &limits.far, &limits.rows_for_far, read_tensor, &changes,
                                     &inner, &reference, &threads))
        return NULL;
    const Py_ssize_t n = x.n, m = x.m, k = x.k, channels = changes.length / (m > 0 ? m : 1);
    if (!is_whole(x) || before < 0)
        return refuse("the block is missing or has another number of values");
    if (m > MOST_VALUES)
        return refuse("the block has too many columns");
    if (!holds(row_spread, k) || !holds(column_spread, k) || !holds(centres, k) || !holds(offsets, m * k))
        return refuse("the sums are missing or of other sizes");
    if (width <= 0 || k % width || (width % WIDTH && width != k))
        return refuse("the offsets lie in tiles of another width");
    if (changes.values
        && (changes.length % m || channels <= 0 || inner <= 0 || k % channels || k / channels % inner || reference < -1
            || reference >= m))
        return refuse("the changes are of other sizes");
    job j = {.task = deviations, .x = x.values, .m = m, .k = k, .total = (double)before, .width = width, .wide = wide,
             .row_spread = row_spread.values, .column_spread = column_spread.values, .centres = centres.values,
             .offsets = offsets.values, .limits = limits, .channels = channels, .inner = inner,
             .centred = reference < 0, .reference = changes.values && reference > 0 ? reference : 0,
             .factor = reference < 0 ? (double)m / (double)(m > 1 ? m - 1 : 1) : .5};
    const Py_ssize_t parts = cut(&j, threads);
    j.changes = apart(changes.values, parts, m * channels);
    if (changes.values && !j.changes)
        return NULL;
    const Py_ssize_t most = MOST_VALUES / m < MOST_ROWS ? MOST_VALUES / m : MOST_ROWS;
    for (Py_ssize_t left = n; left > 0; left -= j.n, j.x += j.n * m * k) {
        j.before = j.total;
        j.n = j.before > 0 && j.before < (double)most ? (Py_ssize_t)j.before : most;
        j.n = left < j.n ? left : j.n;
        j.total += (double)j.n;
        run(&j, threads);
    }
    join(changes.values, j.changes, parts, m * channels);
    return PyBool_FromLong(j.far);
}

static PyObject *absolute_differences(PyObject *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"block", "strides", "network", "differences", "of_rows", "threads", NULL};
    block x;
    tensor network, sums;
    Py_ssize_t row, column, threads;
    int of_rows;
    if (!PyArg_ParseTupleAndKeywords(args, named, "O&(nn)O&O&pn", names, read_block, &x, &row, &column, read_tensor,
                                     &network, read_tensor, &sums, &of_rows, &threads))
        return NULL;
    const Py_ssize_t n = x.n, m = x.m, k = x.k, comparisons = network.length / 2;
    if (!is_within(x, row, column))
        return refuse("the block is missing or has another number of values");
    if (m > MOST_SORTED)
        return refuse("the block has too many columns");
    if (network.length < 0 || network.length % 2 || comparisons > m * m || (comparisons && !network.values)
        || !holds(sums, of_rows ? n * k : k))
        return refuse("the sums or the sorting network are missing or of other sizes");
    const int *const columns = network.values;
    for (Py_ssize_t c = 0; c < network.length; c++)
        if (columns[c] < 0 || columns[c] >= m)
            return refuse("the sorting network compares columns that the block does not have");
    job j = {.task = differences, .x = x.values, .n = n, .m = m, .k = k, .row = row, .column = column, .share = SHARE,
             .network = columns, .comparisons = comparisons, .differences = sums.values, .of_rows = of_rows};
    run(&j, threads);
    Py_RETURN_NONE;
}

/* Without `factors` there are no changes and no spreads. */
static PyObject *add_influences(PyObject *self, PyObject *args, PyObject *named)
{
    static char *names[] = {"block", "means", "weights", "counts", "squares", "fourths", "on_sum", "factors",
                            "reference", "changes", "spreads", "threads", NULL};
    block x;
    tensor means, weights, counts, squares, fourths, on_sum, factors, changes, spreads;
    Py_ssize_t reference, threads;
    if (!PyArg_ParseTupleAndKeywords(args, named, "O&O&O&O&O&O&O&O&nO&O&n", names, read_block, &x, read_tensor, &means,
                                     read_tensor, &weights, read_tensor, &counts, read_tensor, &squares, read_tensor,
                                     &fourths, read_tensor, &on_sum, read_tensor, &factors, &reference, read_tensor,
                                     &changes, read_tensor, &spreads, &threads))
        return NULL;
    const Py_ssize_t n = x.n, m = x.m, k = x.k;
    if (!is_whole(x))
        return refuse("the block is missing or has another number of values");
    if (m > MOST_VALUES)
        return refuse("the block has too many columns");
    if (!holds(means, m * k) || weights.length % 4 || !holds(weights, weights.length) || weights.length / 4 != k
        || !holds(counts, k) || !holds(squares, k) || !holds(fourths, k) || !holds(on_sum, n))
        return refuse("the means, the weights or the sums are missing or of other sizes");
    if (factors.values
        && (factors.length != k || !holds(changes, n * m) || !holds(spreads, n * k) || reference < 0 || reference >= m))
        return refuse("the factors, the changes or the spreads are of other sizes");
    job j = {.task = influences, .x = x.values, .m = m, .k = k, .means = means.values, .weights = weights.values,
             .counts = counts.values, .squares = squares.values, .fourths = fourths.values, .rows = n,
             .factors = factors.values, .spreads = spreads.values, .reference = reference};
    double *const all_changes = factors.values ? changes.values : NULL;
    const Py_ssize_t parts = cut(&j, threads);
    double *const own = apart(on_sum.values, parts, n);
    double *const own_changes = own ? apart(all_changes, parts, n * m) : NULL;
    if (!own || (all_changes && !own_changes)) {
        join(on_sum.values, own, 0, 0);
        return NULL;
    }
    j.on_sum = own;
    j.changes = own_changes;
    const Py_ssize_t step = j.factors ? MOST_VALUES / m : n;
    for (Py_ssize_t left = n; left > 0; left -= j.n, j.x += j.n * m * k, j.on_sum += j.n) {
        j.n = left < step ? left : step;
        run(&j, threads);
        if (j.factors) {
            j.changes += j.n * m;
            j.spreads += j.n * k;
        }
    }
    join(on_sum.values, own, parts, n);
    join(all_changes, own_changes, parts, n * m);
    Py_RETURN_NONE;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_VARARGS | METH_KEYWORDS, NULL}

static PyMethodDef methods[] = {
    METHOD(add_deviations),
    METHOD(add_influences),
    METHOD(absolute_differences),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntMacro(made, WIDTH) || PyModule_AddIntMacro(made, MOST_VALUES)
                 || PyModule_AddIntMacro(made, MOST_ROWS)
                 || PyModule_AddIntMacro(made, MOST_SORTED))) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
