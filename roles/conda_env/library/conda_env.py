#!/usr/bin/python
"""Module of the role conda_env for a node: builds one Python environment, atomically.

PREFIX is a link to PREFIX-HASH, which is built beside it; then the link is switched, so that running processes keep
their environment. A stamp in PREFIX-HASH, written last, marks it as complete and lists its content. With the setting
`beside`, the name of a profile, it is one beside the main environment, and no fact is of it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.conda_env_index import check_index, check_url
from ansible.module_utils.conda_env_platform import platform_parts, wheel_folder
from ansible.module_utils.environments import (
    CHOICES,
    STAMP,
    WITHOUT_GPU,
    Lock,
    canonical,
    drift,
    fitting,
    installed,
    oldest_driver,
    stamp,
)
from ansible.module_utils.nvidia import driver, version
from ansible.module_utils.phase import Stop, counted, main, read, write

FACT = "/etc/ansible/facts.d/conda.fact"
BEGUN = ".begun"  # beside the folder of Miniforge, while its installer runs
KEY_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "flash-attn",
    "verl",
    "ray",
    "vllm",
    "shakedown",
)
MODULE_OF = {"runner": "shakedown"}  # where a module's name is not its package's
# Python finds its packages through the link by which it was started. A process that runs while the link is switched
# would import further modules from the new environment: this resolves the link at its start, for its children too.
PIN = """
import os, sys
_link, _place = sys.prefix, os.path.realpath(sys.prefix)
def _pin(path):
    return _place + path[len(_link):] if path.startswith(_link + "/") else path
sys.path[:] = map(_pin, sys.path)
sys.executable, sys.prefix = _pin(sys.executable), _place
if sys.exec_prefix == _link:
    sys.exec_prefix = _place
"""
SETUP = "run `runner setup --tags conda_env`"
NO_ANSWER_S = 180  # a first import of torch from a cold disk took half a minute


# --- observing -------------------------------------------------------------------------------------


def is_sibling(prefix, name):
    """Whether `name` has the form of this role's names of environments beside the link `prefix`."""
    return bool(re.fullmatch(re.escape(os.path.basename(prefix)) + r"-[0-9a-f]{12}(-b)?", name))


def siblings(prefix):
    """The paths of this role's environments beside the link `prefix`, complete or not."""
    folder = os.path.dirname(prefix)
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if is_sibling(prefix, name)]


def foreign_miniforge(prefix):
    """The path of the folder miniforge beside `prefix` if it exists and this role did not create it; else ""."""
    root = os.path.join(os.path.dirname(prefix), "miniforge")
    ours = not os.path.lexists(root) or any(map(os.path.exists, (os.path.join(root, STAMP), f"{root}{BEGUN}")))
    return "" if ours else root


def free_name(prefix, digest):
    """The path at which to build the environment with the hash `digest`: never that of the one in use."""
    name = f"{prefix}-{digest[:12]}"
    return f"{name}-b" if os.path.realpath(prefix) == os.path.realpath(name) else name


def parent(path):
    """The nearest folder above `path` that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def is_version(found, expected):
    """Whether `found` is the version `expected` or a more specific one: "3.11.9" is a "3.11"."""
    return version(found)[: len(version(expected))] == version(expected)


# --- validate --------------------------------------------------------------------------------------


def alike(lock):
    """The role's locks for GPUs that do what the one of this name does, itself among them, the newest first."""
    return next((locks for locks in CHOICES.values() if lock in locks), CHOICES["auto"])


def validate(phase):
    """Check settings, lock, driver, paths, Python, disk space and index; changes nothing. Raises Stop.

    With the setting `step` "choose", only determines facts: profile, the lock that the choice `profile` comes to here.
    """
    want = phase.want
    if want.get("step") == "choose":
        # Without a driver, or with one that is too old, the lock with the lowest requirement is refused later, with the
        # reason.
        locks = CHOICES.get(want["profile"], (want["profile"],))
        phase.facts["profile"] = fitting(driver(phase)[0], locks) or locks[-1]
        return
    lock = Lock(want["lock_text"])
    for line in lock.errors:
        phase.problem(f"lock {want['lock']}", "every line pins a package with ==", line, "pin it")
    if not re.fullmatch(r"/[A-Za-z0-9._/-]+", want["prefix"]) or want["prefix"].endswith("/"):
        raise Stop("conda_env_prefix", "an absolute path of letters, digits and ._-", want["prefix"], "choose another")
    if lock.cuda:
        check_driver(phase, lock.cuda, profile(want["lock"]))
    elif "torch" in lock.pins:
        phase.warn("the lock does not state the CUDA of its torch: add a line such as `# cuda: 12.1`")
    check_url(phase)
    check_place(phase)
    check_python(phase)
    if not shutil.which("rsync"):
        phase.problem("rsync", "installed", "not found on PATH", "install it: wheels are sent with it")
    if want["source"] == "wheelhouse":
        check_platform(phase)
    present = stamp(want["prefix"])
    if present.get("lock_sha256") == lock.sha256 and not drift(present["packages"], installed(want["prefix"])):
        return  # nothing will be downloaded or unpacked
    check_space(phase)
    if want["source"] != "wheelhouse":
        check_index(phase, lock)


