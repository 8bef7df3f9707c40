"""A newer Slurm, with accounting: what matters most of the other Slurm tests, and what sacct alone still knows.

The tests of jobs are those that run on this machine's release; here `slurm3` is a testbed of another one. It takes
about two minutes, most of them until Slurm gives notice of a time limit and slurmctld forgets what has ended.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from faults import test_resume as resuming
from faults import test_slurm_faults as faults
from faults.conftest import ENDLESS, SHORT, SLURM, SOME_SECONDS, assert_kept
from runner.cluster import inventory, ssh
from runner.cluster import slurm as slurm_settings
from runner.errors import EXIT_INFRASTRUCTURE, EXIT_OK
from runner.launch.slurm import commands
from runner.system import process
from testbed.benches import RUNNER, Bench, inside, pause, podman, until
from testbed.conftest import Testbed, slurm_nodes

pytestmark = pytest.mark.testbed

NEWER = "trixie"  # Slurm 24.11; bookworm has 22.05
SINGLE, ARRAY = "forgotten-single", "forgotten-array"

# Tests of this machine's release, on nodes of another one.
test_cancel = faults.test_a_job_that_is_cancelled_by_hand_is_told_as_that
test_resume = resuming.test_a_job_goes_on_without_its_controller_and_is_taken_up


@pytest.fixture(scope="module")
def slurm3(containers, tmp_path_factory, request) -> Iterator[Testbed]:
    release = request.config.getoption("--release") or NEWER
    folder = tmp_path_factory.mktemp("newer")
    with slurm_nodes("pytest-newer", folder, release, "slurm_cluster_accounting=true") as bed:
        yield bed


@dataclass
class Forgotten:
    """Jobs that end beside the other tests, and that slurmctld forgets some seconds later."""

    client: commands.SlurmClient
    single: str
    array: str
    cancelled: str
    bench: Bench


@pytest.fixture(scope="module", autouse=True)
def forgotten(slurm3: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Forgotten:
    first = slurm3.nodes[0]["container"]
    inside(first, "sed -i 's/^ReturnToService/MinJobAge=2\\n&/' /etc/slurm/slurm.conf && scontrol reconfigure")
    folder = tmp_path_factory.mktemp("client")
    read = inventory.read(str(slurm3.inventory), folder / "cache")
    pins, config = folder / "known_hosts", folder / "ssh_config"
    pins.write_text(ssh.known_hosts(read))
    config.write_text(ssh.ssh_config(read, str(pins)))
    settings = slurm_settings.settings({"partition": "gpu", "login": "node001"}, "test")
    client = commands.SlurmClient(settings, read.nodes[0], str(config))

    def submitted(name: str, *lines: str, command: str = "true") -> str:
        head = [f"#SBATCH --job-name={name}", "#SBATCH --output=/dev/null", "#SBATCH --mem=64", *lines]
        return client.submit("\n".join(["#!/bin/bash", *head, command, ""]))

    single = submitted(SINGLE, "#SBATCH --nodes=2")
    array = submitted(ARRAY, "#SBATCH --array=0-2%1", command="exit $SLURM_ARRAY_TASK_ID")
    cancelled = submitted("forgotten-cancelled", command="sleep 600")
    assert until(lambda: client.poll([cancelled])[cancelled].state == "running", 120)
    client.cancel(cancelled)
    # A run whose controller is killed, and whose job ends without it.
    assert slurm3.share
    bench = Bench(slurm3.inventory, slurm3.share / "left", *SLURM, "--nodes", "2", *SOME_SECONDS)
    bench.wait_for_ranks()
    bench.process.send_signal(signal.SIGKILL)
    bench.end()
    return Forgotten(client, single, array, cancelled, bench)


@pytest.fixture(scope="module")
def limited(slurm3: Testbed) -> Bench:
    """A cell that never ends by itself: it waits for its job's limit beside other tests, on the third node."""
    assert slurm3.share
    arguments = ("--hosts", "node003", "--set", "slurm.time_limit_s=120", *ENDLESS)
    return Bench(slurm3.inventory, slurm3.share / "limited", *SLURM, *arguments)


def test_time_limit(slurm3, limited):
    code, output = limited.end()
    assert code == EXIT_INFRASTRUCTURE, output
    (cell,) = limited.run.read_status()["cells"].values()
    assert (cell["state"], cell["error"]["kind"]) == ("incomplete", "time_limit")
    assert_kept(limited.run, [slurm3.nodes[2]["name"]])


