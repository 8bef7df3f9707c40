"""What mpirun and srun say where they could not start ranks: told as what it is, on the node that it names."""

from __future__ import annotations

import pytest

from runner.failures import KINDS
from runner.launch import blame
from runner.launch.talk import AgentSession
from runner.launch.unstarted import unstarted
from runner.node import lastwords
from runner.node.protocol import Outcome
from runner.results.celldir import LAUNCHER

RULE = "-" * 74
# Open MPI's paragraph on a daemon that did not come up, whatever the cause.
DAEMONS = f"""{RULE}
ORTE was unable to reliably start one or more daemons.
This usually is caused by:

* not finding the required libraries and/or binaries on
  one or more nodes. Please check your PATH and LD_LIBRARY_PATH
  settings, or configure OMPI with --enable-orterun-prefix-by-default

* lack of authority to execute on one or more specified nodes.
  Please verify your allocation and authorities.

* the inability to write startup files into /tmp (--tmpdir/orte_tmpdir_base).
  Please check with your sys admin to determine the correct location to use.

* an inability to create a connection back to mpirun due to a
  lack of common network interfaces and/or no route found between
  them. Please check network connectivity (including firewalls
  and network routing requirements).
{RULE}
{RULE}
ORTE does not know how to route a message to the specified daemon
located on the indicated node:

  my node:   controller
  target node:  node002

This is usually an internal programming error that should be
reported to the developers. In the meantime, a workaround may
be to set the MCA param routed=direct on the command line or
in your environment. We apologize for the problem.
{RULE}"""
SLOTS = f"""{RULE}
There are not enough slots available in the system to satisfy the 16
slots that were requested by the application:

  /usr/bin/python3

Either request fewer slots for your application, or make more slots
available for use.
{RULE}"""
VERSIONS = f"""{RULE}
Open MPI detected a mismatch in versions between two processes.  This
typically means that you executed "mpirun" (or "mpiexec") from one
version of Open MPI on on node, but your default path on one of the
other nodes upon which you launched found a different version of Open
MPI.

  Local host:             controller
  Local process name:     [[4366,0],0]
  Local Open MPI version: 4.1.4
  Peer host:              node002
  Peer process name:      [[4366,0],2]
  Peer Open MPI version:  4.0.3
{RULE}"""
PROGRAM = f"""{RULE}
mpirun was unable to launch the specified application as it could not access
or execute an executable:

Executable: /opt/shakedown/bin/python
Node: node002

while attempting to start process rank 0.
{RULE}
2 total processes failed to start"""
LOST = f"""{RULE}
ORTE has lost communication with a remote daemon.

  HNP daemon   : [[17756,0],0] on node controller
  Remote daemon: [[17756,0],2] on node node002

This is usually due to either a failure of the TCP network
connection to the node, or possibly an internal failure of
the daemon itself. We cannot recover from this failure, and
therefore will terminate the job.
{RULE}"""
PMIX = """srun: error:  mpi/pmix_v5: init: (null) [0]: mpi_pmix.c:193: pmi/pmix: can not load PMIx library
srun: error: Couldn't load specified plugin name for mpi/pmix_v5: Plugin init() callback failed
srun: error: MPI: Cannot create context for mpi/pmix_v5
srun: error: MPI: Unable to load any plugin
srun: error: Invalid MPI type 'pmix_v5', --mpi=list for acceptable types"""
OLD_PMIX = """srun: error: Couldn't find the specified plugin name for mpi/pmix looking at all files
srun: error: cannot find mpi plugin for mpi/pmix
srun: error: cannot create mpi context for mpi/pmix
srun: error: "--mpi=pmix" -- long invalid MPI type, --mpi=list for acceptable types."""
NODES_PMIX = "slurmstepd: error:  mpi/pmix_v4: pmixp_stepd_init: node002 [1]: mpi_pmix.c:172: Cannot create context for mpi/pmix_v4"

