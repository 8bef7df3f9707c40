"""Test `torch` on real ranks over gloo: what is measured, what it is called, and that wrong results are seen."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ranks
from runner.cluster.limits import busbw_factor
from runner.workloads.collectives import copies
from runner.workloads.collectives import rank as collectives
from runner.workloads.job import Events

pytestmark = pytest.mark.local

ALL = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "ping_pong", "barrier"]
PARAMS = {
    "collectives": ALL,
    "min_bytes": 8,
    "max_bytes": 65536,
    "factor": 64,
    "warmup": 1,
    "iters": 5,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> ranks.Ended:
    return ranks.start(tmp_path_factory.mktemp("two"), ranks.job("torch", 2, PARAMS))


def test_each_collective_is_measured_at_each_size(two_ranks):
    assert two_ranks.outcome.rc == 0, two_ranks.outcome.stderr
    measured = [(c["collective"], c["size_bytes"]) for c in two_ranks.contexts("latency_us_p50")]
    sizes = [8, 512, 32768, 65536]
    assert measured == [(name, size) for name in ALL[:-1] for size in sizes] + [("barrier", 0)]
    assert all(c["iters"] == 5 and c["dtype"] == "float32" for c in two_ranks.contexts("latency_us_p50"))


def test_results_are_right_and_a_barrier_has_no_bandwidth(two_ranks):
    assert two_ranks.values("wrong_values") == [0] * 28
    assert "barrier" not in {c["collective"] for c in two_ranks.contexts("busbw_gb_per_s")}


def test_bandwidths_follow_from_the_median_time(two_ranks):
    context = two_ranks.contexts("algbw_gb_per_s")
    for where, algbw, busbw in zip(
        context, two_ranks.values("algbw_gb_per_s"), two_ranks.values("busbw_gb_per_s"), strict=True
    ):
        p50 = two_ranks.values("latency_us_p50")[context.index(where)]
        assert algbw == pytest.approx(where["size_bytes"] / (p50 * 1e-6) / 1e9)
        assert busbw == pytest.approx(algbw * busbw_factor(where["collective"], 2))


def test_p99_is_not_below_the_median(two_ranks):
    assert all(
        a <= b for a, b in zip(two_ranks.values("latency_us_p50"), two_ranks.values("latency_us_p99"), strict=True)
    )


def test_one_rank_emits_values_and_every_rank_ends(two_ranks):
    assert two_ranks.values("latency_us_p50", rank=1) == []
    assert [events[-1]["event"] for events in two_ranks.ranks] == ["end", "end"]
    progress = [e for e in two_ranks.ranks[0] if e["event"] == "progress"]
    assert progress[0]["done"] == 0 and progress[-1]["done"] == progress[-1]["total"] == 29


def test_a_rank_alone_measures_its_own_copies_and_no_collective(tmp_path):
    ended = ranks.start(tmp_path, ranks.job("torch", 1, PARAMS))
    assert ended.outcome.rc == 0, ended.outcome.stderr
    values = [e for e in ended.ranks[0] if e["event"] == "value"]
    context = {"size_bytes": 65536, "iters": 5}
    assert [(e["metric"], e["context"]) for e in values] == [
        ("copy_gb_per_s", context),
        ("wrong_values", {"collective": "copy", **context}),
    ]
    assert values[0]["value"] > 0 and values[1]["value"] == 0
    progress = [(e["done"], e["total"]) for e in ended.ranks[0] if e["event"] == "progress"]
    assert progress == [(0, 1), (1, 1)] and ended.ranks[0][-1]["event"] == "end"


CORRUPTING = """
import dataclasses, json, pathlib, sys
import torch, torch.distributed as dist
from runner.workloads.collectives import rank as c

dist.init_process_group("gloo")
counts = {{}}
world = c.World(dist.get_rank(), 2, torch.device("cpu"), torch.float32, far_rank=1)
for name, share in c.schedule({names}, [4096], world):
    operation = c._BUILDERS[name](world, share)
    def wrong(operation=operation):
        operation.run()
        if world.rank == 1:
            operation.output[7] += 1
    _, counts[name] = c.measure(dataclasses.replace(operation, run=wrong), 1, 2, world)
