"""A plan as text, for `--dry-run`. Pure."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from runner import failures
from runner.plan import memory, speed, tuned
from runner.plan.engines.registry import ENGINES
from runner.plan.plan import Plan, Prediction, rank_environment
from runner.system.wording import counted
from runner.workloads.registry import TESTS

_WIDTH = 70  # of text beside the names of a cell's lines


def describe(plan: Plan, fold: Any) -> str:
    """The plan as text: cells, hosts, the exact command of each node, and what would be written.

    `fold` turns a list of host names into a folded set such as `node[001-008]`.
    """
    engines = list(dict.fromkeys(cell.engine for cell in plan.cells))
    cells = counted(len(plan.cells), "cell")
    lines = [f"run {plan.run_id}: {cells}, backend {plan.backend}, engine {' and '.join(engines)}"]
    lines.append(f"  writes {plan.run_dir}, and on the nodes {', '.join(sorted({n.scratch for n in plan.nodes}))}")
    lines += [f"passed over {line}" for line in failures.node_lines(plan.passed_over)]
    lines += _tuned(plan)
    aliases = {node.name: node.alias for node in plan.nodes}
    for cell in plan.cells:
        lines += [
            "",
            f"cell {cell.id}: {counted(cell.world_size, 'rank')} "
            f"({cell.num_nodes} × {cell.gpus_per_node}, {cell.device})"
            + (f", engine {cell.engine}" if len(engines) > 1 else "")
            + (f", once {cell.after} is complete" if cell.after else ""),
        ]
        hosts = f"{fold([aliases[h] for h in cell.hosts])} = {fold(cell.hosts)}" if cell.hosts else "placed by Slurm"
        lines.append(f"  hosts  {hosts}")
        if cell.batch:
            b = cell.batch
            shares = b.global_batch // (b.micro_batch * b.gradient_accumulation)  # ranks, or groups that share layers
            lines.append(
                f"  batch  {counted(b.global_batch, 'sequence')} = "
                f"{b.micro_batch} × {b.gradient_accumulation} × {shares} of {cell.params['seq_len']} tokens"
            )
            if cell.chosen:
                lines += [f"         {text}" for text in _wrapped(f"chosen: {cell.chosen}")]
            lines.append(f"  data   {cell.params['dataset']}, prepared once and sent to each node once")
        if (needs := memory.of_cell(plan, cell)) and needs.available:
            lines.append(
                f"  memory about {needs.needed:.0f} of {needs.available:g} GiB per GPU: {memory.causes(needs)}"
            )
        if cell.expected:
            lines += [f"  {'speed  ' if i == 0 else '       '}{text}" for i, text in enumerate(_speed(cell.expected))]
        chosen = set(cell.hosts or aliases)
        on_node = {n.name: rank_environment(cell, n) for n in plan.nodes if n.name in chosen}
        for key in dict.fromkeys(key for env in on_node.values() for key in env):
            by_value: dict[str | None, list[str]] = {}
            for name, env in on_node.items():
                by_value.setdefault(env.get(key), []).append(aliases[name])
            for value, names in by_value.items():
                where = "" if len(by_value) == 1 else f" on {fold(names)}"
                lines.append(f"  env    {key}={value}{where}" if value is not None else f"  env    no {key}{where}")
        if plan.nccl is None and cell.device == "cuda" and not ENGINES[cell.engine].mpi:
            lines.append("  nccl   the one that role nccl_build has built, where the nodes have one, else torch's own")
        if told := TESTS[cell.test].rank_command(cell.params, cell.gpus_per_node, cell.device == "cuda"):
            command, variables = told
            given = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
            lines.append(f"  each rank runs  {' '.join([*given, shlex.join(command)])}")
        if cell.launch.head:
            extra = [f"{k}={v}" for k, v in cell.launch.head_env.items()]
            lines.append(f"  controller runs  {shlex.join([*extra, *cell.launch.head])}")
            for name, content in cell.launch.files.items():
                lines += [f"  {name}:", *(f"    {line}" for line in content.splitlines())]
        for host, argv in zip(cell.hosts, cell.launch.argv, strict=False):  # empty under Slurm
            lines.append(f"  {aliases[host]}  {shlex.join(argv) if argv else '(ranks started by the controller)'}")
        lines.append(f"  writes {cell.cell_dir} on each node")
    return "\n".join(lines)


def _speed(found: Prediction) -> Iterator[str]:
    """A prediction as lines: the rate, what a step needs of each resource, what binds and what would not."""
    yield f"about {found.positions_per_s_per_gpu:,.0f} positions/s per GPU, {_seconds(found.step_s, 3)} a step"
    yield f"({found.rate_source})"
    needs = {"GPU": found.compute_s, "host": found.host_s, "NVLink": found.nvlink_s, "network": found.nic_s}
    parts = [
        f"{name} {'not known' if s is None else _seconds(s)}"
        for name, s in needs.items()
        if s is None or s > found.step_s / 100
    ]
    yield ", ".join(parts) + (f"; hidden {_seconds(found.hidden_s)}" if found.hidden_s > found.step_s / 100 else "")
    yield from _wrapped(speed.bound_by(asdict(found)))
    yield from (f"bound by {speed.GPU} with {way}" for way in found.ways)


def _seconds(value: float, digits: int = 2) -> str:
    """`0.44 s`, `37 s`, `1,024 s`: no powers of ten where a step is long."""
    return f"{value:,.0f} s" if value >= 10**digits else f"{value:.{digits}g} s"


def _wrapped(text: str) -> list[str]:
    """`text` in lines that do not end between a number and its unit, nor between an option and its value."""
    kept = text.replace(" %", "\u00a0%").replace("--set ", "--set\u00a0")
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(kept, _WIDTH, break_on_hyphens=False)]


def _tuned(plan: Plan) -> list[str]:
    """What `runner tune` has found and the plan uses, and what of it is decided otherwise."""
    if plan.tuned is None:
        return []
    used, date = plan.tuned["settings"], plan.tuned["created"][:10]
    first = (
        f"tuned: {tuned.named(used)} (runner tune on {date})" if used else f"tuned on {date}, and none of it is open"
    )
    return [first, *(f"  not {setting}: {why}" for setting, why in plan.tuned["overridden"].items())]
