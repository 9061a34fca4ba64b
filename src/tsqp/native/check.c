/* <y, s> modulo q = 2^61 - 1 for rows y of words and a secret vector s, in one pass that also takes masks off.
 *
 * s is cut into three limbs: s = s0 + 2^21 s1 + 2^42 s2, each below 2^21. A word is at most 2^31 in absolute value, so a
 * product with a limb is at most 2^52, and a block of 1024 words sums to at most 2^62: no lane of a vector, nor the sum of
 * all lanes, can leave 64 bits. Blocks are added in 128 bits, where a row of 2^30 words stays within 2^82, and the three sums,
 * shifted by up to 42 bits, below 2^125. Only then is anything reduced modulo q.
 *
 * The words may lie in memory that the peer shares and can change at any time. So each is read exactly once (volatile);
 * what is summed and what is stored is that one value. A product that was checked in one state and used in another would be
 * no check at all.
 *
 * Nothing here branches on, or looks up by, a word or a limb. */
#include "native.h"

#if TSQP_X86
#include <immintrin.h>
#endif

#define LIMBS 3
#define LIMB_BITS 21
#define BLOCK 1024
/* Rows whose words meet the same load of limbs. */
#define ROWS 4
/* Below this many words another thread is not worth waking. */
#define WORTH_THREADS (1u << 18)

#define Q ((UINT64_C(1) << 61) - 1)

/* One block of a few rows: the masks' offset is the words'. Adds to each row's three sums. */
struct span {
    const volatile int32_t *words;
    const int32_t *masks;
    int32_t *out;
    const int32_t *limbs;
    size_t length, row_length; /* of the block; from row to row, and from limb to limb */
};
typedef void span_fn(const struct span *span, int64_t sums[][LIMBS]);

INLINE void add_words(const struct span *span, size_t row, size_t from, int64_t sums[LIMBS])
{
    for (size_t i = from; i < span->length; i++) {
        const size_t at = row * span->row_length + i;
        uint32_t word = (uint32_t)span->words[at];
        if (span->masks)
            word -= (uint32_t)span->masks[at];
        if (span->out)
            span->out[at] = (int32_t)word;
        for (size_t limb = 0; limb < LIMBS; limb++)
            sums[limb] += (int64_t)(int32_t)word * span->limbs[limb * span->row_length + i];
    }
}

static void span_portable(const struct span *span, int64_t sums[][LIMBS]) { add_words(span, 0, 0, sums[0]); }

#if TSQP_X86

/* Sums of a row in 64-bit lanes. Products are of the lower halves of lanes; the upper ones are shifted down first. */

struct sums_avx2 {
    __m256i s0, s1, s2;
};
struct limbs_avx2 {
    __m256i even0, even1, even2, odd0, odd1, odd2;
};

WITH_AVX2 INLINE void add_avx2(const struct span *span, size_t row, size_t i, const struct limbs_avx2 *limbs,
                               struct sums_avx2 *sums)
{
    const size_t at = row * span->row_length + i;
    __m256i even = *(const volatile __m256i_u *)(span->words + at);
    if (span->masks)
        even = _mm256_sub_epi32(even, _mm256_loadu_si256((const __m256i *)(span->masks + at)));
    if (span->out)
        _mm256_storeu_si256((__m256i *)(span->out + at), even);
    const __m256i odd = _mm256_srli_epi64(even, 32);
    sums->s0 = _mm256_add_epi64(sums->s0, _mm256_mul_epi32(even, limbs->even0));
    sums->s1 = _mm256_add_epi64(sums->s1, _mm256_mul_epi32(even, limbs->even1));
    sums->s2 = _mm256_add_epi64(sums->s2, _mm256_mul_epi32(even, limbs->even2));
    sums->s0 = _mm256_add_epi64(sums->s0, _mm256_mul_epi32(odd, limbs->odd0));
    sums->s1 = _mm256_add_epi64(sums->s1, _mm256_mul_epi32(odd, limbs->odd1));
    sums->s2 = _mm256_add_epi64(sums->s2, _mm256_mul_epi32(odd, limbs->odd2));
}

