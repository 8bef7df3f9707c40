"""Every profile of the role `conda_env` with every test: that all run, and train with the same loss.

    .venv/bin/python benchmarks/profile_matrix.py
    .venv/bin/python benchmarks/profile_matrix.py --profiles user cuda12 --folder /scratch/matrix

One after the other, the role installs each lock (up to 8 GB each, which are downloaded and then deleted), and
`runner bench` runs `torch` and `sft` in that environment: two CPU ranks over gloo, the tiny model, once from random
weights and once from a checkpoint. The first profile does it again with another rounding: only where that makes no
difference is it a comparison. `tests/model_probe.py` compares a packed row's logits with each sample's alone. CUDA
builds of torch run on a CPU too, so no GPU is needed, and none is tested. The result, with all versions, is written to
benchmarks/results/profile_matrix.md; the exit code is 1 where a profile fails or differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runner.results.records import Record
from runner.results.rundir import RunDir

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "roles" / "conda_env" / "files" / "profiles"
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
FIRST = "current"  # with which the others are compared
MOST_LOSS = 0.005  # as a part of the loss
# At most this part of the loss may come from rounding alone, or the comparison says nothing about the profiles.
MOST_ROUNDING = 0.001
# Not the tiny model's own 0.003, with which its loss jumps, and another rounding alone makes a step differ by 1.2 %.
LEARNING_RATE = 0.001
STARTS = ("random", "checkpoint")
MOST_LOGIT = 1e-4  # of logits up to 1
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")
PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: conda_env
        tasks_from: install
        rolespec_validate: false
"""
# Printed by the environment's own Python: the versions in it, and whether DeepSpeed uses a CPU.
ASK = """
import json, os, sys
from importlib import metadata
import torch
versions = {name: metadata.version(name) for name in sys.argv[1:]}
versions["CUDA"] = torch.version.cuda or "none"
versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "none"
os.environ["DS_ACCELERATOR"] = "cpu"
try:
    import deepspeed
    cpu = True
except (ImportError, ValueError):
    cpu = False
print(json.dumps([versions, cpu]))
"""


@dataclass
class Outcome:
    """What one profile did.

    `losses` has those of all steps by start, `rounded` the same of the first profile with its attention computed in
    another way, `probe` the arrays of model_probe.
    """

    profile: str
    install_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    stand_ins: bool = False
    operations: int = 0
    wrong: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    rounded: dict[str, list[float]] = field(default_factory=dict)
    probe: dict[str, np.ndarray] = field(default_factory=dict)
    failure: str = ""


def install(profile: str, folder: Path, wheels: str | None) -> Path:
    """Have the role build the environment of `profile` in `folder`; returns its Python. Raises CalledProcessError.

    `wheels` is a folder that pip searches beside its index.
    """
    settings = {
        "conda_env_profile": profile,
        "conda_env_prefix": str(folder / "env"),
        "conda_env_manager": "venv",
        "conda_env_python": "{}.{}".format(*sys.version_info[:2]),
        "conda_env_wheelhouse": str(folder / "wheelhouse"),
        "conda_env_timeout_s": 3600,
    }
    (folder / "play.yml").write_text(PLAYBOOK)
    (folder / "settings.json").write_text(json.dumps(settings))
    argv = [BIN / "ansible-playbook", "-i", "inventory/local", "-e", f"@{folder}/settings.json", folder / "play.yml"]
    # From elsewhere Ansible would not find the roles.
    roles = {"ANSIBLE_ROLES_PATH": str(ROOT / "roles")}
    call(argv, {**roles, "PIP_FIND_LINKS": wheels} if wheels else roles)
    return folder / "env" / "bin" / "python"


def call(argv: list[str | Path], env: dict[str, str] | None = None) -> str:
    """Run a command from the project's folder; returns its stdout, and raises CalledProcessError with all output."""
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, argv, f"{done.stdout}\n{done.stderr}")
    return done.stdout


def conflicts(python: Path) -> str:
    """What pip says of the packages that do not fit each other; "" where all do."""
    found = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True).stdout.splitlines()
    # This package needs more on the controller than on a node.
    return "\n".join(line for line in found if line[:1].isalnum() and not line.startswith(("shakedown ", "No broken")))


def bench(folder: Path, python: Path, env: dict[str, str], *arguments: str) -> list[Record]:
    """The records of one run of `runner bench` on this machine with `python` on its node. Raises CalledProcessError."""
    inventory = folder / "inventory.json"
    host = {"ansible_connection": "local", "ansible_host": "127.0.0.1", "runner_python": str(python)}
    host["runner_device"] = "cpu"
    host["runner_scratch"] = str(folder / "scratch")  # other runs on this machine hold the default one
    inventory.write_text(json.dumps({"all": {"children": {"gpu_nodes": {"hosts": {"localhost": host}}}}}))
    results = folder / "results"
    call([BIN / "runner", "bench", "-i", inventory, "--model", "tiny", "--results", results, *arguments], env)
    return list(RunDir.find(results, None).read_records())


