/* Draws a token from a row of logits, with AVX-512. engine/sampling.py has the definitions, and NumPy's way, which rounds
 * otherwise.
 *
 * What a filter keeps is found among the likeliest tokens: one pass over the row sums all weights and lists the tokens that
 * are likely enough; seldom are these too few, and a second pass lists more. Nothing is sorted: a filter's bound is found by
 * halving the range of logits it may lie in, each time among the tokens of that range only. A token that is filtered out
 * gets the weight 0. */
#include "native.h"

#include <stdlib.h>
#include <string.h>

#if TSQP_X86
#include <float.h>
#include <immintrin.h>
#include <math.h>

#define LANES 16
/* Logits whose weights are summed together. */
#define BLOCK 256
/* The first pass lists weights down to this for top-k, and to this part of 1 - p for top-p; the largest weight is 1. */
#define LEAST_K 0x1p-12
#define LEAST_P 0x1p-8

struct listed {
    int32_t *token; /* ascending */
    float *x, *weight;
    size_t count;
    float *range_x, *range_weight; /* room for as many */
    double *sums;                  /* of each block's weights, listed or not */
    double total;
};

WITH_AVX512 INLINE __mmask16 first(size_t count) { return (__mmask16)(count < LANES ? (1u << count) - 1 : 0xffff); }

WITH_AVX512 INLINE double sum(__m512 x)
{
    const __m256 high = _mm512_extractf32x8_ps(x, 1), low = _mm512_castps512_ps256(x);
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high)));
}

/* 2^t for t <= 0 within 2^-22 of itself. A polynomial on [-1/2, 1/2] times 2^n, n = t rounded; scalef makes 0 of anything
 * times 2^-inf. */
WITH_AVX512 INLINE __m512 power(__m512 t)
{
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(t, n);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0x1.5bba14p-10f), _mm512_set1_ps(0x1.3cea88p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.c6b752p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.ebf9bcp-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.62e42ap-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, n);
}

WITH_AVX512 INLINE void append(struct listed *to, __mmask16 which, size_t at, __m512 x, __m512 weight)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i token = _mm512_add_epi32(_mm512_set1_epi32((int32_t)at), lane);
    _mm512_storeu_si512(to->token + to->count, _mm512_maskz_compress_epi32(which, token));
    _mm512_storeu_ps(to->x + to->count, _mm512_maskz_compress_ps(which, x));
    _mm512_storeu_ps(to->weight + to->count, _mm512_maskz_compress_ps(which, weight));
    to->count += (size_t)__builtin_popcount(which);
}

/* Sums all weights, and lists the tokens whose logits are so close to the largest; FLT_MAX lists all that can be drawn, since
 * the others' weights are 0. A lane adds 16 weights of a block in float32, so the total is right to 15 / 2^24 of itself. */
WITH_AVX512 static void list(const struct row *row, float distance, struct listed *to)
{
    to->count = 0;
    to->total = 0;
    for (size_t start = 0; start < row->count; start += BLOCK) {
        const size_t end = smaller(start + BLOCK, row->count);
        __m512 lanes = _mm512_setzero_ps();
        for (size_t at = start; at < end; at += LANES) {
            const __mmask16 there = first(end - at);
            const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), there, row->x + at);
            const __m512 below = _mm512_sub_ps(_mm512_set1_ps(row->largest), x);
            const __m512 weight = power(_mm512_mul_ps(below, _mm512_set1_ps(-row->scale)));
            const __mmask16 close = _mm512_mask_cmp_ps_mask(there, below, _mm512_set1_ps(distance), _CMP_LE_OQ);
            lanes = _mm512_add_ps(lanes, weight);
            if (close)
                append(to, close, at, x, weight);
        }
        to->total += to->sums[start / BLOCK] = sum(lanes);
    }
}

/* Those of a range that are at a logit or above. */
struct part {
    double mass;              /* the sum of their weights, or their number */
    float least_in, most_out; /* the lowest there, and the highest below */
};

