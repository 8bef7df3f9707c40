"""Telling a culprit from its victims, and what kind of failure it was."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from runner.cluster import reasons
from runner.failures import KINDS, Problem, node_lines
from runner.launch import blame
from runner.launch.spellings import SPELLINGS
from runner.launch.talk import AgentSession
from runner.node import lastwords
from runner.node import ranks as node
from runner.node.protocol import Outcome, RankStack
from runner.results import celldir
from runner.results.status import each_error


def outcome(rc: int | None = 1, stderr: list[str] | None = None, ended: bool = False, **more) -> Outcome:
    ranks = {"rank0": {"started": True, "ended": ended, "stderr": stderr or []}}
    plain = {"message": "outcome", "rc": rc, "error": None, "stopped": None, "ranks": ranks, "engine_stderr": []}
    return Outcome.from_json({**plain, **more})


def sessions(*names: str, rc: int = 0, answered: bool = True, stderr: tuple[str, ...] = ()) -> list[AgentSession]:
    return [AgentSession(name, (), {}, rc=rc, answered=answered, stderr=list(stderr)) for name in names]


def test_the_rank_that_died_first_hand_is_blamed_not_those_that_lost_it():
    lost = ["RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234"]
    said = blame.blame(
        sessions("a", "b", "c"),
        {
            "a": outcome(stderr=lost),
            "b": outcome(rc=-9, stderr=["[rank1]: KeyboardInterrupt"]),
            "c": outcome(stderr=lost),
        },
    )
    assert said["host"] == "b" and said["message"] == "the engine was killed by SIGKILL"


def test_torchruns_table_of_failures_tells_which_rank_failed_first_and_how():
    table = (
        "Failures:\n[1]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 122)\n"
        "Root Cause (first observed failure):\n[0]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 123)\n"
    ).splitlines()
    warning = "[W1121 04:58:56.598321713 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved."
    ranks = {f"rank{i}": {"started": True, "ended": False, "stderr": [warning]} for i in range(2)}
    said = blame.blame(sessions("a"), {"a": outcome(rc=1, ranks=ranks, engine_stderr=table)})
    assert said["message"] == "rank1 was killed by SIGKILL"


TABLE = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
runner.workloads FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-27_15:00:01
  host      : node001
  rank      : 0 (local_rank: 0)
  exitcode  : {others} (pid: 122)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-27_15:00:00
  host      : node001
  rank      : 1 (local_rank: 1)
  exitcode  : {first} (pid: 123)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 123
============================================================"""


def killed(first: int, others: int, *stderr: str, noise: int = 0) -> Outcome:
    """Of a node with two ranks, with torchrun's table as the node's agent sends it."""
    lines = [
        "Traceback (most recent call last):",
        '  File "x", line 1',
        *TABLE.format(first=first, others=others).splitlines(),
    ]
    table = lastwords.keep(["[W1121 x.cpp:1] y", *lines, *["frame #1: f"] * noise])
    ranks = {f"rank{i}": {"started": True, "ended": False, "stderr": [line]} for i, line in enumerate(stderr)}
    return outcome(rc=1, ranks=ranks, engine_stderr=table)


LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234"


@pytest.mark.parametrize(
    ("one", "kind", "message"),
    [
        (killed(-9, -15, LOST, ""), "rank_killed", "rank1 was killed by SIGKILL"),
        (killed(-9, -15, LOST, "", noise=90), "rank_killed", "rank1 was killed by SIGKILL"),
        (killed(137, -15, LOST, ""), "rank_killed", "rank1 was killed by SIGKILL"),
        (killed(-7, -15, "", ""), "shared_memory_full", "rank1 was killed by SIGBUS"),
        (killed(-11, 1, LOST, ""), "rank_crashed", "rank1 was killed by SIGSEGV"),
        (killed(1, -15, "working", "ValueError: x"), "rank_crashed", "rank1 died with status 1: ValueError: x"),
        (killed(1, 1, "ValueError: x", LOST), "rank_crashed", "rank0 died with status 1: ValueError: x"),
        (killed(1, -15, "ValueError: x"), "rank_crashed", "rank1 died with status 1: torch.distributed"),
    ],
)
def test_of_several_ranks_of_a_node_the_cause_is_named(one, kind, message):
    said = blame.blame(sessions("a", "b"), {"a": one, "b": outcome(stderr=[LOST])})
    assert (said["kind"], said["host"]) == (kind, "a") and said["message"].startswith(message)


