"""A stand-in for Slurm's commands, which answers as it is given to."""

from __future__ import annotations

import itertools

from runner.cluster import slurm as slurm_settings
from runner.launch.slurm import answers as slurm
from runner.launch.slurm import commands as jobs
from runner.system.process import Outcome

DOWN = "Unable to contact slurm controller (connect failure)"


def line(job_id: str, raw: str, reason: str = "None", nodes: str = "", name: str = "shakedown-r-c-1") -> str:
    """A line as `squeue` prints it in our format."""
    return slurm.SEPARATOR.join((job_id, raw, "N/A", nodes, name, reason)) + "\n"


class Commands:
    """Slurm's commands: each program's answers in turn (stdout, or an error of one), the last of them for ever."""

    def __init__(self, **answers: list[str | BaseException | tuple[int, str]]) -> None:
        self.answers = {program: iter(for_ever(given)) for program, given in answers.items()}
        self.calls: list[tuple[list[str], dict]] = []

    def __call__(self, argv, **options) -> Outcome:
        self.calls.append((list(argv), options))
        program = argv[0] if argv[0] != "ssh" else next(p for p in self.answers if p in argv[-1])
        answer = next(self.answers.get(program, iter([(1, f"{program}: error: disabled")])))
        if isinstance(answer, Outcome):
            return answer
        if isinstance(answer, BaseException):
            raise answer
        rc, text = answer if isinstance(answer, tuple) else (0, answer)
        return Outcome(tuple(argv), rc, 0.0, text if rc == 0 else "", "" if rc == 0 else text)

    def named(self, program: str) -> list[list[str]]:
        return [argv for argv, _ in self.calls if argv[0] == program]


def for_ever(given):
    return itertools.chain(given, itertools.repeat(given[-1]))


def cluster(commands: Commands, *, patience_s: float = 60.0, **settings) -> jobs.Slurm:
    return jobs.Slurm(slurm_settings.Settings(**settings), patience_s=patience_s, run=commands)
