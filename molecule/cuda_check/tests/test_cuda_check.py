"""What the role leaves on a node, and that it is what the node's own tools say."""

import json


def test_the_fact_says_what_nvidia_smi_says(host):
    fact = json.loads(host.file("/etc/ansible/facts.d/cuda.fact").content_string)
    rows = host.check_output("nvidia-smi --query-gpu=uuid,name,driver_version,compute_cap --format=csv,noheader")
    said = [tuple(row.split(", ")) for row in rows.splitlines()]
    assert len(said) == 8
    assert [(gpu["uuid"], gpu["name"], fact["driver"], fact["compute_capability"]) for gpu in fact["gpus"]] == said


def test_every_user_can_read_the_fact_and_ansible_takes_it(host):
    assert host.file("/etc/ansible/facts.d/cuda.fact").mode == 0o644
    local = host.ansible("ansible.builtin.setup", "filter=ansible_local", check=False)["ansible_facts"]["ansible_local"]
    assert local["cuda"]["nvlink_links"] == 18


def test_the_role_left_nothing_else(host):
    # A part of a file that a killed run leaves would be seen by Ansible as a broken fact.
    assert host.file("/etc/ansible/facts.d").listdir() == ["cuda.fact"]
