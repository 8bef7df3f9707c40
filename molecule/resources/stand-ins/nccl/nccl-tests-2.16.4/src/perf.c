/* STAND-IN for nccl-tests' programs: prints the real table with made-up numbers. No GPU takes part.
 *
 * /etc/stand-in/nccl-wrong, if it is there, holds the number of wrong values.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nccl.h"

int main(int argc, char **argv)
{
    int gpus = 1, version, wrong = 0;
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], "-g"))
            gpus = atoi(argv[i + 1]);
    FILE *file = fopen("/etc/stand-in/nccl-wrong", "r");
    if (file) {
        if (fscanf(file, "%d", &wrong) != 1)
            wrong = 0;
        fclose(file);
    }
    ncclGetVersion(&version);
    printf("# nThread 1 nGpus %d minBytes 8388608 maxBytes 8388608 step: 1048576(bytes) warmup iters: 5 iters: 20 "
           "agg iters: 1 validation: 1 graph: 0\n#\n# Using devices\n", gpus);
    for (int rank = 0; rank < gpus; rank++)
        printf("#  Rank %2d Group  0 Pid      1 on  STAND-IN device %2d [0x%02x] STAND-IN, NCCL %d\n",
               rank, rank, rank, version);
    printf("#\n#                                                              out-of-place                       "
           "in-place          \n"
           "#       size         count      type   redop    root     time   algbw   busbw #wrong     time   "
           "algbw   busbw #wrong\n"
           "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  "
           "(GB/s)  (GB/s)       \n"
           "     8388608       2097152     float     sum      -1     70.7  118.66  207.66  %5d     70.1  119.64  "
           "209.37  %5d\n", wrong, wrong);
    printf("# Out of bounds values : %d %s\n# Avg bus bandwidth    : 208.515 \n#\n\n", wrong, wrong ? "FAILED" : "OK");
    return wrong ? 1 : 0;
}
