#!/usr/bin/python3 -IS
# Written by the Ansible role slurm_prolog; changes made here are lost.
"""Slurm's Prolog and Epilog of this node, by the name of this file: runs the parts of prolog.d or epilog.d.

    prolog           as slurmd starts it. Where a part failed the node is drained with the reason and this ends with 1
    prolog --test    nothing is changed or drained; prints {"parts": [{"name", "verdict", "seconds", "reason"}]}

A part is an executable NN-name; parts run in numeric order, each with its time limit. It ends with 0 for good or with
1 for bad, the reason as the last line of its stdout. All else, a hung part above all, is `unknown`: that is logged and
drains nothing, for a check that is broken says nothing about the node.

A part finds in its environment what slurmd gives (SLURM_JOB_ID, …), its settings, RUN_AS (prolog or epilog) and
RUN_TEST (0 or 1). Settings: prolog.json beside this file. The log is the journal's, identifier slurm-prolog.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import syslog
import time

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # slurmd gives none
SCONTROL_LIMIT_S = 5


def parts_of(folder):
    """The names of the parts in their order."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    numbered = [(int(found.group()), name) for name in names if (found := re.match(r"\d+(?=-)", name))]
    return [name for _, name in sorted(numbered) if os.access(os.path.join(folder, name), os.X_OK)]


def run(argv, limit_s, env):
    """(return code or None after `limit_s`, last line of stdout). The whole group of a hung part is killed."""
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        return 126, (error.strerror or str(error)).lower()
    try:
        text = child.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        # One that waits for a device cannot be killed; it is the kernel's now.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=0.5)
        return None, ""
    lines = text.decode("utf-8", "replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return child.returncode, said[-1] if said else ""


def verdict_of(rc, said, limit_s):
    """(verdict, reason) of a part that ended with `rc`."""
    if rc is None:
        return "unknown", f"no answer within {limit_s:g} s"
    if rc == 0:
        return "good", said
    if rc == 1:
        return "bad", said or "no reason given"
    return "unknown", f"ended with {rc}" + (f": {said}" if said else "")


def run_parts(kind, home, settings, test):
    """Every part's outcome. What has no time left is unknown: Slurm would kill this driver, and drain the node."""
    folder = os.path.join(home, f"{kind}.d")
    end = time.monotonic() + settings["total_s"]
    outcomes = []
    for name in parts_of(folder):
        own = settings["parts"].get(name, {})
        start = time.monotonic()
        limit_s = min(own.get("limit_s", settings["site_part_limit_s"]), end - start)
        env = dict(os.environ, **own.get("env", {}), PATH=PATH, LC_ALL="C.UTF-8", RUN_AS=kind, RUN_TEST=str(int(test)))
        if limit_s > 0:
            verdict, reason = verdict_of(*run([os.path.join(folder, name)], limit_s, env), limit_s)
        else:
            verdict, reason = "unknown", "no time was left"
        seconds = round(time.monotonic() - start, 3)
        outcomes.append({"name": name, "verdict": verdict, "seconds": seconds, "reason": reason})
    return outcomes


def drain(scontrol, node, reason):
    """Drain this node. One that is drained already keeps its reason: a person may have given it."""
    env = dict(os.environ, PATH=PATH)
    try:
        shown = subprocess.run(
            [scontrol, "--oneliner", "show", "node", node], capture_output=True, timeout=SCONTROL_LIMIT_S, env=env
        )
        if re.search(rb"\bState=\S*DRAIN", shown.stdout):
            return "was drained already"
        argv = [scontrol, "update", f"nodename={node}", "state=drain", f"reason={reason}"]
        done = subprocess.run(argv, capture_output=True, timeout=SCONTROL_LIMIT_S, env=env)
        return "drained" if done.returncode == 0 else "left to slurmd to drain"
    except (OSError, subprocess.TimeoutExpired):
        return "left to slurmd to drain"  # which it does for every prolog that fails, with `Prolog error`


def main():
    kind, home = os.path.basename(__file__), os.path.dirname(os.path.abspath(__file__))
    test = sys.argv[1:] == ["--test"]
    with open(os.path.join(home, "prolog.json"), encoding="utf-8") as file:
        settings = json.load(file)
    outcomes = run_parts(kind, home, settings, test)
    if test:
        print(json.dumps({"parts": outcomes}))
        return 0
    syslog.openlog("slurm-prolog")
    job = os.environ.get("SLURM_JOB_ID", "?")
    for one in outcomes:
        level = {"good": syslog.LOG_INFO, "unknown": syslog.LOG_WARNING}.get(one["verdict"], syslog.LOG_ERR)
        syslog.syslog(level, "{} of job {}: {name} {verdict} in {seconds} s: {reason}".format(kind, job, **one))
    bad = [one for one in outcomes if one["verdict"] == "bad"]
    if not bad:
        return 0
    reason = "; ".join("{} {name}: {reason}".format(kind, **one) for one in bad)
    node = os.environ.get("SLURMD_NODENAME", "")
    syslog.syslog(syslog.LOG_ERR, f"{node} {drain(settings['scontrol'], node, reason)}: {reason}")
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, KeyError) as error:  # a driver that is broken says nothing about the node
        syslog.syslog(syslog.LOG_ERR, f"slurm-prolog: {error!r}")
        print(f"{error!r}", file=sys.stderr)
        sys.exit(2 if "--test" in sys.argv else 0)
