"""Runs as text for a terminal: the list, one run with its cells and nodes, and changes of state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from runner import errors
from runner.results.logs import printable
from runner.results.status import FINAL_STATES, LIVE_STATES, each_error, queued_s, took_s
from runner.system.wording import counted, span_text, took_text

if TYPE_CHECKING:
    from runner.results.rundir import RunDir


SILENT_S = 120.0  # without progress: it is said since when


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def done_text(status: Mapping[str, Any]) -> str:
    """`3 of 8 cells complete`, from the contents of status.json."""
    states = [cell["state"] for cell in status["cells"].values()]
    return f"{states.count('complete')} of {counted(len(states), 'cell')} complete"


def _times(plan: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, str | None]:
    """ISO times at which the run started and, with its last cell, ended; None: not ended."""
    ends = [cell["ended"] for cell in status["cells"].values() if cell["ended"]]
    starts = [cell["started"] for cell in status["cells"].values() if cell["started"]]
    final = status["state"] in FINAL_STATES
    # A killed run recorded no end: the last known time is used.
    return {
        "started": plan.get("created"),
        "ended": max([*ends, *starts], default=plan.get("created")) if final else None,
    }


def verdict_text(run: RunDir) -> str | None:
    """The verdict in summary.json (`pass`, `fail`, …); None where there is none."""
    try:
        return json.loads(run.summary.read_text())["verdict"]
    except (OSError, ValueError, KeyError, TypeError):  # not judged yet, or by a version without verdicts
        return None


def overview(run: RunDir, now: datetime) -> dict[str, Any]:
    """One row of `runner runs list` as a dict: state, verdict, cells, times (ISO), `duration_s` (until `now` while the
    run is active), nodes, engine and inventory; None: unknown. A run whose files cannot be read is `unreadable`.
    """
    try:
        plan, status = run.read_plan(), run.read_status()
    except errors.UsageError:
        return {"run": run.run_id, "state": "unreadable"}
    times = _times(plan, status)
    states = [cell["state"] for cell in status["cells"].values()]
    return {
        "run": run.run_id,
        "state": status["state"],
        "verdict": verdict_text(run) if times["ended"] else None,
        "cells": f"{states.count('complete')}/{len(states)}",
        **times,
        "duration_s": took_s(times, now),
        "nodes": _nodes_used(plan),
        "engine": plan.get("engine"),
        "inventory": plan.get("inventory"),
    }


def _nodes_used(plan: Mapping[str, Any]) -> int:
    """How many nodes a run's cells are on, or will be where Slurm still has to choose among those of the plan."""
    used = {host for cell in plan["cells"] for host in cell["hosts"]}
    return max([len(used), *(cell.get("num_nodes", 0) for cell in plan["cells"])])


def overview_table(rows: Sequence[Mapping[str, Any]], width: int) -> str:
    """Rows of `overview` as a table. Columns are dropped from the right until it fits `width` or three are left."""
    from tabulate import tabulate

    table = [
        {
            "run": row["run"],
            "state": row["state"],
            "verdict": (row.get("verdict") or "").replace("_", " "),
            "cells": row.get("cells", ""),
            "took": span_text(row.get("duration_s")),
            "started": (row.get("started") or "")[:16].replace("T", " "),
            "nodes": row.get("nodes", ""),
            "engine": row.get("engine", ""),
            "inventory": row.get("inventory", ""),
        }
        for row in rows
    ]
    while True:
        text = tabulate(table, headers="keys", disable_numparse=True)
        if not table or len(table[0]) <= 3 or len(text.split("\n", 1)[0]) <= width:
            return printable(text)
        for row in table:
            row.popitem()


def node_states_text(nodes: Mapping[str, Mapping[str, Any]], aliases: Mapping[str, str], now: datetime | None) -> str:
    """States of a cell's nodes, folded: `node[001-003] running, node004 silent for 12 s`.

    `aliases` is name -> alias. Without `now` the duration is left out.
    """
    from runner.system.nodeset import fold

    states: dict[str, list[str]] = {}
    for host, node in nodes.items():
        states.setdefault(node["state"], []).append(host)
    order = ("starting", "running", "ended", "failed", "silent")
    parts = []
    for state in sorted(states, key=lambda s: order.index(s) if s in order else len(order)):
        text = f"{fold([aliases.get(host, host) for host in states[state]])} {state}"
        last_output = [moment for host in states[state] if (moment := _moment(nodes[host].get("heard")))]
        if state == "silent" and now and last_output:
            text += f" for {span_text((now - min(last_output)).total_seconds())}"
        parts.append(text)
    return ", ".join(parts)


def _error_text(error: Mapping[str, Any], aliases: Mapping[str, str]) -> str:
    """The errors of all nodes that failed, as one text."""
    parts = []
    for one in each_error(error):
        host = one.get("host")
        where = f" on {aliases.get(host, host)}" if host else ""
        kind = one.get("kind")  # runs of earlier versions have none
        parts.append(f"{kind.replace('_', ' ')}{where}: {one['message']}" if kind else f"{one['message']}{where}")
    return "; ".join(parts)


def _job_text(job: Mapping[str, Any], waits: bool) -> str:
    text = f"job {job['id']} {str(job.get('state') or 'unknown').lower()}"
    reason = job.get("advice") or job.get("reason")
    text += f": {reason}" if reason and reason != "None" else ""
    text += f", position {job['position']} in the queue" if job.get("position") else ""
    return text + (f", expected to start {job['start']}" if waits and job.get("start") else "")


