/* Structures that the thread pool shares with those who call it: `thread_pool.py`, and `library.c` without Python. */

#ifndef REPVGG_THREAD_POOL_H
#define REPVGG_THREAD_POOL_H

#include <stddef.h>
#include <stdint.h>

enum {
    CACHE_LINE = 64, /* bytes */
    MAX_CPUS = 1024, /* as glibc's cpu_set_t */
};

typedef void kernel_function(const float *source, float *target, const void *weights, const float *bias, int64_t batch,
                             int64_t begin, int64_t end);

/* One kernel on its buffers. Items are what blocks are made of: images, or Winograd tiles. */
struct step {
    /* Cache line 0 is read by all threads and written between calls only. */
    kernel_function *function;
    const float *source;
    float *target;
    const void *weights;
    const float *bias;
    uint64_t units_per_block;
    uint64_t items_per_block;
    uint64_t num_items; /* of this call; set by pool_run */
    /* Lines 1 and 2 are written by all threads: apart, so that a claim does not slow down the count of what is done. */
    _Alignas(CACHE_LINE) uint64_t claims;
    _Alignas(CACHE_LINE) uint64_t units_done;
    uint64_t items_per_image;
    uint64_t first_image; /* of the batch */
    uint64_t max_images;
};

/* What the threads of a pool share. */
struct thread_pool {
    _Alignas(CACHE_LINE) uint32_t call; /* number of the last call, and the futex that idle workers sleep on */
    _Alignas(CACHE_LINE) uint32_t sleepers;
    _Alignas(CACHE_LINE) struct step *steps;
    uint64_t num_steps;
    uint64_t num_threads; /* with the caller */
    _Alignas(CACHE_LINE) uint64_t stop;
    _Alignas(CACHE_LINE) uint64_t active_workers; /* that may read steps */
    _Alignas(CACHE_LINE) uint64_t avoided_cpu;    /* the caller's, which workers do not run on */
    uint64_t workers_started;
    _Alignas(CACHE_LINE) uint64_t allowed_cpus[MAX_CPUS / 64]; /* of this process, a bit each */
    uint64_t worker_cpus[MAX_CPUS / 64];                       /* the same without the caller's */
    uint64_t worker_thread_ids[];                              /* of the kernel; 0 until a worker has started */
};

/* thread_pool.py describes the same layout as numpy dtypes; a test compares them with these lines. */
#define OFFSET(structure, field, bytes) \
    _Static_assert(offsetof(struct structure, field) == (bytes), #structure "." #field " has moved")
OFFSET(step, function, 0);
OFFSET(step, source, 8);
OFFSET(step, target, 16);
OFFSET(step, weights, 24);
OFFSET(step, bias, 32);
OFFSET(step, units_per_block, 40);
OFFSET(step, items_per_block, 48);
OFFSET(step, num_items, 56);
OFFSET(step, claims, 64);
OFFSET(step, units_done, 128);
OFFSET(step, items_per_image, 136);
OFFSET(step, first_image, 144);
OFFSET(step, max_images, 152);
_Static_assert(sizeof(struct step) == 192, "step has another size");
OFFSET(thread_pool, call, 0);
OFFSET(thread_pool, sleepers, 64);
OFFSET(thread_pool, steps, 128);
OFFSET(thread_pool, num_steps, 136);
OFFSET(thread_pool, num_threads, 144);
OFFSET(thread_pool, stop, 192);
OFFSET(thread_pool, active_workers, 256);
OFFSET(thread_pool, avoided_cpu, 320);
OFFSET(thread_pool, workers_started, 328);
OFFSET(thread_pool, allowed_cpus, 384);
OFFSET(thread_pool, worker_cpus, 512);
OFFSET(thread_pool, worker_thread_ids, 640);
_Static_assert(sizeof(struct thread_pool) == 640, "thread_pool has another size");

void pool_run(struct thread_pool *pool, struct step *steps, uint64_t num_steps, uint64_t batch);
void pool_worker(struct thread_pool *pool);
void pool_quiesce(struct thread_pool *pool, struct step *no_steps);
void pool_shutdown(struct thread_pool *pool);

#endif
