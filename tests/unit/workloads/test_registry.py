"""The registry of tests: each row's modules exist and offer what they must, and it is light enough for ranks and `--help`."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from runner.cli.bench import bench
from runner.errors import UsageError
from runner.plan import config
from runner.report.sections import Section
from runner.workloads.registry import TESTS, MetricsModule, RankModule, TrainingMetricsModule, offered, trains, usual


@pytest.mark.parametrize("name", TESTS)
def test_the_modules_of_a_row_exist_and_take_what_they_are_given(name):
    test = TESTS[name]
    assert test.load_settings().model_fields["timeout_s"]
    training = [(test.load_training_metrics(), TrainingMetricsModule)] if test.trains else []
    for module, interface in ((test.load_rank(), RankModule), (test.load_metrics(), MetricsModule), *training):
        for function in (f for f in vars(interface) if not f.startswith("_")):
            wanted = list(inspect.signature(getattr(interface, function)).parameters)[1:]
            assert list(inspect.signature(getattr(module, function)).parameters) == wanted


@pytest.mark.parametrize("name", TESTS)
def test_the_report_module_of_a_row_has_every_part_of_a_section(name):
    module = __import__(TESTS[name].report, fromlist=["_"])
    parts = {*Section.__annotations__, *(n for n, value in vars(Section).items() if inspect.isfunction(value))}
    assert {part for part in parts if not part.startswith("_")} <= set(vars(module))


def test_every_test_has_its_file_of_settings_and_a_line_in_the_help():
    assert set(config.names("tests")) == set(offered())
    (option,) = [p for p in bench.params if p.name == "tests"]
    assert all(f"{name}: {TESTS[name].summary}" in option.help for name in offered())


@pytest.mark.parametrize("name", [name for name in TESTS if name not in offered()])
def test_a_stage_of_a_workflow_is_no_test_that_a_user_asks_for(name):
    (option,) = [p for p in bench.params if p.name == "tests"]
    assert f"{name}:" not in option.help and name not in [
        each.value for each in option.shell_complete(bench.make_context("bench", []), "rl")
    ]
    with pytest.raises(UsageError, match=f"unknown test '{name}'"):
        config.load_test(name, {})
    with pytest.raises(UsageError, match=f"unknown section '{name}'"):
        config.parse_settings([f"{name}.timeout_s=1"])
    assert name not in usual()


def test_defaults_are_settings_of_their_test():
    for test in TESTS.values():
        assert {key for values in test.defaults.values() for key in values} <= set(test.load_settings().model_fields)


def test_a_test_that_only_another_version_has_does_not_train():
    assert [name for name in (*TESTS, "other") if trains(name)] == ["sft"]


def test_the_registry_loads_neither_a_checker_nor_a_test():
    heavy = (
        "pydantic",
        "torch",
        "yaml",
        "jinja2",
        "runner.report",
        "runner.workloads.sft",
        "runner.workloads.collectives",
        "runner.workloads.rl.settings",
    )
    code = f"import sys, runner.workloads.registry; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
