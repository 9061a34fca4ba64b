/* Causal self-attention, softmax(q k^T / sqrt(H)) v in float32 (Vaswani et al. 2017), with key-value heads that serve
 * several query heads each (Ainslie et al. 2023). The softmax is computed on the way, chunk by chunk of the keys, with a
 * running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022), so that scores never leave the cache.
 *
 * The lanes of a vector are queries. So keys and values are read as they lie, one number for all lanes; the mask is a
 * comparison of positions; and no operation crosses lanes. A query's result is therefore the same bits whichever queries
 * are computed with it, in whatever block or lane: chunks always begin at key 0, and a key that a query must not see adds
 * an exact zero.
 *
 * AVX-512 only: with half the lanes and half the registers this layout gains nothing over PyTorch's. Nothing here branches
 * on, or looks up by, a number of the prompt's. */
#include "native.h"

#if TSQP_X86
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define VECTORS 2
/* Queries of one block: with eight keys, or eight dimensions, sums fill half of the 32 registers. */
#define BLOCK (LANES * VECTORS)
#define TILE 8
/* Keys of one chunk: their scores, and a block's sums, stay in a first-level cache. */
#define CHUNK 128
/* Below this many multiplications another thread is not worth waking. */
#define WORTH_THREADS (1u << 20)

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(4 * LANES)));

WITH_AVX512 INLINE lanes chosen(words mask, lanes yes, lanes no) { return (lanes)(((words)yes & mask) | ((words)no & ~mask)); }

/* exp(x) for x <= 0 within 2 units in the last place; 0 below -87, also for -inf. 2^n with n = x / ln 2 rounded, times a
 * polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, Moshier 1989). */
WITH_AVX512 INLINE lanes exponential(lanes x)
{
    const lanes magic = (lanes){0} + 0x1.8p23f, least = (lanes){0} - 87.0f;
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
    return chosen(too_small, (lanes){0}, p * power);
}

/* One block of queries of one head. */
struct block {
    const struct attention *all;
    const float *k, *v;
    size_t first;            /* position of the first query */
    size_t queries;          /* how many there are; other lanes hold zeros */
    lanes (*q)[VECTORS];     /* (head size): scaled, transposed */
    lanes (*out)[VECTORS];   /* (head size): weighted sums of values */
    lanes (*score)[VECTORS]; /* (CHUNK) */
    lanes highest[VECTORS], sum[VECTORS];
};

/* Scores of COUNT keys. */
WITH_AVX512 INLINE void score_keys(const int COUNT, const struct block *block, size_t key, lanes (*score)[VECTORS])
{
    const size_t step = block->all->k_token, size = block->all->head_size;
    const float *k = block->k + key * step;
    lanes sums[TILE][VECTORS] = {{{0}}};
    for (size_t h = 0; h < size; h++) {
        const lanes q0 = block->q[h][0], q1 = block->q[h][1];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) {
            sums[i][0] += q0 * k[i * step + h];
            sums[i][1] += q1 * k[i * step + h];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
        score[i][0] = sums[i][0];
        score[i][1] = sums[i][1];
    }
}

/* Adds the values of a chunk, weighted, to COUNT dimensions. */
WITH_AVX512 INLINE void add_values(const int COUNT, const struct block *block, size_t key, size_t keys, size_t h)
{
    const size_t step = block->all->v_token;
    const float *v = block->v + key * step + h;
    lanes sums[TILE][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
        sums[i][0] = block->out[h + i][0];
        sums[i][1] = block->out[h + i][1];
    }
    for (size_t j = 0; j < keys; j++, v += step) {
        const lanes w0 = block->score[j][0], w1 = block->score[j][1];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) {
            sums[i][0] += w0 * v[i];
            sums[i][1] += w1 * v[i];
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
        const lanes score = chosen(hidden, (lanes){0} - INFINITY, block->score[j][vector]);
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

WITH_AVX512 INLINE void attend_chunk(struct block *block, size_t key, size_t keys)
{
    size_t j = 0, h = 0;
    for (; j + TILE <= keys; j += TILE)
        score_keys(TILE, block, key + j, block->score + j);
    for (; j < keys; j++)
        score_keys(1, block, key + j, block->score + j);
    weigh(block, 0, key, keys);
    weigh(block, 1, key, keys);
    for (; h + TILE <= block->all->head_size; h += TILE)
        add_values(TILE, block, key, keys, h);
    for (; h < block->all->head_size; h++)
        add_values(1, block, key, keys, h);
}

WITH_AVX512 INLINE void load_queries(const struct block *block, const float *q)
{
    const float scale = (float)(1 / sqrt((double)block->all->head_size));
    for (size_t h = 0; h < block->all->head_size; h++)
        for (size_t lane = 0; lane < BLOCK; lane++)
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

/* Computes block number index: the longest first, so that threads end together. scratch: 2 (head size + CHUNK / 2). */
WITH_AVX512 static void attend_block(const struct attention *all, size_t index, lanes (*scratch)[VECTORS])
{
    const size_t blocks = ceil_div(all->tokens, BLOCK), pairs = all->batch * all->heads;
    const size_t at = (blocks - 1 - index / pairs) * BLOCK, head = index % all->heads;
    const size_t batch = index % pairs / all->heads, shared = head / (all->heads / all->kv_heads);
    struct block block = {
        .all = all,
        .k = all->k + batch * all->k_batch + shared * all->k_head,
        .v = all->v + batch * all->v_batch + shared * all->v_head,
        .first = all->total - all->tokens + at,
        .queries = smaller(BLOCK, all->tokens - at),
        .q = scratch,
        .out = scratch + all->head_size,
        .score = scratch + 2 * all->head_size,
        .highest = {(lanes){0} - INFINITY, (lanes){0} - INFINITY},
        .sum = {{0}, {0}},
    };
    const size_t seen = block.first + block.queries;
    load_queries(&block, all->q + batch * all->q_batch + at * all->q_token + head * all->q_head);
    memset(block.out, 0, all->head_size * sizeof *block.out);
    for (size_t key = 0; key < seen; key += CHUNK)
        attend_chunk(&block, key, smaller(CHUNK, seen - key));
    store_results(&block, all->out + ((batch * all->tokens + at) * all->heads + head) * all->head_size);
}

struct attending {
    const struct attention *all;
    atomic_int failed;
};

static void attend_task(void *argument, size_t index)
{
    struct attending *work = argument;
    void *scratch = aligned_alloc(4 * LANES, (2 * work->all->head_size + CHUNK) * sizeof(lanes[VECTORS]));
    if (scratch)
        attend_block(work->all, index, scratch);
    else
        atomic_store(&work->failed, 1);
    free(scratch);
}

int attend(const struct attention *all, int threads)
{
    struct attending work = {all, 0};
    const size_t pairs = all->batch * all->heads;
    if (pairs * all->tokens * all->total * all->head_size < WORTH_THREADS)
        threads = 1;
    run_tasks(attend_task, &work, pairs * ceil_div(all->tokens, BLOCK), threads);
    return atomic_load(&work.failed) ? -1 : 0;
}

#else

int attend(const struct attention *all, int threads)
{
    (void)all, (void)threads;
    return -1;
}

#endif
