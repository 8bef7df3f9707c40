"""What pyproject.toml cannot express: the wheel carries the product's own files, as `runner/_files`.

`runner/system/places.py` finds them there. An editable installation copies nothing: it uses the checkout's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# With pyproject.toml and README.md an installed package holds all that the role conda_env needs to make the
# nodes' wheel of it. That wheel is made without this file, and is the package alone.
PACKED = (
    "README.md",
    "ansible.cfg",
    "configs",
    "inventory/local",
    "playbooks",
    "plugins",
    "pyproject.toml",
    "roles",
    "site.yml",
    "testbed",
)


def own_files() -> list[Path]:
    """The files to pack, relative to the checkout; without hidden ones and what Python keeps beside its sources."""
    found = [path for name in PACKED for path in (Path(name), *Path(name).rglob("*")) if path.is_file()]
    return sorted(p for p in found if not any(part[0] == "." or part == "__pycache__" for part in p.parts))


class BuildPy(build_py):
    """build_py that also packs the product's own files; by `get_source_files` a source distribution has them, too."""

    def run(self) -> None:
        if not self.editable_mode:
            # Modules that an earlier build left in build/ would be packed as well.
            shutil.rmtree(Path(self.build_lib, "runner"), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for file in own_files():
                target = self._packed(file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, own_files())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [str(self._packed(file)) for file in own_files()]
        return [*super().get_outputs(include_bytecode), *own]

    def _packed(self, file: Path) -> Path:
        return Path(self.build_lib, "runner", "_files", file)


setup(cmdclass={"build_py": BuildPy})
