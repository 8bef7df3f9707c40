#!/usr/bin/env python3
"""Write the table of variables of every role's README from its meta/argument_specs.yml.

    roles/readme.py           write
    roles/readme.py --check   tell which README is not up to date; ends with 1 if any

The rest of a README is written by hand. What stands between the two markers belongs to this script.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

BEGIN = "<!-- variables: from meta/argument_specs.yml, by roles/readme.py -->"
END = "<!-- end of variables -->"


def table(options: dict) -> str:
    """The Markdown table of `options`, one row a variable."""
    rows = ["| variable | type | default | what it is |", "| --- | --- | --- | --- |"]
    for name, option in options.items():
        default = "**required**" if option.get("required") else ""
        if "default" in option:
            value = option["default"]
            default = f"`{value if isinstance(value, str) and value else json.dumps(value)}`"
        kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
        description = option["description"]
        text = " ".join(description if isinstance(description, list) else [description])
        if choices := option.get("choices"):
            text += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", kind, default, text)) + " |")
    return "\n".join(rows)


def readme(role: Path) -> str:
    """The README that `role` should have."""
    main = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]
    path = role / "README.md"
    old = path.read_text() if path.exists() else f"# {role.name}\n\n{main['short_description']}.\n\n{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(main.get('options', {}))}\n\n{END}{after}"


def main(check: bool) -> int:
    stale = []
    for role in sorted(path.parents[1] for path in Path(__file__).parent.glob("*/tasks/main.yml")):
        wanted, path = readme(role), role / "README.md"
        if not path.exists() or path.read_text() != wanted:
            stale.append(path)
            if not check:
                path.write_text(wanted)
    for path in stale:
        print(f"{path}: {'not up to date: run roles/readme.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
