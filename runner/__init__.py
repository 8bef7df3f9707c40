"""Shakedown: bring up, benchmark and accept multi-node GPU clusters."""

__version__ = "0.1.0"
