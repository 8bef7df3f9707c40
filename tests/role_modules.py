"""Modules of roles as Python modules, and a node to try them on: a folder, and an answer instead of an exit.

`load("cuda_check")` imports roles/cuda_check/library/cuda_check.py, with plugins/module_utils where Ansible puts it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def _without_a_patch(*names):
    """Import modules of Ansible, which replaces sys.intern by what torch's compiler refuses: other tests need that."""
    intern = sys.intern
    modules = [importlib.import_module(name) for name in names]
    sys.intern = intern
    return modules[0]


module_utils = _without_a_patch("ansible.module_utils", "ansible.module_utils.basic")
ROOT = Path(__file__).resolve().parents[1]
ROLES = sorted(path.parent.parent.name for path in (ROOT / "roles").glob("*/tasks/main.yml"))
for folder in (ROOT / "plugins" / "module_utils", *sorted((ROOT / "roles").glob("*/module_utils"))):
    module_utils.__path__.append(str(folder))


class Answer(Exception):
    """What a module answered: `ok` and its values as attributes."""

    def __init__(self, ok, values):
        super().__init__(values.get("msg"))
        self.ok = ok
        self.__dict__.update(values)


class ModuleStandIn:
    """Ansible's module object without its process: parameters in, an Answer raised."""

    def __init__(self, phase, settings, check=False, also=None):
        self.params = {"phase": phase, "settings": settings, "also": also}
        self.check_mode = check
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)

    def exit_json(self, **values):
        raise Answer(True, values | {"warnings": self.warnings})

    def fail_json(self, **values):
        raise Answer(False, values | {"warnings": self.warnings})


def load(role, name=None):
    path = ROOT / "roles" / role / "library" / f"{name or role}.py"
    spec = importlib.util.spec_from_file_location(f"library_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def carry_out(phases, phase, settings, check=False, needs_root=False, also=None):
    """Carry out one phase of a module on this machine, and the phase `also` where it can, and return its Answer."""
    from ansible.module_utils.phase import main

    try:
        main(lambda **_: ModuleStandIn(phase, settings, check, also), phases, needs_root)
    except Answer as answer:
        return answer
    raise AssertionError("the module neither succeeded nor failed")
