"""Names of a run's Slurm jobs and their logs. Standard library only, since the node's agent imports it too."""

from __future__ import annotations

NAME = "shakedown"  # the prefix of job names; the run's id follows it

LOGS = "/var/tmp"  # the folder of job output on nodes that do not see the run directory; it always exists
