/* A few threads that sleep until there is work. Not OpenMP: torch brings a libgomp of its own, and two runtimes' threads
 * would compete for the cores; waiting is passive, since the peer of a TSQP process often needs the core.
 *
 * The caller works too, and takes tasks until none are left. A thread that wakes later finds the job closed, so a slow
 * wake-up costs nothing. One job runs at a time: a second caller does its tasks alone. A forked child starts afresh. */
#define _GNU_SOURCE
#include "native.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>

#define MAX_THREADS 256

struct job {
    task_fn *task;
    void *argument;
    size_t count;
    atomic_size_t next;
};

static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;
/* Guards everything below. */
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static pthread_cond_t left = PTHREAD_COND_INITIALIZER;
static struct job *current; /* NULL: closed */
static int seats;           /* how many threads may still join the current job */
static int inside;          /* how many have joined and not left */
static int started;
static pthread_t others[MAX_THREADS];
static int avoided = -1; /* the core that they keep off; -1: none */

static void work_on(struct job *job)
{
    for (;;) {
        size_t index = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (index >= job->count)
            return;
        job->task(job->argument, index);
    }
}

static void *serve(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&guard);
    for (;;) {
        while (!current || !seats)
            pthread_cond_wait(&wake, &guard);
        struct job *job = current;
        seats--;
        inside++;
        pthread_mutex_unlock(&guard);
        work_on(job);
        pthread_mutex_lock(&guard);
        if (!--inside)
            pthread_cond_signal(&left);
    }
    return NULL;
}

static void start_afresh_in_child(void)
{
    /* Only the thread that forked lives on; what the others held is free, and they are gone. */
    one_caller = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    guard = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    left = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    current = NULL;
    seats = inside = started = 0;
    avoided = -1;
}

static void handle_forks(void) { pthread_atfork(NULL, NULL, start_afresh_in_child); }

/* Starts threads until there are as many as wanted, or the system gives no more. They take no signals: Python's handlers
 * belong to its own threads. */
static void start_threads(int wanted)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    sigset_t all, before;
    pthread_once(&once, handle_forks);
    if (started >= wanted)
        return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; started < wanted; started++) {
        if (pthread_create(&others[started], NULL, serve, NULL))
            break;
        pthread_detach(others[started]);
        avoided = -1;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Keeps the threads off the caller's core. Where no core is idle, as while the peer of a TSQP process spins on another one,
 * the system would leave a woken thread behind the one that woke it until the job is over. */
static void keep_off(int core)
{
    cpu_set_t cores;
    if (core == avoided || core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof cores, &cores))
        return;
    avoided = core;
    CPU_CLR(core, &cores);
    for (int i = 0; CPU_COUNT(&cores) && i < started; i++)
        pthread_setaffinity_np(others[i], sizeof cores, &cores);
}

static void open_job(struct job *job, int wanted)
{
    pthread_mutex_lock(&guard);
    start_threads(wanted);
    keep_off(sched_getcpu());
    current = job;
    seats = wanted;
    pthread_mutex_unlock(&guard);
    if (wanted == 1)
        pthread_cond_signal(&wake);
    else
        pthread_cond_broadcast(&wake);
}

static void close_job(void)
{
    pthread_mutex_lock(&guard);
    current = NULL;
    while (inside)
        pthread_cond_wait(&left, &guard);
    pthread_mutex_unlock(&guard);
}

void run_tasks(task_fn *task, void *argument, size_t count, int threads)
{
    struct job job = {task, argument, count, 0};
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    if ((size_t)(threads > 0 ? threads : 1) > count)
        threads = (int)count;
    if (threads <= 1 || pthread_mutex_trylock(&one_caller)) {
        work_on(&job);
        return;
    }
    open_job(&job, threads - 1);
    work_on(&job);
    close_job();
    pthread_mutex_unlock(&one_caller);
}
