"""STAND-IN for DeepSpeed's own `op_builder`, which it prefers to `deepspeed.ops.op_builder` where it is found."""

__deepspeed__ = True
