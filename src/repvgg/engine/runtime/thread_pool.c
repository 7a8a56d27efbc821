/* Thread pool of the engine: runs a table of kernel calls on the calling thread and on workers.

   The LLVM IR next to this file is generated from it (`make thread-pool-ir`) and compiled by llvmlite when a model is
   compiled, so that no C compiler is needed. `thread_pool.py`, or `library.c` where there is no Python, allocates the
   structures of `thread_pool.h` and calls the functions.

   Work is claimed, not distributed. A step (one kernel on its buffers) consists of units; units are claimed in chunks,
   each with one compare-and-swap, and a step is over when all its units are done. A worker that wakes late, or never,
   delays no other thread: the caller can do everything alone. This is why several threads pay off even for steps of
   10 us, and on a busy machine.

   A claim word holds (call number : 32, chunks claimed from the front : 16, from the back : 16). The call number keeps a
   worker that is still in an earlier call from claiming units of a later one. */

#include "thread_pool.h"

#include <stdbool.h>

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(SINGLE_THREADED)
#define HAS_WORKERS 1
#else
#define HAS_WORKERS 0 /* no futex: the caller computes alone */
#endif

enum {
    CHUNKS_PER_THREAD = 16, /* of a step: enough to even out threads of different speed */
    MAX_CHUNKS = 1 << 14,   /* of a step: either count of a claim word has 16 bits */
    IDLE_SPINS = 2500,      /* polls of about 0.1 us before a worker sleeps; more would take time from other processes */
    SPINS_PER_YIELD = 4096, /* polls between two sched_yield of a thread that waits for the end of a step */
};

/* Declared here, not included: the IR is generated for platforms whose system headers are not at hand. */
extern int sched_yield(void);

static uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t max(uint64_t a, uint64_t b) { return a > b ? a : b; }

static uint64_t divide_rounding_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

/* Tells the processor that this is a polling loop, so that its sibling hyper-thread gets the execution units. */
static void cpu_relax(void) {
#if HAS_WORKERS && defined(__x86_64__)
    __builtin_ia32_pause();
#elif HAS_WORKERS && defined(__clang__)
    __builtin_arm_yield();
#elif HAS_WORKERS
    __asm__ volatile("yield");
#endif
}

/* Call number of a claim word. */
static uint32_t call_of(uint64_t claims) { return (uint32_t)(claims >> 32); }

/* Claims and computes chunks of a step until none is left.
   False if another call has begun, so that the step no longer belongs to this one. */
