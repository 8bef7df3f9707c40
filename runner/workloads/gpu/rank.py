"""Test `gpu`: what each GPU of the cluster does by itself, all of them at the same time.

No rank needs another: they meet before each phase in torchrun's store, so that all work, are warm and draw power at
once, and that copies between a GPU and its host have the host for themselves. Results are compared bit by bit with the
first one of the same kernel on the same numbers.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.workloads.gpu import products, state
from runner.workloads.gpu.meeting import Meeting
from runner.workloads.job import Events, RankJob

if TYPE_CHECKING:
    from runner.workloads.gpu.device import Device, Gpu

BLOCKS = 20  # of a soak, over all precisions
BLOCK_S = (0.02, 10.0)  # of a block of products, at least and at most
PREPARE_S, COPY_S, TURN_S, PAIR_S = 6.0, 1.0, 0.4, 0.15  # about what phases take, for the progress


@dataclass
class Progress:
    """How far the cell is, in seconds of what is expected of its phases."""

    events: Events
    expected_s: Mapping[str, float]
    _done_s: float = 0.0
    _phase: str = ""

    def enter(self, phase: str) -> None:
        """Begin a phase; the one before has ended."""
        self._done_s += self.expected_s.get(self._phase, 0.0)
        self._phase = phase
        self.at(0.0)

    def at(self, share: float) -> None:
        """`share`, 0 to 1, of the phase is done."""
        done_s = self._done_s + min(1.0, share) * self.expected_s.get(self._phase, 0.0)
        self.events.progress(round(10 * done_s), round(10 * sum(self.expected_s.values())), self._phase or "done")


@dataclass(frozen=True)
class Output:
    """Writes records of one GPU."""

    events: Events
    gpu: Mapping[str, Any]

    def __call__(self, metric: str, value: float, **context: Any) -> None:
        self.events.value(metric, value, **self.gpu, **context)

    def blocks(self, metric: str, values: Sequence[float], **context: Any) -> None:
        """A record for each of several measurements of the same."""
        for block, value in enumerate(values):
            self(metric, value, block=block, **context)


def run(job: RankJob, events: Events) -> None:
    """Measure this rank's GPU and write every value to `events`; the first rank of a node measures its pairs of GPUs.

    Raises InfrastructureError for an error of CUDA, with the GPU and what it was doing.
    """
    params, local = job.params, int(os.environ["LOCAL_RANK"])
    on_gpu = job.device == "cuda"
    peers = job.gpus_per_node * (job.gpus_per_node - 1) if on_gpu else 0
    progress = Progress(
        events,
        {
            "preparing": PREPARE_S if on_gpu else 0.1,
            "matrix products": params["soak_s"],
            "copies in memory": COPY_S,
            "copies to and from hosts": TURN_S * job.gpus_per_node if on_gpu else 0,
            "copies between GPUs": PAIR_S * peers,
        },
    )
    progress.enter("preparing")
    monitor = state.Monitor.of(local) if on_gpu else None
    before = monitor.before() if monitor else None
    device = _device(local, monitor, before, on_gpu)
    out = Output(events, {"gpu": device.index, "uuid": device.uuid})
    for metric, value, context in before.values() if before else ():
        out(metric, value, **context)
    meeting = Meeting.from_environment(job.gpus_per_node)
    with device.named("multiplying matrices"):
        _soak(job, device, monitor, meeting, out, progress)
    device.release()

    from runner.workloads.gpu import copies

    progress.enter("copies in memory")
    meeting.wait()
    size_bytes = params["copy_bytes"]
    with device.named("copying in its memory"):
        rates, wrong = copies.within(device, size_bytes, params["blocks"], job.seed)
    out.blocks("hbm_copy_gb_per_s", rates, size_bytes=size_bytes)
    out("wrong_values", wrong, check="copy in memory", seed=job.seed)
    device.release()
    if on_gpu:
        gpu: Gpu = device  # type: ignore[assignment]
        progress.enter("copies to and from hosts")
        _host_copies(job, gpu, monitor, meeting, out, progress.at)
        device.release()
        meeting.wait()
        progress.enter("copies between GPUs")
        if local == 0 and peers:
            _pairs(job, gpu, out, lambda done: progress.at(done / peers))
    progress.enter("")


def _device(local: int, monitor: state.Monitor | None, before: state.Before | None, on_gpu: bool) -> Device:
    from runner.workloads.gpu.device import Cpu, Gpu

    if not on_gpu:
        return Cpu(local)
    index, uuid = (monitor.index, monitor.uuid) if monitor else (local, None)
    return Gpu(local, index, uuid, before.others if before else "")


def _soak(
    job: RankJob,
    device: Device,
    monitor: state.Monitor | None,
    meeting: Meeting,
    out: Output,
    progress: Progress,
) -> None:
    """Blocks of matrix products in each precision by turns, for `soak_s`; each result is compared with the first."""
    from runner.workloads.gpu.device import seconds

    params, model = job.params, job.model or {}
    free = min(meeting.share(device.free_bytes()))  # of all alike, so that rates compare
    if job.device == "cuda":
        name, shapes = products.on_gpu(model, params["rows"], free, device.precisions)
    else:
        name, shapes = products.on_cpu(model)
    made = {
        precision: [products.Product(shape, precision, device.place, job.seed + n) for n, shape in enumerate(shapes)]
        for precision in device.precisions
    }
    if meeting.rank == 0:
        out.events("used", products=name, rows=max(s.rows for s in shapes), precisions=", ".join(device.precisions))
    block_s = min(max(params["soak_s"] / BLOCKS, BLOCK_S[0]), BLOCK_S[1])
    rounds = {}
    for precision, each in made.items():
        pass_s = sum(seconds(device, p.run, 2) / 2 * p.shape.number for p in each)
        rounds[precision] = products.repeats(shapes, statistics.median(meeting.share(pass_s)), block_s)
    rates: dict[str, list[float]] = {precision: [] for precision in made}
    progress.enter("matrix products")
    meeting.wait()
    started = time.monotonic()
    with state.Watch(monitor) if monitor else nullcontext() as watch:
        while (elapsed := time.monotonic() - started) < params["soak_s"] or len(rates[precision]) < params["blocks"]:
            progress.at(elapsed / params["soak_s"])
            for precision, each in made.items():
                block = len(rates[precision])
                took_s = seconds(device, _all_of(each, rounds[precision]), 1)
                flop = sum(p.shape.flop * times for p, times in zip(each, rounds[precision], strict=True))
                rates[precision].append(flop / took_s / 1e12)
                context = {"precision": precision, "block": block}
                out("matmul_tflop_per_s", rates[precision][-1], shapes=name, **context)
                wrong = sum(p.wrong_values() for p in each)
                out("wrong_values", wrong, check="repeated product", seed=job.seed, **context)
    for precision, values in rates.items():
        out("matmul_drift_pct", drift_pct(values), precision=precision)
    for metric, value, context in watch.values() if watch else ():
        out(metric, value, **context)


def _all_of(each: Sequence[products.Product], rounds: Sequence[int]) -> Callable[[], None]:
    def run() -> None:
        for product, times in zip(each, rounds, strict=True):
            for _ in range(times):
                product.run()

    return run


def drift_pct(values: Sequence[float]) -> float:
    """How much more the last fifth of `values` is than the first, in %; negative where they fell."""
    fifth = max(1, len(values) // 5)
    return 100 * (statistics.fmean(values[-fifth:]) / statistics.fmean(values[:fifth]) - 1)


def _host_copies(
    job: RankJob,
    gpu: Gpu,
    monitor: state.Monitor | None,
    meeting: Meeting,
    out: Output,
    report: Callable[[float], None],
) -> None:
    """One GPU of each node after the other: its host's memory serves it alone."""
    from runner.workloads.gpu import copies, numa

    phase = "copying to and from its host"
    local = numa.node_of(monitor.pci) if monitor and monitor.pci else None
    size_bytes = job.params["host_bytes"]
    with gpu.named(phase):
        host = copies.HostCopies(gpu, size_bytes, job.seed, local)
    for turn, mine in enumerate(meeting.turns()):
        report(turn / job.gpus_per_node)
        if mine:
            with gpu.named(phase):
                for metric, place, rates in host.measure(job.params["blocks"]):
                    out.blocks(metric, rates, size_bytes=size_bytes, **place)
            for metric, value, context in monitor.link() if monitor else ():
                out(metric, value, **context)
    with gpu.named(phase):
        for direction, wrong in host.wrong():
            out("wrong_values", wrong, check=direction, seed=job.seed)


def _pairs(job: RankJob, gpu: Gpu, out: Output, report: Callable[[int], None]) -> None:
    """Every pair of this node's GPUs, by one process, while the other ranks of the node do nothing."""
    from runner.workloads.gpu import copies

    monitors = {each: state.Monitor.of(each) for each in range(job.gpus_per_node)}
    name = {each: found.index if found else each for each, found in monitors.items()}
    size_bytes, blocks = job.params["peer_bytes"], job.params["blocks"]
    for done, (pair, rates, wrong) in enumerate(copies.between(gpu, list(name), size_bytes, blocks, job.seed), 1):
        context = {"source": name[pair.source], "target": name[pair.target]}
        out.blocks("peer_gb_per_s", rates, **context, direct=pair.direct, size_bytes=size_bytes)
        out("wrong_values", wrong, check="copy between GPUs", seed=job.seed, **context)
        report(done)