def check_driver(phase, cuda, lock):
    """Record a problem where the node's driver is too old for PyTorch built for `cuda` ("13.0", "none" for a CPU).

    `lock` is the name of the lock that has it: the remedy is one that does the same with this driver.
    """
    oldest = oldest_driver(cuda)
    if not oldest:
        if cuda != "none":
            phase.warn(f"whether the driver runs PyTorch built for CUDA {cuda} is unknown: it is not in the table")
        return
    found, reason = driver(phase)
    phase.facts["driver"] = found
    if version(found) >= version(oldest):
        return
    locks = alike(lock)
    other = fitting(found, locks) or WITHOUT_GPU[locks[0]]
    phase.problem(
        f"NVIDIA driver for PyTorch built for CUDA {cuda} (lock {lock})",
        f">= {oldest}",
        found or f"none ({reason})",
        f"set conda_env_profile: {other}, which fits, or install a newer driver",
    )


def check_place(phase):
    """Record a problem where something else is at the path of the environment, or the path is not writable."""
    prefix = phase.want["prefix"]
    if os.path.isdir(prefix) and not os.path.islink(prefix):
        phase.problem(
            prefix, "a link made by this role, or nothing", "a folder", "move it away, or set conda_env_prefix"
        )
    elif os.path.islink(prefix) and not is_sibling(prefix, os.readlink(prefix)):
        found = f"a link to {os.readlink(prefix)}"
        phase.problem(prefix, "a link made by this role, or nothing", found, "move it away, or set conda_env_prefix")
    if phase.want["manager"] == "conda" and (root := foreign_miniforge(prefix)):
        remedy = "move it away, or set conda_env_prefix: Miniforge is installed beside it"
        phase.problem(root, "this role's Miniforge, or nothing", "another's", remedy)
    folder = parent(os.path.dirname(prefix))
    if not os.access(folder, os.W_OK):
        phase.problem(folder, "writable", "not writable", "run as root (ansible_user=root or become)")


def check_space(phase):
    """Record a problem where too little disk space is free. facts: free_gib."""
    folder = parent(os.path.dirname(phase.want["prefix"]))
    free = shutil.disk_usage(folder).free / 2**30
    phase.facts["free_gib"] = round(free, 1)
    if free < phase.want["min_free_gib"]:
        phase.problem(
            f"free space in {folder}",
            f">= {phase.want['min_free_gib']:g} GiB",
            f"{free:.1f} GiB",
            "free some space, or choose another conda_env_prefix",
        )


def check_python(phase):
    """Record a problem where the manager is venv and the node has no suitable Python."""
    if phase.want["manager"] == "venv":
        _, problem = find_python(phase)
        if problem:
            phase.problem(*problem)


def find_python(phase):
    """(path, None) of a Python of the expected version that can create a venv, or (None, problem as a tuple)."""
    expected = phase.want["python"]
    minor = ".".join(expected.split(".")[:2])
    found, remedy = "none", f"install python{minor}, or set conda_env_manager: conda, which brings its own"
    ask = "import platform; print(platform.python_version(), flush=True); import venv, ensurepip"
    for name in (f"python{minor}", "python3"):
        path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/bin:/usr/bin:/bin")
        if not path:
            continue
        outcome = phase.run([path, "-c", ask], 20)
        reported = outcome.stdout.strip()
        if is_version(reported, expected):
            if outcome.ok:
                return path, None
            return None, (
                "python",
                f"{expected} with venv",
                f"{reported} at {path} without it",
                f"install python{minor}-venv",
            )
        found = f"{reported} at {path}" if reported else outcome.last_line
    return None, ("python", expected, found, remedy)


