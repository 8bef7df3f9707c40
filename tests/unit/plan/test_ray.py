"""Ray's ports, resources, commands and answers. Two jobs on one node never share a port."""

from __future__ import annotations

import shlex
import subprocess
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import InfrastructureError, UsageError
from runner.plan.engines import ray
from runner.plan.engines.ranks import PORTS

EPHEMERAL = range(32768, 61000)  # Linux's default
# Ray's workers listen here unless they are told otherwise, and a GCS that listens here does not start.
RAYS_OWN = range(10002, 20000)
RANGES = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda ends: range(min(ends), max(ends) + 1))
JOBS = st.one_of(st.integers(1, 10**9).map(str), st.text(min_size=1, max_size=30))


# --- ports -----------------------------------------------------------------------------------------------


def apart(one, another):
    """Whether two ranges of ports have none in common."""
    return one.stop <= another.start or another.stop <= one.start


@given(ephemeral=RANGES)
def test_no_block_touches_another_or_what_is_not_rays_to_take(ephemeral):
    every = [ports.all for ports in ray.blocks(ephemeral)]
    assert all(apart(one, another) for one, another in combinations(every, 2))
    for block in every:
        assert all(apart(block, forbidden) for forbidden in (RAYS_OWN, ephemeral, PORTS, range(1024)))
        assert block[-1] < 65536


@given(first=st.integers(0, 60000))
def test_every_service_has_a_port_of_its_own_inside_the_block(first):
    ports = ray.Ports(first)
    services = [ports[name] for name in ray.SERVICES]
    assert len({*services, *ports.workers}) == len(services) + len(ports.workers)
    assert {*services, *ports.workers} <= set(ports.all)
    assert len(ports.workers) >= 400, "Ray starts a worker for each CPU"


@given(jobs=st.lists(JOBS, min_size=2, max_size=13), occupied=st.sets(st.integers(30000, 65535), max_size=4))
def test_two_jobs_never_share_a_port_whatever_their_ids_are(jobs, occupied):
    held = [range(port, port + 1) for port in occupied]  # by others; then by those who got a block

    def free(ports):
        return all(apart(ports.all, other) for other in held)

    for job in jobs:
        try:
            got = ray.claim(job, EPHEMERAL, free)
        except InfrastructureError as error:
            assert error.kind == "port_taken"
            assert not any(free(ports) for ports in ray.blocks(EPHEMERAL)), "none was free"
        else:
            assert free(got)
            held.append(got.all)


@given(job=JOBS, ephemeral=RANGES)
def test_every_block_is_tried_once(job, ephemeral):
    try:
        tried = ray.in_order(job, ephemeral)
    except UsageError as error:
        assert not ray.blocks(ephemeral)
        assert "net.ipv4.ip_local_port_range" in str(error)
    else:
        assert sorted(ports.first for ports in tried) == [ports.first for ports in ray.blocks(ephemeral)]


def test_jobs_with_consecutive_ids_try_different_blocks_first():
    first = {ray.in_order(str(job), EPHEMERAL)[0] for job in range(100, 113)}
    assert len(first) == len(ray.blocks(EPHEMERAL)) == 13


def test_no_block_that_is_free_is_one_line():
    with pytest.raises(
        InfrastructureError, match="all 13 blocks of ports for Ray from 30000 on are in use here"
    ) as error:
        ray.claim("13", EPHEMERAL, lambda ports: False)
    assert error.value.kind == "port_taken"


# --- resources -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "grant"),
    [
        ({}, ray.Grant(192, 8)),
        ({"SLURM_CPUS_ON_NODE": "64", "SLURM_GPUS_ON_NODE": "4"}, ray.Grant(64, 4)),
        ({"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_GPUS": "0,1,5"}, ray.Grant(64, 3)),
        ({"SLURM_JOB_GPUS": "7", "SLURM_GPUS_ON_NODE": ""}, ray.Grant(192, 1)),
    ],
)
def test_ray_gets_what_slurm_has_granted_and_not_what_the_machine_has(variables, grant):
    assert ray.granted(variables, 192, 8) == grant


