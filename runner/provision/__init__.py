"""Provisioning of nodes: running the playbooks, and reporting their results."""
