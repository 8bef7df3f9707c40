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
from functools import partial
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
    params, local, on_gpu = job.params, int(os.environ["LOCAL_RANK"]), job.device == "cuda"
    monitor = state.Monitor.of(local) if on_gpu else None
    before = monitor.before() if monitor else None  # this process, too, will use it
    shared = not (monitor and monitor.exclusive)
    pairs = job.gpus_per_node * (job.gpus_per_node - 1) if on_gpu and shared else 0
    expected_s = {"preparing": PREPARE_S, "matrix products": params["soak_s"], "copies in memory": COPY_S}
    if on_gpu:
        expected_s |= {"copies to and from hosts": TURN_S * job.gpus_per_node, "copies between GPUs": PAIR_S * pairs}
    progress = Progress(events, expected_s)
    progress.enter("preparing")

    out = Output(events, {"gpu": monitor.index if monitor else local, "uuid": monitor.uuid if monitor else None})
    for metric, value, context in before.values() if before else ():
        out(metric, value, **context)
    gpu = _gpu(local, monitor, before) if on_gpu else None
    device = gpu or _cpu()
    meeting = Meeting.from_environment(job.gpus_per_node)
    with device.named("multiplying matrices"):
        load = _load(job, device, gpu, meeting, out)
        if meeting.rank == 0:
            peers = {"peers": "not measured: GPUs are in exclusive compute mode"} if not shared else {}
            rows = max(shape.rows for shape in load.shapes)
            events("used", products=load.name, rows=rows, precisions=", ".join(load.products), **peers)
        progress.enter("matrix products")
        meeting.wait()
        _soak(job, device, monitor, load, out, progress)
        del load
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
    if gpu:
        progress.enter("copies to and from hosts")
        _host_copies(job, gpu, monitor, meeting, out, progress)
        device.release()
        meeting.wait()
        progress.enter("copies between GPUs")
        if local == 0 and pairs:
            _pairs(job, gpu, out, lambda done: progress.at(done / pairs))
    progress.enter("")


def _cpu() -> Device:
    from runner.workloads.gpu.device import Cpu

    return Cpu()


def _gpu(local: int, monitor: state.Monitor | None, before: state.Before | None) -> Gpu:
    from runner.workloads.gpu.device import Gpu

    index, uuid = (monitor.index, monitor.uuid) if monitor else (local, None)
    return Gpu(local, index, uuid, before.others if before else "")


@dataclass(frozen=True)
class Load:
    """The matrix products of a soak: what they are, and by precision how often each is computed in a block."""

    name: str
    shapes: Sequence[products.Shape]
    products: Mapping[str, Sequence[products.Repeated]]
    rounds: Mapping[str, Sequence[int]]

    def run(self, precision: str) -> None:
        """A block."""
        for product, times in zip(self.products[precision], self.rounds[precision], strict=True):
            for _ in range(times):
                product.run()

    def flop(self, precision: str) -> int:
        """Of a block."""
        each = zip(self.products[precision], self.rounds[precision], strict=True)
        return sum(product.shape.flop * times for product, times in each)

    def wrong_values(self, precision: str) -> int:
        """Elements of the last results that differ from the first ones in any bit."""
        return sum(product.wrong_values() for product in self.products[precision])


def _load(job: RankJob, device: Device, gpu: Gpu | None, meeting: Meeting, out: Output) -> Load:
    """Products that are the same on all ranks, so that their rates compare, and their first results as well."""
    from runner.workloads.gpu.device import seconds

    model = job.model or {}
    able = meeting.share([list(device.precisions), gpu.free_bytes() if gpu else 0])
    precisions = [each for each in device.precisions if all(each in theirs for theirs, _ in able)]
    if gpu:
        name, shapes = products.on_gpu(model, min(free for _, free in able), precisions)
    else:
        name, shapes = products.on_cpu(model)
    block_s = min(max(job.params["soak_s"] / BLOCKS, BLOCK_S[0]), BLOCK_S[1])
    made, rounds = {}, {}
    for precision in precisions:
        made[precision] = [
            products.Repeated(shape, precision, device.place, job.seed + place) for place, shape in enumerate(shapes)
        ]
        pass_s = sum(seconds(device, each.run, 2) / 2 * each.shape.number for each in made[precision])
        rounds[precision] = products.repeats(shapes, statistics.median(meeting.share(pass_s)), block_s)
        digests = [each.digest() for each in made[precision]]
        alike = [theirs for model, theirs in meeting.share([device.model, digests]) if model == device.model]
        others, majority = odd(digests, alike)
        context = {"precision": precision, "seed": job.seed, "compared": len(alike), "majority": majority}
        out("wrong_values", int(others), check="same product on all", **context)
    return Load(name, shapes, made, rounds)


def odd(mine: Sequence[int], alike: Sequence[Sequence[int]]) -> tuple[bool, bool]:
    """(Whether a result is not that of most, or that there is no such; whether most have the same)."""
    common, count = max(((each, alike.count(each)) for each in alike), key=lambda found: found[1])
    majority = 2 * count > len(alike)
    return mine != common or not majority, majority


def _soak(
    job: RankJob, device: Device, monitor: state.Monitor | None, load: Load, out: Output, progress: Progress
) -> None:
    """Blocks of each precision by turns, for `soak_s`; after each, its last results are compared with the first."""
    from runner.workloads.gpu.device import seconds

    soak_s, least = job.params["soak_s"], job.params["blocks"]
    rates: dict[str, list[float]] = {precision: [] for precision in load.products}
    started = time.monotonic()
    with state.Watch(monitor) if monitor else nullcontext() as watch:
        while (elapsed := time.monotonic() - started) < soak_s or min(map(len, rates.values())) < least:
            progress.at(elapsed / soak_s)
            for precision, values in rates.items():
                context = {"precision": precision, "block": len(values)}
                took_s = seconds(device, partial(load.run, precision), 1)
                values.append(load.flop(precision) / took_s / 1e12)
                out("matmul_tflop_per_s", values[-1], shapes=load.name, **context)
                wrong = load.wrong_values(precision)
                out("wrong_values", wrong, check="repeated product", seed=job.seed, **context)
    for precision, values in rates.items():
        out("matmul_drift_pct", drift_pct(values), precision=precision)
    for metric, value, context in watch.values() if watch else ():
        out(metric, value, **context)


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
    progress: Progress,
) -> None:
    """One GPU of each node after the other: its host's memory serves it alone."""
    from runner.workloads.gpu import copies, numa

    phase = "copying to and from its host"
    local = numa.node_of(monitor.pci) if monitor and monitor.pci else None
    size_bytes = job.params["host_bytes"]
    with gpu.named(phase):
        host = copies.HostCopies(gpu, size_bytes, job.seed, local)
    for turn, mine in enumerate(meeting.turns()):
        progress.at(turn / job.gpus_per_node)
        if mine:
            with gpu.named(phase):
                for metric, place, rates in host.measure(job.params["blocks"]):
                    out.blocks(metric, rates, size_bytes=size_bytes, **place)
            for metric, value, context in monitor.links() if monitor else ():
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
