/* y = x W^T modulo 2^32 for words x and int8 codes W, exactly, whatever the words.
 *
 * A word is cut into balanced 16-bit limbs: lo = (int16) x, hi = (int16) ((x - lo) >> 16), so that x = lo + 2^16 hi modulo
 * 2^32, and y = sum lo w + 2^16 sum hi w modulo 2^32. Codes are widened to 16 bits; the processor multiplies 16-bit numbers
 * in pairs and adds the two 32-bit products. A pair sums to at most 2 2^15 2^7 = 2^23 in absolute value, far below 2^31, so
 * it is exact also where the instruction would saturate or wrap (vpmaddwd wraps only for four factors of -2^15, and a code
 * is at least -2^7). Everything after it is added modulo 2^32: vpaddd and vpdpwssd wrap (vpdpwssds would saturate). So
 * there is no bound on the number of inputs.
 *
 * Codes lie in panels of 16 outputs: for each pair of inputs 16 pairs of codes, 32 bytes, read once from front to back.
 * Outputs are padded to 16 and inputs to 2, with zeros. A tile of some rows and panels keeps all its sums in registers.
 *
 * Words may lie in memory that another process changes meanwhile: results may then be of any mixture of old and new words,
 * but every address and loop bound comes from the caller. */
#include "native.h"

#include <stdlib.h>
#include <string.h>

#if TSQP_X86
#include <immintrin.h>
#endif

#define PANEL 16
/* Packed words of one chunk of rows stay in a second-level cache while all panels pass; fewer rows than these would have
 * the panels come from memory too often. */
#define CHUNK_BYTES (512u << 10)
#define CHUNK_MIN_ROWS 24
/* Rows are packed in blocks of at most this many bytes, so that memory does not grow with the product. */
#define PACKED_BYTES (32u << 20)
/* Below this many multiplications another thread is not worth waking. */
#define WORTH_THREADS (1u << 20)

/* A tile: rows of packed words times neighbouring panels. columns: how many outputs of the last panel exist. */
struct tile {
    const uint32_t *x; /* (rows, pairs, 2): lo and hi of a pair of inputs */
    const int8_t *codes;
    int32_t *y;
    size_t pairs, outputs, columns;
};
typedef void tile_fn(const struct tile *tile);

/* Tiles of one instruction set, of up to rows x panels, or few_rows x few_panels: with few rows more panels fit into the
 * registers. */
struct family {
    size_t rows, panels, few_rows, few_panels;
    tile_fn *(*tile)(size_t rows, size_t panels);
    void (*pack)(const int32_t *x, size_t rows, size_t inputs, uint32_t *packed);
};

/* Packing */

INLINE void pack_body(const int32_t *x, size_t rows, size_t inputs, uint32_t *packed)
{
    for (size_t row = 0; row < rows; row++, x += inputs) {
        for (size_t pair = 0; pair < inputs / 2; pair++, packed += 2) {
            uint32_t a = (uint32_t)x[2 * pair], b = (uint32_t)x[2 * pair + 1];
            packed[0] = (a & 0xFFFF) | b << 16;
            /* x - (int16) x is x rounded to a multiple of 2^16: x + 2^15 without its low half. */
            packed[1] = (a + 0x8000) >> 16 | ((b + 0x8000) & 0xFFFF0000);
        }
        if (inputs % 2) {
            uint32_t a = (uint32_t)x[inputs - 1];
            packed[0] = a & 0xFFFF;
            packed[1] = (a + 0x8000) >> 16;
            packed += 2;
        }
    }
}

static void pack_portable(const int32_t *x, size_t rows, size_t inputs, uint32_t *packed)
{
    pack_body(x, rows, inputs, packed);
}

/* Portable: the words are put together again, and unsigned products wrap. Codes are widened once for all rows. */

INLINE void tile_portable(const int R, const struct tile *tile)
{
    uint32_t sums[4][PANEL] = {{0}};
    const int8_t *codes = tile->codes;
    for (size_t pair = 0; pair < tile->pairs; pair++, codes += 2 * PANEL) {
        uint32_t first[PANEL], second[PANEL];
        for (int n = 0; n < PANEL; n++) {
            first[n] = (uint32_t)codes[2 * n];
            second[n] = (uint32_t)codes[2 * n + 1];
        }
        for (int r = 0; r < R; r++) {
            const uint32_t *x = tile->x + (size_t)r * 2 * tile->pairs + 2 * pair;
            const uint32_t a = (uint32_t)(int16_t)x[0] + (x[1] << 16);
            const uint32_t b = (uint32_t)(int16_t)(x[0] >> 16) + (x[1] & 0xFFFF0000);
            for (int n = 0; n < PANEL; n++)
                sums[r][n] += a * first[n] + b * second[n];
        }
    }
    for (int r = 0; r < R; r++)
        memcpy(tile->y + (size_t)r * tile->outputs, sums[r], tile->columns * sizeof **sums);
}