@pytest.mark.parametrize(
    ("devices", "count"),
    [
        ("0,1,5", 3),
        ("", 0),
        ("GPU-8f2c,MIG-1a", 2),
        ("NoDevFiles", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("void", 0),
        ("none", 0),
    ],
)
def test_the_devices_that_cuda_shows_end_with_the_first_that_is_none(devices, count):
    assert ray.visible(devices) == count


# --- commands --------------------------------------------------------------------------------------------


def options(command):
    return dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)


def test_every_port_of_a_command_is_of_the_nodes_block():
    ports, grant = ray.Ports(61000), ray.Grant(64, 8)
    for command in (
        ray.head("/opt/env/bin/python", "10.0.0.1", ports, grant, "run/cell"),
        ray.worker("/opt/env/bin/python", "10.0.0.2", ports, grant, "10.0.0.1:61001"),
    ):
        named = {
            name: int(value) for name, value in options(command).items() if name.endswith("port") or name == "port"
        }
        assert set(named.values()) <= set(ports.all)
        assert len(set(named.values())) == len(named), "no port is given twice"
        assert command[:3] == ["/opt/env/bin/ray", "start", "--block"]
        assert (options(command)["num-cpus"], options(command)["num-gpus"]) == ("64", "8")


def test_what_is_not_given_ray_would_choose_from_ports_that_are_not_ours():
    """Each of these has a default of its own in Ray 2.60: a fixed port, or any that the kernel gives."""
    head = options(ray.head("/e/bin/python", "10.0.0.1", ray.Ports(61000), ray.Grant(1, 1), "m"))
    assert {
        "port", "dashboard-port", "ray-client-server-port", "node-manager-port", "object-manager-port",
        "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
        "min-worker-port", "max-worker-port",
    } <= set(head)  # fmt: skip
    assert {"AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"} <= set(ray.environment(ray.Ports(61000), "/t"))


def test_the_token_is_in_a_file_and_on_no_command_line_or_variable():
    variables = ray.environment(ray.Ports(61000), "/run/token")
    assert (variables["RAY_AUTH_MODE"], variables["RAY_AUTH_TOKEN_PATH"]) == ("token", "/run/token")
    assert "RAY_AUTH_TOKEN" in ray.CLEARED, "it would take precedence over the file"
    assert not set(variables) & set(ray.CLEARED)


@given(marker=st.text(min_size=1))
def test_rays_folder_leaves_room_for_its_sockets(marker):
    socket = f"{ray.folder(marker)}/session_2026-11-27_23-36-12_123456_4194304/sockets/plasma_store"
    assert len(socket.encode()) <= 107


def test_an_ipv6_address_is_told_from_its_port():
    assert ray.endpoint("10.0.0.1", 1) == "10.0.0.1:1"
    assert ray.endpoint("fd00::1", 1) == "[fd00::1]:1"


@given(
    words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))), min_size=1, max_size=4)
)
def test_rays_shell_gets_the_words_of_a_job_as_they_are(words):
    assert shlex.split(ray.submission("run/ppo", words)["entrypoint"]) == words
    assert ray.submission("a b/ppo.2", [])["submission_id"] == "a-b-ppo-2"


def test_a_shell_expands_nothing_in_a_job():
    words = ["printf", "%s|", "$(id)", "a b", "'", '"', "$HOME", "`x`", "é"]
    body = ray.submission("run/ppo", words)
    output = subprocess.run(["/bin/sh", "-c", body["entrypoint"]], capture_output=True, text=True, check=True).stdout
    assert output == "".join(f"{word}|" for word in words[2:])


# --- answers ---------------------------------------------------------------------------------------------


def nodes(*found):
    rows = [{"node_ip": ip, "state": state, "resources_total": resources} for ip, state, resources in found]
    return {"result": True, "data": {"result": {"total": len(rows), "result": rows}}}


