"""What tuning found as text for a terminal: each probe in a few words, and all of them as a table. Pure."""

from __future__ import annotations

from runner.report.figures import number, per_rank
from runner.results.tuned import FAILED, OK, OUT_OF_MEMORY, REFUSED, Probe, Subject, Tuned

_WORDS = {OUT_OF_MEMORY: "out of memory", REFUSED: "not run", FAILED: "failed"}
_NOTE = 60  # characters of a reason in the table


def gave(probe: Probe, subject: Subject) -> str:
    """What a probe for `subject` gave, in a few words."""
    if probe.outcome == OK:
        memory = f", {probe.peak_memory_gib:.1f} GiB" if probe.peak_memory_gib else ""
        return f"{number(probe.tokens_per_s_per_gpu or 0.0)} tokens/s per {_each(subject)}{memory}"
    words = _WORDS[probe.outcome]
    return words if probe.outcome == OUT_OF_MEMORY or not probe.note else f"{words}: {probe.note}"


def table(found: Tuned, default: Probe, best: Probe) -> str:
    """All probes of a result, one a row; `default` has the settings without tuning, `best` is the one chosen."""
    from tabulate import tabulate

    keys = list(dict.fromkeys(key for probe in found.probes for key in probe.settings))
    rows = []
    for probe in found.probes:
        row = {key.rpartition(".")[2]: _value(probe.settings.get(key)) for key in keys}
        ok = probe.outcome == OK
        row[f"tokens/s per {_each(found.subject)}"] = (
            number(probe.tokens_per_s_per_gpu or 0.0) if ok else _WORDS[probe.outcome]
        )
        row["± %"] = f"{100 * (probe.noise or 0.0):.1f}" if ok else ""
        row["peak GiB"] = f"{probe.peak_memory_gib:.1f}" if probe.peak_memory_gib else ""
        row["s"] = f"{probe.seconds:.0f}" if probe.seconds else ""
        marks = [
            name
            for name, is_it in (
                ("without tuning", probe.settings == default.settings),
                ("best", probe.settings == best.settings),
            )
            if is_it
        ]
        note = probe.note if len(probe.note) <= _NOTE else probe.note[: _NOTE - 1] + "…"
        row[""] = ", ".join(marks) or ("" if probe.outcome == OUT_OF_MEMORY else note)
        rows.append(row)
    return tabulate(rows, headers="keys", disable_numparse=True)


def _value(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _each(subject: Subject) -> str:
    return per_rank([{"device": subject.device}])