def check_platform(phase):
    """Record a problem where wheels for the platform tag do not run here: another processor or an older glibc."""
    glibc, expected = platform_parts(phase.want["platform"])
    machine, libc = platform.machine(), os.confstr("CS_GNU_LIBC_VERSION") or "no glibc"
    if machine != expected:
        phase.problem("processor", expected, machine, "set conda_env_platform for these nodes")
    if version(libc.partition(" ")[2]) < (2, glibc):
        phase.problem("glibc", f">= 2.{glibc}", libc, "set conda_env_platform to the oldest glibc of all nodes")


# --- install ---------------------------------------------------------------------------------------


def install(phase):
    """Build the environment from the wheels that were sent, switch to it, and remove older ones. Raises Stop."""
    want, sent = phase.want, phase.want["sent"]
    prefix, digest = want["prefix"], sent["hash"]
    present = stamp(prefix)
    changed = drift(present.get("packages", {}), installed(prefix))
    if present.get("hash") == digest and not changed:
        phase.done.append(f"{prefix} already has {digest[:12]}")
        return
    before = None
    if present:
        before = ", ".join([present["hash"][:12], *(f"{name} changed since" for name, _, _ in changed)])
    if not phase.change(prefix, before, digest[:12]):
        return
    os.umask(0o022)  # every user's job imports from it
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    previous = os.path.realpath(prefix)
    place = free_name(prefix, digest)
    shutil.rmtree(place, ignore_errors=True)
    try:
        packages = build(phase, place)
    except (Stop, OSError):
        shutil.rmtree(place, ignore_errors=True)  # a full disk stays full otherwise
        raise
    lock = Lock(want["lock_text"])
    content = {"hash": digest, "lock_sha256": lock.sha256, "profile": profile(want["lock"]), "packages": packages}
    content.update(manager=want["manager"], python=python_version(phase, place))
    write(os.path.join(place, STAMP), json.dumps(content, indent=1, sort_keys=True) + "\n")
    switch(prefix, place)
    for other in siblings(prefix):
        if other not in (place, previous):
            shutil.rmtree(other, ignore_errors=True)
    wheels = wheel_folder(want)
    for name in set(os.listdir(wheels)) - set(sent["folders"]):
        if not re.fullmatch(r"(local|lock)-[0-9a-f]{12}", name):
            continue  # somebody else's wheels
        shutil.rmtree(os.path.join(wheels, name), ignore_errors=True)
    phase.done.append(f"{prefix} -> {os.path.basename(place)}, {counted(len(packages), 'package')}")


def profile(lock):
    """The name of the profile of the lock file at the path `lock`: its file name without suffix."""
    return os.path.splitext(os.path.basename(lock))[0]


def switch(prefix, place):
    """Point the link `prefix` to `place`, atomically."""
    link = f"{prefix}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(link)
    os.symlink(os.path.basename(place), link)
    os.replace(link, prefix)


def build(phase, place):
    """Build the environment at `place`; returns its packages as {canonical name: version}. Raises Stop."""
    want = phase.want
    if want["manager"] == "conda":
        conda(phase, place)
    else:
        python, problem = find_python(phase)
        if problem:
            raise Stop(*problem)
        outcome = phase.run([python, "-m", "venv", place], 120)
        if not outcome.ok:
            raise Stop("venv", f"created at {place}", outcome.last_line, "see the message")
    temporary = os.path.join(place, "tmp")  # what pip unpacks may not fit into /tmp
    os.makedirs(temporary)
    local, *lock = (os.path.join(wheel_folder(want), name) for name in want["sent"]["folders"])
    base = set(installed(place))
    # The wheels built for this node first: one for another Python is refused here within seconds.
    if os.path.getsize(os.path.join(local, "requirements.txt")):
        pip(phase, place, from_folder(local))
    if lock:
        pip(phase, place, from_folder(lock[0]))
    else:
        write(os.path.join(temporary, "lock.txt"), want["lock_text"])
        argv = ["--requirement", os.path.join(temporary, "lock.txt")]
        index = Lock(want["lock_text"]).index
        if index and want["source"] == "online":
            argv += ["--extra-index-url", index]
        pip(phase, place, argv)
    shutil.rmtree(temporary)
    (site,) = glob.glob(os.path.join(glob.escape(place), "lib/python3*/site-packages"))
    write(os.path.join(site, "_shakedown_place.py"), PIN)
    write(os.path.join(site, "_shakedown_place.pth"), "import _shakedown_place\n")
    packages = installed(place)
    known = base | set(Lock(want["lock_text"]).pins) | pinned(local)
    if unpinned := sorted(set(packages) - known):
        phase.warn(f"not in the lock, so nodes may differ: {', '.join(unpinned)}: pin them there")
    return packages


