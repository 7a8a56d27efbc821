/* The C interface of an exported network, `model.h`: what `executable.py` and `thread_pool.py` do in Python.

   `repvgg.engine.library` compiles the LLVM IR of this file for the baseline of the architecture, so that it can refuse
   a processor on which the kernels would crash, and links it with kernels, description and weights. Names that begin
   with model_ are given the name of the library. */

#include "model.h"
#include "thread_pool.h"

#include <stdbool.h>

/* The description of a network. `library/description.py` writes the same layout; a test compares them. */

enum { VERSION_BYTES = 128, ID_BYTES = 32 };

struct input {
    uint64_t shape[3]; /* C, H, W */
};

struct output {
    uint64_t rank; /* of an image: 0 for a number */
    uint64_t shape[MODEL_MAX_RANK];
    uint64_t offset; /* in the arena, in floats, as all below: of the first element of an image */
    uint64_t image_stride;
    uint64_t extents[3]; /* of the loops that copy an image, the last one innermost */
    uint64_t strides[3];
};

#define INPUT UINT64_MAX                 /* a source */
enum { WEIGHTS, ARENA, INPUT_STRIDES };  /* where the weights of a step are */

struct step_description {
    uint64_t kernel; /* index of model_kernels */
    uint64_t source; /* offset in the arena in bytes, as all offsets of steps, or INPUT */
    uint64_t target; /* offset in the arena */
    uint64_t weights_kind;
    uint64_t weights; /* offset in the weights or the arena */
    uint64_t bias; /* offset in the weights */
    uint64_t units_per_block;
    uint64_t items_per_block;
    uint64_t items_per_image;
    uint64_t first_image;
    uint64_t max_images;
    uint64_t input; /* its number, if the source is INPUT */
};

struct description {
    char version[VERSION_BYTES];
    uint8_t weights_id[ID_BYTES]; /* SHA-256 of the weights; a file of weights begins with it */
    uint64_t weights_bytes;
    uint64_t embedded; /* whether the library contains the weights */
    uint64_t level;    /* of x86-64 that the kernels need: 2, 3 or 4; 0 for any processor */
    uint64_t threads;  /* by default; 0 for one for each processor */
    uint64_t max_images;
    uint64_t arena_bytes; /* memory of all feature maps */
    uint64_t num_inputs, num_outputs, num_steps;
    uint64_t inputs, outputs, steps; /* offsets of the tables from the description, in bytes */
};

/* Defined as hidden symbols by other objects. Declared without that, so that code refers to them by the global offset
   table: a linker removes the detour, and LLVM's loader may place objects too far apart for 32-bit offsets. */
extern const struct description model_description;
extern const char model_weights[];
extern kernel_function *const model_kernels[];

static const void *table(uint64_t offset) { return (const char *)&model_description + offset; }
static const struct input *input_of(uint64_t index) {
    return (const struct input *)table(model_description.inputs) + index;
}
static const struct output *output_of(uint64_t index) {
    return (const struct output *)table(model_description.outputs) + index;
}

/* The C library, declared here: the IR is generated for platforms whose system headers are not at hand. */

typedef union {
    uint64_t words[16]; /* glibc has 56 bytes on x86-64 and 64 on ARM64, musl has 56 */
} thread_attributes;
typedef union {
    uint64_t words[16];
} signal_set;

extern void *malloc(size_t size);
extern void free(void *memory);
extern int posix_memalign(void **memory, size_t alignment, size_t size);
extern void *memset(void *memory, int byte, size_t size);
extern int memcmp(const void *one, const void *other, size_t size);
extern int snprintf(char *text, size_t size, const char *format, ...);
extern void *mmap(void *address, size_t size, int protection, int flags, int file, long offset);
extern int munmap(void *address, size_t size);
extern int madvise(void *address, size_t size, int advice);
extern int open(const char *path, int flags, ...);
extern int close(int file);
extern long lseek(int file, long offset, int whence);
extern int getpid(void);
extern int sched_getaffinity(int process, size_t size, void *mask);
extern int pthread_create(uintptr_t *thread, const thread_attributes *attributes, void *(*function)(void *), void *);
extern int pthread_join(uintptr_t thread, void **result);
extern int pthread_attr_init(thread_attributes *attributes);
extern int pthread_attr_setstacksize(thread_attributes *attributes, size_t size);
extern int pthread_attr_destroy(thread_attributes *attributes);
extern int pthread_sigmask(int how, const signal_set *set, signal_set *old);

