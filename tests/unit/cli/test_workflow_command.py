"""`runner workflow` as it is typed."""

from __future__ import annotations

import json

import pytest

from conftest import ROOT
from runner.cli import main
from runner.workflow.stages import WORKFLOWS


@pytest.fixture
def typed(monkeypatch, tmp_path, capsys):
    """(exit code, stdout, stderr) of `runner workflow` with these arguments, in the product's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RUNNER_RESULTS", str(tmp_path / "results"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.run(main.cli, ["workflow", *arguments])
        return (code, *capsys.readouterr())

    return run


def test_the_list_has_every_workflow_with_what_its_stages_need_and_leave(typed):
    code, out, err = typed("list")
    assert (code, err) == (0, "")
    for name, stages in WORKFLOWS.items():
        assert f"{name}:\n" in out and all(f"  {stage.name}: {stage.summary}\n" in out for stage in stages)
    code, out, _ = typed("list", "--json")
    found = json.loads(out)
    assert list(found) == list(WORKFLOWS)
    assert found["sft-ppo"][1]["needs"] == ["environment", "model", "sft-data"]
