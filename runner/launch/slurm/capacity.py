"""Slurm's partitions and nodes, and why it could never start a job. Text in, values out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from runner.cluster.slurm import Settings, clock, seconds_of
from runner.errors import unknown
from runner.launch.slurm.answers import SEPARATOR, null_to_empty, pairs
from runner.launch.slurm.script import BatchJob, limit_s, requested_gres
from runner.system.nodeset import expand, fold
from runner.system.wording import are, counted

PARTITIONS = ("scontrol", "--oneliner", "--all", "show", "partition")
NODES = ("sinfo", "--all", "--Node", "--noheader", f"--format={SEPARATOR.join(('%N', '%T', '%G', '%E'))}")


# --- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """A partition; a limit of None means no limit."""

    name: str
    state: str
    default: bool
    max_time_s: int | None
    max_nodes: int | None
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class SlurmNode:
    """A node as Slurm sees it: `state` in words without flags, `usable` whether jobs can run there."""

    name: str
    state: str
    usable: bool
    reason: str
    gres: str


def parse_partitions(text: str) -> dict[str, Partition]:
    """Partitions by name, from the output of PARTITIONS."""
    return {
        row["PartitionName"]: Partition(
            name=row["PartitionName"],
            state=row.get("State", "up").lower(),
            default=row.get("Default") == "YES",
            max_time_s=seconds_of(row.get("MaxTime", "")),
            max_nodes=int(row["MaxNodes"]) if row.get("MaxNodes", "").isdigit() else None,
            nodes=expand(row["Nodes"]) if null_to_empty(row.get("Nodes", "")) else (),
        )
        for row in map(pairs, text.splitlines())
        if "PartitionName" in row
    }


_UNUSABLE = re.compile(r"down|drain|drng|fail|error|inval|fut|unk|no_resp")


def node_state(word: str) -> tuple[str, bool]:
    """sinfo's state without its flags, and whether jobs can run there. `*` marks a slurmd that does not answer."""
    plain = re.sub(r"[^a-z_+]", "", word.lower()).strip("+")
    powered = plain.startswith("power")  # saving power is no fault: Slurm wakes the node for a job
    silent = "*" in word
    return plain + (", not answering" if silent else ""), powered or not (silent or _UNUSABLE.search(plain))


def parse_nodes(text: str) -> dict[str, SlurmNode]:
    """Nodes by name, from the output of NODES, which lists each node once per partition."""
    nodes = {}
    for name, *rest in (line.split(SEPARATOR, 3) for line in text.splitlines()):
        if len(rest) == 3:
            nodes[name] = SlurmNode(
                name, *node_state(rest[0]), reason=null_to_empty(rest[2]), gres=null_to_empty(rest[1])
            )
    return nodes


# The reasons with which slurmctld and the driver of role slurm_prolog drain a node, and srun's message.
_PROLOG = re.compile(r"(job )?prolog (error|failed|\S+:)", re.IGNORECASE)


def node_kind(reason: str) -> str:
    """The kind of failure (`failures.KINDS`) of a node that Slurm does not use for this reason."""
    return "prolog_failed" if _PROLOG.match(reason) else "node_failed"


def destinations(settings: Settings, partitions: Iterable[Partition]) -> list[str]:
    """The names of the partitions that jobs are submitted to: those set, or the default one."""
    names = settings.partition.split(",") if settings.partition else []
    return names or [partition.name for partition in partitions if partition.default]


def describe(partitions: Iterable[Partition], nodes: Iterable[SlurmNode], settings: Settings) -> list[str]:
    """A line for each partition; below those that jobs are submitted to, their nodes, grouped by state."""
    partitions, known, lines = list(partitions), {node.name: node for node in nodes}, []
    names = destinations(settings, partitions)
    for partition in sorted(partitions, key=lambda partition: partition.name not in names):
        default = " (default)" if partition.default else ""
        most = "any number" if partition.max_nodes is None else f"at most {partition.max_nodes}"
        limit = "any time" if partition.max_time_s is None else f"at most {clock(partition.max_time_s)}"
        has = f"{partition.state}, {counted(len(partition.nodes), 'node')}"
        lines.append(f"partition {partition.name}{default}: {has}; a job: {most} of them, {limit}")
        if partition.name in names:
            there = [known[host] for host in partition.nodes if host in known]
            states = {
                node.name: f"{node.state}, {node.gres or 'no GRES'}" + f": {node.reason}" * bool(node.reason)
                for node in there
            }
            lines += (f"  {fold(hosts)} {words}" for words, hosts in _alike(states).items())
    return lines


# --- what it could never start --------------------------------------------------------------------


def refused(
    job: BatchJob, settings: Settings, partitions: Sequence[Partition], nodes: Sequence[SlurmNode]
) -> tuple[list[str], list[str]]:
    """Every reason why Slurm could not run the largest cell of `job`, and every reason that would remain if all nodes
    were usable.
    """
    largest = max(job.steps, key=lambda step: step.num_nodes)

    def among(nodes: Sequence[SlurmNode]) -> list[str]:
        limit = limit_s(job, settings)
        return refusals(
            largest.num_nodes, job.gpus_per_node, job.device, largest.hosts, settings, partitions, nodes, limit
        )

    return among(nodes), among([replace(node, usable=True) for node in nodes])


