/* tsqp._native: the kernels as Python functions of addresses and sizes. They check nothing but the instruction set:
 * arith/native.py is the only caller, and checks dtypes, shapes, layout and bounds. The interpreter's lock is released. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

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
    Py_ssize_t rows, inputs, outputs;
    int isa, threads, failed;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKnnnii", &x, &panels, &bias, &y, &rows, &inputs, &outputs, &isa, &threads))
        return NULL;
    const struct float_product product = {
        ADDRESS(const float *, x), ADDRESS(const float *, panels), ADDRESS(const float *, bias), ADDRESS(float *, y),
        (size_t)rows,              (size_t)inputs,                 (size_t)outputs,
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

static PyObject *attend_rows(PyObject *self, PyObject *arguments)
{
    address q, k, v, out;
    Py_ssize_t sizes[6], q_by[3], k_by[3], v_by[3];
    int threads, failed;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKK(nnnnnn)(nnn)(nnn)(nnn)i", &q, &k, &v, &out, &sizes[0], &sizes[1], &sizes[2],
                          &sizes[3], &sizes[4], &sizes[5], &q_by[0], &q_by[1], &q_by[2], &k_by[0], &k_by[1], &k_by[2],
                          &v_by[0], &v_by[1], &v_by[2], &threads))
        return NULL;
    const struct attention attention = {
        ADDRESS(const float *, q), ADDRESS(const float *, k), ADDRESS(const float *, v), ADDRESS(float *, out),
        (size_t)sizes[0],          (size_t)sizes[1],          (size_t)sizes[2],          (size_t)sizes[3],
        (size_t)sizes[4],          (size_t)sizes[5],          (size_t)q_by[0],           (size_t)q_by[1],
        (size_t)q_by[2],           (size_t)k_by[0],           (size_t)k_by[1],           (size_t)k_by[2],
        (size_t)v_by[0],           (size_t)v_by[1],           (size_t)v_by[2],
    };
    Py_BEGIN_ALLOW_THREADS
    failed = best_isa() < AVX512_VNNI || attend(&attention, threads);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"best", best, METH_NOARGS, "Return the number of this processor's best instruction set."},
    {"multiply", multiply, METH_VARARGS, "Multiply words by laid-out codes modulo 2^32."},
    {"multiply_floats", multiply_floats, METH_VARARGS, "Multiply float32 by laid-out weights."},
    {"quantize", quantize, METH_VARARGS, "Scale and round rows; return how many are not finite."},
    {"dequantize", dequantize, METH_VARARGS, "Scale rows of integers back."},
    {"dots", dots, METH_VARARGS, "Sum products of rows with a vector modulo 2^61 - 1."},
    {"attend", attend_rows, METH_VARARGS, "Compute causal attention."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tsqp._native", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
