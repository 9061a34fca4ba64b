/* tsqp._native: the kernels as Python functions of addresses and sizes. They check nothing but the instruction set:
 * arith/native.py is the only caller, and checks dtypes, shapes, layout and bounds. The interpreter's lock is released. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <sched.h>
#include <stdlib.h>

#include "native.h"

enum isa best_isa(void)
{
#if TSQP_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return AVX512_VNNI;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return PORTABLE;
}

/* An instruction that the processor lacks would end the process. */
static enum isa possible(int isa)
{
    const enum isa best = best_isa();
    return isa < PORTABLE ? PORTABLE : isa < (int)best ? (enum isa)isa : best;
}

static PyObject *best(PyObject *self, PyObject *arguments)
{
    (void)self, (void)arguments;
    return PyLong_FromLong(best_isa());
}

#define ADDRESS(type, value) ((type)(uintptr_t)(value))
typedef unsigned long long address;

static PyObject *multiply(PyObject *self, PyObject *arguments)
{
    address x, panels, y;
    Py_ssize_t rows, inputs, outputs;
    int isa, threads, failed;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKnnnii", &x, &panels, &y, &rows, &inputs, &outputs, &isa, &threads))
        return NULL;
    const struct product product = {ADDRESS(const int32_t *, x), ADDRESS(const int8_t *, panels), ADDRESS(int32_t *, y),
                                    (size_t)rows, (size_t)inputs, (size_t)outputs};
    Py_BEGIN_ALLOW_THREADS
    failed = exact_product(&product, possible(isa), threads);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *multiply_floats(PyObject *self, PyObject *arguments)
{
    address x, panels, bias, y;
    Py_ssize_t rows, inputs, outputs, x_row, y_row;
    int isa, threads, failed;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKK(nnn)(nn)ii", &x, &panels, &bias, &y, &rows, &inputs, &outputs, &x_row, &y_row, &isa,
                          &threads))
        return NULL;
    const struct float_product product = {
        ADDRESS(const float *, x), ADDRESS(const float *, panels), ADDRESS(const float *, bias), ADDRESS(float *, y),
        (size_t)rows,              (size_t)inputs,                 (size_t)outputs,              (size_t)x_row,
        (size_t)y_row,
    };
    Py_BEGIN_ALLOW_THREADS
    failed = float_product(&product, possible(isa), threads);
    Py_END_ALLOW_THREADS
    if (failed) {
        PyErr_SetString(PyExc_NotImplementedError, "float products need AVX2 with FMA");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *watch_descriptors(PyObject *self, PyObject *arguments)
{
    struct pollfd watched[MAX_WATCHED];
    PyObject *descriptors;
    long long limit_ns;
    address ahead;
    Py_ssize_t count, size;
    size_t fetched;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "O!LKn", &PyTuple_Type, &descriptors, &limit_ns, &ahead, &size))
        return NULL;
    count = PyTuple_Size(descriptors);
    if (count > MAX_WATCHED) {
        PyErr_SetString(PyExc_ValueError, "too many descriptors to watch");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        watched[i] = (struct pollfd){.fd = (int)PyLong_AsLong(PyTuple_GetItem(descriptors, i)), .events = POLLIN};
        if (watched[i].fd == -1 && PyErr_Occurred())
            return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    fetched = watch(watched, (size_t)count, limit_ns, ADDRESS(const char *, ahead), (size_t)size);
    Py_END_ALLOW_THREADS
    PyObject *ready = PyList_New(0);
    for (Py_ssize_t i = 0; ready && i < count; i++)
        if (watched[i].revents && PyList_Append(ready, PyTuple_GetItem(descriptors, i)))
            Py_CLEAR(ready);
    return ready ? Py_BuildValue("(nN)", (Py_ssize_t)fetched, ready) : NULL;
}

static PyObject *current_core(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyLong_FromLong(sched_getcpu());
}

