"""Slurm's partitions and nodes, and why it could never start a job. Text in, values out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from runner.cluster import slurm_states
from runner.cluster.slurm import Settings, clock, seconds_of
from runner.cluster.slurm_gres import holds
from runner.errors import unknown
from runner.launch.slurm.answers import SEPARATOR, null_to_empty, pairs
from runner.launch.slurm.script import BatchJob, limit_s, requested_gres
from runner.system.nodeset import expand, fold
from runner.system.wording import are, counted

PARTITIONS = ("scontrol", "--oneliner", "--all", "show", "partition")
NODES = ("sinfo", "--all", "--Node", "--noheader", f"--format={SEPARATOR.join(('%N', '%T', '%G', '%c', '%m', '%E'))}")
CONFIG = ("scontrol", "show", "config")
RESERVATIONS = ("scontrol", "--oneliner", "--all", "show", "reservation")


# --- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """A partition; a limit of None means no limit. Memory is in MiB, of a node or of each of its CPUs."""

    name: str
    state: str
    default: bool
    max_time_s: int | None
    max_nodes: int | None
    nodes: tuple[str, ...]
    max_mem_mib: int | None = None
    max_mem_per_cpu_mib: int | None = None


@dataclass(frozen=True)
class SlurmNode:
    """A node as Slurm sees it: `state` in words without flags, `usable` whether our jobs can run there.

    `cpus` and `mem_mib` are what Slurm counts with; None: not known.
    """

    name: str
    state: str
    usable: bool
    reason: str
    gres: str
    cpus: int | None = None
    mem_mib: int | None = None


def parse_partitions(text: str, config: str = "") -> dict[str, Partition]:
    """Partitions by name, from the output of PARTITIONS; limits that are not their own from that of CONFIG."""
    of_all = {words[0]: words[2] for line in config.splitlines() if len(words := line.split(maxsplit=2)) == 3}

    def limits(row: Mapping[str, str]) -> dict[str, int | None]:
        own = [_number(row.get(key, "")) for key in ("MaxMemPerNode", "MaxMemPerCPU")]
        both = own if any(own) else [_number(of_all.get(key, "")) for key in ("MaxMemPerNode", "MaxMemPerCPU")]
        return dict(zip(("max_mem_mib", "max_mem_per_cpu_mib"), both, strict=True))

    return {
        row["PartitionName"]: Partition(
            name=row["PartitionName"],
            state=row.get("State", "up").lower(),
            default=row.get("Default") == "YES",
            max_time_s=seconds_of(row.get("MaxTime", "")),
            max_nodes=int(row["MaxNodes"]) if row.get("MaxNodes", "").isdigit() else None,
            nodes=expand(row["Nodes"]) if null_to_empty(row.get("Nodes", "")) else (),
            **limits(row),
        )
        for row in map(pairs, text.splitlines())
        if "PartitionName" in row
    }


def _number(text: str) -> int | None:
    """The number of a limit or a size, None for UNLIMITED and what is no number."""
    found = re.fullmatch(r"(\d+)\+?", text.strip())
    return int(found[1]) if found and int(found[1]) else None


def node_state(text: str, reserved: bool | None = None) -> tuple[str, bool]:
    """sinfo's or scontrol's state without its flags, and whether our jobs can run there.

    `reserved`: whether the node is in the reservation that our jobs use, None if they use none. A word that is not
    known is no reason against a node.
    """
    plain, verdict = slurm_states.read(text)
    if verdict == slurm_states.UNUSABLE:
        return plain, False
    if reserved is False:
        return f"{plain}, not in the reservation", False
    if reserved is None and verdict == slurm_states.RESERVED:
        return f"{plain}, in a reservation (see slurm.reservation)", False
    return plain, True


def parse_nodes(text: str, reservation: Collection[str] | None = None) -> dict[str, SlurmNode]:
    """Nodes by name, from the output of NODES, which lists each node once per partition.

    `reservation` are the nodes of the one that our jobs use; None: they use none.
    """
    nodes = {}
    for name, *rest in (line.split(SEPARATOR, 5) for line in text.splitlines()):
        if len(rest) == 5:
            state, gres, cpus, mem_mib, reason = rest
            reserved = None if reservation is None else name in reservation
            gres, reason = null_to_empty(gres), null_to_empty(reason)
            nodes[name] = SlurmNode(
                name, *node_state(state, reserved), reason, gres, cpus=_number(cpus), mem_mib=_number(mem_mib)
            )
    return nodes


def nodes_of_reservation(text: str, name: str) -> tuple[str, ...] | None:
    """The nodes of a reservation, or of several separated by commas, from the output of RESERVATIONS.

    None where that does not bind a job to nodes: it is unknown (sbatch says so), has no nodes of its own, or is
    flexible.
    """
    rows = {row.get("ReservationName"): row for row in map(pairs, text.splitlines())}
    found = [rows.get(word, {}) for word in name.split(",")]
    if any(not null_to_empty(row.get("Nodes", "")) or "FLEX" in row.get("Flags", "").split(",") for row in found):
        return None
    return tuple(host for row in found for host in expand(row["Nodes"]))


# The reasons with which slurmctld and the driver of role slurm_prolog drain a node, and srun's message.
_PROLOG = re.compile(r"(job )?prolog (error|failed|\S+:)", re.IGNORECASE)


def node_kind(reason: str) -> str:
    """The kind of failure (`failures.KINDS`) of a node that Slurm does not use for this reason."""
    return "prolog_failed" if _PROLOG.match(reason) else "node_failed"


def destinations(settings: Settings, partitions: Iterable[Partition]) -> list[str]:
    """The names of the partitions that jobs are submitted to: those set, or the default one."""
    names = settings.partition.split(",") if settings.partition else []
    return names or [partition.name for partition in partitions if partition.default]


def memory(settings: Settings, partitions: Iterable[Partition], nodes: Iterable[SlurmNode]) -> str:
    """What a job asks for as memory of each node, as sbatch's --mem: what is set, or as much as is allowed.

    "0", all memory of a node, is refused where that is more than a limit (MaxMemPerNode, or MaxMemPerCPU of all its
    CPUs). Then it is that limit, or the memory of the smallest node.
    """
    if settings.mem is not None:
        return settings.mem
    partitions, nodes = list(partitions), list(nodes)
    names = destinations(settings, partitions)
    found = []
    for partition in (each for each in partitions if each.name in names):
        there = [node for node in nodes if node.name in partition.nodes and node.mem_mib]
        sizes = [node.mem_mib for node in there if node.mem_mib]
        limit = _most_mem_mib(partition, there)
        found += [min(limit, *sizes)] if limit is not None and sizes and limit < max(sizes) else []
    return f"{min(found)}M" if found else "0"


def _most_mem_mib(partition: Partition, nodes: Iterable[SlurmNode]) -> int | None:
    """The largest memory of a node in MiB that a job may ask for; None: no limit."""
    if partition.max_mem_mib is not None or partition.max_mem_per_cpu_mib is None:
        return partition.max_mem_mib
    cpus = [node.cpus for node in nodes if node.cpus]
    return partition.max_mem_per_cpu_mib * min(cpus) if cpus else None


def _asked_mib(settings: Settings, nodes: Iterable[SlurmNode]) -> float:
    """The memory of a node in MiB that is asked for by slurm.mem; 0 where it is not set."""
    if settings.mem == "0":
        return max((node.mem_mib or 0 for node in nodes), default=0)
    return int(settings.mem[:-1]) * 1024.0 ** ("KMGT".index(settings.mem[-1].upper()) - 1) if settings.mem else 0


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
        of_it = [known[host] for host in partition.nodes if host in known]
        if (most := _most_mem_mib(partition, of_it)) is not None and _asked_mib(settings, of_it) > most:
            asked = settings.mem if settings.mem != "0" else "all"
            reasons.append(f"{asked} of a node's memory asked for, {where} allows {most}M; set slurm.mem: {most}M")
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
        # What cannot be read is not lacking: sbatch --test-only knows.
        lacking = {node.name: node.gres or "none" for node in good if gres and holds(node.gres, gres) is False}
        if len(good) - len(lacking) < min(num_nodes, len(good)):
            reasons.append(
                f"{gres} asked for on each node, found: {_grouped(lacking)}; fix slurm.gres or the partition"
            )
        return reasons

    every = [refused(by_name[name]) for name in names]  # of several, Slurm takes the first that can start the job
    return [] if [] in every else list(dict.fromkeys(itertools.chain.from_iterable(every)))


def _grouped(states: Mapping[str, str]) -> str:
    """Hosts grouped by state, as text: `node[001-002] drained (bad cable), node007 down`."""
    return ", ".join(f"{fold(hosts)} {words}" for words, hosts in _alike(states).items())


def _alike(states: Mapping[str, str]) -> dict[str, list[str]]:
    """Hosts by state, in the order in which each state first occurs."""
    alike: dict[str, list[str]] = {}
    for host, words in states.items():
        alike.setdefault(words, []).append(host)
    return alike
