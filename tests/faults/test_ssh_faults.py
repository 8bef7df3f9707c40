"""Planted faults over SSH: the exit code, the node that is named, the kind, and what is left behind.

A fault needs two nodes of six, so three are planted at the same time: most of their time is waiting.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

import runner
from faults.conftest import (
    ENDLESS,
    SHORT,
    SOME_SECONDS,
    assert_kept,
    assert_no_orphan,
    assert_nothing_half_written,
    error_of,
    torch,
)
from runner.errors import EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_TARGET_MISSED
from runner.plan.engines.ranks import PORTS
from runner.results.rundir import RunDir
from runner.results.status import each_error
from runner.system import process
from testbed.benches import (
    RUNNER,
    Bench,
    answers,
    inside,
    kill,
    mount,
    other_content,
    pause,
    podman,
    signal_rank,
    small_disk,
    unmount,
    until,
)
from testbed.conftest import Testbed

pytestmark = pytest.mark.testbed

SCRATCH = "/var/tmp/shakedown"
ENVIRONMENT = RUNNER.parent.parent
FEW_STEPS = ("--test", "sft", "--set", "sft.steps=2", "--set", "sft.warmup_steps=1")
LIMIT_S = 100  # ranks need most of it to start, where six of them share two cores with others


@dataclass(frozen=True)
class Fault:
    """`prepare` (before the run), `plant` (while its ranks measure) and `undo` get the container of the broken node.

    `victim` is that node's place of the two; it is the one to be named.
    """

    name: str
    kind: str
    says: str
    plant: Callable[[str], object] | None = None
    prepare: Callable[[str], object] = lambda container: None
    undo: Callable[[str], object] = lambda container: None
    state: str = "failed"
    arguments: tuple[str, ...] = ENDLESS
    victim: int = 1
    gathered: bool = True  # the broken node can still give what it has


HOLD_PORTS = f"""
import socket, time
held = [socket.socket() for _ in range({PORTS.start}, {PORTS.stop})]
for number, one in enumerate(held, start={PORTS.start}):
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); one.bind(("", number)); one.listen()
open("/tmp/held", "w").close()
time.sleep(600)
"""


def hold_ports(container: str) -> None:
    podman("exec", "-d", container, "python3", "-c", HOLD_PORTS)
    assert until(lambda: "held" in inside(container, "ls /tmp"), 60)


def slow_to_receive(container: str) -> None:
    """Whatever is copied to this node takes 20 s longer, in which it can be broken."""
    script = '#!/bin/sh\\ntouch /tmp/receiving\\nsleep 20\\nexec /tmp/rsync-itself "$@"\\n'
    inside(container, f"cp /usr/bin/rsync /tmp/rsync-itself; printf {shlex.quote(script)} > /tmp/rsync")
    inside(container, "chmod 755 /tmp/rsync; rm -f /tmp/receiving")
    mount(container, "--bind", "/tmp/rsync", "/usr/bin/rsync")


FAULTS = [
    Fault(
        "a rank hangs in a collective",
        kind="rank_hung",
        says=r"limit of 100 s: rank1 is stopped, while 1 waits for others .*distributed_c10d.py:\d+ all_reduce",
        state="incomplete",
        plant=lambda node: signal_rank(node, "STOP"),
        arguments=torch(iters=100_000_000, timeout_s=LIMIT_S),
    ),
    Fault(
        "a node is paused",
        kind="hung",
        says=r"has not answered for 30 s",
        state="incomplete",
        plant=pause,
        undo=lambda node: podman("unpause", node),
        gathered=False,
    ),
    Fault(
        "the network to a node is cut",
        kind="hung",
        says=r"has not answered for 30 s",
        state="incomplete",
        plant=lambda node: inside(node, "ip link set eth0 down"),
        undo=lambda node: inside(node, "ip link set eth0 up"),
        gathered=False,
    ),
    Fault(
        "a rank is killed",
        kind="rank_killed",
        says=r"^rank0 was killed by SIGKILL",
        plant=lambda node: signal_rank(node, "KILL"),
        victim=0,
    ),
    Fault(
        "a node is killed",
        kind="lost_connection",
        says=r"lost the connection to it",
        plant=kill,
        undo=lambda node: podman("start", node),
        gathered=False,
    ),
    Fault(
        "the kernel kills a rank for memory",
        kind="out_of_memory",
        says=r"was killed by the kernel, which was out of memory",
        prepare=lambda node: podman("update", "--memory", "700m", node),
        undo=lambda node: podman("update", "--memory", "64g", node),
        arguments=torch(size="512M"),
    ),
    Fault(
        "a node's disk fills up",
        kind="disk_full",
        says=r"disk full: /var/tmp/shakedown",
        prepare=lambda node: small_disk(node, SCRATCH, "16m"),
        plant=lambda node: inside(node, f"dd if=/dev/zero of={SCRATCH}/filler bs=4k 2>/dev/null; true"),
        undo=lambda node: unmount(node, SCRATCH),
        gathered=False,  # not even how it ended can be written there
    ),
    Fault(
        "a node's sshd is stopped",
        kind="unreachable",
        says=r"artefacts were not gathered: nothing listens on its SSH port",
        state="incomplete",
        plant=lambda node: inside(node, "systemctl stop ssh"),
        undo=lambda node: inside(node, "systemctl start ssh"),
        arguments=SOME_SECONDS,
        gathered=False,
    ),
    Fault(
        "the rendezvous port is taken",
        kind="port_taken",
        says=r"port 2\d{4} for the rendezvous is taken by another process",
        prepare=hold_ports,
        undo=lambda node: inside(node, "pkill -f socket[.]socket; true"),
        victim=0,  # the first node has the rendezvous
        gathered=False,  # it starts no rank
    ),
]


@dataclass(frozen=True)
class Ended:
    bench: Bench
    hosts: list[str]
    code: int
    output: str


def run_into(fault: Fault, inventory: Path, pair: Sequence[dict], folder: Path) -> Ended:
    """Plant a fault on one of two nodes while they run a cell; all is mended again at the end."""
    container = pair[fault.victim]["container"]
    with ExitStack() as undo:
        undo.callback(mend, fault, container)
        fault.prepare(container)
        bench = Bench(inventory, folder, "--hosts", ",".join(node["alias"] for node in pair), *fault.arguments)
        undo.callback(bench.leave)
        if fault.plant is not None:
            bench.wait_for_ranks()
            fault.plant(container)
        return Ended(bench, [node["name"] for node in pair], *bench.end())


def mend(fault: Fault, container: str) -> None:
    """Until the node answers again and the agent that was cut off with it has noticed and left."""
    fault.undo(container)
    # One that was killed boots beside the runs of two others.
    assert until(lambda: answers(container), 120), f"{container} does not answer any more"
    free = f"test ! -e {SCRATCH}/lock || flock --nonblock {SCRATCH}/lock true; echo $?"
    assert until(lambda: inside(container, free).strip() == "0", 60), f"{container} is in use still"


@pytest.fixture(scope="module")
def ended(
    bed: Testbed, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Fault], Ended]:
    """How the run ended in which a fault was planted. All that are asked for are run, three at a time."""
    asked = [i.callspec.params.get("fault") for i in request.session.items if hasattr(i, "callspec")]
    faults = [fault for fault in FAULTS if fault in asked]
    free = [bed.nodes[index : index + 2] for index in range(0, len(bed.nodes), 2)]

    def run(fault: Fault) -> Ended:
        pair = free.pop()
        try:
            return run_into(fault, bed.inventory, pair, tmp_path_factory.mktemp("fault"))
        finally:
            free.append(pair)

    with ThreadPoolExecutor(len(free)) as pool:
        runs = {fault.name: pool.submit(run, fault) for fault in faults}
    return lambda fault: runs[fault.name].result()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_is_named_and_leaves_nothing_behind(ended, fault):
    run = ended(fault)
    bench, hosts, code, output = run.bench, run.hosts, run.code, run.output
    assert code == EXIT_INFRASTRUCTURE, output
    cell = bench.run.read_status()["cells"]["torch-2n-r1"]
    assert (cell["state"], cell["error"]["kind"], cell["error"]["host"]) == (
        fault.state,
        fault.kind,
        hosts[fault.victim],
    ), output
    assert re.search(fault.says, error_of(bench.run)["message"])
    assert_nothing_half_written(bench.run)
    healthy = [host for host in hosts if fault.gathered or host != hosts[fault.victim]]
    assert_kept(bench.run, healthy, ranks=fault.kind != "port_taken")  # then no rank finds another
    # A node that was cut off or paused finds its controller gone when it is back.
    assert_no_orphan(bench.marker, 60)


@dataclass(frozen=True)
class Receiving:
    """A fault of a node while data is sent to it; `places` are the nodes of the bed that its run may use."""

    kind: str
    plant: Callable[[str], object]
    undo: Callable[[str], object]
    places: slice


RECEIVING = [
    Receiving("hung", pause, lambda node: podman("unpause", node), slice(0, 3)),
    Receiving(
        "lost_connection", lambda node: inside(node, "pkill -KILL -f '[s]shd: '; true"), lambda node: None, slice(3, 6)
    ),
]


def receive(bed: Testbed, fault: Receiving, folder: Path) -> tuple[Bench, int, str]:
    """Plant a fault on the second of three nodes while data is sent to it, in a run of two that may replace it."""
    nodes = bed.nodes[fault.places]
    container = nodes[1]["container"]
    with ExitStack() as undo:
        slow_to_receive(container)
        undo.callback(unmount, container, "/usr/bin/rsync")
        undo.callback(fault.undo, container)
        hosts = ("--hosts", ",".join(node["alias"] for node in nodes), "--nodes", "2")
        bench = Bench(bed.inventory, folder, *hosts, "--retries", "1", "--replace-bad-nodes", *FEW_STEPS)
        undo.callback(bench.leave)
        assert until(lambda: "receiving" in inside(container, "ls /tmp") or bench.process.poll() is not None, 100)
        fault.plant(container)
        return bench, *bench.end()


def test_nodes_that_fail_while_data_is_sent_to_them_are_replaced(bed, tmp_path):
    """Ranks that train load for half a minute: two runs at the same time."""
    with ThreadPoolExecutor(len(RECEIVING)) as pool:
        runs = [pool.submit(receive, bed, fault, tmp_path / fault.kind) for fault in RECEIVING]
    for fault, run in zip(RECEIVING, runs, strict=True):
        bench, code, output = run.result()
        first, bad, spare = (node["name"] for node in bed.nodes[fault.places])
        assert code == EXIT_TARGET_MISSED, output
        status = bench.run.read_status()
        cell = status["cells"]["sft-tiny-2n-r1"]
        (before,) = cell["attempts"]
        assert (before["error"]["kind"], before["error"]["host"]) == (fault.kind, bad), output
        assert before["error"]["message"].startswith("the data cannot be sent to it: ")
        assert [(one["host"], one["by"]) for one in status["replaced"]] == [(bad, spare)]
        assert (cell["state"], set(cell["hosts"])) == ("complete", {first, spare})
        (found,) = json.loads(bench.run.summary.read_text())["findings"]
        assert found["host"] == bad and "✕ 1 node failed and was given up" in output.splitlines()
        assert_no_orphan(bench.marker, 60)


def test_without_spares_the_run_says_which_node_does_not_get_its_data_and_how_to_finish_it(bed, tmp_path):
    """A disk that is too small for the data: so this test need not wait for a silence."""
    bad = bed.nodes[1]
    small_disk(bad["container"], SCRATCH, "2m")
    try:
        arguments = ("--hosts", "node001,node002", *FEW_STEPS)
        code, output = Bench(bed.inventory, tmp_path, *arguments).end()
    finally:
        unmount(bad["container"], SCRATCH)
    run = RunDir.find(tmp_path, None)
    assert code == EXIT_INFRASTRUCTURE, output
    error = error_of(run)
    assert (error["kind"], error["host"]) == ("disk_full", bad["name"])
    assert run.report_html.exists()
    assert output.splitlines()[-1].startswith(f"to finish it: runner bench --resume {run.run_id}")


def test_two_nodes_that_fail_in_the_same_second_are_both_named_and_told_at_once(bed, tmp_path):
    killed, paused = bed.nodes[:2]
    bench = Bench(bed.inventory, tmp_path, "--nodes", "2", "--retries", "1", "--replace-bad-nodes", *SOME_SECONDS)
    with ExitStack() as undo:
        undo.callback(bench.leave)
        bench.wait_for_ranks()
        pause(paused["container"])
        undo.callback(podman, "unpause", paused["container"])
        signal_rank(killed["container"], "KILL")
        code, output = bench.end()
    assert code == EXIT_TARGET_MISSED, output
    (cell,) = bench.run.read_status()["cells"].values()
    (before,) = cell["attempts"]
    errors = {(one["host"], one["kind"]) for one in each_error(before["error"])}
    assert errors == {(killed["name"], "rank_killed"), (paused["name"], "hung")}, output
    assert cell["state"] == "complete"
    assert [one["host"] for one in bench.run.read_status()["replaced"]] == [paused["name"]]
    # The rank was told of long before the silent node had been given up.
    log = bench.run.log.read_text(errors="replace").splitlines()
    told, over = (
        next(datetime.fromisoformat(line.split()[0]) for line in log if words in line)
        for words in ("killed by SIGKILL on", "incomplete after" if before["state"] == "incomplete" else "failed after")
    )
    assert (over - told).total_seconds() > 10, output
    assert_no_orphan(bench.marker, 60)


def test_a_controller_that_is_killed_leaves_an_incomplete_run_and_no_process(bed, tmp_path):
    bench = Bench(bed.inventory, tmp_path, "--nodes", "2", *ENDLESS)
    bench.wait_for_ranks()
    assert len(process.marked(bench.marker)) >= 4
    bench.process.send_signal(signal.SIGKILL)
    bench.end()
    assert_no_orphan(bench.marker)
    assert_nothing_half_written(bench.run, killed=True)
    listed = subprocess.run([RUNNER, "runs", "list", "--json", "--results", tmp_path], capture_output=True, text=True)
    assert [row["state"] for row in json.loads(listed.stdout)] == ["incomplete"]
    code, output = Bench(bed.inventory, tmp_path / "again", "--nodes", "2", *SHORT).end()
    assert code == EXIT_OK, output  # no lock is left behind


def test_a_package_of_another_version_on_one_node_is_a_finding_that_names_it(bed, tmp_path):
    """A stand-in for another torch: its metadata says so, its code is the others'."""
    (metadata,) = ENVIRONMENT.glob("lib/python3*/site-packages/torch-*.dist-info/METADATA")
    odd = bed.container("node002")
    version = re.compile(r"^Version: .*", re.MULTILINE)
    other_content(odd, metadata, version.sub("Version: 2.0.0", metadata.read_text()))
    try:
        code, output = Bench(bed.inventory, tmp_path, "--nodes", "3", *SHORT).end()
    finally:
        unmount(odd, metadata)
    assert code == EXIT_TARGET_MISSED, output
    (found,) = json.loads((tmp_path / "latest" / "summary.json").read_text())["findings"]
    assert (found["kind"], found["host"], found["fault"]) == ("environment", bed.nodes[1]["name"], "configuration")
    assert "packages.torch is 2.0.0 here" in found["evidence"]


