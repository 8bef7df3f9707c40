"""Nodes for tests: real containers, skipped with a reason where they cannot be, except in CI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner.provision.testbed import containers as provision_testbed
from runner.provision.testbed import layout
from runner.system import process
from testbed.benches import RUNNER, Bench, other_content


@dataclass(frozen=True)
class Testbed:
    """`inventory` is for -i; `nodes` are as `testbed.status` gives them, in inventory order.

    `share` is a folder that the nodes see at the same path as this machine, where there is one.
    """

    __test__ = False

    name: str
    inventory: Path
    nodes: list[dict]
    share: Path | None = None

    def container(self, word: str) -> str:
        """The container of the node of that name or alias."""
        return next(node["container"] for node in self.nodes if word in (node["name"], node["alias"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """A test that fails does not leave its run on the nodes, where the next test's would be refused."""
    before = len(Bench.begun)
    try:
        return (yield)
    finally:
        for bench in Bench.begun[before:]:
            bench.leave()


@pytest.fixture(scope="session")
def containers() -> None:
    """That this machine can run a testbed at all."""
    reason = None
    if os.geteuid() != 0:
        reason = "a testbed needs root"
    elif not shutil.which("podman"):
        reason = f"podman is not installed: run {layout.INSTALL}"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; CI runs every test")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def testbed8(containers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Eight nodes, started once for all tests."""
    name, folder = "pytest", tmp_path_factory.mktemp("testbed8")
    try:
        state = provision_testbed.up(layout.Options(nodes=8, name=name, inventory=folder))
        yield Testbed(name, folder, state["nodes"])
    finally:
        provision_testbed.down(name)


@contextmanager
def slurm_nodes(name: str, folder: Path, release: str | None, *settings: str) -> Iterator[Testbed]:
    """Three nodes with Slurm, slurmctld on the first, and a folder shared as over NFS.

    `folder` keeps what belongs to them; `release` is that of the distribution, None for this machine's; `settings` are
    for `runner setup --set`. Whoever asks first sets them up: to others with the same folder they are up already.
    """
    (folder / "share").mkdir(parents=True, exist_ok=True)
    try:
        wanted = layout.Options(
            nodes=3, name=name, inventory=folder / "inventory", share=folder / "share", release=release
        )
        state = provision_testbed.up(wanted)
        for node in state["nodes"]:
            # For a job that is handed a secret, slurmd 24.11 makes namespaces and dies where it may not, as in a container;
            # where the kernel has none it does without.
            other_content(node["container"], Path("/proc/sys/user/max_pid_namespaces"), "0")
        inventory = Path(state["folder"])
        if not (folder / "provisioned").exists():
            chosen = [word for setting in settings for word in ("--set", setting)]
            argv = [str(RUNNER), "setup", "-i", str(inventory), "--results", str(folder), *chosen]
            process.run(argv, timeout_s=500, check=True)
            (folder / "provisioned").touch()
        yield Testbed(name, inventory, state["nodes"], Path(state["wanted"]["share"]))
    finally:
        provision_testbed.down(name)


@pytest.fixture(scope="session")
def slurm3(
    containers: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Testbed]:
    """Three nodes with Slurm, of the release that `--release` names. Whichever folder's tests ask first start it."""
    folder = tmp_path_factory.getbasetemp() / "slurm3"
    with slurm_nodes("pytest-slurm3", folder, request.config.getoption("--release")) as bed:
        yield bed
