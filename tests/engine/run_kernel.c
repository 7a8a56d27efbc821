/* Runs a kernel of the engine on arrays of a file, in an emulator: `run_kernel JOB RESULT`.

   The job is: the number of blocks, the number of calls, the first unit of each call and the end of the last, the bytes
   of source, target, weights and bias; then the four arrays. The result is the target. Memory around each array is
   checked: exit code 3 if it was written to. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 16384, CANARY = 0x5a };

void kernel(const void *source, void *target, const void *weights, const void *bias, int64_t batch, int64_t begin,
            int64_t end);

static void fail(const char *what) {
    fprintf(stderr, "run_kernel: %s\n", what);
    exit(2);
}

static void get(void *to, size_t bytes, FILE *file) {
    if (bytes && fread(to, 1, bytes, file) != bytes) fail("the job is too short");
}

int main(int argc, char **argv) {
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
    if (!file) fail("cannot open the job");
    int64_t head[2], bytes[4];
    get(head, sizeof head, file);
    int64_t *cuts = malloc((size_t)(head[1] + 1) * sizeof *cuts);
    get(cuts, (size_t)(head[1] + 1) * sizeof *cuts, file);
    get(bytes, sizeof bytes, file);
    char *arrays[4];
    for (int i = 0; i < 4; i++) {
        size_t size = ((size_t)bytes[i] + 2 * GUARD + 63) / 64 * 64;
        arrays[i] = aligned_alloc(64, size);
        memset(arrays[i], CANARY, size);
        get(arrays[i] + GUARD, (size_t)bytes[i], file);
    }
    fclose(file);
    for (int64_t call = head[1] - 1; call >= 0; call--) /* the last ones first */
        kernel(arrays[0] + GUARD, arrays[1] + GUARD, arrays[2] + GUARD, arrays[3] + GUARD, head[0], cuts[call],
               cuts[call + 1]);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < GUARD; k++)
            if (arrays[i][k] != CANARY || arrays[i][GUARD + bytes[i] + k] != CANARY) return 3;
    file = fopen(argv[2], "wb");
    if (!file || fwrite(arrays[1] + GUARD, 1, (size_t)bytes[1], file) != (size_t)bytes[1] || fclose(file))
        fail("cannot write the result");
    return 0;
}