def test_whatever_would_stop_a_cell_is_named_for_every_node_at_once(bed, tmp_path):
    hosts = bed.inventory / "hosts.yml"
    kept = hosts.read_text()
    listed = subprocess.run([RUNNER, "inventory", "-i", bed.inventory, "--json"], capture_output=True)
    key = [node["host_key"] for node in json.loads(listed.stdout)]
    stopped, _, bare, other, full, late = (node["container"] for node in bed.nodes)
    version = Path(runner.__file__)
    hook = next(ENVIRONMENT.glob("lib/python3*/site-packages/distutils-precedence.pth"))
    with ExitStack() as undo:
        inside(stopped, "systemctl stop ssh")
        undo.callback(inside, stopped, "systemctl start ssh")
        # Another node's key: what a swapped machine, or a man in the middle, looks like.
        hosts.write_text(kept.replace(key[1], key[0]))
        undo.callback(hosts.write_text, kept)
        mount(bare, "-t", "tmpfs", "tmpfs", str(ENVIRONMENT))
        undo.callback(unmount, bare, ENVIRONMENT)
        other_content(other, version, '__version__ = "0.0.1"\n')
        undo.callback(unmount, other, version)
        small_disk(full, SCRATCH, "64k")
        undo.callback(unmount, full, SCRATCH)
        # A stand-in: containers share one clock, so Python's is set forward there.
        other_content(
            late,
            hook,
            "import time; time.time = lambda read=time.clock_gettime, clock=time.CLOCK_REALTIME: read(clock) + 3610\n",
        )
        undo.callback(unmount, late, hook)
        code, output = Bench(bed.inventory, tmp_path, "--nodes", "6", "--json", *SHORT).end()
    assert code == EXIT_INFRASTRUCTURE and "6 of 6 nodes are bad" in output, output
    names = [node["name"] for node in bed.nodes]
    told = {
        bad["alias"]: (bad["host"], bad["kind"]) for bad in json.loads(output[output.index("{") :])["error"]["nodes"]
    }
    for alias, name, kind, words in (
        ("node001", names[0], "unreachable", "nothing listens"),
        ("node002", names[1], "host_key_changed", "its host key differs from the pinned one"),
        ("node003", names[2], "environment_missing", "provision it with"),
        ("node004", names[3], "version_mismatch", "has shakedown 0.0.1, this controller is"),
        ("node005", names[4], "disk_full", "free in"),
        ("node006", names[5], "clock", "its clock is 3,6"),
    ):
        assert told[alias] == (name, kind)
        (line,) = [line for line in output.splitlines() if line.startswith(f"  {alias} ({name}): ")]
        assert words in line
    assert not list(tmp_path.iterdir())
