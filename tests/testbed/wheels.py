"""Wheels of what is installed here, for nodes without a network: the same files, packed again, and nothing downloaded."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from pathlib import Path


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def index(lock: str, folder: Path) -> str:
    """The URL of an index of packages in `folder`, which has what `lock` pins.

    Raises KeyError where another version is installed.
    """
    installed = {canonical(one.metadata["Name"]): one for one in importlib.metadata.distributions()}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE):
        one = installed[canonical(name)]
        if one.version != version:
            raise KeyError(f"{name} {one.version} is installed, {version} is pinned")
        place = folder / canonical(name)
        place.mkdir(parents=True)
        wheel = _pack(one, place)
        (place / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>\n')
    return folder.as_uri()


def _pack(one: importlib.metadata.Distribution, folder: Path) -> Path:
    stem = f"{re.sub(r'[-.]+', '_', one.metadata['Name'])}-{one.version}"
    tags = [
        line.partition(": ")[2].split("-") for line in (one.read_text("WHEEL") or "").splitlines() if "Tag: " in line
    ]
    tag = "-".join(".".join(dict.fromkeys(part)) for part in zip(*tags, strict=True))
    made_by_pip = {entry.name for entry in one.entry_points if entry.group.endswith("_scripts")}
    record, info, packed = [], "", folder / f"{stem}-{tag}.whl"
    # Stored, not compressed: a node unpacks faster than it inflates.
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as wheel:
        for file in one.files or ():
            path, name = Path(str(file.locate())), str(file)
            if file.parts[0].endswith(".dist-info"):
                info = file.parts[0]
                if file.name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
                    continue
            if "__pycache__" in file.parts:
                continue
            if file.parts[0] == "..":  # outside site-packages
                where = name.lstrip("./")
                if where.startswith("bin/") and path.name in made_by_pip:
                    continue
                name = f"{stem}.data/" + (f"scripts/{path.name}" if where.startswith("bin/") else f"data/{where}")
            content = path.read_bytes()
            if name.startswith(f"{stem}.data/scripts/"):
                content = re.sub(rb"\A#!.*python[\d.]*\n", b"#!python\n", content)  # the shebang is the environment's
            wheel.writestr(zipfile.ZipInfo(name), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f'"{name}",sha256={digest},{len(content)}\n')
        wheel.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "".join([*record, f"{info}/RECORD,,\n"]))
    return packed
