/* <y, s> modulo q = 2^61 - 1 for rows y of words and a secret vector s, in one pass that also takes masks off.
 *
 * s is cut into three limbs: s = s0 + 2^21 s1 + 2^42 s2, each below 2^21. A word is at most 2^31 in absolute value, so a
 * product with a limb is at most 2^52, and a block of 1024 words sums to at most 2^62: no lane of a vector, nor the sum of
 * all lanes, can leave 64 bits. Blocks are added in 128 bits, where a row of 2^30 words stays within 2^82, and the three sums,
 * shifted by up to 42 bits, below 2^125. Only then is anything reduced modulo q.
 *
 * The words may lie in memory that the peer shares and can change at any time. So each is read exactly once (volatile);
 * what is summed and what is stored is that one value. A product that was checked in one state and used in another would be
 * no check at all. Where activations are asked for, a row is scaled back while it is still in the cache, in this process's
 * memory; the caller shows them to nobody before it has compared all residues.
 *
 * Nothing here branches on, or looks up by, a word or a limb. */
#include "native.h"

#if TSQP_X86
#include <immintrin.h>
#endif

#define LIMBS 3
#define LIMB_BITS 21
#define BLOCK 1024
/* How far ahead words and masks are fetched, in bytes. They come from another core's cache and from memory, and a
 * processor's own prefetching starts anew at every page. */
#define FETCH_AHEAD 4096
#define ROWS_PER_TASK 4
/* Below this many words another thread is not worth waking. */
#define WORTH_THREADS (1u << 18)

#define Q ((UINT64_C(1) << 61) - 1)

/* One block of a row. Adds to the row's three sums. */
struct span {
    const volatile int32_t *words;
    const int32_t *masks;
    int32_t *out;
    const int32_t *limbs;
    size_t length, row_length; /* of the block; from limb to limb */
};
typedef void span_fn(const struct span *span, int64_t sums[LIMBS]);

INLINE void add_words(const struct span *span, size_t from, int64_t sums[LIMBS])
{
    for (size_t i = from; i < span->length; i++) {
        uint32_t word = (uint32_t)span->words[i];
        if (span->masks)
            word -= (uint32_t)span->masks[i];
        if (span->out)
            span->out[i] = (int32_t)word;
        for (size_t limb = 0; limb < LIMBS; limb++)
            sums[limb] += (int64_t)(int32_t)word * span->limbs[limb * span->row_length + i];
    }
}

static void span_portable(const struct span *span, int64_t sums[LIMBS]) { add_words(span, 0, sums); }

#if TSQP_X86

/* Products are of the lower halves of 64-bit lanes; the upper ones are shifted down first. Two products are below 2^53. */

WITH_AVX2 INLINE void add_avx2(__m256i *sum, __m256i words, __m256i limbs)
{
    const __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64(words, 32), _mm256_srli_epi64(limbs, 32));
    *sum = _mm256_add_epi64(*sum, _mm256_add_epi64(_mm256_mul_epi32(words, limbs), odd));
}

WITH_AVX2 INLINE int64_t total_avx2(__m256i sums)
{
    int64_t lanes[4];
    _mm256_storeu_si256((__m256i *)lanes, sums);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

WITH_AVX2 static void span_avx2(const struct span *given, int64_t sums[LIMBS])
{
    const struct span here = *given, *const span = &here; /* in registers: no store can change it */
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0;
    const int32_t *limb0 = span->limbs, *limb1 = limb0 + span->row_length, *limb2 = limb1 + span->row_length;
    size_t i = 0;
    for (; i + 8 <= span->length; i += 8) {
        __builtin_prefetch((const char *)(span->words + i) + FETCH_AHEAD);
        __m256i even = *(const volatile __m256i_u *)(span->words + i);
        if (span->masks) {
            __builtin_prefetch((const char *)(span->masks + i) + FETCH_AHEAD);
            even = _mm256_sub_epi32(even, _mm256_loadu_si256((const __m256i *)(span->masks + i)));
        }
        if (span->out)
            _mm256_storeu_si256((__m256i *)(span->out + i), even);
        add_avx2(&s0, even, _mm256_loadu_si256((const __m256i *)(limb0 + i)));
        add_avx2(&s1, even, _mm256_loadu_si256((const __m256i *)(limb1 + i)));
        add_avx2(&s2, even, _mm256_loadu_si256((const __m256i *)(limb2 + i)));
    }
    sums[0] += total_avx2(s0);
    sums[1] += total_avx2(s1);
    sums[2] += total_avx2(s2);
    add_words(span, i, sums);
}

WITH_AVX512 INLINE void add_avx512(__m512i *sum, __m512i words, __m512i limbs)
{
    const __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64(words, 32), _mm512_srli_epi64(limbs, 32));
    *sum = _mm512_add_epi64(*sum, _mm512_add_epi64(_mm512_mul_epi32(words, limbs), odd));
}

