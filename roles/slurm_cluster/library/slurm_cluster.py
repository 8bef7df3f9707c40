#!/usr/bin/python
"""Module of the role slurm_cluster: munge, slurmctld and slurmd of a node, from the inventory.

Besides the role's variables, the settings have those that the lookup slurm_cluster_settings adds:

    node        this node's NodeName
    controller  the NodeName of slurmctld's node
    nodes       [{"name", "address", "observed"}] of the whole cluster; observed is the result of `observe`, {} for a
                node that is not part of this run
    munge_key_problem  (validate) [what, expected, found, remedy] where the given key cannot be used, else []
    credential  (verify) {"rc", "stdout", "stderr"} of `munge -n` on the controller's node
"""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import os
import pwd
import re
import shutil
import socket
import tempfile
import time

from ansible.module_utils import slurm_states
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.phase import Stop, also, counted, ids, main, read
from ansible.module_utils.slurm_conf import (
    DATABASE,
    MARK,
    cgroup_conf,
    gpu_type,
    gres,
    gres_conf,
    hardware,
    how_to_apply,
    slurm_conf,
    slurmdbd_conf,
)

STARTED = time.monotonic()
FACT = "/etc/ansible/facts.d/slurm.fact"
MUNGE_KEY = "/etc/munge/munge.key"
SPOOL = "/var/lib/slurm/slurmd"  # as slurm.conf's SlurmdSpoolDir
PACKAGES = {"munged": "munge", "slurmd": "slurmd", "scontrol": "slurm-client", "slurmctld": "slurmctld",
            "slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}  # Debian's  # fmt: skip
# By this name Slurm's plugin for MPI opens it, which only Debian's package for compilers has.
PMIX, PMIX_PACKAGE = "/usr/lib/*/libpmix.so", "libpmix-dev"
ON_CONTROLLER, FOR_ACCOUNTING = ("slurmctld", "slurmdbd", "mariadbd"), ("slurmdbd", "mariadbd")
SETUP = "run `runner setup --tags slurm_cluster`"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


# --- pure ------------------------------------------------------------------------------------------


def states(text):
    """`sinfo -h -N -o '%N|%T|%E'` as {node: (state with its flags, reason)}; a node of two partitions has one entry.

    Raises ValueError on a line of another form.
    """
    nodes = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        name, state, reason = ([part.strip() for part in line.split("|", 2)] + ["", ""])[:3]
        if not name or not re.match(r"[A-Za-z][A-Za-z_+]*\W?$", state):
            raise ValueError(f"no node|state|reason in {line[:60]!r}")
        nodes[name] = (state.lower(), "" if reason in ("none", "N/A") else reason)
    return nodes


def judge(state, reason):
    """(the reason why a node in this state accepts no jobs, "" where it does; whether only a reservation's)."""
    plain, verdict = slurm_states.read(state)
    shown = plain + (f", reason: {reason}" if reason else "")
    return (shown if verdict == slurm_states.UNUSABLE else ""), verdict == slurm_states.RESERVED


def hung(state, reason):
    """Whether Slurm set a node in this state DOWN because it did not respond. A person's reason is another one."""
    # Slurm 24.11 adds its own to a reason that is left of an earlier state: "bad fan : Not responding".
    return state.startswith("down") and re.match(r"not responding\b", reason.split(" : ")[-1], re.I) is not None


def config(text):
    """The output of `scontrol show config` as {parameter: value}; headings and invalid lines are ignored."""
    pairs = (line.partition("=") for line in text.splitlines() if re.match(r"^\w+ *=", line))
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_by_slurmctld(shown):
    """Whether slurmctld has read the slurm.conf of this node, by the output of `scontrol show config`."""
    return config(shown).get("HASH_VAL", "Match") == "Match"


def unmunged(text):
    """The times in the output of `unmunge`, in Unix seconds: {"ENCODE_TIME", "DECODE_TIME"}."""
    found = re.findall(r"^(ENCODE_TIME|DECODE_TIME):.*\((\d+)\)\s*$", text, re.M)
    return {name: int(value) for name, value in found}


def sha256(text):
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


# --- observed --------------------------------------------------------------------------------------


def program(name):
    """The path of the program `name`, also where root's PATH has no sbin; None if it is not installed."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":" + SBIN)


def gpu_models(root="/proc/driver/nvidia/gpus"):
    """The names of this node's GPUs, as the driver has them; [] without a driver."""
    texts = [read(path) or "" for path in sorted(glob.glob(f"{root}/*/information"))]
    return [found.group(1).strip() for text in texts if (found := re.search(r"^Model:(.*)$", text, re.M))]


def has_nvml_plugin(slurmd):
    """Whether the Slurm of this program was built with NVIDIA's library, which AutoDetect=nvml needs."""
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(slurmd)))
    places = [
        f"{lib}/slurm*" for above in {prefix, "/usr"} for lib in (f"{above}/lib", f"{above}/lib64", f"{above}/lib/*")
    ]
    return any(glob.glob(f"{place}/gpu_nvml.so") for place in places)


