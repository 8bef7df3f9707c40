"""Test `gpu` on real ranks on the CPU: its records, and that one wrong bit is seen, on the rank that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ranks
from conftest import ROOT
from runner.failures import Suspect
from runner.plan import config
from runner.results import records
from runner.workloads.gpu import findings

pytestmark = pytest.mark.local

RUNNER = Path(sys.executable).with_name("runner")
PARAMS = {"soak_s": 0.5, "copy_bytes": 1 << 22, "host_bytes": 1 << 22, "peer_bytes": 1 << 22, "blocks": 5}
JOB = {"params": PARAMS, "model": config.load_model("tiny").model_dump(), "seed": 7}


def job(world_size: int) -> dict:
    return ranks.job("gpu", world_size, **JOB)


def checks(ended: ranks.Ended, rank: int) -> dict[tuple, float]:
    """(what was compared, precision, block) -> wrong values."""
    keys = ("check", "precision", "block")
    contexts = ended.contexts("wrong_values", rank)
    return {
        tuple(context.get(key) for key in keys): value
        for context, value in zip(contexts, ended.values("wrong_values", rank), strict=True)
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> ranks.Ended:
    return ranks.start(tmp_path_factory.mktemp("two"), job(2))


def test_every_rank_measures_itself(two_ranks):
    assert two_ranks.outcome.rc == 0, two_ranks.outcome.stderr
    for rank in (0, 1):
        for precision in ("float32", "bf16"):
            blocks = [c for c in two_ranks.contexts("matmul_tflop_per_s", rank) if c["precision"] == precision]
            assert [c["block"] for c in blocks] == list(range(len(blocks))) and len(blocks) >= 5
            assert {(c["gpu"], c["uuid"], c["shapes"]) for c in blocks} == {(rank, None, "tiny, cut to 256")}
        assert min(two_ranks.values("matmul_tflop_per_s", rank)) > 0
        assert len(two_ranks.values("matmul_drift_pct", rank)) == 2
        copies = two_ranks.values("hbm_copy_gb_per_s", rank)
        assert len(copies) == 5 and min(copies) > 0
        assert two_ranks.ranks[rank][-1]["event"] == "end"
        metrics = {event["metric"] for event in two_ranks.ranks[rank] if event["event"] == "value"}
        assert metrics == {"matmul_tflop_per_s", "matmul_drift_pct", "hbm_copy_gb_per_s", "wrong_values"}


def test_every_result_was_compared_and_right(two_ranks):
    for rank in (0, 1):
        found = checks(two_ranks, rank)
        assert set(found.values()) == {0}
        blocks = {(c["precision"], c["block"]) for c in two_ranks.contexts("matmul_tflop_per_s", rank)}
        assert {key[1:] for key in found if key[0] == "repeated product"} == blocks
        alike = [c for c in two_ranks.contexts("wrong_values", rank) if c["check"] == "same product on all"]
        assert [(c["precision"], c["compared"], c["seed"]) for c in alike] == [("float32", 2, 7), ("bf16", 2, 7)]


def test_nothing_is_suspected_of_a_machine_that_is_not_judged(two_ranks):
    assert suspects(two_ranks, ["a", "b"]) == []


def test_progress_has_every_phase(two_ranks):
    progress = [event for event in two_ranks.ranks[0] if event["event"] == "progress"]
    phases = list(dict.fromkeys(event["phase"] for event in progress))
    assert phases == ["preparing", "matrix products", "copies in memory", "done"]
    assert (progress[0]["done"], progress[-1]["done"]) == (0, progress[-1]["total"])
    (used,) = [event for event in two_ranks.ranks[0] if event["event"] == "used"]
    assert (used["products"], used["rows"], used["precisions"]) == ("tiny, cut to 256", 256, "float32, bf16")


# The lowest bit of one element, in the third block of bf16 on rank 1.
ONCE = """
import os, pathlib, sys
from runner.workloads import __main__ as main
from runner.workloads.gpu import rank

run, blocks = rank.Load.run, []

def wrong(load, precision):
    run(load, precision)
    blocks.append(precision)
    if this_rank == 1 and precision == "bf16" and blocks.count("bf16") == 3:
        load.products[precision][2].bits[5, 6] ^= 1

this_rank = int(os.environ["RANK"])
rank.Load.run = wrong
main.main(pathlib.Path(sys.argv[1]))
"""

# As if one multiplier of rank 1 of three were stuck: it is wrong, and always the same.
ALWAYS = """
import os, pathlib, sys
from runner.workloads import __main__ as main
from runner.workloads.gpu import products

run = products.Product.run

def wrong(product):
    run(product)
    if os.environ["RANK"] == "1":
        product.bits[0, 0] ^= 1

