"""benchmarks/gpu.py: its limits, and pages that say what happened."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from runner.system import process

SCRIPT = ROOT / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    if gpu.sampler.gpu_names():
        pytest.skip("this machine has a GPU")
    ended = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.startswith("gpu: NVML finds no GPU on this machine; --cpu ")
    assert ended.stdout == "" and not list(tmp_path.iterdir())


def test_a_part_ends_at_its_limit_with_what_it_started_and_keeps_what_it_said():
    slow = "import subprocess, sys; print('so far', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    rc, stdout = gpu.run([sys.executable, "-c", slow], 1.0)
    assert time.monotonic() - began < 30, "what it started held its output open"
    assert (rc, stdout) == (None, "so far\n")
    assert gpu.ending(rc, stdout, 1.0) == "Ended after 1 s, the time that it had."
    assert gpu.run([sys.executable, "-c", "print(1); raise SystemExit(3)"], 30) == (3, "1\n")


def test_the_outcome_of_every_test_is_a_row(tmp_path):
    outcomes = tmp_path / "outcomes.xml"
    assert gpu.rows_of_tests(outcomes) == []
    outcomes.write_text(
        '<testsuites><testsuite><testcase name="good" time="1.25"/>'
        '<testcase name="bad" time="0.1"><failure message="assert 1 | 2&#10;more">text</failure></testcase>'
        '<testcase name="off" time="0"><skipped message="no NVLink"/></testcase></testsuite></testsuites>'
    )
    assert gpu.rows_of_tests(outcomes) == [
        "| `good` | passed | 1.2 |",
        "| `bad` | failure: assert 1 / 2 more | 0.1 |",
        "| `off` | skipped: no NVLink | 0.0 |",
    ]


def test_a_bench_is_told_as_what_it_used_expected_and_measured():
    cell = {
        "state": "complete",
        "world_size": 1,
        "used": {"attention": "varlen"},
        "metrics": {"mfu": 0.5123, "tokens_per_s": 9478.3},
    }
    planned = {
        "batch": {"global_batch": 16, "micro_batch": 2, "gradient_accumulation": 8},
        "expected": {"tokens_per_s_per_gpu": 10820.0},
    }
    summary = {"cells": [cell], "verdict": "fail", "reason": "gpu-utilisation"}
    assert gpu.rows_of_bench(summary, {"cells": [planned]}) == [
        "| what | value |",
        "| --- | ---: |",
        "| state | complete |",
        "| batch | 16 = 2 × 8 × 1 |",
        "| used: attention | varlen |",
        "| positions/s that the plan expected | 10,820 |",
        "| tokens_per_s | 9,478 |",
        "| mfu | 0.5123 |",
        "",
        "Verdict: fail (gpu-utilisation).",
    ]


def test_test_gpu_is_told_as_all_that_it_measured_and_found(tmp_path, monkeypatch):
    cell = {"state": "complete", "used": {"products": "llama-2-7b"}, "metrics": {"matmul_bf16_tflop_per_s": 731.234}}
    finding = {"kind": "throttled", "evidence": "GPU 0: hot\n(87 °C)"}
    summary = {
        "cells": [cell],
        "verdict": "fail",
        "findings": [finding],
        "observations": [{**finding, "kind": "slow_gpu"}],
    }
    monkeypatch.setattr(gpu, "run", lambda argv, limit_s: (1, json.dumps(summary)))
    text, good = gpu.alone("llama-2-7b", ["gpu.soak_s=5"], 60.0, tmp_path)
    assert good and text.splitlines() == [
        "    runner bench -i inventory/local --model llama-2-7b --test gpu --json --set gpu.soak_s=5",
        "",
        "| what | value |",
        "| --- | ---: |",
        "| state | complete |",
        "| used: products | llama-2-7b |",
        "| matmul_bf16_tflop_per_s | 731.23 |",
        "",
        "- throttled: GPU 0: hot (87 °C)",
        "- slow_gpu: GPU 0: hot (87 °C)",
    ]
    monkeypatch.setattr(gpu, "run", lambda argv, limit_s: (3, '{"error": {"message": "node001 is in use"}}'))
    text, good = gpu.alone("llama-2-7b", [], 60.0, tmp_path)
    assert not good and text.endswith('Exit code 3: {"error": {"message": "node001 is in use"}}.\n')
    monkeypatch.setattr(gpu, "run", lambda argv, limit_s: (None, ""))
    text, good = gpu.alone("llama-2-7b", [], 60.0, tmp_path)
    assert not good and text.endswith("No summary. Ended after 60 s, the time that it had.\n")


def test_a_model_that_does_not_fit_is_told_and_followed_by_the_next(tmp_path, monkeypatch):
    cell = {"state": "complete", "world_size": 1, "metrics": {}}
    (tmp_path / "latest").mkdir()
    planned = {"batch": {"global_batch": 16, "micro_batch": 2, "gradient_accumulation": 8}}
    (tmp_path / "latest" / "plan.json").write_text(json.dumps({"cells": [planned]}))
    states = {"middle": "failed", "small": "complete"}

    def plan(argv, timeout_s):
        return process.Outcome(tuple(argv), 2 if "large" in argv else 0, 0.1, "", "runner: large does not fit")

    def ran(argv, limit_s):
        cells = [{**cell, "state": states[argv[argv.index("--model") + 1]]}]
        findings = [{"evidence": "out of GPU memory\nwith 2"}] if cells[0]["state"] == "failed" else []
        return 0, json.dumps({"cells": cells, "verdict": "not_judged", "findings": findings})

    monkeypatch.setattr(gpu.process, "run", plan)
    monkeypatch.setattr(gpu, "run", ran)
    models = [("large", 16), ("middle", 16), ("small", 16)]
    text, good = gpu.bench(models, 200.0, tmp_path)
    assert good and text.startswith("runner: large does not fit\n")
    assert (
        "--model middle" in text
        and "Its cell is failed: out of GPU memory with 2\n" in text
        and "| state | complete |" in text
    )
    text, good = gpu.bench(models, 50.0, tmp_path)
    assert not good and text == "runner: large does not fit\n", "no time for another"


def test_the_command_on_the_page_can_be_typed():
    argv = [
        "/usr/bin/python3",
        "-m",
        "runner.cli.main",
        "bench",
        "-i",
        f"{ROOT}/inventory/local",
        "--results",
        "/tmp/x",
        "--json",
    ]
    assert gpu.command_line(argv) == "runner bench -i inventory/local --json"


@pytest.mark.parametrize(
    ("card", "part"),
    [("NVIDIA H200", "nvidia-h200"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("CPU", "cpu")],
)
def test_a_page_is_named_after_the_card(card, part):
    assert gpu.slug(card) == part
