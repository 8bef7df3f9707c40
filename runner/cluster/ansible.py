"""An inventory as Ansible itself reads it: hosts and groups, variables with their templates rendered, and settings.

Ansible is imported in a process of its own (`python -m runner.cluster.ansible SOURCE`), which connects to nothing. Of
variables that are secrets it says no more than that they are set.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from runner.cluster.reach import BECOME, CARRIED, OPTIONS, option_of, relevant
from runner.errors import UsageError
from runner.system import process

# The settings that say how a host is reached, and are not the ssh plugin's.
_GENERAL = {
    "transport": "DEFAULT_TRANSPORT",
    "become": "DEFAULT_BECOME",
    "become_user": "DEFAULT_BECOME_USER",
    "become_method": "DEFAULT_BECOME_METHOD",
    "become_exe": "DEFAULT_BECOME_EXE",
    "become_flags": "DEFAULT_BECOME_FLAGS",
}
# What a template asks may have another answer the next time.
_OUTSIDE = re.compile(r"\b(?:lookup|query|q|now)\s*\(")
_PREFIX = re.compile(r"^(?:\[?ERROR\]?:\s*)+")


def listing(source: str) -> dict[str, Any]:
    """The inventory `source` in the form of `ansible-inventory --list`, with three more keys in `_meta`.

    `settings` are Ansible's for ssh by the plugin's option, from ansible.cfg and the environment, without defaults;
    `lasting` is False where a template asks what may change; `unread` says by host what of it cannot be read, which
    matters only if the host is used. Raises UsageError where Ansible cannot read it.
    """
    env = {**os.environ, "ANSIBLE_INVENTORY_UNPARSED_FAILED": "true", "ANSIBLE_LOCALHOST_WARNING": "false"}
    outcome = process.run([sys.executable, "-P", "-m", "runner.cluster.ansible", source], timeout_s=60, env=env)
    if outcome.rc != 0:
        lines = [line for line in outcome.stderr.splitlines() if "ERROR" in line]
        raise UsageError(f"inventory {source}: {_PREFIX.sub('', lines[0] if lines else outcome.last_line).strip()}")
    return json.loads(outcome.stdout.splitlines()[-1])  # an inventory plugin may have printed something


def files() -> list[Path]:
    """The files in which Ansible looks for its settings, of those that exist."""
    named = os.environ.get("ANSIBLE_CONFIG")
    places = [Path(named)] if named else []
    places += [Path("ansible.cfg"), Path.home() / ".ansible.cfg", Path("/etc/ansible/ansible.cfg")]
    return [path for path in places if path.is_file() and os.access(path, os.R_OK)]


def environment() -> dict[str, str]:
    """The variables of the environment that are settings of Ansible's."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("ANSIBLE_")}


# --- in the process that imports Ansible -----------------------------------------------------------


def _settings() -> dict[str, Any]:
    from ansible import constants
    from ansible.plugins.loader import connection_loader

    connection_loader.get("ssh", class_only=True)  # which makes its options known
    wanted = {option: {"config": option, "plugin_type": "connection", "plugin_name": "ssh"} for option in OPTIONS}
    wanted |= {option: {"config": name} for option, name in _GENERAL.items()}
    found = {option: constants.config.get_config_value_and_origin(**where) for option, where in wanted.items()}
    return {
        option: value if option in _GENERAL else _shown(option, value)
        for option, (value, origin) in found.items()
        if origin != "default"
    }


def _shown(option: str | None, value: Any) -> Any:
    """`value`, unless it may be a secret: then only whether it is set, for which a vault stays closed."""
    if option and (OPTIONS.get(option) or BECOME[option]).secret:
        return bool(value) if value is None or isinstance(value, str | int) else True
    return value


def _is_template(value: Any) -> bool:
    """Whether Ansible would render `value`, or a part of it; a vaulted one is opened, which may raise."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "{{" in text or "{%" in text


class _Inventory:
    """The inventory as Ansible's own classes have it."""

    def __init__(self, source: str) -> None:
        from ansible import constants
        from ansible.cli import CLI
        from ansible.inventory.manager import InventoryManager
        from ansible.parsing.dataloader import DataLoader
        from ansible.vars.hostvars import HostVars
        from ansible.vars.manager import VariableManager

        self.loader = DataLoader()
        vaults = constants.config.get_config_value("DEFAULT_VAULT_IDENTITY_LIST")
        self.loader.set_vault_secrets(CLI.setup_vault_secrets(self.loader, vault_ids=vaults, auto_prompt=False))
        self.inventory = InventoryManager(loader=self.loader, sources=[source])
        self.manager = VariableManager(loader=self.loader, inventory=self.inventory)
        HostVars(self.inventory, self.manager, self.loader)  # gives itself to the manager: templates ask for a bastion
        self.lasting = True
        self.unread: dict[str, str] = {}

    def listed(self) -> dict[str, Any]:
        """The inventory as `listing` returns it."""
        hosts = sorted(self.inventory.get_hosts("all"), key=lambda host: host.name)
        names = {host.name for host in hosts}  # a host called like a group is none to Ansible
        groups = {
            group.name: {
                "hosts": [host.name for host in group.hosts if host.name in names],
                "children": [child.name for child in group.child_groups],
            }
            for group in self.inventory.groups.values()
        }
        hostvars = {host.name: self._variables(host) for host in hosts}
        meta = {"hostvars": hostvars, "settings": _settings(), "lasting": self.lasting, "unread": self.unread}
        return {**groups, "_meta": meta}

    def _variables(self, host: Any) -> dict[str, Any]:
        known = self.manager.get_vars(host=host, include_hostvars=False)
        values = {}
        for name, value in known.items():
            if not (name.startswith("runner_") or relevant(name)):
                # A role's own variable may be a template that only a play can render; a vaulted one is no text.
                if isinstance(value, str | int | float):
                    values[name] = value
                continue
            option = option_of(name)
            try:
                if option is None or (OPTIONS.get(option) or BECOME[option]).fate == CARRIED:
                    value = self._rendered(host, name, value)
                values[name] = _shown(option, value)
            except Exception as error:  # Ansible's own errors, and those of whatever a template calls
                self.unread.setdefault(host.name, f"{name} cannot be rendered: {_line(error)}")
        return values

    def _rendered(self, host: Any, name: str, value: Any) -> Any:
        from ansible.template import Templar

        if not _is_template(value):
            return value
        known = self.manager.get_vars(host=host)
        if _OUTSIDE.search(json.dumps(known[name], default=str)):
            self.lasting = False
        return Templar(loader=self.loader, variables=known).template(known[name])


def _line(error: Exception) -> str:
    from ansible.parsing.vault import AnsibleVaultError

    line = str(error).strip().splitlines()[0]
    return f"{line} Set ANSIBLE_VAULT_PASSWORD_FILE" if isinstance(error, AnsibleVaultError) else line


def _main(source: str) -> None:
    from ansible.plugins.loader import init_plugin_loader

    try:
        init_plugin_loader()
        answer = _Inventory(source).listed()
    except Exception as error:  # whatever an inventory plugin raises
        raise SystemExit(f"ERROR: {_line(error)}") from None
    print(json.dumps(answer, default=str))


if __name__ == "__main__":
    _main(sys.argv[1])
