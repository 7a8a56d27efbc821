/* Run the network on images from a file, or on a pattern:

       ./example                                      a pattern, times and the first outputs
       ./example INPUT OUTPUT [IMAGES [THREADS]]      raw float32: the arrays of all inputs, one after the other

   Build it with cmake, or with:  cc -O2 example.c libmodel.a -pthread -o example */

#define _POSIX_C_SOURCE 200809L /* clock_gettime */

#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define WEIGHTS NULL

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int fail(const char *what) {
    fprintf(stderr, "example: %s\n", what);
    return EXIT_FAILURE;
}

int main(int argc, char **argv) {
    int64_t images = argc > 3 ? atoll(argv[3]) : 1;
    int threads = argc > 4 ? atoi(argv[4]) : 0;
    int num_inputs = model_num_inputs(), num_outputs = model_num_outputs();
    double start = seconds();

    model *network;
    if (model_create(WEIGHTS, threads, &network) != MODEL_OK) return fail(model_last_error(NULL));

    float **inputs = calloc((size_t)num_inputs, sizeof *inputs);
    float **outputs = calloc((size_t)num_outputs, sizeof *outputs);
    if (!inputs || !outputs || images < 1 || images > model_max_images()) return fail("wrong number of images");
    for (int i = 0; i < num_inputs; i++)
        if (!(inputs[i] = malloc((size_t)(images * model_input_size(i)) * sizeof(float)))) return fail("no memory");
    for (int i = 0; i < num_outputs; i++)
        if (!(outputs[i] = malloc((size_t)(images * model_output_size(i)) * sizeof(float)))) return fail("no memory");

    FILE *file = argc > 2 ? fopen(argv[1], "rb") : NULL;
    if (argc > 2 && !file) return fail("the input file cannot be opened");
    for (int i = 0; i < num_inputs; i++) {
        size_t floats = (size_t)(images * model_input_size(i));
        for (size_t k = 0; !file && k < floats; k++) inputs[i][k] = (float)(k % 255) / 127.5f - 1;
        if (file && fread(inputs[i], sizeof(float), floats, file) != floats) return fail("the input file is too short");
    }
    if (file) fclose(file);

    if (model_run(network, images, (const float *const *)inputs, outputs) != MODEL_OK)
        return fail(model_last_error(network));
    double first = seconds() - start;

    if (argc > 2) {
        file = fopen(argv[2], "wb");
        if (!file) return fail("the output file cannot be opened");
        for (int i = 0; i < num_outputs; i++) {
            size_t floats = (size_t)(images * model_output_size(i));
            if (fwrite(outputs[i], sizeof(float), floats, file) != floats) return fail("the output cannot be written");
        }
        if (fclose(file)) return fail("the output cannot be written");
    } else {
        start = seconds();
        for (int repeat = 0; repeat < 10; repeat++)
            if (model_run(network, images, (const float *const *)inputs, outputs) != MODEL_OK)
                return fail(model_last_error(network));
        printf("%s\n%d threads, first output after %.1f ms, then %.2f ms a run\n", model_version(),
               model_threads(network), 1e3 * first, 1e2 * (seconds() - start));
        for (int i = 0; i < num_outputs; i++) {
            printf("output %d:", i);
            for (int64_t k = 0; k < model_output_size(i) && k < 8; k++) printf(" %g", (double)outputs[i][k]);
            printf("\n");
        }
    }

    for (int i = 0; i < num_inputs; i++) free(inputs[i]);
    for (int i = 0; i < num_outputs; i++) free(outputs[i]);
    free(inputs);
    free(outputs);
    model_destroy(network);
    return EXIT_SUCCESS;
}