def observe(phase):
    """What the configuration needs to know of this node: {"hostname", "hardware", "version", "gpu_type", "nvml"}.

    hardware is the result of slurm_conf.hardware; nvml is whether Slurm can ask the driver for its GPUs. Raises Stop
    where slurmd does not report it.
    """
    hostname = socket.gethostname().split(".")[0]
    slurmd, models = program("slurmd"), gpu_models()
    gpus = {"gpu_type": gpu_type(models), "nvml": bool(models and slurmd and has_nvml_plugin(slurmd))}
    if not slurmd:  # check mode on a bare node: a preview, with the operating system's values
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
        return {"hostname": hostname, "hardware": {"CPUs": os.cpu_count(), "RealMemory": memory}, "version": "", **gpus}
    outcome = phase.run([slurmd, "-C"], 20)
    try:
        found = hardware(outcome.stdout)
    except ValueError:
        raise Stop("slurmd -C", "the node's hardware", outcome.last_line, "see `slurmd -C` on the node") from None
    version = phase.run([slurmd, "-V"], 20).stdout.split()
    return {"hostname": hostname, "hardware": found, "version": version[-1] if version else "", **gpus}


def services(phase, names):
    """{name: (active state, enabled state)} of systemd's units, ("", "") for an unknown one."""
    found = {}
    argv = ["systemctl", "show", "--property=Id,ActiveState,UnitFileState", *names]
    for block in phase.run(argv, 20).stdout.split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        found[values.get("Id", "").replace(".service", "")] = (
            values.get("ActiveState", ""),
            values.get("UnitFileState", ""),
        )
    return {name: found.get(name, ("", "")) for name in names}


def last_error(phase, unit):
    """The last error in a unit's journal, "" without one."""
    lines = phase.run(
        ["journalctl", "--unit", unit, "--lines=40", "--output=cat", "--no-pager"], 10
    ).stdout.splitlines()
    # Errors about a missing optional MPI library do not matter.
    errors = [line for line in lines if re.search(r"\b(error|fatal):", line) and "mpi/" not in line]
    return errors[-1].split(": ", 1)[-1] if errors else ""


def state_of(phase, name):
    """((state, reason), "") of a node in slurmctld, or (None, reason) where it is unknown."""
    outcome = phase.run(["sinfo", "--noheader", "--Node", f"--nodes={name}", "--format=%N|%T|%E"], 20)
    if not outcome.ok:
        return None, outcome.last_line
    try:
        found = states(outcome.stdout).get(name)
    except ValueError as error:
        return None, str(error)
    return found, "" if found else "no such node"


def cgroup_ready():
    """Whether a hierarchy for proctrack/cgroup is mounted read-write: unified, or v1's freezer."""
    root = "/sys/fs/cgroup"
    return os.access(root if os.path.exists(f"{root}/cgroup.controllers") else f"{root}/freezer", os.W_OK)


