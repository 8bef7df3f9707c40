"""Training with verl in the report: fine-tuning, reinforcement learning, and the models that they leave."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.cluster.tools.verl_metrics import IDLE, PHASES
from runner.report import chart
from runner.report.figures import Figure, Row, nodes_text, number, per_rank
from runner.report.sections import Charts, Measured, Tile
from runner.report.tables import Table, cell_number, state, took, without_empty
from runner.workloads.rl import metrics
from runner.workloads.rl.metrics import Step
from runner.workloads.rl.phases import in_words

TITLE, ANCHOR = "Training with verl", "verl"

GLOSSARY = {
    "step_share": "Share of a phase in the time of all measured steps, which are all but the first step of an "
    "attempt. Idle is what is in no phase: between them, verl's controller reads prompts and hands out the batch.",
    "phase_rate": "Tokens of a phase per second of it, over measured steps: in rollout those of answers, elsewhere "
    "prompts as well.",
    "verl_tokens_per_s": "Tokens of the batch, prompts and answers, per second of measured steps.",
    "reward_mean": "Mean reward of the answers of a step, the penalty for distance from the reference included where "
    "it is a part of the reward. First and last: means over a fifth of the steps.",
    "kl": "Distance of the model from the reference in nat per token, as verl estimates it: it grows as the model "
    "learns, and may be slightly negative.",
    "response_clipped_pct": "Share of answers that were cut at the largest length.",
}

COLUMNS = {
    "stage": "stage",
    "state": "state",
    "steps": "steps",
    "step p50, s": "step, s",
    "tokens/s": "tokens/s",
    "reward": "reward",
    "loss": "loss",
    "idle, %": "idle, %",
    "merge, s": "merge, s",
}

TERMS = (
    ("verl_tokens_per_s", "tokens/s"),
    ("reward_mean", "reward"),
    ("kl", "KL"),
    ("response_clipped_pct", "cut"),
    ("step_share", "idle"),
)

# The bands of a column of the timeline from below: colour, name, phases. Phases of little time share one.
BANDS: Sequence[tuple[int, str, tuple[str, ...]]] = (
    (0, "rollout", ("rollout",)),
    (4, "reward", ("reward",)),
    (3, "log-prob, reference", ("log_prob", "reference")),
    (5, "value, advantage", ("value", "advantage")),
    (2, "update critic", ("update_critic",)),
    (1, "update actor", ("update_actor",)),
    (6, "weight sync, checkpoint", ("weight_sync", "checkpoint")),
    (chart.COLOURS, "idle", (IDLE,)),
)
_RESULTS = {"complete": "✓ complete", "failed": "✕ failed", "incomplete": "✕ incomplete"}
SYNC = "wandb sync nodes/*/*/wandb/offline-run-*"
WIDEST = 40  # columns in a timeline; of more steps, a column is the mean of several
TALL = 1.6  # a first step that is longer than any other by more is cut off


def stages(summary: Mapping[str, Any]) -> Table | None:
    """The stages of a workflow: what became of each, how long it took and what it left; None for another run."""
    rows = [
        {
            "stage": one["stage"],
            "result": _RESULTS.get(one["state"], one["state"]),
            "on": nodes_text(one["num_nodes"]) if one["num_nodes"] else "this machine",
            "took": took(one),
            "left": one["message"] if one["state"] != "complete" else _left(one["left"]),
        }
        for one in summary.get("stages", ())
    ]
    columns = {name: name for name in ("stage", "result", "on", "took", "left")}
    return Table(without_empty(rows), columns, words=("left",)) if rows else None


def _left(left: Mapping[str, Any]) -> str:
    """What a stage left, in words: paths and the like, without checksums."""
    return "; ".join(text for text in _texts(left))


def _texts(left: Mapping[str, Any]) -> Iterator[str]:
    for name, value in left.items():
        if isinstance(value, Mapping):
            yield from _texts(value) if name != "checksums" else ()
        elif name not in ("digest", "bytes"):
            yield str(value)


def tables(cells: Sequence[Row]) -> list[Table]:
    """A row for each stage; the phases of those that have them; the answers of models that were asked."""
    found = [_stages_table(cells), *_phases(cells), *_answers(cells)]
    return [one for one in found if one.rows]


def _stages_table(cells: Sequence[Row]) -> Table:
    per = per_rank(cells)
    rows = []
    for cell in cells:
        m = cell["metrics"]
        rows.append(
            {
                "stage": cell["id"],
                "state": state(cell),
                "steps": f"{m['steps']:.0f}" if "steps" in m else "",
                "step p50, s": cell_number(m, "step_time_s_p50"),
                "tokens/s": cell_number(m, "tokens_per_s"),
                f"per {per}": cell_number(m, "tokens_per_s_per_gpu"),
                "reward": _change(m, "reward_mean"),
                "validation": _change(m, "validation_reward"),
                "loss": _change(m, "loss"),
                "KL": _signed(m["kl_last"]) if "kl_last" in m else "",
                "answer, tokens": cell_number(m, "response_tokens_mean_last"),
                "cut, %": f"{m['response_clipped_pct']:.0f}" if "response_clipped_pct" in m else "",
                "idle, %": f"{m['idle_share_pct']:.1f}" if "idle_share_pct" in m else "",
                "merge, s": cell_number(m, "merge_s"),
                "took": took(cell),
            }
        )
    rows = without_empty(rows)
    shown = " ".join(rows[0]) if rows else ""
    return Table(rows, COLUMNS, [(term, text) for term, text in TERMS if text in shown], remark=_outputs(cells))


def _change(m: Mapping[str, float], curve: str) -> str:
    if f"{curve}_last" not in m:
        return ""
    first, last = m[f"{curve}_first"], m[f"{curve}_last"]
    return f"{_signed(first)} → {_signed(last)}" if m.get("steps", 2) > 1 else _signed(last)


def _signed(value: float) -> str:
    """A value of any sign with three significant digits, `0.0003` as well."""
    return f"-{number(-value)}" if value < 0 else number(value)


def _outputs(cells: Sequence[Row]) -> str:
    """Where else the metrics are, and how those of Weights & Biases that were kept here are sent."""
    texts = {}
    for cell in cells:
        outputs = cell["details"].get("outputs", ())
        if "wandb" in outputs and cell.get("used", {}).get("wandb") == "offline":
            texts["wandb"] = f"Weights & Biases: not sent; in the run's folder, {SYNC}."
        if "tensorboard" in outputs:
            texts["tensorboard"] = "TensorBoard: in the run's folder, tensorboard --logdir nodes."
    return " ".join(texts.values())


def _phases(cells: Sequence[Row]) -> Iterator[Table]:
    rows = []
    for cell in cells:
        m = cell["metrics"]
        for phase in (*PHASES, IDLE):
            if f"{phase}_share_pct" in m:
                rows.append(
                    {
                        "phase": in_words(phase),
                        "stage": cell["id"],
                        "of a step, %": f"{m[f'{phase}_share_pct']:.1f}",
                        "s a step": number(m[f"{phase}_share_pct"] / 100 * m["step_time_s_mean"]),
                        "tokens/s": cell_number(m, f"{phase}_tokens_per_s"),
                    }
                )
    if rows:
        yield Table(rows, {}, [("step_share", "of a step"), ("phase_rate", "tokens/s")])


def _answers(cells: Sequence[Row]) -> Iterator[Table]:
    found = [(cell["id"], answer) for cell in cells if (answer := cell["details"].get("answer"))]
    rows = [
        {"model of": name, "question": one["question"], "answer": one["answer"].strip() or "(no text)"}
        for name, one in found
    ]
    if questions := {row["question"] for row in rows}:
        remark = "What each merged model answered, without sampling"
        if len(questions) == 1:  # a phone has no room for it in every row
            remark += f", to: {questions.pop()}"
            rows = [{key: value for key, value in row.items() if key != "question"} for row in rows]
        yield Table(rows, {}, words=("question", "answer"), remark=remark)


def tiles(run: Measured) -> list[Tile]:
    """The reward, rate (tokens/s), and shares (%) of the last stage with phases; the loss of one without."""
    trained = [cell for cell in _complete(run) if "steps" in cell["metrics"]]
    found: list[Tile] = []
    for cell in [cell for cell in trained if "idle_share_pct" in cell["metrics"]][-1:] or trained[-1:]:
        m, where = cell["metrics"], f"{cell['id']}, {nodes_text(cell['num_nodes'])}"
        for curve, label in (("reward_mean", "reward"), ("loss", "loss")):
            if f"{curve}_last" in m:
                note = f"from {_signed(m[f'{curve}_first'])}; {cell['id']}, {m['steps']:.0f} steps"
                found.append(Tile(label, _signed(m[f"{curve}_last"]), note))
        if "tokens_per_s" in m:
            found.append(Tile("tokens/s", number(m["tokens_per_s"]), where))
        for phase in ("rollout", IDLE):
            if f"{phase}_share_pct" in m:
                found.append(Tile(f"{phase}, of a step", f"{m[f'{phase}_share_pct']:.1f} %", where))
    return found


def _complete(run: Measured) -> list[Row]:
    known = {cell["id"] for cell in run.plan["cells"]}
    return [
        cell
        for cell in run.summary["cells"]
        if cell["id"] in known and cell["state"] == "complete" and "outputs" in cell["details"]
    ]


def charts(run: Measured) -> Charts:
    """For each stage that trained, the timeline of its phases and its curves over steps."""
    figures: list[Figure] = []
    for cell in _complete(run):
        found = metrics.steps(run.by_cell.get(cell["id"], ()))
        figures += [*_timeline(cell, found), *_curves(cell, found)]
    return Charts(tuple(figures))


def _timeline(cell: Row, found: Sequence[Step]) -> Iterator[Figure]:
    """The phases of each step as stacked columns, in seconds."""
    timed = [step for step in found if step.phases_s and step.seconds]
    if not timed:
        return
    size = -(-len(timed) // WIDEST)
    groups = [timed[at : at + size] for at in range(0, len(timed), size)]
    every = -(-len(groups) // 10)
    stacks = [
        chart.Column(str(group[0].number) if index % every == 0 else "", list(_bands(group)))
        for index, group in enumerate(groups)
    ]
    heights = [sum(height for height, *_ in stack.parts) for stack in stacks]
    usual = [height for height, group in zip(heights, groups, strict=True) if all(step.measured for step in group)]
    cut = bool(usual) and max(heights) > TALL * max(usual)
    axis = chart.linear("", usual if cut else heights, from_zero=True)
    used = {phase for step in timed for phase in step.phases_s}
    legend = [(colour, name) for colour, name, phases in BANDS if used & set(phases)]
    again = [step.number for step in timed if not step.measured][1:]
    about = [
        f"{cell['id']}, {nodes_text(cell['num_nodes'])}: one column a step"
        + (f", each the mean of {size}" if size > 1 else "")
        + ", phases from below in the order of a step.",
        "The first step compiles, and is in no number." + (" Its column is cut off." if cut else ""),
    ]
    if again:
        about.append(f"Training went on from a checkpoint before step {', '.join(map(str, again))}.")
    svg = chart.columns(stacks, "step", axis, f"phases of each step, {cell['id']}")
    yield Figure("Time of a step by phase, s", svg, " ".join(about), legend)


def _bands(group: Sequence[Step]) -> Iterator[tuple[float, int, str]]:
    first, last = group[0].number, group[-1].number
    where = f"step {first}" if first == last else f"steps {first} to {last}"
    for colour, _, phases in BANDS:
        means = {phase: statistics.fmean(step.phases_s.get(phase, 0.0) for step in group) for phase in phases}
        if total := sum(means.values()):
            each = ", ".join(f"{in_words(phase)} {number(mean)} s" for phase, mean in means.items() if mean)
            yield total, colour, f"{where}: {each}"


def _steps(numbers: Sequence[float]) -> chart.Axis:
    """An axis of step numbers, with whole ones at its ticks."""
    axis = chart.linear("step", numbers, pad=0.02)
    ticks = [(tick, f"{tick:,.0f}") for tick, _ in axis.ticks if tick == round(tick)]
    if len(set(numbers)) == 1:
        return chart.Axis("step", numbers[0] - 1, numbers[0] + 1, [(numbers[0], f"{numbers[0]:.0f}")])
    return chart.Axis("step", axis.low, axis.high, ticks)


# A chart of curves: title, (curve, colour, name) of each, caption. A chart of one curve needs no names.
_CHARTS: Sequence[tuple[str, Sequence[tuple[str, int, str]], str]] = (
    (
        "Reward",
        (("reward_mean", 0, "training"), ("validation_reward", 1, "validation")),
        "Mean of the answers of each step.",
    ),
    (
        "KL, nat per token",
        (("kl", 0, "from the reference"), ("kl_of_update", 4, "of one update")),
        "How far the model has moved. A curve that runs away says that the learning rate is too high or the "
        "penalty too low.",
    ),
    (
        "Length of answers, tokens",
        (("response_tokens_mean", 0, "mean"), ("response_tokens_max", 1, "longest")),
        "Rollout waits for the longest answer.",
    ),
    (
        "Loss",
        (("loss", 0, "training"), ("validation_loss", 1, "validation")),
        "Mean over the tokens of answers.",
    ),
)


def _curves(cell: Row, found: Sequence[Step]) -> Iterator[Figure]:
    for title, curves, about in _CHARTS:
        lines = []
        for curve, colour, name in curves:
            points = [
                chart.Point(step.number, step.curves[curve], f"step {step.number}: {_signed(step.curves[curve])}")
                for step in found
                if curve in step.curves
            ]
            if points:
                lines.append(chart.Series(name, points, colour, pale=len(points) > 2 * WIDEST))
        if not lines:
            continue
        numbers = [point.x for line in lines for point in line.points]
        x = _steps(numbers)
        y = chart.linear("", [point.y for line in lines for point in line.points], from_zero=title.startswith("Length"))
        svg = chart.lines(lines, x, y, f"{title} against step, {cell['id']}", name_ends=False)
        yield Figure(title, svg, f"{cell['id']}: {about}", [(line.colour, line.name) for line in lines])
