"""A cluster of containers on this machine."""
