"""The text of slurm.conf, gres.conf, cgroup.conf and slurmdbd.conf, and how a change of them is applied.

`want` are the settings, as described in library/slurm_cluster.py.
"""

from __future__ import annotations

import re

from ansible.module_utils.phase import Stop

MARK = "# Written by the Ansible role slurm_cluster; changes made here are lost.\n"

DATABASE = "slurm_acct_db"

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


def gpu_type(models):
    """The GRES type of GPUs by the names that the driver has for them, "" for none and for several of different names.

    It is the first word with a digit, in lower case: "NVIDIA H100 80GB HBM3" is h100, "NVIDIA GeForce RTX 4090" 4090.
    With AutoDetect, Slurm takes such a part of the whole name as its type.
    """
    found = {
        next((word for word in re.split(r"[^a-z0-9]+", model.lower()) if re.search(r"\d", word)), "")
        for model in models
    }
    return found.pop() if len(found) == 1 else ""


def gres(want, seen):
    """The Gres of an observed node, such as "gpu:h200:8"; "" where it has no GPUs."""
    kind = want["gpu_type"] or seen.get("gpu_type", "")
    return ":".join(filter(None, ("gpu", kind, str(want["gpus"])))) if want["gpus"] else ""


def node_line(want, node):
    """The NodeName line of an observed entry of `want["nodes"]`."""
    seen = node["observed"]
    found = dict(seen["hardware"])
    # Rounded down: a kernel or firmware update that reserves some MiB more would make Slurm drain the node.
    found["RealMemory"] -= found["RealMemory"] % 1024
    # On a small node, an eighth is enough.
    found["MemSpecLimit"] = min(want["system_memory_mib"], found["RealMemory"] // 8)
    words = [f"NodeName={node['name']}", f"NodeAddr={node['address']}"]
    if seen["hostname"] != node["name"]:
        words.append(f"NodeHostname={seen['hostname']}")
    words += [f"{name}={value}" for name, value in found.items()]
    if want["gpus"]:
        words.append(f"Gres={gres(want, seen)}")
    return " ".join(words)


def least_share(lines, shares):
    """The memory for jobs in MiB of the node of `lines` that has the least of it, in equal shares; `shares` by CPUs."""
    found = []
    for line in lines:
        words = {name: int(value) for name, value in re.findall(r"\b(CPUs|RealMemory|MemSpecLimit)=(\d+)", line)}
        found.append((words["RealMemory"] - words.get("MemSpecLimit", 0)) // shares(words["CPUs"]))
    return min(found)


def node_lines(text):
    """{node: its NodeName line} of the text of a slurm.conf."""
    return {match.group(1): match.group(0) for match in re.finditer(r"^NodeName=(\S+).*$", text or "", re.M)}


def slurm_conf(want, old):
    """The text of slurm.conf. A node that is not part of this run keeps its line of the text `old`.

    Raises Stop with the names of the nodes that are neither in the run nor in `old`.
    """
    kept, lines, unknown, controller, address = node_lines(old), [], [], "", ""
    for node in want["nodes"]:
        line = node_line(want, node) if node["observed"] else kept.get(node["name"], "")
        lines.append(line)
        if not line:
            unknown.append(node["name"])
        elif node["name"] == want["controller"]:
            found = re.search(r"NodeHostname=(\S+)", line)
            address = node["address"]
            controller = f"{found.group(1) if found else node['name']}({address})"
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
        # Memory is given out as cores are. A job that names none gets its cores' share, or with GPUs theirs (by the
        # partition's DefMemPerGPU), and not the whole node's.
        "SelectTypeParameters=CR_Core_Memory",
        f"DefMemPerCPU={least_share(lines, lambda cpus: cpus)}",
        # At allocation on every node, not with the first step: a bad node is seen before the job starts, and what comes
        # from outside (pam_slurm_adopt) finds the job's container.
        "PrologFlags=Alloc,Contain",
        f"ReturnToService={want['return_to_service']}",
    ]
    if want["gpus"]:
        head.append("GresTypes=gpu")
    for key in ("prolog", "epilog"):
        if want[key]:
            head.append(f"{key.title()}={want[key]}")
    if want["accounting"]:
        head += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            f"AccountingStorageHost={address}",
            f"JobAcctGatherType=jobacct_gather/{'cgroup' if by_cgroup else 'linux'}",
            *(["AccountingStorageTRES=gres/gpu"] if want["gpus"] else []),
        ]
    if want["prolog"] or want["epilog"]:
        head.append(f"PrologEpilogTimeout={want['prolog_timeout_s']}")
    partition = f"PartitionName={want['partition']} Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    if want["gpus"]:
        partition += f" DefMemPerGPU={least_share(lines, lambda _: want['gpus'])}"
    return MARK + "\n".join([*head, *lines, partition]) + "\n"


def gres_conf(want, seen):
    """The text of gres.conf of the node that `seen` was observed on: the device files of its GPUs."""
    if not want["gpus"]:
        return MARK
    last = want["gpus"] - 1
    kind = gres(want, seen).split(":")[1:-1]
    line = f"Name=gpu{f' Type={kind[0]}' if kind else ''} File={want['gpu_device']}{f'[0-{last}]' if last else '0'}"
    # Adds to the files which cores and which other GPUs are near.
    return MARK + ("AutoDetect=nvml\n" if seen.get("nvml") else "") + line + "\n"


def cgroup_conf(want):
    """The text of cgroup.conf: with proctrack cgroup, a job is confined to its cores, memory and GPUs."""
    confined = "ConstrainCores=yes\nConstrainDevices=yes\nConstrainRAMSpace=yes\n"
    return MARK + (confined if want["proctrack"] == "cgroup" else "")


def slurmdbd_conf(hostname):
    """The text of slurmdbd.conf on the node `hostname`: MariaDB there, by its socket and without a password."""
    lines = [
        f"DbdHost={hostname}",
        "SlurmUser=slurm",
        "AuthType=auth/munge",
        "PidFile=/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        f"StorageLoc={DATABASE}",
        "StorageUser=slurm",
    ]
    return MARK + "\n".join(lines) + "\n"


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
