"""Parsers of the field's tools: pure functions from what a tool printed to dataclasses, standard library only."""
