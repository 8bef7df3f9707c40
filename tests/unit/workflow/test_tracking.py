"""Where the metrics of a workflow were kept beside its records, and the commands that send and show them."""

from __future__ import annotations

import json
import shlex

import pytest

from runner.launch import agents
from runner.results.rundir import RunDir
from runner.workflow import tracking


@pytest.fixture
def run(tmp_path):
    plan = {"run_id": "20260102-030405-abcd", "cells": [], "nodes": []}
    return RunDir.create(tmp_path / "my results", plan)


def test_the_command_that_sends_what_was_kept_names_each_run(run):
    folders = [
        run.cell(host, cell).path / "wandb" / "offline-run-1-a" for host in ("n1", "n2") for cell in ("ppo", "sft")
    ]
    for folder in folders:
        folder.mkdir(parents=True)
    (run.cell("n1", "ppo").path / "wandb" / "latest-run").symlink_to(folders[0])
    (line,) = tracking.kept(run)
    command = line.partition("to send it: ")[2]
    assert shlex.split(command) == ["wandb", "sync", *sorted(map(str, folders))]


def test_files_for_tensorboard_are_shown_where_all_runs_find_them(run):
    run.cell("n1", "ppo").tensorboard.mkdir(parents=True)
    (line,) = tracking.kept(run)
    assert shlex.split(line.partition("TensorBoard: ")[2]) == ["tensorboard", "--logdir", str(run.path / "nodes")]


def test_a_run_without_either_says_nothing(run):
    run.cell("n1", "ppo").create()
    assert tracking.kept(run) == []


def test_entity_server_and_mode_go_with_the_key_to_the_ranks_and_not_into_plans(monkeypatch):
    values = {
        "WANDB_API_KEY": "k", "WANDB_ENTITY": "lab", "WANDB_MODE": "online", "WANDB_BASE_URL": "https://w", "OTHER": "o",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert agents.secrets([]) == {name: value for name, value in values.items() if name != "OTHER"}


def test_a_run_of_a_workflow_is_finished_by_its_command(run):
    assert run.command == "bench"
    run.write_status({"state": "failed", "cells": {}, "workflow": {"name": "sft-ppo", "asked": {}}})
    assert run.command == "workflow sft-ppo"
    run.status.write_text(json.dumps({"state": "failed", "cells": {}}))
    assert run.command == "bench"
