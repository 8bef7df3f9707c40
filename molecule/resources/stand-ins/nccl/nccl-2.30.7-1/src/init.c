/* STAND-IN for NCCL: a library that knows its version and nothing else. */
#include "nccl.h"

int ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return 0;
}