def files(want):
    """{file name: content} of the configuration. Raises Stop where a node's hardware is unknown."""
    old = read(os.path.join(want["conf_dir"], "slurm.conf"))
    texts = {
        "slurm.conf": slurm_conf(want, old),
        "gres.conf": gres_conf(want, observed(want)),
        "cgroup.conf": cgroup_conf(want),
    }
    if want["accounting"] and is_controller(want):
        texts["slurmdbd.conf"] = slurmdbd_conf(observed(want)["hostname"])
    return texts


def fact():
    """The content of slurm.fact from the last complete run, {} without one."""
    try:
        return json.loads(read(FACT) or "{}")
    except ValueError:
        return {}


def is_controller(want):
    """Whether this node runs slurmctld."""
    return want["node"] == want["controller"]


def units(want):
    """The names of this node's systemd units, in the order in which they are started."""
    accounting = ["mariadb", "slurmdbd"] if want["accounting"] else []
    return ["munge", *([*accounting, "slurmctld"] if is_controller(want) else []), "slurmd"]


# --- the phases ------------------------------------------------------------------------------------


def validate(phase):
    """Check key, controller, existing configuration, packages, GPU files and cgroups; changes nothing."""
    want = phase.want
    if want["munge_key_problem"]:
        phase.problem(*want["munge_key_problem"])
    before = fact().get("controller", want["controller"])
    if before != want["controller"]:
        phase.problem(
            "slurmctld's node",
            f"{before}, as before",
            want["controller"],
            f"set slurm_cluster_controller to {before}'s host: elsewhere the queue would be lost; to move it, copy "
            f"{want['state_dir']} and remove {FACT} on every node",
        )
    path = os.path.join(want["conf_dir"], "slurm.conf")
    text = read(path)
    if text is not None and not text.startswith(MARK):
        phase.problem(
            path,
            "none, or this role's",
            "a file of another origin",
            "this cluster has its own Slurm: set slurm_cluster_enabled: false, or move the file away",
        )
    missing = missing_packages(want)
    if missing and not program("apt-get"):
        phase.problem(
            "Slurm and munge",
            f"installed: {', '.join(missing)}",
            "not installed, and no apt-get here",
            "put them into the node's image, the same version on every node",
        )
    absent = [n for n in range(want["gpus"]) if not os.path.exists(f"{want['gpu_device']}{n}")]
    if absent:
        phase.problem(
            "GPU files",
            f"{want['gpus']} of {want['gpu_device']}N",
            f"{want['gpus'] - len(absent)}",
            "load the driver, or set slurm_cluster_gpus and slurm_cluster_gpu_device",
        )
    models = gpu_models()
    # As AutoDetect reads them: Slurm drains a node whose GPUs have another type than it finds.
    names = {model.lower().replace(" ", "_") for model in models}
    if want["gpus"] and any(want["gpu_type"].lower() not in name for name in names):
        phase.problem(
            "slurm_cluster_gpu_type",
            f"a part of {' and '.join(sorted(names))}, as the driver names the GPUs",
            want["gpu_type"],
            f"leave it out, or set {gpu_type(models) or 'what they have in common'}",
        )
    if want["proctrack"] == "cgroup" and not cgroup_ready():
        phase.problem(
            "cgroup hierarchy",
            "writable, for proctrack/cgroup",
            "read-only or not mounted",
            "set slurm_cluster_proctrack: linuxproc (jobs are then not confined)",
        )
    # Newer versions write a number of the cluster behind its name: "shakedown|2761".
    cluster = (read(os.path.join(want["state_dir"], "clustername")) or "").partition("|")[0].strip()
    if is_controller(want) and cluster and cluster != want["cluster_name"]:
        phase.problem(
            f"cluster name in {want['state_dir']}",
            want["cluster_name"],
            cluster,
            "keep the name: with another one slurmctld does not start, and the queue would be lost",
        )
    phase.done.append("Slurm can be set up here")


