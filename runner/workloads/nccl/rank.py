"""What one rank of test `nccl` does: it runs nccl-tests, and records what that measured and what NCCL says it used."""

from __future__ import annotations

import codecs
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.cluster import nccl
from runner.cluster.tools import nccl_log, nccl_tests
from runner.errors import InfrastructureError
from runner.system import process
from runner.system.wording import counted
from runner.workloads.job import Events, RankJob
from runner.workloads.nccl import command, computing

_BLOCK = 1 << 16


def run(job: RankJob, events: Events) -> None:
    """Run nccl-tests as this rank's own process, which ends with it; rank 0 prints and records what was measured.

    Its output is passed on as it comes, so that it is kept in this rank's files. Every rank records what NCCL said to
    it. Raises InfrastructureError where nccl-tests is missing, fails, or measures nothing, in its own words.
    """
    params = job.params
    argv = command.argv(params)
    if not os.access(argv[0], os.X_OK):
        raise InfrastructureError(f"no nccl-tests: {argv[0]} is missing: {nccl.SETUP} with nccl_build_tests: true")
    library = Path(params["root"], "current", "lib", nccl.LIBRARY)
    if version := nccl.version_of(library):  # before it may fail: nodes are compared by it
        events("nccl", libraries={str(library): version})
    log = events.folder.nccl_log(events.rank)
    on_gpu = job.device == "cuda"
    env = command.environment(params, job.gpus_per_node, on_gpu, str(log), os.environ)
    # In a session of its own, so that a signal which ends ranks does not end it first, as if it had failed.
    child = process.spawn(argv, env=env, cwd="/", bound=True)
    reading = _Reading(job, events)
    said = _pass_on(child, reading)
    status = child.wait()
    reading.close()
    output = reading.output
    evidence = nccl_log.parse(log.read_text(errors="replace") if log.exists() else "")
    for metric, value, context in measured(evidence):
        events.value(metric, value, **reading.context, **context)
    if events.rank == 0 and output.version:
        events("used", nccl_tests=output.version)
    driver = Path("/proc/driver/nvidia/version").exists()
    if reason := failure(status, output, evidence, said, events.rank == 0, driver):
        raise InfrastructureError(f"{Path(argv[0]).name} {reason}")
    if events.rank == 0:
        events.value("lost_rows", lost(params, output, reading.shortened), **reading.context)
        if output.out_of_bounds and not any(one.wrong for one in output.measurements):
            events.value("wrong_values", 1, **reading.context)  # at least, in a row that did not arrive whole
    if events.rank == 0 and (reason := unsplit(params, job.num_nodes, job.gpus_per_node, output)):
        raise InfrastructureError(f"{Path(argv[0]).name} {reason}")


class _Reading:
    """What nccl-tests prints, recorded as it comes."""

    def __init__(self, job: RankJob, events: Events) -> None:
        params = job.params
        self.context: dict[str, Any] = {"collective": params["collective"], "split": params["split"]}
        if params["rail"] is not None:
            self.context["rail"] = params["rail"]
        self._dtype, self._events = params["dtype"], events
        self._reader = nccl_tests.Reader()
        self._sizes: set[int] = set()
        self.shortened = False  # whether nccl-tests said that the largest sizes do not fit into memory
        self._total = len(command.sizes(params))
        events.progress(0, self._total, params["collective"])

    @property
    def output(self) -> nccl_tests.Output:
        """What was read so far."""
        return self._reader.outputs[-1]

    def feed(self, text: str) -> None:
        """Record the measurements that `text` completes."""
        self.shortened = self.shortened or "Reducing maxBytes" in text
        self._record(self._reader.feed(text))

    def close(self) -> None:
        """Record what the last line has, which may have no end."""
        self._record(self._reader.close())

    def _record(self, found: Iterable[nccl_tests.Measurement]) -> None:
        for one in found:
            if not one.size_bytes:  # fewer bytes than one element of each rank: nothing was sent
                continue
            context = self.context | {"size_bytes": one.size_bytes, "in_place": one.in_place, "dtype": self._dtype}
            self._events.value("latency_us_mean", one.time_us, **context)
            self._events.value("algbw_gb_per_s", one.algbw_gb_per_s, **context)
            self._events.value("busbw_gb_per_s", one.busbw_gb_per_s, **context)
            if one.wrong is not None:
                self._events.value("wrong_values", one.wrong, **context)
            self._sizes.add(one.size_bytes)
            self._events.progress(min(len(self._sizes), self._total), self._total, self.context["collective"])


