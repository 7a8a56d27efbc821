/* C interface of a compiled network.

   A network is a library without dependencies but the C library and its threads. Link libmodel.a or libmodel.so with
   -pthread. Arrays are float32; images are NCHW without gaps unless strides say otherwise.

       model *network;
       if (model_create(NULL, 0, &network) != MODEL_OK) {
           fprintf(stderr, "%s\n", model_last_error(NULL));
           return 1;
       }
       const float *inputs[] = {images};
       float *outputs[] = {logits};
       if (model_run(network, number_of_images, inputs, outputs) != MODEL_OK) ...
       model_destroy(network);

   Threads: separate handles may run at once. Calls of one handle must not overlap: model_run returns MODEL_BUSY if the
   handle is running in another thread. Call from threads with a stack of 2 MiB or more, the default of glibc. After a
   fork, a handle runs in the child on the calling thread alone. */

#ifndef REPVGG_MODEL_H
#define REPVGG_MODEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A network with its buffers and threads. */
typedef struct model model;

typedef enum model_status {
    MODEL_OK = 0,
    MODEL_BAD_ARGUMENT = 1,
    MODEL_OUT_OF_MEMORY = 2,
    MODEL_WRONG_CPU = 3,     /* this processor lacks instructions that the library was compiled for */
    MODEL_BUSY = 4,          /* the handle is running in another thread */
    MODEL_WRONG_WEIGHTS = 5, /* the file of weights is missing, or that of another network */
    MODEL_NO_THREADS = 6,    /* the system refused to start a thread */
} model_status;

enum {
    MODEL_MAX_RANK = 8,      /* of a shape, without the axis of images */
    MODEL_MAX_THREADS = 512, /* of a handle */
};

/* Allocates buffers and starts threads. Stores NULL in *handle unless it returns MODEL_OK.

   weights: NULL if the library contains its weights; else the path of the file of weights that was exported with it.
   threads: number of threads, with that of the caller of model_run; 0 for the default that was set at export, at most
   one for each processor that this process may use. */
model_status model_create(const char *weights, int threads, model **handle);

/* Computes the outputs of `images` images, 0 to model_max_images().

   inputs: an array for each input, of `images` times model_input_size(i) floats.
   outputs: memory for each output, of `images` times model_output_size(i) floats; none may overlap an input. */
model_status model_run(model *handle, int64_t images, const float *const *inputs, float *const *outputs);

/* Does the same for inputs of any layout: strides[i] holds the floats from one element of input i to the next along N,
   C, H and W. Pixels of three interleaved channels, for example: {3 * height * width, 1, 3 * width, 3}. */
model_status model_run_strided(model *handle, int64_t images, const float *const *inputs, const int64_t (*strides)[4],
                               float *const *outputs);

/* Ends the threads and frees the buffers. The handle must not be running; NULL is allowed. */
void model_destroy(model *handle);

/* Number of threads, with the caller's; 0 for NULL. */
int model_threads(const model *handle);

/* Says in a sentence why the last call on this handle failed; with NULL, why the last call without a handle did, such as
   model_create. MODEL_BUSY leaves the text as it is. That of a handle lives until its next call. Never NULL. */
const char *model_last_error(const model *handle);

/* Version of the exporter, the target that was compiled for, and the name of the network. */
const char *model_version(void);

/* The largest number of images of one call. */
int64_t model_max_images(void);

int model_num_inputs(void);
int model_num_outputs(void);

/* Write the shape of an image or of an output for one image, such as C, H, W, and return its number of axes. It is 0
   for an output of one number, and if there is no input or output of that number. */
int model_input_shape(int input, int64_t shape[MODEL_MAX_RANK]);
int model_output_shape(int output, int64_t shape[MODEL_MAX_RANK]);

/* Floats of an input or output for one image: the product of its shape; 0 if there is none of that number.
   An output of one number has the size 1. */
int64_t model_input_size(int input);
int64_t model_output_size(int output);

#ifdef __cplusplus
}
#endif

#endif