static void portable_1(const struct tile *tile) { tile_portable(1, tile); }
static void portable_2(const struct tile *tile) { tile_portable(2, tile); }
static void portable_3(const struct tile *tile) { tile_portable(3, tile); }
static void portable_4(const struct tile *tile) { tile_portable(4, tile); }

static tile_fn *portable_tile(size_t rows, size_t panels)
{
    static tile_fn *const tiles[] = {portable_1, portable_2, portable_3, portable_4};
    (void)panels;
    return tiles[rows - 1];
}

static const struct family portable = {4, 1, 4, 1, portable_tile, pack_portable};

#if TSQP_X86

WITH_AVX2 static void pack_avx2(const int32_t *x, size_t rows, size_t inputs, uint32_t *packed)
{
    pack_body(x, rows, inputs, packed);
}

/* Sums are named one by one, and rows told apart by constant conditions: compilers keep elements of an array in memory.
 *
 * AVX2: a panel is two vectors of 8 outputs; 3 rows of lo and hi sums take 12 of the 16 registers. */

struct row_avx2 {
    __m256i lo0, lo1, hi0, hi1;
};

/* sums += products of 8 pairs, modulo 2^32. The empty statement keeps the sum in one register: without it, compilers copy
 * every sum in every step. */
WITH_AVX2 INLINE void multiply_add_avx2(__m256i *sums, __m256i w, __m256i x)
{
    *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(w, x));
    __asm__("" : "+x"(*sums));
}

WITH_AVX2 INLINE void add_avx2(struct row_avx2 *row, __m256i w0, __m256i w1, const uint32_t *x)
{
    const __m256i lo = _mm256_set1_epi32((int)x[0]);
    multiply_add_avx2(&row->lo0, w0, lo);
    multiply_add_avx2(&row->lo1, w1, lo);
    const __m256i hi = _mm256_set1_epi32((int)x[1]);
    multiply_add_avx2(&row->hi0, w0, hi);
    multiply_add_avx2(&row->hi1, w1, hi);
}

WITH_AVX2 INLINE void store_avx2(const struct row_avx2 *row, const struct tile *tile, size_t r)
{
    int32_t y[PANEL];
    _mm256_storeu_si256((__m256i *)y, _mm256_add_epi32(row->lo0, _mm256_slli_epi32(row->hi0, 16)));
    _mm256_storeu_si256((__m256i *)(y + 8), _mm256_add_epi32(row->lo1, _mm256_slli_epi32(row->hi1, 16)));
    memcpy(tile->y + r * tile->outputs, y, tile->columns * sizeof *y);
}

WITH_AVX2 INLINE void tile_avx2(const int R, const struct tile *tile)
{
    const __m256i zero = _mm256_setzero_si256();
    struct row_avx2 a = {zero, zero, zero, zero}, b = a, c = a;
    const size_t row_words = 2 * tile->pairs;
    const uint32_t *x = tile->x;
    const int8_t *codes = tile->codes;
    const uint32_t *const end = x + row_words;
    do { /* there is a pair: a loop that may not run at all would be given every sum twice */
        const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
        const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + PANEL)));
        add_avx2(&a, w0, w1, x);
        if (R > 1)
            add_avx2(&b, w0, w1, x + row_words);
        if (R > 2)
            add_avx2(&c, w0, w1, x + 2 * row_words);
        codes += 2 * PANEL;
        x += 2;
    } while (x != end);
    store_avx2(&a, tile, 0);
    if (R > 1)
        store_avx2(&b, tile, 1);
    if (R > 2)
        store_avx2(&c, tile, 2);
}

WITH_AVX2 static void avx2_1(const struct tile *tile) { tile_avx2(1, tile); }
WITH_AVX2 static void avx2_2(const struct tile *tile) { tile_avx2(2, tile); }
WITH_AVX2 static void avx2_3(const struct tile *tile) { tile_avx2(3, tile); }

static tile_fn *avx2_tile(size_t rows, size_t panels)
{
    static tile_fn *const tiles[] = {avx2_1, avx2_2, avx2_3};
    (void)panels;
    return tiles[rows - 1];
}