WITH_AVX2 INLINE int64_t total_avx2(__m256i sums)
{
    int64_t lanes[4];
    _mm256_storeu_si256((__m256i *)lanes, sums);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

WITH_AVX2 INLINE void finish_avx2(const struct span *span, size_t row, size_t from, const struct sums_avx2 *of_row,
                                  int64_t sums[LIMBS])
{
    sums[0] += total_avx2(of_row->s0);
    sums[1] += total_avx2(of_row->s1);
    sums[2] += total_avx2(of_row->s2);
    add_words(span, row, from, sums);
}

WITH_AVX2 INLINE void span_avx2(const size_t rows, const struct span *given, int64_t sums[][LIMBS])
{
    const struct span here = *given, *const span = &here; /* in registers: no store can change it */
    const __m256i zero = _mm256_setzero_si256();
    struct sums_avx2 a = {zero, zero, zero}, b = a;
    const int32_t *limb = span->limbs;
    size_t i = 0;
    for (; i + 8 <= span->length; i += 8) {
        struct limbs_avx2 limbs;
        limbs.even0 = _mm256_loadu_si256((const __m256i *)(limb + i));
        limbs.even1 = _mm256_loadu_si256((const __m256i *)(limb + span->row_length + i));
        limbs.even2 = _mm256_loadu_si256((const __m256i *)(limb + 2 * span->row_length + i));
        limbs.odd0 = _mm256_srli_epi64(limbs.even0, 32);
        limbs.odd1 = _mm256_srli_epi64(limbs.even1, 32);
        limbs.odd2 = _mm256_srli_epi64(limbs.even2, 32);
        add_avx2(span, 0, i, &limbs, &a);
        if (rows > 1)
            add_avx2(span, 1, i, &limbs, &b);
    }
    finish_avx2(span, 0, i, &a, sums[0]);
    if (rows > 1)
        finish_avx2(span, 1, i, &b, sums[1]);
}

WITH_AVX2 static void one_avx2(const struct span *span, int64_t sums[][LIMBS]) { span_avx2(1, span, sums); }

/* Two rows at a time: twelve sums and six limbs would not fit into 16 registers. */
WITH_AVX2 static void four_avx2(const struct span *span, int64_t sums[][LIMBS])
{
    struct span rest = *span;
    span_avx2(2, span, sums);
    rest.words += 2 * span->row_length;
    rest.masks = span->masks ? span->masks + 2 * span->row_length : NULL;
    rest.out = span->out ? span->out + 2 * span->row_length : NULL;
    span_avx2(2, &rest, sums + 2);
}

struct sums_avx512 {
    __m512i s0, s1, s2;
};
struct limbs_avx512 {
    __m512i even0, even1, even2, odd0, odd1, odd2;
};

WITH_AVX512 INLINE void add_avx512(const struct span *span, size_t row, size_t i, const struct limbs_avx512 *limbs,
                                   struct sums_avx512 *sums)
{
    const size_t at = row * span->row_length + i;
    __m512i even = *(const volatile __m512i_u *)(span->words + at);
    if (span->masks)
        even = _mm512_sub_epi32(even, _mm512_loadu_si512(span->masks + at));
    if (span->out)
        _mm512_storeu_si512(span->out + at, even);
    const __m512i odd = _mm512_srli_epi64(even, 32);
    sums->s0 = _mm512_add_epi64(sums->s0, _mm512_mul_epi32(even, limbs->even0));
    sums->s1 = _mm512_add_epi64(sums->s1, _mm512_mul_epi32(even, limbs->even1));
    sums->s2 = _mm512_add_epi64(sums->s2, _mm512_mul_epi32(even, limbs->even2));
    sums->s0 = _mm512_add_epi64(sums->s0, _mm512_mul_epi32(odd, limbs->odd0));
    sums->s1 = _mm512_add_epi64(sums->s1, _mm512_mul_epi32(odd, limbs->odd1));
    sums->s2 = _mm512_add_epi64(sums->s2, _mm512_mul_epi32(odd, limbs->odd2));
}

WITH_AVX512 INLINE void finish_avx512(const struct span *span, size_t row, size_t from,
                                      const struct sums_avx512 *of_row, int64_t sums[LIMBS])
{
    sums[0] += _mm512_reduce_add_epi64(of_row->s0);
    sums[1] += _mm512_reduce_add_epi64(of_row->s1);
    sums[2] += _mm512_reduce_add_epi64(of_row->s2);
    add_words(span, row, from, sums);
}

WITH_AVX512 INLINE void span_avx512(const size_t rows, const struct span *given, int64_t sums[][LIMBS])
{
    const struct span here = *given, *const span = &here; /* in registers: no store can change it */
    const __m512i zero = _mm512_setzero_si512();
    struct sums_avx512 a = {zero, zero, zero}, b = a, c = a, d = a;
    const int32_t *limb = span->limbs;
    size_t i = 0;
    for (; i + 16 <= span->length; i += 16) {
        struct limbs_avx512 limbs;
        limbs.even0 = _mm512_loadu_si512(limb + i);
        limbs.even1 = _mm512_loadu_si512(limb + span->row_length + i);
        limbs.even2 = _mm512_loadu_si512(limb + 2 * span->row_length + i);
        limbs.odd0 = _mm512_srli_epi64(limbs.even0, 32);
        limbs.odd1 = _mm512_srli_epi64(limbs.even1, 32);
        limbs.odd2 = _mm512_srli_epi64(limbs.even2, 32);
        add_avx512(span, 0, i, &limbs, &a);
        if (rows > 1) {
            add_avx512(span, 1, i, &limbs, &b);
            add_avx512(span, 2, i, &limbs, &c);
            add_avx512(span, 3, i, &limbs, &d);
        }
    }
    finish_avx512(span, 0, i, &a, sums[0]);
    if (rows > 1) {
        finish_avx512(span, 1, i, &b, sums[1]);
        finish_avx512(span, 2, i, &c, sums[2]);
        finish_avx512(span, 3, i, &d, sums[3]);
    }
}

WITH_AVX512 static void one_avx512(const struct span *span, int64_t sums[][LIMBS]) { span_avx512(1, span, sums); }
WITH_AVX512 static void four_avx512(const struct span *span, int64_t sums[][LIMBS]) { span_avx512(ROWS, span, sums); }

static span_fn *const one_row[] = {span_portable, one_avx2, one_avx512};
static span_fn *const four_rows[] = {NULL, four_avx2, four_avx512};
#else
static span_fn *const one_row[] = {span_portable, span_portable, span_portable};
static span_fn *const four_rows[] = {NULL, NULL, NULL};
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
    span_fn *one, *four;
};

