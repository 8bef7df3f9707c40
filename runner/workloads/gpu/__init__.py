"""Test `gpu`: each GPU by itself, all of them at the same time."""