static const struct family avx2 = {3, 1, 3, 1, avx2_tile, pack_avx2};

WITH_AVX512 static void pack_avx512(const int32_t *x, size_t rows, size_t inputs, uint32_t *packed)
{
    pack_body(x, rows, inputs, packed);
}

/* AVX-512 with VNNI: a panel is one vector; 6 rows and 2 panels, or 3 rows and 4, take 24 of the 32 registers. */

struct panels_avx512 {
    __m512i v0, v1, v2, v3;
};
struct row_avx512 {
    struct panels_avx512 lo, hi;
};

WITH_AVX512 INLINE __m512i widened(const int8_t *codes)
{
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes));
}

/* sums += products of 16 pairs, added modulo 2^32. The instruction itself: around its builtin compilers copy every sum. */
WITH_AVX512 INLINE void multiply_add(__m512i *sums, __m512i w, __m512i x)
{
    __asm__("vpdpwssd %2, %1, %0" : "+v"(*sums) : "v"(w), "v"(x));
}

WITH_AVX512 INLINE void add_limb(const int V, struct panels_avx512 *sums, const struct panels_avx512 *w, uint32_t word)
{
    const __m512i x = _mm512_set1_epi32((int)word);
    multiply_add(&sums->v0, w->v0, x);
    if (V > 1)
        multiply_add(&sums->v1, w->v1, x);
    if (V > 2)
        multiply_add(&sums->v2, w->v2, x);
    if (V > 3)
        multiply_add(&sums->v3, w->v3, x);
}

WITH_AVX512 INLINE void add_avx512(const int V, struct row_avx512 *row, const struct panels_avx512 *w, const uint32_t *x)
{
    add_limb(V, &row->lo, w, x[0]);
    add_limb(V, &row->hi, w, x[1]);
}

WITH_AVX512 INLINE void store_panel(int32_t *y, __m512i lo, __m512i hi, size_t columns)
{
    _mm512_mask_storeu_epi32(y, (__mmask16)(0xFFFF >> (PANEL - columns)),
                             _mm512_add_epi32(lo, _mm512_slli_epi32(hi, 16)));
}

WITH_AVX512 INLINE void store_avx512(const int V, const struct row_avx512 *row, const struct tile *tile, size_t r)
{
    int32_t *y = tile->y + r * tile->outputs;
    store_panel(y, row->lo.v0, row->hi.v0, V == 1 ? tile->columns : PANEL);
    if (V > 1)
        store_panel(y + PANEL, row->lo.v1, row->hi.v1, V == 2 ? tile->columns : PANEL);
    if (V > 2)
        store_panel(y + 2 * PANEL, row->lo.v2, row->hi.v2, V == 3 ? tile->columns : PANEL);
    if (V > 3)
        store_panel(y + 3 * PANEL, row->lo.v3, row->hi.v3, tile->columns);
}

WITH_AVX512 INLINE void tile_avx512(const int R, const int V, const struct tile *tile)
{
    const __m512i zero = _mm512_setzero_si512();
    const struct panels_avx512 none = {zero, zero, zero, zero};
    struct row_avx512 a = {none, none}, b = a, c = a, d = a, e = a, f = a;
    const size_t row_words = 2 * tile->pairs, panel_bytes = tile->pairs * 2 * PANEL;
    const uint32_t *x = tile->x;
    const int8_t *codes = tile->codes;
    const uint32_t *const end = x + row_words;
    do {
        struct panels_avx512 w = none;
        w.v0 = widened(codes);
        if (V > 1)
            w.v1 = widened(codes + panel_bytes);
        if (V > 2)
            w.v2 = widened(codes + 2 * panel_bytes);
        if (V > 3)
            w.v3 = widened(codes + 3 * panel_bytes);
        add_avx512(V, &a, &w, x);
        if (R > 1)
            add_avx512(V, &b, &w, x + row_words);
        if (R > 2)
            add_avx512(V, &c, &w, x + 2 * row_words);
        if (R > 3)
            add_avx512(V, &d, &w, x + 3 * row_words);
        if (R > 4)
            add_avx512(V, &e, &w, x + 4 * row_words);
        if (R > 5)
            add_avx512(V, &f, &w, x + 5 * row_words);
        codes += 2 * PANEL;
        x += 2;
    } while (x != end);
    store_avx512(V, &a, tile, 0);
    if (R > 1)
        store_avx512(V, &b, tile, 1);
    if (R > 2)
        store_avx512(V, &c, tile, 2);
    if (R > 3)
        store_avx512(V, &d, tile, 3);
    if (R > 4)
        store_avx512(V, &e, tile, 4);
    if (R > 5)
        store_avx512(V, &f, tile, 5);
}