@pytest.mark.parametrize("others", [-15, 1])
def test_a_rank_that_lost_a_peer_and_those_that_its_launcher_ended_are_victims(others):
    said = blame.blame(sessions("a", "b"), {"a": killed(1, others, "working", LOST), "b": outcome(rc=-9)})
    assert [one["host"] for one in each_error(said)] == ["b"]


def test_without_such_a_table_the_rank_that_said_something_is_shown():
    ranks = {"rank0": {"started": True, "ended": False, "stderr": []}}
    ranks["rank1"] = {"started": True, "ended": False, "stderr": ["ImportError: no accelerate"]}
    said = blame.blame(sessions("a"), {"a": outcome(rc=None, ranks=ranks)})
    assert said["message"] == "rank1 ended too soon: ImportError: no accelerate"


def test_an_engine_that_never_started_a_rank_is_quoted():
    said = blame.blame(sessions("a"), {"a": outcome(rc=1, ranks={}, engine_stderr=["No module named torch"])})
    assert said["message"] == "the engine died with status 1: No module named torch" and said["host"] == "a"


def test_a_launcher_that_fails_alone_is_quoted():
    pdsh = outcome(rc=2, ranks={}, engine_stderr=["pdsh@x: node001: ssh exited with exit code 2"])
    nodes = {"a": outcome(rc=None, stopped="done", ranks={})}
    said = blame.blame(sessions("a", celldir.LAUNCHER), {**nodes, celldir.LAUNCHER: pdsh})
    assert said["host"] is None and "died with status 2: pdsh@x" in said["message"]


def test_a_launcher_whose_ranks_never_started_says_why_and_where():
    loader = "error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file"
    said = ["working", f"/opt/env/bin/python: {loader}", "more", "again"]
    lines = [f"node00{n}: {line}" for line in said for n in (1, 2) if (n, line) != (1, said[1])]
    pdsh = outcome(rc=127, ranks={}, engine_stderr=lastwords.keep(lines))
    found = blame.blame(
        sessions("a", "b", celldir.LAUNCHER),
        {h: outcome(rc=None, stopped="done", ranks={}) for h in "ab"} | {celldir.LAUNCHER: pdsh},
    )
    assert found["kind"] == "environment_missing"
    assert found["message"] == f"the launcher died with status 127: node002: /opt/env/bin/python: {loader}"


def test_a_traceback_names_its_host_and_is_shown():
    trace = ["Traceback (most recent call last):", "ValueError: bad"]
    said = blame.blame(sessions("a", "b"), {"a": outcome(stderr=trace), "b": outcome(rc=None, stopped="stop")})
    message = "rank0 died with status 1: ValueError: bad"
    assert said == {"kind": "rank_crashed", "message": message, "host": "a", "stderr": trace}


def test_each_node_that_fails_first_hand_has_its_own_error():
    said = blame.blame(
        [*sessions("a", "b"), *sessions("c", rc=reasons.GIVEN_UP), *sessions("d")],
        {"a": outcome(stderr=["ValueError: x"]), "b": outcome(rc=-9), "d": outcome(rc=None, stopped="stop")},
    )
    assert [(one["host"], one["kind"]) for one in each_error(said)] == [
        ("a", "rank_crashed"),
        ("b", "rank_killed"),
        ("c", "hung"),
    ]