def missing_packages(want):
    """The Debian packages whose programs, or library, are not installed on this node."""
    left_out = () if is_controller(want) else ON_CONTROLLER
    left_out += () if want["accounting"] else FOR_ACCOUNTING
    missing = [package for name, package in PACKAGES.items() if name not in left_out and not program(name)]
    return missing + ([] if glob.glob(PMIX) else [PMIX_PACKAGE])


def install(phase):
    """Install the packages; on slurmctld's node create a munge key if none is given. facts: observed. Raises Stop."""
    want = phase.want
    missing = missing_packages(want)
    if missing and phase.change("packages", None, " ".join(sorted(missing))):
        argv = ["apt-get", "install", "--yes", "--no-install-recommends", "--option=DPkg::Lock::Timeout=120", *missing]
        # Offline: the packages would start daemons that have no configuration yet; a newer slurmd waits 90 s for one.
        env = {"DEBIAN_FRONTEND": "noninteractive", "SYSTEMD_OFFLINE": "1"}
        outcome = phase.run(argv, 600, env=env)
        if not outcome.ok and "dpkg --configure -a" in outcome.stderr:  # an earlier run was killed during installation
            phase.run(["dpkg", "--configure", "-a"], 600, env=env)
            outcome = phase.run(argv, 600, env=env)
        if not outcome.ok:
            raise Stop("packages", " ".join(missing), outcome.last_line, "see `apt-get install` on the node")
    if is_controller(want) and not phase.secrets.get("munge_key") and not os.path.exists(MUNGE_KEY):
        write_key(phase, os.urandom(128))
    phase.facts["observed"] = observe(phase)
    phase.done.append(f"Slurm {phase.facts['observed']['version'] or 'would be installed'}")


def write_key(phase, key):
    """Write the munge key (bytes) and stop munged, which must not run meanwhile; returns whether that is a change."""
    try:
        with open(MUNGE_KEY, "rb") as file:
            old = file.read()
    except FileNotFoundError:
        old = None
    if old == key:
        return False
    if phase.change(MUNGE_KEY, "(secret)" if old else None, "(another secret)" if old else "(secret)"):
        # Killed between stop and start, munged is down: the next run starts it, with the new key.
        phase.run(["systemctl", "stop", "munge"], 60)
        owner = pwd.getpwnam("munge")
        os.makedirs(os.path.dirname(MUNGE_KEY), mode=0o700, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".munge.key.", dir=os.path.dirname(MUNGE_KEY))
        with os.fdopen(handle, "wb") as file:
            file.write(key)
            os.fchmod(file.fileno(), 0o600)
            os.fchown(file.fileno(), owner.pw_uid, owner.pw_gid)
        os.replace(partial, MUNGE_KEY)
    return True