static bool compute_chunks(struct step *step, uint32_t call, bool from_back, uint64_t num_blocks, uint64_t num_units,
                           uint64_t units_per_chunk) {
    uint64_t num_chunks = divide_rounding_up(num_units, units_per_chunk);
    for (;;) {
        uint64_t claims = __atomic_load_n(&step->claims, __ATOMIC_ACQUIRE);
        if (call_of(claims) != call) return false;
        uint64_t front = claims >> 16 & 0xffff, back = claims & 0xffff;
        if (front + back >= num_chunks) return true;
        /* Half of the threads claim from the back: what a thread wrote in one step is mostly what it reads in the next,
           and is in its own cache. */
        uint64_t chunk = from_back ? num_chunks - back - 1 : front;
        uint64_t begin = chunk * units_per_chunk, end = min(begin + units_per_chunk, num_units);
        if (!__atomic_compare_exchange_n(&step->claims, &claims, claims + (from_back ? 1 : 1 << 16), false,
                                         __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            continue;
        step->function(step->source, step->target, step->weights, step->bias, (int64_t)num_blocks, (int64_t)begin,
                       (int64_t)end);
        /* Release: a thread that reads the final count also sees the outputs of all units. */
        __atomic_fetch_add(&step->units_done, end - begin, __ATOMIC_RELEASE);
    }
}

/* Waits until all units of a step are done; false if another call has begun. */
static bool wait_for_step(struct step *step, uint32_t call, uint64_t num_units) {
    for (uint64_t spins = 1; __atomic_load_n(&step->units_done, __ATOMIC_ACQUIRE) != num_units; spins++) {
        if (call_of(__atomic_load_n(&step->claims, __ATOMIC_ACQUIRE)) != call) return false;
        cpu_relax();
        /* The thread that computes the last chunk may wait for this very processor. */
        if (spins % SPINS_PER_YIELD == 0) sched_yield();
    }
    return true;
}

/* Runs the steps of a call, together with the other threads. */
static void work(struct thread_pool *pool, uint32_t call, bool from_back) {
    struct step *steps = __atomic_load_n(&pool->steps, __ATOMIC_SEQ_CST); /* pairs with pool_quiesce */
    uint64_t num_steps = __atomic_load_n(&pool->num_steps, __ATOMIC_RELAXED);
    uint64_t most_chunks = min(pool->num_threads * CHUNKS_PER_THREAD, MAX_CHUNKS);
    for (uint64_t index = 0; index < num_steps; index++) {
        struct step *step = &steps[index];
        uint64_t num_items = __atomic_load_n(&step->num_items, __ATOMIC_ACQUIRE);
        uint64_t num_blocks = divide_rounding_up(num_items, step->items_per_block);
        uint64_t num_units = step->units_per_block * num_blocks;
        uint64_t units_per_chunk = max(num_units / most_chunks, 1);
        if (!compute_chunks(step, call, from_back, num_blocks, num_units, units_per_chunk) ||
            !wait_for_step(step, call, num_units))
            return;
    }
}

#if HAS_WORKERS

extern long syscall(long number, ...);
extern int sched_getcpu(void);

/* Numbers of Linux system calls; those without a function in every libc. */
#if defined(__x86_64__)
enum { SYS_FUTEX = 202, SYS_GETTID = 186, SYS_SCHED_SETAFFINITY = 203 };
#else
enum { SYS_FUTEX = 98, SYS_GETTID = 178, SYS_SCHED_SETAFFINITY = 122 };
#endif
enum { FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129, ALL_WAITERS = INT32_MAX };

/* Keeps the workers off the caller's processor. Linux likes to wake a thread on the processor of the thread that wakes
   it, which is busy, and leaves it there for milliseconds. One system call a worker, when the caller has moved. */
static void avoid_callers_cpu(struct thread_pool *pool) {
    uint64_t cpu = (uint32_t)sched_getcpu();
    if (cpu == pool->avoided_cpu || cpu >= MAX_CPUS) return; /* an error, -1, is >= MAX_CPUS */
    uint64_t any = 0;
    for (uint64_t word = 0; word < MAX_CPUS / 64; word++) {
        uint64_t mask = word == cpu / 64 ? ~(UINT64_C(1) << cpu % 64) : ~UINT64_C(0);
        pool->worker_cpus[word] = pool->allowed_cpus[word] & mask;
        any |= pool->worker_cpus[word];
    }
    if (!any) return; /* the caller's is the only one */
    bool all_started = true;
    for (uint64_t worker = 0; worker + 1 < pool->num_threads; worker++) {
        uint64_t thread_id = __atomic_load_n(&pool->worker_thread_ids[worker], __ATOMIC_SEQ_CST);
        if (thread_id)
            syscall(SYS_SCHED_SETAFFINITY, thread_id, sizeof pool->worker_cpus, pool->worker_cpus);
        else
            all_started = false; /* try again at the next call */
    }
    if (all_started) pool->avoided_cpu = cpu;
}

static void wake_workers(struct thread_pool *pool) {
    if (__atomic_load_n(&pool->sleepers, __ATOMIC_SEQ_CST) == 0) return;
    avoid_callers_cpu(pool);
    syscall(SYS_FUTEX, &pool->call, FUTEX_WAKE_PRIVATE, ALL_WAITERS);
}

/* Entry point of a worker: polls for calls, serves them, and sleeps after IDLE_SPINS polls without one. Returns after
   pool_shutdown. */
void pool_worker(struct thread_pool *pool) {
    uint64_t number = __atomic_fetch_add(&pool->workers_started, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&pool->worker_thread_ids[number], (uint64_t)syscall(SYS_GETTID), __ATOMIC_SEQ_CST);
    uint32_t served = 0;
    for (uint64_t spins = 0;;) {
        uint32_t call = __atomic_load_n(&pool->call, __ATOMIC_SEQ_CST);
        if (call != served) {
            if (__atomic_load_n(&pool->stop, __ATOMIC_SEQ_CST)) return;
            __atomic_fetch_add(&pool->active_workers, 1, __ATOMIC_SEQ_CST);
            work(pool, call, number % 2 == 0); /* the caller claims from the front */
            __atomic_fetch_sub(&pool->active_workers, 1, __ATOMIC_SEQ_CST);
            served = call;
            spins = 0;
        } else if (++spins > IDLE_SPINS) {
            /* sleepers is raised before the futex compares call, and pool_run sets call before it reads sleepers:
               either the caller sees this sleeper, or the futex sees the new call and returns at once. */
            __atomic_fetch_add(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
            syscall(SYS_FUTEX, &pool->call, FUTEX_WAIT_PRIVATE, served, NULL);
            __atomic_fetch_sub(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
            spins = 0;
        } else {
            cpu_relax();
        }
    }
}

#else

static void wake_workers(struct thread_pool *pool) { (void)pool; }

#endif

/* Runs steps on a batch of images; returns when all of them are done. One caller at a time. */
void pool_run(struct thread_pool *pool, struct step *steps, uint64_t num_steps, uint64_t batch) {
    __atomic_store_n(&pool->steps, steps, __ATOMIC_RELAXED); /* published by call, below */
    __atomic_store_n(&pool->num_steps, num_steps, __ATOMIC_RELAXED);
    uint32_t call = __atomic_load_n(&pool->call, __ATOMIC_RELAXED) + 1;
    for (uint64_t index = 0; index < num_steps; index++) {
        struct step *step = &steps[index];
        __atomic_store_n(&step->units_done, 0, __ATOMIC_RELAXED);
        /* Void the claims of the last call before num_items changes: a worker that is still there claims nothing. */
        __atomic_store_n(&step->claims, (uint64_t)call << 32, __ATOMIC_RELEASE);
        uint64_t images_left = batch > step->first_image ? batch - step->first_image : 0;
        uint64_t num_images = min(images_left, step->max_images);
        __atomic_store_n(&step->num_items, num_images * step->items_per_image, __ATOMIC_RELEASE);
    }
    __atomic_store_n(&pool->call, call, __ATOMIC_SEQ_CST);
    wake_workers(pool);
    work(pool, call, false);
}

/* Waits until no worker reads the steps of an earlier call, so that their memory may be freed. Workers that
   wake later find `no_steps`: a table with only the sentinel, which lives as long as the pool. */
void pool_quiesce(struct thread_pool *pool, struct step *no_steps) {
    __atomic_store_n(&pool->steps, no_steps, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&pool->active_workers, __ATOMIC_SEQ_CST) != 0) sched_yield();
}

/* Ends the workers; their threads are joined by thread_pool.py. */
void pool_shutdown(struct thread_pool *pool) {
    __atomic_store_n(&pool->stop, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&pool->call, 1, __ATOMIC_SEQ_CST); /* a new call, so that workers read stop */
    wake_workers(pool);
}
