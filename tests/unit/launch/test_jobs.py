"""The acting half of the Slurm backend, against commands that are passed in: what is run, and what is made of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_commands import DOWN, Commands, cluster, line

from runner.cluster import inventory
from runner.cluster import slurm as slurm_settings
from runner.errors import InfrastructureError, UsageError
from runner.launch import carry
from runner.launch.slurm import commands as jobs
from runner.system.process import Outcome

SCRIPT = "#!/bin/bash\n#SBATCH --job-name=shakedown-r-c-1\n"


# --- one question ---------------------------------------------------------------------------------


def test_pauses_grow_to_a_quarter_of_a_minute_and_stay_there():
    pauses = list(itertools.islice(jobs.intervals(), 20))
    assert pauses[0] == 1 and pauses == sorted(pauses) and pauses[-1] == 15


def test_many_jobs_are_one_question():
    commands = Commands(squeue=[line("1", "RUNNING", nodes="n[1-2]") + line("2", "PENDING", "Priority")])
    found = cluster(commands).poll(["1", "2"])
    assert (found["1"].state, found["1"].nodes, found["2"].reason) == ("running", ("n1", "n2"), "Priority")
    assert len(commands.calls) == 1 and "--jobs=1,2" in commands.calls[0][0]


def test_what_squeue_has_forgotten_is_asked_of_sacct():
    header = "JobID|#State|#ExitCode|#Start|#NodeList|#JobName|#Reason\n"
    commands = Commands(
        squeue=[(1, "slurm_load_jobs error: Invalid job id specified")],
        sacct=[header + "7|#TIMEOUT|#0:0|#Unknown|#n1|#x|#None\n"],
        scontrol=[(1, "slurm_load_jobs error: Invalid job id specified")],
    )
    assert cluster(commands).poll(["7"])["7"].state == "time_limit"
    assert not commands.named("scontrol")


def test_a_task_of_an_array_that_is_over_is_told_in_other_ways():
    """As Slurm 22.05 does it: `Job 7_1 not found` on stdout, and scancel's status without a word."""
    commands = Commands(squeue=[""], sacct=[(1, "disabled")], scontrol=["JobId=9 ArrayJobId=7 JobState=FAILED"])
    assert cluster(commands).poll(["7_1"]) == {"7_1": replace(jobs.forgotten("7_1"), state="failed", raw="FAILED")}
    commands = Commands(squeue=[""], sacct=[(1, "disabled")], scontrol=[""], scancel=[(229, "")])
    commands.answers["scontrol"] = iter([Outcome((), 1, 0.0, "Job 7_1 not found\n", "")])
    assert cluster(commands).poll(["7_1"])["7_1"].state == "unknown"
    cluster(commands).cancel("7_1", "USR2")


@pytest.mark.parametrize(
    "sacct", [(1, "Slurm accounting storage is disabled"), InfrastructureError("program 'sacct' is not installed")]
)
def test_where_there_is_no_sacct_scontrol_knows(sacct):
    commands = Commands(squeue=[""], sacct=[sacct], scontrol=["JobId=7 JobName=x JobState=NODE_FAIL Reason=NodeDown"])
    assert cluster(commands).poll(["7"])["7"].state == "node_failed"


def test_a_job_that_nobody_knows_is_unknown():
    gone = (1, "slurm_load_jobs error: Invalid job id specified")
    commands = Commands(squeue=[gone], sacct=[(1, "disabled")], scontrol=[gone])
    assert cluster(commands).poll(["7"])["7"].state == "unknown"


def test_a_controller_that_restarts_keeps_what_was_known_and_one_that_stays_away_is_said():
    commands = Commands(squeue=[line("7", "RUNNING", nodes="n1"), (1, DOWN), (1, "Unexpected message received")])
    patient = cluster(commands)
    before = patient.poll(["7"])
    assert patient.poll(["7"]) == before and patient.poll(["7"]) == before
    with pytest.raises(jobs.SlurmUnreachable, match=r"Slurm has not answered for 0 s: squeue: .*Unable to contact"):
        cluster(Commands(squeue=[(1, DOWN)]), patience_s=0).poll(["7"])


