#!/usr/bin/python3 -IS
# Written by the Ansible role slurm_prolog; changes made here are lost.
"""Part: which CPUs and which NIC are near each GPU, once a boot, in /run/shakedown/affinity.json:

    {"0": {"cpus": "0-55,112-167", "numa": 0, "nic": "mlx5_0", "link": "PIX"}, …}   null where nvidia-smi names none

GPUs with the same nearest NICs get one each in turn. Environment: NVIDIA_SMI (its path), RUN_TEST.
"""

import json
import os
import re
import subprocess
import sys

PUBLISHED = "/run/shakedown/affinity.json"
# From near to far. Source: the legend that `nvidia-smi topo -m` prints.
LINKS = ("PIX", "PXB", "PHB", "NODE", "SYS")


def affinity(text):
    """What `nvidia-smi topo -m` printed, as in the head of this file. Raises ValueError if it is not that, or cut."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    if not lines or "CPU Affinity" not in lines[0]:
        raise ValueError("no table of nvidia-smi topo -m")
    devices = lines[0].split("CPU Affinity")[0].split()
    gpus = [name for name in devices if re.fullmatch(r"GPU\d+", name)]
    names = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)\s*$", text, re.M))
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    result, taken = {}, {}
    for gpu in gpus:
        row = rows.get(gpu, [])
        if len(row) < len(devices):
            raise ValueError(f"the row of {gpu} is missing or cut")
        nics_at = [n for n, device in enumerate(devices) if device not in gpus and row[n] in LINKS]
        links = {devices[n]: row[n] for n in nics_at}
        near = min(links.values(), key=LINKS.index, default=None)
        nics = tuple(device for device, link in links.items() if link == near)
        turn = taken.get(nics, 0)
        taken[nics] = turn + 1
        nic = nics[turn % len(nics)] if nics else None
        cpus, numa = [*row[len(devices) :], "", ""][:2]
        result[gpu[3:]] = {
            "cpus": cpus if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", cpus) else None,
            "numa": int(numa) if numa.isdigit() else None,
            "nic": names.get(nic, nic),
            "link": near,
        }
    return result


def main():
    test = os.environ["RUN_TEST"] == "1"
    if os.path.exists(PUBLISHED) and not test:
        return 0
    try:
        done = subprocess.run([os.environ["NVIDIA_SMI"], "topo", "-m"], capture_output=True, check=True)
        found = affinity(done.stdout.decode("utf-8", "replace"))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"topology of the GPUs: {error}")
        return 2
    if not test:
        os.makedirs(os.path.dirname(PUBLISHED), exist_ok=True)
        partial = f"{PUBLISHED}.{os.getpid()}"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1, sort_keys=True)
        os.chmod(partial, 0o644)
        os.replace(partial, PUBLISHED)
    print(f"{len(found)} GPU{'' if len(found) == 1 else 's'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