static PyObject *quantize(PyObject *self, PyObject *arguments)
{
    address x, xq, scale;
    double factor;
    Py_ssize_t rows, inputs;
    int isa, threads;
    size_t failures;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KdKKnnii", &x, &factor, &xq, &scale, &rows, &inputs, &isa, &threads))
        return NULL;
    const struct activations activations = {ADDRESS(const float *, x), factor,       ADDRESS(int32_t *, xq),
                                            ADDRESS(double *, scale),  (size_t)rows, (size_t)inputs};
    Py_BEGIN_ALLOW_THREADS
    failures = quantize_rows(&activations, possible(isa), threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(failures);
}

static PyObject *dequantize(PyObject *self, PyObject *arguments)
{
    address y, row_scale, column_scale, bias, out;
    Py_ssize_t rows, outputs;
    int isa, threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKKnnii", &y, &row_scale, &column_scale, &bias, &out, &rows, &outputs, &isa,
                          &threads))
        return NULL;
    const struct integers integers = {
        ADDRESS(const int32_t *, y),  ADDRESS(const double *, row_scale), ADDRESS(const float *, column_scale),
        ADDRESS(const float *, bias), ADDRESS(float *, out),              (size_t)rows,
        (size_t)outputs,
    };
    Py_BEGIN_ALLOW_THREADS
    dequantize_rows(&integers, possible(isa), threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *dots(PyObject *self, PyObject *arguments)
{
    address words, masks, out, limbs, result, row_scale, column_scale, bias;
    Py_ssize_t rows, length;
    int isa, threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKKKKKnnii", &words, &masks, &out, &limbs, &result, &row_scale, &column_scale,
                          &bias, &rows, &length, &isa, &threads))
        return NULL;
    const struct integers scaling = {
        ADDRESS(const int32_t *, out), ADDRESS(const double *, row_scale), ADDRESS(const float *, column_scale),
        ADDRESS(const float *, bias),  ADDRESS(float *, out),              (size_t)rows,
        (size_t)length,
    };
    const struct dots all = {
        ADDRESS(const volatile int32_t *, words), ADDRESS(const int32_t *, masks), ADDRESS(int32_t *, out),
        ADDRESS(const int32_t *, limbs),          ADDRESS(int64_t *, result),      (size_t)rows,
        (size_t)length,                           row_scale ? &scaling : NULL,
    };
    Py_BEGIN_ALLOW_THREADS
    field_dots(&all, possible(isa), threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Releases the interpreter's lock, computes, frees the segments. */
static PyObject *attended(const struct attention *attention, struct segment *segments, size_t count, int threads)
{
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = best_isa() < AVX512_VNNI || attend(attention, segments, count, threads);
    Py_END_ALLOW_THREADS
    free(segments);
    return failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

static PyObject *attend_whole(PyObject *self, PyObject *arguments)
{
    address q, k, v, out;
    Py_ssize_t batch, tokens, total, heads, kv_heads, size, q_by[3], k_by[3], v_by[3];
    int threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKK(nnnnnn)(nnn)(nnn)(nnn)i", &q, &k, &v, &out, &batch, &tokens, &total, &heads,
                          &kv_heads, &size, &q_by[0], &q_by[1], &q_by[2], &k_by[0], &k_by[1], &k_by[2], &v_by[0], &v_by[1],
                          &v_by[2], &threads))
        return NULL;
    const struct attention attention = {
        .heads = (size_t)heads,    .kv_heads = (size_t)kv_heads, .head_size = (size_t)size,
        .q_token = (size_t)q_by[1], .q_head = (size_t)q_by[2],
        .k_block = TSQP_KV_BLOCK * (size_t)k_by[2], .k_head = (size_t)k_by[1], .k_token = (size_t)k_by[2],
        .v_block = TSQP_KV_BLOCK * (size_t)v_by[2], .v_head = (size_t)v_by[1], .v_token = (size_t)v_by[2],
    };
    struct segment *segments = malloc(((size_t)batch + 1) * sizeof *segments);
    if (!segments)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < batch; i++)
        segments[i] = (struct segment){
            .q = ADDRESS(const float *, q) + i * q_by[0],
            .k = ADDRESS(const float *, k) + i * k_by[0],
            .v = ADDRESS(const float *, v) + i * v_by[0],
            .out = ADDRESS(float *, out) + i * tokens * heads * size,
            .tokens = (size_t)tokens,
            .first = (size_t)(total - tokens),
        };
    return attended(&attention, segments, (size_t)batch, threads);
}

