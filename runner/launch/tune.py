"""Finds the fastest settings of a model on nodes, by short runs: each probe is an ordinary run of one cell.

So it works over every backend, and each probe has processes of its own. The runs are kept in `<results>/tuned/probes`,
and what was found in `results.tuned`, after every probe: what was interrupted goes on where it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from runner.cluster import facts
from runner.cluster.inventory import Inventory
from runner.errors import InfrastructureError, Interrupted, RunnerError, UsageError
from runner.failures import KINDS, NODE, current
from runner.launch import prepare, start
from runner.launch.carry import Dependencies
from runner.launch.search import Change, Settings, Space, Spent, faster, least_gain, search
from runner.plan import tuned
from runner.plan.plan import Cell
from runner.plan.tuned import (
    ACCUMULATION,
    COMPILE,
    DEEPCOMPILE,
    HPZ,
    MICRO_BATCH,
    PRECISION,
    PREFETCH_BUCKET,
    QUANTIZED,
    RECOMPUTE,
    REDUCE_BUCKET,
    SECTION,
    STAGE,
)
from runner.report.progress import Display
from runner.report.tuned import gave
from runner.results import tuned as results
from runner.results.rundir import RunDir
from runner.results.status import each_error
from runner.results.tuned import FAILED, OK, OUT_OF_MEMORY, REFUSED, Probe, Subject, Tuned
from runner.system.clock import now
from runner.system.wording import counted
from runner.workloads.registry import TESTS, trains

PROBES = {"cuda": 16, "cpu": 6}  # at most, by device: a CPU shows that it works, not what is best
MINUTES = 20.0
STEPS, WARMUP = 4, 2  # of a probe
PATIENCE_S = 600.0  # with a probe, at least: its ranks may have to compile
TOKENS = 65536  # of a GPU in a step of a probe: the planned step's may take a minute
OUT_OF = ("cuda_out_of_memory", "out_of_memory")  # kinds of failure that answer a probe

_BY_COST = ("none", "selective", "full")  # of recompute, from what costs least time
_BUCKET = 500_000_000  # DeepSpeed's default, in elements
_BUCKETS = (0.25, 4)  # times the configured sizes
# What can be asked for, beside micro-batch, recompute, stage and buckets: what it is, and where it is possible.
ASKED = {
    "compile": "torch.compile, on GPUs; tried in any case there",
    "hpz": "weights gathered within a node, on several nodes under ZeRO-3; tried in any case there",
    "fp8": "FP8 training, on GPUs that have it",
    "quantised": "weights quantised while they are gathered, under ZeRO-3",
    "deepcompile": "DeepSpeed's own compiler, on GPUs",
}


@dataclass(frozen=True)
class Options:
    """The options of `runner tune`, not checked yet. `bench` are those of the run that it is for.

    `tries` are names in ASKED, `probes` is the most that are run (None: PROBES), `minutes` after which none is begun.
    """

    bench: prepare.Options
    tries: tuple[str, ...] = ()
    probes: int | None = None
    minutes: float = MINUTES


@dataclass(frozen=True)
class Task:
    """What is to be tuned: a checked request, where the search begins and what it may try.

    A probe trains `sequences` of a GPU in each step, the planned run `planned`, both in all micro-batches together.
    """

    options: Options
    prepared: prepare.Prepared
    cell: Cell
    space: Space
    sequences: int
    planned: int
    probes: int

    @property
    def global_batch(self) -> int:
        """The planned global batch, in sequences."""
        assert self.cell.batch is not None
        return self.cell.batch.global_batch

    @property
    def tried(self) -> int:
        """How many probes may be run before the settings without tuning and the best are measured once more."""
        return min(self.probes, max(2, self.probes - 2))

    @property
    def probe_batch(self) -> int:
        """The global batch of a probe, in sequences."""
        return self.global_batch // self.planned * self.sequences


@dataclass(frozen=True)
class Ended:
    """A result and its file, with the probes of the settings without tuning and of the best."""

    tuned: Tuned
    path: Path
    default: Probe
    best: Probe


Read = Callable[[str | None], Inventory]


class _Outdated(Exception):
    """What an interrupted search has measured was measured with other versions."""


def prepared(options: Options, read: Read) -> Task:
    """Check the options and plan the search; no node is contacted.

    Raises UsageError for options that cannot be planned.
    """
    for name in options.tries:
        if name not in ASKED:
            raise UsageError(f"--try {name}: known: {', '.join(ASKED)}")
    if given := next((each for each in options.bench.settings if each.partition("=")[0] == "tuned"), None):
        raise UsageError(f"--set {given}: what was tuned before is not used while tuning: leave it out")
    bench = replace(
        options.bench,
        tests=(SECTION,),
        settings=(*options.bench.settings, "tuned=false"),
        repeats=1,
        node_counts=tuple(sorted(options.bench.node_counts)[-1:]),
    )
    options = replace(options, bench=bench)
    ready = prepare.prepare(bench, read)
    cell = next(cell for cell in ready.plan.cells if trains(cell.test))
    assert cell.batch is not None and cell.deepspeed is not None
    planned = cell.batch.micro_batch * cell.batch.gradient_accumulation
    sequences = _sequences(cell)
    space = _space(ready, cell, sequences, options.tries)
    return Task(options, ready, cell, space, sequences, planned, options.probes or PROBES[cell.device])


def _sequences(cell: Cell) -> int:
    """The sequences of a GPU in a step of a probe: a part of the planned ones that every micro-batch tried divides."""
    assert cell.batch is not None
    micro, accumulation = cell.batch.micro_batch, cell.batch.gradient_accumulation
    parts = [micro * part for part in range(1, accumulation + 1) if accumulation % part == 0]
    return next((part for part in parts if part * cell.params["seq_len"] >= TOKENS), parts[-1])


def _space(ready: prepare.Prepared, cell: Cell, sequences: int, tries: Sequence[str]) -> Space:
    assert cell.batch is not None and cell.deepspeed is not None
    held, config, params = ready.tuned.held, cell.deepspeed, cell.params
    known = TESTS[SECTION].load_settings().model_fields
    stage = tuned.value_in(config, STAGE) or 0
    zero = isinstance(config.get("zero_optimization"), Mapping)
    base: dict[str, Any] = {
        MICRO_BATCH: cell.batch.micro_batch,
        RECOMPUTE: "full" if params["recompute"] == "auto" else params["recompute"],
    }
    if zero:
        base[STAGE] = stage
    every = [m for m in range(1, sequences + 1) if sequences % m == 0]
    choices = get_args(known["recompute"].annotation)
    recompute = [name for name in _BY_COST if name in choices]
    offloads = tuned.value_in(config, f"{STAGE.rpartition('.')[0]}.offload_param") is not None
    stages = [1, 2] if stage == 3 and not offloads else []
    several, on_gpu = cell.num_nodes > 1, cell.device != "cpu"
    changes: list[Change] = []  # what may gain most is first
    sharded = {STAGE: 3}
    gpu = ready.request.hardware
    eight_bits = gpu["fp8_peak_tflop_per_s"] is not None or not gpu["gpu_memory_gib"]  # 0: not known yet
    optional: dict[str, tuple[bool, bool, Change]] = {  # possible here, without being asked, the change
        "compile": (on_gpu and "compile" in known and not params["compile"], True, Change({COMPILE: True})),
        "fp8": (
            on_gpu and "precision" in known and eight_bits,
            False,
            Change({PRECISION: "fp8", COMPILE: True}),
        ),
        "hpz": (several and on_gpu and stage == 3, True, Change({HPZ: cell.gpus_per_node}, sharded)),
        "quantised": (on_gpu and stage == 3, False, Change({QUANTIZED: True}, sharded)),
        "deepcompile": (on_gpu and stage in (1, 3), False, Change({DEEPCOMPILE: True, COMPILE: False})),
    }
    for name, (possible, unasked, change) in optional.items():
        if name in tries and not possible:
            raise UsageError(f"--try {name}: {ASKED[name]}; not so here")
        if possible and (unasked or name in tries):
            changes.append(change)
    if zero and cell.world_size > 1:
        sizes = {key: tuned.value_in(config, key) or _BUCKET for key in (REDUCE_BUCKET, PREFETCH_BUCKET)}
        sizes = {key: size for key, size in sizes.items() if key not in held}
        changes += [Change({key: max(1, round(size * factor)) for key, size in sizes.items()}) for factor in _BUCKETS]
    return Space(
        base=base,
        micro_batches=[cell.batch.micro_batch] if MICRO_BATCH in held else every,
        recompute=[base[RECOMPUTE]] if RECOMPUTE in held else recompute,
        stages=[] if STAGE in held else stages,
        changes=[each for each in changes if each.settings and not each.settings.keys() & held.keys()],
    )


def listed(task: Task) -> list[Settings]:
    """The settings that are tried if each is faster than the one before, in order: what may be run at most."""
    found: list[Settings] = []

    def measure(settings: Settings) -> Probe:
        if len(found) >= task.tried:
            raise Spent
        found.append(settings)
        return Probe(settings, OK, float(len(found)), 2.0 ** len(found), 0.0)

    search(task.space, measure)
    return found


def described(task: Task) -> str:
    """What would be tried, as text: what each setting may become, what is held, and the probes if each is faster."""
    space, subject, tried = task.space, tuned.subject(task.prepared.untuned), listed(task)
    assert subject is not None
    values: dict[str, Sequence[Any]] = {
        MICRO_BATCH: space.micro_batches,
        RECOMPUTE: space.recompute,
        STAGE: [space.base[STAGE], *space.stages] if space.stages else [],
    }
    lines = [
        f"tune for {subject.text()}, global batch {task.global_batch}: {counted(task.probes, 'probe')} of "
        f"{WARMUP} + {STEPS} steps at most, none begun that is likely to end after {task.options.minutes:g} min",
        f"  without tuning: {tuned.named(space.base)}",
        *(f"  tried: {key} {', '.join(map(str, each))}" for key, each in values.items() if len(each) > 1),
        *(f"  tried: {tuned.short(change.settings)}" for change in space.changes),
        *(f"  held: {key} by {why}" for key, why in task.prepared.tuned.held.items()),
        "probes in order, if each is faster than the one before and memory suffices:",
        *(f"  {number}. {tuned.short(settings)}" for number, settings in enumerate(tried, 1)),
        *(
            ["and once more the settings without tuning, and the best if it is faster still"]
            if 1 < len(tried) < task.probes
            else []
        ),
    ]
    return "\n".join(lines)


def tune(task: Task, read: Read, display: Display, dependencies: Dependencies | None = None) -> Ended:
    """Run the probes and save what they show; returns that.

    Raises InfrastructureError where the settings without tuning cannot be measured or a node failed, Interrupted on a
    signal; what was measured until then is saved, and the same command goes on there.
    """
    tuner = _Tuner(task, read, display, dependencies)
    with display.progress(task.probes):
        try:
            best = tuner.search()
        except (KeyboardInterrupt, Interrupted):
            what = f"interrupted after {counted(len(tuner.probes), 'probe')}"
            raise Interrupted(f"{what}; the same command goes on there" if tuner.probes else what) from None
    if best is None:
        reasons = "; ".join(dict.fromkeys(probe.note for probe in tuner.probes if probe.note))
        raise UsageError(f"none of {counted(len(tuner.probes), 'probe')} has enough memory: {reasons}")
    found = tuner.result(best)
    file = results.save(tuner.folder, found)
    results.save_begun(tuner.folder, tuner.asked, None)
    return Ended(found, file, tuner.probes[0], best)


class _Tuner:
    """Measures settings, within the bounds of a task, and keeps what was measured."""

    def __init__(self, task: Task, read: Read, display: Display, dependencies: Dependencies | None) -> None:
        self.task, self.read, self.display, self.dependencies = task, read, display, dependencies
        self.folder = task.options.bench.results
        subject = tuned.subject(task.prepared.untuned)
        assert subject is not None
        self.asked: Subject = subject
        self.subject = subject  # with the hardware that the nodes turn out to have
        self.versions: dict[str, str] = {}
        self.matmul: float | None = None
        self.probes: list[Probe] = []
        self.ran = 0
        self.began = time.monotonic()
        self.earlier = self._earlier()

    def search(self) -> Probe | None:
        """The probe of the best settings within the bounds; None where none has succeeded."""
        try:
            return self._confirmed(search(self.task.space, self.measure))
        except _Outdated as error:
            self.display.note(f"what was measured before was with {error}: all is measured again")
            self.earlier, self.probes, self.ran = None, [], 0
            return self._confirmed(search(self.task.space, self.measure))

    def _confirmed(self, best: Probe | None) -> Probe | None:
        """The slower of two measurements of the best settings, or the settings without tuning where that is not faster
        than both of theirs: a machine is not the same at two times, which the steps of one process do not show, and
        the best of many measurements of equal settings is one by luck.
        """
        default = self.probes[0]
        if best is None or best is default or default.outcome != OK:
            return best
        for settings in (default.settings, best.settings):
            if self.ran >= self.task.probes or not self._in_time():
                break
            again = self._measured(settings)
            rate = again.positions_per_s_per_gpu or 0.0  # 0: it has failed now
            if settings == best.settings and rate < (best.positions_per_s_per_gpu or 0.0):
                best = again
            defaults = [probe for probe in self.probes if probe.settings == default.settings]
            if not all(faster(best, probe) for probe in defaults):
                return default
        return best

    def _earlier(self) -> Tuned | None:
        """What an interrupted search has measured for the same subject and batch."""
        try:
            found = results.find_begun(self.folder, self.asked)
        except UsageError as error:
            self.display.note(f"{error}: it is written again")
            return None
        return found if found is not None and found.global_batch == self.task.global_batch else None

    # --- one probe ----------------------------------------------------------------------------------

    def measure(self, settings: Settings) -> Probe:
        """The probe of `settings`: an earlier one, or a run. Raises Spent beyond the bounds of the task."""
        known = [p for p in (self.earlier.probes if self.earlier else ()) if dict(p.settings) == dict(settings)]
        if known and known[0].outcome != FAILED:
            self._keep(known[0], "measured before")
            return known[0]
        if self.ran >= self.task.tried or not self._in_time():
            raise Spent
        return self._measured(settings)

    def _measured(self, settings: Settings) -> Probe:
        began = time.monotonic()
        try:
            made = self._run(settings)
        except UsageError as error:
            if not self.probes:
                raise  # the settings without tuning: it is the user's request that is wrong
            made = Probe(settings, REFUSED, note=str(error))
        except RunnerError as error:
            self.save()
            # A probe is not what is finished: what the run of it says to the user is left out.
            done = counted(len(self.probes), "probe")
            error.__notes__ = [f"{done} kept; the same command goes on there"] if self.probes else []
            raise
        if made.outcome != REFUSED:
            self.ran += 1
        self._keep(replace(made, seconds=round(time.monotonic() - began, 1)))
        self.save()
        if not any(probe.outcome == OK for probe in self.probes) and made.outcome == FAILED:
            raise InfrastructureError(f"the settings without tuning cannot be measured: {made.note} ({made.run})")
        return self.probes[-1]

    def _in_time(self) -> bool:
        """Whether another probe is likely to end in time; the first one always begins."""
        spent = time.monotonic() - self.began
        return not self.ran or spent + self._typical_s() <= 60 * self.task.options.minutes

    def _typical_s(self) -> float:
        return statistics.median([p.seconds for p in self.probes if p.outcome != REFUSED and p.seconds] or [0.0])

    def _keep(self, probe: Probe, how: str = "") -> None:
        self.probes.append(probe)
        said = gave(probe, self.subject) + (f", {how}" if how else "")
        self.display.note(f"probe {len(self.probes)}: {tuned.short(probe.settings)}: {said}")

    def _run(self, settings: Settings) -> Probe:
        task = self.task
        micro = settings[MICRO_BATCH]
        given = {
            **settings,
            ACCUMULATION: task.sequences // micro,
            f"{SECTION}.global_batch": task.probe_batch,
            f"{SECTION}.steps": STEPS,
            f"{SECTION}.warmup_steps": WARMUP,
            f"{SECTION}.timeout_s": min(task.cell.params["timeout_s"], max(PATIENCE_S, 60 * task.options.minutes)),
        }
        set_ = tuple(f"{key}={value if isinstance(value, str) else _yaml(value)}" for key, value in given.items())
        bench = task.options.bench
        options = replace(bench, results=self.folder / results.FOLDER / "probes", settings=(*bench.settings, *set_))
        ready = prepare.prepare(options, self.read)
        shown = _OfProbe(self.display, len(self.probes), task.probes, tuned.short(settings), self._left_s)
        ended = start.start(ready, shown, self.dependencies)
        return self._read_back(settings, ended.run, ended.summary)

    def _left_s(self) -> float | None:
        """The seconds that are left at most, from what probes have taken; None before there was one."""
        if not (typical := self._typical_s()):
            return None
        left = 60 * self.task.options.minutes - (time.monotonic() - self.began)
        return max(0.0, min((self.task.probes - self.ran) * typical, left))

    def _read_back(self, settings: Settings, run: RunDir, summary: Mapping[str, Any]) -> Probe:
        plan, status = run.read_plan(), run.read_status()
        [cell] = plan["cells"]
        entry = status["cells"][cell["id"]]
        where = f"{results.FOLDER}/probes/{run.run_id}"
        self._learn(run, plan)
        if entry["state"] == "cancelled":
            raise Interrupted("interrupted")
        if entry["state"] != "complete":
            errors = each_error(entry["error"]) if entry["error"] else []
            kinds = [current(error["kind"]) for error in errors]
            message = "; ".join(dict.fromkeys(error["message"] for error in errors)) or entry["state"]
            if any(kind in OUT_OF for kind in kinds):
                return Probe(settings, OUT_OF_MEMORY, note=message, run=where)
            if any(KINDS[kind].fault == NODE for kind in kinds):
                self.save()
                raise InfrastructureError(f"{message} ({where})", kinds[0])
            return Probe(settings, FAILED, note=message, run=where)
        metrics = summary["cells"][0]["metrics"]
        if not metrics.get("step_time_s_p50"):
            return Probe(settings, FAILED, note="no step was measured", run=where)
        step_s = metrics["step_time_s_p50"]
        positions = self.task.probe_batch * cell["params"]["seq_len"] / step_s / cell["world_size"]
        self.matmul = metrics.get("matmul_tflop_per_s", self.matmul)
        return Probe(
            settings,
            OK,
            tokens_per_s_per_gpu=positions * metrics.get("packing_utilisation_pct", 100) / 100,
            positions_per_s_per_gpu=positions,
            noise=metrics["step_time_s_mad"] / step_s,
            peak_memory_gib=metrics.get("peak_memory_gib"),
            run=where,
        )

    def _learn(self, run: RunDir, plan: Mapping[str, Any]) -> None:
        """Take the hardware and the versions that the run's nodes had; what was measured with others is not used."""
        self.subject = replace(self.subject, hardware=plan["hardware"]["name"])
        environments = {
            host: facts.comparable(seen)
            for hosts in run.read_facts(plan).values()
            for host, seen in hosts.items()
        }  # fmt: skip
        self.versions = results.versions(environments) or self.versions
        if self.earlier is not None and (changed := self.earlier.outdated(self.versions)):
            raise _Outdated("; ".join(changed))

    # --- what is kept -------------------------------------------------------------------------------

    def save(self) -> None:
        """Keep what was measured until now."""
        if self.probes:
            best = max(self.probes, key=lambda probe: probe.positions_per_s_per_gpu or 0.0)
            results.save_begun(self.folder, self.asked, self.result(best))

    def result(self, best: Probe) -> Tuned:
        """The result with the settings of `best`, for the planned batch."""
        micro = best.settings[MICRO_BATCH]
        settings = {MICRO_BATCH: micro, ACCUMULATION: self.task.planned // micro}
        base = self.task.space.base
        settings |= {
            key: value
            for key, value in best.settings.items()
            if key not in settings and (key == RECOMPUTE or base.get(key) != value)
        }
        return Tuned(
            subject=self.subject,
            versions=self.versions or (self.earlier.versions if self.earlier else {}),
            created=now(),
            command=self.task.options.bench.command,
            global_batch=self.task.global_batch,
            settings=settings,
            tokens_per_s_per_gpu=best.tokens_per_s_per_gpu,
            probes=tuple(self.probes),
            matmul_tflop_per_s=self.matmul,
        )


class _OfProbe(Display):
    """What a probe's run shows: its progress as a part of the whole; its notes are in its own log."""

    def __init__(self, whole: Display, number: int, total: int, name: str, left_s: Callable[[], float | None]) -> None:
        super().__init__(quiet=True)
        self._whole, self._number, self._of, self._name, self._rest_s = whole, number, total, name, left_s

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """The bar of the whole search is shown already."""
        yield

    def at(self, done: float, total: float, text: str, *, left_s: float | None = None) -> None:
        """Move the bar of the whole search by this probe's part."""
        done = self._number + min(done / total, 1.0) if total else self._number
        self._whole.at(min(done, self._of), self._of, f"probe {self._name}", left_s=self._rest_s())


def conclusion(ended: Ended) -> str:
    """In a line whether tuning was worth it: the best against the settings without it."""
    best, default = ended.best, ended.default
    if not best.positions_per_s_per_gpu or not default.positions_per_s_per_gpu:
        return f"without tuning: {gave(default, ended.tuned.subject)}"
    probes = [probe for probe in ended.tuned.probes if probe.outcome == OK]
    defaults = [probe for probe in probes if probe.settings == default.settings]
    rates = [probe.positions_per_s_per_gpu for probe in defaults if probe.positions_per_s_per_gpu]
    if best is not default:
        return f"{best.positions_per_s_per_gpu / max(rates):.2f} × the rate without tuning"
    if defaults == probes:
        return "the settings without tuning remain: nothing else was measured"
    noise = max(least_gain(probe, other) for probe in probes for other in defaults)
    differs = f"{100 * max(noise, max(rates) / min(rates) - 1):.0f} %"
    return (
        f"the settings without tuning remain: nothing is faster by more than what repeats differ by (up to {differs})"
    )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
