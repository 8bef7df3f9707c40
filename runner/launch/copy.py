"""Copies files to and from nodes: rsync over ssh, many nodes at a time."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from runner.cluster.inventory import Node
from runner.cluster.reasons import explain, reason_kind
from runner.errors import InfrastructureError
from runner.failures import Problem
from runner.node.protocol import POLL_S, SILENCE_S
from runner.system import process

BRIEF_S = 2  # how long a node that has just not answered may take to accept a connection


FILE_ERROR = 11  # rsync's status for an error of file input or output, such as a full disk


def _rsync(
    node: Node,
    ssh_config: str,
    source: str,
    target: str,
    timeout_s: float,
    brief: bool = False,
    more: Sequence[str] = (),
) -> process.Outcome:
    # -s: paths are passed to the remote side unchanged, not through its shell. Only at level INFO does ssh say why a
    # connection ended that it had: it was closed, or nothing came for as long as its configuration allows.
    shell = f"ssh -F {ssh_config} -o LogLevel=INFO" + (f" -o ConnectTimeout={BRIEF_S}" if brief else "")
    as_user = [f"--rsync-path={shlex.join([*node.sudo, 'rsync'])}"] if node.sudo else []
    options = ["-a", "-s", "--partial", "--mkpath", f"--timeout={2 * SILENCE_S:.0f}", *as_user, *more]
    return process.run(["rsync", *options, "-e", shell, source, target], timeout_s=timeout_s)


def send(
    nodes: Sequence[Node],
    ssh_config: str,
    source: str,
    target: str,
    timeout_s: float = 1800.0,
    stopped: Callable[[], bool] = lambda: False,
    more: Sequence[str] = (),
) -> dict[str, Problem]:
    """Copy the folder `source` to `target` on every node, at most `timeout_s` each; returns failures by node.

    Ends early once `stopped` returns True. `more` are further options of rsync.
    """
    return _each(
        nodes,
        lambda node: _rsync(node, ssh_config, f"{source}/", f"{node.name}:{target}/", timeout_s, more=more),
        stopped,
    )


def gather(
    nodes: Sequence[Node],
    ssh_config: str,
    source: str,
    targets: Mapping[str, str],
    timeout_s: float = 600.0,
    silent: Collection[str] = (),
) -> dict[str, Problem]:
    """Copy the folder `source` of every node into `targets[node.name]`, at most `timeout_s` each.

    `silent` are the names of nodes that have just not answered: they are tried, and not waited for.
    Returns failures by node; the disk that is full is this machine's.
    """
    found = _each(
        nodes,
        lambda node: _rsync(
            node, ssh_config, f"{node.name}:{source}/", f"{targets[node.name]}/", timeout_s, node.name in silent
        ),
    )
    full = Problem("controller_disk_full", "this machine's disk is full")
    return {name: full if problem.kind == "disk_full" else problem for name, problem in found.items()}


def _each(
    nodes: Sequence[Node], action: Callable[[Node], process.Outcome], stopped: Callable[[], bool] = lambda: False
) -> dict[str, Problem]:
    """Run `action` for every node, sixteen at a time; returns failures by node.

    If it ends early, by `stopped` or an exception, running commands are ended, not waited for.
    """

    def attempt(node: Node) -> Problem | None:
        try:
            outcome = action(node)
            if outcome.rc == FILE_ERROR and not outcome.stderr.strip():
                outcome = action(node)  # what the other side says last is sometimes lost: it says it again
        except InfrastructureError as error:  # it was still running at the end of its time
            return Problem("hung", str(error))
        lines = outcome.stderr.splitlines()
        return Problem(reason_kind(outcome.rc, lines), explain(node, outcome.rc, lines)) if outcome.rc else None

    pool = ThreadPoolExecutor(16)
    futures = {node.name: pool.submit(attempt, node) for node in nodes}
    try:
        while wait(futures.values(), POLL_S).not_done and not stopped():
            pass
    finally:
        # Not begun: dropped. Begun: its process is ended, which ends its thread.
        pool.shutdown(wait=False, cancel_futures=True)
        if any(future.running() for future in futures.values()):
            process.stop_running()
        pool.shutdown()
    interrupted = Problem("interrupted", "stopped")
    found = {name: interrupted if future.cancelled() else future.result() for name, future in futures.items()}
    return {name: problem for name, problem in found.items() if problem}
