"""Why a job waits, and whether waiting will ever end it. Text in, values out.

Reasons: Slurm's `job_state_reason` of 20.11 to 26.05 and its "Job Reason Codes", and the descriptions that slurmctld
puts in their place ("launch failed requeued held").
"""

from __future__ import annotations

import re
from enum import Enum


class Wait(Enum):
    """What ends the wait for a reason."""

    TIME = "it ends by itself, with other jobs or at a date"
    OWN = "it ends with other jobs of the same user, if any runs"
    NODES = "it ends with other jobs on the nodes that it names, unless one of these starts no jobs at all"
    SOMEBODY = "it ends when somebody acts"
    NEVER = "it does not end: the job itself is not allowed, or cannot start"


_SIZE = "one job may not have that much or that little; ask for another size or time, or another account or QoS"
_MEMORY = "it asks for more memory than is allowed; lower slurm.mem"
_TIME = "its time limit is above the allowed one; lower slurm.time_limit_s"
_HELD = "it could not be started on its nodes; see `sinfo -R` and slurmd's log there"

# (reasons, what ends the wait, what to do), the first that matches from a reason's beginning. What is not listed ends
# by itself: limits that other jobs use up (…Grp…, …PerAccount, …RunMinutes) end with those jobs.
_REASONS = (
    # Their own limits: no other job is in the way.
    (r"MaxMemPerLimit|(Assoc|QOS)Max(Mem|Memory)Per(Node|Job)", Wait.NEVER, _MEMORY),
    (r"(Partition|QOS|Association)TimeLimit", Wait.NEVER, _TIME),
    (r"(Assoc|QOS)Max\w*Per(Job|Node)(Limit)?$|QOSMin\w+", Wait.NEVER, _SIZE),
    (r"BadConstraints", Wait.NEVER, "no node may give what it asks for; fix slurm.constraint or slurm.gres"),
    (r"InvalidAccount|AccountNotAllowed|Job's account not permitted", Wait.NEVER,
     "the account cannot be used here; fix slurm.account"),
    (r"InvalidQOS|QOSNotAllowed|Job's QOS not permitted", Wait.NEVER, "the QoS cannot be used here; fix slurm.qos"),
    (r"DependencyNeverSatisfied", Wait.NEVER, "what it depends on has failed; cancel it"),
    (r"DeadLine", Wait.NEVER, "it cannot end before its deadline; fix slurm.extra or slurm.time_limit_s"),
    (
        r"Reservation ?(Deleted|Invalid)|Invalid ?Reservation|Reservation .*(which this job .*has ended|was deleted)",
        Wait.NEVER,
        "its reservation is gone; fix slurm.reservation",
    ),
    # Its start has failed and Slurm will not try again; of its nodes the drained one says why.
    (r"JobHoldMaxRequeue|JobLaunchFailure|.*(launch|limit|retrieval)\w* ?(failed|failure|exceeded) ?requeued ?held",
     Wait.NEVER, _HELD),
    # Nodes and partitions that somebody must bring back, and jobs that somebody holds.
    (
        r"ReqNodeNotAvail.*Unavailable\w*:[ (]*\w|Nodes required for job are DOWN|NodeDown|FrontEndDown",
        Wait.SOMEBODY,
        "nodes it needs are down, drained or kept for others; see `sinfo -R`, or name other nodes",
    ),
    # Slurm 24.11 says so as well of a named node that was drained while it was busy; 22.05 lists it as unavailable.
    (
        r"ReqNodeNotAvail($| May be reserved)",
        Wait.NODES,
        "nodes that it names are down or drained; see `sinfo -R`, or name other nodes",
    ),
    (r"PartitionDown|PartitionInactive", Wait.SOMEBODY, "the partition starts no jobs; fix slurm.partition"),
    (
        r"PartitionNodeLimit",
        Wait.SOMEBODY,
        "the partition does not allow that many nodes, or they are down; ask for another number, or see `sinfo -R`",
    ),
    (
        r"PartitionConfig|Constraints|AccountingPolicy",
        Wait.SOMEBODY,
        "the partition cannot give what it asks for now; see `scontrol show partition` and slurm.constraint",
    ),
    (r"(Assoc|QOS)Grp(?!\w*Run)\w*(Minutes(Limit)?|WallLimit)$", Wait.SOMEBODY,
     "the time granted to the account or QoS is used up; ask for another"),
    (r"QOSUsageThreshold", Wait.SOMEBODY, "the account has used more than its share; ask for another account or QoS"),
    (r"JobHeldUser", Wait.SOMEBODY, "it is held; `scontrol release` it"),
    (r"JobHeldAdmin", Wait.SOMEBODY, "an administrator holds it; ask them"),
    (r".*requeued ?held|.*requeued in held state", Wait.SOMEBODY, "it is held; `scontrol release` it"),
    (r"SystemFailure", Wait.SOMEBODY, "Slurm itself has failed; see slurmctld's log"),
    (r"BurstBufferOperation|Burst buffer(/| \w+( \w+)? error)", Wait.SOMEBODY,
     "its burst buffer has failed; see slurmctld's log, then release it"),
    # Slurm has the same reason whether others' jobs use the limit up, or the job alone is above it.
    (
        r"(QOS)?Max(?!Submit)\w+PerUser(Limit)?$|AssocMaxJobsLimit",
        Wait.OWN,
        "it alone is above what one user may have, since no other job of yours runs; ask for less, or another QoS",
    ),
)  # fmt: skip
_OF_ONE_PARTITION = re.compile(
    r"Partition|MaxMemPerLimit|QOS|Account|Nodes required|Job's \w+ not permitted", re.IGNORECASE
)


def judge(reason: str, *, several: bool = False) -> tuple[Wait, str | None]:
    """What ends a job's wait for this reason, and where that is not time alone, the reason with what to do.

    `several`: the job may start in one of several partitions. Slurm has only the reason of the one that it tried last,
    so one that is about a partition says little.
    """
    plain = reason.strip().strip("()").replace("_", " ").replace(",", "")
    for words, wait, remedy in _REASONS:
        if re.match(words, plain, re.IGNORECASE):
            if several and _OF_ONE_PARTITION.match(plain):
                break
            return wait, f"{reason.strip().strip('()').replace('_', ' ')}: {remedy}"
    return Wait.TIME, None