def test_a_launcher_that_is_lost_with_a_node_is_no_failure_of_its_own():
    launcher = outcome(error="the launcher was lost", ranks={})
    said = blame.blame(sessions("a", celldir.LAUNCHER), {"a": outcome(rc=-9), celldir.LAUNCHER: launcher})
    assert [one["host"] for one in each_error(said)] == ["a"]


def test_lost_peers_alone_blame_nobody():
    said = blame.blame(
        sessions("a", "b"), {"a": outcome(stderr=["Connection closed by peer"]), "b": outcome(stopped="stop")}
    )
    assert said["host"] is None and "only lost peers were reported, by a" in said["message"]


def test_a_node_whose_agent_answered_and_left_no_outcome_is_a_lost_connection():
    lost = ["Connection reset by peer"]
    said = blame.blame(sessions("a", "b"), {"a": outcome(stderr=lost)})
    assert (said["kind"], said["host"], said["message"]) == ("lost_connection", "b", "lost the connection to it")


def test_an_agent_that_does_not_end_when_told_to_hangs():
    said = blame.blame(sessions("a", rc=reasons.GIVEN_UP), {})
    assert (said["kind"], said["host"]) == ("hung", "a")


# What rsync and its ssh print when a node fails while files are copied.
COPYING = [
    ("Timeout, server 10.0.0.1 not responding.\nrsync: connection unexpectedly closed (5 bytes received)", 255, "hung"),
    ("Connection to 10.0.0.1 closed by remote host.\nrsync: connection unexpectedly closed", 255, "lost_connection"),
    ("client_loop: send disconnect: Broken pipe\nrsync: [sender] write error: Broken pipe (32)", 10, "lost_connection"),
    ("Read from remote host 10.0.0.1: Connection reset by peer", 255, "lost_connection"),
    ("rsync: connection unexpectedly closed (0 bytes received so far) [sender]", 12, "lost_connection"),
    ("[sender] io timeout after 60 seconds -- exiting\nrsync error: timeout in data send/receive", 30, "hung"),
    ('rsync: [receiver] write failed on "/x/y": No space left on device (28)\nBroken pipe', 11, "disk_full"),
    ('rsync: [receiver] mkstemp "/x/.y" failed: Disk quota exceeded (122)', 23, "disk_full"),
    ('rsync: [sender] send_files failed to open "/x/y": Permission denied (13)', 23, "not_permitted"),
    (
        "bash: line 1: rsync: command not found\nrsync error: remote command not found (code 127)",
        127,
        "environment_missing",
    ),
    ("Connection timed out during banner exchange\nConnection to 10.0.0.1 port 22 timed out", 255, "hung"),
    (
        "ssh: connect to host 10.0.0.1 port 22: No route to host\nrsync: connection unexpectedly closed",
        255,
        "unreachable",
    ),
]


@pytest.mark.parametrize(("said", "rc", "kind"), COPYING, ids=lambda value: str(value)[:40])
def test_what_ends_a_copy_has_a_kind(said, rc, kind):
    assert reasons.reason_kind(rc, said.splitlines()) == kind


# What ssh or the far shell says when no agent answers, its status, and the kind of failure.
NO_AGENT = [
    ("ssh: connect to host 10.0.0.1 port 44222: Connection refused", 255, "unreachable"),
    ("ssh: connect to host 10.0.0.1 port 44222: No route to host", 255, "unreachable"),
    ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", 255, "host_key_changed"),
    ("Host key verification failed.", 255, "host_key_changed"),
    ("root@10.0.0.1: Permission denied (publickey).", 255, "refused_key"),
    ("kex_exchange_identification: Connection closed by remote host", 255, "lost_connection"),
    ("bash: line 1: /opt/env/bin/python: No such file or directory", 127, "environment_missing"),
    ("/opt/env/bin/python: No module named runner", 1, "environment_missing"),
    ("Connection timed out during banner exchange", 255, "hung"),
    ("bash: line 1: /opt/env/bin/python: Permission denied", 126, "not_permitted"),
    ("/opt/env/bin/python: /lib/libc.so.6: version `GLIBC_2.34' not found (required by x)", 1, "environment_missing"),
    ("/opt/env/bin/python: error while loading shared libraries: libz.so.1: cannot open", 127, "environment_missing"),
    ("OSError: [Errno 28] No space left on device", 1, "disk_full"),
    ("bash: fork: Cannot allocate memory", 254, "out_of_memory"),
    ("something new", 255, "unreachable"),
    ("something new", 1, "unknown"),
    ("", reasons.GIVEN_UP, "hung"),
]


