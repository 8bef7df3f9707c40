"""Ray on the nodes of a cell: its ports, resources, environment and commands. Pure.

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
from pathlib import PurePath
from typing import Any, Literal, get_args

from runner.errors import InfrastructureError, UsageError
from runner.plan.plan import PORTS
from runner.system.wording import counted

# Ray's workers listen here unless they are told otherwise, and a GCS that listens here does not start.
RAYS_OWN = range(10002, 20000)
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

# Ray makes sockets below its folder, in `session_<date>_<time>_<pid>/sockets`; a socket's path has 107 bytes at most.
_LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


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
    those may be taken between the test and Ray's start. Ports of rendezvous (`plan.PORTS`) belong to other cells.
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


# --- environment and commands -----------------------------------------------------------------------------


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
        f"--num-cpus={grant.cpus}",
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Head:
        """The head in a JSON object. Raises ValueError if it is none."""
        try:
            return cls(str(value["address"]), int(value["gcs"]), int(value["dashboard"]), str(value["ray"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a head: {error}") from None


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
