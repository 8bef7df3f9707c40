"""Which cells have a job: each cell's share of one, from its submission until its end was observed.

status.json keeps the ledger under `allocation`, so that a later controller follows the same jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from runner.launch.slurm.answers import whole


@dataclass(frozen=True)
class JobShare:
    """One cell's share of a job.

    `job_id` is None until sbatch has answered, `step` the cell's number in a job of several cells (None: the job, or
    the array's task, is the cell's own), `name` that of the sbatch file, and `hosts` the nodes that it was submitted
    for (none: Slurm places it).
    """

    job_id: str | None
    step: int | None
    name: str
    hosts: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> JobShare:
        """The share in an entry of `allocation` in status.json."""
        job_id, step, name, *hosts = values
        return cls(job_id, step, name, tuple(hosts))

    def to_json(self) -> list[Any]:
        """The entry of `allocation` in status.json: job id, step, name, hosts."""
        return [self.job_id, self.step, self.name, *self.hosts]

    @property
    def follows_others(self) -> bool:
        """Whether other cells run before it in the same job; not for step 0 or a task of an array."""
        return bool(self.step)


class Certainty(IntEnum):
    """How certain it is that a cell has a job that continues; the most certain ones are followed first."""

    HAS_JOB = 0
    MAY_HAVE_JOB = 1
    NO_JOB = 2


class Ledger:
    """The shares of all cells that have a job, and which of these jobs an earlier controller left behind.

    `outdated` are the ids of jobs that it left, and that are of no use any more.
    """

    def __init__(
        self,
        shares: Mapping[str, JobShare] | None = None,
        inherited: Iterable[str] = (),
        outdated: Iterable[str] = (),
    ) -> None:
        self._shares = dict(shares or {})
        self.inherited = set(inherited)
        self.outdated = set(outdated)

    @classmethod
    def from_status(cls, status: Mapping[str, Any]) -> Ledger:
        """The ledger that an earlier controller left in status.json.

        Inherited are the jobs whose end it did not observe: they continue without a controller and are followed first.
        Outdated are those of cells that have another plan since, or are not in the plan any more.
        """
        shares = {cell: JobShare.from_json(values) for cell, values in status.get("allocation", {}).items()}
        inherited = {
            cell
            for cell, entry in status["cells"].items()
            if (entry["error"] or {}).get("kind") in (None, "slurm_unreachable")
            and entry["state"] != "complete"
            and (cell in shares or (entry["started"] and entry["state"] == "incomplete"))
        }
        kept = {cell: share for cell, share in shares.items() if cell in inherited}
        used = {whole(share.job_id) for share in kept.values() if share.job_id}
        outdated = {
            share.job_id
            for cell, share in shares.items()
            if cell not in kept and share.job_id and whole(share.job_id) not in used
            if cell not in status["cells"] or (status["cells"][cell]["error"] or {}).get("kind") == "plan_changed"
        }
        return cls(kept, inherited, outdated)

    def to_json(self) -> dict[str, list[Any]]:
        """The shares by cell, as `allocation` in status.json."""
        return {cell: share.to_json() for cell, share in self._shares.items()}

    @property
    def cells(self) -> set[str]:
        """The cells that have a share, by id."""
        return set(self._shares)

    @property
    def any_job(self) -> bool:
        """Whether a job of this run may still exist."""
        return bool(self._shares or self.inherited)

    def share(self, cell: str) -> JobShare | None:
        """The cell's share of a job, None if it has none."""
        return self._shares.get(cell)

    def has(self, cell: str) -> bool:
        """Whether the cell has a share of a job, or a job that an earlier controller left."""
        return cell in self._shares or cell in self.inherited

    def certainty(self, cell: str, job_id: str | None) -> Certainty:
        """How certain it is that the cell has a job; `job_id` is that of its last job in status.json."""
        if not self.has(cell):
            return Certainty.NO_JOB
        share = self._shares.get(cell)
        return Certainty.HAS_JOB if (share.job_id if share else job_id) else Certainty.MAY_HAVE_JOB

    def job_ids(self) -> set[str] | None:
        """The ids of all jobs that cells share; None if one of them is not known yet."""
        ids = {share.job_id for share in self._shares.values()}
        return None if None in ids else {job_id for job_id in ids if job_id}

    def of_jobs(self, job_ids: set[str] | None) -> list[str]:
        """The cells that have a share of these jobs, or of any (None)."""
        return [cell for cell, share in self._shares.items() if job_ids is None or share.job_id in job_ids]

    def submitted_as(self, name: str) -> list[str]:
        """The cells that share the job of the sbatch file `name`."""
        return [cell for cell, share in self._shares.items() if share.name == name]

    def note(self, shares: Mapping[str, JobShare]) -> None:
        """Record shares by cell, in place of earlier ones."""
        self._shares |= shares

    def drop(self, cells: Iterable[str]) -> None:
        """Remove the shares of these cells; inherited jobs remain inherited."""
        for cell in list(cells):
            self._shares.pop(cell, None)

    def over(self, cell: str) -> None:
        """Record that the cell's job, or step, has ended."""
        self.inherited.discard(cell)
        self._shares.pop(cell, None)

    def reconcile(self, cell: str, before: set[str], has_job: bool, complete: Iterable[str]) -> None:
        """Record what was found out about the job of `cell` whose id was not known.

        `before` are the cells that had a share until then, `has_job` is whether the job exists, and `complete` are the
        cells that need none.
        """
        found = self._shares.keys() - before
        self.drop(found & set(complete))
        if cell in self.inherited:
            self.inherited |= found & self._shares.keys()
        self.inherited -= before - self._shares.keys()
        if not has_job:
            self.inherited.discard(cell)


def jobs_left(status: Mapping[str, Any]) -> list[str]:
    """The ids of the jobs and array tasks in status.json whose end no controller has observed."""

    def unseen(cell: Mapping[str, Any]) -> bool:
        return not cell["ended"] or (cell["error"] or {}).get("kind") == "slurm_unreachable"

    if status["state"] != "incomplete":
        return []
    cells = status["cells"]
    noted = {cell["job"]["id"] for cell in cells.values() if cell.get("job") and cell["started"] and unseen(cell)}
    shares = {cell: JobShare.from_json(values) for cell, values in status.get("allocation", {}).items()}
    # A stage that is not asked for any more has no cell: nobody will follow its job.
    waiting = {
        share.job_id for cell, share in shares.items() if share.job_id and (cell not in cells or unseen(cells[cell]))
    }
    return sorted(noted | waiting, key=lambda job_id: [int(number) for number in job_id.split("_")])
