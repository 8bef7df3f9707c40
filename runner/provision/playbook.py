"""The only module that imports ansible_runner: runs a playbook and reports its events host by host."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runner.errors import InfrastructureError
from runner.system import process
from runner.system.places import ANSIBLE_CFG, ROOT

Status = Literal["ok", "changed", "failed", "unreachable", "skipped"]

# ansible-runner's names of events, and the status of a host that each means. Other events are not about a host.
_STATUS: Mapping[str, Status] = {
    "runner_on_ok": "ok",
    "runner_on_failed": "failed",
    "runner_on_unreachable": "unreachable",
    "runner_on_skipped": "skipped",
}
_KILL_S = 5  # after TERM, Ansible is killed
_GRACE_S = 10.0  # after Ctrl-C, it and what was started with it
_PRIVATE = "shakedown-play-"  # and the process id of the controller that made it
# A role's task file is its phase.
_PHASE = re.compile(r"/roles/(?P<role>[a-z_]+)/tasks/(?P<phase>[a-z_]+)\.yml")


@dataclass(frozen=True)
class Event:
    """The result of one task on one host. `role` and `phase` are "" for a playbook's own tasks.

    `problems` have the keys `what`, `expected`, `found` and `remedy`; `diff` is the module's, unchanged. `off` has the
    reason of each role that the inventory or its own defaults switch off for the host, in the one event that tells it.
    """

    time: str
    host: str
    play: str
    role: str
    phase: str
    task: str
    status: Status
    duration_s: float
    message: str = ""
    problems: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    diff: Any = None
    off: Mapping[str, str] = field(default_factory=dict)


# One connection to each host for all tasks.
_SHARED = "-o ControlMaster=auto -o ControlPersist=120s -o ServerAliveInterval=5 -o ServerAliveCountMax=4"


@dataclass(frozen=True)
class Call:
    """A playbook and all of its arguments. `hosts` are inventory names, `check` is Ansible's check mode."""

    playbook: str
    inventory: str
    hosts: tuple[str, ...]
    ssh_config: str | None = None
    tags: str | None = None
    check: bool = False
    variables: Mapping[str, Any] | None = None

    def arguments(self) -> list[str]:
        """The arguments of `ansible-playbook`, without the playbook."""
        words = ["--inventory", self.inventory, "--limit", ",".join(self.hosts)]
        if self.tags:
            words += ["--tags", self.tags]
        if self.check:
            words += ["--check", "--diff"]
        variables = dict(self.variables or {})
        if self.ssh_config:  # as variables: an inventory's own would come before the options
            # The file has all that the inventory says; once more on the command line that would come before the keys
            # and the names of the file, or replace it by another.
            variables["ansible_ssh_args"] = _SHARED
            variables["ansible_ssh_common_args"] = f"-F {shlex.quote(self.ssh_config)}"
            variables["ansible_ssh_extra_args"] = ""
        if variables:
            words += ["--extra-vars", json.dumps(variables)]
        return words

    def command(self) -> list[str]:
        """The whole command line, as an argument list."""
        return ["ansible-playbook", *self.arguments(), str(ROOT / self.playbook)]


def tasks(call: Call) -> list[str]:
    """The names of the tasks that `call` would run on each host, in order; connects to no node.

    Raises InfrastructureError where Ansible fails.
    """
    program = Path(sys.executable).with_name("ansible-playbook")
    argv = [str(program) if program.exists() else "ansible-playbook", *call.command()[1:], "--list-tasks"]
    outcome = process.run(argv, timeout_s=120, env=_ansible_environment())
    if outcome.rc != 0:
        raise InfrastructureError(f"{call.playbook}: {reason(outcome.stderr or outcome.stdout)}")
    return [line.split("\tTAGS:")[0].strip() for line in outcome.stdout.splitlines() if line.startswith("      ")]