WITH_AVX512 static struct part part_of(const float *x, const float *weight, size_t count, float from)
{
    __m512d mass = _mm512_setzero_pd();
    __m512 in = _mm512_set1_ps(INFINITY), out = _mm512_set1_ps(-INFINITY);
    for (size_t i = 0; i < count; i += LANES) {
        const __mmask16 there = first(count - i);
        const __m512 here = _mm512_maskz_loadu_ps(there, x + i);
        const __mmask16 above = _mm512_mask_cmp_ps_mask(there, here, _mm512_set1_ps(from), _CMP_GE_OQ);
        const __m512 add = weight ? _mm512_maskz_loadu_ps(above, weight + i) : _mm512_maskz_mov_ps(above, _mm512_set1_ps(1));
        mass = _mm512_add_pd(mass, _mm512_cvtps_pd(_mm512_castps512_ps256(add)));
        mass = _mm512_add_pd(mass, _mm512_cvtps_pd(_mm512_extractf32x8_ps(add, 1)));
        in = _mm512_mask_min_ps(in, above, in, here);
        out = _mm512_mask_max_ps(out, there & ~above, out, here);
    }
    return (struct part){_mm512_reduce_add_pd(mass), _mm512_reduce_min_ps(in), _mm512_reduce_max_ps(out)};
}

/* Copies the tokens of a range whose logits are between two, both included; may be in place. Returns how many. */
WITH_AVX512 static size_t narrow(const float *x, const float *weight, size_t count, float low, float high, float *to_x,
                                 float *to_weight)
{
    size_t kept = 0;
    for (size_t i = 0; i < count; i += LANES) {
        const __m512 here = _mm512_maskz_loadu_ps(first(count - i), x + i);
        const __mmask16 above = _mm512_mask_cmp_ps_mask(first(count - i), here, _mm512_set1_ps(low), _CMP_GE_OQ);
        const __mmask16 in = _mm512_mask_cmp_ps_mask(above, here, _mm512_set1_ps(high), _CMP_LE_OQ);
        const __m512 weight_here = _mm512_maskz_loadu_ps(in, weight + i);
        _mm512_storeu_ps(to_x + kept, _mm512_maskz_compress_ps(in, here));
        _mm512_storeu_ps(to_weight + kept, _mm512_maskz_compress_ps(in, weight_here));
        kept += (size_t)__builtin_popcount(in);
    }
    return kept;
}

/* Returns the sum of the listed weights that no filter has taken. */
static double left(const struct listed *listed)
{
    return part_of(listed->x, listed->weight, listed->count, -FLT_MAX).mass;
}

/* Returns the highest logit at and above which there is the goal, of listed weights or of tokens; the lowest one if there is
 * nowhere. above: what is above that logit. */
static float bound(const struct row *row, const struct listed *listed, double goal, int counting, double *above)
{
    const float *x = listed->x, *weight = listed->weight;
    size_t count = listed->count;
    float low = part_of(x, NULL, count, -FLT_MAX).least_in, high = row->largest;
    *above = 0;
    while (low < high) {
        const float middle = low / 2 + high / 2, from = middle > low ? middle : high;
        const struct part part = part_of(x, counting ? NULL : weight, count, from);
        if (*above + part.mass >= goal) {
            low = part.least_in;
        } else {
            *above += part.mass;
            high = part.most_out;
        }
        count = narrow(x, weight, count, low, high, listed->range_x, listed->range_weight);
        x = listed->range_x, weight = listed->range_weight;
    }
    return low;
}

/* Keeps the k likeliest, and those as likely as the last. */
WITH_AVX512 static void keep_top_k(const struct row *row, struct listed *listed)
{
    double above;
    const float least = bound(row, listed, (double)row->top_k, 1, &above);
    for (size_t i = 0; i < listed->count; i++)
        listed->weight[i] = listed->x[i] >= least ? listed->weight[i] : 0;
    listed->total = left(listed);
}

/* Keeps the fewest likeliest that reach p, the first ones of those as likely as the last. */
WITH_AVX512 static void keep_top_p(const struct row *row, struct listed *listed)
{
    const double goal = row->top_p * listed->total;
    double reached;
    const float least = bound(row, listed, goal, 0, &reached);
    for (size_t i = 0; i < listed->count; i++)
        listed->weight[i] = listed->x[i] >= least ? listed->weight[i] : 0;
    for (size_t i = 0; i < listed->count; i++)
        if (listed->x[i] == least) {
            listed->weight[i] = reached < goal ? listed->weight[i] : 0;
            reached += (double)listed->weight[i];
        }
}

