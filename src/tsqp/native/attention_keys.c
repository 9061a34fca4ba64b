/* Attention of few queries of one sequence, as in decode, whose cost is reading keys and values: all heads that a key-value
 * head serves are computed together, so that each key and value is read once. A row is one query of one head. A chunk's keys
 * are turned around first; then for scores the lanes of a vector are keys, and for sums of values dimensions. Each lane
 * goes through the operations that attention.c states, in their order. */
#include "attention.h"

#if TSQP_X86
#include <string.h>

#define VECTORS (CHUNK / LANES)
/* Rows at a time: 4 times 4 sums fill half of the 32 registers. */
#define TILE 4

struct rows {
    const struct attention *all;
    size_t first, group, padded;       /* position of the first query; heads together; head size in whole vectors */
    float *turned;                     /* (head size, CHUNK): keys */
    float (*weight)[CHUNK];            /* (TILE) */
    float *q, *out;                    /* (rows, padded): scaled; weighted sums of values */
    float *highest, *sum;              /* (rows) */
};

WITH_AVX512 INLINE __m512 load(const float *from) { return _mm512_loadu_ps(from); }

/* Turns 16 keys of 16 dimensions around, of which the mask's and those below `dimensions` are there. */
WITH_AVX512 INLINE void turn_square(const float *const key[LANES], size_t h, size_t dimensions, float *turned)
{
    const __mmask16 mask = (__mmask16)((1u << dimensions) - 1);
    __m512 quads[LANES], out[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        const __m512 a = _mm512_maskz_loadu_ps(mask, key[i] + h), b = _mm512_maskz_loadu_ps(mask, key[i + 1] + h);
        const __m512 c = _mm512_maskz_loadu_ps(mask, key[i + 2] + h), d = _mm512_maskz_loadu_ps(mask, key[i + 3] + h);
        const __m512d ab = (__m512d)_mm512_unpacklo_ps(a, b), ba = (__m512d)_mm512_unpackhi_ps(a, b);
        const __m512d cd = (__m512d)_mm512_unpacklo_ps(c, d), dc = (__m512d)_mm512_unpackhi_ps(c, d);
        quads[i] = (__m512)_mm512_unpacklo_pd(ab, cd); /* quarter L of quads[i + c]: four keys of dimension 4 L + c */
        quads[i + 1] = (__m512)_mm512_unpackhi_pd(ab, cd);
        quads[i + 2] = (__m512)_mm512_unpacklo_pd(ba, dc);
        quads[i + 3] = (__m512)_mm512_unpackhi_pd(ba, dc);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512 even = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0xdd);
        const __m512 even_too = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0x88);
        const __m512 odd_too = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0xdd);
        out[c] = _mm512_shuffle_f32x4(even, even_too, 0x88);
        out[c + 4] = _mm512_shuffle_f32x4(odd, odd_too, 0x88);
        out[c + 8] = _mm512_shuffle_f32x4(even, even_too, 0xdd);
        out[c + 12] = _mm512_shuffle_f32x4(odd, odd_too, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if ((size_t)i < dimensions)
            _mm512_store_ps(turned + i * CHUNK, out[i]);
}

/* Turns a chunk's keys around. Where there are fewer, the last one stands for those missing: nothing sees them. */
WITH_AVX512 INLINE void turn_keys(const struct rows *rows, const float *k, size_t keys)
{
    const size_t size = rows->all->head_size;
    for (size_t j = 0; j < CHUNK; j += LANES) {
        const float *key[LANES];
        for (size_t i = 0; i < LANES; i++)
            key[i] = k + smaller(j + i, keys - 1) * rows->all->k_token;
        for (size_t h = 0; h < size; h += LANES)
            turn_square(key, h, smaller(LANES, size - h), rows->turned + h * CHUNK + j);
    }
}

/* A chunk's values, and the next chunk's keys and values. What comes next is fetched while what is there is multiplied: a
 * sequence's blocks lie anywhere, so that the processor cannot guess. */
struct chunk {
    const float *v, *next_k, *next_v;
    size_t key, keys, next_keys; /* position of its first key; how many keys there are */
};

WITH_AVX512 INLINE void fetch(const float *row, size_t size)
{
    for (size_t h = 0; h < size; h += LANES)
        _mm_prefetch((const char *)(row + h), _MM_HINT_T0);
}

