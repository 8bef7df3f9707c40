"""The tests, one row each: the modules that a test consists of, by dotted path, and its requirements.

Each module is imported only through its row: a rank does not import the report, and the controller does not import
torch. A run measures the tests in this order, from a GPU by itself over the network up to training. A report shows them
in reverse order, since training is what a cluster is bought for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from runner.workloads import rl

if TYPE_CHECKING:
    from runner.failures import Suspect
    from runner.results.records import Record
    from runner.system.schema import ConfigFile
    from runner.workloads.job import Events, RankJob


class RankModule(Protocol):
    """The interface of the module that ranks execute."""

    def run(self, job: RankJob, events: Events) -> None:
        """Measure what `job` describes and write each value to `events`. Every rank of the cell calls it.

        Raises UsageError for a setting that cannot work on this device or with this data.
        """


class MetricsModule(Protocol):
    """The interface of the module that turns a cell's records into its metrics in summary.json. Pure."""

    def summarise(
        self, plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
    ) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """(metric -> value, name of what is limited -> its ceiling) of one cell; what was not measured is absent.

        `plan` and `cell` are the contents of plan.json and its entry. Values are in the unit of the metric's name.
        """

    def target_value(
        self, target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
    ) -> float | None:
        """What a cell of summary.json has for the target's metric, in its unit; None where it was not measured."""


class FindingsModule(Protocol):
    """The interface of the module that says what a test's records show to be wrong. Pure."""

    def find(
        self,
        plan: Mapping[str, Any],
        cells: Sequence[Mapping[str, Any]],
        by_cell: Mapping[str, Sequence[Record]],
        facts: Mapping[str, Mapping[str, Mapping[str, Any]]],
    ) -> Iterable[Suspect]:
        """Suspects of one run, the most serious first.

        `plan` is the contents of plan.json, and `cells` are the test's entries of summary.json, complete or not. A
        cell's `not_judged` is the reason why its speed means nothing (CPU ranks, nodes that share a kernel), and None
        where it can be judged: no speed is suspected in a cell that has one. `by_cell` maps cell ids to records;
        `facts` is cell id -> host -> facts.json.
        """


