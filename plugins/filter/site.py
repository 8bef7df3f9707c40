"""Jinja filters of the playbooks."""

from __future__ import annotations

import re
from pathlib import Path

# Ansible 2.19 puts a chain of its own messages before the cause.
_CHAIN = re.compile(
    r"^(Task failed|Action failed|Module failed|Finalization of task args for '[^']*' failed|"
    r"Error while resolving value for '[^']*'|The (lookup|filter) plugin '[^']*' failed)[:.]\s*"
)

ROLES = Path(__file__).resolve().parents[2] / "roles"
# The results that roles register for the phases that may change a node. (NCCL is built before the roles in question.)
_PROVISIONED = [
    f"{path.parent.name}_{phase}_result" for path in ROLES.glob("*/tasks") for phase in ("install", "configure")
]


def why(result: dict) -> str:
    """The reason of a failed task's `result`, in one line."""
    text = " ".join(str(result.get("msg") or result.get("stderr") or "failed without output").split())
    while match := _CHAIN.match(text):
        text = text[match.end() :]
    return text


# Ansible's two spellings of how a host is reached; where both are set, it takes the first of these.
_SPELLINGS = {
    "host": ("ansible_ssh_host", "ansible_host"),
    "port": ("ansible_ssh_port", "ansible_port"),
    "user": ("ansible_ssh_user", "ansible_user"),
    "key": ("ansible_ssh_private_key_file", "ansible_private_key_file"),
}


def reached(variables: dict, what: str, default: object = "") -> object:
    """The "host", "port", "user" or "key" by which Ansible reaches the host with these `variables`."""
    values = (variables.get(name) for name in _SPELLINGS[what])
    return next((value for value in values if value is not None), default)


def nodes_named_twice(names: list[str], hostvars: dict) -> list[str]:
    """One line for each alias or address that two of the nodes `names` share."""
    lines = []
    for variable in ("runner_alias", "ansible_host"):
        holders: dict[tuple, str] = {}
        for name in names:
            is_host = variable == "ansible_host"
            value = reached(hostvars[name], "host", None) if is_host else hostvars[name].get(variable)
            # Several nodes may have one address with different ports.
            port = reached(hostvars[name], "port", None) if is_host else None
            first = holders.setdefault((value, port), name)
            if value is not None and first != name:
                lines.append(f"{first} and {name} have the same {variable} {value}: give each its own")
    return lines


def differing_roles(names: list[str], hostvars: dict) -> list[str]:
    """One line for each cluster-wide role that is enabled on some of the nodes `names` and disabled on others."""
    lines = []
    for role in ("nccl_build", "ssh_mesh", "slurm_cluster"):
        by_value: dict[str, str] = {}
        for name in names:
            by_value.setdefault(str(hostvars[name].get(f"{role}_enabled")).lower(), name)
        if len(by_value) > 1:
            nodes = " and ".join(by_value.values())
            lines.append(f"{role}_enabled differs between {nodes}: set it for the group gpu_nodes, or use --limit")
    return lines


def without_gpus(names: list[str], hostvars: dict) -> str:
    """Why roles that need GPUs are off: none of the nodes `names` has any, as role cuda_check has just found.

    Empty where one has, where the inventory says that they must have some, and where cuda_check did not run.
    """
    found = []
    for name in names:
        results = [hostvars[name].get(f"cuda_check_{phase}_result") or {} for phase in ("verify", "validate")]
        found.append(next((result for result in results if result and not result.get("skipped")), {}))
    return "no NVIDIA GPU here" if found and all("off" in result for result in found) else ""


def installed(nodes: list[dict], role: str) -> list[dict]:
    """The facts of the phase install of `role`, for each of `nodes` (their variables) that has them in this run.

    They come from the phase validate where that found nothing to install.
    """
    found = []
    for variables in nodes:
        install, validate = (variables.get(f"{role}_{phase}_result") or {} for phase in ("install", "validate"))
        facts = install.get("facts") or (validate["facts"] if validate.get("also") else None)
        found += [facts] if facts else []
    return found


def verified(nodes: list[dict], role: str) -> bool:
    """Whether `role` is already verified on all of `nodes` (their variables), by calls that found nothing to configure.

    True only once, and only if no role has installed or configured anything in this run: a second verification, or one
    after a change on any node, runs again.
    """
    return not any(
        f"{role}_verify_result" in variables
        or not (variables.get(f"{role}_configure_result") or {}).get("also")
        or any((variables.get(name) or {}).get("changed") for name in _PROVISIONED)
        for variables in nodes
    )


class FilterModule:
    """The plugin, as Ansible loads it."""

    def filters(self):
        """{name in templates: function}."""
        return {
            "why": why,
            "reached": reached,
            "nodes_named_twice": nodes_named_twice,
            "differing_roles": differing_roles,
            "without_gpus": without_gpus,
            "installed": installed,
            "verified": verified,
        }