static PyObject *attend_paged(PyObject *self, PyObject *arguments)
{
    address q, pool, spans, tables, out;
    Py_ssize_t count, heads, kv_heads, size, q_token, q_head, block;
    int threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKK(nnnn)(nn)ni", &q, &pool, &spans, &tables, &out, &count, &heads, &kv_heads, &size,
                          &q_token, &q_head, &block, &threads))
        return NULL;
    const size_t head = TSQP_KV_BLOCK * (size_t)size;
    const struct attention attention = {
        .heads = (size_t)heads,    .kv_heads = (size_t)kv_heads, .head_size = (size_t)size,
        .q_token = (size_t)q_token, .q_head = (size_t)q_head,
        .k_block = (size_t)block,  .k_head = head,               .k_token = (size_t)size,
        .v_block = (size_t)block,  .v_head = head,               .v_token = (size_t)size,
    };
    struct segment *segments = malloc(((size_t)count + 1) * sizeof *segments);
    if (!segments)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        const struct sequence *span = ADDRESS(const struct sequence *, spans) + i;
        segments[i] = (struct segment){
            .q = ADDRESS(const float *, q) + span->row * q_token,
            .k = ADDRESS(const float *, pool),
            .v = ADDRESS(const float *, pool) + attention.kv_heads * head,
            .table = ADDRESS(const int32_t *, tables) + span->table,
            .out = ADDRESS(float *, out) + span->row * heads * size,
            .tokens = (size_t)span->tokens,
            .first = (size_t)span->first,
        };
    }
    return attended(&attention, segments, (size_t)count, threads);
}

static PyObject *keep(PyObject *self, PyObject *arguments)
{
    address qkv, cosine, sine, pool, spans, tables;
    Py_ssize_t row, heads, kv_heads, size, block, count;
    int isa, threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKKK(nnnn)nnii", &qkv, &cosine, &sine, &pool, &spans, &tables, &count, &heads,
                          &kv_heads, &size, &row, &block, &isa, &threads))
        return NULL;
    const struct step step = {
        .qkv = ADDRESS(float *, qkv),
        .row = (size_t)row,
        .heads = (size_t)heads,
        .kv_heads = (size_t)kv_heads,
        .head_size = (size_t)size,
        .cosine = ADDRESS(const float *, cosine),
        .sine = ADDRESS(const float *, sine),
        .pool = ADDRESS(float *, pool),
        .block = (size_t)block,
        .spans = ADDRESS(const struct sequence *, spans),
        .count = (size_t)count,
        .tables = ADDRESS(const int32_t *, tables),
    };
    Py_BEGIN_ALLOW_THREADS
    keep_step(&step, possible(isa), threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *rms_norm(PyObject *self, PyObject *arguments)
{
    address x, added, sum, weight, out;
    double eps;
    Py_ssize_t rows, size, x_row, added_row;
    int isa, threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKdK(nn)(nn)ii", &x, &added, &sum, &weight, &eps, &out, &rows, &size, &x_row,
                          &added_row, &isa, &threads))
        return NULL;
    const struct norms norms = {
        .x = ADDRESS(const float *, x),
        .added = ADDRESS(const float *, added),
        .x_row = (size_t)x_row,
        .added_row = (size_t)added_row,
        .sum = ADDRESS(float *, sum),
        .weight = ADDRESS(const float *, weight),
        .eps = eps,
        .out = ADDRESS(float *, out),
        .rows = (size_t)rows,
        .size = (size_t)size,
    };
    Py_BEGIN_ALLOW_THREADS
    norm_rows(&norms, possible(isa), threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *swiglu(PyObject *self, PyObject *arguments)
{
    address gate_up, out;
    Py_ssize_t rows, size;
    int isa, threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKnnii", &gate_up, &out, &rows, &size, &isa, &threads))
        return NULL;
    const struct gates gates = {ADDRESS(const float *, gate_up), ADDRESS(float *, out), (size_t)rows, (size_t)size};
    Py_BEGIN_ALLOW_THREADS
    swiglu_rows(&gates, possible(isa), threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *rotate(PyObject *self, PyObject *arguments)
{
    address x, cosine, sine, out;
    Py_ssize_t rows, heads, size, x_row, x_head, out_row, out_head;
    int isa, threads;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKK(nnn)(nn)(nn)ii", &x, &cosine, &sine, &out, &rows, &heads, &size, &x_row, &x_head,
                          &out_row, &out_head, &isa, &threads))
        return NULL;
    const struct rotation rotation = {
        ADDRESS(const float *, x), ADDRESS(const float *, cosine), ADDRESS(const float *, sine), ADDRESS(float *, out),
        (size_t)rows,              (size_t)heads,                  (size_t)size,                 (size_t)x_row,
        (size_t)x_head,            (size_t)out_row,                (size_t)out_head,
    };
    Py_BEGIN_ALLOW_THREADS
    rotate_rows(&rotation, possible(isa), threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Keeps the interpreter's lock: getting it back could take longer than this does. */
static PyObject *draw(PyObject *self, PyObject *arguments)
{
    address x;
    Py_ssize_t count, top_k;
    float largest, scale;
    double top_p, min_p, uniform;
    int isa;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "Knffndddi", &x, &count, &largest, &scale, &top_k, &top_p, &min_p, &uniform, &isa))
        return NULL;
    const struct row row = {ADDRESS(const float *, x), (size_t)count, largest, scale, (size_t)top_k, top_p, min_p, uniform};
    const int64_t token = draw_token(&row, possible(isa));
    return token < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(token);
}

static PyMethodDef methods[] = {
    {"best", best, METH_NOARGS, "Return the number of this processor's best instruction set."},
    {"multiply", multiply, METH_VARARGS, "Multiply words by laid-out codes modulo 2^32."},
    {"multiply_floats", multiply_floats, METH_VARARGS, "Multiply float32 by laid-out weights."},
    {"quantize", quantize, METH_VARARGS, "Scale and round rows; return how many are not finite."},
    {"dequantize", dequantize, METH_VARARGS, "Scale rows of integers back."},
    {"dots", dots, METH_VARARGS, "Sum products of rows with a vector modulo 2^61 - 1."},
    {"attend", attend_whole, METH_VARARGS, "Compute causal attention over contiguous keys and values."},
    {"attend_paged", attend_paged, METH_VARARGS, "Compute causal attention over keys and values in a pool's blocks."},
    {"keep", keep, METH_VARARGS, "Rotate a step's queries and keys, and store keys and values in a pool's blocks."},
    {"rms_norm", rms_norm, METH_VARARGS, "Add to rows, and scale them to unit root mean square."},
    {"swiglu", swiglu, METH_VARARGS, "Multiply SiLU of the first half of rows by the second."},
    {"rotate", rotate, METH_VARARGS, "Apply rotary embedding to rows of heads."},
    {"draw", draw, METH_VARARGS, "Draw a token from a row of logits."},
    {"core", current_core, METH_NOARGS, "Return the number of the core that this thread runs on."},
    {"watch", watch_descriptors, METH_VARARGS, "Wait for descriptors awake; return how much memory was read meanwhile, and those ready."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tsqp._native", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