# What is said, the kind of failure that it is, the node that it names, and words that its message has.
SAID = [
    ("env: ‘orted’: No such file or directory\n" + DAEMONS, "environment_missing", "node002", "orted"),
    ("bash: line 1: orted: command not found\n" + DAEMONS, "environment_missing", "node002", "orted: command not found"),
    ("orted: error while loading shared libraries: libopen-rte.so.40: cannot open shared object file\n" + DAEMONS,
     "environment_missing", "node002", "libopen-rte.so.40"),
    ("ssh: connect to host 10.0.0.2 port 44222: Connection refused\n" + DAEMONS, "unreachable", "node002", "Connection refused"),
    ("ssh: Could not resolve hostname node002: Name or service not known\n" + DAEMONS, "unreachable", "node002", "resolve"),
    ("Host key verification failed.\n" + DAEMONS, "host_key_changed", "node002", "Host key"),
    ("root@node002: Permission denied (publickey).\n" + DAEMONS, "refused_key", "node002", "Permission denied"),
    ("prted: command not found\n" + DAEMONS.replace("ORTE", "PRTE"), "environment_missing", "node002", "prted"),
    (DAEMONS, "launcher_failed", "node002", "connect to the controller"),
    (SLOTS, "launcher_failed", None, "slots"),
    (VERSIONS, "version_mismatch", "node002", "4.0.3"),
    (VERSIONS.replace("Open MPI", "PRTE"), "version_mismatch", "node002", "4.1.4"),
    ('orted: Error: unknown option "--tree-spawn"\n' + DAEMONS, "version_mismatch", "node002", "older"),
    (PROGRAM, "environment_missing", "node002", "/opt/shakedown/bin/python"),
    (LOST, "lost_connection", "node002", "daemon"),
    (PMIX, "environment_missing", None, "mpi/pmix_v5"),
    (OLD_PMIX, "environment_missing", None, "mpi/pmix"),
    (NODES_PMIX, "environment_missing", "node002", "mpi/pmix_v4"),
]  # fmt: skip


@pytest.mark.parametrize("text, kind, node, words", SAID)
def test_it_is_told_as_what_it_is(text, kind, node, words):
    found = unstarted(text.splitlines())
    assert found is not None and kind in KINDS
    assert (found.kind, found.host) == (kind, node) and words in found.message and "\n" not in found.message


@pytest.mark.parametrize("text, kind, node, words", SAID)
def test_what_is_kept_for_transfer_tells_the_same(text, kind, node, words):
    """An agent sends only the few lines that tell how its process ended."""
    assert unstarted(lastwords.keep(text.splitlines())) == unstarted(text.splitlines())


@pytest.mark.parametrize("text, kind, node, words", SAID)
def test_the_controllers_mpirun_blames_the_node_that_it_names(text, kind, node, words):
    sessions = [AgentSession(name, (), {}, rc=0, answered=True) for name in ("gpu-0001", "gpu-0002", LAUNCHER)]
    watching = Outcome(stopped="done")
    outcomes = {
        "gpu-0001": watching,
        "gpu-0002": watching,
        LAUNCHER: Outcome(rc=1, engine_stderr=lastwords.keep(text.splitlines())),
    }
    said = blame.blame(sessions, outcomes, {"node001": "gpu-0001", "node002": "gpu-0002"})
    assert (said["kind"], said["host"]) == (kind, "gpu-0002" if node else None)
    assert words in said["message"] and said["stderr"]


def test_a_name_that_is_no_hosts_is_said_in_the_message():
    outcomes = {LAUNCHER: Outcome(rc=1, engine_stderr=VERSIONS.replace("node002", "elsewhere").splitlines())}
    said = blame.blame([AgentSession(LAUNCHER, (), {}, rc=0, answered=True)], outcomes)
    assert said["host"] is None and "elsewhere" in said["message"]


def test_a_nodes_own_launcher_is_blamed_there():
    """On one node, and under Slurm, the launcher runs on the first node itself."""
    for text, kind in ((SLOTS, "launcher_failed"), (PMIX, "environment_missing")):
        outcome = Outcome(rc=1, engine_stderr=text.splitlines())
        said = blame.blame([AgentSession("a", (), {}, rc=0, answered=True)], {"a": outcome})
        assert (said["kind"], said["host"]) == (kind, "a") and "started no rank" in said["message"]


@pytest.mark.parametrize("text", [
    "mpirun detected that one or more processes exited with non-zero status, thus causing\nthe job to be terminated.",
    "srun: error: node002: task 1: Exited with exit code 1",
    "RuntimeError: NCCL error: unhandled system error",
    "",
])  # fmt: skip
def test_other_words_are_none_of_it(text):
    assert unstarted(text.splitlines()) is None