static void dots_of_rows(const struct dots *dots, span_fn *kernel, size_t row, size_t rows)
{
    __int128 totals[ROWS][LIMBS] = {{0}};
    for (size_t first = 0; first < dots->length; first += BLOCK) {
        const size_t at = row * dots->length + first;
        int64_t sums[ROWS][LIMBS] = {{0}};
        const struct span span = {
            dots->words + at,
            dots->masks ? dots->masks + at : NULL,
            dots->out ? dots->out + at : NULL,
            dots->limbs + first,
            smaller(BLOCK, dots->length - first),
            dots->length,
        };
        kernel(&span, sums);
        for (size_t r = 0; r < rows; r++)
            for (size_t limb = 0; limb < LIMBS; limb++)
                totals[r][limb] += sums[r][limb];
    }
    for (size_t r = 0; r < rows; r++)
        dots->dots[row + r] = mod_q(totals[r]);
}

static void dots_task(void *argument, size_t index)
{
    const struct work *work = argument;
    const size_t from = index * ROWS, to = smaller(work->dots->rows, from + ROWS);
    if (work->four && to - from == ROWS) {
        dots_of_rows(work->dots, work->four, from, ROWS);
        return;
    }
    for (size_t row = from; row < to; row++)
        dots_of_rows(work->dots, work->one, row, 1);
}

void field_dots(const struct dots *dots, enum isa isa, int threads)
{
    struct work work = {dots, one_row[isa], four_rows[isa]};
    if (dots->rows * dots->length < WORTH_THREADS)
        threads = 1;
    run_tasks(dots_task, &work, ceil_div(dots->rows, ROWS), threads);
}
