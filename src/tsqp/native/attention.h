/* What the two kernels of attention share (attention.c, attention_queries.c, attention_keys.c). */
#ifndef TSQP_ATTENTION_H
#define TSQP_ATTENTION_H

#include "native.h"

#if TSQP_X86
#include <immintrin.h>
#include <math.h>

#define LANES 16
/* Keys of one chunk, a block of the pool: their scores, and a chunk's values, stay in a first-level cache. */
#define CHUNK TSQP_KV_BLOCK

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(4 * LANES)));

WITH_AVX512 INLINE lanes chosen(words mask, lanes yes, lanes no) { return (lanes)(((words)yes & mask) | ((words)no & ~mask)); }

/* a b + c, rounded once. */
WITH_AVX512 INLINE lanes fused(lanes a, lanes b, lanes c)
{
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

WITH_AVX512 INLINE lanes every(float number) { return (lanes)_mm512_set1_ps(number); }

/* exp(x) for x <= 0 within 2 units in the last place; 0 below -87, also for -inf. 2^n with n = x / ln 2 rounded, times a
 * polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, Moshier 1989). layers.c has the same for one number. */
WITH_AVX512 INLINE lanes exponential(lanes x)
{
    const lanes magic = every(0x1.8p23f), least = every(-87.0f);
    const words too_small = x < least;
    x = chosen(too_small, least, x);
    const lanes shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
    const lanes r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const lanes power = (lanes)(((words)shifted + 127) << 23); /* the low bits of shifted are n */
    return chosen(too_small, every(0), p * power);
}

/* Where the keys and values of a segment's chunk begin, of one key-value head. */
static inline const float *chunk_of(const float *base, const struct segment *segment, size_t chunk, size_t step)
{
    return base + (segment->table ? (size_t)segment->table[chunk] : chunk) * step;
}

static inline float score_scale(const struct attention *all) { return (float)(1 / sqrt((double)all->head_size)); }

/* Queries of one block of attend_queries. */
#define QUERIES 32

/* Computes QUERIES queries, or what is left, from query number `at` of a segment, of one head. scratch: queries_scratch
 * bytes, aligned to a vector. */
void attend_queries(const struct attention *all, const struct segment *segment, size_t head, size_t at, void *scratch);
size_t queries_scratch(const struct attention *all);

/* Computes all queries of a segment, of all heads that one key-value head serves. */
void attend_keys(const struct attention *all, const struct segment *segment, size_t kv_head, void *scratch);
size_t keys_scratch(const struct attention *all, const struct segment *segment);

#endif
#endif