def configure(phase):
    """Write key and configuration, start or reload the daemons, wait for registration, and publish slurm.fact.

    Raises Stop where a daemon does not start or a node's hardware is unknown.
    """
    want = phase.want
    equal_versions(phase, want)
    for kind in ("prolog", "epilog"):
        if want[kind] and not os.access(want[kind], os.X_OK) and not phase.check:
            phase.problem(
                f"slurm_cluster_{kind}",
                f"an executable file at {want[kind]}",
                "none",
                "install it first (the role slurm_prolog does): Slurm drains a node whose prolog is missing",
            )
    expected = files(want)
    if phase.problems:
        return
    new_key = bool(phase.secrets.get("munge_key")) and write_key(phase, base64.b64decode(phase.secrets["munge_key"]))
    before = {name: read(os.path.join(want["conf_dir"], name)) for name in expected}
    applied = fact().get("files", {})
    known = all(before[name] is not None and applied.get(name) == sha256(before[name]) for name in expected)
    # The daemons may not have read the files that a killed run wrote.
    action = how_to_apply(before, expected) if known else "restart"
    own_keys(phase)
    for folder, mode in ((want["state_dir"], 0o700), (SPOOL, 0o755)):
        own_folder(phase, folder, mode)
    for name, content in expected.items():
        mode, owner = owned(name)
        phase.write(os.path.join(want["conf_dir"], name), content, mode, owner=owner)
    found, _ = state_of(phase, want["node"])
    start(phase, want, "restart" if new_key else action, unheard=bool(found) and hung(*found) and "*" in found[0])
    if not phase.check:
        wait_until_registered(phase, want)
    if phase.problems:
        return
    controller = next(node for node in want["nodes"] if node["name"] == want["controller"])
    published = {
        "cluster": want["cluster_name"],
        "controller": controller["name"],
        "files": {name: sha256(content) for name, content in expected.items()},
        "gpus": want["gpus"],
        "gres": gres(want, observed(want)),
        "node": want["node"],
        "partition": want["partition"],
        "version": observed(want).get("version", "") or fact().get("version", ""),
    }
    phase.write(FACT, json.dumps(published, indent=1, sort_keys=True) + "\n")
    resume(phase, want)
    phase.done.append(f"{want['node']} of {counted(len(want['nodes']), 'node')} is configured")


def own_keys(phase):
    """Mode and owner of the munge key and its folder, and of Slurm's; returns whether munged's differ.

    munged does not start with a key that others may read or replace.
    """
    phase.own(phase.want["conf_dir"], None, remedy=SETUP)
    return any(
        [phase.own(os.path.dirname(MUNGE_KEY), None, "munge", SETUP), phase.own(MUNGE_KEY, 0o600, "munge", SETUP)]
    )


def owned(name):
    """(mode, owner) of a configuration file; slurmdbd refuses one that others may read, or that is not its own."""
    return (0o600, "slurm") if name == "slurmdbd.conf" else (0o644, None)


def observed(want):
    """The entry `observed` of this node, {} without one."""
    return next((node["observed"] for node in want["nodes"] if node["name"] == want["node"]), {})


def equal_versions(phase, want):
    """Record a problem where this node's version of Slurm differs from the controller's."""
    controller = next((node["observed"] for node in want["nodes"] if node["name"] == want["controller"]), {})
    theirs, ours = controller.get("version", ""), observed(want).get("version", "")
    if theirs and ours and theirs != ours:
        phase.problem(
            "Slurm version", f"{theirs}, as {want['controller']} has", ours, "install one version on every node"
        )


def own_folder(phase, path, mode):
    """Create the folder `path` with `mode` for the user slurm; neither exists on a bare node in check mode."""
    if os.path.isdir(path):
        phase.own(path, mode, "slurm")
    elif phase.change(path, None, f"folder of slurm, mode {mode:04o}"):
        os.makedirs(path, exist_ok=True)
        os.chown(path, *ids("slurm"))
        os.chmod(path, mode)


def start(phase, want, action, unheard=False):
    """Enable all daemons and make them use the files on disk; `action` is "", "reload" or "restart". Raises Stop.

    `unheard`: Slurm has set this node DOWN and hears nothing of it. It asks such a node only every 100 s, while a
    slurmd that starts registers at once. It is not reloaded before: what is then started would not hear of a stop.
    """
    found = services(phase, units(want))
    for name in units(want):
        if name == "slurmdbd":
            database(phase)
        active, enabled = found[name]
        do = action if name not in ("munge", "mariadb") else ""
        if active != "active":
            do = "restart"
        elif name == "slurmd" and unheard:
            active, do = "active, not responding to slurmctld", "restart"
        if enabled != "enabled" and phase.change(f"{name}.service at boot", enabled or None, "enabled"):
            phase.run(["systemctl", "enable", name], 60)
        if do and phase.change(f"{name}.service", active or None, f"active ({do})"):
            # A slurmd that never reached slurmctld ignores SIGTERM; systemd kills it after 90 s.
            outcome = phase.run(["systemctl", do, name], 200)
            if not outcome.ok:
                raise Stop(f"{name}.service", "running", outcome.last_line, f"see `journalctl -u {name}`")
        if name == "slurmdbd":
            add_cluster(phase, want)


