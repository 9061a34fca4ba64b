/* The layers between products, row by row: RMSNorm, SwiGLU, rotary embedding. A row's bits depend on that row only, and are
 * the same with every instruction set: each operation is one IEEE operation in a fixed order (-ffp-contract=off). Nothing
 * here branches on a number of the prompt's. */
#include "native.h"

#include <math.h>
#include <string.h>

/* The squares of a row are summed in 16 lanes, element i in lane i mod 16. */
#define LANES 16
/* Below this many elements another thread is not worth waking. */
#define WORTH_THREADS (1u << 17)
#define ROWS_PER_TASK 4

INLINE double square_sum(const float *x, size_t size)
{
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++)
            lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
    for (size_t lane = 0; i + lane < size; lane++)
        lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

INLINE void norm_body(const void *argument, size_t row)
{
    const struct norms *all = argument;
    const size_t size = all->size;
    const float *x = all->x + row * all->x_row, *weight = all->weight;
    float *out = all->out + row * size;
    if (all->added) {
        const float *added = all->added + row * all->added_row;
        float *sum = all->sum ? all->sum + row * size : out;
#pragma GCC ivdep
        for (size_t i = 0; i < size; i++)
            sum[i] = x[i] + added[i];
        x = sum;
    }
    const float inverse = (float)(1 / sqrt(square_sum(x, size) / (double)size + all->eps));
#pragma GCC ivdep
    for (size_t i = 0; i < size; i++)
        out[i] = x[i] * inverse * weight[i];
}

INLINE uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

INLINE float number_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE float chosen(uint32_t mask, float yes, float no) { return number_of((bits_of(yes) & mask) | (bits_of(no) & ~mask)); }

/* exp(-x) for x >= 0; as exponential() in attention.h, where it is explained. Choices are masks: compilers do not take
 * arithmetic out of branches. Of what is not a number it makes 0. */
INLINE float exponential_of_minus(float x)
{
    const uint32_t too_large = -(uint32_t)((int32_t)bits_of(x) > (int32_t)bits_of(87.0f));
    const float clipped = -chosen(too_large, 87.0f, x), shifted = clipped * 0x1.715476p0f + 0x1.8p23f;
    const float n = shifted - 0x1.8p23f, r = (clipped - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return chosen(too_large, 0, p * number_of((bits_of(shifted) + 127) << 23));
}

INLINE void swiglu_body(const void *argument, size_t row)
{
    const struct gates *all = argument;
    const size_t size = all->size;
    const float *gate = all->gate_up + row * 2 * size, *up = gate + size;
    float *restrict out = all->out + row * size;
    for (size_t i = 0; i < size; i++) {
        const float small = exponential_of_minus(fabsf(gate[i])); /* at most 1: nothing overflows */
        const float above = chosen(-(bits_of(gate[i]) >> 31), small, 1.0f);
        out[i] = gate[i] * (above / (1.0f + small)) * up[i];
    }
}

INLINE void rotate_body(const void *argument, size_t row)
{
    const struct rotation *all = argument;
    const size_t half = all->head_size / 2;
    const float *cosine = all->cosine + row * all->head_size, *sine = all->sine + row * all->head_size;
    for (size_t head = 0; head < all->heads; head++) {
        const float *x = all->x + row * all->x_row + head * all->x_head;
        float *out = all->out + row * all->out_row + head * all->out_head;
        /* out may be x itself: elements i and i + half are read before they are written, and no others. */
#pragma GCC ivdep
        for (size_t i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            out[i] = a * cosine[i] + b * sine[i];
            out[i + half] = b * cosine[i + half] + a * sine[i + half];
        }
    }
}

typedef void row_fn(const void *argument, size_t row);

static void norm_portable(const void *all, size_t row) { norm_body(all, row); }
static void swiglu_portable(const void *all, size_t row) { swiglu_body(all, row); }
static void rotate_portable(const void *all, size_t row) { rotate_body(all, row); }

#if TSQP_X86
WITH_AVX2 static void norm_avx2(const void *all, size_t row) { norm_body(all, row); }
WITH_AVX2 static void swiglu_avx2(const void *all, size_t row) { swiglu_body(all, row); }
WITH_AVX2 static void rotate_avx2(const void *all, size_t row) { rotate_body(all, row); }
WITH_AVX512 static void norm_avx512(const void *all, size_t row) { norm_body(all, row); }
WITH_AVX512 static void swiglu_avx512(const void *all, size_t row) { swiglu_body(all, row); }
WITH_AVX512 static void rotate_avx512(const void *all, size_t row) { rotate_body(all, row); }
static row_fn *const norms[] = {norm_portable, norm_avx2, norm_avx512};
static row_fn *const swiglus[] = {swiglu_portable, swiglu_avx2, swiglu_avx512};
static row_fn *const rotations[] = {rotate_portable, rotate_avx2, rotate_avx512};
#else
static row_fn *const norms[] = {norm_portable, norm_portable, norm_portable};
static row_fn *const swiglus[] = {swiglu_portable, swiglu_portable, swiglu_portable};
static row_fn *const rotations[] = {rotate_portable, rotate_portable, rotate_portable};
#endif

struct rows {
    const void *all;
    row_fn *row;
    size_t count;
};

static void rows_task(void *argument, size_t index)
{
    const struct rows *rows = argument;
    const size_t from = index * ROWS_PER_TASK, to = smaller(rows->count, from + ROWS_PER_TASK);
    for (size_t row = from; row < to; row++)
        rows->row(rows->all, row);
}

static void for_rows(const void *all, row_fn *row, size_t count, size_t size, int threads)
{
    struct rows rows = {all, row, count};
    run_tasks(rows_task, &rows, ceil_div(count, ROWS_PER_TASK), count * size < WORTH_THREADS ? 1 : threads);
}

void norm_rows(const struct norms *all, enum isa isa, int threads)
{
    for_rows(all, norms[isa], all->rows, all->size, threads);
}

void swiglu_rows(const struct gates *all, enum isa isa, int threads)
{
    for_rows(all, swiglus[isa], all->rows, all->size, threads);
}

void rotate_rows(const struct rotation *all, enum isa isa, int threads)
{
    for_rows(all, rotations[isa], all->rows, all->heads * all->head_size, threads);
}
