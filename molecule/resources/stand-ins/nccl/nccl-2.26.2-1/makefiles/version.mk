##### version
NCCL_MAJOR   := 2
NCCL_MINOR   := 26
NCCL_PATCH   := 2
