"""The search for the fastest settings, on machines whose rate and memory are formulas."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.launch.search import GAIN, Change, Space, Spent, faster, search
from runner.plan.tuned import COMPILE, MICRO_BATCH, RECOMPUTE, STAGE
from runner.results.tuned import OK, OUT_OF_MEMORY, REFUSED, Probe

LEVELS = ("none", "selective", "full")


@dataclass
class Machine:
    """A step takes `host` and for each sequence the level's `cost`; memory is `states` and the level's `keeps` a sequence."""

    host: float = 1.0
    cost: tuple[float, float, float] = (1.0, 1.1, 1.33)
    keeps: tuple[float, float, float] = (10.0, 5.0, 1.0)
    states: dict[int, float] = field(default_factory=lambda: {3: 10.0, 2: 40.0, 1: 60.0})
    memory: float = 100.0
    stage: dict[int, float] = field(default_factory=lambda: {3: 1.0, 2: 0.95, 1: 0.9})
    refuses: bool = False  # the estimate knows; else the probe finds out
    most: int | None = None
    asked: list[dict] = field(default_factory=list)

    def needs(self, settings: dict) -> float:
        return self.states[settings[STAGE]] + settings[MICRO_BATCH] * self.keeps[LEVELS.index(settings[RECOMPUTE])]

    def rate(self, settings: dict) -> float:
        micro, cost = settings[MICRO_BATCH], self.cost[LEVELS.index(settings[RECOMPUTE])]
        rate = micro / (self.host + micro * cost) / self.stage[settings[STAGE]]
        return rate * (1.2 if settings.get(COMPILE) else 1.0)

    def measure(self, settings: dict) -> Probe:
        if self.most is not None and len(self.asked) >= self.most:
            raise Spent
        self.asked.append(dict(settings))
        if self.needs(settings) > self.memory:
            return Probe(settings, REFUSED if self.refuses else OUT_OF_MEMORY)
        rate = 1000 * self.rate(settings)
        return Probe(settings, OK, rate, rate, 0.0)


def space(base: tuple[int, str, int] = (1, "none", 3), sequences: int = 16, **changes) -> Space:
    micros = [m for m in range(1, sequences + 1) if sequences % m == 0]
    start = {MICRO_BATCH: base[0], RECOMPUTE: base[1], STAGE: base[2]}
    return Space(**{"base": start, "micro_batches": micros, "recompute": LEVELS, "stages": (1, 2), **changes})


def found(machine: Machine, where: Space) -> tuple[int, str, int] | None:
    best = search(where, machine.measure)
    return best and (best.settings[MICRO_BATCH], best.settings[RECOMPUTE], best.settings[STAGE])


def test_without_tuning_is_measured_first_and_nothing_twice():
    machine = Machine()
    where = space((2, "full", 3))
    assert found(machine, where) is not None
    assert machine.asked[0] == where.base
    assert len({tuple(sorted(s.items())) for s in machine.asked}) == len(machine.asked)


def test_the_micro_batch_grows_until_memory_ends_it_and_then_less_is_kept():
    """9 sequences fit without recomputation, 18 with selective; at 16 the latter costs less than the host does."""
    assert found(Machine(host=4.0, states={3: 10.0}), space(stages=())) == (16, "selective", 3)
    assert found(Machine(host=0.5, states={3: 10.0}), space(stages=())) == (8, "none", 3)


def test_what_fits_between_two_powers_of_two_is_tried():
    machine = Machine(host=10.0, memory=79.0)  # 6 sequences without recomputation, 12 do not fit
    assert found(machine, space(sequences=12, stages=(), recompute=("none",))) == (6, "none", 3)


def test_what_fits_below_the_one_that_ended_it_is_tried_with_less_kept():
    """Of 22, selective leaves room for 4 sequences, and 12 do not fit in full recomputation either; but 6 do."""
    machine = Machine(host=8.0, cost=(1.0, 1.125, 1.5), keeps=(8.0, 3.0, 2.0), states={3: 10.0}, memory=22.0)
    assert found(machine, space(sequences=12, stages=())) == (6, "full", 3)


def test_where_memory_did_not_end_it_nothing_is_computed_again():
    machine = Machine(memory=1000.0)
    found(machine, space(stages=()))
    assert {s[RECOMPUTE] for s in machine.asked} == {"none"}


def test_settings_that_do_not_fit_are_an_answer_the_first_too():
    assert found(Machine(memory=35.0, states={3: 10.0}), space((8, "none", 3), stages=())) == (4, "selective", 3)
    assert found(Machine(memory=9.0, states={3: 10.0}), space(stages=())) is None


def test_a_lower_stage_is_used_where_memory_permits_it_and_the_next_one_where_that_does_not():
    """Stage 1 with 60 leaves 40 of 100 for 4 sequences, stage 2 with 40 leaves 60."""
    assert found(Machine(), space(sequences=4)) == (4, "none", 1)
    tight = Machine(memory=85.0)  # four sequences: 100 under stage 1, 80 under stage 2
    assert found(tight, space(sequences=4)) == (4, "none", 2)


def test_where_no_lower_stage_fits_a_smaller_micro_batch_is_tried_with_it():
    machine = Machine(host=0.3, memory=80.0, states={3: 10.0, 1: 60.0, 2: 60.0}, stage={3: 1.0, 2: 0.5, 1: 0.5})
    assert found(machine, space(sequences=4)) == (2, "none", 1)


def test_a_stage_that_is_slower_is_not_used():
    assert found(Machine(stage={3: 1.0, 2: 1.2, 1: 1.2}), space(sequences=4)) == (4, "none", 3)


def test_changes_are_tried_on_the_best_and_only_where_they_apply():
    machine = Machine()
    changes = (Change({COMPILE: True}), Change({"deepspeed.x": 8}, {STAGE: 3}))
    best = search(space(sequences=4, changes=changes), machine.measure)
    assert best.settings == {MICRO_BATCH: 4, RECOMPUTE: "none", STAGE: 1, COMPILE: True}
    assert not any("deepspeed.x" in settings for settings in machine.asked)


def test_what_is_held_is_not_changed():
    machine = Machine(host=5.0)
    held = space((2, "full", 3), micro_batches=[2], recompute=["full"], stages=())
    assert found(machine, held) == (2, "full", 3) and len(machine.asked) == 1


def test_a_difference_within_the_noise_changes_nothing():
    def measure(settings):
        rate = 1000.0 + 150 * settings[MICRO_BATCH]
        return Probe(settings, OK, rate, rate, noise=0.2)

    assert search(space((2, "none", 3), sequences=4), measure).settings == space((2, "none", 3)).base
    assert found(Machine(host=1e-4), space((4, "none", 3), stages=())) == (4, "none", 3)  # 0.01 %


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((104, 0.0), (100, 0.0), True),
        ((102, 0.0), (100, 0.0), False),
        ((120, 0.05), (100, 0.05), True),
        ((112, 0.05), (100, 0.05), False),
        ((100, 0.0), (120, 0.0), False),
        ((100, None), (90, None), True),
    ],
)
def test_faster_is_more_than_the_least_gain_and_more_than_the_noise(one, other, expected):
    probes = [Probe({}, OK, rate, rate, noise) for rate, noise in (one, other)]
    assert faster(*probes) is expected
    assert faster(probes[0], Probe({}, OUT_OF_MEMORY)) and not faster(Probe({}, OUT_OF_MEMORY), probes[0])


machines = st.builds(
    Machine,
    host=st.floats(0.01, 20),
    cost=st.tuples(st.just(1.0), st.floats(1.02, 1.2), st.floats(1.2, 1.5)),
    keeps=st.tuples(st.floats(8, 40), st.floats(3, 8), st.floats(0.1, 3)),
    states=st.just({3: 10.0}),
    memory=st.floats(11, 400),
    stage=st.just({3: 1.0}),
    refuses=st.booleans(),
)


@given(machines, st.sampled_from((1, 4, 12, 16, 24, 7)), st.data())
def test_the_best_that_fits_is_found_where_measurements_are_clean(machine, sequences, data):
    """Whatever it begins with: by exhaustion nothing that fits is faster than what a doubling may still gain."""
    micros = [m for m in range(1, sequences + 1) if sequences % m == 0]
    base = (data.draw(st.sampled_from(micros)), data.draw(st.sampled_from(LEVELS)), 3)
    every = [{MICRO_BATCH: m, RECOMPUTE: r, STAGE: 3} for m in micros for r in LEVELS]
    fitting = [settings for settings in every if machine.needs(settings) <= machine.memory]
    best = search(space(base, sequences, stages=()), machine.measure)
    assert (best is None) == (not fitting)
    if best:
        most = max(map(machine.rate, fitting))
        assert machine.needs(best.settings) <= machine.memory
        assert machine.rate(best.settings) >= most * (1 - 3 * GAIN)


@given(machines, st.integers(1, 8))
def test_the_bound_holds_and_the_best_until_then_is_returned(machine, most):
    machine.most = most
    best = search(space((2, "full", 3), stages=()), machine.measure)
    assert len(machine.asked) <= most
    fits = [settings for settings in machine.asked if machine.needs(settings) <= machine.memory]
    assert (best is None) == (not fits) and (best is None or best.settings in fits)