def database(phase):
    """Create slurmdbd's database and its user, whom the socket identifies: there is no password. Raises Stop."""
    ask = ["mariadb", "--batch", "--skip-column-names", "--execute"]
    seen = phase.run([*ask, f"SHOW GRANTS FOR slurm@localhost; USE {DATABASE}"], 30)
    if seen.ok and f"`{DATABASE}`.*" in seen.stdout.replace("\\_", "_"):
        return
    if phase.change(f"database {DATABASE}", None, "for the user slurm"):
        done = phase.run(
            [
                *ask,
                f"CREATE DATABASE IF NOT EXISTS {DATABASE}; "
                "CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket; "
                f"GRANT ALL ON {DATABASE}.* TO slurm@localhost",
            ],
            60,
        )
        if not done.ok:
            raise Stop("MariaDB", f"a database {DATABASE}", done.last_line, "see `journalctl -u mariadb`")


def clusters(phase):
    """(the clusters that slurmdbd knows as {name: host of its slurmctld}, "") or (None, why it does not answer)."""
    outcome = phase.run(["sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=Cluster,ControlHost"], 20)
    return (dict(line.split("|") for line in outcome.stdout.split()) if outcome.ok else None), outcome.last_line


def add_cluster(phase, want):
    """Add the cluster to slurmdbd once it answers: slurmctld does not start without. Raises Stop after `settle_s`."""
    end = time.monotonic() + want["settle_s"]
    found, reason = clusters(phase)
    while found is None and not phase.check and time.monotonic() < end:  # it creates its tables before it listens
        time.sleep(0.5)
        found, reason = clusters(phase)
    if found is None and not phase.check:
        raise Stop("slurmdbd", f"answers within {want['settle_s']} s", reason, "see `journalctl -u slurmdbd`")
    if want["cluster_name"] in (found or {}):
        return
    # A newer slurmctld that ran without slurmdbd has given itself a number there, and would not start with the one that
    # slurmdbd gives it. It writes the file anew; that the name is ours was checked by `validate`.
    phase.remove(os.path.join(want["state_dir"], "clustername"))
    if phase.change(f"cluster {want['cluster_name']} in slurmdbd", None, "added"):
        added = phase.run(["sacctmgr", "--immediate", "add", "cluster", want["cluster_name"]], 60)
        if not added.ok:
            raise Stop("cluster in slurmdbd", want["cluster_name"], added.last_line, "see `journalctl -u slurmdbd`")


def settled(phase, want, is_so):
    """The result of `state_of` once `is_so(state)` is True, or after the time limit `settle_s`."""
    end = time.monotonic() + want["settle_s"]
    while True:
        found, reason = state_of(phase, want["node"])
        if (found and is_so(found[0])) or time.monotonic() > end:
            return found, reason
        time.sleep(0.5)


def registered(state):
    """Whether slurmctld knows a node in this `state`, and has an answer of it."""
    return not state.startswith("unk") and "*" not in state


def wait_until_registered(phase, want):
    """Wait until slurmd is registered with slurmctld; records a problem after the time limit."""
    found, reason = settled(phase, want, registered)
    if found and registered(found[0]):
        return
    detail = last_error(phase, "slurmd") or (last_error(phase, "slurmctld") if is_controller(want) else "")
    phase.problem(
        "registration with slurmctld",
        f"within {want['settle_s']} s",
        (judge(*found)[0] if found else reason) + (f"; last error: {detail}" if detail else ""),
        "see `journalctl -u slurmd`; is another munge key or a firewall in the way (ports 6817, 6818)?",
    )