def pinned(folder):
    """The canonical names of the packages that requirements.txt in `folder` pins."""
    return set(Lock(read(os.path.join(folder, "requirements.txt")) or "").pins)


def from_folder(folder):
    """pip's arguments to install exactly the wheels in `folder`, each checked against its sha256."""
    requirements = os.path.join(folder, "requirements.txt")
    return ["--no-index", "--find-links", folder, "--no-deps", "--require-hashes", "--requirement", requirements]


def pip(phase, place, words):
    """Run `pip install` with the arguments `words` in the environment at `place`. Raises Stop where it fails."""
    want = phase.want
    env = {"TMPDIR": os.path.join(place, "tmp"), "PIP_NO_INPUT": "1", "PIP_NO_CACHE_DIR": "1"}
    env["PIP_DISABLE_PIP_VERSION_CHECK"], env["PIP_ROOT_USER_ACTION"] = "1", "ignore"
    if want["source"] == "mirror":
        env["PIP_INDEX_URL"] = want["index_url"]
    if want["netrc"]:
        env["NETRC"] = want["netrc"]
    argv = [os.path.join(place, "bin/python"), "-m", "pip", "install", "--quiet", *words]
    outcome = phase.run(argv, want["timeout_s"], env=env)
    if outcome.ok:
        return
    problem = pip_problem(outcome.stderr, outcome.last_line)
    if "sha256" in problem[0] and "--no-index" in words:
        # rsync compares size and time only; without the damaged folder the next run sends it again.
        shutil.rmtree(words[words.index("--find-links") + 1], ignore_errors=True)
        problem = (*problem[:3], f"{SETUP} again: the wheels are then sent again")
    raise Stop(*problem)