@pytest.mark.parametrize(("said", "rc", "kind"), NO_AGENT)
def test_a_node_whose_agent_never_answered_is_called_by_what_ssh_says(said, rc, kind):
    found = blame.blame(sessions("a", rc=rc, answered=False, stderr=(said,)), {})
    assert (found["kind"], found["host"]) == (kind, "a")
    assert found["message"] == f"its agent did not answer{f': {said}' if said else ''}"


# What banners, login scripts and messages of the day say.
NOISE = [
    "Permission denied to all but authorised users. Connection refused after 3 tries!",
    "NOTICE: if Host key verification failed, call 1234; Connection closed at 18:00; No route to host gpu-9 today",
    "/scratch: No space left on device",
    "No module named x was ever found here",
]
OTHERS = "ssh: connect to host mirror.example port 22: Connection timed out"  # of an ssh that a login script started


@pytest.mark.parametrize("noise", [*NOISE, OTHERS])
@pytest.mark.parametrize(("said", "rc", "kind"), [*COPYING, *NO_AGENT])
def test_what_a_banner_says_changes_no_kind(noise, said, rc, kind):
    if noise == OTHERS and (rc == 255 or "rsync" in said):
        return  # our ssh failed as well, and says nothing after it
    alone = reasons.reason_kind(rc, said.splitlines())
    assert reasons.reason_kind(rc, [noise, *said.splitlines()]) == alone
    if rc not in (1, 126, 127, 254):  # those of the far shell are judged by `kind_of` as well
        assert alone == kind


