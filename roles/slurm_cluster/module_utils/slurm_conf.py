"""The text of slurm.conf, gres.conf and cgroup.conf, and how a change of them is applied.

`want` are the settings, as described in library/slurm_cluster.py.
"""

from __future__ import annotations

import re

from ansible.module_utils.phase import Stop

MARK = "# Written by the Ansible role slurm_cluster; changes made here are lost.\n"

# The parameters that a running daemon reloads on SIGHUP; all others need a restart.
# Source: slurm.conf(5) of 22.05, "Reconfiguration" and the notes of each parameter.
RECONFIGURABLE = {"Prolog", "Epilog", "PrologEpilogTimeout", "ReturnToService", "PartitionName"}


def hardware(text):
    """The output of `slurmd -C` as {"CPUs": 2, …, "RealMemory": MiB}. Raises ValueError for other text."""
    line = next((line for line in text.splitlines() if line.startswith("NodeName=")), "")
    words = dict(word.split("=", 1) for word in line.split() if "=" in word)
    names = ("CPUs", "Boards", "SocketsPerBoard", "CoresPerSocket", "ThreadsPerCore", "RealMemory")
    found = {name: int(words[name]) for name in names if words.get(name, "").isdigit()}
    if not found.get("CPUs") or not found.get("RealMemory"):
        raise ValueError(f"no CPUs and RealMemory in {text[:80]!r}")
    return found


def node_line(node, gpus):
    """The NodeName line of an observed entry of `want["nodes"]`; `gpus` is the number of GPUs, 0 for none."""
    seen = node["observed"]
    found = dict(seen["hardware"])
    # Rounded down: a kernel or firmware update that reserves some MiB more would make Slurm drain the node.
    found["RealMemory"] -= found["RealMemory"] % 1024
    words = [f"NodeName={node['name']}", f"NodeAddr={node['address']}"]
    if seen["hostname"] != node["name"]:
        words.append(f"NodeHostname={seen['hostname']}")
    words += [f"{name}={value}" for name, value in found.items()]
    if gpus:
        words.append(f"Gres=gpu:{gpus}")
    return " ".join(words)


def node_lines(text):
    """{node: its NodeName line} of the text of a slurm.conf."""
    return {match.group(1): match.group(0) for match in re.finditer(r"^NodeName=(\S+).*$", text or "", re.M)}


def slurm_conf(want, old):
    """The text of slurm.conf. A node that is not part of this run keeps its line of the text `old`.

    Raises Stop with the names of the nodes that are neither in the run nor in `old`.
    """
    kept, lines, unknown, controller = node_lines(old), [], [], ""
    for node in want["nodes"]:
        line = node_line(node, want["gpus"]) if node["observed"] else kept.get(node["name"], "")
        lines.append(line)
        if not line:
            unknown.append(node["name"])
        elif node["name"] == want["controller"]:
            found = re.search(r"NodeHostname=(\S+)", line)
            controller = f"{found.group(1) if found else node['name']}({node['address']})"
    if unknown:
        raise Stop(
            "hardware of the cluster's nodes",
            "known for all",
            f"unknown for {', '.join(unknown)}",
            "run `runner setup --tags slurm_cluster` for all nodes once, without --hosts",
        )
    by_cgroup = want["proctrack"] == "cgroup"
    head = [
        f"ClusterName={want['cluster_name']}",
        f"SlurmctldHost={controller}",
        "SlurmUser=slurm",
        "AuthType=auth/munge",
        "SlurmctldPidFile=/run/slurmctld.pid",
        "SlurmdPidFile=/run/slurmd.pid",
        f"StateSaveLocation={want['state_dir']}",
        "SlurmdSpoolDir=/var/lib/slurm/slurmd",
        f"ProctrackType=proctrack/{want['proctrack']}",
        f"TaskPlugin={'task/cgroup,task/affinity' if by_cgroup else 'task/none'}",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        f"ReturnToService={want['return_to_service']}",
    ]
    if want["gpus"]:
        head.append("GresTypes=gpu")
    for key in ("prolog", "epilog"):
        if want[key]:
            head.append(f"{key.title()}={want[key]}")
    if want["prolog"]:
        # At allocation on every node, not with the first step: a bad node is seen before the job starts.
        head.append("PrologFlags=Alloc")
    if want["prolog"] or want["epilog"]:
        head.append(f"PrologEpilogTimeout={want['prolog_timeout_s']}")
    partition = f"PartitionName={want['partition']} Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    return MARK + "\n".join([*head, *lines, partition]) + "\n"


def gres_conf(want):
    """The text of gres.conf: the device files of the GPUs."""
    if not want["gpus"]:
        return MARK
    last = want["gpus"] - 1
    return f"{MARK}Name=gpu File={want['gpu_device']}{f'[0-{last}]' if last else '0'}\n"


def cgroup_conf(want):
    """The text of cgroup.conf: with proctrack cgroup, a job is confined to its cores and GPUs."""
    return MARK + ("ConstrainCores=yes\nConstrainDevices=yes\n" if want["proctrack"] == "cgroup" else "")


def how_to_apply(before, after):
    """How a daemon that runs with the files `before` gets the files `after`: "" (nothing to do), "reload" or "restart".

    Both are {file name: content}. A changed list of nodes needs a restart in 22.05; jobs survive it.
    """
    if before == after:
        return ""
    if any(before.get(name) != after[name] for name in after if name != "slurm.conf"):
        return "restart"
    changed = set((before.get("slurm.conf") or "").splitlines()) ^ set(after["slurm.conf"].splitlines())
    return "reload" if {line.partition("=")[0] for line in changed} <= RECONFIGURABLE else "restart"
