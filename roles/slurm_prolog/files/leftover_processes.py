#!/usr/bin/python3 -IS
# Written by the Ansible role slurm_prolog; changes made here are lost.
"""Part: processes of users who have no job on this node. The prolog names them; the epilog ends them where asked.

A process belongs to a job if it descends from a slurmstepd of root, or if its cgroup names a Slurm job; all processes
of its user are then left alone. root, system users, services, containers and KEEP_USERS are never looked at.

Environment: KILL (0 or 1), KEEP_USERS (names, by commas), RUN_AS, RUN_TEST, SLURM_JOB_UID.
"""

import contextlib
import os
import pwd
import re
import signal
import sys
import time

# Source: UID_MIN of login.defs(5); Debian policy 9.2.2 (its packages have 60000 to 64999, `slurm` is 64030);
# systemd's "Users, Groups, UIDs and GIDs" (its dynamic users, nobody). A directory's users may lie above.
FIRST_UID, NOT_PEOPLE = 1000, range(60000, 65536)
JOB_CGROUP = re.compile(r"/job_\d+(/|$)", re.M)
# What slurmd and sshd started may be a user's; any other service and any container is its administrator's.
SERVICE_CGROUP = re.compile(
    r"/system\.slice/(?!slurmd[.@]|[^/]*slurmstepd|sshd?[.@])|/kubepods|/machine\.slice/|/docker[/-]"
)


def processes(root="/proc"):
    """{pid: (parent's pid, uid, name, "job", "service" or "" by its cgroup)} of all that still run."""
    found = {}
    for name in os.listdir(root):
        if not name.isdigit():
            continue
        try:
            with open(f"{root}/{name}/stat", encoding="utf-8", errors="replace") as file:
                stat = file.read()
            with open(f"{root}/{name}/cgroup", encoding="utf-8", errors="replace") as file:
                cgroup = file.read()
            uid = os.stat(f"{root}/{name}").st_uid
        except OSError:
            continue  # it ended meanwhile
        # The name stands in parentheses and may itself hold blanks and parentheses.
        title, _, rest = stat.partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        kind = "job" if JOB_CGROUP.search(cgroup) else "service" if SERVICE_CGROUP.search(cgroup) else ""
        if state != "Z":
            found[int(name)] = (int(parent), uid, title, kind)
    return found


def leftovers(found, spared):
    """The pids of users without a job here, as {pid: (uid, name)}. `spared` are uids that are left alone."""

    def of_a_job(pid):
        seen = set()
        while pid in found and pid not in seen:
            seen.add(pid)
            parent, uid, title, kind = found[pid]
            if kind == "job" or (title == "slurmstepd" and uid == 0):
                return True
            pid = parent
        return False

    users = {uid for _, uid, _, _ in found.values()} - set(spared)
    users = {uid for uid in users if uid >= FIRST_UID and uid not in NOT_PEOPLE}
    busy = {uid for pid, (_, uid, _, _) in found.items() if uid in users and of_a_job(pid)}
    people = {pid: one for pid, one in sorted(found.items()) if one[1] in users - busy and one[3] != "service"}
    return {pid: (uid, title) for pid, (_, uid, title, _) in people.items()}


def user(uid):
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def described(pids):
    shown = ", ".join(f"{pid} {name} of {user(uid)}" for pid, (uid, name) in list(pids.items())[:5])
    return shown + (f" and {len(pids) - 5} more" if len(pids) > 5 else "")


def end(pids, list_again):
    """End them, gently first; returns those that are still there."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        for _ in range(10):
            alive = list_again()
            # A number may have been taken by another process meanwhile: same user and name, or it is not this one.
            pids = {pid: who for pid, who in pids.items() if alive.get(pid) == who}
            if not pids:
                return pids
            time.sleep(0.1)
    return pids


def main():
    spared = set()
    for name in filter(None, os.environ["KEEP_USERS"].split(",")):
        with contextlib.suppress(KeyError):  # no such user here
            spared.add(pwd.getpwnam(name).pw_uid)
    starting = os.environ.get("SLURM_JOB_UID", "")
    if os.environ["RUN_AS"] == "prolog" and starting.isdigit():
        spared.add(int(starting))
    found = leftovers(processes(), spared)
    if not found:
        return 0
    if os.environ["RUN_AS"] == "epilog" and os.environ["KILL"] == "1" and os.environ["RUN_TEST"] == "0":
        alive = end(found, lambda: leftovers(processes(), spared))
        print(f"cannot be ended: {described(alive)}" if alive else f"ended: {described(found)}")
        return 1 if alive else 0
    print(f"left over: {described(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
