/* y = x W^T (+ bias) in float32, written straight to where the caller wants it.
 *
 * Weights lie in panels of 16 outputs: for each input its 16 weights, one cache line, read from front to back.
 * Outputs are padded to 16 with zeros. A tile of some rows and panels keeps all its sums in registers. A task is a block of
 * panels times all rows, so every weight comes from memory once; while one block is multiplied, the next is fetched into
 * the second-level cache, a little with every few inputs.
 *
 * Order: each element of y is fma(x[k], w[k], sum) for k from 0 upwards, beginning with the bias or 0, whatever the tile,
 * the number of rows, of threads or of blocks, and the instruction set. So a row's result is the same bits whatever rows
 * are multiplied with it. Cutting the inputs into pieces does not change the order: sums wait in memory, unrounded, since
 * they are float32 in registers too.
 *
 * x and y may lie in memory that another process changes meanwhile: results may then be of any mixture of old and new
 * numbers, but every address and loop bound comes from the caller. Sums wait in memory of our own; a word of y is written
 * once, when it is done.
 *
 * There is no portable version: without FMA, PyTorch's libraries are as good. */
#include "native.h"

#include <string.h>

#if TSQP_X86
#include <immintrin.h>

#define PANEL 16
/* At most this many inputs are multiplied at a time: the weights of three panels by them and those that come next, 384 KiB,
 * stay in a second-level cache while all rows pass. */
#define PIECE 1024
/* Sums of one task: 128 rows of 3 panels, or 64 of 6. */
#define SUMS (128 * 3 * PANEL)
/* Below this many multiplications another thread is not worth waking. */
#define WORTH_THREADS (1u << 20)
#define UNROLLED _Pragma("GCC unroll 16") for

/* A tile: rows times neighbouring panels, over a piece of the inputs. */
struct tile {
    const float *x;
    const float *weights;
    float *sums;
    const float *ahead; /* of the weights that are needed next, this tile's share; or NULL */
    size_t every;       /* fetch a line of each panel ahead every so many inputs */
    size_t steps;       /* inputs */
    size_t x_stride, panel_stride, sums_stride;
};
typedef void tile_fn(const struct tile *tile);

/* Tiles of one instruction set: of up to rows x panels, or few_rows x few_panels: with few rows more panels fit into the
 * registers. tiles[panels][rows - 1]; not every number of panels has tiles. */
struct family {
    size_t rows, panels, few_rows, few_panels;
    tile_fn *const (*tiles)[8];
};

/* Rows of x are found from every third one, which the compiler is not told: it would keep the distance of each row from the
 * first, in more registers than there are. */
struct rows_of_x {
    const char *from[3];
    size_t bytes;
};

INLINE struct rows_of_x rows_of(const struct tile *tile)
{
    const char *first = (const char *)tile->x;
    size_t bytes = tile->x_stride * sizeof *tile->x;
    const char *third = first + 3 * bytes, *sixth = first + 6 * bytes;
    __asm__("" : "+r"(third), "+r"(sixth), "+r"(bytes));
    return (struct rows_of_x){{first, third, sixth}, bytes};
}

INLINE float next_of_row(const struct rows_of_x *x, int r) { return *(const float *)(x->from[r / 3] + r % 3 * x->bytes); }

INLINE void next_input(const int R, struct rows_of_x *x)
{
    UNROLLED (int i = 0; i < (R + 2) / 3; i++)
        x->from[i] += sizeof(float);
}

INLINE void fetch_ahead(const int V, const struct tile *tile, size_t line)
{
    UNROLLED (int v = 0; v < V; v++)
        _mm_prefetch((const char *)(tile->ahead + (size_t)v * tile->panel_stride + line * PANEL), _MM_HINT_T1);
}

/* AVX-512: a panel is one vector; 8 rows of 3 panels, or 4 of 6, take 24 of the 32 registers. */

WITH_AVX512 INLINE void tile_avx512(const int R, const int V, const struct tile *tile)
{
    __m512 sums[8][6], w[6];
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int v = 0; v < V; v++)
            sums[r][v] = _mm512_loadu_ps(tile->sums + (size_t)r * tile->sums_stride + v * PANEL);
    struct rows_of_x x = rows_of(tile);
    const float *weights = tile->weights;
    const size_t panel = tile->panel_stride;
    for (size_t left = tile->steps, line = 0; left; line++) {
        size_t steps = smaller(left, tile->every);
        left -= steps;
        if (tile->ahead)
            fetch_ahead(V, tile, line);
        for (; steps; steps--, weights += PANEL) {
            UNROLLED (int v = 0; v < V; v++)
                w[v] = _mm512_loadu_ps(weights + (size_t)v * panel);
            UNROLLED (int r = 0; r < R; r++) {
                const __m512 number = _mm512_set1_ps(next_of_row(&x, r));
                UNROLLED (int v = 0; v < V; v++)
                    sums[r][v] = _mm512_fmadd_ps(w[v], number, sums[r][v]);
            }
            next_input(R, &x);
        }
    }
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int v = 0; v < V; v++)
            _mm512_storeu_ps(tile->sums + (size_t)r * tile->sums_stride + v * PANEL, sums[r][v]);
}

