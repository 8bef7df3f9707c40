"""Compares the versions that cuda_check found on all nodes of the play; runs on the controller, without a round trip.

Each node gets its own answer: the nodes that differ from the majority fail; where no value has a majority, nobody is
to blame, and every node gets a warning. Nodes that were not asked, not reached or did not answer take no part.
"""

from __future__ import annotations

from ansible.plugins.action import ActionBase


def fold(names):
    """`node[001-002]` for node001 and node002; plain names where ClusterShell is missing."""
    try:
        from ClusterShell.NodeSet import NodeSet
    except ImportError:
        return ",".join(names)
    return str(NodeSet.fromlist(list(names), resolver=None))


def compare(versions, same):
    """({node: [problem]}, [warning]) of {node: {what: version}}, for each of `same`; "" is an unknown version."""
    problems, warnings = {}, []
    for what in same:
        nodes = {}
        for node, found in versions.items():
            if found.get(what):
                nodes.setdefault(found[what], []).append(node)
        if len(nodes) < 2:
            continue
        most = max(nodes, key=lambda value: len(nodes[value]))
        if 2 * len(nodes[most]) <= sum(map(len, nodes.values())):
            spread = "; ".join(f"{value} on {fold(names)}" for value, names in sorted(nodes.items()))
            warnings.append(f"versions of {what} differ, not identifiable which nodes are wrong: {spread}")
            continue
        expected = f"{most} as on {fold(nodes[most])}"
        remedy = f"give all nodes one version, or leave {what} out of cuda_check_same"
        for value, names in nodes.items():
            for node in names if value != most else ():
                problem = {"what": what, "expected": expected, "found": value, "remedy": remedy}
                problems.setdefault(node, []).append(problem)
    return problems, warnings


class ActionModule(ActionBase):
    _VALID_ARGS = frozenset(("result", "settings"))
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        answer = super().run(tmp, task_vars)
        hostvars, versions = task_vars["hostvars"], {}
        for host in task_vars["ansible_play_hosts_all"]:
            result = hostvars[host].get(self._task.args["result"]) or {}
            if found := (result.get("facts") or {}).get("versions"):
                versions[hostvars[host].get("runner_alias", host)] = found
        problems, warnings = compare(versions, self._task.args["settings"]["same"])
        mine = problems.get(task_vars.get("runner_alias", task_vars["inventory_hostname"]), [])
        lines = [f"{p['what']}: expected {p['expected']}, found {p['found']} ({p['remedy']})" for p in mine]
        answer.update(changed=False, failed=bool(mine), problems=mine)
        answer["msg"] = "; ".join(lines) or f"compared {len(versions)} node{'' if len(versions) == 1 else 's'}"
        if warnings:
            answer["warnings"] = warnings
        return answer