enum {
    PROT_READ = 1,
    PROT_WRITE = 2,
    MAP_PRIVATE = 2,
    MAP_ANONYMOUS = 0x20,
    MADV_HUGEPAGE = 14,
    O_CLOEXEC = 02000000,
    SEEK_END = 2,
    SIG_SETMASK = 2,
    HUGE_PAGE = 1 << 21,
    WORKER_STACK = 1 << 22, /* a fused Winograd kernel keeps up to 1.25 MiB of transformed tiles on the stack */
    WEIGHTS_HEADER = 64,    /* of a file of weights: ID_BYTES and zeros, so that the weights begin at a cache line */
};

struct model {
    uint32_t running;
    int process; /* that started the threads */
    uint64_t num_threads, num_started;
    struct thread_pool *pool;
    struct step *steps;
    char *arena; /* the memory of all feature maps */
    size_t arena_mapped;
    void *arena_mapping;
    void *weights_mapping; /* of a file of weights, or NULL */
    uintptr_t *workers;
    int64_t (*strides)[4]; /* of the inputs, where the first steps read them */
    char error[200];
};

/* Errors */

static const char *error_without_handle = "";

static model_status refuse(model *handle, model_status status, const char *sentence) {
    __atomic_store_n(&error_without_handle, sentence, __ATOMIC_SEQ_CST);
    model_destroy(handle);
    return status;
}

const char *model_last_error(const model *handle) {
    return handle ? handle->error : __atomic_load_n(&error_without_handle, __ATOMIC_SEQ_CST);
}

/* Processors */

#if defined(__x86_64__)

struct registers {
    uint32_t a, b, c, d;
};

static struct registers cpuid(uint32_t leaf) {
    struct registers out;
    __asm__ volatile("cpuid" : "=a"(out.a), "=b"(out.b), "=c"(out.c), "=d"(out.d) : "0"(leaf), "2"(0));
    return out;
}

static bool all_bits(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

enum { /* the bits that each level of the x86-64 psABI adds */
    V2_1C = 1 << 0 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23, /* SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT */
    V2_EXT_C = 1 << 0,                                               /* LAHF */
    V3_1C = 1 << 12 | 1 << 22 | 1 << 27 | 1 << 28 | 1 << 29,         /* FMA, MOVBE, OSXSAVE, AVX, F16C */
    V3_7B = 1 << 3 | 1 << 5 | 1 << 8,                                /* BMI1, AVX2, BMI2 */
    V3_EXT_C = 1 << 5,                                               /* LZCNT */
    V3_XCR0 = 0x6,                                                   /* the system saves XMM and YMM */
    V4_7B = 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30,                   /* AVX-512 F, DQ, CD, BW */
    V4_XCR0 = 0xe6,                                                  /* and ZMM and mask registers */
};
#define V4_7B_VL (1u << 31)

static uint64_t cpu_level(void) {
    uint32_t last = cpuid(0).a, last_extended = cpuid(0x80000000).a;
    if (last < 1 || last_extended < 0x80000001) return 1;
    uint32_t basic = cpuid(1).c, extended = cpuid(0x80000001).c;
    if (!all_bits(basic, V2_1C) || !all_bits(extended, V2_EXT_C)) return 1;
    if (!all_bits(basic, V3_1C) || !all_bits(extended, V3_EXT_C) || last < 7) return 2;
    uint32_t saved, high, features = cpuid(7).b;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!all_bits(features, V3_7B) || !all_bits(saved, V3_XCR0)) return 2;
    return all_bits(features, V4_7B | V4_7B_VL) && all_bits(saved, V4_XCR0) ? 4 : 3;
}

#else

static uint64_t cpu_level(void) { return 0; } /* every ARM64 processor has NEON */

#endif

