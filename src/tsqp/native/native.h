/* Kernels of tsqp._native. Addresses, sizes and dtypes were checked by arith/native.py; nothing here allocates what a
 * caller reads, and nothing is kept between calls but sleeping threads. */
#ifndef TSQP_NATIVE_H
#define TSQP_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/* Instruction sets in order: a processor that has one has those before it. AVX2 comes with FMA here. */
enum isa { PORTABLE = 0, AVX2 = 1, AVX512_VNNI = 2 };

#if defined(__x86_64__)
#define TSQP_X86 1
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#define WITH_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")))
#else
#define TSQP_X86 0
#endif

/* Bodies that are compiled once for each instruction set are inlined into functions that have it. */
#define INLINE static inline __attribute__((always_inline))

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t ceil_div(size_t a, size_t b) { return a / b + (a % b != 0); }

/* The best instruction set of this processor. */
enum isa best_isa(void);

/* Calls task(argument, i) for each i below count, on this thread and at most threads - 1 others; returns when all are
 * done. Tasks must not depend on each other's order. */
typedef void task_fn(void *argument, size_t index);
void run_tasks(task_fn *task, void *argument, size_t count, int threads);

/* y = x W^T modulo 2^32 (gemm.c). Returns 0, or -1 where there is no memory. */
struct product {
    const int32_t *x;     /* (rows, inputs) */
    const int8_t *panels; /* (ceil(outputs / 16), ceil(inputs / 2), 16, 2) */
    int32_t *y;           /* (rows, outputs) */
    size_t rows, inputs, outputs;
};
int exact_product(const struct product *product, enum isa isa, int threads);

/* y = x W^T (+ bias) in float32 (float_gemm.c). Returns 0, or -1 where the instruction set is PORTABLE. */
struct float_product {
    const float *x;      /* (rows, inputs); another process may change them meanwhile */
    const float *panels; /* (ceil(outputs / 16), inputs, 16) */
    const float *bias;   /* (outputs), or NULL */
    float *y;            /* (rows, outputs) */
    size_t rows, inputs, outputs; /* inputs: at least 1 */
};
int float_product(const struct float_product *product, enum isa isa, int threads);

/* xq = round(x (1 / s)), s = ||x|| factor, for each row (scale.c). Returns the number of rows that are not finite. */
struct activations {
    const float *x; /* (rows, inputs) */
    double factor;
    int32_t *xq;   /* (rows, inputs) */
    double *scale; /* (rows) */
    size_t rows, inputs;
};
size_t quantize_rows(const struct activations *activations, enum isa isa, int threads);

/* out = (float) y (float) s_row s_column (+ bias); out may be y's memory (scale.c). */
struct integers {
    const int32_t *y;            /* (rows, outputs) */
    const double *row_scale;     /* (rows) */
    const float *column_scale;   /* (outputs) */
    const float *bias;           /* (outputs), or NULL */
    float *out;                  /* (rows, outputs) */
    size_t rows, outputs;
};
void dequantize_rows(const struct integers *integers, enum isa isa, int threads);
/* The same for one row, by the function of an instruction set. */
typedef void dequantize_fn(const struct integers *integers, size_t row);
dequantize_fn *dequantizer(enum isa isa);

/* Inner products modulo 2^61 - 1 of rows of words with a vector, after subtraction of masks (check.c). */
struct dots {
    const volatile int32_t *words; /* (rows, length); another process may change them meanwhile */
    const int32_t *masks;          /* (rows, length) to subtract, or NULL */
    int32_t *out;                  /* (rows, length): the words that were summed, or NULL */
    const int32_t *limbs;          /* (3, length): the vector's 21-bit limbs */
    int64_t *dots;                 /* (rows), in [0, 2^61 - 1) */
    size_t rows, length;
    const struct integers *scaling; /* if given, each row of out is scaled back as soon as it is summed; or NULL */
};
void field_dots(const struct dots *dots, enum isa isa, int threads);

/* out = softmax(q k^T / sqrt(head size)) v, causal, for the last tokens of total (attention.c). Strides are in elements;
 * the last dimension is contiguous. Returns 0, or -1 where there is no memory, or no AVX-512. */
struct attention {
    const float *q;                  /* (batch, tokens, heads, head size) */
    const float *k, *v;              /* (batch, key-value heads, total, head size) */
    float *out;                      /* (batch, tokens, heads, head size), contiguous */
    size_t batch, tokens, total, heads, kv_heads, head_size;
    size_t q_batch, q_token, q_head; /* strides */
    size_t k_batch, k_head, k_token;
    size_t v_batch, v_head, v_token;
};
int attend(const struct attention *attention, int threads);

#endif
