##### version
NCCL_MAJOR   := 2
NCCL_MINOR   := 30
NCCL_PATCH   := 7
