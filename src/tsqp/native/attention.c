/* Causal self-attention, softmax(q k^T / sqrt(H)) v in float32 (Vaswani et al. 2017), with key-value heads that serve
 * several query heads each (Ainslie et al. 2023). The softmax is computed on the way, chunk by chunk of the keys, with a
 * running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022), so that scores never leave the cache. Keys and
 * values lie in a contiguous tensor, or in blocks of a pool that a table names (Kwon et al. 2023).
 *
 * Two kernels make the same bits: attention_queries.c for many queries of a sequence, attention_keys.c for few. For each
 * query both compute
 *     score of a key   fma(q[h], k[h], sum) for h from 0 upwards; -inf for a key that the query must not see
 *     chunk            of 64 keys, from key 0: highest = max(highest, scores); out, sum *= exp(highest before - highest)
 *     weights          exp(score - highest); sum += weight, out[h] = fma(weight, v[h], out[h]), key by key upwards
 *     result           out[h] (1 / sum)
 * and a chunk that is hidden from it multiplies by an exact 1 and adds exact zeros. So a query's result does not depend on
 * the queries computed with it, how a prompt is cut, where its keys lie, or on threads.
 *
 * AVX-512 only: with half the lanes and half the registers this gains nothing over PyTorch's. Nothing here branches on, or
 * looks up by, a number of the prompt's; only by lengths, positions and tables. */
#include "attention.h"

#if TSQP_X86
#include <stdatomic.h>
#include <stdlib.h>

/* From so many queries on they fill the lanes well enough. */
#define MANY_QUERIES 16
/* Below this many multiplications another thread is not worth waking. */
#define WORTH_THREADS (1u << 20)
/* Reading a key and turning it around costs about as much as so many more queries. */
#define READING 6

struct task {
    size_t cost;
    size_t segment, head, at; /* head: of keys and values for few queries */
};

struct attending {
    const struct attention *all;
    const struct segment *segments;
    struct task *tasks;
    atomic_int failed;
};

static int is_many(const struct segment *segment) { return segment->tokens >= MANY_QUERIES; }

static size_t count_tasks(const struct attention *all, const struct segment *segments, size_t count)
{
    size_t tasks = 0;
    for (size_t i = 0; i < count; i++)
        tasks += is_many(&segments[i]) ? all->heads * ceil_div(segments[i].tokens, QUERIES) : all->kv_heads;
    return tasks;
}

/* Writes the tasks of one segment; returns how many. */
static size_t list_tasks(const struct attention *all, const struct segment *segments, size_t i, struct task *tasks)
{
    const struct segment *segment = &segments[i];
    const size_t group = all->heads / all->kv_heads, keys = segment->first + segment->tokens;
    size_t written = 0;
    if (!segment->tokens)
        return 0;
    if (!is_many(segment)) {
        for (size_t head = 0; head < all->kv_heads; head++)
            tasks[written++] = (struct task){keys * (segment->tokens * group + READING), i, head, 0};
        return written;
    }
    for (size_t at = 0; at < segment->tokens; at += QUERIES)
        for (size_t head = 0; head < all->heads; head++)
            tasks[written++] = (struct task){smaller(keys, segment->first + at + QUERIES) * QUERIES, i, head, at};
    return written;
}

static int longest_first(const void *a, const void *b)
{
    const size_t one = ((const struct task *)a)->cost, other = ((const struct task *)b)->cost;
    return (one < other) - (one > other);
}

static void attend_task(void *argument, size_t index)
{
    struct attending *work = argument;
    const struct task *task = &work->tasks[index];
    const struct segment *segment = &work->segments[task->segment];
    const int many = is_many(segment);
    const size_t bytes = many ? queries_scratch(work->all) : keys_scratch(work->all, segment);
    void *scratch = aligned_alloc(4 * LANES, ceil_div(bytes, 4 * LANES) * 4 * LANES);
    if (!scratch)
        atomic_store(&work->failed, 1);
    else if (many)
        attend_queries(work->all, segment, task->head, task->at, scratch);
    else
        attend_keys(work->all, segment, task->head, scratch);
    free(scratch);
}

int attend(const struct attention *all, const struct segment *segments, size_t count, int threads)
{
    struct task *tasks = malloc((count_tasks(all, segments, count) + 1) * sizeof *tasks);
    struct attending work = {all, segments, tasks, 0};
    size_t listed = 0, cost = 0;
    if (!tasks)
        return -1;
    for (size_t i = 0; i < count; i++)
        listed += list_tasks(all, segments, i, tasks + listed);
    for (size_t i = 0; i < listed; i++)
        cost += tasks[i].cost;
    if (threads > 1 && cost * all->head_size * 2 >= WORTH_THREADS)
        qsort(tasks, listed, sizeof *tasks, longest_first);
    else
        threads = 1;
    run_tasks(attend_task, &work, listed, threads);
    free(tasks);
    return atomic_load(&work.failed) ? -1 : 0;
}

#else

int attend(const struct attention *all, const struct segment *segments, size_t count, int threads)
{
    (void)all, (void)segments, (void)count, (void)threads;
    return -1;
}

#endif