WITH_AVX512 static void span_avx512(const struct span *given, int64_t sums[LIMBS])
{
    const struct span here = *given, *const span = &here; /* in registers: no store can change it */
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0;
    const int32_t *limb0 = span->limbs, *limb1 = limb0 + span->row_length, *limb2 = limb1 + span->row_length;
    size_t i = 0;
    for (; i + 16 <= span->length; i += 16) {
        __builtin_prefetch((const char *)(span->words + i) + FETCH_AHEAD);
        __m512i even = *(const volatile __m512i_u *)(span->words + i);
        if (span->masks) {
            __builtin_prefetch((const char *)(span->masks + i) + FETCH_AHEAD);
            even = _mm512_sub_epi32(even, _mm512_loadu_si512((const void *)(span->masks + i)));
        }
        if (span->out)
            _mm512_storeu_si512((void *)(span->out + i), even);
        add_avx512(&s0, even, _mm512_loadu_si512((const void *)(limb0 + i)));
        add_avx512(&s1, even, _mm512_loadu_si512((const void *)(limb1 + i)));
        add_avx512(&s2, even, _mm512_loadu_si512((const void *)(limb2 + i)));
    }
    sums[0] += _mm512_reduce_add_epi64(s0);
    sums[1] += _mm512_reduce_add_epi64(s1);
    sums[2] += _mm512_reduce_add_epi64(s2);
    add_words(span, i, sums);
}

static span_fn *const spans[] = {span_portable, span_avx2, span_avx512};
#else
static span_fn *const spans[] = {span_portable, span_portable, span_portable};
#endif

/* sums[0] + 2^21 sums[1] + 2^42 sums[2] modulo q. Since 2^61 = 1 modulo q, what lies above bit 61 is added below. */
static int64_t mod_q(const __int128 sums[LIMBS])
{
    /* The sum lies within 2^125: with q 2^65, nearly 2^126, it is above zero and below 2^127. */
    const __int128 offset = (__int128)Q << 65;
    const __int128 one_limb = (__int128)1 << LIMB_BITS;
    const unsigned __int128 all = (unsigned __int128)(sums[0] + one_limb * (sums[1] + one_limb * sums[2]) + offset);
    uint64_t value = (uint64_t)(all & Q) + (uint64_t)(all >> 61 & Q) + (uint64_t)(all >> 122);
    value = (value & Q) + (value >> 61);
    const uint64_t reduced = value - Q;
    const uint64_t below = 0 - (reduced >> 63);
    return (int64_t)((value & below) | (reduced & ~below));
}

struct work {
    const struct dots *dots;
    span_fn *span;
    dequantize_fn *dequantize;
};

static void dot_of_row(const struct dots *dots, span_fn *sum, size_t row)
{
    __int128 totals[LIMBS] = {0};
    for (size_t first = 0; first < dots->length; first += BLOCK) {
        const size_t at = row * dots->length + first;
        int64_t sums[LIMBS] = {0};
        const struct span span = {
            dots->words + at,
            dots->masks ? dots->masks + at : NULL,
            dots->out ? dots->out + at : NULL,
            dots->limbs + first,
            smaller(BLOCK, dots->length - first),
            dots->length,
        };
        sum(&span, sums);
        for (size_t limb = 0; limb < LIMBS; limb++)
            totals[limb] += sums[limb];
    }
    dots->dots[row] = mod_q(totals);
}

static void dots_task(void *argument, size_t index)
{
    const struct work *work = argument;
    const size_t from = index * ROWS_PER_TASK, to = smaller(work->dots->rows, from + ROWS_PER_TASK);
    for (size_t row = from; row < to; row++) {
        dot_of_row(work->dots, work->span, row);
        if (work->dots->scaling)
            work->dequantize(work->dots->scaling, row);
    }
}

void field_dots(const struct dots *dots, enum isa isa, int threads)
{
    struct work work = {dots, spans[isa], dequantizer(isa)};
    if (dots->rows * dots->length < WORTH_THREADS)
        threads = 1;
    run_tasks(dots_task, &work, ceil_div(dots->rows, ROWS_PER_TASK), threads);
}
