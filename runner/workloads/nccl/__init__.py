"""Test `nccl`: nccl-tests, the fabric by itself."""
