"""Rules of the house that no other tool checks, read from the syntax trees of runner/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.cluster.backends import BACKENDS
from runner.plan.engines.registry import ENGINES
from runner.workloads.registry import TESTS

RUNNER = Path(__file__).parents[2] / "runner"


def trees() -> Iterator[tuple[str, ast.Module]]:
    """(path below runner/, syntax tree) of every module."""
    for path in sorted(RUNNER.rglob("*.py")):
        yield str(path.relative_to(RUNNER)), ast.parse(path.read_text(encoding="utf-8"))


# --- what depends on a test, an engine or a backend asks its row, never what it is called -----------------------

REGISTRIES = {"workloads/registry.py": TESTS, "plan/engines/registry.py": ENGINES, "cluster/backends.py": BACKENDS}
# The same word for something else.
ALIKE = {
    "'slurm' in overrides": "a section of --set",
    "values.ansible_connection != 'local'": "Ansible's connection",
    "values.ansible_connection == 'local'": "Ansible's connection",
}


def literals(tree: ast.AST) -> Iterator[str]:
    """The string literals that an expression is, or that are the elements of the tuple, list or set that it is."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value
    elif isinstance(tree, ast.Tuple | ast.List | ast.Set):
        for element in tree.elts:
            yield from literals(element)


def compared(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(where, literal) of every string that is compared with ==, !=, in, not in, or by a case of `match`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                yield from ((node, text) for text in literals(side))
        elif isinstance(node, ast.MatchValue):
            yield from ((node, text) for text in literals(node.value))


def named_in(path: str, tree: ast.AST) -> list[str]:
    """The comparisons of a module with a name of a registry that is not the module itself."""
    names = {name for registry, rows in REGISTRIES.items() if registry != path for name in rows}
    return [
        f"{path}: {ast.unparse(where)}"
        for where, text in compared(tree)
        if text in names and ast.unparse(where) not in ALIKE
    ]


def test_no_name_of_a_test_an_engine_or_a_backend_is_compared_outside_its_registry() -> None:
    assert [found for path, tree in trees() for found in named_in(path, tree)] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('cell.test == "sft"', True),
        ('"torch" != cell["test"]', True),
        ('"sft" in request.tests', True),
        ('backend not in ("ssh", "slurm")', True),
        ('(test, state) == ("sft", "complete")', True),
        ('match engine:\n case "deepspeed" | "other":\n  pass', True),
        ('TESTS["sft"]', False),
        ('cell.state == "complete"', False),
        ("values.ansible_connection == 'local'", False),
    ],
)
def test_a_compared_name_is_found_in_any_form(code: str, found: bool) -> None:
    assert bool(named_in("somewhere.py", ast.parse(code))) is found


# --- what depends on a transport asks it, never what it is -------------------------------------------------------

TRANSPORTS = {"Agents", "Allocations"}


def transports_asked(tree: ast.AST) -> Iterator[ast.Call]:
    """Every isinstance or issubclass with a transport among its classes, alone, in a tuple or by its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
            parts = list(ast.walk(node.args[1]))
            names = {part.id for part in parts if isinstance(part, ast.Name)}
            names |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
            if node.func.id in ("isinstance", "issubclass") and names & TRANSPORTS:
                yield node


def test_nothing_asks_which_transport_it_has() -> None:
    assert [f"{path}: {ast.unparse(call)}" for path, tree in trees() for call in transports_asked(tree)] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("isinstance(carrier, Allocations)", True),
        ("isinstance(self.transport, (allocations.Allocations, Agents))", True),
        ("isinstance(carrier, Agents | None)", True),
        ("isinstance(carrier, dict)", False),
        ("Allocations(run)", False),
    ],
)
def test_asking_which_transport_is_found_in_any_form(code: str, found: bool) -> None:
    assert bool(list(transports_asked(ast.parse(code)))) is found
