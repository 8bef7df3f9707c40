"""`runner tune` and `bench --tune` as they are typed: what would be tried, and a line for each mistake."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from conftest import ROOT
from runner.cli import bench, main, tune
from runner.launch import start
from runner.launch import tune as use_case
from runner.launch.tune import ASKED, MINUTES, PROBES
from runner.plan import tuned as tuning
from runner.results import tuned as results

LOCAL = ("-i", "inventory/local")


@pytest.fixture
def typed(monkeypatch, tmp_path, capsys):
    """(exit code, stdout, stderr) of `runner` with these arguments, in the product's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RUNNER_RESULTS", str(tmp_path / "results"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.run(main.cli, arguments)
        return (code, *capsys.readouterr())

    return run


def test_what_may_be_asked_for_is_what_can_be_tried():
    assert tuple(ASKED) == tune.TRIES
    shown = {option.name: option for option in tune.tune.params}
    assert f"default: {PROBES['cuda']}, on CPUs {PROBES['cpu']}" in shown["probes"].help
    assert shown["minutes"].default == MINUTES


def test_a_dry_run_says_what_would_be_tried_and_writes_nothing(typed, tmp_path):
    code, out, err = typed("tune", *LOCAL, "--model", "tiny", "--dry-run")
    assert (code, err) == (0, "") and not (tmp_path / "results").exists()
    assert out.startswith(f"tune for tiny, cpu, 1 node (2 ranks), 256 tokens, global batch 8: {PROBES['cpu']} probes")
    code, out, _ = typed("tune", *LOCAL, "--model", "tiny", "--dry-run", "--json", "--probes", "3")
    assert code == 0 and len(json.loads(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tune", *LOCAL, "--try", "fp9"), "--try fp9: known: compile, hpz, fp8, quantised, deepcompile"),
        (("tune", *LOCAL, "--try", "fp8"), "--try fp8: FP8 training, on GPUs that have it; not so here"),
        (("tune", *LOCAL, "--model", "tinny"), "did you mean 'tiny'?"),
        (("tune", *LOCAL, "--probes", "0"), "--probes"),
        (("tune", *LOCAL, "--minutes", "0"), "--minutes"),
        (("tune", *LOCAL, "--minutes", "nan", "--dry-run"), "--minutes"),
        (("tune", *LOCAL, "--minutes", "inf", "--dry-run"), "--minutes"),
        (("inventory", "init", "x", "--nic-gbit", "nan"), "--nic-gbit"),
        (("testbed", "up", "--cpus", "inf", "--dry-run"), "--cpus"),
        (("tune", *LOCAL, "--set", "tuned=true", "--dry-run"), "tuned"),
        (("tune", *LOCAL, "--set", "tuned=perhaps", "--dry-run"), "tuned"),
        (("tune", *LOCAL, "--set", "sft.micro_batch=3", "--set", "sft.global_batch=8"), "global batch 8"),
        (("tune", *LOCAL, "--nodes", "2"), "2 nodes asked for"),
        (("bench", *LOCAL, "--test", "torch", "--tune", "--dry-run"), "none of the tests trains a model"),
        (("bench", *LOCAL, "--tune", "--set", "tuned=false", "--dry-run"), "--tune and --set tuned=false exclude"),
        (("bench", "--tune", "--resume", "x"), "omit --tune"),
        (("bench", *LOCAL, "--set", "tuned=perhaps", "--dry-run"), "tuned"),
    ],
)
def test_a_mistake_is_one_line(typed, arguments, said):
    code, out, err = typed(*arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and said in err


def test_bench_with_tune_says_what_it_would_try_first(typed):
    code, out, err = typed("bench", *LOCAL, "--test", "sft", "--tune", "--dry-run")
    assert code == 0 and err.startswith("tune for tiny") and "cell sft-tiny-1n-r1" in out


def test_on_gpus_a_bench_that_nothing_was_tuned_for_names_the_command(typed, tmp_path):
    asked = ("--hosts", "node[001-002]", "--model", "llama-2-7b", "--set", "sft.seq_len=2048", "--set", "sft.steps=3")
    code, out, err = typed("bench", *asked, "--test", "sft", "--dry-run")
    *_, line = out.splitlines()
    named, _, command = line.partition(": ")
    assert (code, err) == (0, "") and named == "not tuned for llama-2-7b, h200-sxm, 2 nodes (16 ranks), 2048 tokens"
    assert command.startswith("runner tune --results ") and "--nodes 2 --model llama-2-7b --hosts" in command
    assert "--set sft.seq_len=2048" in command
    code, out, _ = typed("bench", *asked, "--test", "torch", "--dry-run")
    assert code == 0 and "tune" not in out


def test_bench_with_tune_runs_what_tuning_finds_and_tunes_once(typed, monkeypatch):
    tuned_for, ran = [], []

    def tuned(task, *_):
        tuned_for.append(task)
        request = task.prepared.untuned
        settings = {"sft.micro_batch": 1, "sft.gradient_accumulation": 4, "sft.recompute": "none"}
        probe = results.Probe(settings, results.OK, 900.0, 1000.0, 0.01)
        found = results.Tuned(
            tuning.subject(request), {}, "2026-01-31T12:00:00Z", "runner", 8, settings, 900.0, (probe,)
        )
        return use_case.Ended(found, results.save(task.options.bench.results, found), probe, probe)

    monkeypatch.setattr(use_case, "tune", tuned)
    monkeypatch.setattr(
        start, "start", lambda prepared, _: ran.append(prepared) or SimpleNamespace(run=None, summary={})
    )
    monkeypatch.setattr(bench, "print_conclusion", lambda *_: 0)
    for _ in range(2):
        code, out, err = typed("bench", *LOCAL, "--test", "sft", "--tune")
        assert (code, out) == (0, "")
    assert len(tuned_for) == 1 and len(ran) == 2 and "micro_batch" not in err
    for prepared in ran:
        assert prepared.plan.tuned["settings"]["sft.micro_batch"] == 1 and prepared.plan.cells[0].batch.micro_batch == 1
