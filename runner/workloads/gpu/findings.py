"""What the records of test `gpu` show to be wrong: which GPU, link or node, by which evidence. Pure.

A GPU that is more than 5 % under the median of its node or of the cluster is worth knowing. It is a finding where the
whole interval over blocks and repeats lies there, or where its own state explains it: clocks, throttling, errors, other
processes. Of fewer than three GPUs the slower one is not blamed, unless its state explains it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runner.cluster import xids
from runner.failures import NOBODY, Suspect
from runner.results.records import Record
from runner.system.wording import counted
from runner.workloads.gpu import compare, condition
from runner.workloads.gpu.compare import Distance, Gpu, Measure, Pair

UNDER = 0.05  # of a median: what is worth knowing
MOST = 0.75  # of a node's GPUs, or of a GPU's links: then it is the node, or the GPU
# Shares of the data sheet's rates that healthy GPUs exceed in every shape that the test computes.
EXPECTED = {"bf16": ("bf16_peak_tflop_per_s", 0.6), "fp8": ("fp8_peak_tflop_per_s", 0.4), "hbm": ("hbm_gb_per_s", 0.8)}

Facts = Mapping[str, Mapping[str, Mapping[str, Any]]]
Key = tuple[Hashable, ...]  # what a suspect is of, so that it is told once
Values = Mapping[Gpu, Mapping[compare.Block, float]]


def find(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    by_cell: Mapping[str, Sequence[Record]],
    facts: Facts,
) -> Iterable[Suspect]:
    """Suspects, faults before observations. A GPU is compared with those of the same name in cells of as many nodes.

    What is told by the cells of most nodes is not told again by those of fewer.
    """
    told: dict[Key, Suspect] = {}
    counts = sorted({cell["num_nodes"] for cell in cells}, reverse=True)
    for count in counts:
        group = [cell for cell in cells if cell["num_nodes"] == count]
        for key, suspect in _Group(plan, group, by_cell, facts).suspects():
            told.setdefault(key, suspect)
    return sorted(told.values(), key=lambda suspect: suspect.observation)


class _Group:
    """The cells of one node count, which are repeats of each other."""

    def __init__(
        self,
        plan: Mapping[str, Any],
        cells: Sequence[Mapping[str, Any]],
        by_cell: Mapping[str, Sequence[Record]],
        facts: Facts,
    ) -> None:
        self._hardware = plan.get("hardware", {})
        self._records = [record for cell in cells for record in by_cell.get(cell["id"], ())]
        judged = {cell["id"] for cell in cells if cell["state"] == "complete" and not cell.get("not_judged")}
        self._judged = [record for record in self._records if record.cell in judged]
        self._names = {
            (host, int(gpu["index"])): str(gpu.get("name"))
            for cell in cells
            for host, seen in facts.get(cell["id"], {}).items()
            for gpu in seen.get("gpus") or ()
            if "index" in gpu
        }
        self._states = condition.conditions(self._records)
        ids = [cell["id"] for cell in cells]
        self._cells = ", ".join(ids) if len(ids) < 4 else f"{ids[0]} and {len(ids) - 1} more"
        families = {self._family(gpu) for gpu in self._states}
        self._comparisons = 2 * len(self._states) * (len(compare.RATES) + len(compare.LINKS)) // max(1, len(families))

    def suspects(self) -> Iterator[tuple[Key, Suspect]]:
        """(what it is of, suspect) of the cells, the surest first."""
        yield from self._wrong()
        slow: dict[Gpu, list[str]] = {}
        yield from self._rates(slow)
        yield from self._errors()
        yield from self._drift(slow)
        yield from self._links()
        yield from self._peers()
        yield from self._others(slow)
        yield from self._by_hardware()

    # --- what needs no comparison -------------------------------------------------------------------------

    def _wrong(self) -> Iterator[tuple[Key, Suspect]]:
        """GPUs that gave wrong values, and pairs of GPUs between which they came to be."""
        wrong: dict[Gpu | Pair, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        apart: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in self._records:
            if record.metric == "wrong_values" and record.value > 0:
                context = record.context
                check = " ".join(str(context[key]) for key in ("check", "precision") if context.get(key))
                if "compared" in context:  # with the results of as many GPUs
                    apart[record.cell, check].append(record)
                else:
                    wrong[compare.pair_of(record) or compare.gpu_of(record)][check].append(record)
        for (cell, check), records in apart.items():
            of = int(records[0].context["compared"])
            if records[0].context.get("majority"):
                for record in records:
                    wrong[compare.gpu_of(record)][check].append(record)
                continue
            differ = f"{counted(of, 'GPU')} have different results{_seeds(records)}, none of which most have"
            text = f"{check}: {differ}"
            yield ("apart", check), Suspect("gpu_wrong_values", f"{cell}: all GPUs", text, NOBODY)
        for suspect, checks in wrong.items():
            texts = []
            for check, records in checks.items():
                if compared := records[0].context.get("compared"):
                    said = f"not what most of {counted(compared, 'GPU')} have"
                else:
                    said = counted(round(sum(record.value for record in records)), "wrong element")
                texts.append(f"{check}: {said}{_seeds(records)}")
            text = f"{suspect}: {'; '.join(texts)}, where every repetition and copy must be the same in every bit"
            yield (
                ("wrong", suspect),
                Suspect("gpu_wrong_values", self._where(suspect), text, "high", suspect.host),
            )

    def _errors(self) -> Iterator[tuple[Key, Suspect]]:
        for gpu, state in self._states.items():
            if errors := state.memory_errors():
                text = f"{gpu}: {', '.join(errors)}"
                yield ("memory", gpu), Suspect("gpu_memory_errors", self._where(gpu), text, "high", gpu.host)
            elif state.get("ecc_uncorrected") or state.get("remap_pending"):
                found = counted(round(state.get("ecc_uncorrected") or 0), "uncorrected memory error")
                pending = ", and rows that wait for a reset to be remapped" if state.get("remap_pending") else ""
                text = f"{gpu}: {found} since its driver was loaded, none of them during the test{pending}"
                yield ("memory", gpu), self._noted(Suspect("gpu_memory_errors", self._where(gpu), text, "low"), gpu)
            for number in dict.fromkeys(state.xids):
                bad, action = xids.action(xids.Xid(number, "", False, False, ""))
                suspect = Suspect(
                    "gpu_failed",
                    self._where(gpu),
                    f"{gpu}: the driver reported Xid {number} during the test ({action})",
                    "high" if bad else "low",
                    gpu.host,
                    observation=not bad,
                )
                yield ("xid", gpu, number), suspect

    # --- rates --------------------------------------------------------------------------------------------

    def _rates(self, slow: dict[Gpu, list[str]]) -> Iterator[tuple[Key, Suspect]]:
        """Slow nodes and GPUs. `slow` gets the GPUs that are named, with why."""
        under: dict[Gpu, list[_Under]] = defaultdict(list)
        nodes: dict[str, list[str]] = defaultdict(list)
        unknown: list[tuple[Gpu, _Under]] = []
        for measure in compare.RATES:
            for values in self._families(measure):
                self._compare(measure, values, under, nodes, unknown)
                yield from self._uneven(measure, values)
        for host, texts in nodes.items():
            own = self._of(host)
            explained = [why for gpu in own if (why := self._explained(gpu))]
            kind = "throttled" if len(explained) >= MOST * len(own) else "slow_node"
            because = f"; {explained[0][1]}" if kind == "throttled" else ""
            text = f"all its GPUs together: {'; '.join(texts)}{because}"
            yield ("slow node", host), Suspect(kind, self._whole(host), text, "high" if because else "medium", host)
            slow.update(dict.fromkeys(own, texts))
        for gpu, found in under.items():
            slow[gpu] = [one.text for one in found]
            yield self._slow(gpu, found)
        for gpu, one in unknown:
            slow[gpu] = [one.text]
            if self._explained(gpu):
                yield self._slow(gpu, [one])
            else:
                yield ("slow", gpu), self._one_of_two("slow_gpu", gpu, one)

    def _uneven(self, measure: Measure, values: Values) -> Iterator[tuple[Key, Suspect]]:
        """That most GPUs are slow: none of them is under the median, and so many others above it are no accident."""
        distances = compare.distances(values, self._comparisons)
        fast = {gpu: d for gpu, d in distances.items() if d.low > UNDER}
        if len(values) < compare.ENOUGH or len(fast) < (1 - MOST) * len(values):
            return
        least = min(fast.values(), key=lambda d: d.value)
        names = ", ".join(f"{gpu} of {gpu.host}" for gpu in list(fast)[:4]) + (", …" if len(fast) > 4 else "")
        text = (
            f"{measure.name}: {len(fast)} of {counted(len(values), 'GPU')} reach {least.value:,.0f} {measure.unit} or "
            f"more ({names}), the median {least.reference:,.0f}: the others are slower than these, and they are most"
        )
        where = f"{self._cells}: {counted(len(values) - len(fast), 'GPU')} of {len(values)}"
        yield ("uneven", measure.key), Suspect("slow_gpu", where, text, NOBODY, observation=True)

    def _compare(
        self,
        measure: Measure,
        values: Values,
        under: dict[Gpu, list[_Under]],
        nodes: dict[str, list[str]],
        unknown: list[tuple[Gpu, _Under]],
    ) -> None:
        cluster = compare.distances(values, self._comparisons)
        if len(values) < compare.ENOUGH:
            unknown += [
                (gpu, _Under(measure, d, "that of the other GPU", d.surely_under(UNDER)))
                for gpu, d in cluster.items()
                if d.under(UNDER)
            ]
            return
        by_host: dict[str, list[Gpu]] = defaultdict(list)
        for gpu in values:
            by_host[gpu.host].append(gpu)
        for host, distance in compare.distances(compare.node_series(values), self._comparisons).items():
            own = by_host[host]
            most = sum(cluster[gpu].under(UNDER) for gpu in own) >= MOST * len(own)
            if len(by_host) > 1 and len(own) > 1 and most and distance.surely_under(UNDER):
                nodes[host].append(_Under(measure, distance, "the median of the cluster", True).text)
        for host, own in by_host.items():
            found: dict[Gpu, list[_Under]] = defaultdict(list)
            if len(own) >= compare.ENOUGH:
                near = compare.distances({gpu: values[gpu] for gpu in own}, self._comparisons)
                for gpu, d in near.items():
                    found[gpu].append(_Under(measure, d, "the median of its node", d.surely_under(UNDER)))
            if host not in nodes and len(by_host) > 1:
                for gpu in own:
                    d = cluster[gpu]
                    found[gpu].append(_Under(measure, d, "the median of the cluster", d.surely_under(UNDER)))
            for gpu, each in found.items():
                low = [one for one in each if one.distance.under(UNDER)]
                if low:  # the surer of the two, and of equals that of the node
                    under[gpu].append(max(low, key=lambda one: one.sure))

    def _slow(self, gpu: Gpu, found: Sequence[_Under]) -> tuple[Key, Suspect]:
        """A GPU that is under a median: by its own state, or by its interval, or only worth knowing."""
        text = f"{gpu}: {'; '.join(one.text for one in found)}"
        if explained := self._explained(gpu):
            kind, because = explained
            what = "memory" if kind == "gpu_memory_errors" else "slow"  # so that its errors are not told twice
            return (what, gpu), Suspect(kind, self._where(gpu), f"{text}; {because}", "high", gpu.host)
        sure = any(one.sure for one in found)
        suspect = Suspect("slow_gpu", self._where(gpu), text, "medium" if sure else "low", gpu.host)
        return ("slow", gpu), replace(suspect, observation=not sure)

    def _explained(self, gpu: Gpu) -> tuple[str, str] | None:
        """(kind, why) where the GPU's own state explains that it is slow; None where it is like the others'."""
        others = [
            state for other, state in self._states.items() if other != gpu and self._family(other) == self._family(gpu)
        ]
        return self._states[gpu].explains(others)

    def _drift(self, slow: Mapping[Gpu, object]) -> Iterator[tuple[Key, Suspect]]:
        """GPUs that become slower than they were, more than the others do."""
        said: dict[Gpu, str] = {}
        for measure in compare.RATES[:3]:
            for values in self._families(measure):
                enough = len(values) >= compare.ENOUGH
                for gpu, d in compare.slowed(values, self._comparisons).items():
                    if not d.under(UNDER) or d.high >= 0 or not enough or gpu in said:
                        continue
                    said[gpu] = (
                        f"{gpu}: {measure.name} fell from {d.reference:,.0f} to {d.value:,.0f} {measure.unit} as it "
                        f"worked, {-100 * d.share:.1f} % more than the others"
                    )
                    explained = self._explained(gpu)
                    sure = d.surely_under(UNDER)
                    if gpu in slow and not sure:
                        continue
                    kind, why = explained or ("gpu_drift", "")
                    text = f"{said[gpu]}; {why}" if why else said[gpu]
                    suspect = Suspect(
                        kind,
                        self._where(gpu),
                        text,
                        "high" if why else "medium" if sure else "low",
                        gpu.host,
                        observation=not (sure or why),
                    )
                    # One GPU that is slow because it is throttled, and throttled because it is hot, is told once.
                    yield ("slow" if kind == "throttled" else "drift", gpu), suspect
        drifts: dict[Gpu, list[float]] = defaultdict(list)
        for record in self._judged:
            if record.metric == "matmul_drift_pct":
                drifts[compare.gpu_of(record)].append(record.value)
        for gpu, each in drifts.items():
            change = statistics.median(each)
            if change < -100 * UNDER and gpu not in said and gpu not in slow:
                text = f"{gpu}: its products became {-change:.1f} % slower from the first to the last fifth of the time"
                if because := self._explained(gpu):
                    text += f"; {because[1]}"
                yield ("drift", gpu), self._noted(Suspect("gpu_drift", self._where(gpu), text, "low"), gpu)

    # --- links --------------------------------------------------------------------------------------------

    def _links(self) -> Iterator[tuple[Key, Suspect]]:
        """GPUs whose link to their host is slow, or narrower than it can be."""
        under: dict[Gpu, list[_Under]] = defaultdict(list)
        nodes: dict[str, list[str]] = defaultdict(list)
        unknown: list[tuple[Gpu, _Under]] = []
        for measure in compare.LINKS:
            for values in self._families(measure):
                self._compare(measure, values, under, nodes, unknown)
        narrow = {gpu: text for gpu, state in self._states.items() if (text := state.narrow_link())}
        for host, texts in nodes.items():
            text = f"all its GPUs together: {'; '.join(texts)}"
            yield ("links", host), Suspect("slow_pcie", self._whole(host), text, "medium", host)
        if narrow and len(narrow) == len(self._states):
            example = next(iter(narrow.values()))
            text = f"the links of all GPUs are below what they can be: {example}"
            yield ("narrow",), Suspect("slow_pcie", f"{self._cells}: all GPUs", text, "low", observation=True)
            narrow = {}
        far = {compare.gpu_of(r) for r in self._judged if r.context.get("local") is False}
        near = {compare.gpu_of(r) for r in self._judged if r.context.get("local") is True}
        for gpu in dict.fromkeys([*under, *narrow]):
            found = under.get(gpu, [])
            texts = [one.text for one in found] + ([narrow[gpu]] if gpu in narrow else [])
            if found and gpu in far - near:
                texts.append("the buffer was on another NUMA node than the GPU")
            sure = any(one.sure for one in found)
            suspect = Suspect(
                "slow_pcie",
                self._where(gpu),
                f"{gpu}: {'; '.join(texts)}",
                "high" if gpu in narrow else "medium" if sure else "low",
                gpu.host,
                observation=not (sure or gpu in narrow),
            )
            yield ("link", gpu), suspect
        for gpu, one in unknown:
            if gpu not in narrow:
                yield ("link", gpu), self._one_of_two("slow_pcie", gpu, one)

    def _peers(self) -> Iterator[tuple[Key, Suspect]]:
        """GPUs whose links to the others are slow, and single pairs that are."""
        values = compare.by_pair(self._judged)
        hosts: dict[str, dict[Pair, Mapping[compare.Block, float]]] = defaultdict(dict)
        alike: dict[tuple[str, int, int], dict[Pair, Mapping[compare.Block, float]]] = defaultdict(dict)
        for pair, series in values.items():
            hosts[pair.host][pair] = series
            alike[self._names.get((pair.host, pair.source), ""), pair.source, pair.target][pair] = series
        among = 2 * len(values)
        slow: dict[Pair, Distance] = {}
        if len(hosts) > 1:
            for same in alike.values():
                slow |= {pair: d for pair, d in compare.distances(same, among).items() if d.under(UNDER)}
        weak = {host: _weak(own) for host, own in hosts.items()}
        for host, own in hosts.items():
            for left_out in [weak[host] - {gpu} for gpu in weak[host]] or [set()]:
                found = compare.distances({p: s for p, s in own.items() if not left_out & {*p[1:]}}, among)
                sound = [d for p, d in found.items() if not weak[host] & {*p[1:]}]
                # Where pairs are wired differently, they are not compared with each other.
                if sum(abs(d.share) < 2 * UNDER for d in sound) >= MOST * len(sound) and len(sound) > 2:
                    slow |= {pair: d for pair, d in found.items() if d.under(UNDER) and pair not in slow}
        for host, own in hosts.items():
            bad = {pair: slow[pair] for pair in own if pair in slow}
            gpus = {pair.source for pair in own}
            if len(bad) >= MOST * len(own) and len(gpus) >= compare.ENOUGH:
                yield self._bad_peers(host, bad)
                continue
            while bad:
                counts = {}
                for gpu in gpus:
                    others = max(1, len(gpus - weak[host] - {gpu}))
                    ways = sum(pair.source == gpu for pair in bad), sum(pair.target == gpu for pair in bad)
                    counts[gpu] = max(ways) / others
                worst = max(counts, key=lambda gpu: counts[gpu])
                if counts[worst] < MOST or len(gpus) < compare.ENOUGH:
                    break
                taken = {pair: bad.pop(pair) for pair in list(bad) if worst in (pair.source, pair.target)}
                yield self._bad_peer(host, worst, taken)
            for pair, distance in bad.items():
                back = Pair(host, pair.target, pair.source)
                if back in bad and pair.source > pair.target:
                    continue  # told with the other direction
                way = "and back" if back in bad else "alone"
                text = (
                    f"{pair} {way}: {distance.value:,.0f} GB/s, "
                    f"{_percent(distance)} the median of such pairs ({distance.reference:,.0f} GB/s)"
                )
                sure = distance.surely_under(UNDER)
                suspect = Suspect(
                    "slow_peer", self._where(pair), text, "medium" if sure else "low", host, observation=not sure
                )
                yield ("pair", pair), suspect

    def _bad_peers(self, host: str, pairs: Mapping[Pair, Distance]) -> tuple[Key, Suspect]:
        middle = statistics.median(d.value for d in pairs.values())
        reference = statistics.median(d.reference for d in pairs.values())
        text = (
            f"all its GPUs with each other: {middle:,.0f} GB/s, {100 * (1 - middle / reference):.1f} % under the "
            f"median of the nodes ({reference:,.0f} GB/s)"
        )
        sure = statistics.median(d.high for d in pairs.values()) < -UNDER
        suspect = Suspect("slow_peer", self._whole(host), text, "medium" if sure else "low", host)
        return ("peers", host), replace(suspect, observation=not sure)

    def _bad_peer(self, host: str, number: int, pairs: Mapping[Pair, Distance]) -> tuple[Key, Suspect]:
        middle = statistics.median(d.value for d in pairs.values())
        reference = statistics.median(d.reference for d in pairs.values())
        gpu = next((gpu for gpu in self._states if (gpu.host, gpu.number) == (host, number)), Gpu(host, number))
        others = counted(len({pair.source + pair.target - number for pair in pairs}), "other GPU")
        text = (
            f"{gpu}: {middle:,.0f} GB/s with {others} of its node, "
            f"{100 * (1 - middle / reference):.1f} % under the median of such pairs ({reference:,.0f} GB/s)"
        )
        state = self._states.get(gpu)
        down = state.links_down() if state else ""
        if down:
            text += f"; {down}"
        sure = bool(down) or statistics.median(d.high for d in pairs.values()) < -UNDER
        suspect = Suspect("slow_peer", self._where(gpu), text, "high" if down else "medium" if sure else "low", host)
        return ("peer", gpu), replace(suspect, observation=not sure)

    # --- what is worth knowing ----------------------------------------------------------------------------

    def _others(self, slow: Mapping[Gpu, object]) -> Iterator[tuple[Key, Suspect]]:
        """GPUs that somebody else uses, and those that are throttled without being slow."""
        most = max((state.get("nvlinks_active") or 0 for state in self._states.values()), default=0)
        for gpu, state in self._states.items():
            # Where all have as few, such as GPUs without a bridge, nothing is missing.
            if (down := state.links_down()) and (state.get("nvlinks_active") or 0) < most:
                text = f"{gpu}: {down}, and its rates to other GPUs are like theirs"
                yield ("peer", gpu), self._noted(Suspect("slow_peer", self._where(gpu), text, "low"), gpu)
            if gpu in slow:
                continue
            if used := state.used_by_others():
                confidence = "high" if state.busy else "low"
                suspect = Suspect("busy_gpu", self._where(gpu), f"{gpu}: {used}", confidence, gpu.host, not state.busy)
                yield ("busy", gpu), suspect
            elif (explained := self._explained(gpu)) and explained[0] == "throttled":
                text = f"{gpu}: {explained[1]}; its rates are like the others'"
                yield ("slow", gpu), self._noted(Suspect("throttled", self._where(gpu), text, "low"), gpu)

    def _by_hardware(self) -> Iterator[tuple[Key, Suspect]]:
        for measure in compare.RATES:
            name, share = EXPECTED.get(measure.key, ("", 0.0))
            peak = self._hardware.get(name)
            values = compare.by_gpu(self._judged, measure)
            if not peak or not values:
                continue
            middle = statistics.median(statistics.median(series.values()) for series in values.values())
            if middle < share * peak:
                text = (
                    f"{measure.name}: {middle:,.0f} {measure.unit}, the median of {counted(len(values), 'GPU')}, is "
                    f"{100 * middle / peak:.0f} % of the data sheet's {peak:,.0f} ({self._hardware.get('gpu', '?')}); "
                    f"healthy ones reach at least {100 * share:.0f} %"
                )
                yield ("hardware", measure.key), Suspect("below_hardware", self._cells, text, "low", observation=True)

    # --- helpers ------------------------------------------------------------------------------------------

    def _families(self, measure: Measure) -> Iterator[Values]:
        """The judged values of a measure, for each kind of GPU."""
        families: dict[str, dict[Gpu, Mapping[compare.Block, float]]] = defaultdict(dict)
        for gpu, series in compare.by_gpu(self._judged, measure).items():
            families[self._family(gpu)][gpu] = series
        yield from families.values()

    def _family(self, gpu: Gpu) -> str:
        return self._names.get((gpu.host, gpu.number), "")

    def _of(self, host: str) -> list[Gpu]:
        return [gpu for gpu in self._states if gpu.host == host]

    def _whole(self, host: str) -> str:
        return f"{self._cells}: all {counted(len(self._of(host)), 'GPU')}"

    def _where(self, of: Gpu | Pair) -> str:
        return f"{self._cells}: {of}"

    def _one_of_two(self, kind: str, gpu: Gpu, one: _Under) -> Suspect:
        text = f"{gpu} of {gpu.host}: {one.text}; two GPUs do not show which of them is the odd one"
        return Suspect(kind, self._where(gpu), text, NOBODY, observation=not one.sure)

    def _noted(self, suspect: Suspect, gpu: Gpu) -> Suspect:
        return replace(suspect, host=gpu.host, observation=True)


@dataclass(frozen=True)
class _Under:
    """A measure of a GPU or node that is under the median `of` others; `sure` where its whole interval is."""

    measure: Measure
    distance: Distance
    of: str
    sure: bool

    @property
    def text(self) -> str:
        d = self.distance
        spread = f", interval {-100 * d.high:.1f} to {-100 * d.low:.1f} %" if d.low > -1 else ""
        rate = f"{self.measure.name} {d.value:,.0f} {self.measure.unit}"
        return f"{rate}, {_percent(d)} {self.of} ({d.reference:,.0f}{spread})"


def _weak(pairs: Mapping[Pair, Mapping[compare.Block, float]]) -> set[int]:
    """The GPUs of a node whose links are slow, even the fastest of each; none where half of all or more would be."""
    best: dict[int, float] = defaultdict(float)
    for pair, series in pairs.items():
        for gpu in (pair.source, pair.target):
            best[gpu] = max(best[gpu], statistics.median(series.values()))
    usual = statistics.median_high(best.values())
    found = {gpu for gpu, rate in best.items() if rate < (1 - 2 * UNDER) * usual}
    return found if 2 * len(found) < len(best) else set()


def _seeds(records: Iterable[Record]) -> str:
    seeds = ", ".join(dict.fromkeys(str(record.context["seed"]) for record in records if "seed" in record.context))
    return f" with seed {seeds}" if seeds else ""


def _percent(distance: Distance) -> str:
    return f"{-100 * distance.share:.1f} % under"
