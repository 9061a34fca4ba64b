/* Activations to integers and integers to activations, row by row. arith/quantize.py has the bounds; its PyTorch way gives
 * the same bits, since every operation here is one IEEE operation in the same order: the file is compiled with
 * -ffp-contract=off, so no multiplication and addition become one. */
#include "native.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* The squares of a row are summed in 16 lanes, element i in lane i mod 16. */
#define LANES 16
/* Below this many elements another thread is not worth waking. */
#define WORTH_THREADS (1u << 18)
#define ROWS_PER_TASK 4
/* 2^52 + 2^51: added to a number below 2^51 in absolute value, it leaves no bits for a fraction, so the sum is rounded half
 * to even, and its low 32 bits are the integer's. */
#define TO_INTEGER 0x1.8p52

INLINE double norm_body(const float *x, size_t inputs)
{
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= inputs; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++)
            lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
    for (size_t lane = 0; i + lane < inputs; lane++)
        lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return sqrt(lanes[0]);
}

/* Writes one row; returns whether it is finite. */
INLINE int quantize_body(const struct activations *all, size_t row)
{
    const float *x = all->x + row * all->inputs;
    int32_t *xq = all->xq + row * all->inputs;
    const double norm = norm_body(x, all->inputs), product = norm * all->factor;
    const double scale = product > 0 ? product : 1, inverse = all->factor > 0 ? 1 / scale : 0;
    all->scale[row] = scale;
    if (!(norm <= 0x1p1023))
        return 0;
    for (size_t i = 0; i < all->inputs; i++) {
        const double shifted = (double)x[i] * inverse + TO_INTEGER;
        uint64_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        xq[i] = (int32_t)(uint32_t)bits;
    }
    return 1;
}

INLINE void dequantize_body(const struct integers *all, size_t row)
{
    const int32_t *y = all->y + row * all->outputs;
    float *out = all->out + row * all->outputs;
    const float *column_scale = all->column_scale, *bias = all->bias;
    const float row_scale = (float)all->row_scale[row];
    const size_t outputs = all->outputs;
    /* out may be y itself: element j is read before it is written, and no other. */
    if (bias) {
#pragma GCC ivdep
        for (size_t j = 0; j < outputs; j++) {
            int32_t word;
            memcpy(&word, y + j, sizeof word);
            const float real = (float)word * row_scale * column_scale[j] + bias[j];
            memcpy(out + j, &real, sizeof real);
        }
    } else {
#pragma GCC ivdep
        for (size_t j = 0; j < outputs; j++) {
            int32_t word;
            memcpy(&word, y + j, sizeof word);
            const float real = (float)word * row_scale * column_scale[j];
            memcpy(out + j, &real, sizeof real);
        }
    }
}

typedef int quantize_fn(const struct activations *all, size_t row);

static int quantize_portable(const struct activations *all, size_t row) { return quantize_body(all, row); }
static void dequantize_portable(const struct integers *all, size_t row) { dequantize_body(all, row); }

#if TSQP_X86
WITH_AVX2 static int quantize_avx2(const struct activations *all, size_t row) { return quantize_body(all, row); }
WITH_AVX2 static void dequantize_avx2(const struct integers *all, size_t row) { dequantize_body(all, row); }
WITH_AVX512 static int quantize_avx512(const struct activations *all, size_t row) { return quantize_body(all, row); }
WITH_AVX512 static void dequantize_avx512(const struct integers *all, size_t row) { dequantize_body(all, row); }
static quantize_fn *const quantizers[] = {quantize_portable, quantize_avx2, quantize_avx512};
static dequantize_fn *const dequantizers[] = {dequantize_portable, dequantize_avx2, dequantize_avx512};
#else
static quantize_fn *const quantizers[] = {quantize_portable, quantize_portable, quantize_portable};
static dequantize_fn *const dequantizers[] = {dequantize_portable, dequantize_portable, dequantize_portable};
#endif

struct quantizing {
    const struct activations *all;
    quantize_fn *row;
    atomic_size_t failures;
};

static void quantize_task(void *argument, size_t index)
{
    struct quantizing *work = argument;
    const size_t from = index * ROWS_PER_TASK, to = smaller(work->all->rows, from + ROWS_PER_TASK);
    for (size_t row = from; row < to; row++)
        if (!work->row(work->all, row))
            atomic_fetch_add(&work->failures, 1);
}

size_t quantize_rows(const struct activations *all, enum isa isa, int threads)
{
    struct quantizing work = {all, quantizers[isa], 0};
    if (all->rows * all->inputs < WORTH_THREADS)
        threads = 1;
    run_tasks(quantize_task, &work, ceil_div(all->rows, ROWS_PER_TASK), threads);
    return atomic_load(&work.failures);
}

dequantize_fn *dequantizer(enum isa isa) { return dequantizers[isa]; }

struct dequantizing {
    const struct integers *all;
    dequantize_fn *row;
};

static void dequantize_task(void *argument, size_t index)
{
    const struct dequantizing *work = argument;
    const size_t from = index * ROWS_PER_TASK, to = smaller(work->all->rows, from + ROWS_PER_TASK);
    for (size_t row = from; row < to; row++)
        work->row(work->all, row);
}

void dequantize_rows(const struct integers *all, enum isa isa, int threads)
{
    struct dequantizing work = {all, dequantizers[isa]};
    if (all->rows * all->outputs < WORTH_THREADS)
        threads = 1;
    run_tasks(dequantize_task, &work, ceil_div(all->rows, ROWS_PER_TASK), threads);
}
