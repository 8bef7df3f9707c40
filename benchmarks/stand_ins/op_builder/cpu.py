"""STAND-IN: without a builder of oneCCL's operations, communication is left to torch.distributed, over gloo."""

from deepspeed.ops.op_builder.cpu import CPUAdamBuilder as CPUAdamBuilder
from deepspeed.ops.op_builder.cpu import FusedAdamBuilder as FusedAdamBuilder
from deepspeed.ops.op_builder.cpu import NotImplementedBuilder as NotImplementedBuilder

CCLCommBuilder = None
