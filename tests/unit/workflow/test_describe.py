"""What a person reads: the list of workflows, and a dry run of each kind."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from golden_files import check
from runner.plan.engines import ray
from runner.workflow.describe import Work, dry_run, listing
from runner.workflow.parallelism import split
from runner.workflow.stages import WORKFLOWS, Former, Program, inputs, stages_of, steps, submissions
from runner.workflow.verl import PROFILES, Training, command, merge

EPHEMERAL = range(32768, 61000)
HOSTS = ("node001", "node002")
PYTHON = "/opt/shakedown/env-cpu-smoke/bin/python"
PREPARED = {"environment": "e", "model": "m", "sft-data": "s", "rl-data": "r"}
ASKED = Training(
    model="/d/tiny", train="/d/train.parquet", val=None, folder="/r/checkpoints", nodes=2, gpus_per_node=1,
    split=split(2, 1), profile=PROFILES["cpu-smoke"], project="arithmetic", experiment="r1", batch=8, mini_batch=4,
    micro_batch=2, steps=2, save_every=2, recompute=False,
)  # fmt: skip


def works(ports_of):
    grant, ports = ray.Grant(2, 1), ray.in_order(ports_of or "0", EPHEMERAL)[0]
    rl = replace(ASKED, model="/r/sft-model")
    return {
        "prepare": Work(notes=("environment cpu-smoke, model tiny, data arithmetic",)),
        "sft": Work(HOSTS, (("each rank", tuple(command(Program.SFT, PYTHON, ASKED))),)),
        "merge-sft": Work(HOSTS[:1], (("node001", tuple(merge(PYTHON, "/r/c/global_step_2", "/r/sft-model", "fsdp2"))),)),
        "ppo": Work(
            HOSTS,
            (
                ("node001", tuple(ray.head(PYTHON, "10.0.0.1", ports, grant, "r1/ppo"))),
                ("node002", tuple(ray.worker(PYTHON, "10.0.0.2", ports, grant, ray.endpoint("10.0.0.1", ports["gcs"])))),
                ("once, on the head", tuple(command(Program.PPO, PYTHON, rl))),
            ),
            on_ray=True,
            ports_of=ports_of,
        ),
    }  # fmt: skip


def test_the_list_of_workflows():
    check("workflow/list.txt", listing())
    for name, stages in WORKFLOWS.items():
        assert f"\n{name}:\n" in f"\n{listing()}"
        assert all(stage.name in listing() for stage in stages)


@pytest.mark.parametrize(
    ("name", "ports_of", "one"), [("ssh", "r1/ppo-2n/1", False), ("slurm", None, False), ("slurm-one", None, True)]
)
def test_a_dry_run(name, ports_of, one):
    decided = steps(stages_of("sft-ppo"), inputs("sft-ppo", {}, PREPARED), {})
    jobs = () if ports_of else submissions(decided, one)
    scripts = {} if ports_of else {"sft.sbatch": "#!/bin/bash\nexit 0\n"}
    check(f"workflow/dry-run-{name}.txt", dry_run("sft-ppo", decided, works(ports_of), jobs, scripts, EPHEMERAL))


def test_a_dry_run_of_what_is_left_says_why_of_each_stage():
    now = inputs("sft-ppo", {}, PREPARED)
    former = {name: Former("complete", made, artefact=True) for name, made in now.items()}
    former["ppo"] = Former("incomplete", now["ppo"], checkpoint="global_step_40")
    text = dry_run("sft-ppo", steps(stages_of("sft-ppo"), now, former), {}, (), {}, EPHEMERAL)
    assert "2. sft: keep (complete, and nothing has changed)" in text
    assert "4. ppo: continue (incomplete, from global_step_40)" in text
    assert "5. merge-ppo: run (made anew: ppo-checkpoint)" in text


def test_a_command_that_is_shown_can_be_pasted():
    words = ("/e/my python", "-m", "x", "a.b='it\\'s'", "c=$HOME")
    decided = steps(stages_of("sft"), inputs("sft", {}, PREPARED), {})
    text = dry_run("sft", decided, {"sft": Work(HOSTS, (("node001", words),))}, (), {}, EPHEMERAL)
    shown = text.partition("   node001: ")[2].partition("\n\n")[0]
    read = subprocess.run(["/bin/sh", "-c", f"printf '%s|' {shown}"], capture_output=True, text=True, check=True).stdout
    assert read == "".join(f"{word}|" for word in words)
