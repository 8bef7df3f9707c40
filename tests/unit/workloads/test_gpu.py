"""Test `gpu` without a device: what is multiplied, where memory lies, what NVML's answers become, and the metrics."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
from pathlib import Path

import pynvml
import pytest

from conftest import ROOT
from runner.cluster import limits
from runner.errors import UsageError
from runner.launch.spellings import SPELLINGS
from runner.plan import config
from runner.results.records import Record
from runner.workloads.gpu import metrics, numa, products, rank, state
from runner.workloads.job import Events

H200_BYTES = 139 << 30
MODELS = [name for name in config.names("models") if name != "tiny"]


def model(name: str) -> dict:
    return config.load_model(name).model_dump()


# --- products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_products_on_a_gpu_are_those_of_a_forward_pass(name: str) -> None:
    of, shapes = products.on_gpu(model(name), H200_BYTES, ("bf16", "fp8"))
    assert of == name
    weights = sum(shape.inputs * shape.outputs * shape.number for shape in shapes)
    norms = (2 * model(name)["num_layers"] + 1) * model(name)["hidden_size"]
    assert weights == limits.parameters(model(name)).non_embedding - norms
    assert {shape.rows for shape in shapes} <= {products.ON_GPU, 8368, 8192, 4096}, "fewer rows only for wide results"


def test_a_model_that_cannot_load_a_gpu_is_replaced_by_a_square_that_does() -> None:
    of, (square,) = products.on_gpu(model("tiny"), H200_BYTES, ("bf16",))
    assert (square.rows, square.inputs, square.outputs) == (8192, 8192, 8192)
    assert of == "8,192 x 8,192 (tiny is too small)"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("free_gib", [140, 80, 40, 16])
def test_products_take_half_of_the_free_memory_at_most(name: str, free_gib: int) -> None:
    _, shapes = products.on_gpu(model(name), free_gib << 30, ("bf16", "fp8"))
    assert sum(s.bytes(p) for s in shapes for p in ("bf16", "fp8")) <= (free_gib << 30) / 2
    assert all(size % 16 == 0 for s in shapes for size in (s.rows, s.inputs, s.outputs)), "as products of 8 bits ask"


def test_without_memory_there_are_still_products_so_that_cuda_says_what_is_missing() -> None:
    _, shapes = products.on_gpu(model("llama-2-7b"), 0, ("bf16",))
    assert min(shape.rows for shape in shapes) == 16


def test_on_a_cpu_every_product_is_small() -> None:
    _, shapes = products.on_cpu(model("llama-2-70b"))
    assert max(size for s in shapes for size in (s.rows, s.inputs, s.outputs)) == 256


def test_a_block_has_products_by_their_share_and_each_at_least_once() -> None:
    _, shapes = products.on_gpu(model("llama-2-7b"), H200_BYTES, ("bf16",))
    numbers = [shape.number for shape in shapes]
    assert products.repeats(shapes, 0.5, 1.0) == [2 * number for number in numbers]
    assert products.repeats(shapes, 100.0, 1.0) == [1] * len(shapes)


# --- ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "alike", "expected"),
    [
        ([1], [[1]], (False, True)),
        ([1], [[1], [1], [1]], (False, True)),
        ([2], [[1], [1], [2]], (True, True)),
        ([1], [[1], [1], [2]], (False, True)),
        ([1], [[1], [2]], (True, False)),  # nobody can tell which
        ([2], [[1], [2]], (True, False)),
        ([3], [[1], [1], [2], [3]], (True, False)),
    ],
)
def test_a_result_is_odd_that_is_not_that_of_most(
    mine: list[int], alike: list[list[int]], expected: tuple[bool, bool]
) -> None:
    assert rank.odd(mine, alike) == expected


@pytest.mark.parametrize(
    ("values", "drift"),
    [([100.0] * 20 + [90.0] * 5, -10), ([100.0], 0), ([100, 60, 1, 1, 1, 1, 1, 1, 80, 120], 25), ([8, 9, 10], 25)],
)
def test_drift_compares_the_last_fifth_with_the_first(values: list[float], drift: float) -> None:
    assert rank.drift_pct(values) == pytest.approx(drift)


def test_progress_rises_to_its_end_whatever_a_phase_says(tmp_path: Path) -> None:
    events = Events(tmp_path, 0)
    progress = rank.Progress(events, {"preparing": 5.0, "matrix products": 20.0, "copies in memory": 1.0})
    for phase in ("preparing", "matrix products", "copies in memory"):
        progress.enter(phase)
        progress.at(0.5)
        progress.at(3.0)
    progress.enter("")
    events.end()
    lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()[:-1]]
    done = [line["done"] for line in lines]
    assert done == sorted(done) and (done[0], done[-1]) == (0, 260) and {line["total"] for line in lines} == {260}
    assert [line["phase"] for line in lines][-2:] == ["copies in memory", "done"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"soak_s": 1700}, "timeout_s 1800 is too short for soak_s 1700: give 2000"),
        ({"blocks": 4}, "blocks"),
        ({"soak_s": 0}, "soak_s"),
        ({"copy_bytes": "lots"}, "copy_bytes"),
        ({"soak": 5}, "did you mean 'soak_s'"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        config.load_test("gpu", setting)


# --- NUMA -------------------------------------------------------------------------------------------------


def machine(folder: Path, distances: dict[int, str], cpus: dict[int, str]) -> Path:
    for node, text in distances.items():
        (folder / f"node{node}").mkdir(parents=True)
        (folder / f"node{node}" / "distance").write_text(f"{text}\n")
        (folder / f"node{node}" / "cpulist").write_text(f"{cpus[node]}\n")
    return folder


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("7", {7}), ("\n", set()), ("0-1,4-5", {0, 1, 4, 5})]
)
def test_a_list_of_cpus_is_read_as_linux_writes_it(text: str, cpus: set[int]) -> None:
    assert numa.cpus(text) == cpus


def test_a_node_without_a_cpu_for_this_process_is_left_out(tmp_path: Path) -> None:
    """As the memory of a GPU that Linux shows as a node of its own."""
    root = machine(tmp_path, {0: "10 80", 1: "80 10"}, {0: "0-1023", 1: ""})
    assert list(numa.nodes(root)) == [0]


def test_a_machine_that_does_not_say_is_one_node(tmp_path: Path) -> None:
    assert numa.nodes(tmp_path / "none") == {0: os.sched_getaffinity(0)}


@pytest.mark.parametrize(
    ("local", "expected"),
    [(0, [0, 2]), (2, [2, 0]), (3, [3, 0]), (None, [0, 3]), (9, [0, 3])],
    ids=["local", "of the other socket", "its neighbour", "not known", "without CPUs"],
)
def test_memory_is_put_near_the_gpu_and_as_far_from_it_as_there_is(
    tmp_path: Path, local: int | None, expected: list[int]
) -> None:
    rows = {0: "10 12 32 32", 1: "12 10 32 32", 2: "32 32 10 12", 3: "32 32 12 10"}
    root = machine(tmp_path, rows, dict.fromkeys(rows, "0"))
    assert numa.near_and_far(local, dict.fromkeys(rows), root) == expected


def test_a_machine_of_one_node_has_one_place() -> None:
    assert numa.near_and_far(0, {0: set()}) == numa.near_and_far(None, {0: set()}) == [0]
    assert numa.near_and_far(None, {}) == []


MAPS = """\
00400000 default file=/usr/bin/python3.11 mapped=1 N0=1 kernelpagesize_kB=4
7f0000000000 default anon=65536 dirty=65536 active=0 N0=12 N1=65524 kernelpagesize_kB=4
7f0010000000 default file=/dev/nvidiactl
7ffd00000000 default stack anon=9 dirty=9 N0=9 kernelpagesize_kB=4
"""


@pytest.mark.parametrize(
    ("address", "node"),
    [(0x7F0000000000, 1), (0x7F0000123000, 1), (0x7F0010000000, None), (0x400000, 0), (0x1000, None)],
)
def test_the_kernel_says_where_pages_are(address: int, node: int | None) -> None:
    assert numa.holds(address, MAPS) == node


def test_a_device_says_its_node(tmp_path: Path) -> None:
    for name, text in (("0000:18:00.0", "1\n"), ("0000:19:00.0", "-1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(text)
    found = [numa.node_of(name, tmp_path) for name in ("0000:18:00.0", "0000:19:00.0", "0000:20:00.0")]
    assert found == [1, None, None]


# --- NVML -------------------------------------------------------------------------------------------------


def test_every_function_and_constant_of_nvml_that_is_named_exists() -> None:
    source = (ROOT / "runner" / "workloads" / "gpu" / "state.py").read_text()
    tree = ast.walk(ast.parse(source))
    texts = [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = {text for text in texts if re.fullmatch(r"nvml\w+", text)} | set(re.findall(r"pynvml\.(\w+)", source))
    assert len(named) > 15 and [name for name in sorted(named) if not hasattr(pynvml, name)] == []


def test_every_record_of_nvml_is_in_the_reference() -> None:
    source = (ROOT / "runner" / "workloads" / "gpu" / "state.py").read_text()
    yielded = set(re.findall(r'yield "(\w+)"', source)) | set(re.findall(r'^ +\("?(\w+)", "nvml', source, re.MULTILINE))
    yielded |= set(re.findall(r'^ +"(\w+)": self\._read', source, re.MULTILINE)) - {"throttle"}
    yielded |= set(re.findall(r'"(remap\w+)"', source))
    reference = (ROOT / "docs" / "metrics.md").read_text()
    assert len(yielded) > 15 and sorted(name for name in yielded if f"`{name}`" not in reference) == []


def test_the_bits_of_what_keeps_clocks_down_are_nvmls() -> None:
    spelt = {
        reason: f"nvmlClocksEventReason{''.join(word.title() for word in reason.split('_'))}"
        for reason in state.REASONS
    }
    spelt |= {
        "applications_clocks": "nvmlClocksEventReasonApplicationsClocksSetting",
        "display_clocks": "nvmlClocksEventReasonDisplayClockSetting",
        "hw_power_brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    }
    assert {reason: getattr(pynvml, name) for reason, name in spelt.items()} == state.REASONS


def test_samples_become_means_extremes_and_shares() -> None:
    samples = [
        {"sm_clock_mhz": 1980, "temperature_c": 40, "power_w": 600.0, "throttle": 0},
        {"sm_clock_mhz": 1700, "temperature_c": 60, "power_w": 700.0, "throttle": 0x4 | 0x20},
        {"sm_clock_mhz": 1690, "throttle": 0x4},  # a reading that failed once
        {"sm_clock_mhz": 1980, "throttle": 0x4},
    ]
    found = {(metric, *context.values()): value for metric, value, context in state.summarised(samples)}
    assert found["sm_clock_mhz", "mean"] == statistics.fmean([1980, 1700, 1690, 1980])
    assert (found["sm_clock_mhz", "min"], found["temperature_c", "max"], found["power_w", "min"]) == (1690, 60, 600)
    shares = {reason: found["throttle_share_pct", reason] for reason in state.REASONS}
    assert shares == {**dict.fromkeys(state.REASONS, 0), "sw_power_cap": 75, "sw_thermal_slowdown": 25}
    assert list(state.summarised([])) == []


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (state.Before(0.6, 140.0, 0, ()), ""),
        (state.Before(0.6, 140.0, 0, (41, 4711)), "it is used by others: pid 41, 4711"),
        (state.Before(80.2, 140.0, 0, ()), "it is used by others: 80.2 GiB were taken before the start"),
        (state.Before(2.0, 140.0, 37, ()), "it is used by others: it was 37 % busy before the start"),
        (
            state.Before(20.0, 140.0, 37, ()),
            "it is used by others: 20.0 GiB were taken and it was 37 % busy before the start",
        ),
        (state.Before(0.6, 140.0, 1, ()), ""),
        (state.Before(None, None, 37, ()), "it is used by others: it was 37 % busy before the start"),
        (state.Before(None, None, None, ()), ""),
    ],
    ids=[
        "idle",
        "seen",
        "in another container",
        "computes",
        "both",
        "a reading of others",
        "memory is not told",
        "nothing is told",
    ],
)
def test_who_else_uses_a_gpu_is_said(before: state.Before, said: str) -> None:
    assert before.others == said


def kind_of(text: str) -> str:
    return next(each.kind for each in SPELLINGS if each.matches(text))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "cuda_out_of_memory"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.; it is used by others: pid 41", "in_use"),
        ("CUDA error: uncorrectable ECC error encountered; it is used by others: pid 41", "gpu_failed"),
    ],
)
def test_an_error_of_a_gpu_that_is_used_by_others_is_of_that_kind(said: str, kind: str) -> None:
    assert kind_of(f"rank 3: GPU 3 (GPU-1b), multiplying matrices: {said}") == kind


# --- metrics ----------------------------------------------------------------------------------------------

PLAN = {"hardware": {"bf16_peak_tflop_per_s": 1000.0, "fp8_peak_tflop_per_s": None, "hbm_gb_per_s": 5000.0}}


def record(metric: str, value: float, host: str = "a", gpu: int = 0, **context: object) -> Record:
    context = {"gpu": gpu, "uuid": f"GPU-{host}{gpu}", **context}
    return Record("r", "gpu-x-1n-r1", "gpu", "x", 1, 4, 1, metric, value, host, gpu, context)


def measured() -> list[Record]:
    rates = {("a", 0): 700.0, ("a", 1): 710.0, ("b", 0): 705.0, ("b", 1): 600.0}
    records = []
    for (host, gpu), rate in rates.items():
        for block, factor in enumerate((0.99, 1.0, 1.5)):  # the median is the rate, the mean is not
            each = {"host": host, "gpu": gpu, "block": block}
            records.append(record("matmul_tflop_per_s", factor * rate, precision="bf16", **each))
            records.append(record("matmul_tflop_per_s", 2 * factor * rate, precision="fp8", **each))
            records.append(record("hbm_copy_gb_per_s", 4000 * factor, **each))
            for numa_node, local in ((0, True), (1, False)):
                place = {"numa": numa_node, "local": local}
                records.append(record("host_to_device_gb_per_s", factor * (55 if local else 40), **each, **place))
        records.append(record("matmul_drift_pct", -gpu, host, gpu, precision="bf16"))
        records.append(record("power_w", 690 + gpu, host, gpu, statistic="max"))
        records.append(record("power_w", 900, host, gpu, statistic="none"))
        records.append(record("wrong_values", gpu, host, gpu, check="repeated product"))
    records += [record("peer_gb_per_s", rate, "a", 0, source=0, target=t) for t, rate in ((1, 380.0), (2, 20.0))]
    return records


def test_metrics_are_medians_over_gpus_and_the_worst_gpu() -> None:
    found, ceilings = metrics.summarise(PLAN, {"device": "cuda"}, measured())
    assert ceilings == {}
    assert found["matmul_bf16_tflop_per_s"] == 705 and found["matmul_fp8_tflop_per_s"] == 1410
    assert found["matmul_bf16_tflop_per_s_min"] == 600
    assert found["matmul_bf16_tflop_per_s_min_pct_of_median"] == pytest.approx(100 * 600 / 705)
    assert found["matmul_bf16_tflop_per_s_pct_of_peak"] == pytest.approx(70.5)
    assert "matmul_fp8_tflop_per_s_pct_of_peak" not in found, "its peak is not known"
    assert found["hbm_copy_gb_per_s_pct_of_peak"] == 80
    assert (found["host_to_device_gb_per_s"], found["remote_host_to_device_gb_per_s"]) == (55, 40)
    assert (found["peer_gb_per_s"], found["peer_gb_per_s_min"]) == (380, 20)
    assert (found["matmul_drift_pct_min"], found["power_w_max"], found["wrong_values"]) == (-1, 691, 2)


def test_on_a_cpu_nothing_is_a_share_of_a_peak() -> None:
    found, _ = metrics.summarise(PLAN, {"device": "cpu"}, measured())
    assert [name for name in found if "peak" in name] == []
    assert metrics.summarise(PLAN, {"device": "cpu"}, []) == ({}, {}), "what was not measured is absent"


def test_every_metric_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "metrics.md").read_text()
    found, _ = metrics.summarise(
        PLAN | {"hardware": {**PLAN["hardware"], "fp8_peak_tflop_per_s": 2e3}}, {"device": "cuda"}, measured()
    )
    general = {re.sub(r"_min(_pct_of_median)?$", "", name) if "drift" not in name else name for name in found}
    assert sorted(name for name in general if f"`{name}`" not in reference) == []
    assert all(f"`…{end}`" in reference for end in ("_min", "_min_pct_of_median"))
