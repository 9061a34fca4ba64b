/* What a step's tokens leave for later ones: rotated keys, and values, in the blocks of a pool (Kwon et al. 2023). */
#include "native.h"

#include <string.h>

static void keep_token(const struct step *step, const float *keys, float *block, size_t offset)
{
    const size_t size = step->head_size, head = TSQP_KV_BLOCK * size;
    for (size_t i = 0; i < 2 * step->kv_heads; i++)
        memcpy(block + i * head + offset * size, keys + i * size, size * sizeof(float));
}

void keep_step(const struct step *step, enum isa isa, int threads)
{
    for (size_t i = 0; i < step->count; i++) {
        const struct sequence *span = &step->spans[i];
        const size_t turned = step->heads + step->kv_heads;
        float *rows = step->qkv + (size_t)span->row * step->row;
        const struct rotation rotation = {
            .x = rows,
            .cosine = step->cosine + (size_t)span->row * step->head_size,
            .sine = step->sine + (size_t)span->row * step->head_size,
            .out = rows,
            .rows = (size_t)span->tokens,
            .heads = turned,
            .head_size = step->head_size,
            .x_row = step->row,
            .x_head = step->head_size,
            .out_row = step->row,
            .out_head = step->head_size,
        };
        rotate_rows(&rotation, isa, threads);
        for (size_t t = 0; t < rotation.rows; t++) {
            const size_t position = (size_t)span->first + t;
            const int32_t number = step->tables[(size_t)span->table + position / TSQP_KV_BLOCK];
            keep_token(step, rows + t * step->row + step->heads * step->head_size, step->pool + number * step->block,
                       position % TSQP_KV_BLOCK);
        }
    }
}