WITH_AVX512 static void keep_min_p(const struct row *row, struct listed *listed)
{
    const float least = (float)row->min_p;
    for (size_t i = 0; i < listed->count; i++)
        listed->weight[i] = listed->weight[i] >= least ? listed->weight[i] : 0;
}

/* Returns how far below the largest logit all tokens of a weight are, and none of a fourth of it. */
static float distance_of(const struct row *row, double weight)
{
    uint64_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return (float)(1024 - (int)(bits >> 52)) / row->scale; /* 1 - log2(weight), rounded up */
}

/* Lists what the first filter's choice is among. */
static void list_likely(const struct row *row, struct listed *listed)
{
    const double rest = 1 - row->top_p;
    if (row->top_k) {
        list(row, distance_of(row, LEAST_K), listed);
        if (listed->count < row->top_k)
            list(row, FLT_MAX, listed);
    } else if (rest > 0) {
        list(row, distance_of(row, rest * LEAST_P), listed);
        if (left(listed) < row->top_p * listed->total) /* Those not listed then have less than 1 - p together. */
            list(row, distance_of(row, rest * listed->total / (double)row->count), listed);
    } else {
        list(row, distance_of(row, row->min_p), listed);
    }
}

/* Returns the first token where the running sum of weights exceeds a target; or where rounding kept it from that, the last
 * that has a weight. */
static size_t token_at(const struct listed *listed, double target)
{
    double running = 0;
    size_t last = 0;
    for (size_t i = 0; i < listed->count; i++) {
        running += (double)listed->weight[i];
        last = listed->weight[i] > 0 ? i : last;
        if (running > target)
            break;
    }
    /* Nothing is listed if somebody changed the logits meanwhile. */
    return listed->count ? (size_t)listed->token[last] : 0;
}

/* Draws from the whole row: looks for the block, then computes its weights again. */
static size_t draw_from_all(const struct row *row, struct listed *listed)
{
    list(row, -1, listed);
    const double target = row->uniform * listed->total;
    double running = 0;
    size_t start = 0;
    /* Sums are added as for the total, so the running one exceeds the target. */
    for (; start + BLOCK < row->count && running + listed->sums[start / BLOCK] <= target; start += BLOCK)
        running += listed->sums[start / BLOCK];
    struct row block = *row;
    block.x += start;
    block.count = smaller(BLOCK, row->count - start);
    list(&block, FLT_MAX, listed);
    return start + token_at(listed, target - running);
}

static size_t draw_from_kept(const struct row *row, struct listed *listed)
{
    list_likely(row, listed);
    if (row->top_k)
        keep_top_k(row, listed);
    if (row->top_p < 1)
        keep_top_p(row, listed);
    if (row->min_p > 0)
        keep_min_p(row, listed);
    return token_at(listed, row->uniform * left(listed));
}

int64_t draw_token(const struct row *row, enum isa isa)
{
    /* Room for whole vectors after the last token. */
    const size_t room = row->count + LANES;
    struct listed listed = {.sums = isa == AVX512_VNNI ? malloc(room * (sizeof(double) + 4 * sizeof(float) + 4)) : NULL};
    if (!listed.sums)
        return -1;
    listed.x = (float *)(listed.sums + room);
    listed.weight = listed.x + room;
    listed.range_x = listed.weight + room;
    listed.range_weight = listed.range_x + room;
    listed.token = (int32_t *)(listed.range_weight + room);
    const int filtered = row->top_k || row->top_p < 1 || row->min_p > 0;
    const int64_t token = (int64_t)(filtered ? draw_from_kept(row, &listed) : draw_from_all(row, &listed));
    free(listed.sums);
    return token;
}

#else

int64_t draw_token(const struct row *row, enum isa isa)
{
    (void)row, (void)isa;
    return -1;
}

#endif
