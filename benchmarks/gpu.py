"""What only a machine with a GPU can show, in one command within eight minutes.

    python benchmarks/gpu.py                # into $OUT, or else benchmarks/results
    python benchmarks/gpu.py --cpu          # the same with a tiny model, where there is no GPU: that it works

The tests marked `gpu`, then `runner bench` of test `gpu`, then benchmarks/sft_speed.py with 40 % of the time, then
`runner bench` of a 7B on this machine. Each part has a limit of its own and a page of its own, named after the card,
which is written as soon as the part ends (that of sft_speed.py after each of its processes). The project and pytest
must be installed for the Python that runs this, nothing else; TRL where its arm is wanted. The exit code is 1 where a
part failed or had no time, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.node import sampler
from runner.system import process

ROOT = Path(__file__).resolve().parent.parent
TESTS_S = 100.0  # for the tests, at most
ALONE_S = 90.0  # for test `gpu`, at most
GRACE_S = 10.0  # for a part to end after its limit
ANOTHER_S = 60.0  # that another model needs
# Of the cell, in this order where they were measured.
METRICS = (
    "processed_tokens_per_s", "tokens_per_s", "step_time_s_p50", "steps_measured", "mfu", "mfu_of_matmul",
    "matmul_tflop_per_s", "tflop_per_s_per_gpu", "gpu_util_pct_mean", "peak_memory_gib", "setup_time_s",
    "time_to_first_step_s", "loss_first", "loss_last", "packing_utilisation_pct",
)  # fmt: skip


def run(argv: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """(exit status, stdout) of a command whose stderr is shown as it comes; None where it was ended after `limit_s`."""
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        stdout, _ = child.communicate(timeout=limit_s)
        return child.returncode, stdout
    except subprocess.TimeoutExpired:
        process.stop_group(child, GRACE_S)
        return None, child.communicate()[0]
    except BaseException:  # Ctrl-C
        process.stop_group(child, GRACE_S)
        raise


def tests(limit_s: float, scratch: Path) -> tuple[str, bool]:
    """(The page of the tests that need a GPU, whether none failed)."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    outcomes = scratch / "outcomes.xml"
    # The versions here may be others than those of the project's own tests, whose warnings are errors.
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "filterwarnings=", f"--junitxml={outcomes}"]
    rc, stdout = run([*argv, *(str(path) for path in files)], limit_s)
    lines = ["| test | outcome | s |", "| --- | --- | ---: |", *rows_of_tests(outcomes)]
    if len(lines) == 2:
        return f"Nothing ran: {ending(rc, stdout, limit_s)}\n", False
    return "\n".join([*lines, "", f"{ending(rc, stdout, limit_s)}\n"]), rc == 0


def rows_of_tests(outcomes: Path) -> list[str]:
    """A row of the table for each test in pytest's XML; none where it was not written."""
    if not outcomes.exists():
        return []
    rows = []
    for case in ElementTree.parse(outcomes).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else f"{bad.tag}: {' '.join(bad.get('message', '').split())[:200]}"
        rows.append(f"| `{case.get('name')}` | {outcome.replace('|', '/')} | {float(case.get('time', 0)):.1f} |")
    return rows


def ending(rc: int | None, stdout: str, limit_s: float) -> str:
    """How a command ended, in a sentence."""
    if rc is None:
        return f"Ended after {limit_s:.0f} s, the time that it had."
    last = (stdout.strip().splitlines() or [""])[-1].strip("= ")
    return f"Exit code {rc}{f': {last}' if last else ''}."


def bench(models: Sequence[tuple[str, int]], limit_s: float, results: Path) -> tuple[str, bool]:
    """(The page of `runner bench` of the trainer, whether a cell is complete); the runs stay in `results`.

    `models` are (name, sequences of a global batch), largest first: one that does not fit into this GPU, by the plan or
    in fact, is told and followed by the next while there is time.
    """
    deadline, texts = time.monotonic() + limit_s, []
    for model, batch in models:
        left_s = deadline - time.monotonic()
        if texts and left_s < ANOTHER_S:
            break
        # The cell ends early enough for the run to conclude.
        cell_s = max(10.0, left_s - 3 * GRACE_S)
        settings = (f"global_batch={batch}", "steps=5", "warmup_steps=1", f"timeout_s={cell_s:.0f}")
        argv = command("sft", model, [f"sft.{setting}" for setting in settings], results)
        planned = process.run([*argv, "--dry-run"], timeout_s=max(GRACE_S, left_s))
        if planned.rc:
            texts.append(f"{planned.last_line}\n")
            continue
        rc, stdout = run(argv, deadline - time.monotonic())
        head = f"    {command_line(argv)}\n"
        try:
            summary, plan = json.loads(stdout), json.loads((results / "latest" / "plan.json").read_text())
        except (ValueError, OSError):
            texts.append(f"{head}\nNo summary. {ending(rc, stdout, limit_s)}\n")
            continue
        (cell,) = summary["cells"]
        if cell["state"] == "complete":
            return "\n".join([*texts, head, *rows_of_bench(summary, plan)]) + "\n", True
        why = next((finding["evidence"] for finding in summary.get("findings", ())), "no finding")
        texts.append(f"{head}\nIts cell is {cell['state']}: {' '.join(why.split())}\n")
    return "\n".join(texts), False


