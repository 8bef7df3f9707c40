"""What a run's jobs and their logs are called under Slurm. Standard library only: the node's agent reads it too."""

from __future__ import annotations

NAME = "shakedown"  # with which the names of jobs begin: after it comes the run's id

LOGS = "/var/tmp"  # where a job's output goes on nodes that do not see the run directory; it is always there
