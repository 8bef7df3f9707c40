"""Builds of NCCL on a node's disk: finding complete ones, selecting the one in use, copying to other nodes.

A build is a folder that never changes once it has its name: lib, include, bin, and stamp.json with its inputs and the
digest of each file. The link `current` points to the build in use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tarfile

from ansible.module_utils.nccl_inputs import architectures
from ansible.module_utils.phase import Stop, read, write

GIB = 2**30
RECEIVE_GIB = 1  # an archive and its unpacked files; NCCL for one architecture takes about 0.3


def digest(path):
    """SHA-256 of a file in hexadecimal, or "-> target" for a link. Raises OSError."""
    if os.path.islink(path):
        return f"-> {os.readlink(path)}"
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def manifest(folder):
    """{path relative to `folder`: digest} of all files and links except the stamp."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            found[os.path.relpath(path, folder)] = digest(path)
    found.pop("stamp.json", None)
    return found


def stamp_of(folder):
    """The stamp of a complete build as a dictionary, None where it is missing or damaged."""
    try:
        stamp = json.loads(read(f"{folder}/stamp.json") or "")
        return stamp if isinstance(stamp["files"], dict) and isinstance(stamp["inputs"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def drift(folder, stamp):
    """[(path, expected digest, found digest)] of the files that differ from the stamp; "nothing" for a missing one."""
    found = manifest(folder)
    return [
        (path, expected, found.get(path, "nothing"))
        for path, expected in sorted(stamp["files"].items())
        if found.get(path) != expected
    ]


def fitting(root, inputs, cuda, archs, preferred=""):
    """Yields the names of undamaged builds with these inputs: the preferred one first, then the one in use.

    A node without toolkit (`cuda` "") or GPU (`archs` []) accepts any CUDA or architecture.
    """
    order = [preferred, os.path.basename(os.path.realpath(f"{root}/current"))]
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    for name in sorted(names, key=lambda name: order.index(name) if name in order else len(order)):
        stamp = None if name.startswith(".") or name == "current" else stamp_of(f"{root}/{name}")
        if (
            stamp
            and stamp["inputs"] == inputs
            and cuda in ("", stamp["cuda"])
            and set(archs) <= set(stamp["archs"])
            and not drift(f"{root}/{name}", stamp)
        ):
            yield name


def check_space(phase, needed_gib):
    """Record a problem where the disk of the builds has less than `needed_gib` GiB free."""
    place = phase.want["root"]
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free_gib = shutil.disk_usage(place).free / GIB
    if free_gib < needed_gib:
        phase.problem(f"free space in {place}", f"{needed_gib:g} GiB", f"{free_gib:.1f} GiB", "free some space there")


def finish(partial, prefix, stamp):
    """Write the stamp last, then rename `partial` to `prefix`: a folder with that name is always complete."""
    write(f"{partial}/stamp.json", json.dumps(stamp, indent=1, sort_keys=True) + "\n")
    os.chmod(partial, 0o755)
    if os.path.isdir(prefix):  # damaged, otherwise it would not be built again
        shutil.rmtree(prefix)
    os.rename(partial, prefix)


def point(link, target):
    """Make `link` a link to `target`, atomically, whatever is there but a folder. Raises OSError."""
    folder, name = os.path.split(link)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/.{name}")
    os.symlink(target, f"{folder}/.{name}")
    os.replace(f"{folder}/.{name}", link)


def put_in_use(phase, name):
    """Point the link `current` to the build `name`, atomically; the previous build is kept."""
    root = phase.want["root"]
    link = f"{root}/current"
    before = os.readlink(link) if os.path.islink(link) else None
    if before != name and phase.change(link, before, name):
        point(link, name)
    stamp = stamp_of(f"{root}/{name}")
    phase.facts.update(ready=True, name=name, stamp=digest(f"{root}/{name}/stamp.json"), archs=stamp["archs"])


# --- from node to node ---


def receive(phase):
    """Determine whether this node needs the build of another node (setting `build`: the facts of its look or build).

    facts: needs. A build that is already complete here is put in use.
    """
    want, there = phase.want, phase.want["build"]
    prefix = f"{want['root']}/{there['name']}"
    phase.facts["needs"] = False
    stamp = stamp_of(prefix)
    if there["ready"] and stamp and digest(f"{prefix}/stamp.json") == there["stamp"] and not drift(prefix, stamp):
        return put_in_use(phase, there["name"])
    archs, _ = architectures(phase)
    if missing := sorted(set(archs) - set(there.get("archs", archs))):
        remedy = f"set nccl_build_archs to {json.dumps(sorted({*archs, *there['archs']}))}"
        phase.problem("GPU architecture", f"sm_{', sm_'.join(there['archs'])} as built", f"sm_{missing[0]}", remedy)
    check_space(phase, RECEIVE_GIB)
    if not phase.problems and (phase.check or not there["ready"]):
        phase.change(prefix, None, "copied from the node that builds")
    elif not phase.problems:
        os.makedirs(want["root"], exist_ok=True)
    phase.facts["needs"] = not phase.problems
    return None


def pack(phase):
    """Create an archive of the build for the other nodes. facts: archive, sha256, bytes."""
    root, name = phase.want["root"], phase.want["build"]["name"]
    archive = f"{root}/.{name}.tar.gz"
    with tarfile.open(f"{archive}.partial", "w:gz", compresslevel=1) as tar:
        tar.add(f"{root}/{name}", arcname=".")
    os.replace(f"{archive}.partial", archive)
    phase.facts.update(archive=archive, sha256=digest(archive), bytes=os.path.getsize(archive))


def unpack(phase):
    """Unpack the archive of another node, compare every file with the stamp, and put the build in use.

    Raises Stop where the archive or a file is damaged.
    """
    root, sent = phase.want["root"], phase.want["archive"]
    name = phase.want["build"]["name"]
    if (found := digest(sent["archive"])) != sent["sha256"]:
        size = f"{os.path.getsize(sent['archive'])} bytes, sha256 {found}"
        os.unlink(sent["archive"])
        raise Stop(f"archive of {name}", f"{sent['bytes']} bytes, sha256 {sent['sha256']}", size,
                   "it was truncated or changed in transfer: run `runner setup --tags nccl_build` again")  # fmt: skip
    partial = f"{root}/.{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    outcome = phase.run(["tar", "-x", "-z", "-f", sent["archive"], "-C", partial, "--no-same-owner"], 600)
    os.unlink(sent["archive"])
    stamp = stamp_of(partial)
    if not outcome.ok or not stamp or drift(partial, stamp):
        shutil.rmtree(partial)
        raise Stop(
            f"files of {name}",
            "as stamped",
            outcome.last_line if not outcome.ok else "others",
            "run `runner setup --tags nccl_build` again",
        )
    os.unlink(f"{partial}/stamp.json")
    finish(partial, f"{root}/{name}", stamp)
    phase.change(f"{root}/{name}", None, "copied from the node that builds")
    phase.done.append(f"received {name}")
    put_in_use(phase, name)
