"""The time of provisioning with Shakedown's roles and settings, and with stock Ansible, in pairs.

    .venv/bin/python benchmarks/provisioning.py --pairs 3 --nodes 8 --sizes 1,2,4

Both sides bring fresh nodes of `runner testbed` to the same end state: SSH between all nodes with pinned host keys,
and a Slurm cluster. `ours` is provisioning/ours.yml with the repository's ansible.cfg; `stock` is
provisioning/stock/site.yml, ordinary tasks with Ansible's own settings. Each side converges twice; a manifest of the
nodes (files with owner, mode and content, services, packages) must be the same on both, and the second run must change
nothing. The order alternates. `--sizes` measures `ours` alone with fewer nodes.

Both wall-clock time and the processor time of the controller and all nodes are reported: other work on the machine
increases the first and hardly affects the second. Nodes that share cores cannot be faster than the second allows.

`--tags ssh_mesh` measures one role alone. Needs root and podman, as the testbed does.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent / "provisioning"
BIN = Path(sys.executable).parent
SIDES = {
    "ours": (ROOT / "ansible.cfg", HERE / "ours.yml"),
    "stock": (HERE / "stock" / "ansible.cfg", HERE / "stock" / "site.yml"),
}
LIMIT_S = 1800

# Runs on a node: prints {"files": {path: [kind, mode, owner, content]}, "services": …, "packages": …}.
LOOK = r"""
import base64, json, os, pwd, stat, subprocess
files = {}
for root in ("/etc", "/root", "/usr/local", "/var/lib/slurm", "/var/lib/munge"):
    for folder, folders, names in os.walk(root):
        for name in folders + names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = ""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20:
                content = base64.b64encode(open(path, "rb").read()).decode()
            owner = pwd.getpwuid(status.st_uid).pw_name if status.st_uid < 65534 else status.st_uid
            files[path] = [stat.S_IFMT(status.st_mode), oct(status.st_mode & 0o7777), owner, content]
        folders[:] = [name for name in folders if name != ".pyenv"]