def resume(phase, want):
    """Resume this node where Slurm has it DOWN since it did not respond, and every check of it is good now.

    What is not good is left to `verify`, which names it together with the state. A new slurm.conf is waited for:
    slurmctld's node, which this same play configures, may be about to have it read.
    """
    found, _ = state_of(phase, want["node"])
    if not found or not hung(*found):
        return
    end = time.monotonic() + want["settle_s"]
    while not read_by_slurmctld(phase.run(["scontrol", "show", "config"], 20).stdout) and time.monotonic() < end:
        time.sleep(0.5)
    if not also(phase, "health", {"health": health}):
        return
    argv = ["scontrol", "update", f"nodename={want['node']}", "state=resume"]
    words = f"DOWN in Slurm, reason: {found[1]} (NOT_RESPONDING)"
    if phase.change(f"{want['node']} in Slurm", words, f"resumed with `{' '.join(argv)}`"):
        done = phase.run(argv, 20)
        if not done.ok:
            raise Stop("node in Slurm", "resumed", done.last_line, f"see `scontrol show node {want['node']}`")
        phase.warn(f"was {words}; every check of it is good: resumed with `{' '.join(argv)}`")


def verify(phase):
    """Check daemons, munge, clock, configuration and the node's state, with a job if asked for; changes nothing.

    facts: clock_behind_controller_s, version, state.
    """
    if health(phase):
        node_is_up(phase, phase.want)
    phase.done.append("Slurm accepts jobs here")


def health(phase):
    """Check all but the node's state in Slurm; returns whether slurmctld answers. facts as in `verify`."""
    want = phase.want
    found = services(phase, units(want))
    if own_keys(phase) and found["munge"][0] != "active":
        return False  # munged refuses such a key, and nothing works without it
    for name, (active, _) in found.items():
        if active != "active":
            phase.problem(
                f"{name}.service", "active", active or "not found", f"see `journalctl -u {name}`, then {SETUP}"
            )
    if not is_controller(want) and services(phase, ["slurmctld"])["slurmctld"][0] == "active":
        phase.problem(
            "slurmctld.service",
            f"on {want['controller']} alone",
            "active here too",
            "systemctl disable --now slurmctld",
        )
    munge_round_trip(phase)
    same_key_and_time(phase, want)
    for name, digest in fact().get("files", {}).items():
        text = read(os.path.join(want["conf_dir"], name))
        if text is None or sha256(text) != digest:
            found = "none" if text is None else "edited since"
            phase.problem(os.path.join(want["conf_dir"], name), "as configured", found, SETUP)
    for name in fact().get("files", {}):
        phase.own(os.path.join(want["conf_dir"], name), *owned(name), SETUP)
    for path in (want["state_dir"], SPOOL):
        phase.own(path, 0o700 if path == want["state_dir"] else 0o755, "slurm", SETUP)
    phase.own(FACT, 0o644, remedy=SETUP)
    if want["accounting"] and is_controller(want):
        found, reason = clusters(phase)
        if not (found or {}).get(want["cluster_name"]):
            shown = reason if found is None else ", ".join(found) or "none"
            phase.problem(
                "cluster that slurmdbd knows, with its slurmctld",
                want["cluster_name"],
                shown,
                f"see `journalctl -u slurmdbd`, then {SETUP}",
            )
    return cluster_answers(phase, want)


def munge_round_trip(phase):
    """Record a problem where this node cannot decode its own munge credential."""
    minted = phase.run(["munge", "--no-input"], 20)
    opened = phase.run(["unmunge"], 20, input=minted.stdout) if minted.ok else minted
    if not opened.ok:
        phase.problem("munge round trip", "a credential that opens", opened.last_line, "see `systemctl status munge`")


