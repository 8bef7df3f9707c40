"""What NVML said of each GPU during the test, and whether it explains that one is slow. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.results.records import Record
from runner.results.statistics import spread as spread_of
from runner.system.wording import are, counted
from runner.workloads.gpu import compare
from runner.workloads.gpu.compare import Gpu

LOWER = 0.95  # of the others' clock or power limit: below it explains
# Points of the time that a reason is active beyond the others' median, from where on it explains: of heat and of faulty
# power supply, and of what healthy GPUs have as well. It also has to be as many of their deviations away.
EXCESS_PCT, EXCESS_OF_USUAL_PCT, SPREADS = 5.0, 20.0, 5.0
USUAL = {"sw_power_cap", "sync_boost", "applications_clocks", "display_clocks"}
USED_MEMORY = 0.05  # of a GPU's memory, taken before the test began: somebody else uses it
USED_PCT = 5.0  # utilisation in % before the test began: likewise
# Of several cells the lowest is kept of these, the highest of all others.
LOWEST = {"sm_clock_mhz", "pcie_width", "pcie_generation", "power_limit_w", "nvlinks_active"}


def computes(util_pct: float | None) -> bool:
    """Whether a GPU of this utilisation, in %, computes for somebody; not where it is unknown."""
    return (util_pct or 0.0) > USED_PCT


def taken(used_gib: float | None, memory_gib: float | None) -> bool:
    """Whether somebody has taken memory of a GPU: `used_gib` of `memory_gib`; not where either is unknown."""
    return (used_gib or 0.0) > USED_MEMORY * memory_gib if memory_gib else False


@dataclass(frozen=True)
class Condition:
    """What was read of one GPU: (metric, its `statistic` or `reason`, or "") -> the worst value over its cells.

    `contexts` has the last record's context by metric, and `xids` the numbers of the errors that the driver reported.
    """

    values: Mapping[tuple[str, str], float]
    contexts: Mapping[str, Mapping[str, Any]]
    xids: tuple[int, ...] = ()

    def get(self, metric: str, which: str = "") -> float | None:
        """The value in the unit of the metric's name; None where it was not read. `new`: since the test began."""
        return self.values.get((metric, which))

    @property
    def busy(self) -> bool:
        """Whether the GPU computed for somebody else just before the test."""
        return computes(self.get("util_before_pct"))

    def memory_errors(self) -> list[str]:
        """Errors of the GPU's memory that mean that it must not be used."""
        found = []
        if new := self.get("ecc_uncorrected", "new"):
            found.append(counted(round(new), "uncorrected memory error") + " during the test")
        if self.get("remap_failed"):
            found.append("a bad row of its memory could not be remapped")
        return found

    def used_by_others(self) -> str:
        """Who used the GPU before the test began; empty if nobody did."""
        processes, used = self.get("other_processes") or 0, self.get("util_before_pct") or 0.0
        memory = self.get("memory_used_before_gib") or 0.0
        whole = self.contexts.get("memory_used_before_gib", {}).get("memory_gib")
        if not processes and not self.busy and not taken(memory, whole):
            return ""
        pids = ", ".join(str(pid) for pid in self.contexts.get("other_processes", {}).get("pids") or ())
        who = counted(round(processes), "other process", "other processes") if processes else "somebody"
        return f"{who}{f' (pid {pids})' if pids else ''} used it before the test: {memory:.1f} GiB, {used:.0f} % busy"

    def narrow_link(self) -> str:
        """What the PCIe link is and could be, where that differs; empty otherwise."""
        found = []
        for metric, words in (("pcie_width", "x{:.0f}"), ("pcie_generation", "generation {:.0f}")):
            now, most = self.get(metric), self.contexts.get(metric, {}).get("max")
            if now and most and now < float(most):
                found.append(f"{words.format(now)} instead of {words.format(float(most))}")
        return f"its PCIe link is {' and '.join(found)}" if found else ""

    def links_down(self) -> str:
        """How many of the GPU's NVLinks are up, where not all of them are; empty otherwise."""
        up, of = self.get("nvlinks_active"), self.contexts.get("nvlinks_active", {}).get("links")
        if up is None or not of or up >= of:
            return ""
        return f"{up:.0f} of its {counted(int(of), 'NVLink')} {are(round(up))} up"

    def explains(self, others: Sequence[Condition]) -> tuple[str, str] | None:
        """(kind of failure, why) where this explains that the GPU is slow; None where it is as the `others` are.

        What all of them have explains nothing: matrix products bring every healthy GPU to its power limit.
        """
        if errors := self.memory_errors():
            return "gpu_memory_errors", ", ".join(errors)
        if used := self.used_by_others():
            return "busy_gpu", used
        because = []
        for (metric, reason), share in self.values.items():
            if metric != "throttle_share_pct" or reason == "gpu_idle":
                continue
            usual, spread = _usual(other.get(metric, reason) for other in others)
            if usual is None and reason in USUAL:
                continue
            excess = EXCESS_OF_USUAL_PCT if reason in USUAL else EXCESS_PCT
            if share >= (usual or 0.0) + max(excess, SPREADS * spread):
                rest = f", of the others in {usual:.0f} %" if usual is not None else ""
                because.append(f"{reason} in {share:.0f} % of the time{rest}")
        clock = self.get("sm_clock_mhz", "mean")
        usual, spread = _usual(other.get("sm_clock_mhz", "mean") for other in others)
        if clock and usual and clock < min(LOWER * usual, usual - SPREADS * spread):
            because.append(f"its clock was {clock:,.0f} MHz, the others' {usual:,.0f} MHz")
        limit, default = self.get("power_limit_w"), self.contexts.get("power_limit_w", {}).get("default_w")
        usual_limit = _usual(other.get("power_limit_w") for other in others)[0] or default
        if limit and usual_limit and limit < LOWER * usual_limit:
            because.append(f"its power limit is {limit:,.0f} W instead of {usual_limit:,.0f} W")
        if because and (hottest := self.get("temperature_c", "max")) is not None:
            because.append(f"at most {hottest:.0f} °C")
        return ("throttled", ", ".join(because)) if because else None


def conditions(records: Iterable[Record]) -> dict[Gpu, Condition]:
    """GPU -> its condition, of every GPU that has a record."""
    values: dict[Gpu, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    contexts: dict[Gpu, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    errors: dict[Gpu, list[int]] = defaultdict(list)
    for record in records:
        gpu, context = compare.gpu_of(record), record.context
        which = str(context.get("statistic") or context.get("reason") or "")
        values[gpu][record.metric, which].append(record.value)
        if context.get("before") is not None:
            values[gpu][record.metric, "new"].append(record.value - float(context["before"]))
        contexts[gpu][record.metric] = context
        if record.metric == "xid":
            errors[gpu].append(round(record.value))
    return {
        gpu: Condition(
            {key: (min if key[0] in LOWEST else max)(found) for key, found in each.items()},
            contexts[gpu],
            tuple(errors[gpu]),
        )
        for gpu, each in values.items()
    }


def _usual(values: Iterable[float | None]) -> tuple[float | None, float]:
    """(median of those that are known, None without any; their median absolute deviation)."""
    known = [value for value in values if value is not None]
    return (statistics.median(known), spread_of(known)) if known else (None, 0.0)