# How a rank ended, what it said, what its node counted, and the kind of failure.
RANK = [
    (-9, [], 0, "rank_killed"),
    (-9, [], 1, "out_of_memory"),
    (None, [], 1, "out_of_memory"),
    (1, ["ValueError: x"], 1, "rank_crashed"),  # the kernel killed something else
    (-11, [], 0, "rank_crashed"),
    (1, ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB."], 0, "cuda_out_of_memory"),
    (1, ["OSError: [Errno 28] No space left on device"], 0, "disk_full"),
    (1, ["ModuleNotFoundError: No module named 'deepspeed'"], 0, "environment_missing"),
    (1, ["code: -98, name: EADDRINUSE, message: address already in use"], 0, "port_taken"),
    (1, ["RuntimeError: CUDA error: uncorrectable ECC error encountered"], 0, "gpu_failed"),
    (None, [], 0, "unknown"),
]


@pytest.mark.parametrize(("status", "stderr", "oom_kills", "kind"), RANK)
def test_how_a_rank_ends_tells_the_kind(status, stderr, oom_kills, kind):
    found = blame.blame(sessions("a"), {"a": outcome(rc=status, stderr=stderr, oom_kills=oom_kills)})
    assert (found["kind"], found["host"]) == (kind, "a")


def test_pdsh_tells_how_a_rank_ended_under_deepspeeds_launcher():
    ends = ["pdsh@c: node002: ssh exited with exit code 247", "pdsh@c: node001: ssh exited with exit code 1"]
    launcher = outcome(rc=-2, stopped="stop", ranks={}, engine_stderr=ends)
    found = blame.blame(
        sessions("a", "b", celldir.LAUNCHER),
        {
            "a": outcome(rc=None, stderr=["Connection closed by peer"]),
            "b": outcome(rc=None),
            celldir.LAUNCHER: launcher,
        },
    )
    assert (found["kind"], found["host"], found["message"]) == ("rank_killed", "b", "rank0 was killed by SIGKILL")


def test_what_an_agent_refuses_comes_with_its_kind():
    refused = outcome(rc=None, error="port 20000 for the rendezvous is taken by another process", kind="port_taken")
    found = blame.blame(sessions("a", "b"), {"a": refused, "b": outcome(rc=None, stopped="stop")})
    assert (found["kind"], found["host"]) == ("port_taken", "a")


def test_what_fails_alike_everywhere_keeps_its_kind_and_names_nobody():
    gone = ["ModuleNotFoundError: No module named 'torch'"]
    found = blame.blame(sessions("a", "b"), {"a": outcome(stderr=gone), "b": outcome(stderr=gone)})
    assert (found["kind"], found["host"]) == ("environment_missing", None)
    found = blame.blame(sessions("a", "b"), {"a": outcome(stderr=gone), "b": outcome(rc=-9)})
    assert [one["kind"] for one in each_error(found)] == ["environment_missing", "rank_killed"]


# --- ranks that stand still -----------------------------------------------------------------------

WAITS = "torch/distributed/distributed_c10d.py:2811 all_reduce"
REASON = "not finished within its limit of 60 s"


def stands(frame: str | None = WAITS, state: str = "S") -> RankStack:
    return RankStack(state, 60.0, [frame] if frame else [])


def hang_error(**hosts: list[RankStack]) -> dict:
    """Of ranks by host, in the order of their numbers."""
    numbers = iter(range(99))
    stacks = {host: {f"rank{next(numbers)}": rank for rank in ranks} for host, ranks in hosts.items()}
    return blame.hang_error("timed_out", REASON, {host: Outcome(stacks=ranks) for host, ranks in stacks.items()})


@pytest.mark.parametrize(
    ("rank", "evidence"),
    [
        (stands(None, "T"), "rank1 is stopped"),
        (stands("some/loader.py:3 read", "D"), "rank1 waits in the kernel"),
        (stands(None), "rank1 is alive but gives no stack"),
        (stands("some/loader.py:3 fetch"), "rank1 is in some/loader.py:3 fetch"),
    ],
)
def test_the_rank_that_others_wait_for_names_its_host(rank, evidence):
    found = hang_error(a=[stands()], b=[rank], c=[stands()])
    assert (found["kind"], found["host"]) == ("rank_hung", "b")
    assert found["message"] == f"{REASON}: {evidence}, while 2 wait for others (first: rank0 in {WAITS})"
    assert found["stderr"] == rank.frames


@pytest.mark.parametrize(
    "hosts",
    [
        {"a": [stands()], "b": [stands()]},  # a network that lost a message
        {"a": [stands(None, "T")], "b": [stands(None, "T")], "c": [stands()]},  # two suspects
        {"a": [stands("user.py:1 work")], "b": [stands("user.py:1 work")]},  # merely slow
        {"a": [stands("user.py:1 work")]},
        {"a": [], "b": []},  # no rank was left
    ],
)
def test_without_exactly_one_suspected_host_nobody_is_blamed(hosts):
    assert hang_error(**hosts) == {"kind": "timed_out", "message": REASON, "host": None, "stderr": []}


@given(
    st.lists(st.lists(st.sampled_from([stands(), stands(None, "T"), stands("user.py:1 f")]), max_size=3), max_size=4)
)
def test_a_host_is_named_only_with_a_suspect_on_it_and_on_no_other(ranks):
    hosts = {f"n{index}": of_host for index, of_host in enumerate(ranks)}
    found = hang_error(**hosts)
    stopped = {host for host, of_host in hosts.items() if any(rank.state == "T" for rank in of_host)}
    if found["host"] is None:
        assert len(stopped) != 1 or any(stands("user.py:1 f") in of_host for of_host in hosts.values())
    else:
        assert stopped <= {found["host"]} and hosts[found["host"]] != []


@pytest.mark.parametrize(
    ("meeting", "frame"),
    [
        (blame._MEETING[0], "torch/cuda/__init__.py:1083 synchronize"),
        (blame._MEETING[0], "runner/workloads/gpu/products.py:128 <lambda>"),
        (blame._MEETING[1], "runner/workloads/nccl/rank.py:128 _stands_still"),
    ],
)
def test_a_rank_at_its_device_hangs_while_the_others_have_come_to_the_meeting(meeting, frame):
    """No rank of such a test computes with another: a device that does not answer is at fault itself."""
    assert (ROOT / meeting).exists()
    meets = stands(f"{meeting}:46 wait")
    found = hang_error(a=[meets, meets], b=[meets, stands(frame)])
    said = f"{REASON}: rank3 is in {frame}, while 3 wait for others (first: rank0 in {meeting}:46 wait)"
    assert (found["kind"], found["host"], found["message"]) == ("rank_hung", "b", said)
    assert hang_error(a=[meets], b=[meets])["host"] is None
    assert hang_error(a=[stands(frame)], b=[stands(frame)])["host"] is None, "nobody waits for another"


def test_stacks_are_read_as_faulthandler_writes_them():
    text = (
        "Stack (most recent call first):\n"
        '  File "/env/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 2811 in all_reduce\n'
        '  File "/src/runner/workloads/collectives.py", line 180 in <lambda>\n'
        '  File "<frozen runpy>", line 88 in _run_code\n'
    )
    assert node.frames(text) == [
        WAITS,
        "runner/workloads/collectives.py:180 <lambda>",
        "<frozen runpy>:88 _run_code",
    ]


# --- the table ------------------------------------------------------------------------------------


def test_every_kind_that_the_code_tells_is_in_the_table():
    told = (
        {row.kind for row in (*reasons._SSH, *reasons._RSYNC, *reasons._THERE)}
        | {row.kind for row in SPELLINGS}
        | set(blame.LATE.values())
    )
    assert told | {"timed_out", "rank_hung", "hung", "interrupted"} <= set(KINDS)


def test_every_kind_that_the_code_writes_is_in_the_table():
    """Whatever is the first argument where an error, a problem or a finding is made."""
    makers = {"error", "Problem", "Suspect", "_finding", "hang_error"}
    written = set()
    for path in (ROOT / "runner").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in makers and call.args:
                named = ast.unparse(call.func)
                if isinstance(call.args[0], ast.Constant) and named not in ("log.error", "parser.error"):
                    written.add(call.args[0].value)
    assert written >= {"drift", "plan_changed", "wrong_values", "no_records", "environment", "hung"}
    assert written <= set(KINDS)


def test_every_kind_in_the_table_is_told_somewhere():
    code = "".join(path.read_text() for path in (ROOT / "runner").rglob("*.py") if path.name != "failures.py")
    assert [kind for kind in KINDS if f'"{kind}"' not in code] == []


def test_only_infrastructure_is_tried_again():
    assert blame.may_retry({"kind": "lost_connection"})
    assert not blame.may_retry({"kind": "rank_crashed"})
    assert not blame.may_retry({"message": "of an older run"})


@pytest.mark.parametrize(
    ("offset_s", "problem"),
    [
        (0.2, None),
        (-59.0, None),
        (3600.0, "its clock is 3,600 s ahead of the controller's"),
        (-3600.0, "its clock is 3,600 s behind the controller's"),
    ],
)
def test_a_clock_is_wrong_when_it_is_off_by_more_than_a_minute(offset_s, problem):
    assert blame.clock_problem(offset_s) == (problem and Problem("clock", problem))


def test_a_node_with_several_problems_is_one_line_and_so_is_one_of_an_earlier_version():
    told = {"host": "gpu-b", "alias": "node002", "kind": "clock", "message": "late"}
    assert node_lines([told, {**told, "message": "full"}]) == node_lines(["node002 (gpu-b): late; full"])
    assert node_lines(["node002 (gpu-b): late; full"]) == ["node002 (gpu-b): late; full"]


# --- one launcher of MPI for the ranks of all nodes ---

NOTICED = [
    "-" * 74,
    "{} noticed that process rank 1 with PID 336 on node b exited on",
    "signal 9 (Killed).",
    "-" * 74,
]
NOTICED_IN_ONE_LINE = ["{} noticed that process rank 1 with PID 336 on node b exited on signal 9 (Killed)."]
DETECTED = [
    "-" * 74,
    "Primary job  terminated normally, but 1 process returned",
    "a non-zero exit code. Per user-direction, the job has been aborted.",
    "-" * 74,
    "{} detected that one or more processes exited with non-zero status, thus causing",
    "the job to be terminated. The first process to do so was:",
    "",
    "  Process name: [[12345,1],1]",
    "  Exit code:    1",
    "-" * 74,
]
DETECTED_BY_5 = [*DETECTED[:-3], "   Process name: [prterun-a-711@1,1]", "   Exit code:    1"]
DISCONNECTED = [
    "An MPI communication peer process has unexpectedly disconnected.  This",
    "usually indicates a failure in the peer process (e.g., a crash or",
    "otherwise exiting without calling MPI_FINALIZE first).",
]


def one_launcher(lines: list[str], rc: int = 137, **of_b):
    """Ranks 0 on a and 1 on b, as mpirun's lines and what rank 1 has written tell their end."""
    outcomes = {
        "a": Outcome.from_json({"rc": None, "stopped": "done", "ranks": {"rank0": {"started": True}}}),
        "b": Outcome.from_json({"rc": None, "stopped": "done", "ranks": {"rank1": {"started": True, **of_b}}}),
        celldir.LAUNCHER: outcome(rc=rc, ranks={}, engine_stderr=lastwords.keep(lines)),
    }
    return blame.blame(sessions("a", "b", celldir.LAUNCHER), outcomes)


@pytest.mark.parametrize("name", ["mpirun", "prterun", "orterun"])
@pytest.mark.parametrize("lines", [NOTICED, NOTICED_IN_ONE_LINE])
@pytest.mark.parametrize("said", [[], DISCONNECTED])
def test_a_rank_that_mpirun_saw_killed_is_blamed_on_its_node(name, lines, said):
    found = one_launcher([line.format(name) for line in lines], stderr=said)
    assert (found["host"], found["kind"], found["message"]) == ("b", "rank_killed", "rank1 was killed by SIGKILL")


@pytest.mark.parametrize("lines", [DETECTED, DETECTED_BY_5])
def test_a_rank_that_mpirun_saw_fail_is_blamed_in_its_own_words(lines):
    words = ["rank 1: no nccl-tests: /opt/nccl/current/bin/all_reduce_perf is missing"]
    found = one_launcher([line.format("mpirun") for line in lines], stderr=words)
    assert found["host"] == "b" and found["message"].startswith("rank1 died with status 1: no nccl-tests")


ABORTED = [
    '{} has exited due to process rank 1 with PID 753 on node b calling "abort". This may have caused other processes',
    "in the application to be terminated by signals sent by prterun (as reported here).",
]


@pytest.mark.parametrize("lines", [ABORTED, DETECTED, []])
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("was killed by SIGKILL", "rank_killed"),
        ("was killed by SIGSEGV", "unknown"),
        ("failed with status 2: b: CUDA failure: all CUDA-capable devices are busy or unavailable", "in_use"),
    ],
)
def test_a_victim_that_the_launcher_saw_first_does_not_hide_who_failed(lines, words, kind):
    """A rank's program dies, MPI ends that of another at once, and the launcher ends all before the first is heard."""
    outcomes = {
        host: Outcome.from_json(
            {"stopped": "done", "ranks": {f"rank{rank}": {"started": True, "stderr": [f"rank {rank}: {said}"]}}}
        )
        for host, rank, said in (
            ("a", 0, f"all_reduce_perf {words}"),
            ("b", 1, "all_reduce_perf failed with status 14 without a word"),
        )
    }
    outcomes[celldir.LAUNCHER] = outcome(rc=14, ranks={}, engine_stderr=[line.format("prterun") for line in lines])
    found = blame.blame(sessions("a", "b", celldir.LAUNCHER), outcomes)
    assert (found["host"], found["kind"]) == ("a", kind)


