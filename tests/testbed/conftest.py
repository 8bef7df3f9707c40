"""Nodes for tests: real containers, skipped with a reason where they cannot be, except in CI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner import testbed


@dataclass(frozen=True)
class Testbed:
    """`inventory` is for -i; `nodes` are as `testbed.status` gives them, in inventory order."""

    __test__ = False

    name: str
    inventory: Path
    nodes: list[dict]

    def container(self, word: str) -> str:
        """The container of the node of that name or alias."""
        return next(node["container"] for node in self.nodes if word in (node["name"], node["alias"]))


@pytest.fixture(scope="session")
def containers() -> None:
    """That this machine can run a testbed at all."""
    reason = None
    if os.geteuid() != 0:
        reason = "a testbed needs root"
    elif not shutil.which("podman"):
        reason = f"podman is not installed: run {testbed.INSTALL}"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; CI runs every test")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def testbed8(containers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Eight nodes, started once for all tests."""
    name, folder = "pytest", tmp_path_factory.mktemp("testbed8")
    try:
        state = testbed.up(testbed.Options(nodes=8, name=name, inventory=folder))
        yield Testbed(name, folder, state["nodes"])
    finally:
        testbed.down(name)
