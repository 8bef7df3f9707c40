"""Why a job waits: what passes with time, what needs somebody, what never passes; and what is told of it.

Spellings: Slurm's list of reasons from 20.11 to 26.05, what slurmctld writes in their place, and squeue's `%r` and `%R`.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.launch.slurm import waiting
from runner.launch.slurm.waiting import Wait

NEVER = [
    ("MaxMemPerLimit", "lower slurm.mem"),
    ("(MaxMemPerLimit)", "lower slurm.mem"),
    ("QOSMaxMemoryPerNode", "lower slurm.mem"),
    ("AssocMaxMemPerNode", "lower slurm.mem"),
    ("PartitionTimeLimit", "slurm.time_limit_s"),
    ("QOSTimeLimit", "slurm.time_limit_s"),
    ("AssociationTimeLimit", "slurm.time_limit_s"),
    ("BadConstraints", "slurm.constraint"),
    ("InvalidAccount", "slurm.account"),
    ("AccountNotAllowed", "slurm.account"),
    ("InvalidQOS", "slurm.qos"),
    ("QOSNotAllowed", "slurm.qos"),
    ("(Job's account not permitted to use this partition (a100 allows research,staff not physics))", "slurm.account"),
    ("Job's_account_not_permitted_to_use_this_partition_(a100_denies_physics_including_physics)", "slurm.account"),
    ("Job's QOS not permitted to use this partition (h200 allows h200_qos not normal)", "slurm.qos"),
    ("AssocMaxNodePerJobLimit", "ask for another size"),
    ("AssocMaxWallDurationPerJobLimit", "ask for another size"),
    ("QOSMaxWallDurationPerJobLimit", "ask for another size"),
    ("QOSMaxCpuPerJobLimit", "ask for another size"),
    ("QOSMaxGRESPerNode", "ask for another size"),
    ("QOSMaxGRESPerJob", "ask for another size"),
    ("QOSMaxBillingMinutesPerJob", "ask for another size"),
    ("AssocMaxCpuMinutesPerJobLimit", "ask for another size"),
    ("AssocMaxGRESPerJob", "ask for another size"),
    ("QOSMinGRES", "ask for another size"),
    ("QOSMinCpuNotSatisfied", "ask for another size"),
    ("DependencyNeverSatisfied", "cancel it"),
    ("DeadLine", "deadline"),
    ("ReservationDeleted", "slurm.reservation"),
    ("ReservationInvalid", "slurm.reservation"),
    ("Reservation acceptance was deleted", "slurm.reservation"),
    ("JobHoldMaxRequeue", "slurmd's log"),
    ("launch failed requeued held", "slurmd's log"),
    ("launch_failed_requeued_held", "slurmd's log"),
    ("LaunchFailedRequeuedHeld", "slurmd's log"),
    ("launch failure limit exceeded requeued held", "slurmd's log"),
    ("user env retrieval failed requeued held", "slurmd's log"),
]
SOMEBODY = [
    ("((ReqNodeNotAvail, UnavailableNodes:cs[100,101]))", "name other nodes"),
    ("ReqNodeNotAvail,_UnavailableNodes:node003", "name other nodes"),
    ("(Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions)", "sinfo -R"),
    ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions", "sinfo -R"),
    ("NodeDown", "sinfo -R"),
    ("PartitionDown", "slurm.partition"),
    ("PartitionInactive", "slurm.partition"),
    ("PartitionNodeLimit", "another number"),  # also where required nodes are down
    ("PartitionConfig", "scontrol show partition"),
    ("Constraints", "slurm.constraint"),
    ("AssocGrpCPUMinutesLimit", "is used up"),
    ("AssocGrpBillingMinutes", "is used up"),
    ("QOSGrpGRESMinutes", "is used up"),
    ("QOSGrpWallLimit", "is used up"),
    ("QOSUsageThreshold", "its share"),
    ("JobHeldUser", "scontrol release"),
    ("JobHeldAdmin", "administrator"),
    ("job requeued in held state", "scontrol release"),
    ("BurstBufferOperation", "burst buffer"),
    ("Burst buffer pre_run error", "burst buffer"),
    ("burst_buffer/lua: slurm_bb_data_in: no such pool", "burst buffer"),
]
OWN = ["QOSMaxCpuPerUserLimit", "QOSMaxGRESPerUser", "QOSMaxNodePerUserLimit", "QOSMaxMemoryPerUser", "MaxGRESRunMinsPerUser",
       "QOSMaxJobsPerUserLimit", "AssocMaxJobsLimit"]  # fmt: skip
NODES = ["ReqNodeNotAvail", "ReqNodeNotAvail, May be reserved for other job",
         "((ReqNodeNotAvail, May be reserved for other job))", "ReqNodeNotAvail,_May_be_reserved_for_other_job"]  # fmt: skip
TIME = [
    "Priority", "Resources", "Dependency", "BeginTime", "None", "", "(Priority)", "JobArrayTaskLimit", "Licenses", "Reservation",
    "ReqNodeNotAvail, UnavailableNodes:",
    "(ReqNodeNotAvail, UnavailableNodes:)", "ReqNodeNotAvail, Reserved for maintenance", "AssocGrpNodeLimit", "AssocGrpGRES",
    "AssocGrpBilling", "AssocGrpMemLimit", "AssocGrpCPURunMinutesLimit", "QOSGrpCPURunMinutesLimit", "QOSGrpGRESRunMinutes",
    "QOSGrpNodeLimit", "MaxGRESPerAccount", "MaxNodePerAccount", "QOSJobLimit", "QOSMaxSubmitJobPerUserLimit", "Cleaning", "Prolog",
    "BurstBufferStageIn", "MaxPoweredUpNodes", "SchedDefer", "never heard of",
]  # fmt: skip


@pytest.mark.parametrize(("reason", "todo"), NEVER)
def test_what_never_passes_is_told_with_what_to_do(reason, todo):
    wait, why = waiting.judge(reason)
    assert (
        wait is Wait.NEVER and why.startswith(reason.strip("()").replace("_", " ")) and todo in why and "\n" not in why
    )


@pytest.mark.parametrize(("reason", "todo"), SOMEBODY)
def test_what_passes_only_when_somebody_acts_is_told_with_what_to_do(reason, todo):
    wait, why = waiting.judge(reason)
    assert wait is Wait.SOMEBODY and todo in why and "\n" not in why


@pytest.mark.parametrize("reason", OWN)
def test_a_users_limit_passes_with_the_users_other_jobs(reason):
    wait, why = waiting.judge(reason)
    assert wait is Wait.OWN and why.startswith(reason)


@pytest.mark.parametrize("reason", NODES)
def test_nodes_that_are_named_may_be_busy_or_out_of_service(reason):
    wait, why = waiting.judge(reason)
    assert wait is Wait.NODES and "sinfo -R" in why


@pytest.mark.parametrize("reason", TIME)
def test_what_passes_with_time_is_waited_for(reason):
    assert waiting.judge(reason) == (Wait.TIME, None)


@pytest.mark.parametrize(
    "reason", ["PartitionTimeLimit", "PartitionNodeLimit", "MaxMemPerLimit", "QOSNotAllowed", "PartitionDown",
               "Job's QOS not permitted to use this partition (h200 allows h200_qos not normal)"],
)  # fmt: skip
def test_of_several_partitions_what_one_does_not_allow_says_little(reason):
    assert waiting.judge(reason, several=True) == (Wait.TIME, None)
    assert waiting.judge("InvalidAccount", several=True)[0] is Wait.NEVER


@given(st.text(max_size=60))
def test_any_reason_is_judged(text):
    wait, why = waiting.judge(text)
    assert (why is None) == (wait is Wait.TIME)