def test_without_a_rank_that_it_saw_the_launcher_is_told_in_its_words():
    lines = ["bash: line 1: orted: command not found"]
    found = one_launcher(lines, rc=1)
    assert found["host"] is None and "orted: command not found" in found["message"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("srun: error: n2: task 1: Killed", "rank1 was killed by SIGKILL"),
        ("srun: error: n2: tasks 1-2: Exited with exit code 1", "rank1 died with status 1"),
        ("srun: error: n2: task 1: Segmentation fault (core dumped)", "rank1 was killed by SIGSEGV"),
    ],
)
@pytest.mark.parametrize("stopped", [None, "stop"])
def test_a_task_that_srun_saw_end_first_is_blamed_on_its_node(line, message, stopped):
    lines = [line, "srun: Terminating StepId=7.1", "slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT x ***"]
    lines += ["srun: error: n1: task 0: Terminated"]
    outcomes = {
        "a": outcome(rc=137, engine_stderr=lastwords.keep(lines)),
        "b": Outcome.from_json({"rc": None, "stopped": stopped, "ranks": {"rank1": {"started": True}}}),
    }
    found = blame.blame(sessions("a", "b"), outcomes)
    assert (found["host"], found["message"]) == ("b", message)


# --- an engine of our own that gave up ------------------------------------------------------------

