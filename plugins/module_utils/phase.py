"""The common part of every role's module: one call runs one phase on one node.

A module reads the state of the node, compares it with the expected state, and either fixes differences (`install`,
`configure`) or reports them (`validate`, `verify`). It collects all problems before it returns, so that the user can
fix them together. Runs with the node's own Python (3.9 or newer) and its standard library only.

Result of a module (`module.exit_json` / `fail_json`):

    changed   bool
    msg       one line: every problem, or what was done
    problems  [{"what", "expected", "found", "remedy"}]   empty unless failed
    facts     the observed values by name; units in the names
    also      bool: whether the phase that the parameter `also` names has nothing to do here (see `also`)
    warnings  what does not fail the node, such as checks whose result is `unknown`
    off       only where the role has nothing to do on this node: the reason (see `Off`)
    diff      [{"before", "after", "before_header", "after_header"}]   one per setting or file
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile

PHASES = ("validate", "install", "configure", "verify")
CHANGING = ("install", "configure")
SETUP = "`runner setup"


def counted(number, noun):
    """`1 node`, `3 nodes`, `0 nodes`: a number with its noun, which takes an s."""
    return f"{number} {noun if number == 1 else noun + 's'}"


class Stop(Exception):
    """Ends the phase at once, since it cannot continue. Its problem is reported with those found before."""

    def __init__(self, what, expected, found, remedy=""):
        super().__init__(what)
        self.problem = (what, expected, found, remedy)


class Off(Exception):
    """Ends the phase at once, since the role has nothing to do on this node; its text is the reason, for people."""


class Outcome:
    """The result of a command. `rc` is None when it timed out or could not be started; then `reason` says why."""

    def __init__(self, argv, rc, stdout="", stderr="", reason=""):
        self.argv, self.rc, self.stdout, self.stderr, self.reason = argv, rc, stdout, stderr, reason

    @property
    def ok(self):
        """Whether the command ran and returned 0."""
        return self.rc == 0

    @property
    def last_line(self):
        """`reason` if set, else the last line of its output, usually the reason of a failure."""
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return self.reason or (lines[-1].strip() if lines else f"status {self.rc} without output")


class Phase:
    """One phase of one role on this node. `name` is the phase, `want` the role's settings without its prefix.

    `secrets` are the settings that Ansible keeps out of logs and results; they are not in `want`.
    """

    def __init__(self, module):
        self.module = module
        self.name = module.params["phase"]
        self.want = module.params["settings"]
        self.secrets = module.params.get("secrets") or {}
        self.check = module.check_mode
        self.changed = False
        self.done = []
        self.problems = []
        self.warnings = []
        self.facts = {}
        self.diffs = []
        self.also = False

    # --- observing ---

    def problem(self, what, expected, found, remedy=""):
        """Record a problem: `what` is not as `expected` but as `found`; `remedy` tells how to fix it.

        A remedy `runner setup …` gets the inventory in use: without one, it would set up the default inventory's nodes.
        The phase continues, and fails at its end.
        """
        if inventory := self.want.get("inventory"):
            remedy = remedy.replace(SETUP, f"{SETUP} -i {shlex.quote(inventory)}")
        self.problems.append({"what": what, "expected": str(expected), "found": str(found), "remedy": remedy})

    def warn(self, text):
        """Record a warning, which is shown to the user and does not fail the phase."""
        self.warnings.append(text)

    def left_to_others(self, what):
        """Record that `what` is not as expected, and judged with what other nodes found: this node may not be at fault.

        Such a phase is not carried out in the call of another one.
        """

    def run(self, argv, timeout_s, env=None, cwd=None, input=None):
        """Run `argv` and return its Outcome, also when it is missing, fails or hangs; never raises.

        `env` is added to the environment, with a C locale; `input` is text for its stdin. Output is decoded as UTF-8.
        After `timeout_s` its whole process group is terminated.
        """
        argv = [str(word) for word in argv]
        full = dict(os.environ, LC_ALL="C.UTF-8", **(env or {}))
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=full,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            reason = "not found" if error.errno == errno.ENOENT else (error.strerror or str(error)).lower()
            return Outcome(argv, None, reason=f"{argv[0]}: {reason}")
        try:
            stdout, stderr = child.communicate(None if input is None else input.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):  # always KILL too: one of its children may ignore TERM
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(2)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream:
                    stream.close()
            return Outcome(argv, None, reason=f"{os.path.basename(argv[0])} gave no answer within {timeout_s:g} s")
        return Outcome(argv, child.returncode, stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))

    # --- changing ---

    def change(self, setting, before, after):
        """Record a change of `setting` in the diff. Returns True if it is to be made now, False in check mode."""
        self.changed = True
        self.diffs.append(
            {
                "before": f"{before}\n" if before is not None else "",
                "after": f"{after}\n" if after is not None else "",
                "before_header": setting,
                "after_header": setting,
            }
        )
        return not self.check

    def write(self, path, content, mode=0o644, secret=False, owner=None):
        """Write `content` with `mode` and `owner` to the file `path`, atomically; returns whether that is a change.

        With `secret`, the diff shows no content. `owner` as for `own`.
        """
        old = read(path)
        if old == content:
            return self.own(path, mode, owner)
        if secret:
            allowed = self.change(path, "(secret)" if old is not None else None, "(another secret)")
        else:
            allowed = self.change(path, old, content)
        if allowed:
            write(path, content, mode, ids(owner))
        return True

    def own(self, path, mode, owner=None, remedy=""):
        """Give the file or folder `path` its mode and owner, or record a problem in a phase that changes nothing.

        `owner` is a user's name; None is the user that the phase runs as. A `mode` of None is any that lets nobody else
        write. Returns whether there is a difference; none where there is no such file.
        """
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            old, (uid, gid) = stat.S_IMODE(status.st_mode), ids(owner)
        except Stop:
            if not self.check:
                raise
            self.change(path, owner_name(status.st_uid, status.st_gid), owner)  # install would have made the user
            return True
        new = old & ~0o022 if mode is None else mode
        # The group matters where it may do what others may not.
        same_group = status.st_gid == gid or (new >> 3 & 7) == (new & 7)
        if old == new and status.st_uid == uid and same_group:
            return False
        found, wanted = (
            ", ".join([f"mode {bits:04o}", *([] if status.st_uid == uid and same_group else [f"owner {name}"])])
            for bits, name in ((old, owner_name(status.st_uid, status.st_gid)), (new, owner_name(uid, gid)))
        )
        if self.name not in CHANGING:
            self.problem(path, wanted, found, remedy)
        elif self.change(path, found, wanted):
            try:
                if status.st_uid != uid or not same_group:
                    os.chown(path, uid, gid)
                os.chmod(path, new)  # after chown, which clears bits
            except PermissionError:  # a user may replace another's file in a folder of his own
                if not stat.S_ISREG(status.st_mode):
                    raise
                write(path, read(path), new)
        return True

    def remove(self, path):
        """Remove the file or folder `path` if it exists; returns whether that is a change."""
        if not os.path.lexists(path):
            return False
        if self.change(path, "present", None):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return True

    # --- the result ---

    def finish(self):
        """End the module with its result: failed with any problem, else successful."""
        answer = {"changed": self.changed, "facts": self.facts, "problems": self.problems, "diff": self.diffs}
        answer["also"] = self.also
        for text in self.warnings:
            self.module.warn(text)
        if self.problems:
            self.module.fail_json(msg=one_line(self.problems), **answer)
        self.module.exit_json(msg="; ".join(self.done) or "as expected", **answer)


class _Needed(Exception):
    """A rehearsed phase has a change to make or a problem to report."""


class Rehearsal(Phase):
    """A phase that ends at the first change it would make and at the first problem it finds."""

    def __init__(self, module, name):
        super().__init__(module)
        self.name = name
        self.check = True

    def problem(self, what, expected, found, remedy=""):
        """End the rehearsal: the phase would report a problem."""
        raise _Needed(what)

    def left_to_others(self, what):
        """End the rehearsal: the phase would find something to judge."""
        raise _Needed(what)

    def change(self, setting, before, after):
        """End the rehearsal: the phase would make a change."""
        raise _Needed(setting)


def also(phase, name, phases):
    """Whether the phase `name` would change nothing and find no problem after `phase`, which changed nothing.

    The rehearsal performs all checks of the phase. If it succeeds, the phase needs no separate call, which would cost
    more than its work on a node in the expected state; its facts and warnings are added to `phase`. Otherwise nothing
    is reported, since the separate call reports it. `phases` maps names to functions, as in `main`.
    """
    rehearsal = Rehearsal(phase.module, name)
    try:
        phases[name](rehearsal)
    except (_Needed, Stop, OSError):
        return False
    phase.facts.update(rehearsal.facts)
    phase.warnings += rehearsal.warnings
    phase.done += rehearsal.done
    return True


def one_line(problems):
    """All `problems` as one line of text."""
    parts = []
    for problem in problems:
        part = "{what}: expected {expected}, found {found}".format(**problem)
        parts.append(part + (f" ({problem['remedy']})" if problem["remedy"] else ""))
    return "; ".join(parts)


def main(module_class, phases, needs_root=True):
    """Run the phase that the task names: `phases` maps each name to a function of a Phase. Does not return.

    `module_class` is AnsibleModule. An error of the operating system (a full disk, a read-only file system, a missing
    permission) is reported as a problem with the file's name, not as a traceback.
    """
    module = module_class(
        argument_spec={
            "phase": {"type": "str", "required": True, "choices": sorted(phases, key=PHASES.index)},
            "also": {"type": "str", "choices": sorted(phases, key=PHASES.index)},
            "settings": {"type": "dict", "required": True},
            "secrets": {"type": "dict", "no_log": True},
        },
        supports_check_mode=True,
    )
    phase = Phase(module)
    try:
        if needs_root and os.geteuid() != 0:
            remedy = "set ansible_user: root, or ansible_become: true, for this node"
            raise Stop("user", "root", f"uid {os.geteuid()}", remedy)
        phases[phase.name](phase)
        if module.params.get("also") and not phase.changed and not phase.problems:
            phase.also = also(phase, module.params["also"], phases)
    except Stop as stop:
        phase.problem(*stop.problem)
    except Off as off:
        module.exit_json(changed=False, msg=str(off), off=str(off), facts=phase.facts)
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space there",
            errno.EDQUOT: "raise the quota or free some space",
            errno.EROFS: "remount it read-write; a disk that failed is often remounted read-only: see dmesg",
            errno.EACCES: "run as root (ansible_user=root or become)",
            errno.EPERM: "run as root (ansible_user=root or become)",
        }
        if error.errno not in remedies:
            raise
        place = error.filename or error.filename2 or "a file"
        phase.problem(str(place), "writable", (error.strerror or str(error)).lower(), remedies[error.errno])
    phase.finish()


def read(path):
    """The text of the file `path`, None where it does not exist. Raises other OSErrors."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def ids(owner):
    """(uid, gid) of the user named `owner`, of the current user for None; Stop where there is none of that name."""
    if owner is None:
        return os.geteuid(), os.getegid()
    try:
        account = pwd.getpwnam(owner)
    except KeyError:
        raise Stop(f"user {owner}", "present", "no such user", "install what creates it") from None
    return account.pw_uid, account.pw_gid


def owner_name(uid, gid):
    """The owner and the group as `ls` shows them, "munge:munge"; numbers where they have no name."""
    names = []
    for number, look in ((uid, pwd.getpwuid), (gid, grp.getgrgid)):
        try:
            names.append(look(number)[0])
        except KeyError:
            names.append(str(number))
    return ":".join(names)


def write(path, content, mode=0o644, owner=None):
    """Write `content` to `path` atomically: a killed run leaves the old file intact. Raises OSError.

    `owner` is (uid, gid), None for those of this process.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if owner is not None and owner != (os.geteuid(), os.getegid()):
            os.chown(partial, *owner)
        os.chmod(partial, mode)
        os.replace(partial, path)
    except BaseException as error:
        os.unlink(partial)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise
