"""Nodes brought to one state: the playbooks played, and what they say."""