def test_only_nodes_that_are_alive_count_each_with_its_gpus():
    answer = nodes(
        ("10.0.0.1", "ALIVE", {"GPU": 8.0, "CPU": 64.0}), ("10.0.0.2", "DEAD", {"GPU": 8.0}), ("10.0.0.3", "ALIVE", {})
    )
    assert ray.joined(answer).gpus == {"10.0.0.1": 8, "10.0.0.3": 0}


@pytest.mark.parametrize("answer", [{}, {"data": None}, {"data": {"result": {"result": [{"state": "ALIVE"}]}}}])
def test_another_answer_is_no_list_of_nodes(answer):
    with pytest.raises(ValueError, match="not a list of Ray's nodes"):
        ray.joined(answer)


def test_a_node_that_is_missing_or_has_too_few_gpus_is_named():
    joined = ray.joined(nodes(("10.0.0.1", "ALIVE", {"GPU": 8}), ("10.0.0.2", "ALIVE", {"GPU": 7})))
    expected = {"node001": "10.0.0.1", "node002": "10.0.0.2", "node003": "10.0.0.3"}
    assert ray.missing(joined, expected, 8) == [
        ("node002", "gpus_missing", "node002 has joined Ray with 7 GPUs, 8 asked for"),
        ("node003", "never_joined", "node003 (10.0.0.3) has not joined Ray"),
    ]
    assert ray.missing(joined, {"node001": "10.0.0.1"}, 8) == []


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ({"status": "RUNNING", "driver_exit_code": None}, (ray.RUNNING, None)),
        ({"status": "PENDING"}, (ray.RUNNING, None)),
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, (ray.SUCCEEDED, 0)),
        ({"status": "SUCCEEDED"}, (ray.SUCCEEDED, 0)),
        ({"status": "FAILED", "driver_exit_code": 77}, (ray.FAILED, 77)),
        ({"status": "FAILED", "driver_exit_code": -9}, (ray.FAILED, -9)),
        ({"status": "FAILED", "driver_exit_code": 0}, (ray.FAILED, 1)),  # it ended well, and Ray lost its supervisor
        ({"status": "FAILED"}, (ray.FAILED, 1)),  # it never began
        ({"status": "STOPPED", "driver_exit_code": None}, (ray.STOPPED, 1)),
        ({"status": "SOMETHING_NEW"}, (ray.UNKNOWN, None)),
        ({}, (ray.UNKNOWN, None)),
    ],
)
def test_the_programs_own_exit_status_is_told_and_no_failure_counts_as_success(answer, end):
    assert ray.ended(answer) == end


# --- where a task failed ----------------------------------------------------------------------------------

TASKS = """ray.exceptions.RayTaskError(ValueError): ray::TaskRunner.run() (pid=7, ip=10.0.0.1, actor_id=ab, repr=<x>)
  File "/env/verl/trainer/main_ppo.py", line 3, in run
ray.exceptions.RayTaskError(ValueError): ray::WorkerDict.update() (pid=9, ip=10.0.0.2, actor_id=cd)
  File "/env/verl/x.py", line 3, in f
ValueError: x""".splitlines()


def test_a_task_has_failed_where_the_last_one_ran_that_was_called():
    assert ray.failed_at(TASKS) == "10.0.0.2"
    assert ray.failed_at(TASKS[:2]) == "10.0.0.1"
    assert ray.failed_at(["ray.exceptions.RayTaskError(ValueError): ray::f() (pid=9, ip=fd00::2)"]) == "fd00::2"
    assert ray.failed_at(["(WorkerDict pid=9, ip=10.0.0.2) a line", "ValueError: x"]) is None


@pytest.mark.parametrize(
    ("line", "slow"),
    [
        ("Exception: The current node timed out during startup. This could happen because", True),
        ("Exception: No node info found for head node in GCS. Did the head node or gcs start successfully?", True),
        ("ConnectionError: Ray is trying to start at 10.0.0.1:6379, but is already running there", False),
    ],
)
def test_a_node_of_ray_that_was_only_slow_is_told_from_one_that_cannot_start(line, slow):
    assert ray.was_slow(["Traceback (most recent call last):", line]) is slow