/* Scores of a chunk's keys for COUNT rows from `row` on. The first rows fetch the next keys. */
WITH_AVX512 INLINE void score_rows(const int COUNT, const struct rows *rows, size_t row, const struct chunk *chunk)
{
    const float *q = rows->q + row * rows->padded;
    const size_t size = rows->all->head_size, to_fetch = row ? 0 : chunk->next_keys;
    size_t fetched = 0;
    lanes sums[TILE][VECTORS] = {{{0}}};
    for (size_t h = 0; h < size; h++) {
        for (; fetched * size < h * to_fetch; fetched++)
            fetch(chunk->next_k + fetched * rows->all->k_token, size);
        const lanes *turned = (const lanes *)(rows->turned + h * CHUNK);
#pragma GCC unroll 4
        for (int r = 0; r < COUNT; r++) {
            const lanes number = every(q[r * rows->padded + h]);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; i++)
                sums[r][i] = fused(number, turned[i], sums[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++)
            ((lanes *)rows->weight[r])[i] = sums[r][i];
}

/* Turns a row's scores into weights relative to the highest score so far; what was summed before is scaled down to it. */
WITH_AVX512 INLINE void weigh_row(const struct rows *rows, size_t row, float *weight, size_t key)
{
    static const words index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t position = (int32_t)(rows->first + row / rows->group - key); /* of the query, from the chunk's start */
    const float before = rows->highest[row];
    lanes *score = (lanes *)weight, highest = every(before);
    for (int i = 0; i < VECTORS; i++) {
        const words hidden = index + i * LANES > position;
        score[i] = chosen(hidden, every(-INFINITY), score[i]);
        highest = chosen(score[i] > highest, score[i], highest);
    }
    const float top = _mm512_reduce_max_ps((__m512)highest);
    const lanes shrink = exponential(every(before - top));
    for (int i = 0; i < VECTORS; i++)
        score[i] = exponential(score[i] - top);
    lanes *out = (lanes *)(rows->out + row * rows->padded);
    for (size_t i = 0; i < rows->padded / LANES; i++)
        out[i] *= shrink;
    rows->sum[row] *= shrink[0];
    rows->highest[row] = top;
}

/* Adds a chunk's values, weighted, to COUNT rows, in WIDTH vectors of dimensions from h on; with the first, the weights to
 * their sums. The first rows fetch the next values. */
WITH_AVX512 INLINE void add_values(const int COUNT, const int WIDTH, const int FIRST, const struct rows *rows, size_t row,
                                   const struct chunk *chunk, size_t h)
{
    const size_t left = rows->all->head_size - h, step = rows->all->v_token, to_fetch = row ? 0 : chunk->next_keys;
    const float *v = chunk->v + h, *next_v = chunk->next_v + h;
    const __mmask16 mask = left < LANES ? (__mmask16)((1u << left) - 1) : 0xffff;
    float *out = rows->out + row * rows->padded + h;
    lanes sums[TILE][VECTORS], weights[TILE];
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++) {
        weights[r] = every(rows->sum[row + r]);
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++)
            sums[r][i] = (lanes)load(out + r * rows->padded + i * LANES);
    }
    for (size_t j = 0; j < chunk->keys; j++, v += step) {
        lanes value[VECTORS];
        if (j < to_fetch)
            fetch(next_v + j * step, WIDTH * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++)
            value[i] = (lanes)(WIDTH > 1 ? load(v + i * LANES) : _mm512_maskz_loadu_ps(mask, v));
#pragma GCC unroll 4
        for (int r = 0; r < COUNT; r++) {
            const lanes weight = every(rows->weight[r][j]);
            if (FIRST)
                weights[r] += weight;
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; i++)
                sums[r][i] = fused(weight, value[i], sums[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++) {
        if (FIRST)
            rows->sum[row + r] = weights[r][0];
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++)
            _mm512_storeu_ps(out + r * rows->padded + i * LANES, (__m512)sums[r][i]);
    }
}

WITH_AVX512 INLINE void attend_tile(const int COUNT, const struct rows *rows, size_t row, const struct chunk *chunk)
{
    const size_t size = rows->all->head_size;
    score_rows(COUNT, rows, row, chunk);
    for (int r = 0; r < COUNT; r++)
        weigh_row(rows, row + r, rows->weight[r], chunk->key);
    size_t h = 0;
    if (size >= CHUNK) {
        add_values(COUNT, VECTORS, 1, rows, row, chunk, 0);
        for (h = CHUNK; h + CHUNK <= size; h += CHUNK)
            add_values(COUNT, VECTORS, 0, rows, row, chunk, h);
    } else {
        add_values(COUNT, 1, 1, rows, row, chunk, 0);
        h = LANES;
    }
    for (; h < size; h += LANES)
        add_values(COUNT, 1, 0, rows, row, chunk, h);
}

WITH_AVX512 static void attend_chunk(const struct rows *rows, size_t count, const float *k, const struct chunk *chunk)
{
    size_t row = 0;
    turn_keys(rows, k, chunk->keys);
    for (; row + 4 <= count; row += 4)
        attend_tile(4, rows, row, chunk);
    if (count - row == 3)
        attend_tile(3, rows, row, chunk);
    else if (count - row == 2)
        attend_tile(2, rows, row, chunk);
    else if (count - row == 1)
        attend_tile(1, rows, row, chunk);
}

WITH_AVX512 INLINE void load_queries(const struct rows *rows, size_t count, const float *q)
{
    const size_t size = rows->all->head_size;
    const float scale = score_scale(rows->all);
    for (size_t row = 0; row < count; row++) {
        const float *from = q + row / rows->group * rows->all->q_token + row % rows->group * rows->all->q_head;
        for (size_t h = 0; h < size; h++)
            rows->q[row * rows->padded + h] = from[h] * scale;
        rows->highest[row] = -INFINITY;
        rows->sum[row] = 0;
    }
    memset(rows->out, 0, count * rows->padded * sizeof *rows->out);
}

WITH_AVX512 INLINE void store_results(const struct rows *rows, size_t count, float *out)
{
    const size_t size = rows->all->head_size;
    for (size_t row = 0; row < count; row++) {
        const float weight = 1 / rows->sum[row];
        float *to = out + (row / rows->group * rows->all->heads + row % rows->group) * size;
        for (size_t h = 0; h < size; h++)
            to[h] = rows->out[row * rows->padded + h] * weight;
    }
}

size_t keys_scratch(const struct attention *all, const struct segment *segment)
{
    const size_t rows = segment->tokens * (all->heads / all->kv_heads), padded = ceil_div(all->head_size, LANES) * LANES;
    return ((all->head_size + TILE) * CHUNK + rows * (2 * padded + 2)) * sizeof(float);
}

WITH_AVX512 void attend_keys(const struct attention *all, const struct segment *segment, size_t kv_head, void *scratch)
{
    const size_t group = all->heads / all->kv_heads, count = segment->tokens * group;
    const size_t padded = ceil_div(all->head_size, LANES) * LANES, seen = segment->first + segment->tokens;
    const float *k = segment->k + kv_head * all->k_head, *v = segment->v + kv_head * all->v_head;
    float *turned = scratch, *weight = turned + all->head_size * CHUNK, *q = weight + TILE * CHUNK;
    const struct rows rows = {
        .all = all,
        .first = segment->first,
        .group = group,
        .padded = padded,
        .turned = turned,
        .weight = (float(*)[CHUNK])weight,
        .q = q,
        .out = q + count * padded,
        .highest = q + 2 * count * padded,
        .sum = q + 2 * count * padded + count,
    };
    load_queries(&rows, count, segment->q + kv_head * group * all->q_head);
    const float *here = chunk_of(k, segment, 0, all->k_block), *next;
    for (size_t i = 0, key = 0; key < seen; i++, key += CHUNK, here = next) {
        const size_t keys = smaller(CHUNK, seen - key), left = smaller(CHUNK, seen - key - keys);
        const float *v_here = chunk_of(v, segment, i, all->v_block);
        const float *v_next = left ? chunk_of(v, segment, i + 1, all->v_block) : v_here;
        next = left ? chunk_of(k, segment, i + 1, all->k_block) : here;
        const struct chunk chunk = {v_here, next, v_next, key, keys, left};
        attend_chunk(&rows, count, here, &chunk);
    }
    store_results(&rows, count, segment->out + kv_head * group * all->head_size);
}

#endif