#define TILE(R, V) \
    WITH_AVX512 static void avx512_##R##_##V(const struct tile *tile) { tile_avx512(R, V, tile); }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1) TILE(7, 1) TILE(8, 1)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2) TILE(7, 2) TILE(8, 2)
TILE(1, 3) TILE(2, 3) TILE(3, 3) TILE(4, 3) TILE(5, 3) TILE(6, 3) TILE(7, 3) TILE(8, 3)
TILE(1, 6) TILE(2, 6) TILE(3, 6) TILE(4, 6)
#undef TILE

#define TILES(V) \
    {avx512_1_##V, avx512_2_##V, avx512_3_##V, avx512_4_##V, avx512_5_##V, avx512_6_##V, avx512_7_##V, avx512_8_##V}
static tile_fn *const avx512_tiles[][8] = {
    [1] = TILES(1), [2] = TILES(2), [3] = TILES(3), [6] = {avx512_1_6, avx512_2_6, avx512_3_6, avx512_4_6}};
#undef TILES
static const struct family avx512 = {8, 3, 4, 6, avx512_tiles};

/* AVX2 with FMA: a panel is two vectors; 6 rows of a panel take 12 of the 16 registers for sums, 2 rows of 2 panels take 8. */

WITH_AVX2 INLINE void tile_avx2(const int R, const int V, const struct tile *tile)
{
    __m256 sums[6][4], w[4];
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int v = 0; v < 2 * V; v++)
            sums[r][v] = _mm256_loadu_ps(tile->sums + (size_t)r * tile->sums_stride + v * 8);
    struct rows_of_x x = rows_of(tile);
    const float *weights = tile->weights;
    const size_t panel = tile->panel_stride;
    for (size_t left = tile->steps, line = 0; left; line++) {
        size_t steps = smaller(left, tile->every);
        left -= steps;
        if (tile->ahead)
            fetch_ahead(V, tile, line);
        for (; steps; steps--, weights += PANEL) {
            UNROLLED (int v = 0; v < 2 * V; v++)
                w[v] = _mm256_loadu_ps(weights + (size_t)(v / 2) * panel + v % 2 * 8);
            UNROLLED (int r = 0; r < R; r++) {
                const __m256 number = _mm256_set1_ps(next_of_row(&x, r));
                UNROLLED (int v = 0; v < 2 * V; v++)
                    sums[r][v] = _mm256_fmadd_ps(w[v], number, sums[r][v]);
            }
            next_input(R, &x);
        }
    }
    UNROLLED (int r = 0; r < R; r++)
        UNROLLED (int v = 0; v < 2 * V; v++)
            _mm256_storeu_ps(tile->sums + (size_t)r * tile->sums_stride + v * 8, sums[r][v]);
}

#define TILE(R, V) \
    WITH_AVX2 static void avx2_##R##_##V(const struct tile *tile) { tile_avx2(R, V, tile); }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1) TILE(1, 2) TILE(2, 2)
#undef TILE

static tile_fn *const avx2_tiles[][8] = {
    [1] = {avx2_1_1, avx2_2_1, avx2_3_1, avx2_4_1, avx2_5_1, avx2_6_1}, [2] = {avx2_1_2, avx2_2_2}};
static const struct family avx2 = {6, 1, 2, 2, avx2_tiles};

/* The product: blocks of panels, within one chunks of rows whose sums fit, pieces of the inputs, and tiles. */

struct plan {
    const struct float_product *product;
    const struct family *family;
    size_t panels, block; /* how many in all, and in a block */
    size_t rows;          /* of a tile */
    size_t piece;         /* inputs of a piece but the last */
    size_t threads;
};

/* What one task is at: some panels, a chunk of rows, a piece of the inputs. */
struct part {
    size_t panel, panels;
    size_t row, rows;
    size_t input, inputs;
    const float *ahead;
    float *sums;
};

static void begin_sums(const struct float_product *product, const struct part *part)
{
    const size_t width = part->panels * PANEL, column = part->panel * PANEL;
    for (size_t r = 0; r < part->rows; r++) {
        memset(part->sums + r * width, 0, width * sizeof(float));
        if (product->bias)
            memcpy(part->sums + r * width, product->bias + column,
                   smaller(width, product->outputs - column) * sizeof(float));
    }
}