def losses(records: list[Record]) -> list[float]:
    """The loss of each step, warm-up included."""
    found = [record for record in records if record.metric == "loss"]
    return [record.value for record in sorted(found, key=lambda record: record.context["step"])]


def try_profile(profile: str, folder: Path, inputs: Path, steps: int, wheels: str | None, reference: bool) -> Outcome:
    """Install `profile` in `folder` and run everything; a failure is noted, not raised.

    `inputs` has the folders `weights`, `checkpoints` and `data`; `wheels` is that of `install`. The `reference`, with
    which others are compared, trains again with another rounding.
    """
    outcome = Outcome(profile)
    started = time.monotonic()
    try:
        python = install(profile, folder, wheels)
        outcome.install_s = time.monotonic() - started
        outcome.failure = conflicts(python)
        outcome.versions, cpu = json.loads(call([python, "-c", ASK, *PACKAGES]).splitlines()[-1])
        outcome.stand_ins = not cpu
        # LOCAL_SIZE: DeepSpeed 0.14 would count CPUs with numactl, which nodes need not have.
        env = {} if cpu else {"PYTHONPATH": str(STAND_INS), "LOCAL_SIZE": "2"}
        sft = ("--test", "sft", "--set", f"sft.steps={steps}", "--set", f"sft.lr={LEARNING_RATE}")
        starts = dict(zip(STARTS, ((), ("--weights", str(inputs / "weights"))), strict=True))
        records = bench(folder, python, env, "--test", "torch")
        wrong = [record for record in records if record.metric == "wrong_values"]
        outcome.operations, outcome.wrong = len(wrong), int(sum(record.value for record in wrong))
        for start, weights in starts.items():
            outcome.losses[start] = losses(bench(folder, python, env, *sft, *weights))
            if reference:
                rounded = bench(folder, python, env, *sft, *weights, "--set", "sft.attention=eager")
                outcome.rounded[start] = losses(rounded)
        probe = ROOT / "tests" / "model_probe.py"
        call([python, probe, inputs / "checkpoints", inputs / "data", folder / "probe.npz"], env)
        outcome.probe = dict(np.load(folder / "probe.npz"))
    except subprocess.CalledProcessError as error:
        lines = [line for line in str(error.output).splitlines() if line.strip()]
        outcome.failure = f"{Path(str(error.cmd[0])).name}: " + "\n".join(lines[-20:])
    return outcome


