/* Attention of many queries of one sequence: the lanes of a vector are queries. Keys and values are read as they lie, one
 * number for all lanes; the mask is a comparison of positions; and no operation crosses lanes. attention.c states what is
 * computed. */
#include "attention.h"

#if TSQP_X86
#include <string.h>

#define VECTORS 2 /* of QUERIES: with eight keys, or eight dimensions, sums fill half of the 32 registers */
#define TILE 8

/* One block of queries of one head. */
struct block {
    const struct attention *all;
    size_t first;            /* position of the first query */
    size_t queries;          /* how many there are; other lanes hold zeros */
    lanes (*q)[VECTORS];     /* (head size): scaled, transposed */
    lanes (*out)[VECTORS];   /* (head size): weighted sums of values */
    lanes (*score)[VECTORS]; /* (CHUNK) */
    lanes highest[VECTORS], sum[VECTORS];
};

/* Scores of COUNT keys. */
WITH_AVX512 INLINE void score_keys(const int COUNT, const struct block *block, const float *k, lanes (*score)[VECTORS])
{
    const size_t step = block->all->k_token, size = block->all->head_size;
    lanes sums[TILE][VECTORS] = {{{0}}};
    for (size_t h = 0; h < size; h++) {
        const lanes q0 = block->q[h][0], q1 = block->q[h][1];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) {
            const lanes number = every(k[i * step + h]);
            sums[i][0] = fused(q0, number, sums[i][0]);
            sums[i][1] = fused(q1, number, sums[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
        score[i][0] = sums[i][0];
        score[i][1] = sums[i][1];
    }
}

/* Adds the values of a chunk, weighted, to COUNT dimensions from h on. */
WITH_AVX512 INLINE void add_values(const int COUNT, const struct block *block, const float *v, size_t keys, size_t h)
{
    const size_t step = block->all->v_token;
    lanes sums[TILE][VECTORS];
    v += h;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
        sums[i][0] = block->out[h + i][0];
        sums[i][1] = block->out[h + i][1];
    }
    for (size_t j = 0; j < keys; j++, v += step) {
        const lanes w0 = block->score[j][0], w1 = block->score[j][1];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) {
            const lanes number = every(v[i]);
            sums[i][0] = fused(w0, number, sums[i][0]);
            sums[i][1] = fused(w1, number, sums[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
        block->out[h + i][0] = sums[i][0];
        block->out[h + i][1] = sums[i][1];
    }
}

/* Turns scores into weights relative to the highest score so far; what was summed before is scaled down to it. */
WITH_AVX512 INLINE void weigh(struct block *block, const int vector, size_t key, size_t keys)
{
    words position;
    lanes highest = block->highest[vector], sum;
    for (int lane = 0; lane < LANES; lane++)
        position[lane] = (int32_t)(block->first + vector * LANES + lane - key); /* of the query, from the chunk's start */
    for (size_t j = 0; j < keys; j++) {
        const words hidden = position < (int32_t)j;
        const lanes score = chosen(hidden, every(-INFINITY), block->score[j][vector]);
        block->score[j][vector] = score;
        highest = chosen(score > highest, score, highest);
    }
    const lanes shrink = exponential(block->highest[vector] - highest);
    sum = block->sum[vector] * shrink;
    for (size_t j = 0; j < keys; j++) {
        const lanes weight = exponential(block->score[j][vector] - highest);
        block->score[j][vector] = weight;
        sum += weight;
    }
    for (size_t h = 0; h < block->all->head_size; h++)
        block->out[h][vector] *= shrink;
    block->highest[vector] = highest;
    block->sum[vector] = sum;
}

WITH_AVX512 INLINE void attend_chunk(struct block *block, const float *k, const float *v, size_t key, size_t keys)
{
    size_t j = 0, h = 0;
    for (; j + TILE <= keys; j += TILE)
        score_keys(TILE, block, k + j * block->all->k_token, block->score + j);
    for (; j < keys; j++)
        score_keys(1, block, k + j * block->all->k_token, block->score + j);
    weigh(block, 0, key, keys);
    weigh(block, 1, key, keys);
    for (; h + TILE <= block->all->head_size; h += TILE)
        add_values(TILE, block, v, keys, h);
    for (; h < block->all->head_size; h++)
        add_values(1, block, v, keys, h);
}

WITH_AVX512 INLINE void load_queries(const struct block *block, const float *q)
{
    const float scale = score_scale(block->all);
    for (size_t h = 0; h < block->all->head_size; h++)
        for (size_t lane = 0; lane < QUERIES; lane++)
            ((float *)block->q[h])[lane] = lane < block->queries ? q[lane * block->all->q_token + h] * scale : 0;
}

WITH_AVX512 INLINE void store_results(const struct block *block, float *out)
{
    const size_t size = block->all->head_size, step = block->all->heads * size;
    const lanes weight[VECTORS] = {1 / block->sum[0], 1 / block->sum[1]};
    for (size_t h = 0; h < size; h++) {
        block->out[h][0] *= weight[0];
        block->out[h][1] *= weight[1];
    }
    for (size_t lane = 0; lane < block->queries; lane++)
        for (size_t h = 0; h < size; h++)
            out[lane * step + h] = ((const float *)block->out[h])[lane];
}

size_t queries_scratch(const struct attention *all) { return (2 * all->head_size + CHUNK) * sizeof(lanes[VECTORS]); }

WITH_AVX512 void attend_queries(const struct attention *all, const struct segment *segment, size_t head, size_t at,
                                void *scratch)
{
    lanes(*room)[VECTORS] = scratch;
    const size_t shared = head / (all->heads / all->kv_heads);
    const float *k = segment->k + shared * all->k_head, *v = segment->v + shared * all->v_head;
    struct block block = {
        .all = all,
        .first = segment->first + at,
        .queries = smaller(QUERIES, segment->tokens - at),
        .q = room,
        .out = room + all->head_size,
        .score = room + 2 * all->head_size,
        .highest = {every(-INFINITY), every(-INFINITY)},
        .sum = {{0}, {0}},
    };
    const size_t seen = block.first + block.queries;
    load_queries(&block, segment->q + at * all->q_token + head * all->q_head);
    memset(block.out, 0, all->head_size * sizeof *block.out);
    for (size_t chunk = 0, key = 0; key < seen; chunk++, key += CHUNK)
        attend_chunk(&block, chunk_of(k, segment, chunk, all->k_block), chunk_of(v, segment, chunk, all->v_block), key,
                     smaller(CHUNK, seen - key));
    store_results(&block, segment->out + (at * all->heads + head) * all->head_size);
}

#endif