products.Product.run = wrong
main.main(pathlib.Path(sys.argv[1]))
"""


def suspects(ended: ranks.Ended, hosts: list[str]) -> list[Suspect]:
    """What is found in the records of ranks that were on these hosts."""
    base = {"run_id": "r", "cell": "gpu-1n-r1", "test": "gpu", "model": "tiny"}
    base |= {"num_nodes": len(hosts), "world_size": len(hosts), "repeat": 1}
    found = [
        r for host, events in zip(hosts, ended.ranks, strict=True) for r in records.from_events(events, base, host)
    ]
    cell = {"id": "gpu-1n-r1", "num_nodes": len(hosts), "state": "complete", "not_judged": "ranks ran on the CPU"}
    return list(findings.find({}, [cell], {"gpu-1n-r1": found}, {}))


def test_one_bit_of_one_result_is_seen_in_its_block_and_on_its_rank(tmp_path):
    (tmp_path / "once.py").write_text(ONCE)
    ended = ranks.start(tmp_path, job(2), program=[str(tmp_path / "once.py")])
    assert ended.outcome.rc == 0, ended.outcome.stderr
    assert {value for value in checks(ended, 0).values()} == {0}
    wrong = {key: value for key, value in checks(ended, 1).items() if value}
    assert wrong == {("repeated product", "bf16", 2): 1}
    (suspect,) = suspects(ended, ["a", "b"])
    assert (suspect.kind, suspect.host, suspect.observation) == ("gpu_wrong_values", "b", False)
    assert "seed 7" in suspect.evidence


def test_a_rank_that_is_always_wrong_alike_differs_from_the_others(tmp_path):
    (tmp_path / "always.py").write_text(ALWAYS)
    ended = ranks.start(tmp_path, job(3), program=[str(tmp_path / "always.py")])
    assert ended.outcome.rc == 0, ended.outcome.stderr
    wrong = [{key: value for key, value in checks(ended, rank).items() if value} for rank in range(3)]
    assert wrong == [{}, {("same product on all", precision, None): 1 for precision in ("float32", "bf16")}, {}]
    assert [(one.kind, one.host) for one in suspects(ended, ["a", "b", "c"])] == [("gpu_wrong_values", "b")]


def test_a_wrong_word_of_a_copy_is_counted():
    import torch

    from runner.workloads.gpu import copies
    from runner.workloads.gpu.device import Cpu

    class Flipping(Cpu):
        """A device whose last synchronisation finds one word changed."""

        def synchronize(self) -> None:
            for found in targets:
                found[11] = 1

    targets: list[torch.Tensor] = []
    assert copies.within(Cpu(), 1 << 16, 5, seed=3)[1] == 0
    with pytest.MonkeyPatch.context() as patch:
        zeros_like = torch.zeros_like
        patch.setattr(torch, "zeros_like", lambda source: targets.append(zeros_like(source)) or targets[-1])
        rates, wrong = copies.within(Flipping(), 1 << 16, 5, seed=3)
    assert (len(rates), wrong) == (5, 1)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
            "GPU 3 (GPU-1b), copying: CUDA error: an illegal memory access was encountered",
        ),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "GPU 3 (GPU-1b), copying: CUDA out of memory. Tried"),
        ("No CUDA GPUs are available", "GPU 3 (GPU-1b), copying: No CUDA GPUs are available"),
        ("mat1 and mat2 shapes cannot be multiplied", None),  # a fault of ours: with its traceback
    ],
)
def test_an_error_of_cuda_names_the_gpu_and_what_it_did(said, told):
    from runner.errors import InfrastructureError
    from runner.workloads.gpu.device import Gpu

    gpu = Gpu.__new__(Gpu)  # there is none to start
    gpu._name, gpu._others = "GPU 3 (GPU-1b)", "it is used by others: pid 41"
    with pytest.raises(InfrastructureError if told else RuntimeError) as error, gpu.named("copying"):
        raise RuntimeError(said)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(told or said) and (not told or str(error.value).endswith("; " + gpu._others))


def test_the_kernel_says_on_which_node_memory_was_touched():
    from runner.workloads.gpu import numa
    from runner.workloads.gpu.device import touched

    before = os.sched_getaffinity(0)
    for node, cpus in numa.nodes().items():
        with numa.on(cpus):
            words = touched(1 << 22)
        assert int(words.sum()) == 0 and len(words) == 1 << 19
        assert numa.where(words.data_ptr()) in (node, None), "None where /proc has no numa_maps"
    assert os.sched_getaffinity(0) == before


def test_words_of_a_copy_differ_from_each_other_and_with_the_seed():
    import torch

    from runner.workloads.gpu.copies import pattern

    one, other = (pattern(1 << 16, seed, torch.device("cpu")) for seed in (0, 1))
    assert len(set(one.tolist())) == len(one) == 1 << 13
    assert not torch.equal(one, other)


def test_products_of_8_bits_repeat_their_bits_where_this_pytorch_multiplies_them_on_a_cpu():
    import torch

    from runner.workloads.gpu import products

    shape = products.Shape(32, 64, 48, 1)
    try:
        product = products.Repeated(shape, "fp8", torch.device("cpu"), seed=1)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no such product on a CPU: {error}")
    product.run()
    assert product.wrong_values() == 0 and product.result.dtype == torch.bfloat16
    assert product.result.shape == (32, 48) and float(product.result.abs().max()) > 1
    product.bits[3, 4] ^= 1
    assert product.wrong_values() == 1


def test_a_bench_measures_this_machine_and_judges_no_speed(tmp_path, this_machine):
    command = [RUNNER, "bench", "-i", this_machine(), "--model", "tiny", "--test", "gpu"]
    command += ["--set", "gpu.soak_s=0.5", "--results", tmp_path, "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    (cell,) = summary["cells"]
    assert (cell["id"], cell["state"]) == ("gpu-tiny-1n-r1", "complete")
    assert summary["verdict"] == "not_judged" and "CPU" in summary["reason"] and summary["findings"] == []
    assert cell["metrics"]["wrong_values"] == 0 and cell["metrics"]["matmul_bf16_tflop_per_s"] > 0