def prepare(folder: Path) -> None:
    """Write checkpoints of the tiny model and of the probe's, with this Python's transformers, and the probe's data."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    import model_probe
    import ranks
    from runner.plan import config
    from runner.workloads.sft.model import build_model

    models = {f"checkpoints/{name}": model for name, model in model_probe.MODELS.items()}
    for place, model in {"weights": config.load_model("tiny").model_dump(), **models}.items():
        build_model(model, attention="sdpa", dtype=torch.float32, seed=11).save_pretrained(folder / place)
    ranks.write_packed_data(folder / "data")


def apart(one: list[float], other: list[float]) -> float:
    """The largest difference of two series of losses, as a part of the loss; infinite where one has fewer steps."""
    if not one or len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))


def crossing(outcome: Outcome) -> float:
    """The largest difference between a logit of a packed row and that of the sample alone."""
    probe = outcome.probe
    return max(float(np.abs(probe[name] - probe[f"{name}-alone"]).max()) for name in probe if f"{name}-alone" in probe)


def elsewhere(outcome: Outcome, first: Outcome) -> float:
    """The largest difference between a logit here and with the first profile."""
    return max(float(np.abs(outcome.probe[name] - first.probe[name]).max()) for name in first.probe)


def report(outcomes: list[Outcome], arguments: str, seconds: float) -> tuple[str, bool]:
    """(the result as Markdown, whether every profile runs every test with the same loss)."""
    first = outcomes[0]
    names = [*PACKAGES, "CUDA", "NCCL"]
    lines = [
        "# Every profile with every test",
        "",
        f"    .venv/bin/python benchmarks/profile_matrix.py{arguments}",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}, {seconds / 60:.0f} min.",
        "The role `conda_env` installed each lock; `runner bench` ran in it, two CPU ranks over gloo, the tiny model",
        "in bfloat16 under ZeRO-3. No GPU: NCCL and Liger are untested here, and a stand-in for flash-attn was called.",
        "",
        "| profile | " + " | ".join(names) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    good = True
    for outcome in outcomes:
        lines.append(f"| `{outcome.profile}` | " + " | ".join(outcome.versions.get(n, "–") for n in names) + " |")
    lines += [
        "",
        "`torch`: operations measured, and wrong elements in them. `sft`: loss of the first and the last step, and the",
        f"largest difference of a step's loss from that of `{first.profile}` (at most {MOST_LOSS:.1%}), from random",
        "weights and from one checkpoint. Packed: the largest difference of a logit in a packed row from the sample's",
        f"alone, with sdpa, eager and flash-attn. Logits: the largest difference from those of `{first.profile}`. Both",
        f"in float32, at most {MOST_LOGIT:g}.",
        "",
        "| profile | `torch` | `sft` random | apart | `sft` checkpoint | apart | packed | logits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        if outcome.failure:
            good = False
            lines.append(f"| `{outcome.profile}` | failed, see below | | | | | | |")
            continue
        row = [f"{outcome.operations}, {outcome.wrong} wrong"]
        differences = []
        for start in STARTS:
            series = outcome.losses[start]
            differences.append(apart(series, first.losses.get(start, [])))
            row += [f"{series[0]:.4f} → {series[-1]:.4f}", f"{differences[-1]:.3%}"]
        logits = [crossing(outcome), elsewhere(outcome, first) if first.probe else float("inf")]
        row += [f"{value:.1g}" for value in logits]
        good &= outcome.operations > 0 and outcome.wrong == 0 and max(differences) <= MOST_LOSS
        good &= max(logits) <= MOST_LOGIT
        lines.append(f"| `{outcome.profile}` | " + " | ".join(row) + " |")
    if not first.failure:
        rounding = {start: apart(first.rounded.get(start, []), first.losses[start]) for start in STARTS}
        good &= max(rounding.values()) <= MOST_ROUNDING
        lines += [
            "",
            f"Rounding alone: `{first.profile}` with attention computed in another way, eager instead of sdpa, is",
            " and ".join(f"{part:.3%} ({start})" for start, part in rounding.items())
            + f" apart, at most {MOST_ROUNDING:.1%}. The learning rate is {LEARNING_RATE:g}: with the tiny model's",
            "own, 0.003, the loss jumps at step 13, and this rounding alone makes 1.2 % of it.",
        ]
    if with_stand_ins := [f"`{outcome.profile}`" for outcome in outcomes if outcome.stand_ins]:
        lines += [
            "",
            f"{', '.join(with_stand_ins)}: its DeepSpeed uses a CPU only with Intel's extensions, for which",
            "`benchmarks/stand_ins/` stood in; on GPUs it needs neither.",
        ]
    lines += ["", f"Result: {'the same loss everywhere' if good else 'NOT the same everywhere'}."]
    for outcome in outcomes:
        if outcome.failure:
            lines += ["", f"`{outcome.profile}` failed:", "", *(f"    {line}" for line in outcome.failure.splitlines())]
    return "\n".join(lines) + "\n", good


def main() -> int:
    """Try the profiles one after the other and write the result; returns 1 where one fails or differs."""
    every = sorted((path.stem for path in LOCKS.glob("*.txt")), key=lambda name: (name != FIRST, name))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--steps", type=int, default=14, help="measured steps of sft, after two of warm-up")
    parser.add_argument("--folder", type=Path, help="where environments are built, one at a time; 12 GB are needed")
    parser.add_argument(
        "--wheels",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="wheels for a profile whose index is out of reach",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "profile_matrix.md")
    chosen = parser.parse_args()
    wheels = dict(word.split("=", 1) for word in chosen.wheels)
    started = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="matrix-") as scratch:
        prepare(Path(scratch))
        for profile in chosen.profiles:
            folder = Path(scratch, profile)
            folder.mkdir()
            reference = profile == chosen.profiles[0]
            outcome = try_profile(profile, folder, Path(scratch), chosen.steps, wheels.get(profile), reference)
            outcomes.append(outcome)
            shutil.rmtree(folder)
            said = outcome.failure or f"installed in {outcome.install_s:.0f} s, ran every test"
            print(f"{profile}: {said}; {(time.monotonic() - started) / 60:.0f} min so far", flush=True)
            # After each, so that one who stops it has what was done until then.
            done = [outcome.profile for outcome in outcomes]
            arguments = "" if done == every else " --profiles " + " ".join(done)
            text, good = report(outcomes, arguments, time.monotonic() - started)
            chosen.output.write_text(text)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