def details(cell: Mapping[str, Any], aliases: Mapping[str, str], now: datetime | None) -> list[str]:
    """Lines with all that a cell's entry in status.json has besides its state: attempts, job, progress, nodes, error.

    Without `now`, progress and durations are left out, but for what the last units of the work gave.
    """
    lines = []
    for number, attempt in enumerate(cell.get("attempts") or (), start=1):
        why = f": {_error_text(attempt['error'], aliases)}" if attempt.get("error") else ""
        lines.append(f"attempt {number} {attempt['state']}{why}")
    if cell["state"] in ("waiting", "running"):
        if job := cell.get("job"):
            lines.append(_job_text(job, waits=cell["state"] == "waiting"))
        if now and cell["state"] == "running" and (progress := cell.get("progress")):  # a queue has none
            fraction = progress["fraction"]
            left = progress.get("eta_s")
            if left is not None and (moment := _moment(progress.get("at"))):
                left -= (now - moment).total_seconds()
            rest = f", {span_text(left)} left" if left is not None and left > 0 else ""
            doing = ": ".join(filter(None, (progress["phase"], progress.get("detail"))))
            since = (now - moment).total_seconds() if (moment := _moment(progress.get("at"))) else 0.0
            silent = f"; nothing new for {span_text(since)}" if since > SILENT_S else ""
            lines.append(f"{100 * fraction:.0f} %, {doing}{rest}{silent}")
        if cell["state"] == "running" and (result := (cell.get("progress") or {}).get("result")):
            lines.append(result)
        if nodes := cell.get("nodes"):
            lines.append(node_states_text(nodes, aliases, now))
    elif cell.get("error"):
        lines.append(_error_text(cell["error"], aliases))
    return lines


def _waits_for(cell: Mapping[str, Any], after: str | None, status: Mapping[str, Any]) -> list[str]:
    """What a cell of a chain waits for, or why it has not run: the cell that it comes after."""
    if after is None or status["cells"][after]["state"] == "complete" or cell["state"] in ("complete", *LIVE_STATES):
        return []
    if status["state"] not in FINAL_STATES:  # whatever became of it when the run was carried out before
        return [f"waits for {after}"]
    return [f"not run: {after} is not complete"] if cell["state"] == "planned" else []


def _state_text(cell: Mapping[str, Any]) -> str:
    attempt = cell.get("attempt") or 1
    return cell["state"] + (f", attempt {attempt}" if attempt > 1 else "")


def _took(cell: Mapping[str, Any], now: datetime) -> str:
    return took_text(took_s(cell, now), queued_s(cell, now))


def describe(plan: Mapping[str, Any], status: Mapping[str, Any], now: datetime, width: int, brief: bool = False) -> str:
    """The state of a run as text, in lines of at most `width` columns where words allow it.

    `plan` and `status` are the contents of their JSON files. `brief` leaves out complete and planned cells.
    """
    import textwrap

    from tabulate import tabulate

    aliases = aliases_of(plan)
    after = {cell["id"]: cell.get("after") for cell in plan["cells"]}
    cells = {
        name: cell
        for name, cell in _in_order(status).items()
        if not brief or cell["state"] not in ("complete", "planned")
    }
    rows = [
        {
            "cell": name,
            "state": _state_text(cell),
            "started": (cell["started"] or "")[11:19],
            "took": _took(cell, now) if cell["ended"] or cell["state"] in LIVE_STATES else "",
        }
        for name, cell in cells.items()
    ]
    if width < 80:
        for row in rows:
            del row["started"]
    lines = [f"run {status.get('run_id') or plan['run_id']}: {status['state']}, {done_text(status)}", ""]
    table = tabulate(rows, headers="keys", disable_numparse=True).split("\n")
    lines += table[:2]
    for line, (name, cell) in zip(table[2:], cells.items(), strict=True):
        lines.append(line.rstrip())
        for detail in [*_waits_for(cell, after.get(name), status), *details(cell, aliases, now)]:
            lines += textwrap.wrap(
                printable(detail), width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
    for swap in status.get("replaced") or ():
        by = aliases.get(swap["by"], swap["by"]) or "nothing"
        text = f"{by} took the place of {aliases.get(swap['host'], swap['host'])}"
        why = str(swap["reason"]).replace("_", " ")
        lines += ["", *textwrap.wrap(f"{text} in {swap['cell']}: {why}", width, subsequent_indent="  ")]
    if error := status.get("error"):
        lines += ["", *textwrap.wrap(printable(f"ended by: {error['message']}"), width, subsequent_indent="  ")]
    return printable("\n".join(lines))


def _in_order(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cells of a run, and of a workflow the stages on the controller as well: the first of these begins it."""
    first, *last = status.get("stages", {}).items() or [None]
    return dict([*([first] if first else []), *status["cells"].items(), *last])


def aliases_of(plan: Mapping[str, Any]) -> dict[str, str]:
    """Name -> alias of a plan's nodes and spares; the name itself where a plan has no alias."""
    return {node["name"]: node.get("alias", node["name"]) for node in [*plan["nodes"], *plan.get("spares", ())]}


def changes(plan: Mapping[str, Any], statuses: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """One line for each change of a cell between successive `statuses`, results of its work among them; progress and
    times are left out.
    """
    aliases, reported = aliases_of(plan), dict[str, str]()
    for status in statuses:
        for name, cell in _in_order(status).items():
            text = "; ".join([_state_text(cell), *details(cell, aliases, None)])
            if text != reported.get(name, "planned"):
                yield printable(f"{name}: {text}")
            reported[name] = text