def words(*argv):
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True).stdout
units = ("ssh", "munge", "slurmctld", "slurmd")
services = [words("systemctl", what, *units).split() for what in ("is-active", "is-enabled")]
packages = words("dpkg-query", "--show").splitlines()
print(json.dumps({"files": files, "services": services, "packages": packages}))
"""
# Files that are not compared, with the reason.
LEFT_OUT = re.compile(
    "|".join(
        (
            r"/root/\.(ansible|pyenv)(/.*)?",  # Ansible's temporary folder without pipelining; the controller's Python
            r"/etc/(hosts|hostname|resolv\.conf|machine-id|mtab|ld\.so\.cache|\.pwd\.lock)",  # of the container
            r"/etc/ssh/testbed(/.*)?",  # the testbed's keys
            r"/etc/ansible(/.*)?",  # the roles publish facts, which ordinary tasks do not
            r"/var/lib/slurm/slurm(ctld|d)/.*",  # state of the daemons
            r"/var/lib/munge/.*",
        )
    )
)
# Random by nature: owner and mode are compared, the content is not.
SECRETS = ("/etc/munge/munge.key", "/root/.ssh/id_ed25519")


def testbed(*arguments: str) -> None:
    """Run `runner testbed`. Raises CalledProcessError where it fails."""
    subprocess.run([BIN / "runner", "testbed", *arguments], cwd=ROOT, check=True, capture_output=True)


def manifest(inventory: Path) -> dict[str, dict]:
    """Alias -> end state of the node, in which addresses and keys are replaced by the alias of their node."""
    group = yaml.safe_load((inventory / "hosts.yml").read_text())["all"]["children"]["gpu_nodes"]
    known, key = inventory / ".ssh" / "known_hosts", inventory / ".ssh" / "id_ed25519"

    def look(address: str) -> dict:
        options = ["-F", "none", "-i", key, "-o", f"UserKnownHostsFile={known}", "-o", "BatchMode=yes"]
        argv = ["ssh", *options, "-p", str(group["vars"]["ansible_port"]), f"root@{address}", "/usr/bin/python3", "-"]
        return json.loads(subprocess.run(argv, input=LOOK, text=True, check=True, capture_output=True).stdout)

    hosts = group["hosts"]
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = dict(zip(hosts, pool.map(look, [host["ansible_host"] for host in hosts.values()]), strict=True))
    names = {}
    for name, host in hosts.items():
        alias = host["runner_alias"]
        names[host["ansible_host"]] = f"<address of {alias}>"
        names[host["runner_host_key"].split()[1]] = f"<host key of {alias}>"
        public = base64.b64decode(found[name]["files"]["/root/.ssh/id_ed25519.pub"][3]).decode()
        names[public.split()[1]] = f"<key of {alias}>"
    whose = re.compile("|".join(rf"{re.escape(text)}(?![0-9])" for text in names))
    return {hosts[name]["runner_alias"]: readable(state, whose, names) for name, state in found.items()}


def readable(state: dict, whose: re.Pattern[str], names: dict[str, str]) -> dict:
    """The output of LOOK on one node as {path: (kind, mode, owner, content), "services", "packages"}.

    Text that matches `whose` is replaced by `names`, and the content of SECRETS by its size.
    """
    files = {}
    for path, (kind, mode, owner, content) in state["files"].items():
        if LEFT_OUT.fullmatch(path):
            continue
        if path in SECRETS:
            content = f"<{len(base64.b64decode(content))} bytes>"
        elif kind == 0o100000:
            content = whose.sub(lambda match: names[match[0]], base64.b64decode(content).decode("latin-1"))
        files[path] = (kind, mode, owner, content)
    return {**files, "services": state["services"], "packages": state["packages"]}


def differences(ours: dict, stock: dict) -> list[str]:
    """A line for each path, service or package list that differs between two manifests; content is cut at 400."""
    lines = []
    for node in sorted({*ours, *stock}):
        mine, theirs = ours.get(node, {}), stock.get(node, {})
        for path in sorted({*mine, *theirs}):
            if mine.get(path) != theirs.get(path):
                lines.append(
                    f"{node} {path}: ours {str(mine.get(path))[:400]!r}, stock {str(theirs.get(path))[:400]!r}"
                )
    return lines


def processor_s(name: str) -> float:
    """Processor time in s used so far by the testbed's containers and by this process's ended children."""
    ids = subprocess.run(["podman", "ps", "-q", "--filter", f"name=^shakedown-{name}-"], capture_output=True, text=True)
    argv = ["podman", "stats", "--no-stream", "--format", "json", *ids.stdout.split()]
    stats = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    total = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    for entry in stats:
        # Go's notation: 1h2m3.4s
        for value, unit in re.findall(r"([\d.]+)(h|ms|m|s)", entry["cpu_time"]):
            total += float(value) * {"h": 3600, "m": 60, "s": 1, "ms": 1e-3}[unit]
    return total


def converge(side: str, name: str, inventory: Path, control: Path, tags: list[str]) -> tuple[float, float, int]:
    """(wall-clock s of one ansible-playbook, processor s of it and the nodes, number of changed tasks).

    Exits with Ansible's output where it fails.
    """
    config, playbook = SIDES[side]
    # Connections to a removed testbed must not be reused for the next one at the same address.
    env = {**os.environ, "ANSIBLE_CONFIG": str(config), "ANSIBLE_SSH_CONTROL_PATH_DIR": str(control)}
    env = {**env, "ANSIBLE_NOCOLOR": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    argv = [
        str(BIN / "ansible-playbook"),
        "-i",
        str(inventory),
        str(playbook),
        *(["--tags", ",".join(tags)] if tags else []),
    ]
    before, started = processor_s(name), time.monotonic()
    outcome = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    took = time.monotonic() - started
    if outcome.returncode != 0:
        raise SystemExit(f"{side} failed:\n{outcome.stdout[-6000:]}{outcome.stderr[-2000:]}")
    return took, processor_s(name) - before, sum(int(count) for count in re.findall(r" changed=(\d+) ", outcome.stdout))


def measure(side: str, nodes: int, tags: list[str]) -> dict:
    """Times (s), changed tasks, load and manifest of two runs of `side` on a fresh testbed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        inventory, control = Path(scratch, "inventory"), Path(scratch, "cp")
        name = f"bench-{os.getpid()}"
        testbed("up", "--nodes", str(nodes), "--name", name, "--inventory", str(inventory))
        try:
            load = os.getloadavg()[0]
            first, first_cpu, _ = converge(side, name, inventory, control, tags)
            second, second_cpu, changed = converge(side, name, inventory, control, tags)
            state = manifest(inventory)
        finally:
            testbed("down", "--name", name)
    row = {"nodes": nodes, "first_s": first, "second_s": second, "changed": changed, "load": load}
    row |= {"first_cpu_s": first_cpu, "second_cpu_s": second_cpu}
    text = f"{first:.1f} s ({first_cpu:.1f} of processor), {second:.1f} s ({second_cpu:.1f}) with {changed} changed"
    print(f"{side} {nodes} nodes: {text} (load {load:.1f})", flush=True)
    return {**row, "manifest": state}