static const char *wrong_cpu(void) {
    switch (model_description.level) {
    case 2: return "This processor lacks instructions of x86-64-v2 (SSE4.2), which the library was compiled for.";
    case 3: return "This processor lacks instructions of x86-64-v3 (AVX2, FMA): export for --target x86-64-v2.";
    default: return "This processor lacks instructions of x86-64-v4 (AVX-512): export for --target x86-64-v3.";
    }
}

/* Memory */

static void *aligned_zeros(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, CACHE_LINE, bytes) ? NULL : memset(memory, 0, bytes);
}

/* Maps zeros for the arena, aligned to huge pages: as in `memory.py`, which says why. */
static bool map_arena(model *handle) {
    size_t mapped = (model_description.arena_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE;
    void *mapping = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == (void *)-1) return false;
    handle->arena_mapping = mapping;
    handle->arena_mapped = mapped;
    handle->arena = (char *)(((uintptr_t)mapping + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    madvise(handle->arena, mapped - HUGE_PAGE, MADV_HUGEPAGE); /* fails where the system has none: no harm */
    return true;
}

/* Returns the weights of a file, mapped for as long as the handle lives; NULL if it is not that of this library. */
static const char *map_weights(model *handle, const char *path) {
    size_t bytes = WEIGHTS_HEADER + model_description.weights_bytes;
    int file = open(path, O_CLOEXEC);
    if (file < 0) return NULL;
    void *mapping = (void *)-1;
    if (lseek(file, 0, SEEK_END) == (long)bytes) mapping = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (mapping == (void *)-1) return NULL;
    handle->weights_mapping = mapping;
    if (memcmp(mapping, model_description.weights_id, ID_BYTES) != 0) return NULL;
    return (const char *)mapping + WEIGHTS_HEADER;
}

/* Threads */

static void *run_worker(void *pool) {
    pool_worker(pool);
    return NULL;
}

/* The processors of this process: a bit each. Returns their number, at least 1. */
static uint64_t allowed_processors(uint64_t mask[MAX_CPUS / 64]) {
    memset(mask, 0, MAX_CPUS / 8);
    uint64_t count = 0;
    if (sched_getaffinity(0, MAX_CPUS / 8, mask) == 0)
        for (int word = 0; word < MAX_CPUS / 64; word++)
            for (uint64_t bits = mask[word]; bits; bits &= bits - 1) count++;
    return count ? count : 1;
}

static bool start_workers(model *handle) {
    thread_attributes attributes;
    signal_set all, before;
    memset(&all, 0xff, sizeof all);
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setstacksize(&attributes, WORKER_STACK);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* inherited: signals are for the threads of the program */
    while (handle->num_started < handle->num_threads - 1 &&
           pthread_create(&handle->workers[handle->num_started], &attributes, run_worker, handle->pool) == 0)
        handle->num_started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return handle->num_started == handle->num_threads - 1;
}

/* Creation */

static void fill_steps(model *handle, const char *weights) {
    const struct step_description *steps = table(model_description.steps);
    for (uint64_t index = 0; index < model_description.num_steps; index++) {
        const struct step_description *from = &steps[index];
        struct step *to = &handle->steps[index];
        to->function = model_kernels[from->kernel];
        to->source = from->source == INPUT ? NULL : (const float *)(handle->arena + from->source);
        to->target = (float *)(handle->arena + from->target);
        to->weights = from->weights_kind == WEIGHTS ? weights + from->weights
                      : from->weights_kind == ARENA ? handle->arena + from->weights
                                                    : (const char *)handle->strides[from->input];
        to->bias = (const float *)(weights + from->bias);
        to->units_per_block = from->units_per_block;
        to->items_per_block = from->items_per_block;
        to->items_per_image = from->items_per_image;
        to->first_image = from->first_image;
        to->max_images = from->max_images;
    }
    /* The sentinel: a worker of an earlier call divides by this before it reads the claim word. */
    handle->steps[model_description.num_steps].items_per_block = 1;
}

model_status model_create(const char *weights, int threads, model **out) {
    if (!out) return refuse(NULL, MODEL_BAD_ARGUMENT, "Pass a place for the handle, not NULL.");
    *out = NULL;
    if (cpu_level() < model_description.level) return refuse(NULL, MODEL_WRONG_CPU, wrong_cpu());
    if (threads < 0 || threads > MODEL_MAX_THREADS)
        return refuse(NULL, MODEL_BAD_ARGUMENT, "The number of threads is 0, for the default, to 512.");
    if (weights && model_description.embedded)
        return refuse(NULL, MODEL_BAD_ARGUMENT, "The library contains its weights: pass NULL, not a path.");
    if (!weights && !model_description.embedded)
        return refuse(NULL, MODEL_WRONG_WEIGHTS, "Pass the path of the file of weights next to the library.");
    model *handle = aligned_zeros(sizeof *handle);
    if (!handle) return refuse(NULL, MODEL_OUT_OF_MEMORY, "There is not enough memory for the network.");
    const char *data = model_weights;
    if (weights && !(data = map_weights(handle, weights)))
        return refuse(handle, MODEL_WRONG_WEIGHTS,
                               "The file of weights cannot be read, or is not that of this library.");
    uint64_t processors[MAX_CPUS / 64], available = allowed_processors(processors);
    handle->process = getpid();
    handle->num_threads = (uint64_t)threads;
    if (threads == 0) {
        uint64_t wanted = model_description.threads;
        handle->num_threads = wanted && wanted < available ? wanted : available;
        if (handle->num_threads > MODEL_MAX_THREADS) handle->num_threads = MODEL_MAX_THREADS;
    }
    handle->pool = aligned_zeros(sizeof *handle->pool + handle->num_threads * sizeof(uint64_t));
    handle->steps = aligned_zeros((model_description.num_steps + 1) * sizeof *handle->steps);
    handle->strides = aligned_zeros(model_description.num_inputs * sizeof *handle->strides);
    handle->workers = aligned_zeros(handle->num_threads * sizeof *handle->workers);
    if (!handle->pool || !handle->steps || !handle->strides || !handle->workers || !map_arena(handle))
        return refuse(handle, MODEL_OUT_OF_MEMORY, "There is not enough memory for the network.");
    fill_steps(handle, data);
    handle->pool->num_threads = handle->num_threads;
    handle->pool->avoided_cpu = UINT64_MAX; /* no processor has this number */
    handle->pool->steps = handle->steps;
    for (int word = 0; word < MAX_CPUS / 64; word++) handle->pool->allowed_cpus[word] = processors[word];
    if (!start_workers(handle))
        return refuse(handle, MODEL_NO_THREADS, "The system refused to start a thread: ask for fewer.");
    *out = handle;
    return MODEL_OK;
}

void model_destroy(model *handle) {
    if (!handle) return;
    if (handle->num_started && handle->process == getpid()) { /* in a forked child, the threads do not exist */
        pool_shutdown(handle->pool);
        for (uint64_t index = 0; index < handle->num_started; index++) pthread_join(handle->workers[index], NULL);
    }
    if (handle->arena_mapping) munmap(handle->arena_mapping, handle->arena_mapped);
    if (handle->weights_mapping) munmap(handle->weights_mapping, WEIGHTS_HEADER + model_description.weights_bytes);
    free(handle->pool);
    free(handle->steps);
    free(handle->strides);
    free(handle->workers);
    free(handle);
}

/* Runs */

/* Copies an output to memory without gaps. */
static void copy_output(const model *handle, const struct output *output, uint64_t images, float *to) {
    const float *from = (const float *)handle->arena + output->offset;
    for (uint64_t image = 0; image < images; image++, from += output->image_stride)
        for (uint64_t i = 0; i < output->extents[0]; i++)
            for (uint64_t j = 0; j < output->extents[1]; j++) {
                const float *line = from + i * output->strides[0] + j * output->strides[1];
                for (uint64_t k = 0; k < output->extents[2]; k++) *to++ = line[k * output->strides[2]];
            }
}

static bool is_float_array(const void *array) { return array && (uintptr_t)array % sizeof(float) == 0; }

static const char *why_unfit(int64_t images, const float *const *inputs, float *const *outputs) {
    if (images < 0) return "The number of images is negative.";
    if (!inputs || !outputs) return "Pass an array of inputs and an array of outputs, not NULL.";
    for (uint64_t index = 0; images && index < model_description.num_inputs; index++)
        if (!is_float_array(inputs[index])) return "An input is NULL or not aligned to 4 bytes.";
    for (uint64_t index = 0; images && index < model_description.num_outputs; index++)
        if (!is_float_array(outputs[index])) return "An output is NULL or not aligned to 4 bytes.";
    return NULL;
}

model_status model_run_strided(model *handle, int64_t images, const float *const *inputs, const int64_t (*strides)[4],
                               float *const *outputs) {
    if (!handle) return refuse(NULL, MODEL_BAD_ARGUMENT, "Pass a handle that was created, not NULL.");
    if (__atomic_exchange_n(&handle->running, 1, __ATOMIC_ACQUIRE)) return MODEL_BUSY; /* its error text is not ours */
    const char *reason = why_unfit(images, inputs, outputs);
    model_status status = MODEL_BAD_ARGUMENT;
    if (reason) {
        snprintf(handle->error, sizeof handle->error, "%s", reason);
    } else if ((uint64_t)images > model_description.max_images) {
        snprintf(handle->error, sizeof handle->error,
                 "The library was exported for at most %lld images at once, got %lld: export it with a larger "
                 "--max-batch, or pass them in parts.",
                 (long long)model_description.max_images, (long long)images);
    } else {
        status = MODEL_OK;
        handle->error[0] = 0;
    }
    if (status == MODEL_OK && images > 0) {
        const struct step_description *steps = table(model_description.steps);
        for (uint64_t index = 0; index < model_description.num_inputs; index++) {
            const uint64_t *shape = input_of(index)->shape;
            int64_t plane = (int64_t)(shape[1] * shape[2]);
            int64_t packed[4] = {(int64_t)shape[0] * plane, plane, (int64_t)shape[2], 1};
            for (int axis = 0; axis < 4; axis++)
                handle->strides[index][axis] = strides ? strides[index][axis] : packed[axis];
        }
        for (uint64_t index = 0; index < model_description.num_steps; index++)
            if (steps[index].source == INPUT)
                handle->steps[index].source = inputs[steps[index].input] +
                                              (int64_t)steps[index].first_image * handle->strides[steps[index].input][0];
        pool_run(handle->pool, handle->steps, model_description.num_steps, (uint64_t)images);
        for (uint64_t index = 0; index < model_description.num_outputs; index++)
            copy_output(handle, output_of(index), (uint64_t)images, outputs[index]);
    }
    __atomic_store_n(&handle->running, 0, __ATOMIC_RELEASE);
    return status;
}

model_status model_run(model *handle, int64_t images, const float *const *inputs, float *const *outputs) {
    return model_run_strided(handle, images, inputs, NULL, outputs);
}

/* Questions */

int model_threads(const model *handle) { return handle ? (int)handle->num_threads : 0; }

const char *model_version(void) { return model_description.version; }

int64_t model_max_images(void) { return (int64_t)model_description.max_images; }

int model_num_inputs(void) { return (int)model_description.num_inputs; }

int model_num_outputs(void) { return (int)model_description.num_outputs; }

int model_input_shape(int input, int64_t shape[MODEL_MAX_RANK]) {
    if (input < 0 || input >= model_num_inputs() || !shape) return 0;
    for (int axis = 0; axis < 3; axis++) shape[axis] = (int64_t)input_of((uint64_t)input)->shape[axis];
    return 3;
}

int model_output_shape(int output, int64_t shape[MODEL_MAX_RANK]) {
    if (output < 0 || output >= model_num_outputs() || !shape) return 0;
    const struct output *found = output_of((uint64_t)output);
    for (uint64_t axis = 0; axis < found->rank; axis++) shape[axis] = (int64_t)found->shape[axis];
    return (int)found->rank;
}

int64_t model_input_size(int input) {
    int64_t shape[MODEL_MAX_RANK];
    return model_input_shape(input, shape) ? shape[0] * shape[1] * shape[2] : 0;
}

int64_t model_output_size(int output) {
    int64_t shape[MODEL_MAX_RANK], size = 1; /* of a number, which has no axes */
    if (output < 0 || output >= model_num_outputs()) return 0;
    int rank = model_output_shape(output, shape);
    for (int axis = 0; axis < rank; axis++) size *= shape[axis];
    return size;
}