def test_a_controller_that_hangs_is_silent_too():
    commands = Commands(squeue=[InfrastructureError("squeue gave no result within 60 s")])
    with pytest.raises(jobs.SlurmUnreachable, match="gave no result"):
        cluster(commands, patience_s=0).poll(["7"])


def test_a_machine_without_slurm_is_told_how_to_name_one():
    error = InfrastructureError("program 'sbatch' is not installed or not on PATH")
    error.__cause__ = FileNotFoundError()
    with pytest.raises(InfrastructureError, match=r"this machine has no sbatch: .* slurm\.login"):
        cluster(Commands(sbatch=[error])).submit(SCRIPT)


# --- submission -----------------------------------------------------------------------------------


def test_the_script_goes_in_by_stdin_and_secrets_by_the_environment():
    commands = Commands(sbatch=["12;cluster\n"])
    assert cluster(commands).submit(SCRIPT, {"HF_TOKEN": "s3cret"}) == "12"
    argv, options = commands.calls[0]
    assert argv == ["sbatch", "--parsable"] and options["input"] == SCRIPT and options["env"]["HF_TOKEN"] == "s3cret"


def test_no_command_line_shows_a_secret_on_the_way_to_a_login_node(cluster_inventory):
    commands = Commands(sbatch=["12\n"])
    far = jobs.SlurmClient(slurm_settings.Settings(), cluster_inventory.nodes[0], "/run/ssh_config", run=commands)
    assert far.submit(SCRIPT, {"HF_TOKEN": "s3cr'et $(x)", "WANDB_API_KEY": "k"}) == "12"
    argv, options = commands.calls[0]
    assert argv[:4] == ["ssh", "-F", "/run/ssh_config", cluster_inventory.nodes[0].name]
    assert "s3cr" not in str(argv) and "IFS= read -r HF_TOKEN" in argv[-1]
    assert options["input"] == "s3cr'et $(x)\nk\n" + SCRIPT


def test_a_secret_with_a_line_break_is_refused_without_being_shown():
    with pytest.raises(UsageError, match="HF_TOKEN contains a line break") as error:
        cluster(Commands()).submit(SCRIPT, {"HF_TOKEN": "two\nlines"})
    assert "two" not in str(error.value)


def test_slurms_own_reason_is_given():
    said = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition"
    )
    commands = Commands(sbatch=[(1, said)])
    with pytest.raises(InfrastructureError, match="refuses shakedown-r-c-1: invalid partition specified: x; Batch job"):
        cluster(commands).submit(SCRIPT)
    assert cluster(commands).test_only(SCRIPT) == (
        "invalid partition specified: x; Batch job submission failed: Invalid partition"
    )


