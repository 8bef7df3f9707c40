"""Training data: from a source of instructions to packed sequences in a cache."""

IGNORED = -100  # the label that cross-entropy ignores