#define TILE(R, V) \
    WITH_AVX512 static void avx512_##R##_##V(const struct tile *tile) { tile_avx512(R, V, tile); }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2)
TILE(1, 3) TILE(2, 3) TILE(3, 3) TILE(1, 4) TILE(2, 4) TILE(3, 4)
#undef TILE

static tile_fn *avx512_tile(size_t rows, size_t panels)
{
    static tile_fn *const tiles[4][6] = {
        {avx512_1_1, avx512_2_1, avx512_3_1, avx512_4_1, avx512_5_1, avx512_6_1},
        {avx512_1_2, avx512_2_2, avx512_3_2, avx512_4_2, avx512_5_2, avx512_6_2},
        {avx512_1_3, avx512_2_3, avx512_3_3},
        {avx512_1_4, avx512_2_4, avx512_3_4},
    };
    return tiles[panels - 1][rows - 1];
}

static const struct family avx512 = {6, 2, 3, 4, avx512_tile, pack_avx512};

#endif

/* The product: chunks of rows, within one the blocks of panels, within one the tiles. */

struct plan {
    const struct product *product;
    const struct family *family;
    const uint32_t *packed; /* words of the rows from first */
    size_t first, rows;
    size_t pairs, panels, chunk, block, blocks;
};

/* Multiplies one chunk of rows by one block of panels. */
static void multiply_block(void *argument, size_t index)
{
    const struct plan *plan = argument;
    const struct product *product = plan->product;
    const size_t from = index / plan->blocks * plan->chunk, to = smaller(plan->rows, from + plan->chunk);
    const size_t panel = index % plan->blocks * plan->block, panels = smaller(plan->block, plan->panels - panel);
    const size_t column = panel * PANEL, last = column + (panels - 1) * PANEL;
    struct tile tile = {
        .codes = product->panels + panel * plan->pairs * 2 * PANEL,
        .pairs = plan->pairs,
        .outputs = product->outputs,
        .columns = smaller(PANEL, product->outputs - last),
    };
    for (size_t row = from; row < to;) {
        const size_t rows = smaller(plan->family->rows, to - row);
        tile.x = plan->packed + row * 2 * plan->pairs;
        tile.y = product->y + (plan->first + row) * product->outputs + column;
        plan->family->tile(rows, panels)(&tile);
        row += rows;
    }
}

static void multiply_packed(struct plan *plan, int threads)
{
    const struct product *product = plan->product;
    const size_t chunks = ceil_div(plan->rows, plan->chunk);
    const size_t work = plan->rows * product->inputs * product->outputs;
    plan->family->pack(product->x + plan->first * product->inputs, plan->rows, product->inputs, (uint32_t *)plan->packed);
    run_tasks(multiply_block, plan, chunks * plan->blocks, work < WORTH_THREADS ? 1 : threads);
}

static const struct family *family_of(enum isa isa)
{
#if TSQP_X86
    if (isa == AVX512_VNNI)
        return &avx512;
    if (isa == AVX2)
        return &avx2;
#endif
    (void)isa;
    return &portable;
}

int exact_product(const struct product *product, enum isa isa, int threads)
{
    const struct family *family = family_of(isa);
    const size_t pairs = ceil_div(product->inputs, 2), panels = ceil_div(product->outputs, PANEL);
    if (!product->rows || !pairs || !panels)
        return 0;
    const size_t row_bytes = pairs * 2 * sizeof(uint32_t);
    const size_t fitting = CHUNK_BYTES / row_bytes / family->rows * family->rows;
    const size_t chunk = fitting < CHUNK_MIN_ROWS ? CHUNK_MIN_ROWS : fitting;
    const size_t at_a_time = smaller(product->rows, ceil_div(PACKED_BYTES, chunk * row_bytes) * chunk);
    const size_t block = product->rows <= family->few_rows ? family->few_panels : family->panels;
    uint32_t *packed = aligned_alloc(64, ceil_div(at_a_time * row_bytes, 64) * 64);
    if (!packed)
        return -1;
    for (size_t first = 0; first < product->rows; first += at_a_time) {
        struct plan plan = {product, family, packed, first, smaller(at_a_time, product->rows - first),
                            pairs, panels, chunk, block, ceil_div(panels, block)};
        multiply_packed(&plan, threads);
    }
    free(packed);
    return 0;
}
