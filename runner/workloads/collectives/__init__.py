"""Test `torch`: collectives over torch.distributed."""
