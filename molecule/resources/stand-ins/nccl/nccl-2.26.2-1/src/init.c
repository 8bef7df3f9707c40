/* STAND-IN for NCCL: a library that knows its version and nothing else. */
#include "nccl.h"

#if CUDA_MAJOR >= 13 && NCCL_MINOR < 27
#error "CUDA 13 has no such headers"
#endif

int ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return 0;
}
