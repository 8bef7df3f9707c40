"""Test `gpu` on a real GPU: what only CUDA and NVML can show."""

from __future__ import annotations

import pytest

import ranks
from runner.node import sampler
from runner.plan import config

pytestmark = [pytest.mark.local, pytest.mark.gpu]

PARAMS = {"soak_s": 3.0, "copy_bytes": 1 << 30, "host_bytes": 64 << 20, "peer_bytes": 64 << 20, "blocks": 5}


@pytest.fixture(scope="module")
def gpus() -> int:
    found = len(sampler.gpu_names())
    if not found:
        pytest.skip("no NVIDIA GPU on this machine")
    return found


@pytest.fixture(scope="module")
def ended(gpus, tmp_path_factory) -> ranks.Ended:
    model = config.load_model("llama-2-7b").model_dump()
    return ranks.start(
        tmp_path_factory.mktemp("gpu"), ranks.job("gpu", gpus, PARAMS, device="cuda", model=model), timeout_s=90
    )


def test_each_gpu_is_measured_as_itself(ended, gpus):
    import torch

    assert ended.outcome.rc == 0, ended.outcome.stderr
    precisions = {"bf16", "fp8"} if torch.cuda.get_device_capability() >= (8, 9) else {"bf16"}
    uuids = set()
    for rank in range(gpus):
        contexts = ended.contexts("matmul_tflop_per_s", rank)
        assert {context["precision"] for context in contexts} == precisions
        uuids |= {context["uuid"] for context in contexts}
        assert len(ended.values("matmul_tflop_per_s", rank)) >= 5 * len(precisions)
        assert min(ended.values("matmul_tflop_per_s", rank)) > 10, "TFLOP/s of any GPU that has 16 bits"
    assert len(uuids) == gpus and all(uuid.startswith(("GPU-", "MIG-")) for uuid in uuids)


def test_8_bits_are_faster_than_16(ended):
    rates = ended.values("matmul_tflop_per_s")
    by = {precision: [] for precision in ("bf16", "fp8")}
    for context, rate in zip(ended.contexts("matmul_tflop_per_s"), rates, strict=True):
        by[context["precision"]].append(rate)
    if not by["fp8"]:
        pytest.skip("this GPU has no products of 8 bits")
    assert min(by["fp8"]) > 1.2 * max(by["bf16"])


def test_nothing_that_was_compared_was_wrong(ended, gpus):
    for rank in range(gpus):
        checks = {context["check"] for context in ended.contexts("wrong_values", rank)}
        expected = {"repeated product", "same product on all", "copy in memory", "host to device", "device to host"}
        assert expected <= checks and set(ended.values("wrong_values", rank)) == {0}


def test_memory_and_host_are_copied_at_rates_that_are_theirs(ended):
    memory = ended.values("hbm_copy_gb_per_s")
    for metric in ("host_to_device_gb_per_s", "device_to_host_gb_per_s"):
        rates, contexts = ended.values(metric), ended.contexts(metric)
        assert len(rates) % 5 == 0 and 1 < max(rates) < max(memory)
        assert all(context["numa"] is not None for context in contexts) and contexts[0]["local"] in (True, None)


def test_its_state_was_read_while_it_worked(ended):
    assert max(ended.values("power_w")) > 50 and max(ended.values("sm_clock_mhz")) > 300
    assert {c["statistic"] for c in ended.contexts("temperature_c")} == {"mean", "min", "max"}
    assert all(0 <= share <= 100 for share in ended.values("throttle_share_pct"))
    assert ended.values("other_processes") and ended.values("memory_used_before_gib")


def test_every_pair_of_gpus_is_in_the_matrix(ended, gpus):
    if gpus < 2:
        pytest.skip("one GPU on this machine")
    pairs = {(c["source"], c["target"]) for c in ended.contexts("peer_gb_per_s")}
    assert len(pairs) == gpus * (gpus - 1) and all(source != target for source, target in pairs)


def test_an_error_names_the_gpu_and_what_it_did(gpus):
    import torch

    from runner.errors import InfrastructureError
    from runner.workloads.gpu.device import Gpu

    gpu = Gpu(0, 3, "GPU-x", "it is used by others: pid 41")
    with pytest.raises(InfrastructureError) as error, gpu.named("copying"):
        torch.empty(1 << 50, dtype=torch.uint8, device=gpu.place)
    said = str(error.value)
    assert said.startswith("GPU 3 (GPU-x), copying: CUDA out of memory") and said.endswith("by others: pid 41")


def test_a_buffer_that_cannot_be_pinned_afterwards_leaves_no_error_behind(gpus, monkeypatch):
    import torch

    from runner.workloads.gpu import device, numa

    torch.zeros((), device="cuda")
    ((node, cpus), *_) = numa.nodes().items()
    first = device.HostBuffer(1 << 20, node, cpus)
    monkeypatch.setattr(device, "touched", lambda size_bytes: first.words)  # which are pinned already
    second = device.HostBuffer(1 << 20, node, cpus)
    assert second.words.is_pinned() and not second._registered
    assert torch.ones(4, device="cuda").sum().item() == 4
    first.free()
