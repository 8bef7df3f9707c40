"""Engine `ray`: its supervisors, and Ray's ports, resources, environment, commands and answers. Pure.

A supervisor (`runner.node.ray`) runs on every node of a cell, started as torchrun is. That of the first node starts
Ray's head and the job, and tells the others where the head is.

Every Ray node has a block of ports of its own. The supervisor of a node listens on the first port of the block, from
before Ray starts until after it has ended: whoever cannot do so takes the next block. So two jobs on one node never
share a port, whatever their ids are, and the kernel frees a block with its holder.
"""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePath
from typing import Any, Literal, get_args

from runner.errors import InfrastructureError, UsageError
from runner.plan.engines.ranks import PORTS, Host, Launch, Ranks
from runner.system.wording import counted

BLOCK = 512  # ports of one Ray node: as many workers as a large node has CPUs, and those of its actors
Service = Literal[
    "claim",
    "gcs",
    "dashboard",
    "client",
    "node_manager",
    "object_manager",
    "agent",
    "agent_grpc",
    "runtime_env_agent",
    "metrics",
    "autoscaler_metrics",
    "dashboard_metrics",
]
SERVICES: tuple[Service, ...] = get_args(Service)
_WORKERS = 16  # the first port of a block for workers, from its begin

# A user's own Ray must not be what ours connects to, nor its token ours: these take precedence over what is set here.
CLEARED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_JOB_HEADERS", "RAY_TMPDIR")

# The token of a cell's Ray, in the environment of its supervisors alone: another one for each attempt.
TOKEN = "SHAKEDOWN_RAY_TOKEN"

# Ray makes sockets below its folder, in `session_<date>_<time>_<pid>/sockets`; a socket's path has 107 bytes at most.
_LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def launch(ranks: Ranks) -> Launch:
    """A supervisor on each node; they meet on the first one, where the only rank is a job of Ray."""
    others = [f"--other={node.name}={node.address}" for node in ranks.nodes[1:]]

    def supervisor(index: int, host: Host) -> tuple[str, ...]:
        return (
            host.python,
            "-m",
            "runner.node.ray",
            ranks.cell_dir,
            f"--gpus={ranks.gpus_per_node}",
            *([] if len(ranks.nodes) == 1 else [f"--port={ranks.master_port}"]),
            f"--address={host.address}",
            *([f"--node={index}", f"--head={ranks.master_address}"] if index else others),
        )

    return Launch(argv=tuple(supervisor(index, host) for index, host in enumerate(ranks.nodes)))


@dataclass(frozen=True)
class Ports:
    """One block of ports: `first` and the next BLOCK - 1."""

    first: int

    def __getitem__(self, service: Service) -> int:
        return self.first + SERVICES.index(service)

    @property
    def workers(self) -> range:
        """The ports on which Ray's workers listen."""
        return range(self.first + _WORKERS, self.first + BLOCK)

    @property
    def all(self) -> range:
        """Every port of the block."""
        return range(self.first, self.first + BLOCK)

    def described(self) -> str:
        """The ports that a person may have to look for, in one line."""
        own, workers = f"{self.first}-{self.all[-1]}", f"{self.workers[0]}-{self.workers[-1]}"
        return f"{own} (gcs {self['gcs']}, dashboard {self['dashboard']}, workers {workers})"


def blocks(ephemeral: range) -> tuple[Ports, ...]:
    """The blocks that a node has, in ascending order.

    `ephemeral` are the ports that its kernel gives to outgoing connections (`net.ipv4.ip_local_port_range`): one of
    those may be taken between the test and Ray's start. Ports of rendezvous (`PORTS`) belong to other cells.
    """
    low, high = PORTS.stop, 65536
    spans = (
        [range(low, min(max(ephemeral.start, low), high)), range(max(ephemeral.stop, low), high)]
        if ephemeral
        else [range(low, high)]
    )
    return tuple(Ports(first) for span in spans for first in range(span.start, span.stop - BLOCK + 1, BLOCK))


def in_order(job: str, ephemeral: range) -> tuple[Ports, ...]:
    """All blocks of a node, from the one that `job` tries first: jobs with consecutive ids begin with different ones.

    Raises UsageError where the kernel's range leaves no block.
    """
    every = blocks(ephemeral)
    if not every:
        raise UsageError(
            f"ports {ephemeral.start}-{ephemeral.stop - 1} are those of outgoing connections, which leaves none from "
            f"{PORTS.stop} on for Ray: set net.ipv4.ip_local_port_range to 32768 60999 on the nodes"
        )
    start = (int(job) if job.isdecimal() else zlib.crc32(job.encode())) % len(every)
    return every[start:] + every[:start]