LATE = "n2 (10.0.0.3) has not joined Ray within 120 s"


def gave_up(kind: str, message: str, accused: str | None = None) -> Outcome:
    return Outcome(rc=1, error=message, kind=kind, accused=accused)


def test_the_node_that_another_accuses_is_named():
    found = blame.blame(
        sessions("a", "b"), {"a": gave_up("never_joined", LATE, "b"), "b": gave_up("lost_peers", "has lost the head")}
    )
    assert (found["kind"], found["host"], found["message"]) == ("never_joined", "b", LATE)
    assert "also" not in found


def test_what_a_node_says_of_itself_counts_more_than_what_another_says_of_it():
    told = gave_up("gpus_missing", "has 1 GPU to use, 2 asked for")
    found = blame.blame(sessions("a", "b"), {"a": gave_up("never_joined", LATE, "b"), "b": told})
    assert [(one["kind"], one["host"]) for one in each_error(found)] == [("gpus_missing", "b")]


def test_a_node_that_is_gone_is_lost_whatever_others_say_of_it():
    found = blame.blame(sessions("a", "b"), {"a": gave_up("never_joined", LATE, "b")})
    assert [(one["kind"], one["host"]) for one in each_error(found)] == [("lost_connection", "b")]


def test_who_only_lost_another_is_nobodys_suspect():
    lost = gave_up("lost_peers", "has lost b")
    found = blame.blame(sessions("a", "b"), {"a": lost, "b": gave_up("ray_died", "Ray has ended with status 1: x")})
    assert [(one["kind"], one["host"]) for one in each_error(found)] == [("ray_died", "b")]
    alone = blame.blame(sessions("a", "b"), {"a": lost, "b": Outcome(stopped="stop")})
    assert (alone["kind"], alone["host"]) == ("lost_peers", None) and "has lost b" in alone["message"]


def test_what_a_task_died_of_on_another_node_is_that_nodes_failure():
    dead = outcome(
        stderr=["Traceback (most recent call last):", "RuntimeError: CUDA error: uncorrectable ECC error"], accused="b"
    )
    found = blame.blame(sessions("a", "b"), {"a": dead, "b": Outcome(rc=0)})
    assert (found["kind"], found["host"]) == ("gpu_failed", "b")
