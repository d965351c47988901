/* The boundary to Python: the functions that check again what kernels.py passes, before a pointer is used. */

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

/* Cuts the activations into a part for each thread, whose sums over activations then do not depend on which thread takes
 * which part. Returns the number of parts. Smaller parts would spread what neighbours share over more processors. */
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

/* Reads `count` integers from the arguments, and after them `doubles` numbers. */
static int read_numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, Py_ssize_t *numbers, int doubles,
                        double *values)
{
    if (given != count + doubles) {
        PyErr_Format(PyExc_TypeError, "Expected %zd arguments, but got %zd.", count + doubles, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        numbers[i] = PyLong_AsSsize_t(args[i]);
        if (numbers[i] == -1 && PyErr_Occurred())
            return 0;
    }
    for (int i = 0; i < doubles; i++) {
        values[i] = PyFloat_AsDouble(args[count + i]);
        if (values[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

/* Whether n, m and k are sizes whose product is `values`. */
static int is_block(Py_ssize_t n, Py_ssize_t m, Py_ssize_t k, Py_ssize_t values)
{
    Py_ssize_t row, all;
    return n >= 0 && m > 0 && k > 0 && !__builtin_mul_overflow(m, k, &row) && !__builtin_mul_overflow(n, row, &all)
           && all == values;
}

static PyObject *refuse(const char *what)
{
    return PyErr_Format(PyExc_ValueError, "Expected a block and sums that fit together, but %s.", what);
}

/* Pointers come with the number of elements behind them:
 * n, m, k, threads, before, width, wide, x, its values, row_spread, its values, column_spread, its values, centres, their
 * values, offsets, their values, changes (or 0), channels, inner, reference (-1: changes are taken from the mean of the
 * row), spreads (or 0), their values; smallest, largest, far, rows_for_far, far_of_few. Returns whether columns are far
 * apart. */
static PyObject *add_deviations(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[23];
    double limit[5];
    if (!read_numbers(args, given, 23, v, 5, limit))
        return NULL;
    const Py_ssize_t n = v[0], m = v[1], k = v[2], width = v[5];
    if (!is_block(n, m, k, v[8]))
        return refuse("the block has another number of values");
    if (m > MOST_VALUES)
        return refuse("the block has too many columns");
    if (v[10] != k || v[12] != k || v[14] != k || v[16] != m * k)
        return refuse("the sums are of other sizes");
    if (width <= 0 || k % width || (width % WIDTH && width != k))
        return refuse("the offsets lie in tiles of another width");
    if (v[4] < 0 || !v[7] || !v[9] || !v[11] || !v[13] || !v[15])
        return refuse("a pointer or the number of rows is missing");
    const Py_ssize_t channels = v[18], inner = v[19], reference = v[20];
    if (v[17] && (channels <= 0 || inner <= 0 || k % channels || k / channels % inner || reference < -1
                  || reference >= m))
        return refuse("the changes are of other sizes");
    if (v[21] && v[22] != n * k)
        return refuse("the spreads are of another size");
    job j = {.task = deviations, .x = (const float *)v[7], .m = m, .k = k, .total = (double)v[4], .width = width,
             .wide = v[6] != 0, .row_spread = (double *)v[9], .column_spread = (double *)v[11],
             .centres = (const void *)v[13], .offsets = (void *)v[15],
             .limits = {(float)limit[0], (float)limit[1], limit[2], limit[3], limit[4]},
             .spreads = (float *)v[21], .channels = channels, .inner = inner, .centred = reference < 0,
             .reference = v[17] && reference > 0 ? reference : 0,
             .factor = reference < 0 ? (double)m / (double)(m > 1 ? m - 1 : 1) : .5};
    double *const changes = (double *)v[17];
    const Py_ssize_t parts = cut(&j, v[3]);
    j.changes = apart(changes, parts, m * channels);
    if (changes && !j.changes)
        return NULL;
    for (Py_ssize_t left = n; left > 0; left -= j.n, j.x += j.n * m * k) {
        j.n = left <= MOST_VALUES / m ? left : MOST_VALUES / m;
        j.before = j.total;
        j.total += (double)j.n;
        run(&j, v[3]);
        if (j.spreads)
            j.spreads += j.n * k;
    }
    join(changes, j.changes, parts, m * channels);
    return PyBool_FromLong(j.far);
}

/* Whether the last of n rows of m columns of k values ends within `values`. */
static int is_within(Py_ssize_t n, Py_ssize_t m, Py_ssize_t k, Py_ssize_t row, Py_ssize_t column, Py_ssize_t values)
{
    Py_ssize_t rows, columns, all;
    if (n < 0 || m <= 0 || k <= 0 || row < 0 || column < 0)
        return 0;
    return !n
           || (!__builtin_mul_overflow(n - 1, row, &rows) && !__builtin_mul_overflow(m - 1, column, &columns)
               && !__builtin_add_overflow(rows, columns, &all) && !__builtin_add_overflow(all, k, &all)
               && all <= values);
}

/* n, m, k, threads, comparisons, row, column, x, values from x on, network, its values, differences, their values, which
 * are k, or n * k for those of each row; whether of each row. */
static PyObject *absolute_differences(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[14];
    if (!read_numbers(args, given, 14, v, 0, NULL))
        return NULL;
    const Py_ssize_t n = v[0], m = v[1], k = v[2], comparisons = v[4];
    if (!is_within(n, m, k, v[5], v[6], v[8]))
        return refuse("the block has another number of values");
    if (m > MOST_SORTED)
        return refuse("the block has too many columns");
    if (comparisons < 0 || comparisons > m * m || v[10] != 2 * comparisons || v[12] != (v[13] ? n * k : k))
        return refuse("the sums or the sorting network are of other sizes");
    if ((n && !v[7]) || (comparisons && !v[9]) || !v[11])
        return refuse("a pointer is missing");
    const int *const network = (const int *)v[9];
    for (Py_ssize_t c = 0; c < 2 * comparisons; c++)
        if (network[c] < 0 || network[c] >= m)
            return refuse("the sorting network compares columns that the block does not have");
    job j = {.task = differences, .x = (const float *)v[7], .n = n, .m = m, .k = k, .row = v[5], .column = v[6],
             .share = SHARE, .network = network, .comparisons = comparisons, .differences = (double *)v[11],
             .of_rows = v[13] != 0};
    run(&j, v[3]);
    Py_RETURN_NONE;
}

/* n, m, k, threads, x, its values, means, their values, weights, their values, counts, their values, squares, their
 * values, fourths, their values, on_mean, its values, factors (or 0), their values, changes, their values, spreads,
 * their values, reference. */
static PyObject *add_influences(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[25];
    if (!read_numbers(args, given, 25, v, 0, NULL))
        return NULL;
    const Py_ssize_t n = v[0], m = v[1], k = v[2];
    if (!is_block(n, m, k, v[5]))
        return refuse("the block has another number of values");
    if (v[7] != m * k || v[9] / 3 != k || v[9] % 3 || v[11] != k || v[13] != k || v[15] != k || v[17] != n)
        return refuse("the means, the weights or the sums are of other sizes");
    for (int i = 4; i < 18; i += 2)
        if (!v[i])
            return refuse("a pointer is missing");
    if (m > MOST_VALUES)
        return refuse("the block has too many columns");
    if (v[18] && (v[19] != k || !v[20] || v[21] != n * m || !v[22] || v[23] != n * k || v[24] < 0 || v[24] >= m))
        return refuse("the factors, the changes or the spreads are of other sizes");
    job j = {.task = influences, .x = (const float *)v[4], .m = m, .k = k, .means = (const float *)v[6],
             .weights = (const float *)v[8], .counts = (const int *)v[10], .squares = (double *)v[12],
             .fourths = (double *)v[14], .rows = n, .factors = (const float *)v[18], .spreads = (float *)v[22],
             .reference = v[24]};
    double *const on_mean = (double *)v[16], *const changes = j.factors ? (double *)v[20] : NULL;
    const Py_ssize_t parts = cut(&j, v[3]);
    double *const own = apart(on_mean, parts, n), *const own_changes = own ? apart(changes, parts, n * m) : NULL;
    if (!own || (changes && !own_changes)) {
        join(on_mean, own, 0, 0);
        return NULL;
    }
    j.on_mean = own;
    j.changes = own_changes;
    const Py_ssize_t step = j.factors ? MOST_VALUES / m : n;
    for (Py_ssize_t left = n; left > 0; left -= j.n, j.x += j.n * m * k, j.on_mean += j.n) {
        j.n = left < step ? left : step;
        run(&j, v[3]);
        if (j.factors) {
            j.changes += j.n * m;
            j.spreads += j.n * k;
        }
    }
    join(on_mean, own, parts, n);
    join(changes, own_changes, parts, n * m);
    Py_RETURN_NONE;
}

/* n, k, threads, wide, shares, their values, centre, its values, powers, their values, on_mean, its values; weight. */
static PyObject *add_powers(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t v[12];
    double weight;
    if (!read_numbers(args, given, 12, v, 1, &weight))
        return NULL;
    const Py_ssize_t n = v[0], k = v[1];
    if (!is_block(n, 1, k, v[5]))
        return refuse("the block has another number of values");
    if (v[7] != k || v[9] / 4 != k || v[9] % 4 || v[11] != n)
        return refuse("the centre or the sums are of other sizes");
    for (int i = 4; i < 12; i += 2)
        if (!v[i])
            return refuse("a pointer is missing");
    job j = {.task = powers, .x = v[3] ? NULL : (const float *)v[4], .shares = v[3] ? (const double *)v[4] : NULL, .n = n,
             .rows = n, .m = 1, .k = k, .centre = (const double *)v[6], .powers = (double *)v[8], .weight = weight};
    double *const on_mean = (double *)v[10];
    const Py_ssize_t parts = cut(&j, v[2]);
    j.on_mean = apart(on_mean, parts, n);
    if (!j.on_mean)
        return NULL;
    run(&j, v[2]);
    join(on_mean, j.on_mean, parts, n);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add_powers", (PyCFunction)(void (*)(void))add_powers, METH_FASTCALL, NULL},
    {"add_deviations", (PyCFunction)(void (*)(void))add_deviations, METH_FASTCALL, NULL},
    {"add_influences", (PyCFunction)(void (*)(void))add_influences, METH_FASTCALL, NULL},
    {"absolute_differences", (PyCFunction)(void (*)(void))absolute_differences, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntMacro(made, WIDTH) || PyModule_AddIntMacro(made, MOST_VALUES)
                 || PyModule_AddIntMacro(made, MOST_SORTED))) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
