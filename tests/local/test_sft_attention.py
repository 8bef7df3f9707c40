"""Which kind of attention a rank uses, and how the kernels are called, with STAND-INS for those that need a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from runner.errors import UsageError
from runner.workloads.sft import attention
from runner.workloads.sft.attention import Attention, Kind, Shape, Unusable, by_sample

CPU = torch.device("cpu")
SHAPE = Shape(heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16, longest=4096)


# ---- stand-ins on a CPU: the forms that torch's and the packages' functions have ----


def _called(q, k, v, bounds, other_bounds, longest, other_longest, grouped):
    assert bounds is other_bounds and bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(q)
    assert longest == other_longest == SHAPE.longest  # the same for every batch
    assert grouped or q.shape == k.shape == v.shape
    return by_sample(q, k, v, bounds, longest)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return _called(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, grouped=False)


def torch_main(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0)
    return _called(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, grouped=False)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size == (-1, 0)
    return _called(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, grouped=enable_gqa)


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert causal and not dropout_p
    return _called(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, grouped=True)


def flash_attn_4(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    assert causal
    return _called(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, grouped=True), None


@pytest.mark.parametrize("varlen_attn", [torch_2_10, torch_main, torch_2_13])
def test_varlen_is_called_as_each_torch_takes_it(varlen_attn):
    assert attention.trial(attention.from_torch(varlen_attn), CPU, SHAPE) is None


@pytest.mark.parametrize("flash_attn_varlen_func", [flash_attn_2, flash_attn_4])
def test_packages_are_called_as_they_take_it(flash_attn_varlen_func):
    assert attention.trial(attention.from_package(flash_attn_varlen_func), CPU, SHAPE) is None


def test_the_torch_that_is_installed_has_one_of_these_forms():
    """What the stand-in takes, the function itself takes as well."""
    import inspect

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    known = set(inspect.signature(varlen.varlen_attn).parameters)
    forms = [set(inspect.signature(form).parameters) for form in (torch_2_10, torch_main, torch_2_13)]
    assert known in forms


# ---- the trial ----


def crossing(q, k, v, bounds, longest):
    return by_sample(q, k, v, bounds[[0, -1]], longest)


def looking_ahead(q, k, v, bounds, longest):
    pieces = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        q1, k1, v1 = (x[begin:end].transpose(0, 1) for x in (q, *attention._repeated(q, k, v)))
        pieces.append(torch.nn.functional.scaled_dot_product_attention(q1, k1, v1).transpose(0, 1))
    return torch.cat(pieces)


def of_the_wrong_heads(q, k, v, bounds, longest):
    return by_sample(q, k.flip(1), v, bounds, longest)


def without_a_gradient_of_keys(q, k, v, bounds, longest):
    return by_sample(q, k.detach() + 0 * k, v, bounds, longest)


def not_a_number(q, k, v, bounds, longest):
    return by_sample(q, k, v, bounds, longest) * float("nan")


def built_for_another_gpu(q, k, v, bounds, longest):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")


def without_a_backward_pass(q, k, v, bounds, longest):
    return by_sample(q, k, v, bounds, longest).detach()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (crossing, "computes a wrong result here"),
        (looking_ahead, "computes a wrong result here"),
        (of_the_wrong_heads, "computes a wrong result here"),
        (without_a_gradient_of_keys, "computes a wrong gradient here"),
        (not_a_number, "computes a wrong result here"),
        (built_for_another_gpu, "does not work here (RuntimeError: CUDA error: no kernel image is available"),
        (without_a_backward_pass, "does not work here (RuntimeError: element 0 of tensors does not require grad"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kernel_that_computes_something_else_is_found(kernel, reason):
    found = attention.trial(kernel, CPU, SHAPE)
    assert found is not None and found.startswith(reason) and "\n" not in found


# ---- the choice ----


def missing():
    raise ModuleNotFoundError("No module named 'flash_attn_interface'")


def of_another_torch():
    raise ImportError("flash_attn_3/_C.abi3.so: undefined symbol: _ZN3c104cuda29c10_cuda_check_implementation")


WORKING = Kind("working", "a kernel", device="cpu", load=lambda: by_sample)
MISSING = Kind("missing", "", device="cpu", load=missing, package="the package flash-attn-3")
UNDEFINED = Kind("undefined", "", device="cpu", load=of_another_torch)
WRONG = Kind("wrong", "", device="cpu", load=lambda: crossing)
MASKED = Kind("masked", "a mask", device="any", plain=True)
EVERY = (MISSING, UNDEFINED, WRONG, WORKING, MASKED)


def test_auto_takes_the_first_that_works_and_says_which_are_broken():
    chosen = attention.choose("auto", CPU, SHAPE, kinds=EVERY)
    assert (chosen.name, chosen.flat) == ("working", True)
    assert chosen.detail.startswith("a kernel; undefined cannot be imported (ImportError: flash_attn_3/_C")
    assert "; wrong computes a wrong result" in chosen.detail and "missing" not in chosen.detail


def test_the_reference_takes_what_is_plain():
    assert attention.choose("auto", CPU, SHAPE, plain=True, kinds=EVERY) == Attention("masked", "a mask", None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "needs the package flash-attn-3 (No module named 'flash_attn_interface')"),
        ("undefined", r"cannot be imported (ImportError: flash_attn_3/_C.abi3.so: undefined symbol: _ZN3c10"),
        ("wrong", "computes a wrong result here (off by "),
        ("varlen", "needs a GPU"),
        ("unheard", "is unknown"),
    ],
)
def test_a_kind_that_does_not_work_here_is_one_line_with_those_that_do(name, reason):
    kinds = (*EVERY, *(kind for kind in attention.KINDS if kind.name == name))
    with pytest.raises(UsageError) as raised:
        attention.choose(name, CPU, SHAPE, kinds=kinds)
    assert str(raised.value).startswith(f"sft.attention={name} {reason}")
    assert str(raised.value).endswith("; on this machine work working, masked and auto")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_without_a_gpu_the_kernels_of_gpus_are_refused(name):
    with pytest.raises(
        UsageError, match=f"^sft.attention={name} needs a GPU; on this machine work sdpa, eager and auto$"
    ):
        attention.choose(name, CPU, SHAPE)


def test_on_a_cpu_each_sample_is_computed_by_itself_and_the_reference_has_a_mask():
    assert attention.choose("auto", CPU, SHAPE).kernel is by_sample
    assert attention.choose("auto", CPU, SHAPE, plain=True).flat is False


@pytest.mark.parametrize(
    ("gpu", "capability", "fit"),
    [
        ("V100", (7, 0), []),
        ("T4", (7, 5), []),
        ("A100", (8, 0), ["varlen", "flash_attention_2"]),
        ("L40S", (8, 9), ["varlen", "flash_attention_2"]),
        ("H200", (9, 0), ["flash_attention_3", "flash_attention_4", "varlen", "flash_attention_2"]),
        ("B200", (10, 0), ["flash_attention_4", "varlen", "flash_attention_2"]),
        ("RTX PRO 6000", (12, 0), ["varlen", "flash_attention_2"]),
    ],
)
def test_the_order_of_what_is_made_for_a_gpu(gpu, capability, fit):
    def fits(kind):
        try:
            kind.fits(capability, SHAPE)
        except Unusable:
            return False
        return True

    assert [kind.name for kind in attention.KINDS if kind.device == "cuda" and fits(kind)] == fit


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": torch.float32}, "needs bf16 or fp16"),
        ({"head_dim": 20}, "needs heads of a multiple of 8 up to 256 values, this model's have 20"),
        ({"head_dim": 320}, "needs heads of a multiple of 8 up to 256 values, this model's have 320"),
    ],
)
def test_what_no_kernel_of_a_gpu_computes_is_refused(changed, reason):
    for kind in attention.KINDS:
        if kind.device == "cuda":
            with pytest.raises(Unusable, match=reason):
                kind.fits((kind.majors[0] if kind.majors else 9, 0), Shape(**{**vars(SHAPE), **changed}))