static void write_rows(const struct float_product *product, const struct part *part, size_t from, size_t rows)
{
    const size_t width = part->panels * PANEL, column = part->panel * PANEL;
    for (size_t r = from; r < from + rows; r++)
        memcpy(product->y + (part->row + r) * product->y_row + column, part->sums + r * width,
               smaller(width, product->outputs - column) * sizeof(float));
}

/* Multiplies a few rows of a part by all its panels, with the largest tiles there are. */
static void multiply_rows(const struct plan *plan, const struct part *part, size_t from, size_t rows, struct tile *tile)
{
    const struct float_product *product = plan->product;
    tile->x = product->x + (part->row + from) * product->x_row + part->input;
    for (size_t done = 0, panels; done < part->panels; done += panels) {
        panels = part->panels - done;
        if (panels >= plan->block)
            panels = plan->block;
        else if (panels > plan->family->panels)
            panels = plan->family->panels;
        tile->weights = product->panels + (part->panel + done) * tile->panel_stride + part->input * PANEL;
        tile->sums = part->sums + from * tile->sums_stride + done * PANEL;
        plan->family->tiles[panels][rows - 1](tile);
    }
}

/* Multiplies one part. Each tile fetches its share of the weights that are needed next; beyond their end there may be
 * nothing, which a prefetch does not mind. */
static void multiply_part(const struct plan *plan, const struct part *part)
{
    const struct float_product *product = plan->product;
    const size_t tiles = ceil_div(part->rows, plan->rows), share = ceil_div(part->inputs, tiles);
    struct tile tile = {
        .every = part->ahead ? tiles : part->inputs,
        .steps = part->inputs,
        .x_stride = product->x_row,
        .panel_stride = product->inputs * PANEL,
        .sums_stride = part->panels * PANEL,
    };
    for (size_t index = 0; index < tiles; index++) {
        const size_t from = index * plan->rows, rows = smaller(plan->rows, part->rows - from);
        tile.ahead = part->ahead ? part->ahead + index * share * PANEL : NULL;
        multiply_rows(plan, part, from, rows, &tile);
        if (part->input + part->inputs == product->inputs)
            write_rows(product, part, from, rows);
    }
}

/* Returns the weights that come after a part's: of the next inputs, or those that this thread's next task begins with. With
 * few rows the processor's own fetching is faster. */
static const float *weights_after(const struct plan *plan, const struct part *part)
{
    const struct float_product *product = plan->product;
    const size_t next = part->input + part->inputs, after = part->panel + plan->block * plan->threads;
    if (product->rows <= plan->rows)
        return NULL;
    if (next < product->inputs)
        return product->panels + part->panel * product->inputs * PANEL + next * PANEL;
    if (part->row + part->rows < product->rows || after >= plan->panels)
        return NULL;
    return product->panels + after * product->inputs * PANEL;
}

static void multiply_block(void *argument, size_t index)
{
    const struct plan *plan = argument;
    const struct float_product *product = plan->product;
    _Alignas(64) float sums[SUMS];
    struct part part = {.panel = index * plan->block, .sums = sums};
    part.panels = smaller(plan->block, plan->panels - part.panel);
    const size_t chunk = SUMS / (part.panels * PANEL);
    for (part.row = 0; part.row < product->rows; part.row += part.rows) {
        part.rows = smaller(chunk, product->rows - part.row);
        begin_sums(product, &part);
        for (part.input = 0; part.input < product->inputs; part.input += part.inputs) {
            part.inputs = smaller(plan->piece, product->inputs - part.input);
            part.ahead = weights_after(plan, &part);
            multiply_part(plan, &part);
        }
    }
}

int float_product(const struct float_product *product, enum isa isa, int threads)
{
    const struct family *family = isa == AVX512_VNNI ? &avx512 : &avx2;
    const size_t panels = ceil_div(product->outputs, PANEL), work = product->rows * product->inputs * product->outputs;
    const int few = product->rows <= family->few_rows;
    if (isa == PORTABLE)
        return -1;
    if (!product->rows || !product->inputs || !panels)
        return 0;
    if (work < WORTH_THREADS || threads < 1)
        threads = 1;
    const struct plan plan = {
        .product = product,
        .family = family,
        .panels = panels,
        .block = few ? family->few_panels : family->panels,
        .rows = few ? family->few_rows : family->rows,
        .piece = ceil_div(product->inputs, ceil_div(product->inputs, PIECE)),
        .threads = (size_t)threads,
    };
    run_tasks(multiply_block, (void *)&plan, ceil_div(panels, plan.block), threads);
    return 0;
}

#else

int float_product(const struct float_product *product, enum isa isa, int threads)
{
    (void)product, (void)isa, (void)threads;
    return -1;
}

#endif
