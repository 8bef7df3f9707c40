"""What a person reads: the list of workflows, and a dry run of each kind."""

from __future__ import annotations

import subprocess

from golden_files import check
from runner.workflow.describe import Work, dry_run, listing
from runner.workflow.stages import WORKFLOWS, Former, inputs, stages_of, steps

EPHEMERAL = range(32768, 61000)
PREPARED = {"environment": "e", "model": "m", "sft-data": "s", "rl-data": "r"}


def test_the_list_of_workflows():
    check("workflow/list.txt", listing())
    for name, stages in WORKFLOWS.items():
        assert f"\n{name}:\n" in f"\n{listing()}"
        assert all(stage.name in listing() for stage in stages)


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
    text = dry_run("sft", decided, {"sft": Work(("node001", "node002"), (("node001", words),))}, (), {}, EPHEMERAL)
    shown = text.partition("   node001: ")[2].partition("\n\n")[0]
    read = subprocess.run(["/bin/sh", "-c", f"printf '%s|' {shown}"], capture_output=True, text=True, check=True).stdout
    assert read == "".join(f"{word}|" for word in words)