def interval(ratios: list[float]) -> str:
    """The geometric mean of paired ratios with its 95 % confidence interval (Student's t of their logarithms)."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return f"{math.exp(middle):.2f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(len(logs), 2.2)
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(middle):.2f} (95 %: {math.exp(middle - half):.2f}–{math.exp(middle + half):.2f})"


def spread(values: list[float]) -> str:
    """`median (least–most)` of the values."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def report(pairs: list[dict[str, dict]], alone: dict[int, list[dict]], nodes: int) -> list[str]:
    """Markdown tables: both sides, their ratios, and the times for each number of nodes; as lines."""
    columns = ("first_s", "first_cpu_s", "second_s", "second_cpu_s")
    heads = "first s | processor s | second s | processor s |"
    ours, stock = [pair["ours"] for pair in pairs], [pair["stock"] for pair in pairs]
    lines = [f"| side | {heads} changed |", "| --- |" + " ---: |" * 5]
    for side, rows in (("ours", ours), ("stock", stock)):
        cells = " | ".join(spread([row[column] for row in rows]) for column in columns)
        lines.append(f"| {side} | {cells} | {max(row['changed'] for row in rows)} |")
    lines += ["", "| ratio | wall clock | processor |", "| --- | --- | --- |"]
    for what, over, under, above, below in (
        ("first, ours / stock", ours, stock, "first", "first"),
        ("second, ours / stock", ours, stock, "second", "second"),
        ("ours, second / first", ours, ours, "second", "first"),
    ):
        pairs_of = list(zip(over, under, strict=True))
        cells = [interval([a[f"{above}{end}"] / b[f"{below}{end}"] for a, b in pairs_of]) for end in ("_s", "_cpu_s")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    loads = [row["load"] for row in ours + stock]
    lines += ["", f"Load of the machine before each run: {min(loads):.1f}–{max(loads):.1f}."]
    if alone:
        lines += ["", f"| nodes | {heads}", "| ---: |" + " ---: |" * 4]
        for size, rows in sorted({**alone, nodes: ours}.items()):
            lines.append(f"| {size} | {' | '.join(spread([row[column] for row in rows]) for column in columns)} |")
    return lines


def main() -> int:
    """Measure all pairs and print the report; returns 1 where the end states of the sides differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--sizes", default="", help="further numbers of nodes for `ours` alone, e.g. 1,2,4")
    parser.add_argument("--tags", default="", help="ssh_mesh or slurm_cluster, to measure one role alone")
    arguments = parser.parse_args()
    tags = [tag for tag in arguments.tags.split(",") if tag]
    sizes = [int(size) for size in arguments.sizes.split(",") if size]
    pairs, alone, wrong = [], {size: [] for size in sizes}, []
    for number in range(arguments.pairs):
        order = list(SIDES) if number % 2 == 0 else list(SIDES)[::-1]
        pair = {side: measure(side, arguments.nodes, tags) for side in order}
        wrong += differences(pair["ours"]["manifest"], pair["stock"]["manifest"])
        pairs.append(pair)
        for size in sizes:
            alone[size].append(measure("ours", size, tags))
    print(
        f"\n{arguments.pairs} pairs, {arguments.nodes} nodes{', ' + arguments.tags if tags else ''}; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, ansible-core {version('ansible-core')}\n"
    )
    print("\n".join(report(pairs, alone, arguments.nodes)))
    print(f"\nend states: {'the same on all nodes of all pairs' if not wrong else 'DIFFERENT'}")
    print("\n".join(wrong[:20]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
