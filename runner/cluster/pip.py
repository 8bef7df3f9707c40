"""pip as it fills an environment: with its progress, and the one line that says why it failed."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from runner.cluster.environments import installed
from runner.errors import InfrastructureError
from runner.system import process
from runner.system.wording import counted

TIMEOUT_S = 3600.0
UNREACHED = "no package index answers"
_UNREACHED = re.compile(r"Retrying \(Retry\(|Failed to establish a new connection")
_SETTINGS = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore"}

# Called with the steps done, all steps (0: not known), and what is done now; what it raises ends the work.
OnProgress = Callable[[int, int, str], None]


def settings(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`variables` for an installer: what is imported here must not be what it finds there, and it asks nothing."""
    return {name: value for name, value in variables.items() if not name.startswith("PYTHON")} | _SETTINGS


def install(
    folder: Path,
    arguments: Sequence[str],
    env: Mapping[str, str],
    on_progress: OnProgress,
    total: int = 0,
) -> str:
    """Run `pip install` with `arguments` in the environment `folder`; returns the reason of a failure, "" for none.

    `total` is the number of packages that the environment will have, 0 where that is not known. First pip fetches each
    package, then it unpacks them all. Raises InfrastructureError where it takes longer than TIMEOUT_S.
    """
    before = len(installed(str(folder)))
    argv = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]

    def look(text: str) -> None:
        fetched = len(re.findall(r"^(?:Collecting|Processing) ", text, re.MULTILINE))
        unpacked, of = 0, total
        if "\nInstalling collected packages" in text:
            unpacked, fetched = max(0, len(installed(str(folder))) - before), fetched if not total else total - before
            step, of = f"{unpacked} of {counted(of or fetched, 'package')} unpacked", of or fetched
        elif of:
            step = f"{fetched} of {counted(of, 'package')} fetched"
        else:
            step = f"{counted(fetched, 'package')} fetched"
        on_progress(min(2 * before + fetched + unpacked, 2 * of), 2 * of, step)

    status, text = follow([*argv, "--progress-bar", "off", *arguments], env, look)
    return reason(status, text)


def follow(argv: Sequence[str], env: Mapping[str, str], look: Callable[[str], None]) -> tuple[int, str]:
    """Run an installer to its end, calling `look` at least once a second with all that it has said.

    Returns its exit status and what it has said. Raises InfrastructureError after TIMEOUT_S, and whatever `look`
    raises; then nothing of it runs any more.
    """
    child = process.spawn(argv, env=env, stderr_to_stdout=True, bound=True)
    assert child.stdout and child.stdin
    child.stdin.close()
    text, deadline = "", time.monotonic() + TIMEOUT_S
    try:
        while True:
            if time.monotonic() > deadline:
                raise InfrastructureError(f"{Path(argv[0]).name} gave no result within {TIMEOUT_S:g} s")
            if select.select([child.stdout], [], [], 1.0)[0]:
                if not (block := os.read(child.stdout.fileno(), 65536)):
                    break
                text += block.decode(errors="replace")
            look(text)
    except BaseException:
        process.stop_group(child)
        raise
    finally:
        child.stdout.close()
    return child.wait(), text


def reason(status: int, text: str) -> str:
    """Why an installer failed that has said `text`, in one line; "" where it has not."""
    if status == 0:
        return ""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition(" ")[2] for line in said if line.startswith("ERROR: ")]
    last = next(iter([*errors, *reversed(said)]), f"status {status}")
    return f"{last} ({UNREACHED})" if _UNREACHED.search(text) else last