def claim(job: str, ephemeral: range, hold: Callable[[Ports], bool]) -> Ports:
    """The first block that `hold` gets: it listens on the block's `claim` port, and finds all others free.

    Raises InfrastructureError of kind `port_taken` if no block is free.
    """
    candidates = in_order(job, ephemeral)
    for ports in candidates:
        if hold(ports):
            return ports
    raise InfrastructureError(
        f"all {counted(len(candidates), 'block')} of ports for Ray from {candidates[0].first} on are in use here: "
        "see `ss -ltn`",
        "port_taken",
    )


# --- resources --------------------------------------------------------------------------------------------


# verl 0.9.1 takes three CPUs with each GPU, and one for each of its own actors: trainer, rewards, queues, servers.
_ACTORS, _ACTORS_PER_GPU = 6, 4


@dataclass(frozen=True)
class Grant:
    """What Ray may use of a node: without it, Ray takes every core and GPU that it sees, granted or not."""

    cpus: int
    gpus: int


def granted(environment: Mapping[str, str], cpus: int, gpus: int) -> Grant:
    """What Slurm has granted on this node by its variables; outside of Slurm, the `cpus` and `gpus` that there are.

    A list of GPUs (`SLURM_STEP_GPUS=0,1,4`) counts as their number.
    """

    def number(*names: str) -> int | None:
        for name in names:
            if value := environment.get(name, ""):
                return int(value) if name.endswith("_ON_NODE") else len(value.split(","))
        return None

    own_cpus = number("SLURM_CPUS_ON_NODE")
    own_gpus = number("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
    return Grant(cpus if own_cpus is None else own_cpus, gpus if own_gpus is None else own_gpus)


def visible(devices: str) -> int:
    """How many devices CUDA_VISIBLE_DEVICES shows: those before the first that is none. Slurm says `NoDevFiles`."""
    return len(list(takewhile(lambda word: _DEVICE.fullmatch(word.strip()), devices.split(","))))


_DEVICE = re.compile(r"\d+|(GPU|MIG)-.+")


def slots(grant: Grant) -> int:
    """How many CPUs Ray is told of: a place for each actor, of which most wait for others most of the time.

    Where there are fewer than the trainer asks for, it would wait for them for ever.
    """
    return max(grant.cpus, _ACTORS + _ACTORS_PER_GPU * grant.gpus)


# --- environment and commands -----------------------------------------------------------------------------


def store_bytes(device: str) -> int | None:
    """The size of Ray's object store on nodes whose ranks are of `device`; None: Ray's own choice, a share of memory.

    Where ranks are CPUs, several nodes may be one machine.
    """
    return None if device == "cuda" else 200 << 20


def folder(marker: str) -> str:
    """Ray's folder of sessions for the cell with this marker, the same on all its nodes: short, and not the user's."""
    name = f"/tmp/shakedown-ray-{zlib.crc32(marker.encode()):08x}"
    assert len(name) <= _LONGEST_FOLDER
    return name


def environment(ports: Ports, token_file: str) -> dict[str, str]:
    """Variables of every Ray process of a node; `token_file` (0600) has the job's token. CLEARED are to be removed."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token_file,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",  # who waits for it is less patient
        "RAY_DEDUP_LOGS": "0",  # `(repeated 7x)` would hide on which node a line was written
        "AUTOSCALER_METRIC_PORT": str(ports["autoscaler_metrics"]),
        "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics"]),
    }


def endpoint(address: str, port: int) -> str:
    """`address:port`, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def head(
    python: str, address: str, ports: Ports, grant: Grant, marker: str, store_bytes: int | None = None
) -> list[str]:
    """The command of the head: it stays in the foreground, and ends its node's processes when it gets SIGTERM."""
    return [
        *_start(python),
        "--head",
        f"--port={ports['gcs']}",
        f"--dashboard-host={address}",
        f"--dashboard-port={ports['dashboard']}",
        f"--ray-client-server-port={ports['client']}",
        "--include-dashboard=true",  # jobs are submitted to it
        f"--temp-dir={folder(marker)}",
        *_node(address, ports, grant, store_bytes),
    ]


def worker(
    python: str, address: str, ports: Ports, grant: Grant, head_endpoint: str, store_bytes: int | None = None
) -> list[str]:
    """The command of another node, which joins the head at `head_endpoint` and takes the folder of sessions from it."""
    return [*_start(python), f"--address={head_endpoint}", *_node(address, ports, grant, store_bytes)]


def _start(python: str) -> list[str]:
    return [str(PurePath(python).with_name("ray")), "start", "--block", "--disable-usage-stats"]


def _node(address: str, ports: Ports, grant: Grant, store_bytes: int | None) -> list[str]:
    return [
        f"--node-ip-address={address}",
        f"--node-manager-port={ports['node_manager']}",
        f"--object-manager-port={ports['object_manager']}",
        f"--dashboard-agent-listen-port={ports['agent']}",
        f"--dashboard-agent-grpc-port={ports['agent_grpc']}",
        f"--runtime-env-agent-port={ports['runtime_env_agent']}",
        f"--metrics-export-port={ports['metrics']}",
        f"--min-worker-port={ports.workers[0]}",
        f"--max-worker-port={ports.workers[-1]}",
        f"--num-cpus={slots(grant)}",
        f"--num-gpus={grant.gpus}",
        *([] if store_bytes is None else [f"--object-store-memory={store_bytes}"]),
    ]


def submission(job: str, words: Sequence[str]) -> dict[str, Any]:
    """The body of `POST /api/jobs/`, as `ray job submit` sends it. Ray's shell gets `words` as they are, quoted."""
    return {"submission_id": re.sub(r"[^A-Za-z0-9_-]+", "-", job), "entrypoint": shlex.join(words)}


# --- answers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """The contents of head.json: where a head is that answers."""

    address: str
    gcs: int
    dashboard: int
    ray: str  # version

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is written."""
        return dict(vars(self))


_PORT = re.compile(
    r"address already in use|port \d+ is already in use|trying to use a port number|does not match persisted value",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"AuthenticationError|InvalidAuthToken|[Uu]nauthenticated")


def why_ended(lines: Sequence[str]) -> tuple[str, str]:
    """The kind of failure of a `ray start` that has ended by itself, and what it said, from its last lines.

    A head whose GCS port is another's connects to that one, and complains about its session.
    """
    told = [_STAMP.sub("", line).strip() for line in lines if line.strip()]
    for kind, words in (("port_taken", _PORT), ("ray_refused", _TOKEN)):
        if found := next((line for line in reversed(told) if words.search(line)), None):
            return kind, found[:_SAID]
    ended = next((line for line in reversed(told) if _SUBPROCESS.search(line)), None)
    return "ray_died", (ended or (told[-1] if told else "it said nothing"))[:_SAID]


def failed_at(lines: Sequence[str]) -> str | None:
    """The address of the node where the task ran whose exception ended a driver, from its last lines: of tasks that
    called each other, the last one that was called.
    """
    found = [match for line in lines if (match := _TASK.match(line))]
    return found[-1][1] if found else None


_TASK = re.compile(r"(?:\S*\.)?RayTaskError.*\(pid=\d+, ip=([0-9a-fA-F.:]+)[,)]")
_SAID = 300  # characters
_STAMP = re.compile(r"^[\d-]+ [\d:,]+\s+[A-Z]+ \S+ -- ")
_SUBPROCESS = re.compile(r"^\s*\S+ \[exit code=")
_SLOW = re.compile(r"current node timed out during startup|No node info found for head node")


def was_slow(lines: Sequence[str]) -> bool:
    """Whether a `ray start` has ended since its own processes, or those of the head that it joins, did not start within
    the half minute that it gives them: on a busy machine, the next one may.
    """
    return any(_SLOW.search(line) for line in lines)


@dataclass(frozen=True)
class Joined:
    """The nodes of a Ray that are ALIVE, by address, each with its number of GPUs."""

    gpus: Mapping[str, int]


def joined(answer: Mapping[str, Any]) -> Joined:
    """The nodes in an answer of `GET /api/v0/nodes`. Raises ValueError for any other answer."""
    try:
        found = answer["data"]["result"]["result"]
        alive = [node for node in found if node["state"] == "ALIVE"]
        return Joined({node["node_ip"]: round(float(node["resources_total"].get("GPU", 0))) for node in alive})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a list of Ray's nodes: {error}") from None


def missing(joined: Joined, expected: Mapping[str, str], gpus: int) -> list[tuple[str, str, str]]:
    """(node, kind of failure, what is wrong) of each node that is not there yet, or with other than `gpus` GPUs.

    `expected` maps names of nodes to their addresses.
    """
    lacking = []
    for name, address in expected.items():
        if (found := joined.gpus.get(address)) is None:
            lacking.append((name, "never_joined", f"{name} ({address}) has not joined Ray"))
        elif found < gpus:
            what = f"{name} has joined Ray with {counted(found, 'GPU')}, {gpus} asked for"
            lacking.append((name, "gpus_missing", what))
    return lacking


# --- a job's state ----------------------------------------------------------------------------------------

RUNNING, SUCCEEDED, FAILED, STOPPED, UNKNOWN = "running", "succeeded", "failed", "stopped", "unknown"
_STATES = {
    "PENDING": RUNNING,
    "RUNNING": RUNNING,
    "SUCCEEDED": SUCCEEDED,
    "FAILED": FAILED,
    "STOPPED": STOPPED,
}  # fmt: skip


def ended(answer: Mapping[str, Any]) -> tuple[str, int | None]:
    """The state of a job in an answer of `GET /api/jobs/ID`, and the exit status of what it ran; None while it runs.

    A job that failed before its program ran has no status of its own: it counts as 1.
    """
    state = _STATES.get(str(answer.get("status")), UNKNOWN)
    if state in (RUNNING, UNKNOWN):
        return state, None
    code = answer.get("driver_exit_code")
    if isinstance(code, int) and (code or state == SUCCEEDED):
        return state, code
    return state, 0 if state == SUCCEEDED else 1