def _pass_on(child: subprocess.Popen[bytes], reading: _Reading) -> str:
    """Pass the program's output on to this rank's until it ends; returns its stderr."""
    assert child.stdin and child.stdout and child.stderr
    child.stdin.close()
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    errors = b""
    program = computing.Program(child.pid)
    own = {child.stdout.fileno(): 1, child.stderr.fileno(): 2}
    poller = select.poll()
    for pipe in own:
        poller.register(pipe, select.POLLIN)
    while own:
        for pipe, _ in computing.wait(poller) if program.computes() else _stands_still(poller):
            data = os.read(pipe, _BLOCK)
            if not data:
                poller.unregister(pipe)
                del own[pipe]
                continue
            os.write(own[pipe], data)
            if own[pipe] == 1:
                reading.feed(decode(data))
            else:
                errors += data
    return errors.decode(errors="replace")


def _stands_still(poller: select.poll) -> list[tuple[int, int]]:
    """As `computing.wait`, for a program that does not."""
    return poller.poll(computing.LOOK_S * 1000)


def measured(evidence: nccl_log.Evidence) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(metric, value, context) of what NCCL said that this rank used; nothing that it did not say."""
    for path in evidence.paths:
        context = {"via": path.via, "net": path.net, "nic": path.nic, "gpudirect": path.gpudirect}
        yield "channels", path.channels, context
    for (collective, size), (algorithm, protocol) in evidence.algorithms.items():
        yield "algorithm", size, {"of": collective, "algorithm": algorithm, "protocol": protocol}
    for metric in ("gpudirect", "dmabuf", "nvls", "collnet"):
        used = getattr(evidence, metric)
        if used is not None:
            yield metric, int(used), {}
    if evidence.net is not None:
        yield "nics", len(evidence.nics), {"net": evidence.net, "link": evidence.link, "names": list(evidence.nics)}
    if evidence.settings:
        yield "settings", len(evidence.settings), {"values": dict(evidence.settings)}


def failure(
    status: int, output: nccl_tests.Output, evidence: nccl_log.Evidence, said: str, printed: bool, driver: bool
) -> str | None:
    """How nccl-tests failed with `status`, in one line and in its own words; None where it has measured.

    `said` is its stderr, `printed` whether this rank prints the table, `driver` whether the machine has NVIDIA's. Every
    rank's program fails after wrong values, which have been measured: they are no failure. One that ends well without a
    row has measured nothing.
    """
    words = [*output.problems, *nccl_tests.parse(said).problems]
    first_hand = [problem for problem in words if not _RELAYED.search(problem)]
    lines = [line.strip() for line in said.splitlines()]
    last = [line for line in lines if line and not line.endswith("***")][-1:]  # which frame the stacks of Open MPI
    if printed:
        wrong = output.out_of_bounds or any(one.wrong for one in output.measurements)
    else:  # which versions before 2.17 end with status 1 and without a word
        wrong = not first_hand and bool(words or (status == 1 and not last))
    if status == 0 or (status > 0 and wrong):
        if not printed or any(one.size_bytes for one in output.measurements):
            return None
        if output.measurements:
            return "sent nothing: every size is less than an element for each rank: give a larger nccl.max_bytes"
        return ": ".join(["ended without a measurement", *last])
    causes = (first_hand or words)[:1]
    causes += [f"NCCL: {warning}" for warning in evidence.warnings[-2:] if not any(warning in each for each in causes)]
    causes = causes or last
    if not driver and any(_NO_DRIVER in cause for cause in causes):
        causes.insert(0, "no NVIDIA driver is loaded here")
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    if status > 0 and not causes:  # MPI has ended it, as it does after another rank
        return f"{how} without a word"
    return f"{how}: {'; '.join(causes)}" if causes else how


_NO_DRIVER = "driver version is insufficient"  # what CUDA says of an old one, and of none
# What `nccl_tests` tells of a failure of a function that it called.
_RELAYED = re.compile(r": the test failed$")


def lost(params: Mapping[str, Any], output: nccl_tests.Output, shortened: bool) -> int:
    """How many rows of the table are missing or torn. `shortened`: nccl-tests left out what exceeds the memory."""
    whole = sum(not one.in_place for one in output.measurements)
    return output.torn if shortened else max(output.torn, len(command.sizes(params)) - whole)


def unsplit(params: Mapping[str, Any], num_nodes: int, gpus_per_node: int, output: nccl_tests.Output) -> str | None:
    """That nccl-tests did not make the groups that it was asked for; None where it did, or does not say."""
    groups = {device.group for device in output.devices if device.group is not None}
    expected = {"none": 1, "node": num_nodes, "rail": gpus_per_node}[params["split"]]
    if not groups or len(groups) == expected:
        return None
    return f"made {counted(len(groups), 'group')} of GPUs, not {expected}: it does not know NCCL_TESTS_SPLIT"
