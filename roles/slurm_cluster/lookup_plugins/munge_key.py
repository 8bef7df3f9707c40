"""The munge key that slurm_cluster was given: `lookup('munge_key')`, base64; empty where the nodes make their own."""

from __future__ import annotations

import base64
import binascii
import os
import stat

from ansible.errors import AnsibleLookupError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: munge_key
author: Shakedown
short_description: The munge key from slurm_cluster_munge_key or slurm_cluster_munge_key_file
description:
  - Refuses a key of a size that munge does not take, a file that others may read, and no key where one is demanded.
options:
  _terms:
    description: C(problem) gives what is wrong with it instead (what, expected, found, remedy), or nothing.
"""

SIZES = range(32, 1025)  # Source: munged(8), "--key-file"


class Refused(ValueError):
    """Why a key is not taken: what, expected, found, remedy. Never tells a key."""


def given_key(text: str, path: str, generate: bool) -> str:
    """The key in base64, or "" where none is given and `generate` allows that. Raises Refused."""
    if text:
        name = "slurm_cluster_munge_key"
        try:
            key = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise Refused(name, "base64", "something else", "give the output of `base64 -w0 munge.key`") from None
    elif path:
        name = "slurm_cluster_munge_key_file"
        try:
            with open(os.path.expanduser(path), "rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                key = file.read()
        except OSError as error:
            raise Refused(name, f"a file at {path}", (error.strerror or str(error)).lower(), "") from None
        if mode & 0o077:
            raise Refused(name, "mode 0600", f"mode {mode:04o}", f"chmod 600 {path}")
    elif generate:
        return ""
    else:
        raise Refused(
            "munge key",
            "slurm_cluster_munge_key or slurm_cluster_munge_key_file",
            "neither",
            "give the key by a vault, the environment or a file, or allow slurm_cluster_munge_key_generate",
        )
    if len(key) not in SIZES:
        raise Refused(name, f"{SIZES[0]} to {SIZES[-1]} bytes", f"{len(key)}", "make one with `mungekey --create`")
    return base64.b64encode(key).decode()


class LookupModule(LookupBase):
    def run(self, terms, variables=None, **kwargs):
        names = ("munge_key", "munge_key_file", "munge_key_generate")
        text, path, generate = (self._templar.template(variables[f"slurm_cluster_{name}"]) for name in names)
        problem = []
        try:
            key = given_key(text or "", path or "", boolean(generate))
        except Refused as refused:
            key, problem = "", list(refused.args)
        if terms == ["problem"]:
            return [problem]
        if problem:
            raise AnsibleLookupError("{}: expected {}, found {}".format(*problem))
        return [key]