def test_a_lost_answer_is_no_reason_for_a_second_job():
    lost = (1, "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    commands = Commands(sbatch=[lost], squeue=["41\n42\n"])
    assert cluster(commands).submit(SCRIPT) == "42"
    assert len(commands.named("sbatch")) == 1 and "--name=shakedown-r-c-1" in commands.named("squeue")[0]


def test_who_leaves_while_a_job_is_submitted_leaves_none_behind():
    commands = Commands(sbatch=[KeyboardInterrupt()], squeue=["41\n"], scancel=[""])
    with pytest.raises(KeyboardInterrupt):
        cluster(commands).submit(SCRIPT)
    assert commands.named("scancel") == [["scancel", "41"]]


def test_the_jobs_of_a_run_are_found_by_the_beginning_of_their_names_an_array_once():
    rows = "41 shakedown-r-c-1\n42 shakedown-r2-c-1\n43 other job\n9 shakedown-r-all-c-1\n"
    commands = Commands(squeue=[f"44 shakedown-r-array-c-1\n{rows}44 shakedown-r-array-c-1\n"])
    assert cluster(commands).of_run("r") == ["9", "41", "44"]
    assert "--format=%F %j" in commands.named("squeue")[0]


def test_cancelling_what_is_over_is_no_error_and_what_is_refused_is():
    over = Commands(scancel=[(1, "scancel: error: Kill job error on job id 7: Invalid job id specified")])
    cluster(over).cancel("7", "TERM", step=2)
    assert over.calls[0][0] == ["scancel", "--signal=TERM", "7.2"]
    refused = Commands(scancel=[(1, "scancel: error: Kill job error on job id 7: Access/permission denied")])
    with pytest.raises(InfrastructureError, match=r"cannot cancel job 7: .*permission denied"):
        cluster(refused).cancel("7")


# --- the inventory --------------------------------------------------------------------------------


def listing(**hosts: dict) -> dict:
    return {"_meta": {"hostvars": hosts}, "gpu_nodes": {"hosts": list(hosts)}}


@pytest.fixture
def cluster_inventory() -> inventory.Inventory:
    common = {"runner_backend": "slurm", "runner_slurm": {"partition": "gpu", "time_limit_s": 600}}
    return inventory.parse("inventory/x", listing(a=dict(common), b=dict(common)))


def test_an_inventory_says_once_how_jobs_are_submitted(cluster_inventory):
    assert cluster_inventory.slurm == {"partition": "gpu", "time_limit_s": 600}
    assert {node.backend for node in cluster_inventory.nodes} == {"slurm"}
    words = inventory.by_word(cluster_inventory.nodes)
    assert words["node002"] is words["b"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"runner_backend": "slurm", "runner_slurm": {"partition": "b"}}, "runner_slurm differs between hosts"),
        ({"runner_slurm": {"partition": "a"}}, "runner_backend differs between hosts"),
        ({"runner_backend": "pbs"}, "runner_backend"),
    ],
)
def test_hosts_that_disagree_are_refused(second, said):
    first = {"runner_backend": "slurm", "runner_slurm": {"partition": "a"}}
    with pytest.raises(UsageError, match=said):
        inventory.parse("inventory/x", listing(a=first, b=second))


def test_a_mistyped_setting_is_refused_where_it_stands():
    with pytest.raises(
        UsageError, match="inventory/x: runner_slurm: unknown key 'partitoin'; did you mean 'partition'"
    ):
        inventory.parse("inventory/x", listing(a={"runner_slurm": {"partitoin": "gpu"}}))


# --- whether nodes share files --------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_whether_files_are_shared_is_seen_on_the_login_host(cluster_inventory, tmp_path, shared):
    asked = []

    def run(argv, **options):
        probe = argv[-1].split("test -w ")[1].rstrip("'")
        asked.append(probe)
        assert Path(probe).is_dir()  # while it is asked
        return Outcome(tuple(argv), 0 if shared else 1, 0.0, "", "")

    far = jobs.SlurmClient(slurm_settings.Settings(), cluster_inventory.nodes[0], "/run/ssh_config", run=run)
    assert far.sees(tmp_path / "results" / "not yet there") is shared
    [probe] = asked
    assert Path(probe).parent == tmp_path and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "sees"),
    [({}, True), ({"login": "a"}, False), ({"login": "a", "shared": True}, True), ({"shared": False}, False)],
)
def test_until_it_was_seen_files_are_shared_where_there_is_no_login_host(given, sees):
    assert slurm_settings.Settings(**given).sees_files is sees


def test_what_the_settings_say_of_files_is_not_asked(cluster_inventory, tmp_path):
    said = {"shared": False, "login": "a"}
    assert carry.observed(said, cluster_inventory, "/nosuch/ssh_config", tmp_path) is said
    assert carry.observed(None, cluster_inventory, None, tmp_path) is None
    assert carry.observed({}, cluster_inventory, None, tmp_path) == {"shared": True}