class DetailsModule(Protocol):
    """The interface of the module that says of a cell what is no single number: what tables are made of. Pure."""

    def details(self, plan: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
        """`details` of the cell's entry in summary.json, as JSON; `plan` and `cell` are plan.json and its entry."""


class Samples(Protocol):
    """A function that gives the values of a target that repeat within a cell. Pure."""

    def __call__(
        self, target: Mapping[str, Any], cell: Mapping[str, Any], records: Sequence[Record]
    ) -> Sequence[float]:
        """Values in the unit of the target's metric, as many as were measured; `cell` is one of summary.json."""


class TrainingMetricsModule(MetricsModule, Protocol):
    """The metrics of a test that trains."""

    def rates(self, cell: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[float, float]]:
        """(tokens in the loss per GPU, seconds) of each measured step: what scaling is judged by."""


class RefusalsModule(Protocol):
    """The interface of the module that says what a test's settings cannot be together. Pure."""

    def refuse(
        self,
        params: Mapping[str, Any],
        model: Mapping[str, Any],
        deepspeed: Mapping[str, Any],
        *,
        device: str,
        gpus_per_node: int,
        world_size: int,
    ) -> None:
        """Raise UsageError for settings that cannot work on this model, DeepSpeed configuration and nodes."""

    def with_split(self, deepspeed: Mapping[str, Any], parts: int) -> dict[str, Any]:
        """A copy of a DeepSpeed configuration in which `parts` ranks share each layer."""


class Variants(Protocol):
    """A function that splits a test into cells. Pure."""

    def __call__(
        self, params: Mapping[str, Any], num_nodes: int, gpus_per_node: int
    ) -> Mapping[str, Mapping[str, Any]]:
        """Suffix of a cell's id -> its settings, in the order in which they are measured: at least one.

        `params` are the test's settings. Raises UsageError where none of them can be measured on these nodes.
        """


class RankCommand(Protocol):
    """A function that tells what a rank runs as a program of its own. Pure."""

    def __call__(
        self, params: Mapping[str, Any], gpus_per_node: int, on_gpu: bool
    ) -> tuple[Sequence[str], Mapping[str, str]]:
        """The command, whose first word is the program's path, and the variables that are set for it.

        `params` are a cell's settings. Without the file to which the program writes what it says of itself.
        """


SILENT_S = 600.0  # once ranks have begun to measure, nearly every workload produces output more often


@dataclass(frozen=True)
class Test:
    """One test.

    `summary` is what it measures, in a few words. `settings` is MODULE:CLASS of configs/tests/<name>.yaml; `rank`,
    `metrics` and `report` are modules with the interfaces RankModule, MetricsModule and `runner.report.sections`;
    `findings`, empty for a test whose records show no faults, is one with the interface FindingsModule.
    `packages` must be installed on every node. `defaults` are, by device, the values of settings that are null, and
    `gpu_only`, by setting, the values that cannot work without a GPU. `details` is a module with the interface
    DetailsModule, for a test whose tables show more than metrics. `samples` is MODULE:FUNCTION with the interface
    Samples, for a test within whose cells repeats what targets are compared with.

    Ranks of a test with a `model` get its architecture. One that `trains` it takes its DeepSpeed file and weights, a
    batch and prepared data as well, and its rate is compared over node counts; its `refusals` are a module with the
    interface RefusalsModule. A test `on_request` runs only where it is named, as one that looks for a fault. One of a
    `workflow` is a stage of it: its settings are made for it, and nobody asks for it by name.

    `variants` is MODULE:FUNCTION with the interface Variants; without one, each node count and repeat is one cell. The
    ranks of a test with `mpi` are MPI programs: the backend's own launcher starts them, whatever engine others have.
    `engine` starts the ranks of a test that cannot do without it, whatever is chosen for others.
    `command` is MODULE:FUNCTION with the interface RankCommand, for a test whose ranks run what role nccl_build has
    installed: its setting `root` is the role's folder, and where it is null, the one of the inventory.

    `runs` says how many ranks a cell has: "ranks", one for each GPU of all its nodes; "once", one in all, which uses
    the GPUs of all nodes; "one", one in all, which needs one GPU of one node, however many nodes others take. One that
    `continues` writes checkpoints, and goes on in its next attempt from the last of them. Ranks that have begun and
    give no output for `silent_s` hang. `environment` are, by device, variables that its ranks need, and what starts
    them.
    """

    summary: str
    settings: str
    rank: str
    metrics: str
    report: str
    findings: str = ""
    packages: tuple[str, ...] = ("torch",)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gpu_only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    model: bool = False
    trains: bool = False
    on_request: bool = False
    workflow: bool = False
    refusals: str = ""
    details: str = ""
    samples: str = ""
    variants: str = ""
    mpi: bool = False
    engine: str = ""
    command: str = ""
    runs: Literal["ranks", "once", "one"] = "ranks"
    continues: bool = False
    silent_s: float = SILENT_S
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def load_settings(self) -> type[ConfigFile]:
        """Import the class of the test's settings."""
        return cast("type[ConfigFile]", _named(self.settings))

    def cells(self, params: Mapping[str, Any], num_nodes: int, gpus_per_node: int) -> Mapping[str, Mapping[str, Any]]:
        """The test's cells on so many nodes, as `Variants`; without variants one, whose suffix is empty."""
        if not self.variants:
            return {"": params}
        return cast(Variants, _named(self.variants))(params, num_nodes, gpus_per_node)

    def rank_command(
        self, params: Mapping[str, Any], gpus_per_node: int, on_gpu: bool
    ) -> tuple[Sequence[str], Mapping[str, str]] | None:
        """What each rank of a cell runs, as `RankCommand`; None for a test that measures in the rank itself."""
        return cast(RankCommand, _named(self.command))(params, gpus_per_node, on_gpu) if self.command else None

    def load_rank(self) -> RankModule:
        """Import the module that ranks execute."""
        return cast(RankModule, import_module(self.rank))

    def load_metrics(self) -> MetricsModule:
        """Import the module that computes metrics from records."""
        return cast(MetricsModule, import_module(self.metrics))

    def load_findings(self) -> FindingsModule | None:
        """Import the module that finds faults in the test's records; None for a test without one."""
        return cast(FindingsModule, import_module(self.findings)) if self.findings else None

    def load_refusals(self) -> RefusalsModule:
        """What the settings of a test that `trains` cannot be together."""
        return cast(RefusalsModule, import_module(self.refusals))

    def load_details(self) -> DetailsModule | None:
        """What makes the `details` of the test's cells; None for a test whose cells have none."""
        return cast(DetailsModule, import_module(self.details)) if self.details else None

    def load_samples(self) -> Samples | None:
        """What gives the values of a target within a cell; None for a test whose cells give one each."""
        return cast(Samples, _named(self.samples)) if self.samples else None

    def load_training_metrics(self) -> TrainingMetricsModule:
        """The metrics module of a test that `trains`."""
        return cast(TrainingMetricsModule, import_module(self.metrics))


def _named(path: str) -> Any:
    """What MODULE:NAME stands for."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


TESTS: Mapping[str, Test] = {
    "gpu": Test(
        summary="each GPU by itself",
        settings="runner.workloads.gpu.settings:GpuTest",
        rank="runner.workloads.gpu.rank",
        metrics="runner.workloads.gpu.metrics",
        report="runner.report.gpu",
        findings="runner.workloads.gpu.findings",
        details="runner.workloads.gpu.details",
        defaults={"cuda": {"soak_s": 20.0, "copy_bytes": 1 << 30}, "cpu": {"soak_s": 2.0, "copy_bytes": 64 << 20}},
        model=True,
        on_request=True,
    ),
    "nccl": Test(
        summary="nccl-tests, the fabric by itself",
        settings="runner.workloads.nccl.settings:NcclTest",
        rank="runner.workloads.nccl.rank",
        metrics="runner.workloads.nccl.metrics",
        report="runner.report.nccl",
        findings="runner.workloads.nccl.findings",
        details="runner.workloads.nccl.details",
        packages=(),
        defaults={"cuda": {"max_bytes": 8 << 30}, "cpu": {"max_bytes": 1 << 20}},
        variants="runner.workloads.nccl.variants:variants",
        mpi=True,
        command="runner.workloads.nccl.command:of_rank",
        on_request=True,
    ),
    "torch": Test(
        summary="collectives over torch.distributed",
        settings="runner.workloads.collectives.settings:TorchTest",
        rank="runner.workloads.collectives.rank",
        metrics="runner.workloads.collectives.metrics",
        report="runner.report.collectives",
        findings="runner.workloads.collectives.findings",
        defaults={"cuda": {"max_bytes": 8 << 30}, "cpu": {"max_bytes": 1 << 20}},
    ),
    "sft": Test(
        summary="fine-tuning with DeepSpeed",
        settings="runner.workloads.sft.settings:SftTest",
        rank="runner.workloads.sft.rank",
        metrics="runner.workloads.sft.metrics",
        report="runner.report.sft",
        packages=("torch", "deepspeed", "transformers", "accelerate"),
        gpu_only={
            "attention": ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
            "precision": ("fp8",),
            "liger": ("true",),
        },
        model=True,
        trains=True,
        refusals="runner.workloads.sft.refusals",
    ),
    "rl-sft": Test(
        summary="fine-tuning with verl",
        settings="runner.workloads.rl.settings:RlSftTest",
        rank="runner.workloads.rl.sft",
        metrics="runner.workloads.rl.metrics",
        report="runner.report.rl",
        findings="runner.workloads.rl.findings",
        samples="runner.workloads.rl.metrics:samples",
        details="runner.workloads.rl.details",
        packages=(),
        on_request=True,
        workflow=True,
        continues=True,
        environment={"cpu": rl.ENVIRONMENT},
    ),
    "rl-merge": Test(
        summary="a checkpoint of verl as a model",
        settings="runner.workloads.rl.settings:RlMergeTest",
        rank="runner.workloads.rl.merge",
        metrics="runner.workloads.rl.metrics",
        report="runner.report.rl",
        details="runner.workloads.rl.details",
        packages=(),
        on_request=True,
        workflow=True,
        runs="one",
        environment={"cpu": rl.ENVIRONMENT},
    ),
    "rl": Test(
        summary="PPO and GRPO with verl on Ray",
        settings="runner.workloads.rl.settings:RlTest",
        rank="runner.workloads.rl.driver",
        metrics="runner.workloads.rl.metrics",
        report="runner.report.rl",
        findings="runner.workloads.rl.findings",
        samples="runner.workloads.rl.metrics:samples",
        details="runner.workloads.rl.details",
        packages=(),
        on_request=True,
        silent_s=3600.0,  # a rollout of long answers, of which nothing is said before its end
        workflow=True,
        continues=True,
        engine="ray",
        runs="once",
        environment={"cpu": rl.ENVIRONMENT},
    ),
    "script": Test(
        summary="a program of the user's",
        settings="runner.workloads.script.settings:ScriptTest",
        rank="runner.workloads.script.rank",
        metrics="runner.workloads.script.metrics",
        report="runner.report.script",
        on_request=True,
        workflow=True,
    ),
}


def usual() -> tuple[str, ...]:
    """The tests of a run that names none."""
    return tuple(name for name, test in TESTS.items() if not test.on_request)


def offered() -> tuple[str, ...]:
    """The tests that a user can ask for by name; the others are stages of a workflow."""
    return tuple(name for name, test in TESTS.items() if not test.workflow)


def trains(name: str) -> bool:
    """Whether the test of this name trains a model; False for a test that this version does not have."""
    return name in TESTS and TESTS[name].trains
