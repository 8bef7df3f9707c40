"""`runner tune` on this machine, with real ranks: what it finds is what the next bench uses, in plan.json too.

Slow (about a minute on two free cores): each of its three probes and the bench start DeepSpeed in processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.local
RUNNER = Path(sys.executable).with_name("runner")
ASKED = ("--model", "tiny", "--set", "sft.seq_len=64", "--set", "sft.samples=256")


def test_what_tuning_finds_is_what_the_next_bench_uses(tmp_path, this_machine):
    own = ("-i", this_machine(), "--results", tmp_path / "results")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([RUNNER, *arguments, *ASKED, *own], cwd=ROOT, capture_output=True, text=True, timeout=500)

    done = run("tune", "--probes", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [probe["outcome"] for probe in found["probes"]] == ["ok"] * len(found["probes"])
    assert 2 <= len(found["probes"]) <= 3
    assert all(probe["positions_per_s_per_gpu"] > probe["tokens_per_s_per_gpu"] > 0 for probe in found["probes"])
    settings = found["settings"]
    assert settings["sft.micro_batch"] * settings["sft.gradient_accumulation"] * 2 == found["global_batch"] == 8
    assert found["versions"]["packages.torch"] and found["subject"]["hardware"] == "cpu"
    assert all((tmp_path / "results" / probe["run"] / "report.html").is_file() for probe in found["probes"])
    assert Path(found["path"]).is_file() and list((tmp_path / "results" / "tuned").glob("*.begun")) == []

    dry = run("bench", "--test", "sft", "--dry-run")
    named = " ".join(f"{key}={value}" for key, value in settings.items())
    assert f"tuned: {named} (runner tune on {found['created'][:10]})" in dry.stdout

    done = run("bench", "--test", "sft", "--set", "sft.steps=1", "--set", "sft.warmup_steps=0")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((tmp_path / "results" / "latest" / "plan.json").read_text())
    assert plan["tuned"]["settings"] == settings
    [cell] = plan["cells"]
    assert cell["batch"] == {
        "global_batch": 8,
        "micro_batch": settings["sft.micro_batch"],
        "gradient_accumulation": settings["sft.gradient_accumulation"],
    }
    assert cell["params"]["recompute"] == settings["sft.recompute"]
