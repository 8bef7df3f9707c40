#!/usr/bin/python
"""Module of the role slurm_prolog: the driver of Slurm's prolog and epilog, and its parts.

Besides the role's variables, the settings have `files`: {name: text} of the role's folder files/.
"""

from __future__ import annotations

import json
import os
import re
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.phase import counted, main, read

MARK = "# Written by the Ansible role slurm_prolog; changes made here are lost.\n"
SETUP = "run `runner setup --tags slurm_prolog`"
KINDS = ("prolog", "epilog")
MODULE = "xids.py"  # the parser of kernel logs, which the part 10-gpu-health imports
SPARE_S = 12  # two calls of scontrol at 5 s, and the start of the driver


# --- pure ------------------------------------------------------------------------------------------


def parts(want, nvidia_smi):
    """{kind: {part: (file of the role, time limit in s, environment)}} of the enabled parts."""
    chosen = {kind: {} for kind in KINDS}
    if want["gpu_health"]:
        env = {"GPUS": want["gpus"], "NVIDIA_SMI": nvidia_smi, "XID_WINDOW_S": want["gpu_xid_window_s"]}
        chosen["prolog"]["10-gpu-health"] = ("gpu_health.py", want["gpu_health_limit_s"], env)
    if want["leftover_processes"]:
        env = {"KILL": int(want["leftover_kill"]), "KEEP_USERS": ",".join(want["leftover_keep_users"])}
        for kind in KINDS:
            chosen[kind]["20-leftover-processes"] = ("leftover_processes.py", want["leftover_limit_s"], env)
    if want["huge_pages"] or want["compact_memory"]:
        env = {"HUGE_PAGES": want["huge_pages"], "COMPACT": int(want["compact_memory"])}
        chosen["prolog"]["30-huge-pages"] = ("huge_pages.sh", want["huge_pages_limit_s"], env)
    if want["affinity"]:
        env = {"NVIDIA_SMI": nvidia_smi}
        chosen["prolog"]["40-gpu-cpu-affinity"] = ("affinity.py", want["affinity_limit_s"], env)
    return chosen


OWN_PARTS = ("10-gpu-health", "20-leftover-processes", "30-huge-pages", "40-gpu-cpu-affinity")


def mode_of(text):
    """The mode of a file with this text: only programs are executed."""
    return 0o755 if text.startswith("#!") else 0o644


def programs(want, nvidia_smi):
    """{path: text} of all programs to install, each after what it needs: the drivers, which run the parts, are last."""
    home, chosen = want["dir"], parts(want, nvidia_smi)
    module = {os.path.join(home, MODULE): want["files"][MODULE]} if want["gpu_health"] else {}
    texts = {
        os.path.join(home, f"{kind}.d", name): want["files"][file]
        for kind in KINDS
        for name, (file, _, _) in chosen[kind].items()
    }
    return {**module, **texts, **{os.path.join(home, kind): want["files"]["driver.py"] for kind in KINDS}}


