"""The tests, one row each."""

from __future__ import annotations

from runner.system.schema import ConfigFile
from runner.workloads.collectives.settings import TorchTest
from runner.workloads.sft.settings import SftTest

TESTS: dict[str, type[ConfigFile]] = {"torch": TorchTest, "sft": SftTest}