def refusals(
    num_nodes: int,
    gpus_per_node: int,
    device: str,
    hosts: Sequence[str],
    settings: Settings,
    partitions: Iterable[Partition],
    nodes: Iterable[SlurmNode],
    time_limit_s: int,
) -> list[str]:
    """Every reason why Slurm could not run this, before anything is submitted; empty if it can."""
    by_name, known = {p.name: p for p in partitions}, {node.name: node for node in nodes}
    names = destinations(settings, by_name.values())
    if not names:
        return [f"no partition is named and Slurm has no default one; set slurm.partition: {', '.join(by_name)}"]
    if strange := [name for name in names if name not in by_name]:
        return [str(unknown("partition", name, by_name, "slurm.partition")) for name in strange]
    gres = requested_gres(gpus_per_node, device, settings)

    def refused(partition: Partition) -> list[str]:
        where, reasons = f"partition {partition.name}", []
        if partition.state != "up":
            reasons.append(f"{where} is {partition.state}; name another, or have it enabled")
        if partition.max_nodes is not None and num_nodes > partition.max_nodes:
            reasons.append(f"{counted(num_nodes, 'node')} asked for, {where} allows {partition.max_nodes} (MaxNodes)")
        if partition.max_time_s is not None and time_limit_s > partition.max_time_s:
            allowed = clock(partition.max_time_s)
            reasons.append(
                f"{clock(time_limit_s)} asked for, {where} allows {allowed} (MaxTime); set slurm.time_limit_s"
            )
        if missing := [host for host in hosts if host not in known]:
            reasons.append(f"Slurm does not know {fold(missing)}; it has {fold(known) or 'no node'}")
        if outside := [host for host in hosts if host in known and host not in partition.nodes]:
            reasons.append(f"{where} does not have {fold(outside)}; it has {fold(partition.nodes) or 'no node'}")
        if barred := [host for host in hosts if host in settings.exclude]:
            reasons.append(f"{fold(barred)} is named, and excluded by slurm.exclude; leave it out of one")
        there = [known[host] for host in hosts or partition.nodes if host in known and host in partition.nodes]
        there = [node for node in there if node.name not in settings.exclude]
        good = [node for node in there if node.usable]
        bad = {node.name: node.state + f" ({node.reason})" * bool(node.reason) for node in there if not node.usable}
        if hosts and bad:
            reasons.append(f"named but not usable: {_grouped(bad)}; name others, or bring them back")
        elif not hosts and num_nodes > len(good):
            without = " without the excluded ones" if settings.exclude else ""
            unusable = f", of which {len(good)} {are(len(good))} usable: {_grouped(bad)}" if bad else ""
            reasons.append(f"{counted(num_nodes, 'node')} asked for, {where} has {len(there)}{without}{unusable}")
        lacking = {node.name: node.gres or "none" for node in good if gres and not _holds(node.gres, gres)}
        if len(good) - len(lacking) < min(num_nodes, len(good)):
            reasons.append(
                f"{gres} asked for on each node, found: {_grouped(lacking)}; fix slurm.gres or the partition"
            )
        return reasons

    every = [refused(by_name[name]) for name in names]  # of several, Slurm takes the first that can start the job
    return [] if [] in every else list(dict.fromkeys(itertools.chain.from_iterable(every)))


def _holds(gres: str, requested: str) -> bool:
    """Whether "gpu:h200:8(S:0-1),nvme:1" holds "gpu:8", "gpu:h200:8", "gpu:4,nvme"."""
    counts: dict[str, int] = {}
    for name, count in _counted(gres):
        for known in {name, name.partition(":")[0]}:
            counts[known] = counts.get(known, 0) + count
    return all(counts.get(name, 0) >= count for name, count in _counted(requested))


def _counted(gres: str) -> list[tuple[str, int]]:
    """("gpu:h200", 8) of each part of a GRES list; without a number, 1."""
    parts = re.findall(r"([a-z]\w*(?::[a-z_][\w.-]*)?)(?::(\d+)([kmg]?))?(?:\([^)]*\))?(?:,|$)", gres.lower())
    return [(name, int(count or 1) * 1024 ** " kmg".index(unit or " ")) for name, count, unit in parts]


def _grouped(states: Mapping[str, str]) -> str:
    """Hosts grouped by state, as text: `node[001-002] drained (bad cable), node007 down`."""
    return ", ".join(f"{fold(hosts)} {words}" for words, hosts in _alike(states).items())


def _alike(states: Mapping[str, str]) -> dict[str, list[str]]:
    """Hosts by state, in the order in which each state first occurs."""
    alike: dict[str, list[str]] = {}
    for host, words in states.items():
        alike.setdefault(words, []).append(host)
    return alike
