"""Wheels: their platform tags and their folder on a node. Used on the controller and on the nodes."""

from __future__ import annotations

import os
import re

from ansible.module_utils.phase import Stop


def platform_parts(tag):
    """(28, "x86_64") of "manylinux_2_28_x86_64": glibc's minor version and the processor. Source: PEP 600.

    Raises Stop for another tag.
    """
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag)
    if not match:
        raise Stop("conda_env_platform", "such as manylinux_2_28_x86_64", tag, "name the oldest glibc of all nodes")
    return int(match[1]), match[2]


def wheel_folder(want):
    """The node's folder of wheels, beside the environment; each further one has its own, which its install cleans."""
    name = f"wheels-{want['beside']}" if want.get("beside") else "wheels"
    return os.path.join(os.path.dirname(want["prefix"]), name)