def pip_problem(stderr, last_line):
    """(what, expected, found, remedy) of a failed `pip install`, from its error output."""
    if match := re.search(r"\[Errno (28|122)\] ([^:'\n]+)", stderr):
        return "disk", "room for the environment", match[2].lower(), "free some space there"
    if "DO NOT MATCH THE HASHES" in stderr:
        file = re.search(
            r"^\s+(\S+)(?: from .*)?:\s*\n\s+Expected sha256\s+(\w+)\n\s+Got\s+(\w+)", stderr, re.MULTILINE
        )
        name, expected, got = file.groups() if file else ("a package", "that of the lock", "another")
        return f"sha256 of {name}", expected, got, "the package is damaged, or is not the one that was locked"
    if match := re.search(r"No matching distribution found for (\S+)", stderr):
        others = re.search(r"\(from versions: (.*)\)", stderr)
        found = others[1] if others and others[1] != "none" else "none that fits this Python and platform"
        if "after connection broken by" in stderr:
            found = "no answer from the index"
        return f"package {match[1]}", "available", found, "see the lock, the index and the Python version"
    if match := re.search(r"Package '(\S+)' requires a different Python: (\S+) not in '(.+?)'", stderr):
        return f"python for {match[1]}", match[3], match[2], "set conda_env_python"
    errors = [line.partition(" ")[2] for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return "pip install", "packages installed", errors[0] if errors else last_line, "see the message"


def conda(phase, place):
    """Create a conda environment with only Python and pip at `place`, with the role's own Miniforge. Raises Stop."""
    want = phase.want
    root = os.path.join(os.path.dirname(want["prefix"]), "miniforge")
    miniforge(phase, root, os.path.join(wheel_folder(want), want["sent"]["folders"][0], "miniforge.sh"))
    argv = [os.path.join(root, "bin/conda"), "create", "--yes", "--quiet", "--prefix", place, "--override-channels"]
    for channel in want["channels"]:
        argv += ["--channel", channel]
    argv += ["--offline"] if want["source"] == "wheelhouse" else []
    outcome = phase.run([*argv, f"python={want['python']}", "pip"], want["timeout_s"])
    if not outcome.ok:
        raise Stop("conda create", f"python {want['python']}", outcome.last_line, "see conda_env_channels")


def miniforge(phase, root, installer):
    """Install Miniforge at `root` from the file `installer`, unless it is complete there. Raises Stop."""
    want = phase.want["miniforge"]
    done = os.path.join(root, STAMP)
    content = json.dumps({"sha256": want["sha256"], "version": want["version"]}, sort_keys=True) + "\n"
    if read(done) == content:
        return
    with open(installer, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != want["sha256"].lower():
        shutil.rmtree(os.path.dirname(installer), ignore_errors=True)
        raise Stop("sha256 of Miniforge's installer", want["sha256"], found, f"{SETUP} again: it is then sent again")
    if foreign_miniforge(phase.want["prefix"]):
        raise Stop(root, "this role's Miniforge, or nothing", "another's", "move it away, or set conda_env_prefix")
    write(f"{root}{BEGUN}", "")  # marks an incomplete folder, which has no stamp, as this role's
    shutil.rmtree(root, ignore_errors=True)
    outcome = phase.run(["bash", installer, "-b", "-p", root], phase.want["timeout_s"])
    if not outcome.ok:
        raise Stop(f"Miniforge {want['version']}", f"installed in {root}", outcome.last_line, "see the message")
    write(done, content)
    os.unlink(f"{root}{BEGUN}")


def python_version(phase, place):
    """The version of the Python in the environment at `place`, or the error of running it."""
    outcome = phase.run(
        [os.path.join(place, "bin/python"), "-c", "import platform; print(platform.python_version())"], 60
    )
    return outcome.stdout.strip() if outcome.ok else outcome.last_line


# --- configure and verify --------------------------------------------------------------------------


def configure(phase):
    """Publish the environment as conda.fact. Raises Stop where there is no complete one."""
    want = phase.want
    present = stamp(want["prefix"])
    if not present:
        if not phase.check:
            raise Stop("environment", f"a complete one at {want['prefix']}", "none", SETUP)
        return
    versions = {name: present["packages"][name] for name in KEY_PACKAGES if name in present["packages"]}
    fact = {"lock_sha256": present["lock_sha256"], "prefix": want["prefix"], "profile": present["profile"]}
    fact.update(python=present["python"], versions=versions)
    phase.write(FACT, json.dumps(fact, indent=1, sort_keys=True) + "\n")


# Imports may print to stdout (deepspeed does): the answer is written to a copy of the original stdout.
PROBE = """
import importlib, json, os, platform, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
report = {"python": platform.python_version(), "errors": {}, "cuda": None}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        if name == "torch":
            report["cuda"] = module.version.cuda or "none"
    except BaseException as error:
        report["errors"][name] = f"{type(error).__name__}: {error}"
from importlib import metadata
report["packages"] = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
json.dump(report, answer)
answer.flush()
os._exit(0)  # a library's threads may not end
"""


def verify(phase):
    """Import the main modules and compare all packages with the stamp and the lock. Raises Stop without an environment.

    facts: prefix, python, packages (number), imported.
    """
    want = phase.want
    prefix, lock = want["prefix"], Lock(want["lock_text"])
    present = stamp(prefix)
    if not present:
        found = "an incomplete one" if os.path.exists(prefix) else "none"
        raise Stop("environment", f"a complete one at {prefix}", found, SETUP)
    if not want.get("beside"):
        phase.own(FACT, 0o644, remedy=SETUP)
    expected = {**present["packages"], **{n: v for n, v in lock.pins.items() if n not in lock.conditional}}
    modules = [n for n in want["imports"] if canonical(MODULE_OF.get(n, n)) in expected]
    outcome = phase.run([os.path.join(prefix, "bin/python"), "-c", PROBE, *modules], NO_ANSWER_S)
    try:
        answer = json.loads(outcome.stdout)
    except ValueError:
        raise Stop(f"python of {prefix}", "an answer", outcome.last_line, SETUP) from None
    if present["lock_sha256"] != lock.sha256:
        phase.problem(
            "lock of the environment",
            f"{profile(want['lock'])} {lock.sha256[:12]}",
            f"{present['profile']} {present['lock_sha256'][:12]}",
            SETUP,
        )
    if not is_version(answer["python"], want["python"]):
        phase.problem("python", want["python"], answer["python"], SETUP)
    found = {canonical(name): version for name, version in answer["packages"].items()}
    for name, pinned_version, found_version in drift(expected, found):
        phase.problem(f"package {name}", pinned_version, found_version, SETUP)
    for name, error in answer["errors"].items():
        phase.problem(f"import {name}", "no error", error, "see its message; then the role's phase install")
    built_for = answer["cuda"]
    if built_for and lock.cuda and built_for != lock.cuda:
        phase.problem("CUDA of the PyTorch build", lock.cuda, built_for, SETUP)
    if built_for:
        check_driver(phase, built_for, profile(want["lock"]))
    phase.facts.update(prefix=prefix, python=answer["python"], packages=len(found), imported=modules)
    phase.done.append(f"{counted(len(expected), 'package')} as pinned, imported: {', '.join(modules) or 'nothing'}")


PHASES = {"validate": validate, "install": install, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