pathlib.Path(sys.argv[1], f"counts{{world.rank}}").write_text(json.dumps(counts))
dist.destroy_process_group()
"""


def test_one_element_corrupted_on_one_rank_is_counted_by_all(tmp_path):
    names = ALL[:-1]
    (tmp_path / "corrupting.py").write_text(CORRUPTING.format(names=names))
    ended = ranks.start(tmp_path, ranks.job("torch", 2, {}), program=[str(tmp_path / "corrupting.py")])
    assert ended.outcome.rc == 0, ended.outcome.stderr
    # Seen in the check before timing and in the one after it, and known to both ranks.
    for rank in (0, 1):
        assert json.loads((tmp_path / f"counts{rank}").read_text()) == dict.fromkeys(names, 2)


# ---- without ranks ----


def world(rank: int, size: int, dtype: str) -> collectives.World:
    import torch

    return collectives.World(rank, size, torch.device("cpu"), getattr(torch, dtype), far_rank=1)


def test_nan_and_a_wrong_sign_are_wrong_values():
    import torch

    expected = torch.tensor([1.0, 2.0, 3.0])
    output = torch.tensor([1.0, float("nan"), -3.0])
    operation = collectives.Operation("broadcast", 12, lambda: None, lambda: None, output, expected)
    assert operation.wrong_values() == 2


@given(
    size=st.sampled_from([1, 2, 8, 64, 128]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    start=st.integers(0, 1000),
    count=st.integers(1, 600),
)
def test_contributions_are_exact_and_cut_from_one_sequence(size, dtype, start, count):
    import torch

    place = world(0, size, dtype)
    parts = [collectives.pattern(place, rank, start, count) for rank in range(size)]
    exact = sum(part.to(torch.int64) for part in parts)
    assert torch.equal(sum(parts[1:], parts[0]).to(torch.int64), exact)
    assert all(part.numel() == count and part.dtype == place.dtype for part in parts)
    whole = collectives.pattern(place, size - 1, 0, start + count)
    assert torch.equal(whole[start:], parts[-1])
    if size > 1 and count > 1:
        assert not torch.equal(parts[0], parts[1])
        assert len(set(parts[0].tolist())) > 1


@pytest.mark.gpu
def test_a_gpu_alone_copies_within_itself_and_to_and_from_its_host(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU on this machine")
    ended = ranks.start(tmp_path, ranks.job("torch", 1, {**PARAMS, "max_bytes": 2**30}, device="cuda"))
    assert ended.outcome.rc == 0, ended.outcome.stderr
    sizes = {"copy_gb_per_s": 2**30, "host_to_device_gb_per_s": 2**28, "device_to_host_gb_per_s": 2**28}
    assert {name: ended.contexts(name)[0]["size_bytes"] for name in sizes} == sizes
    assert ended.values("wrong_values") == [0, 0, 0]
    copy, there, back = (ended.values(name)[0] for name in sizes)
    assert copy > there > 0 and copy > back > 0


def test_a_copy_counts_what_it_reads_and_writes_and_its_wrong_bytes(tmp_path):
    import torch

    cpu = torch.device("cpu")
    operation = copies._operation("copy", 1000, cpu)
    assert copies._wrong_bytes(operation, False) == 1000  # until it is copied
    times_us, wrong = copies.measure(operation, 1, 3, cpu)
    assert len(times_us) == 3 and wrong == 0

    def spoil() -> None:
        operation.run()
        operation.output[7] += 1

    assert copies.measure(dataclasses.replace(operation, run=spoil), 1, 3, cpu)[1] == 2  # seen before and after
    events = Events(tmp_path, 0)
    copies.emit(events, "copy", 1000, [4.0, 1.0, 2.0], 0)
    copies.emit(events, "host_to_device", 1000, [2.0], 0)
    events.end()
    rates = [json.loads(line)["value"] for line in (tmp_path / "rank0.jsonl").read_text().splitlines() if "_gb" in line]
    assert rates == [1.0, 0.5]


@pytest.mark.parametrize(("free_gib", "size_gib"), [(64, 8), (20, 4), (0.5, 0.125)])
def test_a_copy_is_halved_until_it_fits_on_the_gpu(free_gib, size_gib):
    host = min(size_gib, 0.25)
    expected = {"copy": size_gib, "host_to_device": host, "device_to_host": host}
    found = copies.sizes(8 * 2**30, int(free_gib * 2**30))
    assert {name: size / 2**30 for name, size in found.items()} == expected


@given(low=st.integers(1, 10**6), ratio=st.integers(1, 10**6), factor=st.integers(2, 64))
def test_sizes_rise_from_the_first_to_exactly_the_last(low, ratio, factor):
    sizes = collectives.message_sizes(low, low * ratio, factor)
    assert (sizes[0], sizes[-1]) == (low, low * ratio)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= math.log(ratio, factor) + 2.001


def test_a_size_is_a_whole_number_of_elements_for_each_rank():
    todo = collectives.schedule(["all_gather", "all_reduce", "barrier"], [8, 16, 100, 4096], world(0, 8, "float32"))
    # all_gather: 8, 16 and 32 bytes are all one element a rank, and are measured once.
    gathers = [("all_gather", share) for share in (1, 3, 128)]
    assert todo == [*gathers, *[("all_reduce", share) for share in (2, 4, 25, 1024)], ("barrier", 0)]
