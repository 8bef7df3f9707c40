"""The settings of slurm_cluster for one node, with the nodes of the whole cluster and without the secret."""

from __future__ import annotations

from ansible.errors import AnsibleLookupError
from ansible.plugins.loader import lookup_loader
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: slurm_cluster_settings
author: Shakedown
short_description: Settings of the role slurm_cluster with the cluster's nodes
description:
  - The role's variables without its prefix, the node's own name, the controller's, and one entry a node of the
    cluster with its address and what the role saw there in this run.
options:
  _terms:
    description: None.
"""

# What tasks/ register with `observed` among the facts: install, or validate where nothing was to be installed.
READ = ("slurm_cluster_install_result", "slurm_cluster_validate_result")


def node_name(host: str, variables: dict, kind: str) -> str:
    """The NodeName of `host`: its alias, where it has one and aliases are asked for."""
    return variables.get("runner_alias", host) if kind == "alias" else host


def nodes(hosts: list[str], hostvars: dict, kind: str) -> list[dict]:
    """One entry a host, in the inventory's order; `observed` is {} for a host that was not asked in this run."""
    entries = []
    for host in hosts:
        variables = hostvars[host]
        facts = [(variables.get(name) or {}).get("facts") or {} for name in READ]
        entries.append(
            {
                "name": node_name(host, variables, kind),
                "address": variables.get("ansible_ssh_host", variables.get("ansible_host", host)),
                "observed": next((found["observed"] for found in facts if found.get("observed")), {}),
            }
        )
    return entries


class LookupModule(LookupBase):
    def run(self, terms, variables=None, **kwargs):
        role_settings = lookup_loader.get("role_settings", loader=self._loader, templar=self._templar)
        (settings,) = role_settings.run(["slurm_cluster"], variables)
        for name in ("munge_key", "munge_key_file", "munge_key_generate"):
            del settings[name]
        group, controller = settings.pop("group"), settings["controller"]
        hosts = list(variables["groups"].get(group, []))
        if controller not in hosts:
            raise AnsibleLookupError(
                f"slurm_cluster_controller: expected a host of the group {group}, found {controller}"
            )
        kind = settings.pop("node_names")
        hostvars = variables["hostvars"]
        settings["nodes"] = nodes(hosts, hostvars, kind)
        names = [node["name"] for node in settings["nodes"]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise AnsibleLookupError(f"slurm_cluster: expected one node a name, found {', '.join(twice)} twice")
        here = variables["inventory_hostname"]
        settings["node"] = node_name(here, hostvars[here], kind)
        settings["controller"] = node_name(controller, hostvars[controller], kind)
        return [settings]
