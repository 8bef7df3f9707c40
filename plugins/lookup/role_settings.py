"""The settings of a role, checked: `lookup('role_settings', 'roce_qos')`."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from ansible.errors import AnsibleLookupError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: role_settings
author: Shakedown
short_description: A role's variables as one dictionary, without the role's prefix
description:
  - Collects the variables that C(meta/argument_specs.yml) of the role names, converts each to its type, and
    refuses a wrong type, a missing value, and any variable with the role's prefix that the role does not know.
options:
  _terms:
    description: Name of one role.
    required: true
"""

ROLES = Path(__file__).resolve().parents[2] / "roles"


def specification(role: str) -> dict:
    """The options of `role` in its meta/argument_specs.yml, by full name."""
    text = (ROLES / role / "meta" / "argument_specs.yml").read_text()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(text, Loader=loader)["argument_specs"]["main"]["options"]


def unknown(role: str, options: dict, names: list[str], roles: list[str]) -> list[str]:
    """One line for each of `names` with the role's prefix that is not in its `options`.

    A name may belong to another role of `roles` with a longer prefix (`slurm` and `slurm_cluster`).
    """
    longer = tuple(f"{other}_" for other in roles if other.startswith(f"{role}_"))
    lines = []
    for name in sorted(names):
        if not name.startswith(f"{role}_") or name in options or (longer and name.startswith(longer)):
            continue
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        lines.append(f"unknown variable {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return lines


def not_text(name: str, option: dict, value: object) -> str | None:
    """An error message where `value` is not text, else None; Ansible's own check accepts anything printable."""
    if option["type"] in ("str", "path") and isinstance(value, dict | list | bool):
        return f"{name}: expected text, found {value!r}"
    return None


class LookupModule(LookupBase):
    """The plugin, as Ansible loads it."""

    def run(self, terms, variables=None, **kwargs):
        """[{variable without the role's prefix: value}] of the one role in `terms`. Raises AnsibleLookupError.

        Beside them `inventory`, the path of the one in use, which remedies name.
        """
        (role,) = terms
        options = specification(role)
        roles = [path.name for path in ROLES.iterdir()]
        # The registered result of a task is a variable too: such names end in _result.
        errors = unknown(role, options, [n for n in variables if not n.endswith("_result")], roles)
        given = {name: variables[name] for name in options if name in variables}
        given = self._templar.template(given)
        errors += [wrong for name, value in given.items() if (wrong := not_text(name, options[name], value))]
        result = ArgumentSpecValidator(options).validate(given)
        errors += [message.replace(" found in", " in") for message in result.error_messages]
        if errors:
            raise AnsibleLookupError("; ".join(errors))
        settings = result.validated_parameters
        sources = variables.get("ansible_inventory_sources") or [""]
        chosen = {name.removeprefix(f"{role}_"): settings.get(name) for name in options}
        return [{"inventory": str(sources[0]), **chosen}]
