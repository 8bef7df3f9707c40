"""Cancels the Slurm jobs that a controller left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from runner import errors
from runner.report.runs import (
    span_text,
)

if TYPE_CHECKING:
    from runner.launch.slurm.commands import SlurmClient
    from runner.results.rundir import RunDir


POLL_S = 2.0


ANSWER_S = 120.0  # the time Slurm may take to end a cancelled job


def slurm_of(run: RunDir, plan: Mapping[str, Any]) -> SlurmClient:
    """The client for Slurm's commands, on the same machine as the run used.

    Raises UsageError if the run kept no ssh_config for its login node.
    """
    from dataclasses import replace

    from runner.cluster import slurm as slurm_settings
    from runner.cluster.inventory import by_word
    from runner.launch.slurm import commands as jobs
    from runner.plan.plan import Plan

    settings = slurm_settings.settings(plan.get("slurm") or {}, f"run {run.run_id}: {run.plan}")
    if settings.login is None:
        return jobs.SlurmClient(settings)
    planned = Plan.from_dict(plan)
    nodes = [*planned.nodes, *planned.spares]
    config = run.path / "ssh_config"
    if not nodes or not config.exists():
        raise errors.UsageError(f"run {run.run_id} kept no way to {settings.login}: use `scancel` there")
    # The login host need not be one of the run's nodes; the ssh_config knows the whole inventory.
    other = replace(nodes[0], name=settings.login, alias=settings.login, address=settings.login)
    return jobs.SlurmClient(settings, by_word(nodes).get(settings.login, other), str(config))


def cancel_jobs(
    commands: SlurmClient, run_id: str, wait: bool, sleep: Callable[[float], None] = time.sleep
) -> list[str]:
    """Cancel the jobs of a run that Slurm still has; returns their ids.

    With `wait` it returns when they have ended; raises InfrastructureError if they have not after ANSWER_S.
    """
    cancelled = commands.of_run(run_id)
    for job_id in cancelled:
        commands.cancel(job_id)
    waited = 0.0
    while wait and (still := set(commands.of_run(run_id)) & set(cancelled)):
        if waited > ANSWER_S:
            left = ", ".join(f"job {job_id}" for job_id in sorted(still))
            raise errors.InfrastructureError(
                f"{left} cancelled {span_text(waited)} ago and not ended: look at `squeue` and at slurmd on its nodes"
            )
        sleep(POLL_S)
        waited += POLL_S
    return cancelled
