"""`runner tune` from its options to what `runner bench` plans from then on, on nodes whose speed is a formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import Nodes
from test_start import kept

from runner.cluster import facts
from runner.errors import InfrastructureError, Interrupted, UsageError
from runner.launch import blame, carry, preflight, prepare, start, tune
from runner.launch.supply import Data
from runner.report import page
from runner.report.progress import Display
from runner.report.tuned import table
from runner.results import tuned as results
from runner.results.rundir import RunDir

FACTS = {
    "hostname": "n",
    "gpus": [{"name": "NVIDIA H200", "memory_gib": 139.8}],
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"},
    "env": {},
}
SEQ_LEN = 4096


class Trainers(Nodes):
    """Nodes that train: a step takes a host's second and one a sequence, and 8 sequences are too many for the memory."""

    bench: Machine

    def converse(self, planned, cell, watch, data, context):
        self.bench.cells.append(cell)
        fault = self.bench.fault(cell) if self.bench.fault else None
        if isinstance(fault, BaseException):
            raise fault
        for host in cell.hosts:
            folder = self.run.cell(host, cell.id).path
            folder.mkdir(parents=True)
            (folder / "facts.json").write_text(json.dumps(self.bench.facts))
            ranks = range(8) if host == cell.hosts[0] else range(8, 16)
            for rank in ranks:
                lines = [self.event(cell, rank, step) for step in range(6)]
                (folder / f"rank{rank}.jsonl").write_text(
                    "".join(f"{json.dumps(line)}\n" for each in lines for line in each)
                )
        if fault:
            watch.errors = []
            return fault
        from runs import ended_session

        from runner.node.protocol import Outcome

        watch.sessions = [ended_session(host) for host in cell.hosts]
        watch.outcomes = {host: Outcome(rc=0) for host in cell.hosts}
        return None

    def event(self, cell, rank, step):
        batch = cell.batch
        took = batch.gradient_accumulation * (1 + batch.micro_batch) * self.bench.slowness
        took *= {3: 1.0, 2: 1.0, 1: 0.8}[cell.deepspeed["zero_optimization"]["stage"]]
        positions = batch.gradient_accumulation * batch.micro_batch * SEQ_LEN
        values = {"step_time_s": took, "tokens": positions, "loss_tokens": positions // 2, "positions": positions}
        if step == 5:
            values |= {"packing_utilisation_pct": 97.0, "peak_memory_gib": 60.0 + batch.micro_batch}
        context = {"step": step, "measured": step >= 2}
        for metric, value in values.items():
            once = {} if metric in ("packing_utilisation_pct", "peak_memory_gib") else context
            yield {"event": "value", "rank": rank, "metric": metric, "value": value, "context": once}


class Machine:
    """`runner tune` and `runner bench` on two nodes that are not there."""

    def __init__(self, cluster, path: Path) -> None:
        self.cluster, self.results, self.state = cluster, path / "results", path / "state"
        self.cells: list = []
        self.facts, self.slowness = FACTS, 1.0
        self.fault: Callable | None = lambda cell: (
            blame.error("cuda_out_of_memory", "CUDA out of memory", cell.hosts[0])
            if cell.batch.micro_batch >= 8
            else None
        )

    def access(self, *_, **__):
        def transport(run, first, expected):
            nodes = Trainers(run)
            nodes.bench = self
            return nodes

        environment = facts.comparable(self.facts)
        ask = lambda nodes: preflight.Answers({}, {node.name: environment for node in nodes})  # noqa: E731
        return SimpleNamespace(ask=ask, transport=transport)

    def read(self, _):
        return self.cluster

    @property
    def dependencies(self) -> carry.Dependencies:
        folder = type("Folder", (RunDir,), {"keep_transport": kept})
        return carry.Dependencies(state=self.state, access=self.access, data=lambda *_: Data("/data/x"), folder=folder)

    def asked(self, *settings: str, **options) -> prepare.Options:
        given = {"node_counts": (2,), "model": "llama-2-7b", "tests": ("sft",), "inventory": "x", **options}
        return prepare.Options(self.results, "runner x", settings=settings, **given)

    def task(self, *settings: str, tries=(), probes=None, minutes=20.0, **options) -> tune.Task:
        return tune.prepared(tune.Options(self.asked(*settings, **options), tries, probes, minutes), self.read)

    def tune(self, *settings: str, display: Display | None = None, **options) -> tune.Ended:
        return tune.tune(self.task(*settings, **options), self.read, display or Display(quiet=True), self.dependencies)

    def plan(self, *settings: str, **options) -> prepare.Prepared:
        return prepare.prepare(self.asked(*settings, **options), self.read)

    def bench(self, *settings: str, display: Display | None = None) -> dict:
        ended = start.start(self.plan(*settings), display or Display(quiet=True), self.dependencies)
        return ended.run.read_plan()


def measured(ended: tune.Ended) -> list[results.Probe]:
    return [probe for probe in ended.tuned.probes if probe.outcome != results.REFUSED]


class Notes(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def nodes(cluster, tmp_path, monkeypatch) -> Machine:
    monkeypatch.setattr(prepare.deepspeed_config, "refuse", lambda *_: None)  # in a process of its own
    monkeypatch.setattr(page, "write", lambda *_, **__: None)
    monkeypatch.setattr(tune, "_BUCKETS", ())
    return Machine(cluster, tmp_path)


def test_the_fastest_that_fits_is_found_kept_and_used_by_the_next_bench(nodes):
    before = nodes.plan().plan.cells[0].batch
    ended = nodes.tune(probes=30, minutes=1000)
    settings = ended.tuned.settings
    assert settings["sft.micro_batch"] == 4 and settings["deepspeed.zero_optimization.stage"] == 1
    assert settings["sft.micro_batch"] * settings["sft.gradient_accumulation"] * 16 == before.global_batch
    assert ended.tuned.versions["packages.torch"] == "2.13.0"
    assert ended.path.parent == nodes.results / "tuned" and ended.tuned == results.find(
        nodes.results, ended.tuned.subject
    )
    prepared = nodes.plan()
    assert prepared.plan.tuned["settings"] == settings and prepared.notes == ()
    plan = nodes.bench()
    assert plan["tuned"]["settings"] == settings
    cell = plan["cells"][0]
    assert cell["batch"]["global_batch"] == before.global_batch and cell["batch"]["micro_batch"] == 4
    assert cell["deepspeed"]["zero_optimization"]["stage"] == 1
    assert nodes.plan("tuned=false").plan.tuned is None


def test_probes_are_runs_of_one_cell_with_the_same_tokens_a_step_and_none_is_in_the_list_of_runs(nodes):
    ended = nodes.tune()
    trained = {cell.batch.micro_batch * cell.batch.gradient_accumulation for cell in nodes.cells}
    assert trained == {16} and {cell.params["steps"] for cell in nodes.cells} == {4}
    assert {cell.params["timeout_s"] for cell in nodes.cells} == {
        1200.0
    }  # one that hangs does not take the test's hours
    assert [run.run_id for run in RunDir.all(nodes.results)] == []
    for probe in ended.tuned.probes:
        assert (nodes.results / probe.run / "plan.json").is_file()
    assert {cell.hosts for cell in nodes.cells} == {tuple(node.name for node in nodes.cluster.nodes[:2])}


def test_out_of_memory_is_an_answer_and_rates_leave_padding_out(nodes):
    ended = nodes.tune(probes=30, minutes=1000)
    outcomes = {probe.settings["sft.micro_batch"]: probe.outcome for probe in ended.tuned.probes}
    assert outcomes[8] == "out_of_memory" and outcomes[4] == "ok"
    best = ended.best
    assert best.positions_per_s_per_gpu == pytest.approx(4 * SEQ_LEN / (5 * 0.8))
    assert best.tokens_per_s_per_gpu == pytest.approx(0.97 * best.positions_per_s_per_gpu)
    assert best.peak_memory_gib == 64.0
    text = table(ended.tuned, ended.default, ended.best)
    assert "tokens/s per GPU" in text and "out of memory" in text and "without tuning" in text and "best" in text
    assert "× the rate without tuning" in tune.conclusion(ended)


def test_the_bounds_of_probes_and_minutes_hold(nodes):
    assert nodes.task().probes == tune.PROBES["cuda"]
    for most in (1, 2, 3, 5):
        nodes.tune(probes=most)
        assert min(most, 2) <= len(nodes.cells) <= most
        nodes.cells.clear()
    ended = nodes.tune(minutes=1e-9)
    assert len(nodes.cells) == 1 and ended.best is ended.default
    assert tune.conclusion(ended).endswith("nothing else was measured")


def test_what_is_held_is_neither_tried_nor_kept(nodes):
    assert nodes.plan().tuned.held == {}  # by the files that come with the product
    task = nodes.task("sft.recompute=full", "deepspeed.zero_optimization.stage=3")
    assert task.space.recompute == ["full"] and not task.space.stages
    ended = nodes.tune("sft.recompute=full", "deepspeed.zero_optimization.stage=3", minutes=1000, probes=30)
    assert {cell.params["recompute"] for cell in nodes.cells} == {"full"}
    assert {cell.deepspeed["zero_optimization"]["stage"] for cell in nodes.cells} == {3}
    assert "deepspeed.zero_optimization.stage" not in ended.tuned.settings


def test_settings_without_tuning_that_are_as_fast_the_second_time_remain(nodes):
    """A machine that becomes faster while it is tuned shows nothing of the settings."""

    def warming(cell):
        nodes.slowness *= 0.5
        return None

    nodes.fault = warming
    ended = nodes.tune()
    assert ended.best is ended.default and "remain" in tune.conclusion(ended)
    assert ended.tuned.settings["sft.micro_batch"] == ended.default.settings["sft.micro_batch"]


@pytest.mark.parametrize("lucky", [2, 3, 4])
def test_settings_that_are_faster_once_by_luck_are_not_chosen(nodes, lucky):
    """Of many equal settings one is always the fastest: it is so again, or the settings without tuning remain."""

    def equal(cell):
        batch = cell.batch
        own = batch.gradient_accumulation * (1 + batch.micro_batch)
        own *= 0.8 if cell.deepspeed["zero_optimization"]["stage"] == 1 else 1.0
        nodes.slowness = (0.9 if len(nodes.cells) == lucky else 1.0) / own
        return None

    nodes.fault = equal
    ended = nodes.tune()
    assert (
        ended.best is ended.default and ended.tuned.settings["sft.recompute"] == ended.default.settings["sft.recompute"]
    )
    rates = [probe.positions_per_s_per_gpu for probe in ended.tuned.probes]
    assert max(filter(None, rates)) > 1.1 * min(filter(None, rates))


def test_what_repeats_differ_by_is_what_a_gain_must_exceed(nodes):
    default, other = {"sft.micro_batch": 1}, {"sft.micro_batch": 2}
    probes = (
        results.Probe(default, "ok", 1344.0, 1344.0, 0.032),
        results.Probe(other, "ok", 1564.0, 1564.0, 0.099),
    )
    found = replace(nodes.tune(minutes=1e-9).tuned, probes=probes)
    text = tune.conclusion(tune.Ended(found, Path("x"), probes[0], probes[0]))
    assert text.endswith("by more than what repeats differ by (up to 21 %)")  # 16 % is not more


def test_the_gain_is_over_the_better_of_the_two_measurements_without_tuning(nodes):
    """The first probe of a machine may be slow for reasons of its own."""

    def slow_at_first(cell):
        nodes.slowness = 2.0 if len(nodes.cells) == 1 else 1.0
        return None

    nodes.fault = slow_at_first
    ended = nodes.tune()
    first, *_, again, best = ended.tuned.probes
    assert best.settings == ended.best.settings
    assert first.settings == again.settings and again.positions_per_s_per_gpu > 1.9 * first.positions_per_s_per_gpu
    gained = ended.best.positions_per_s_per_gpu / again.positions_per_s_per_gpu
    assert tune.conclusion(ended) == f"{gained:.2f} × the rate without tuning"
    assert table(ended.tuned, ended.default, ended.best).count("without tuning") == 2


def test_a_search_that_is_interrupted_keeps_what_it_measured_and_goes_on_there(nodes):
    memory, count = nodes.fault, 0

    def interrupt(cell):
        nonlocal count
        count += 1
        return KeyboardInterrupt() if count == 3 else memory(cell)

    nodes.fault = interrupt
    with pytest.raises(Interrupted, match="after 2 probes; the same command goes on there"):
        nodes.tune(probes=30, minutes=1000)
    assert nodes.plan().plan.tuned is None  # what was begun is not used
    nodes.fault, notes = memory, Notes()
    nodes.cells.clear()
    ended = nodes.tune(probes=30, minutes=1000, display=notes)
    assert [note.endswith("measured before") for note in notes.notes[:3]] == [True, True, False]
    assert len(nodes.cells) == len(measured(ended)) - 2 and ended.tuned.settings["sft.micro_batch"] == 4
    nodes.cells.clear()
    nodes.tune(probes=30, minutes=1000)  # what is complete is measured anew
    assert len(nodes.cells) == len(measured(ended))


def test_what_was_measured_before_with_other_versions_is_measured_again(nodes):
    memory = nodes.fault
    nodes.fault = lambda cell: KeyboardInterrupt() if len(nodes.cells) == 3 else memory(cell)
    with pytest.raises(Interrupted):
        nodes.tune()
    nodes.facts = {**FACTS, "packages": {**FACTS["packages"], "torch": "2.14.0"}}
    nodes.fault, notes = memory, Notes()
    nodes.cells.clear()
    ended = nodes.tune(display=notes, probes=30, minutes=1000)
    assert "torch 2.13.0, nodes have 2.14.0" in " ".join(notes.notes)
    assert len(nodes.cells) == len(measured(ended)) + 1
    assert ended.tuned.versions["packages.torch"] == "2.14.0"


def test_nodes_with_other_versions_do_not_use_it_and_say_so(nodes):
    nodes.tune()
    nodes.facts = {**FACTS, "packages": {**FACTS["packages"], "torch": "2.14.0"}}
    assert nodes.plan().plan.tuned is not None  # no node was asked yet
    notes = Notes()
    assert nodes.bench(display=notes)["tuned"] is None
    [note] = [note for note in notes.notes if "tuned" in note]
    assert "torch 2.13.0, nodes have 2.14.0; tune again: runner tune -i x" in note


def test_a_node_that_fails_ends_it_and_settings_that_fail_do_not(nodes):
    memory = nodes.fault
    nodes.fault = lambda cell: (
        blame.error("rank_crashed", "planted", cell.hosts[0]) if cell.batch.micro_batch == 2 else memory(cell)
    )
    ended = nodes.tune("sft.gradient_accumulation=null", probes=30, minutes=1000)
    assert {p.outcome for p in ended.tuned.probes} >= {"failed", "ok"}
    nodes.fault = lambda cell: blame.error("gpu_failed", "GPU 3 is lost", cell.hosts[0])
    with pytest.raises(InfrastructureError, match="GPU 3 is lost"):
        nodes.tune()


def test_what_ends_it_names_the_command_that_goes_on_and_not_the_probes_run(nodes):
    for number, notes in ((1, []), (2, ["1 probe kept; the same command goes on there"])):
        nodes.cells.clear()
        nodes.fault = lambda _: InfrastructureError("planted") if len(nodes.cells) == number else None  # noqa: B023
        with pytest.raises(InfrastructureError, match="planted") as ended:
            nodes.tune()
        assert ended.value.__notes__ == notes


def test_settings_without_tuning_that_cannot_run_end_it(nodes):
    nodes.fault = lambda cell: blame.error("rank_crashed", "planted", cell.hosts[0])
    with pytest.raises(InfrastructureError, match="without tuning cannot be measured: planted"):
        nodes.tune()
    nodes.fault = lambda cell: blame.error("cuda_out_of_memory", "CUDA out of memory", cell.hosts[0])
    with pytest.raises(UsageError, match="has enough memory: CUDA out of memory"):
        nodes.tune()


def test_what_can_be_tried_depends_on_the_machine(nodes, machine, tmp_path):
    changes = [change.settings for change in nodes.task().space.changes]
    assert {"sft.compile": True} in changes
    assert {"deepspeed.zero_optimization.zero_hpz_partition_size": 8} in changes
    assert not any("sft.precision" in change for change in changes)
    one = [change.settings for change in nodes.task(node_counts=(1,)).space.changes]
    assert not any("zero_hpz_partition_size" in key for change in one for key in change)
    with pytest.raises(UsageError, match="--try fp9: known: compile"):
        nodes.task(tries=("fp9",))
    cpu = Machine(machine, tmp_path)
    task = cpu.task(model="tiny", node_counts=())
    assert task.probes == tune.PROBES["cpu"] and all("sft.compile" not in c.settings for c in task.space.changes)
    with pytest.raises(UsageError, match="--try compile: torch"):
        cpu.task(model="tiny", node_counts=(), tries=("compile",))


def test_a_dry_run_lists_what_would_be_tried(nodes):
    task = nodes.task(probes=4)
    text = tune.described(task)
    assert "llama-2-7b, h200-sxm, 2 nodes (16 ranks), 4096 tokens, global batch 1024: 4 probes" in text
    assert len(tune.listed(task)) == 2 and tune.listed(task)[0] == task.space.base
    assert "once more" in text and "once more" not in tune.described(nodes.task(probes=1))
    assert "  held: sft.recompute by --set" in tune.described(nodes.task("sft.recompute=full"))
    assert nodes.cells == [] and not nodes.results.exists()


@pytest.mark.parametrize(
    ("planned", "micro", "seq_len", "expected"),
    [(128, 1, 4096, 16), (128, 4, 4096, 16), (16, 16, 4096, 16), (4, 2, 256, 4), (7, 1, 4096, 7), (96, 3, 4096, 24)],
)
def test_a_probe_trains_a_part_of_the_planned_step(nodes, planned, micro, seq_len, expected):
    cell = nodes.plan().plan.cells[0]
    batch = replace(cell.batch, micro_batch=micro, gradient_accumulation=planned // micro)
    sequences = tune._sequences(replace(cell, batch=batch, params={**cell.params, "seq_len": seq_len}))
    assert sequences == expected and planned % sequences == 0 == sequences % micro