def test_the_nodes_have_another_slurm_than_those_of_the_other_tests(slurm3, request):
    version = inside(slurm3.nodes[0]["container"], "scontrol --version").split()[-1]
    if (request.config.getoption("--release") or NEWER) == NEWER:
        assert int(version.split(".")[0]) >= 24


def test_submit_and_place(slurm3, tmp_path):
    bench = Bench(slurm3.inventory, slurm3.share / tmp_path.name, *SLURM, "--sweep", "1,2", *SHORT)
    code, output = bench.end()
    assert code == EXIT_OK, output
    cells = bench.run.read_status()["cells"]
    assert [cell["state"] for cell in cells.values()] == ["complete", "complete"]
    assert [len(cell["hosts"]) for cell in cells.values()] == [1, 2]


def forgets(bed: Testbed, job: str) -> bool:
    """Whether slurmctld does not know the job any more; it looks for such jobs once a minute."""
    asked = f"scontrol show job {job} 2>&1 | grep -q 'Invalid job id'"
    return until(lambda: inside(bed.nodes[0]["container"], f"{asked} && echo gone; true").strip() == "gone", 150)


def test_sacct_knows_jobs_that_slurmctld_has_forgotten(slurm3, forgotten):
    tasks = [f"{forgotten.array}_{task}" for task in range(3)]
    for job in (forgotten.single, forgotten.array, forgotten.cancelled):
        assert forgets(slurm3, job)
    found = forgotten.client.poll([forgotten.single, *tasks, forgotten.cancelled])
    assert (found[forgotten.single].state, len(found[forgotten.single].nodes)) == ("complete", 2)
    assert [(found[task].state, found[task].exit_code) for task in tasks] == [
        ("complete", 0),
        ("failed", 1),
        ("failed", 2),
    ]
    assert found[forgotten.cancelled].state == "cancelled"
    assert {info.name for info in found.values()} == {SINGLE, ARRAY, "forgotten-cancelled"}
    assert forgotten.client.find(SINGLE) == forgotten.single
    assert forgotten.client.find(ARRAY) == forgotten.array


def test_a_run_is_taken_up_whose_job_slurmctld_has_forgotten(slurm3, forgotten):
    run = forgotten.bench.run
    job = next(iter(run.read_status()["cells"].values()))["job"]["id"]
    assert forgets(slurm3, job)
    code, output = resuming.resume(forgotten.bench.results)
    assert code == EXIT_OK, output
    (cell,) = run.read_status()["cells"].values()
    assert (cell["state"], cell["attempt"], cell["job"]["id"]) == ("complete", 1, job)


def test_without_slurmdbd_a_forgotten_job_is_unknown_and_not_an_error(slurm3, forgotten):
    first = slurm3.nodes[0]["container"]
    assert forgets(slurm3, forgotten.single)
    inside(first, "systemctl stop slurmdbd")
    try:
        assert forgotten.client.poll([forgotten.single])[forgotten.single].state == "unknown"
    finally:
        inside(first, "systemctl start slurmdbd")


def test_a_node_that_hung_until_slurm_gave_it_up_is_resumed_by_setup(slurm3, request):
    if not request.config.getoption("--release"):
        pytest.skip(
            "a real hang takes a minute and a half; `make slurm` has it, and the scenario slurm_cluster its state"
        )
    first, hung = slurm3.nodes[0]["container"], slurm3.nodes[2]["container"]
    timeout = (
        "sed -i '/^SlurmdTimeout/d; s/^ReturnToService=.*/SlurmdTimeout={}\\nReturnToService=0/' /etc/slurm/slurm.conf"
    )

    def state() -> str:
        return inside(first, "sinfo --noheader --Node --nodes=node003 --format=%T").strip()

    inside(first, f"{timeout.format(15)} && scontrol reconfigure")
    pause(hung)
    try:
        assert until(lambda: state().startswith("down"), 120)
    finally:
        podman("unpause", hung)
    # It answers again, and stays down where the cluster is set to that; for 100 s Slurm does not even ask it.
    settings = ["--set", "slurm_cluster_accounting=true", "--set", "slurm_cluster_return_to_service=0"]
    argv = [
        str(RUNNER),
        "setup",
        "-i",
        str(slurm3.inventory),
        "--results",
        str(slurm3.share),
        "--tags",
        "slurm_cluster",
    ]
    done = process.run([*argv, *settings], timeout_s=300)
    assert done.rc == 0, done.stdout + done.stderr
    words = "was DOWN in Slurm, reason: Not responding"
    assert words in done.stdout and "(NOT_RESPONDING)" in done.stdout
    assert state() == "idle"
