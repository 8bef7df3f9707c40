"""`runner check` of this machine, a newcomer's second command: green where nothing is missing, else what is wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from runner.system import process

RUNNER = Path(sys.executable).with_name("runner")
NVIDIA_SMI = ROOT / "molecule" / "resources" / "stand-ins" / "nvidia-smi"
WORKSTATION = {
    "driver": "550.163.01",
    "cuda": "12.4",
    "count": 1,
    "all": {
        "Product Name": "NVIDIA GeForce RTX 4090",
        "ECC Mode/Current": "N/A",
        "Persistence Mode": "Disabled",
        "Fabric/State": "N/A",
        "Fabric/Status": "N/A",
    },
}


def check(tmp_path, gpus=None, source="local"):
    """The exit code and the output of the command; with `gpus`, of a machine on which nvidia-smi answers so."""
    path = os.environ["PATH"]
    if gpus is not None:
        (tmp_path / "gpus.json").write_text(json.dumps(gpus))
        # Ansible starts modules in an environment of its own, but for PATH.
        script = (
            f'#!/bin/sh\n# A stand-in for nvidia-smi.\nNVIDIA_SMI_STATE={tmp_path}/gpus.json exec {NVIDIA_SMI} "$@"\n'
        )
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
        path = f"{tmp_path}:{path}"
    env = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(tmp_path)}
    done = process.run([str(RUNNER), "check", "-i", source], timeout_s=120, env=env, cwd=str(tmp_path))
    return done.rc, done.stdout


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_green_and_says_what_does_not_apply_to_it(tmp_path):
    code, printed = check(tmp_path)
    assert code == 0 and "FAILED" not in printed and "1 of 1 node as expected" in printed
    assert "off: cuda_check: no NVIDIA GPU here" in printed and "ssh_mesh: there is one node" in printed


def test_a_good_workstation_is_green_whatever_a_cluster_would_have(tmp_path):
    code, printed = check(tmp_path, WORKSTATION)
    assert code == 0 and "FAILED" not in printed and "expected" not in printed.replace("as expected", "")
    assert "off: cuda_check" not in printed


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"lost": [0]}, "cuda_check: nvidia-smi: expected status 0, found status 15"),
        ({"gpus": {"0": {"Remapped Rows/Pending": "Yes"}}}, "cuda_check: pending row remap or page retirement of GPU"),
    ],
)
def test_a_bad_machine_is_told_what_is_really_wrong_and_nothing_else(tmp_path, broken, said):
    code, printed = check(tmp_path, {**WORKSTATION, **broken})
    lines = [line for line in printed.splitlines() if line.startswith("node001: ") and "warning" not in line]
    assert code == 1 and len(lines) == 1 and said in lines[0]


def test_a_remedy_can_be_pasted_and_names_this_inventory(tmp_path):
    (tmp_path / "my lab").mkdir()
    hosts = "all: {children: {gpu_nodes: {hosts: {localhost: {ansible_connection: local, ansible_host: 127.0.0.1, "
    hosts += "ansible_python_interpreter: '{{ ansible_playbook_python }}', conda_env_enabled: true, "
    (tmp_path / "my lab" / "hosts.yml").write_text(f"{hosts} conda_env_prefix: {tmp_path}/env }}}}}}}}}}\n")
    code, printed = check(tmp_path, source="my lab")
    assert code == 1 and "(run `runner setup -i 'my lab' --tags conda_env`)" in printed


STRICT = {"gpus": 8, "nics": 2, "gbit": 400, "required": True, "driver": "560", "mesh": True}


@pytest.mark.parametrize(
    ("inventory", "expected"),
    [
        ("inventory/fukushimadc-02", STRICT),
        ("inventory/slurm-example", STRICT),
        ("inventory/local", {"gpus": 0, "nics": 0, "gbit": 0, "required": False, "driver": "", "mesh": False}),
    ],
)
def test_a_cluster_must_have_what_its_inventory_says_and_any_other_machine_what_it_has(tmp_path, inventory, expected):
    roles = ("cuda_check", "roce_qos", "ssh_mesh")
    wanted = {"gpus": "cuda_check_gpus | int", "nics": "roce_qos_nics_per_node | int", "gbit": "roce_qos_nic_gbit_per_s | int",
              "required": "cuda_check_required | bool", "driver": "cuda_check_driver_min", "mesh": "ssh_mesh_enabled | bool"}  # fmt: skip
    found = ", ".join(f"'{name}': {value}" for name, value in wanted.items())
    play = {
        "hosts": "gpu_nodes[0]",  # no node is contacted: this action is the controller's
        "gather_facts": False,
        "vars_files": [str(ROOT / "roles" / role / "defaults" / "main.yml") for role in roles],
        "vars": {"found": "{{ {" + found + "} }}", "expected": expected},
        "tasks": [{"ansible.builtin.assert": {"that": "found == expected", "fail_msg": "{{ found | to_json }}"}}],
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    argv = [str(RUNNER.with_name("ansible-playbook")), "-i", inventory, str(tmp_path / "play.yml")]
    done = process.run(argv, timeout_s=60, cwd=str(ROOT))
    assert done.rc == 0, done.stdout
