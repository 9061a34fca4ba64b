/* Kernels of tsqp._native. Addresses, sizes and dtypes were checked by arith/native.py; nothing here allocates what a
 * caller reads, and nothing is kept between calls but sleeping threads. */
#ifndef TSQP_NATIVE_H
#define TSQP_NATIVE_H

#include <poll.h>
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
    const float *x;      /* (rows, inputs), rows x_row apart; another process may change them meanwhile */
    const float *panels; /* (ceil(outputs / 16), inputs, 16) */
    const float *bias;   /* (outputs), or NULL */
    float *y;            /* (rows, outputs), rows y_row apart */
    size_t rows, inputs, outputs; /* inputs: at least 1 */
    size_t x_row, y_row;
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

/* Causal attention of some sequences' tokens (attention.c). Strides are in elements; head sizes are contiguous. Keys and
 * values lie in blocks of TSQP_KV_BLOCK tokens. */
#define TSQP_KV_BLOCK 64
struct attention {
    size_t heads, kv_heads, head_size;
    size_t q_token, q_head; /* strides */
    size_t k_block, k_head, k_token;
    size_t v_block, v_head, v_token;
};
/* Tokens at positions first, first + 1, ... of one sequence; each sees the keys up to its own position. */
struct segment {
    const float *q;       /* (tokens, heads, head size) */
    const float *k, *v;   /* of block 0: (key-value heads, TSQP_KV_BLOCK, head size) */
    const int32_t *table; /* numbers of the sequence's blocks; or NULL: they are 0, 1, 2, ... */
    float *out;           /* (tokens, heads, head size), contiguous */
    size_t tokens, first;
};
/* Returns 0, or -1 where there is no memory, or no AVX-512. */
int attend(const struct attention *attention, const struct segment *segments, size_t count, int threads);

/* Rows of a step that are one sequence's tokens: at positions first, first + 1, ..., with a table of block numbers. */
struct sequence {
    int32_t row, tokens, first;
    int32_t table, length; /* where the table begins, and how many blocks it names */
};
/* Rotates a step's queries and keys in place, and stores keys and values in their sequences' blocks (paging.c). */
struct step {
    float *qkv; /* (rows, heads + 2 key-value heads, head size), rows so many elements apart: */
    size_t row;
    size_t heads, kv_heads, head_size;
    const float *cosine, *sine; /* (rows, head size) */
    float *pool;                /* (blocks, 2, key-value heads, TSQP_KV_BLOCK, head size), blocks so far apart: */
    size_t block;
    const struct sequence *spans;
    size_t count;
    const int32_t *tables;
};
void keep_step(const struct step *step, enum isa isa, int threads);

/* Layers between products, row by row (layers.c). norm_rows: out = x / rms(x) weight, of x + added unless that is NULL. */
struct norms {
    const float *x;     /* (rows, size), rows so many elements apart */
    const float *added; /* likewise, or NULL */
    size_t x_row, added_row;
    float *sum;          /* (rows, size): where x + added is kept, x itself or apart from all; or NULL */
    const float *weight; /* (size) */
    double eps;
    float *out; /* (rows, size); apart from the others */
    size_t rows, size;
};
void norm_rows(const struct norms *norms, enum isa isa, int threads);

/* out = SiLU(gate) up. */
struct gates {
    const float *gate_up; /* (rows, 2, size) */
    float *out;           /* (rows, size) */
    size_t rows, size;
};
void swiglu_rows(const struct gates *gates, enum isa isa, int threads);

/* out[i] = x[i] cosine[i] + x[i +- head size / 2] sine[i], for every head; out may be x. */
struct rotation {
    const float *x;             /* (rows, heads, head size) */
    const float *cosine, *sine; /* (rows, head size) */
    float *out;                 /* (rows, heads, head size) */
    size_t rows, heads, head_size;
    size_t x_row, x_head, out_row, out_head; /* strides, in elements */
};
void rotate_rows(const struct rotation *rotation, enum isa isa, int threads);

/* Draws a token from one row of logits (sampling.c): what top-k, then top-p, then min-p leave of 2^-(largest - x) scale.
 * Returns its number, or -1 where there is no memory, or no AVX-512. */
struct row {
    const float *x; /* (count); another process may change them meanwhile: still the token is one of them */
    size_t count;   /* at least 1 */
    float largest;  /* of x, none of which is NaN; finite */
    float scale;    /* log2 e / temperature */
    size_t top_k;   /* below count; 0: all */
    double top_p;   /* 1: all */
    double min_p;   /* 0: all */
    double uniform; /* in [0, 1) */
};
int64_t draw_token(const struct row *row, enum isa isa);

/* Polls descriptors until one is ready or time is up, letting whoever wants the core have it; or, with a size, reads so many
 * bytes meanwhile and returns when they are read (wait.c). Returns how many were read. */
#define MAX_WATCHED 64
size_t watch(struct pollfd *watched, size_t count, int64_t limit_ns, const char *ahead, size_t size);

#endif
