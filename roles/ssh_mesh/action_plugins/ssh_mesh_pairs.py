"""Finds the nodes at fault where one cannot reach another, from what all nodes of the play found; on the controller.

A failed connection has two ends. An end of which another connection works is not at fault: then it is the other end. If
both have one that works, or if neither has and no other connection convicts one of them, nobody is to blame, and both
nodes name the pair.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter

from ansible.plugins.action import ActionBase

FROM, TO = "from", "to"
OPEN = "start sshd there, and see whether its port is open between the nodes"
# What precedes the cause in a line of ssh: the cause alone is the same on every node.
_PREFIX = re.compile(r"^(ssh: connect to host \S+ port \d+|ssh|\S+@\S+): ")


def attribute(pairs, known=()):
    """({(FROM or TO, node)}, [(node, node)]): the ends at fault, and the failed pairs for which no end is.

    `pairs` is {(from, to): whether it works}; (node, node) is a node's connection to itself. `known` are nodes that are
    at fault for another reason: what fails at them needs no other, and no other node is blamed for it.
    """
    works = {end for (one, other), good in pairs.items() if good and one != other for end in ((FROM, one), (TO, other))}
    failed = [pair for pair, good in pairs.items() if not good]
    suspects = {(one, other): {(FROM, one), (TO, other)} - works for one, other in failed if one != other}
    # A connection to itself has one node, whichever end it is.
    alone = {*known, *(one for one, other in failed if one == other)}
    convicted = {end for ends in suspects.values() for end in ends if len(ends) == 1 or end[1] in alone}
    return convicted, [pair for pair, ends in suspects.items() if not ends & convicted and not {*pair} & {*known}]


def remedy(direction, reason, setup):
    """What to do at an end of this direction, about ssh's last line; `setup` is the command that mends the mesh."""
    if "erification failed" in reason or "host key" in reason.lower():
        return f"run {setup}: it names a host key that is not the pinned one"
    if "Permission denied" in reason:
        return f"run {setup}; if that changes nothing, the log of sshd says which file it refuses"
    return OPEN if direction == TO else "see this node's network and firewall"


def verdicts(found, known, aliases, setup):
    """{node: [problem]} of the failures `found`, {from: {to: {ssh's last line: [name of the peer, ...]}}}.

    `known` as in `attribute`; `aliases` are the names by which people know the nodes.
    """
    pairs = {(one, other): not failures for one, peers in found.items() for other, failures in peers.items()}
    ends, unclear = attribute(pairs, known)
    problems = {}

    def reasons(chosen):
        counted = Counter(_PREFIX.sub("", line) for one, other in chosen for line in found[one][other])
        return counted.most_common(1)[0][0] if counted else ""

    for name in {name for _, name in ends} | {one for (one, other), good in pairs.items() if one == other and not good}:
        directions = [direction for direction in (TO, FROM) if (direction, name) in ends]
        mine = [
            pair
            for pair, good in pairs.items()
            if not good and ((TO in directions and pair[1] == name) or (FROM in directions and pair[0] == name))
        ] or [(name, name)]
        tried = sum(pair != (name, name) and name in (pair[1] if TO in directions else pair[0],) for pair in pairs)
        others = sum(pair[0] != pair[1] for pair in mine)
        what = f"ssh {' and '.join(directions)} this node" if directions else "ssh from this node to itself"
        reason = reasons(mine)
        found_text = f"{reason} ({others} of {tried})" if others and len(directions) == 1 else reason
        problems[name] = [_problem(what, found_text, remedy(directions[0] if directions else TO, reason, setup))]
    for one, other in unclear:
        what = f"ssh from {aliases[one]} to {aliases[other]}"
        names = ", ".join(name for hosts in found[one][other].values() for name in hosts)
        advice = "either may be at fault: see the keys, sshd and the firewall of both"
        for name in (one, other):
            problem = _problem(what, f"{reasons([(one, other)])}, as {names}", advice)
            problems.setdefault(name, []).append(problem)
    return problems


def _problem(what, found, advice):
    return {"what": what, "expected": "a session", "found": found, "remedy": advice}


class ActionModule(ActionBase):
    _VALID_ARGS = frozenset(("result", "settings"))
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        answer = super().run(tmp, task_vars)
        hostvars, hosts = task_vars["hostvars"], task_vars["ansible_play_hosts_all"]
        results = {host: hostvars[host].get(self._task.args["result"]) or {} for host in hosts}
        found = {host: (result.get("facts") or {}).get("pairs") or {} for host, result in results.items()}
        # Named already: by Ansible, which does not reach it, or by its own checks.
        known = {host for host, result in results.items() if not result.get("facts") or result.get("failed")}
        aliases = {host: hostvars[host].get("runner_alias", host) for host in hosts}
        inventory = self._task.args["settings"]["inventory"]
        setup = f"`{shlex.join(['runner', 'setup', '-i', inventory, '--tags', 'ssh_mesh'])}`"
        mine = verdicts(found, known, aliases, setup).get(task_vars["inventory_hostname"], [])
        lines = [f"{p['what']}: expected {p['expected']}, found {p['found']} ({p['remedy']})" for p in mine]
        answer.update(changed=False, failed=bool(mine), problems=mine)
        answer["msg"] = "; ".join(lines) or f"compared {len(found)} node{'' if len(found) == 1 else 's'}"
        return answer
