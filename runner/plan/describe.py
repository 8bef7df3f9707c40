"""A plan as text, for `--dry-run`. Pure."""

from __future__ import annotations

import shlex
from typing import Any

from runner import failures
from runner.plan import memory
from runner.plan.plan import Plan, rank_environment
from runner.system.wording import counted


def describe(plan: Plan, fold: Any) -> str:
    """The plan as text: cells, hosts, the exact command of each node, and what would be written.

    `fold` turns a list of host names into a folded set such as `node[001-008]`.
    """
    lines = [f"run {plan.run_id}: {counted(len(plan.cells), 'cell')}, backend {plan.backend}, engine {plan.engine}"]
    lines.append(f"  writes {plan.run_dir}, and on the nodes {', '.join(sorted({n.scratch for n in plan.nodes}))}")
    lines += [f"passed over {line}" for line in failures.node_lines(plan.passed_over)]
    aliases = {node.name: node.alias for node in plan.nodes}
    for cell in plan.cells:
        lines += [
            "",
            f"cell {cell.id}: {counted(cell.world_size, 'rank')} "
            f"({cell.num_nodes} × {cell.gpus_per_node}, {cell.device})",
        ]
        hosts = f"{fold([aliases[h] for h in cell.hosts])} = {fold(cell.hosts)}" if cell.hosts else "placed by Slurm"
        lines.append(f"  hosts  {hosts}")
        if cell.batch:
            b = cell.batch
            lines.append(
                f"  batch  {counted(b.global_batch, 'sequence')} = "
                f"{b.micro_batch} × {b.gradient_accumulation} × {cell.world_size} of {cell.params['seq_len']} tokens"
            )
            lines.append(f"  data   {cell.params['dataset']}, prepared once and sent to each node once")
        if (needs := memory.of_cell(plan, cell)) and needs.available:
            lines.append(
                f"  memory about {needs.needed:.0f} of {needs.available:g} GiB per GPU: {memory.causes(needs)}"
            )
        chosen = set(cell.hosts or aliases)
        on_node = {n.name: rank_environment(cell, n) for n in plan.nodes if n.name in chosen}
        for key in dict.fromkeys(key for env in on_node.values() for key in env):
            by_value: dict[str | None, list[str]] = {}
            for name, env in on_node.items():
                by_value.setdefault(env.get(key), []).append(aliases[name])
            for value, names in by_value.items():
                where = "" if len(by_value) == 1 else f" on {fold(names)}"
                lines.append(f"  env    {key}={value}{where}" if value is not None else f"  env    no {key}{where}")
        if plan.nccl is None and cell.device == "cuda":
            lines.append("  nccl   the one that role nccl_build has built, where the nodes have one, else torch's own")
        if cell.launch.head:
            extra = [f"{k}={v}" for k, v in cell.launch.head_env.items()]
            lines.append(f"  controller runs  {shlex.join([*extra, *cell.launch.head])}")
            for name, content in cell.launch.files.items():
                lines += [f"  {name}:", *(f"    {line}" for line in content.splitlines())]
        for host, argv in zip(cell.hosts, cell.launch.argv, strict=False):  # empty under Slurm
            lines.append(f"  {aliases[host]}  {shlex.join(argv) if argv else '(ranks started by the controller)'}")
        lines.append(f"  writes {cell.cell_dir} on each node")
    return "\n".join(lines)
