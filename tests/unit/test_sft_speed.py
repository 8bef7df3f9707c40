"""What benchmarks/sft_speed.py makes of its measurements: order, blocks, spread, time, and a page that does not flatter."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from runner.workloads.data import IGNORED
from runner.workloads.sft.data import Batch


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for types
    spec.loader.exec_module(module)
    return module


speed, trainers = loaded("sft_speed"), loaded("sft_speed_trainers")


def ran(*times: float, warmup: int = 1, losses=(), tokens=100, **more):
    """A process whose steps took `times` s, each with 100 tokens in 200 positions."""
    steps = [
        speed.Step(
            started_s=0.0,
            time_s=time_s,
            tokens=tokens,
            positions=200,
            loss=losses[number] if losses else 7.0 - number,
            measured=number >= warmup,
        )
        for number, time_s in enumerate(times)
    ]
    return speed.Process(**{"wall_s": 10.0, "steps": tuple(steps), **more})


def page(**processes):
    model = {"name": "tiny"}
    every = {name.replace("_", "-"): list(value) for name, value in processes.items()}
    return speed.Page("some card", ["About."], model, flop_per_token=1e9, processes=every)


def test_the_second_round_is_the_first_in_reverse():
    assert speed.rounds(["a", "b", "c"]) == [["a", "b", "c"], ["c", "b", "a"]]


@pytest.mark.parametrize(
    ("measured", "sizes"), [(0, []), (1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (7, [2, 2, 3]), (60, [20, 20, 20])]
)
def test_measured_steps_are_three_blocks_and_warm_up_is_in_none(measured, sizes):
    one = ran(9.0, 9.0, *[1.0] * measured, warmup=2)
    assert [len(block) for block in one.blocks] == sizes
    assert one.rates == [pytest.approx(100.0)] * len(sizes)


def test_a_row_has_medians_over_blocks_and_both_spreads():
    first, second = ran(9, 1.0, 1.0, 1.25), ran(9, 0.5, 1.0, 1.0)  # 100, 100, 80 and 200, 100, 100 tokens/s
    found = speed.row("fast", [first, second], None)
    assert found.tokens_per_s == pytest.approx(100) and found.positions_per_s == pytest.approx(200)
    assert found.over_blocks == pytest.approx((200 - 100) / 100), "the process with the larger range"
    assert found.between == pytest.approx(0) and found.apart is None
    assert speed.row("fast", [first], None).between is None
    assert speed.row("fast", [ran(9), speed.Process(1.0, failure="no memory")], None) is None


def test_a_rate_is_tokens_over_seconds_not_a_mean_of_rates():
    steps = ran(9, 1.0, 3.0).blocks
    assert speed.rate([step for block in steps for step in block], "tokens") == pytest.approx(200 / 4)


def test_losses_are_compared_at_every_step_that_both_have():
    assert speed.apart([7.0, 6.0], [7.0, 6.0, 5.0]) == 0
    assert speed.apart([7.0, 6.3], [7.0, 6.0, 5.0]) == pytest.approx(0.05)


def test_what_a_process_takes_leaves_its_search_out():
    first = ran(2, 1, 1, 1, wall_s=25.0, used={"search_s": 8.0})
    assert speed.Cost.of(first, warmup=1, block=1) == speed.Cost(outside_s=12.0, step_s=1.0, warmup=1, block=1)
    assert speed.Cost(12.0, 1.0, 1, 1).seconds(2) == 12 + 1 + 6


COSTS = {
    "reference": speed.Cost(10, 4.0, 1, 2),  # 38 s
    "trl": speed.Cost(10, 2.0, 1, 2),  # 24 s
    "fast": speed.Cost(10, 1.0, 1, 2),  # 17 s
}


@pytest.mark.parametrize(
    ("left_s", "expected"),
    [
        (79, {"reference": 2, "trl": 2, "fast": 2}),
        (78, {"reference": 1, "trl": 2, "fast": 2}),
        (61, {"reference": 1, "trl": 1, "fast": 2}),
        (58, {"reference": 1, "trl": 1, "fast": 1}),
        (57, {"trl": 1, "fast": 1}),
        (31, {"fast": 1}),
        (13, {}),
    ],
)
def test_time_that_is_short_costs_steps_and_then_the_least_important_arms(left_s, expected):
    assert speed.fitting(COSTS, left_s) == expected


def test_the_page_has_ratios_shares_and_reasons():
    text = page(
        fast=[
            ran(
                9, 0.1, 0.1, 0.1, matmul_tflop_per_s=2.0, gpu_util_pct=97.0, peak_gib=30.0, used={"attention": "varlen"}
            )
        ]
        * 2,
        fast_fp8=[speed.Process(1.0, failure="out of | GPU memory\nmore")],
        trl=[ran(9, 0.2, 0.2, 0.2)],
        stock=[ran(9, 1.0, 1.0, 1.0)],
    ).text()
    rows = {
        line.split("`")[1]: [part.strip() for part in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    }
    assert rows["fast"] == [
        *("varlen", "1,000", "0.0, 0.0", "10.00", "2.00", "50.0", "2,000", "97", "30.0", "7.0000 → 4.0000", "0.000"),
    ]
    assert rows["fast-fp8"] == ["out of / GPU memory more", *["–"] * 10]
    assert rows["trl"][2:5] == ["0.0, –", "5.00", "1.00"]
    assert rows["stock"][-1] == "–", "its batches are its own"
    assert rows["trl"][-1] == "0.000"
    assert "- Result: no fault." in text


def test_what_was_left_out_is_said():
    short = page(fast=[ran(9, 0.1, 0.1, 0.1)], trl=[])
    short.left_out["fast"].append("no time was left for its process of round 2")
    short.left_out["trl"].append("no time was left for its process of round 1")
    assert "- `fast`: no time was left for its process of round 2." in short.text()
    assert "| `trl` | no time was left for its process of round 1 |" in short.text()


def test_a_wide_spread_is_said():
    assert "The spread of `fast` is above 5%" in page(fast=[ran(9, 1.0, 1.0, 1.1)]).text()
    assert "spread of" not in page(fast=[ran(9, 1.0, 1.0, 1.01)]).text()


GOOD = ran(9, 1, 1, 1, losses=(7.6, 7.2, 6.9, 6.7))


@pytest.mark.parametrize(
    ("processes", "fault"),
    [
        ({"fast": [GOOD], "reference": [GOOD]}, None),
        ({"fast": [ran(9, 1, 1, 1, losses=(7.6, 7.2, 6.9, 6.72))], "reference": [GOOD]}, None),
        ({"fast": [GOOD, ran(9, 1, 1, 1, losses=(7.6, 7.2, 6.9, 6.74))], "reference": [GOOD]}, "`fast`: its losses are 0.60 % apart"),
        ({"fast": [ran(9, 1, 1, 1, losses=(7.6, 7.2, 6.9, math.nan))], "reference": [GOOD]}, "`fast`: its losses are nan % apart"),
        ({"fast": [GOOD], "trl": [ran(9, 1, 1, 1, losses=(7.6, 7.2, 6.9, 6.6))]}, "`trl`: its losses are 1.49 % apart"),
        ({"fast": [GOOD], "trl": [ran(9, 1, 1, 1, losses=(7.6, 7.2, 6.9, 6.7), tokens=99)]}, "`trl`: its steps have other tokens"),
        ({"fast": [GOOD], "stock": [ran(9, 1, 1, 1, losses=(7.6, 7.6, 7.6, 7.6), tokens=9)]}, None),
        ({"fast": [speed.Process(1.0, failure="no memory")]}, "`fast`: not measured"),
        ({"trl": [GOOD]}, None),
    ],
)  # fmt: skip
def test_other_losses_other_data_and_no_product_are_faults(processes, fault):
    found = page(**processes)
    assert found.faults() == ([fault] if fault else [])
    assert f"- Result: {fault or 'no fault'}." in found.text()


def test_steps_that_a_killed_process_did_not_finish_are_left_out(tmp_path: Path):
    def value(metric, value, **context):
        return {"event": "value", "rank": 0, "time_s": 1.0, "metric": metric, "value": value, "context": context}

    events = [{"event": "used", "rank": 0, "time_s": 1.0, "attention": "sdpa"}, value("matmul_tflop_per_s", 700.0)]
    for step in (0, 1):
        context = {"step": step, "measured": step > 0}
        events.append(value("step_time_s", 0.5, started_s=10.0, **context))
        events += [value(metric, 3, **context) for metric in ("tokens", "loss_tokens", "positions")]
        events += [value("loss", 7.0, **context)] if step == 0 else []
    (tmp_path / "rank0.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert speed.read(tmp_path) == {
        "used": {"attention": "sdpa"},
        "matmul_tflop_per_s": 700.0,
        "steps": (speed.Step(10.0, 0.5, 3, 3, 7.0, False),),
    }
    assert speed.read(tmp_path / "nothing") == {"steps": ()}


def test_arms_are_in_their_order_and_a_misspelt_one_is_named(capsys):
    assert speed.parse(["--arms", "trl, fast"]).arms == ["fast", "trl"]
    with pytest.raises(SystemExit):
        speed.parse(["--arms", "fats"])
    assert "unknown arm 'fats'; known: fast, fast-fp8, trl" in capsys.readouterr().err


def test_a_packed_sequence_becomes_its_samples_without_padding():
    ids = np.array([[5, 6, 7, 8, 9, 0, 0]], np.int32)
    labels = np.array([[IGNORED, 6, IGNORED, IGNORED, 9, IGNORED, IGNORED]], np.int32)
    positions = np.array([[0, 1, 0, 1, 2, 0, 1]], np.int32)
    assert trainers.samples_of(Batch(ids, labels, positions, tokens=5, longest=7)) == [
        {"input_ids": [5, 6], "labels": [IGNORED, 6]},
        {"input_ids": [7, 8, 9], "labels": [IGNORED, IGNORED, 9]},
    ]
    full = Batch(ids[:, :5], labels[:, :5], positions[:, :5], tokens=5, longest=7)
    assert [len(sample["input_ids"]) for sample in trainers.samples_of(full)] == [2, 3]


def test_samples_for_a_gpu_are_as_long_as_instruction_data(tmp_path):
    file = tmp_path / "conversations.jsonl"
    speed.write_conversations(file, 512)
    samples = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert len(samples) == 512
    for messages in samples:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    prepared = speed.prepare(str(file), seq_len=1024, cache_dir=tmp_path / "cache")
    assert prepared.manifest["n_samples"] == 512
    assert prepared.manifest["n_tokens"] / 512 == pytest.approx(180, rel=0.1)
    other = tmp_path / "again.jsonl"
    speed.write_conversations(other, 512)
    assert other.read_text() == file.read_text(), "the same on every machine"


@pytest.mark.parametrize(
    ("device", "trainer", "global_batch", "expected"),
    [
        ("cpu", "padded", 8, ["4 with sdpa", "2 with sdpa", "1 with sdpa", "8 with sdpa"]),
        ("cpu", "trl", 8, ["2 with sdpa", "1 with sdpa"]),
        ("cpu", "padded", 6, ["3 with sdpa", "6 with sdpa", "2 with sdpa", "1 with sdpa"]),
        ("cuda", "padded", 32, ["4 with sdpa", "2 with sdpa", "1 with sdpa", "8 with sdpa"]),
    ],
)
def test_a_search_tries_micro_batches_that_divide_the_global_batch(device, trainer, global_batch, expected):
    assert [str(choice) for choice in trainers.candidates(device, trainer, global_batch)] == expected


def test_packing_on_a_gpu_takes_flash_attention_where_it_is_installed(monkeypatch):
    packages = {"flash_attn"}
    monkeypatch.setattr(trainers.importlib.util, "find_spec", lambda name: name in packages or None)
    assert trainers.attentions("cuda", "trl") == ["flash_attention_2"]
    packages.clear()
    assert trainers.attentions("cuda", "trl") == ["flex_attention", "sdpa"]
    assert trainers.attentions("cuda", "padded") == ["sdpa"]
