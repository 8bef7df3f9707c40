"""The driver and the parts of slurm_prolog: `lookup('slurm_prolog_files')` is {file name: text}."""

from __future__ import annotations

from pathlib import Path

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: slurm_prolog_files
author: Shakedown
short_description: Texts of the programs that slurm_prolog installs
description:
  - All of them go to a node with its one module call, not one copy task each.
options:
  _terms:
    description: None.
"""

FILES = Path(__file__).resolve().parents[1] / "files"


class LookupModule(LookupBase):
    def run(self, terms, variables=None, **kwargs):
        return [{path.name: path.read_text() for path in sorted(FILES.iterdir()) if path.is_file()}]
