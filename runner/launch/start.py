"""Starts a run that `prepare` has planned: nodes are chosen, the plan is carried out, and the report written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runner import failures
from runner.cluster import nccl
from runner.cluster.backends import BACKENDS
from runner.cluster.inventory import Node
from runner.cluster.ssh import rendered
from runner.errors import UsageError
from runner.launch import carry, preflight, tuned
from runner.launch.carry import Dependencies, RunResult
from runner.launch.prepare import Prepared, run_dir
from runner.launch.run import Policy
from runner.plan import build, config
from runner.plan.plan import Plan, rank_programs
from runner.plan.request import Request
from runner.report.progress import Display
from runner.results import tuned as results


@dataclass(frozen=True)
class Chosen:
    """The nodes of a run, its spares, the skipped nodes with their problems, the access to nodes, their hardware,
    the NCCL of their ranks (as in Plan), and the versions that they have (`results.tuned.versions`; empty: not known).
    """

    access: preflight.NodeAccess
    nodes: tuple[Node, ...]
    hardware: Mapping[str, Any]
    nccl: str | None
    nccl_root: str | None
    spares: tuple[Node, ...] = ()
    passed_over: tuple[Mapping[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def start(prepared: Prepared, display: Display, dependencies: Dependencies | None = None) -> RunResult:
    """Choose nodes, carry the plan out on them, and write the report.

    Until the plan is accepted (nodes chosen and free, nothing refused) nothing is written, and the error says why. From
    then on there is a run directory, whose status says how the run ended in every case.

    Raises InfrastructureError naming every bad node, UsageError for a plan that can never run, Interrupted on a signal.
    """
    dependencies = dependencies or Dependencies()
    options = prepared.options
    with ExitStack() as stack:
        with carry.before_directory():
            remote = BACKENDS[prepared.request.backend].remote
            ssh_config = stack.enter_context(rendered(prepared.inventory) if remote else nullcontext())
            slurm = carry.observed(prepared.request.slurm, prepared.inventory, ssh_config, options.results)
            prepared = replace(prepared, request=replace(prepared.request, slurm=slurm))
            chosen = _choose(prepared, ssh_config, display, dependencies)
            # Again, now that hardware and versions are known.
            untuned = replace(prepared.untuned, slurm=slurm, hardware=chosen.hardware)
            settled = tuned.settle(untuned, (*chosen.nodes, *chosen.spares), prepared.tuned, chosen.versions)
            for note in settled.notes:
                display.note(note)

            def made(run_id: str) -> Plan:
                request = replace(
                    settled.request,
                    run_id=run_id,
                    run_dir=run_dir(options, run_id),
                    ssh_config=ssh_config,
                    passed_over=chosen.passed_over,
                    nccl=chosen.nccl,
                    nccl_root=chosen.nccl_root,
                )
                return build.build(prepared.located(request), (*chosen.nodes, *chosen.spares))

            _refuse(made(prepared.request.run_id), chosen, dependencies)
        plan, run = stack.enter_context(carry.run_directory(made, prepared.request.run_id, dependencies))
        data = dependencies.data(plan, plan.cells, display)
        transport = chosen.access.transport(run, chosen.nodes[0], {})
        policy = Policy(options.retries, options.replace_bad_nodes)
        return RunResult(run, carry.carry_out(plan, run, transport, display, data, policy, chosen.access, {}))


def _choose(prepared: Prepared, ssh_config: str | None, display: Display, dependencies: Dependencies) -> Chosen:
    """Check the nodes and use the good ones; all of them if Slurm is to choose.

    Raises InfrastructureError naming every bad node if too few are good, and UsageError for other GPUs than planned.
    """
    options, request, nodes = prepared.options, prepared.request, prepared.nodes
    cluster = carry.cluster(request.slurm, prepared.inventory, ssh_config)
    tests = request.test_names
    made = (request.backend, request.device, request.engine, tests, ssh_config, cluster)
    more: dict[str, Any] = {
        "weights": prepared.weights_on_nodes,
        "nccl_tests": rank_programs(prepared.plan.cells),
        "profile": request.profile,
        "shared": request.shared,
    }
    access = dependencies.access(*made, nccl_root=request.nccl_root, **more)
    if not request.named:  # Slurm chooses
        return Chosen(access, nodes, request.hardware, request.nccl, request.nccl_root)
    skip, count = options.skip_bad_nodes or options.replace_bad_nodes, max(request.node_counts)
    candidates = nodes if skip else nodes[:count]
    display.note(f"checking {preflight.folded(candidates)}")
    answers = access.ask(candidates)
    good, passed_over = preflight.choose(nodes, count, answers.problems, skip)
    for line in failures.node_lines(passed_over):
        display.note(f"skipped {line}")
    spares = tuple(node for node in nodes if node not in good and node.name not in answers.problems)
    which, root = request.nccl, request.nccl_root
    if which is None and not BACKENDS[request.backend].scheduled:  # else each agent sees what its node has
        root, reason = preflight.built_on_all(good, answers.nccl)
        which = nccl.BUILT if root else nccl.TORCH
        if reason:
            display.note(f"NCCL: torch's own, since {reason}")
        access = dependencies.access(*made, nccl_root=root, **more)
    hardware = _hardware(request, good, answers.gpus)
    versions = results.versions({node.name: answers.environments.get(node.name, {}) for node in good})
    spares = spares if options.replace_bad_nodes else ()
    return Chosen(access, good, hardware, which, root, spares, passed_over, versions)


def _hardware(request: Request, nodes: Sequence[Node], gpus: Mapping[str, str]) -> Mapping[str, Any]:
    """The hardware of `request`, or where the inventory says none, that of the GPUs that its nodes have.

    Raises UsageError where it is not what a node has: ceilings and memory would be another GPU's.
    """
    hardware = request.hardware
    if request.device != "cuda" or hardware["name"] == "unknown":
        return hardware
    for node in nodes:
        if (gpu := gpus.get(node.name)) is None:
            continue
        if hardware["name"] == "cpu":  # the inventory does not say
            name = config.hardware_of(gpu)
            hardware = {"name": name, **config.load_hardware(name).model_dump()}
        if hardware["name"] != "unknown" and not config.describes(hardware, gpu):
            raise UsageError(
                f"runner_hardware {hardware['name']} is {hardware['gpu']}, and {node.alias} has {gpu}: its file of "
                f"configs/hardware is {config.hardware_of(gpu)}"
            )
    return hardware


def _refuse(plan: Plan, chosen: Chosen, dependencies: Dependencies) -> None:
    """Raise UsageError or InfrastructureError for a plan that could never start."""
    carry.require_launcher(plan)
    chosen.access.transport(dependencies.folder(Path(plan.run_dir)), chosen.nodes[0], {}).refuse(plan, plan.cells)