def alone(model: str, settings: Sequence[str], limit_s: float, results: Path) -> tuple[str, bool]:
    """(The page of `runner bench` of test `gpu`, whether its cell is complete); the run stays in `results`."""
    argv = command("gpu", model, settings, results)
    rc, stdout = run(argv, limit_s)
    head = f"    {command_line(argv)}\n"
    try:
        summary = json.loads(stdout)
        (cell,) = summary["cells"]
    except (ValueError, KeyError):  # with what was wrong before anything started
        return f"{head}\nNo summary. {ending(rc, stdout, limit_s)}\n", False
    rows = ["| what | value |", "| --- | ---: |", f"| state | {cell['state']} |"]
    rows += [f"| used: {name} | {value} |" for name, value in (cell.get("used") or {}).items()]
    rows += [f"| {name} | {value:,.5g} |" for name, value in cell["metrics"].items()]
    said = [f"- {each['kind']}: {' '.join(each['evidence'].split())}" for each in told(summary)]
    return "\n".join([head, *rows, "", *said]) + "\n", cell["state"] == "complete"


def told(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The findings of a run, and what it only observed."""
    return [*summary.get("findings", ()), *summary.get("observations", ())]


def command(test: str, model: str, settings: Sequence[str], results: Path) -> list[str]:
    """The command that measures `test` on this machine."""
    argv = [sys.executable, "-m", "runner.cli.main", "bench", "-i", str(ROOT / "inventory" / "local")]
    argv += ["--model", model, "--test", test, "--results", str(results), "--json"]
    return argv + [word for setting in settings for word in ("--set", setting)]


def command_line(argv: Sequence[str]) -> str:
    """The command of `runner` that `argv` starts, as a line to type; without the folder of its results."""
    words = ["runner", *argv[3:]]
    at = words.index("--results")
    return shlex.join([*words[:at], *words[at + 2 :]]).replace(str(ROOT) + "/", "")


def rows_of_bench(summary: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """The table of the only cell of a run: what it used, what was expected, what it measured."""
    (cell,), (planned,) = summary["cells"], plan["cells"]
    batch = planned["batch"]
    sizes = (
        f"{batch['global_batch']} = {batch['micro_batch']} × {batch['gradient_accumulation']} × {cell['world_size']}"
    )
    rows = ["| what | value |", "| --- | ---: |", f"| state | {cell['state']} |", f"| batch | {sizes} |"]
    rows += [f"| used: {name} | {value} |" for name, value in (cell.get("used") or {}).items()]
    expected = (planned.get("expected") or {}).get("tokens_per_s_per_gpu")
    rows += [f"| positions/s that the plan expected | {expected:,.0f} |"] if expected else []
    metrics = cell["metrics"]
    rows += [f"| {name} | {metrics[name]:,.4g} |" if metrics[name] < 1000 else f"| {name} | {metrics[name]:,.0f} |"
             for name in METRICS if name in metrics]  # fmt: skip
    return [*rows, "", f"Verdict: {summary['verdict']}{f' ({why})' if (why := summary.get('reason')) else ''}."]


def slug(card: str) -> str:
    """The name of a card as a part of a file's name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def main() -> int:
    """Run all parts, print each page as soon as it is written, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run where there is no GPU, with a tiny model")
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for all; default: 8")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    options = parser.parse_args()
    names = sampler.gpu_names()
    if not names and not options.cpu:
        print("gpu: NVML finds no GPU on this machine; --cpu shows with a tiny model that all works", file=sys.stderr)
        return 2
    card = "CPU" if options.cpu else names[0]
    started, total_s = time.monotonic(), 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    good = []

    def left() -> float:
        return total_s - (time.monotonic() - started) - GRACE_S

    def part(name: str, title: str, make: Callable[[], tuple[str, bool]]) -> None:
        began = time.monotonic()
        text, fine = make()
        took = f"{datetime.date.today()}, {card}, {time.monotonic() - began:.0f} s."
        page = options.out / f"{name}_{slug(card)}.md"
        page.write_text(f"# {title}: {card}\n\n{took}\n\n{text}")
        print(page.read_text(), flush=True)
        good.append(fine)

    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        scratch = Path(folder)
        part("gpu_tests", "Tests that need a GPU", lambda: tests(min(TESTS_S, left() / 4), scratch))

        results = options.out / "runs" if os.environ.get("OUT") else scratch / "runs"
        model, settings = ("tiny", ["gpu.soak_s=2"]) if options.cpu else ("llama-2-7b", [])
        part(
            "gpu_alone",
            "runner bench of test gpu",
            lambda: alone(model, settings, min(ALONE_S, left() / 3), results / "gpu"),
        )

        minutes = options.minutes * 2 / 5
        page = options.out / f"sft_speed_{slug(card)}.md"
        argv = [
            sys.executable,
            str(ROOT / "benchmarks" / "sft_speed.py"),
            "--minutes",
            f"{minutes:g}",
            "--out",
            str(page),
        ]
        rc, stdout = run(
            [*argv, *(["--device", "cpu"] if options.cpu else [])], min(60 * minutes + 3 * GRACE_S, left())
        )
        print(stdout or ending(rc, stdout, 60 * minutes), flush=True)  # it has written its page itself
        good.append(rc == 0)

        models = [("tiny", 8)] if options.cpu else [("llama-2-7b", 16), ("llama-3.2-1b", 16)]
        part("bench", "runner bench of the trainer", lambda: bench(models, left(), results / "sft"))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
