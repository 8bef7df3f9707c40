#!/usr/bin/python
"""Module of the role conda_env for the controller: builds the wheels that a node installs, and sends them to it.

Called once per node, in parallel. Results are cached by the hash of their inputs, and the first call builds them while
the others wait, so that nodes with equal settings share their wheels. A folder gets its final name when it is complete.

The folder `local-HASH` has this package, the optional wheels and Miniforge's installer; with the source
`wheelhouse`, `lock-HASH` has all packages of the lock. Each has a `requirements.txt` that pins every wheel in it by
its sha256, so that a node installs exactly the files built here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.conda_env_platform import platform_parts, wheel_folder
from ansible.module_utils.environments import Lock, canonical
from ansible.module_utils.phase import Stop, main, read, write

# Parts of an installed package that only the controller needs, such as playbooks and roles.
NOT_FOR_NODES = ("__pycache__", "_files")

# --- pure, except for reading sources --------------------------------------------------------------


def digest(value):
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def identity(want, lock, package, wheels):
    """The hash of an environment, from exactly the inputs that determine its content.

    `package` is the hash of this package, `wheels` are the optional wheels that fit.
    """
    return digest(
        {
            "lock": lock.sha256,
            "manager": want["manager"],
            "miniforge": want["miniforge"]["sha256"] if want["manager"] == "conda" else "",
            "python": want["python"],
            "package": package,
            "wheels": sorted(wheel["sha256"] for wheel in wheels),
        }
    )


def choose(wheels, python, lock):
    """(the `wheels` that fit this version of Python and the lock's torch, a reason for each of the others)."""
    torch, cuda = lock.pins.get("torch", "none"), lock.cuda or "unknown"
    fitting, reasons = [], []
    for wheel in wheels:
        name = os.path.basename(wheel.get("path") or wheel.get("url") or "")
        if not _begins(python, wheel["python"]):
            reasons.append(f"{name} is left out: it is for Python {wheel['python']}, the environment has {python}")
        elif not _begins(torch.partition("+")[0], wheel["torch"]):
            reasons.append(f"{name} is left out: it is for torch {wheel['torch']}, the lock has {torch}")
        elif cuda.partition(".")[0] != wheel["cuda"].partition(".")[0]:
            reasons.append(f"{name} is left out: it is for CUDA {wheel['cuda']}, the lock's torch for {cuda}")
        else:
            fitting.append(wheel)
    return fitting, reasons


def _begins(version, prefix):
    """Whether `version` is `prefix` or a more specific version: "2.3.1" is a "2.3", "2.30" is not."""
    return version.split(".")[: len(prefix.split("."))] == prefix.split(".")


def platforms(newest):
    """All platform tags that a node with the tag `newest` ("manylinux_2_28_x86_64") can use, newest first.

    Source: PEP 600: manylinux2014, 2010 and 1 are the names for glibc 2.17, 2.12 and 2.5. Raises Stop for another tag.
    """
    glibc, machine = platform_parts(newest)
    tags = []
    for minor in range(glibc, 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        if old := {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}.get(minor):
            tags.append(f"{old}_{machine}")
    return [*tags, f"linux_{machine}"]


def shell_for_rsync(target):
    """The value of rsync's --rsh for `target`, quoted as rsync parses it: a quote inside is doubled."""
    port = ["-p", str(target["port"])] if target["port"] else []  # without one, as ssh's configuration has it
    words = ["ssh", *port, "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
    if target["key"]:
        words += ["-i", os.path.expanduser(target["key"])]
    words += shlex.split(target["ssh_args"])
    plain = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
    return " ".join(word if plain.fullmatch(word) else "'" + word.replace("'", "''") + "'" for word in words)


def modules(folder):
    """The path of the package `runner`: below `folder` in a checkout, its parent in an installed package."""
    package, name = os.path.split(os.path.abspath(folder))
    return package if name == "_files" else os.path.join(folder, "runner")


def tree_hash(folder):
    """The hash of the sources of the nodes' wheel: equal for a checkout and for an installed package."""
    files = [[name, os.path.join(folder, name)] for name in ("pyproject.toml", "README.md")]
    package = modules(folder)
    for path, folders, names in os.walk(package):
        folders[:] = sorted(name for name in folders if name not in NOT_FOR_NODES)
        files += [
            [os.path.relpath(os.path.join(path, name), os.path.dirname(package)), os.path.join(path, name)]
            for name in names
            if not name.endswith(".pyc")
        ]
    return digest([[name, sha256(file)] for name, file in sorted(files)])


def sha256(path):
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


# --- building --------------------------------------------------------------------------------------


def install(phase):
    """Build the folders of wheels for one node, or take them from the cache, and send them. facts: hash, folders.

    Raises Stop where one cannot be built or sent.
    """
    want = phase.want
    lock = Lock(want["lock_text"])
    if lock.errors:
        raise Stop(f"lock {want['lock']}", "every line pins a package with ==", lock.errors[0], "pin it")
    package = package_source(want["package"])
    wheels, left_out = choose(want["wheels"], want["python"], lock)
    for reason in left_out:
        phase.warn(reason)
    environment = identity(want, lock, package, wheels)
    cache = os.path.expanduser(want["wheelhouse"])
    folders = {f"local-{environment[:12]}": lambda folder: make_local(phase, folder, wheels)}
    if want["source"] == "wheelhouse":
        made_from = digest([lock.sha256, want["python"], want["platform"], want["sdists"]])
        folders[f"lock-{made_from[:12]}"] = lambda folder: make_wheelhouse(phase, folder, lock)
    for name, fill in folders.items():
        keep(phase, os.path.join(cache, name), fill)
    phase.facts.update(hash=environment, folders=list(folders))
    if not phase.check:
        send(phase, [os.path.join(cache, name) for name in folders])
    phase.done.append(f"{', '.join(folders)} sent")


def package_source(path):
    """The hash of the wheel or source tree at `path`; "" for an empty path. Raises Stop for anything else."""
    if not path:
        return ""
    if os.path.isfile(path) and path.endswith(".whl"):
        return sha256(path)
    if os.path.isfile(os.path.join(path, "pyproject.toml")) and os.path.isdir(modules(path)):
        return tree_hash(path)
    raise Stop("conda_env_package", "a wheel or this package's sources", path, "give its path on the controller")


def keep(phase, folder, fill):
    """Create `folder` with `fill(path)`, once and atomically, also with parallel calls and after a killed one.

    Raises Stop where `fill` does, also in the calls that waited for it.
    """
    called = time.time()
    if os.path.isdir(folder):
        return
    if phase.check:
        phase.change(folder, None, "built")
        return
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    failure = f"{folder}.failed"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(folder):
            return
        # A call that waited for one that failed also fails, instead of trying the same again for each node.
        with contextlib.suppress(OSError, ValueError):
            if os.stat(failure).st_mtime >= called:
                raise Stop(*json.loads(read(failure)))
        partial = f"{folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        try:
            fill(partial)
        except Stop as stop:
            write(failure, json.dumps(stop.problem))
            raise
        pin_all(partial)
        os.rename(partial, folder)
        phase.change(folder, None, "built")


def pin_all(folder):
    """Write requirements.txt with the version and sha256 of each wheel in `folder`."""
    lines = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".whl"):
            project, version = name.split("-")[:2]
            lines.append(f"{canonical(project)}=={version} --hash=sha256:{sha256(os.path.join(folder, name))}\n")
    write(os.path.join(folder, "requirements.txt"), "".join(lines))


def make_local(phase, folder, wheels):
    """Fill `folder` with this package's wheel, the optional `wheels` and Miniforge's installer. Raises Stop."""
    want = phase.want
    if want["package"]:
        build_package(phase, folder)
    for wheel in wheels:
        fetch(wheel.get("path") or wheel.get("url"), wheel["sha256"], folder, "wheel")
    if want["manager"] == "conda":
        miniforge = want["miniforge"]
        name = fetch(miniforge["url"], miniforge["sha256"], folder, "Miniforge's installer")
        os.rename(name, os.path.join(folder, "miniforge.sh"))


def build_package(phase, folder):
    """Copy or build this package's wheel into `folder`. Raises Stop where the build fails."""
    path = phase.want["package"]
    if os.path.isfile(path):
        shutil.copy(path, folder)
        return
    # Built from a copy: setuptools writes beside its sources, and a checkout may be read-only or have stale files.
    sources = os.path.join(folder, "sources")
    shutil.copytree(modules(path), os.path.join(sources, "runner"), ignore=shutil.ignore_patterns(*NOT_FOR_NODES))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(os.path.join(path, name), sources)
    pip(phase, ["wheel", "--no-deps", "--wheel-dir", folder, *isolation(), sources], "this package's wheel")
    shutil.rmtree(sources)


def isolation():
    """pip's option to build with the installed setuptools if it is new enough, so that no index is needed."""
    from importlib import metadata

    try:
        enough = int(metadata.version("setuptools").partition(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        enough = False
    return ["--no-build-isolation"] if enough else []


def fetch(source, expected, folder, what):
    """Copy or download `source` into `folder`; returns the path. Raises Stop where its sha256 is not `expected`."""
    path = os.path.join(folder, os.path.basename(source))
    url = source if "://" in source else f"file://{os.path.abspath(os.path.expanduser(source))}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, open(path, "wb") as file:
            shutil.copyfileobj(answer, file)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise Stop(f"{what} {source}", "reachable from the controller", reason, "see its URL or path") from None
    found = sha256(path)
    if found != expected.lower():
        raise Stop(
            f"sha256 of {what} {os.path.basename(source)}",
            expected,
            found,
            "compare with the publisher's checksum: the file is damaged or another one",
        )
    return path


def make_wheelhouse(phase, folder, lock):
    """Fill `folder` with a wheel of each package of the lock, for the nodes' Python and platform. Raises Stop."""
    want = phase.want
    built = os.path.join(folder, "built")
    os.makedirs(built)
    lines = dict(lock.lines)
    for name in sorted({canonical(name) for name in want["sdists"]} & set(lines)):
        one = os.path.join(folder, f"{name}.txt")
        write(one, lines[name] + "\n")
        before = set(os.listdir(built))
        pip(phase, ["wheel", "--no-deps", "--wheel-dir", built, "--requirement", one], f"a wheel of {name}", lock.index)
        (wheel,) = set(os.listdir(built)) - before
        usable(wheel, want)
        if "--hash=" in lines[name]:  # pip has just checked that of the source; from here on the wheel's applies
            lines[name] = f"{name}=={lock.pins[name]} --hash=sha256:{sha256(os.path.join(built, wheel))}"
        os.unlink(one)
    closed = os.path.join(folder, "lock.txt")
    write(closed, "".join(f"{line}\n" for line in lines.values()))
    argv = ["download", "--dest", folder, "--only-binary", ":all:", "--find-links", built, "--requirement", closed]
    argv += ["--implementation", "cp", "--python-version", want["python"]]
    for tag in platforms(want["platform"]):
        argv += ["--platform", tag]
    pip(phase, argv, "wheels of the lock", lock.index)
    shutil.rmtree(built)
    os.unlink(closed)


def usable(wheel, want):
    """Raise Stop where a wheel that was built here does not run with the nodes' Python and processor."""
    if wheel.endswith("-none-any.whl"):
        return
    python = "{}.{}".format(*sys.version_info[:2])
    _, machine = platform_parts(want["platform"])
    if not _begins(want["python"], python) or platform.machine() != machine:
        raise Stop(
            f"{wheel}, built from source",
            f"usable with Python {want['python']} on {machine}",
            f"built with {python} on {platform.machine()}",
            "run Ansible with the nodes' Python, or use conda_env_source: online or mirror",
        )


def pip(phase, words, what, index=""):
    """Run the controller's pip, with the user's configuration and credentials. Raises Stop where it fails.

    `words` are its arguments, `what` names the result in the error, `index` is an additional index.
    """
    argv = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *words]
    if index and not phase.want["index_url"]:
        argv += ["--extra-index-url", index]
    env = {"SOURCE_DATE_EPOCH": "315532800"}  # the first second that a zip archive can name: the same wheel each time
    if phase.want["index_url"]:
        env["PIP_INDEX_URL"] = phase.want["index_url"]
    outcome = phase.run(argv, phase.want["timeout_s"], env=env)
    if not outcome.ok:
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[0].partition(" ")[2] if errors else outcome.last_line
        raise Stop(what, "built on the controller", reason, "see pip's index and configuration on the controller")


# --- sending ---------------------------------------------------------------------------------------


def send(phase, folders):
    """Copy `folders` to the node's folder of wheels with rsync, which transfers only differences. Raises Stop."""
    target = phase.want["target"]
    there = wheel_folder(phase.want)
    argv = ["rsync", "--recursive", "--times", "--omit-dir-times", "--delete", "--chmod=D755,F644"]
    argv += ["--itemize-changes"]
    if target["local"]:
        os.makedirs(there, exist_ok=True)
        destination = f"{there}/"
    else:
        sudo = "" if target["user"] in ("", "root") else "sudo -n "
        quoted = shlex.quote(there)
        argv += ["--rsh", shell_for_rsync(target), "--rsync-path", f"{sudo}mkdir -p {quoted} && {sudo}rsync"]
        destination = (f"{target['user']}@" if target["user"] else "") + f"{target['host']}:{there}/"
    outcome = phase.run([*argv, *folders, destination], phase.want["timeout_s"])
    if not outcome.ok:
        lines = outcome.stderr.strip().splitlines()
        raise Stop(
            "wheels",
            f"sent to {there} with rsync",
            lines[0] if lines else outcome.last_line,
            "rsync must be on the controller and on the node, and ssh must reach it without a password",
        )
    if outcome.stdout.strip():
        phase.change(there, None, ", ".join(os.path.basename(folder) for folder in folders))


PHASES = {"install": install}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