def driver_settings(want, nvidia_smi, scontrol):
    """The text of prolog.json, which files/driver.py reads. A part of both kinds has the same settings in both."""
    chosen = parts(want, nvidia_smi)
    merged = {**chosen["epilog"], **chosen["prolog"]}
    content = {
        "parts": {
            name: {"limit_s": limit_s, "env": {key: str(value) for key, value in env.items()}}
            for name, (_, limit_s, env) in merged.items()
        },
        "scontrol": scontrol,
        "site_part_limit_s": want["site_part_limit_s"],
        "total_s": want["timeout_s"] - SPARE_S,
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def conf_lines(want):
    """The lines that slurm.conf needs."""
    return [
        f"Prolog={want['dir']}/prolog",
        f"Epilog={want['dir']}/epilog",
        "PrologFlags=Alloc",
        f"PrologEpilogTimeout={want['timeout_s']}",
    ]


def missing_lines(shown, lines):
    """Those of `lines` that are not in effect according to `shown`, the output of `scontrol show config`.

    Slurm may have further PrologFlags, prints a time with its unit (`60 sec` or `60`), and from 24.11 on numbers the
    programs (`Prolog[0]`), of which it may have several.
    """
    values = {}
    for name, _, value in (line.partition("=") for line in shown.splitlines()):
        values.setdefault(re.sub(r"\[\d+\]$", "", name.strip()), []).extend(re.split(r"[,\s]+", value.strip().lower()))
    pairs = ((line, *line.split("=", 1)) for line in lines)
    return [line for line, name, expected in pairs if expected.lower() not in values.get(name, [])]


# --- the phases ------------------------------------------------------------------------------------


def tool(name):
    """The absolute path of a program, since a prolog has no PATH; its future path in /usr/bin if not yet installed."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/local/bin") or f"/usr/bin/{name}"


def drop_in(want):
    """The path of prolog.conf, beside slurm.conf."""
    return os.path.join(os.path.dirname(want["slurm_conf"]), "prolog.conf")


def validate(phase):
    """Check programs, existing files and the parts' time limits; changes nothing."""
    want = phase.want
    if not os.access("/usr/bin/python3", os.X_OK):
        phase.problem("/usr/bin/python3", "present, for the driver", "none", "install the distribution's python3")
    for path in [*(os.path.join(want["dir"], kind) for kind in KINDS), drop_in(want)]:
        text = read(path)
        if text is not None and MARK not in text:
            remedy = "move it into a numbered part, or set slurm_prolog_dir"
            phase.problem(path, "none, or this role's", "a file of another origin", remedy)
    if (want["gpu_health"] or want["affinity"]) and not os.path.exists(tool("nvidia-smi")):
        remedy = "install the driver, or set slurm_prolog_gpu_health and slurm_prolog_affinity to false"
        phase.problem("nvidia-smi", "present", "none", remedy)
    if not want["own_cluster"]:
        for name, path in (("scontrol", tool("scontrol")), ("slurm.conf", want["slurm_conf"])):
            if not os.path.exists(path):
                remedy = "install Slurm first, or let slurm_cluster do it (slurm_cluster_enabled: true)"
                phase.problem(name, f"present at {path}", "none", remedy)
    for kind, chosen in parts(want, "").items():
        needed = sum(limit_s for _, limit_s, _ in chosen.values()) + SPARE_S
        if needed > want["timeout_s"]:
            phase.problem(
                f"time limits of the {kind}'s parts",
                f"at most {want['timeout_s'] - SPARE_S} s together (slurm_prolog_timeout_s less {SPARE_S} s)",
                f"{needed - SPARE_S} s",
                "raise slurm_prolog_timeout_s or lower the parts' limits: slurmd drains a node whose prolog is slow",
            )
    phase.done.append("prolog and epilog can be set up here")


def install(phase):
    """Install the settings, the enabled parts and the drivers; removes this role's other parts."""
    want = phase.want
    texts = programs(want, tool("nvidia-smi"))
    # The settings first: a driver without them does nothing, and parts without them fail.
    phase.write(os.path.join(want["dir"], "prolog.json"), driver_settings(want, tool("nvidia-smi"), tool("scontrol")))
    for path, text in texts.items():
        phase.write(path, text, mode_of(text))
    for kind in KINDS:
        phase.own(os.path.join(want["dir"], f"{kind}.d"), None)
    own = [os.path.join(f"{kind}.d", name) for kind in KINDS for name in OWN_PARTS]
    for path in (os.path.join(want["dir"], name) for name in (*own, MODULE)):
        if path not in texts:
            phase.remove(path)
    number = sum(map(len, parts(want, "").values()))
    phase.done.append(f"{counted(number, 'part')} {'is' if number == 1 else 'are'} installed")


def configure(phase):
    """Write prolog.conf for a site's own Slurm where the settings allow it, and reload the daemons."""
    want = phase.want
    if want["own_cluster"] or not want["manage_conf"]:
        phase.done.append("slurm.conf is not this role's")
        return
    if phase.write(drop_in(want), MARK + "\n".join(conf_lines(want)) + "\n") and not phase.check:
        for unit in ("slurmctld", "slurmd"):
            if phase.run(["systemctl", "is-active", unit], 20).ok:
                phase.run(["systemctl", "reload", unit], 60)


def verify(phase):
    """Check the installed files, run the drivers' own test, and check Slurm's configuration. facts: parts."""
    want = phase.want
    texts = programs(want, tool("nvidia-smi"))
    texts[os.path.join(want["dir"], "prolog.json")] = driver_settings(want, tool("nvidia-smi"), tool("scontrol"))
    for path, text in texts.items():
        found = read(path)
        if found != text:
            state = "none" if found is None else "edited since"
            phase.problem(path, "as installed", state, SETUP)
        else:
            phase.own(path, mode_of(text), remedy=SETUP)
    for kind in KINDS:
        phase.own(os.path.join(want["dir"], f"{kind}.d"), None, remedy=SETUP)  # root runs what lies there
    phase.facts["parts"] = {kind: judged(phase, kind) for kind in KINDS}
    if not want["own_cluster"]:
        lines_in_force(phase, want)
    phase.done.append("prolog and epilog work")


def judged(phase, kind):
    """The outcomes of the parts in the driver's own test; records a problem for each bad one."""
    want = phase.want
    outcome = phase.run([os.path.join(want["dir"], kind), "--test"], want["timeout_s"])
    try:
        outcomes = json.loads(outcome.stdout)["parts"]
    except (ValueError, KeyError):
        phase.problem(f"{kind} --test", "an outcome of each part", outcome.last_line, SETUP)
        return []
    for one in outcomes:
        if one["verdict"] == "bad":
            phase.problem(f"{kind} part {one['name']}", "good", one["reason"], "fix it: the next job drains this node")
        elif one["verdict"] == "unknown":
            phase.warn(f"{kind} part {one['name']} is unknown: {one['reason']}")
    return outcomes


def lines_in_force(phase, want):
    """Record a problem with the lines that a site's slurm.conf lacks; the file itself is never edited."""
    shown = phase.run(["scontrol", "show", "config"], 20)
    if not shown.ok:
        phase.problem("scontrol show config", "an answer", shown.last_line, "see `scontrol ping`")
        return
    missing = missing_lines(shown.stdout, conf_lines(want))
    if not missing:
        return
    lines = [f"include {drop_in(want)}"] if want["manage_conf"] else missing
    phase.problem(
        want["slurm_conf"],
        "in effect: " + ", ".join(missing),
        "not in effect",
        f"add {'this line' if len(lines) == 1 else 'these lines'} on every node, then `scontrol reconfigure`: "
        + " | ".join(lines),
    )


PHASES = {"validate": validate, "install": install, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