def same_key_and_time(phase, want):
    """Check key and clock with a munge credential of the controller, which has the time just before this call.

    facts: clock_behind_controller_s.
    """
    minted = want.get("credential") or {}
    if minted.get("rc") != 0:
        found = (minted.get("stderr") or minted.get("msg") or "none").strip().splitlines()[-1]
        phase.problem("munge credential of the controller", "one", found, f"repair munge on {want['controller']} first")
        return
    opened = phase.run(["unmunge"], 20, input=minted["stdout"])
    moments = unmunged(opened.stdout)
    remedy = f"{SETUP}: it distributes the key to all nodes"
    if not opened.ok:
        if "rewound" in opened.last_line.lower() or "expired" in opened.last_line.lower():
            remedy = "set the clock (chrony or ntp)"
        phase.problem("munge key", f"that of {want['controller']}", opened.last_line, remedy)
    elif len(moments) == 2:
        skew = moments["DECODE_TIME"] - moments["ENCODE_TIME"] - int(time.monotonic() - STARTED)
        phase.facts["clock_behind_controller_s"] = -skew
        if abs(skew) > want["clock_skew_s"]:
            phase.problem(
                "clock",
                f"within {want['clock_skew_s']} s of {want['controller']}",
                f"{skew:+d} s",
                "set the clock (chrony or ntp)",
            )


def cluster_answers(phase, want):
    """Whether slurmctld answers; records a problem if not, or if its configuration differs from this node's.

    facts: version.
    """
    pinged = phase.run(["scontrol", "ping"], 20)
    if not re.search(r"\bis UP\b", pinged.stdout):
        down = re.search(r"Slurmctld.* is (\w+)", pinged.stdout)
        phase.problem(
            f"slurmctld on {want['controller']}",
            "UP",
            down.group(1) if down else pinged.last_line,
            "see `journalctl -u slurmctld` there; a node with another munge key sees it as DOWN",
        )
        return False
    shown = phase.run(["scontrol", "show", "config"], 20).stdout
    phase.facts["version"] = config(shown).get("SLURM_VERSION", "")
    if not read_by_slurmctld(shown):
        phase.problem("slurm.conf", "that which slurmctld has read", "another one", f"{SETUP} on all nodes")
    return True


def node_is_up(phase, want):
    """Record a problem where the node accepts no jobs in Slurm; else run a job if asked for. facts: state."""
    # After a restart, slurmctld needs a few seconds until it knows the state of its nodes; and a node that was resumed
    # does "not answer" until it has been asked.
    found, reason = settled(phase, want, lambda state: state.startswith("down") or registered(state))
    shown, reserved = judge(*found) if found else (reason, False)
    phase.facts["state"] = slurm_states.read(found[0])[0] if found else "unknown"
    if reserved:
        phase.warn(f"in a reservation ({found[0]}): only its jobs start here{': ' + found[1] if found[1] else ''}")
        return
    if shown and found and hung(*found):
        phase.problem(
            "node in Slurm",
            "up",
            f"{shown} (NOT_RESPONDING)",
            f"{SETUP}: it resumes the node where every check of it is good",
        )
    elif shown:
        phase.problem(
            "node in Slurm",
            "up",
            shown,
            f"fix the cause, then `scontrol update nodename={want['node']} state=resume`; no role does that",
        )
    elif want["verify_job"]:
        one_job(phase, want)


def one_job(phase, want):
    """Run a job of one task; a warning where none starts within 10 s, since others use the node or wait for it."""
    argv = ["srun", f"--nodelist={want['node']}", "--nodes=1", "--ntasks=1", "--immediate=10", "--time=1"]
    outcome = phase.run([*argv, "--job-name=verify", "true"], want["verify_job_limit_s"])
    if outcome.ok:
        phase.done.append("a job ran")
    elif "busy" in outcome.stderr or "immediate" in outcome.stderr.lower():
        phase.warn("no job was tried: none started within 10 s (see `squeue`)")
    else:
        phase.problem("a job of one task", "done", outcome.last_line, "see `journalctl -u slurmd`")


PHASES = {"validate": validate, "install": install, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