def play(
    call: Call, on_event: Callable[[Event], None], on_task: Callable[[str, str], None], log: Path | None = None
) -> tuple[Literal["complete", "failed", "cancelled"], str]:
    """Run the playbook `call`; returns its final state and, where Ansible itself failed, its error, else "".

    Calls `on_task(name, role)` when a task starts and `on_event` for the result of each host. Ansible's output is
    written to `log`. INT, TERM and HUP cancel the play: Ansible and its ssh connections are terminated; a task that
    runs on a node still finishes there.
    """
    import ansible_runner

    cancelled_at: float | None = None
    errors: list[str] = []
    # In memory, since ansible-runner writes the environment there, and it may hold secrets.
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    _sweep(memory)
    with (
        tempfile.TemporaryDirectory(prefix=f"{_PRIVATE}{os.getpid()}-", dir=memory) as private,
        open(log or os.devnull, "w") as output,
    ):

        def on_status(status: Mapping[str, Any], runner_config: Any) -> None:
            if status["status"] == "starting" and (setpriv := shutil.which("setpriv")):
                # Ansible is terminated with a controller that is killed, and killed where it does not end: its cleanup
                # may wait for ever for the lock of a queue that a worker held when it was ended.
                until_then = [setpriv, "--pdeathsig", "TERM", "timeout", "--foreground", f"--kill-after={_KILL_S}", "0"]
                runner_config.command = [*until_then, *runner_config.command]
            elif status["status"] == "running":
                Path(runner_config.artifact_dir, "command").unlink(missing_ok=True)

        def handle(raw: Mapping[str, Any]) -> bool:
            if text := raw.get("stdout"):
                print(text, file=output, flush=True)
            data = raw.get("event_data") or {}
            if raw["event"] in ("playbook_on_task_start", "playbook_on_handler_task_start"):
                on_task(data.get("task") or data.get("name") or "", data.get("role", ""))
            elif raw["event"] in ("verbose", "error", "warning", "deprecated") and text:
                errors.append(text)
            elif event := parse(raw):
                on_event(event)
            return False  # ansible-runner keeps no copy: the callbacks have it, without its invocation

        def cancel(number: int, frame: object) -> None:
            nonlocal cancelled_at
            if cancelled_at is None:
                cancelled_at = time.monotonic()
                # Its workers are in separate sessions: if it were killed, they would be left behind.
                process.ask_children_to_end()

        def overdue() -> bool:
            return cancelled_at is not None and time.monotonic() - cancelled_at > _GRACE_S

        with process.handling(process.STOPS, cancel):
            done = ansible_runner.run(
                private_data_dir=private,
                project_dir=os.getcwd(),  # where relative paths in an inventory begin, as without this product
                playbook=str(ROOT / call.playbook),
                cmdline=shlex.join(call.arguments()),
                envvars=_ansible_environment({}),
                suppress_env_files=True,
                settings={"pexpect_timeout": 0.5},
                event_handler=handle,
                status_handler=on_status,
                cancel_callback=overdue,
                quiet=True,
            )
    if cancelled_at is not None:
        return "cancelled", ""
    if done.rc == 0:
        return "complete", ""
    return "failed", reason("\n".join(errors)) if errors else ""


def _sweep(folder: Path) -> None:
    """Remove the folders of controllers that were killed."""
    for path in folder.glob(f"{_PRIVATE}*-*"):
        pid = path.name.removeprefix(_PRIVATE).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and path.stat().st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)


def _ansible_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment with the product's ansible.cfg, in any working directory, and no colours, for parsing."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    own = {
        "ANSIBLE_CONFIG": str(ANSIBLE_CFG),
        "ANSIBLE_HOST_KEY_CHECKING": "True",  # ansible-runner turns it off otherwise
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
        "PATH": path,
    }
    return {**(os.environ if base is None else base), **own}


def parse(raw: Mapping[str, Any]) -> Event | None:
    """An event of ansible-runner as an Event; None for one that is not about a host.

    Only the parts of the result that are shown are kept: its invocation may contain secrets.
    """
    status = _STATUS.get(raw.get("event", ""))
    data = raw.get("event_data") or {}
    if status is None or not data.get("host"):
        return None
    result = data.get("res") or {}
    if status == "ok" and result.get("changed"):
        status = "changed"
    elif status == "failed" and data.get("ignore_errors"):
        status = "ok"
    place = _PHASE.search(data.get("task_path") or "")
    role = data.get("role", "")
    off = (result.get("ansible_facts") or {}).get("site_off") or {}
    if role and result.get("off"):  # what its module found
        status, off = "skipped", {role: result["off"]}
    return Event(
        time=raw.get("created", ""),
        host=data["host"],
        play=data.get("play", ""),
        role=role,
        phase=place["phase"] if place else "",
        task=data.get("task", ""),
        status=status,
        duration_s=round(float(data.get("duration") or 0.0), 3),
        message={"failed": message, "unreachable": lambda r: str(r.get("msg"))}.get(status, lambda r: "")(result),
        problems=tuple(p for p in result.get("problems") or () if isinstance(p, Mapping)),
        warnings=tuple(str(w) for w in result.get("warnings") or ()),
        diff=result.get("diff") or None,
        off={str(name): str(reason) for name, reason in off.items()},
    )


def message(result: Mapping[str, Any]) -> str:
    """The reason of a failed task's `result` in one line: a command's last output instead of its return code."""
    text = str(result.get("msg") or "")
    if not text or text.startswith("non-zero return code"):
        lines = str(result.get("stderr") or result.get("stdout") or "").strip().splitlines()
        text = lines[-1] if lines else text or "failed without output"
    if "MODULE FAILURE" in text or "Traceback" in text:
        trace = str(result.get("module_stderr") or result.get("exception") or "").strip().splitlines()
        text = f"the module crashed: {trace[-1]}" if trace else text
    if "deserialization failed" in text:  # its interpreter did not start it
        output = str(result.get("module_stderr") or "").strip().splitlines()
        text = f"the module gave no answer: {output[0]}" if output else text
    return reason(text)


# Ansible's chain of causes, of which only the last is shown: "Task failed: Finalization of task args for 'x' failed:
# Error while resolving value for 'settings': The lookup plugin 'y' failed: what is wrong".
_CHAIN = re.compile(
    r"^(?:Task failed(?: on host \S+)?|Action failed|Module failed|Finalization of task args for '[^']*' failed|"
    r"Error while resolving value for '[^']*'|The lookup plugin '[^']*' failed|"
    r"The filter plugin '[^']*' failed|Failed to connect to the host via ssh)[:.]\s*"
)


def reason(text: str) -> str:
    """The last cause in Ansible's error message `text`, as one line."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line]
    line = (errors or lines or [""])[0].replace("[ERROR]:", "").strip()
    while match := _CHAIN.match(line):
        line = line[match.end() :]
    return line or "no reason given"
