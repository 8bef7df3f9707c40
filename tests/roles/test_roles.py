"""What holds for every role: one shape, one source for its variables, and no waivers."""

from __future__ import annotations

import ast
import re
import sys

import pytest
import yaml

from role_modules import ROLES, ROOT
from runner.system import process

PHASES = ("validate", "install", "configure", "verify")


def _yaml(role, file):
    return yaml.safe_load((ROOT / "roles" / role / file).read_text())


def _options(role):
    return _yaml(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"]


@pytest.mark.parametrize("role", ROLES)
def test_the_specification_and_the_defaults_say_the_same(role):
    defaults = {name: value for name, value in (_yaml(role, "defaults/main.yml") or {}).items()}
    specified = {name: option["default"] for name, option in _options(role).items() if "default" in option}
    assert defaults == specified


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_carries_the_roles_name_and_says_what_it_is(role):
    for name, option in _options(role).items():
        assert name.startswith(f"{role}_")
        assert option.get("type") and option.get("description"), name
        assert option.get("required") or "default" in option or option["type"] != "dict", name


@pytest.mark.parametrize("role", ROLES)
def test_the_phases_are_files_in_their_order_with_their_tags(role):
    main = _yaml(role, "tasks/main.yml")
    assert [task["ansible.builtin.import_tasks"] for task in main] == [f"{phase}.yml" for phase in PHASES]
    assert [task["tags"] for task in main] == [[role, phase] for phase in PHASES]
    for phase in PHASES:
        assert (ROOT / "roles" / role / "tasks" / f"{phase}.yml").exists()


@pytest.mark.parametrize("role", ROLES)
def test_what_a_role_configured_is_known_to_the_verification_of_others(role):
    tasks = _yaml(role, "tasks/configure.yml")
    assert tasks[-1]["register"] == f"{role}_configure_result"


def test_modules_run_with_the_interpreter_that_the_inventory_names():
    # Ansible puts ansible_python_interpreter in the place of this line alone, and takes any other literally.
    for path in sorted(ROOT.glob("roles/*/library/*.py")):
        assert path.read_text().startswith("#!/usr/bin/python\n"), path


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_its_scenario_with_a_broken_node(role):
    for file in ("molecule.yml", "prepare.yml", "converge.yml", "side_effect.yml", "tests"):
        assert (ROOT / "molecule" / role / file).exists(), file


def test_remedies_name_commands_that_can_be_pasted():
    # "run the role's phase install" is no command, and would be typed without the inventory in use.
    vague = re.compile(r"run (?:the (?:role|phase)|configure|once with|again\b)")
    for path in sorted([*ROOT.glob("roles/*/library/*.py"), *ROOT.glob("roles/*/*/*.py")]):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(path.read_text()))
                      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))}  # fmt: skip
        found = [text for text in texts if isinstance(text, str) and text not in docstrings and vague.search(text)]
        assert not found, (path, found)


def test_the_readmes_tables_are_those_of_the_specifications():
    outcome = process.run([sys.executable, str(ROOT / "roles" / "readme.py"), "--check"], timeout_s=60)
    assert outcome.rc == 0, outcome.stdout


def test_ansible_lint_finds_nothing_with_the_profile_production():
    argv = [f"{sys.prefix}/bin/ansible-lint", "--offline", "--profile", "production", "--nocolor"]
    outcome = process.run(argv, timeout_s=300, cwd=str(ROOT))
    assert outcome.rc == 0, outcome.stdout
    assert not list(ROOT.glob(".ansible-lint*")), "no waivers"
    waived = process.run(["git", "grep", "-nE", "no" + "qa|skip_" + "ansible_lint", "--", "roles", "playbooks", "molecule", "*.yml"],
                         timeout_s=30, cwd=str(ROOT))  # fmt: skip
    assert not [line for line in waived.stdout.splitlines() if ".py:" not in line]
