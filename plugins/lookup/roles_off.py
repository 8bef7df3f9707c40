"""The roles that playbooks do not run on a node, and why: `lookup('roles_off')`."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: roles_off
author: Shakedown
short_description: The roles that are switched off for a node, with the reason of each
description:
  - A role is switched off by C(<role>_enabled). Its default is whether C(<role>_off), a reason, is empty.
options: {}
"""

ROLES = Path(__file__).resolve().parents[2] / "roles"


def roles() -> list[str]:
    """The names of all roles, sorted."""
    return sorted(path.parents[1].name for path in ROLES.glob("*/tasks/main.yml"))


def roles_off(variables: dict) -> dict[str, str]:
    """{role: reason} of the roles that these variables of a node switch off, by their defaults or the inventory."""
    off = {}
    for role in roles():
        if not boolean(variables.get(f"{role}_enabled", True), strict=False):
            off[role] = variables.get(f"{role}_off") or "not enabled in the inventory"
    return off


class LookupModule(LookupBase):
    """The plugin, as Ansible loads it."""

    def run(self, terms, variables=None, **kwargs):
        """[{role: reason}] of the node whose `variables` these are."""
        names = [f"{role}_{word}" for role in roles() for word in ("enabled", "off")]
        return [roles_off({n: self._templar.template(variables[n]) for n in names if n in variables})]
