"""`runner setup` and `runner check`: the playbooks, with progress, folded failures and a table of nodes and roles.

`Board` gathers what the events say; `failures`, `warnings`, `table` and `summary` are pure functions of it.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner import errors
from runner.options import cache_dir, inventory_option, read_inventory, results_option, state_dir, transport
from runner.system.places import ROLES

if TYPE_CHECKING:
    from runner.display import Display
    from runner.inventory import Inventory, Node
    from runner.playbook import Call, Event

SITE = "site.yml"
VERIFY = "playbooks/verify.yml"

# The worst of what a role's tasks did on a node is the role's state there.
_RANK = {"skipped": 0, "ok": 1, "changed": 2, "failed": 3, "unreachable": 4}
_SHOWN = {"skipped": "off", "ok": "ok", "changed": "changed", "failed": "FAILED", "unreachable": "NO ANSWER"}


@dataclass
class Board:
    """What happened so far on `nodes` (inventory names to aliases)."""

    nodes: Mapping[str, str]
    events: list[Event] = field(default_factory=list)

    def roles(self) -> list[str]:
        return list(dict.fromkeys(event.role for event in self.events if event.role))

    def state(self, host: str, role: str) -> str | None:
        """A role's state on a node; None where it was not reached."""
        states = [event.status for event in self.events if event.host == host and event.role == role]
        return max(states, key=_RANK.__getitem__, default=None)

    def bad(self) -> set[str]:
        return {event.host for event in self.events if event.status in ("failed", "unreachable")}

    def unreachable(self) -> set[str]:
        return {event.host for event in self.events if event.status == "unreachable"}


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong, and on which nodes it is so in the same words."""

    nodes: str
    role: str
    phase: str
    what: str
    expected: str
    found: str
    remedy: str

    def line(self) -> str:
        where = f"{self.role}: " if self.role else ""
        text = f"{where}{self.what}"
        if self.expected or self.found:
            text += f": expected {self.expected}, found {self.found}"
        return f"{text} ({self.remedy})" if self.remedy else text


def failures(board: Board) -> list[Failure]:
    """Every failure, equal ones folded over nodes and roles, in the order in which they were met."""
    from runner.inventory import fold

    met: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}
    named = set()
    for event in board.events:
        if event.status not in ("failed", "unreachable") or (not event.role and event.host in named):
            continue  # a playbook's last word on a node repeats its roles'
        named.add(event.host)
        for problem in event.problems or ({"what": event.message},):
            key = tuple(str(problem.get(k, "")) for k in ("what", "expected", "found", "remedy"))
            entry = met.setdefault(key, {"nodes": {}, "roles": {}, "phases": {}})
            entry["nodes"][board.nodes[event.host]] = entry["roles"][event.role] = entry["phases"][event.phase] = None
    return [
        Failure(
            fold(list(entry["nodes"])),
            ", ".join(filter(None, entry["roles"])),
            ", ".join(filter(None, entry["phases"])),
            *key,
        )
        for key, entry in met.items()
    ]


def _folded(board: Board, met: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """(nodes, what) of each different `what` in (host, what), in the order in which they were met."""
    from runner.inventory import fold

    nodes: dict[tuple[str, ...], dict[str, None]] = {}
    for host, what in met:
        nodes.setdefault(what, {})[board.nodes[host]] = None
    return [(fold(list(names)), what) for what, names in nodes.items()]


def warnings(board: Board) -> list[tuple[str, str, str]]:
    """(nodes, role, text) of each warning, equal ones folded."""
    met = ((event.host, (event.role, text)) for event in board.events for text in event.warnings)
    return [(nodes, role, text) for nodes, (role, text) in _folded(board, met)]


def table(board: Board) -> str:
    """Node × role, for people: narrow enough for 80 columns. Roles that are off on all nodes are one line below."""
    from tabulate import tabulate

    states = {role: {host: board.state(host, role) for host in board.nodes} for role in board.roles()}
    off = [role for role, found in states.items() if set(found.values()) <= {"skipped", None}]
    rows = [
        [alias, *("–" if (s := states[role][host]) is None else _SHOWN[s] for role in states if role not in off)]
        for host, alias in board.nodes.items()
    ]
    headers = ["node", *(role.replace("_", "\n") for role in states if role not in off)]
    lines = [tabulate(rows, headers=headers)] if len(headers) > 1 else []
    return "\n".join([*lines, *([f"off: {', '.join(off)}"] if off else [])])


def summary(board: Board, state: str, elapsed_s: float, said: str) -> dict[str, Any]:
    """What `--json` prints and summary.json holds."""
    return {
        "schema": 1,
        "state": state,
        "elapsed_s": round(elapsed_s, 1),
        "nodes": {
            alias: {"name": host, "roles": {role: board.state(host, role) for role in board.roles()}}
            for host, alias in board.nodes.items()
        },
        "failures": [asdict(failure) for failure in failures(board)],
        "warnings": [{"nodes": nodes, "role": role, "text": text} for nodes, role, text in warnings(board)],
        "error": said or None,
    }


def diffs(board: Board) -> list[tuple[str, str, str, str]]:
    """(nodes, setting, before, after) of each difference that a dry converge found, equal ones folded."""
    met = []
    for event in board.events:
        for entry in event.diff if isinstance(event.diff, list) else [event.diff] if event.diff else []:
            setting = str(entry.get("before_header") or entry.get("after_header") or event.task)
            before, after = (str(entry.get(side) or "").strip() for side in ("before", "after"))
            met.append((event.host, (setting, before, after)))
    return [(nodes, setting, before, after) for nodes, (setting, before, after) in _folded(board, met)]


def exit_code(board: Board, state: str) -> int:
    """3 where a node was not reached, 1 where one is not as wanted, 130 after an interruption."""
    if state == "cancelled":
        return errors.EXIT_INTERRUPTED
    if board.unreachable():
        return errors.EXIT_INFRASTRUCTURE
    if board.bad():
        return errors.EXIT_TARGET_MISSED
    return errors.EXIT_OK if state == "complete" else errors.EXIT_INFRASTRUCTURE


class Progress:
    """The bar's position: tasks weighed by how long each took the last time, known after a first run."""

    def __init__(self, call: Call, display: Display, hosts: int) -> None:
        self._display = display
        self._hosts = hosts
        self._known = _read_seconds()
        self._all: list[str] = []
        self._done_s = 0.0
        self._task, self._answers, self._started = "", 0, time.monotonic()
        self.seconds: dict[str, float] = {}
        # Listing the tasks takes a second of Ansible's time: beside the play, not before it.
        threading.Thread(target=self._list, args=(call,), daemon=True).start()

    def _list(self, call: Call) -> None:
        from runner import playbook

        with suppress(errors.RunnerError):
            self._all = playbook.tasks(call)

    def _expected_s(self, task: str) -> float:
        return self._known.get(task, 1.0)

    def task(self, name: str, role: str) -> None:
        self._end()
        self._task = f"{role} : {name}" if role else name
        self._answers, self._started = 0, time.monotonic()
        self._show("")

    def _end(self) -> None:
        if self._task:
            self._done_s += self._expected_s(self._task)
            self.seconds[self._task] = round(time.monotonic() - self._started, 2)

    def answer(self, alias: str) -> None:
        self._answers += 1
        self._show(alias)

    def _show(self, alias: str) -> None:
        share = min(1.0, self._answers / self._hosts)
        total = sum(map(self._expected_s, self._all)) or 1.0
        done = min(total, self._done_s + share * self._expected_s(self._task)) if self._all else 0.0
        text = f"{self._answers}/{self._hosts} {alias or 'nodes'} · {self._task}"
        self._display.at(done, total, text)

    def finish(self) -> None:
        """Remember how long the tasks took."""
        from runner.rundir import write_json_atomic

        self._end()
        with suppress(OSError):
            cache_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json_atomic(_seconds_file(), {**self._known, **self.seconds})


def _seconds_file() -> Path:
    return cache_dir() / "task_seconds.json"


def _read_seconds() -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(_seconds_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def carry_out(call: Call, nodes: Sequence[Node], display: Display, folder: Path | None) -> tuple[Board, str, str]:
    """Play `call`; events and Ansible's own output go to `folder`/ansible. Returns the board, the state, an error."""
    from runner import backends, playbook
    from runner.rundir import disk_errors

    by_name = {node.name: node for node in nodes}
    board = Board({node.name: node.alias for node in nodes})
    progress = Progress(call, display, len(nodes))
    told: set[str] = set()
    with ExitStack() as stack:
        events = None
        if folder is not None:
            stack.enter_context(disk_errors(folder))
            folder.mkdir(mode=0o700, parents=True)
            (folder / "ansible").mkdir(mode=0o700)
            events = stack.enter_context(open(folder / "ansible" / "events.jsonl", "w"))

        def on_event(event: Event) -> None:
            if event.host not in board.nodes:
                return  # the controller's own task
            if event.status == "unreachable":
                lines = event.message.splitlines()
                event = replace(event, message=backends.explain(by_name[event.host], None, lines))
            if events:
                print(json.dumps(asdict(event), ensure_ascii=False), file=events, flush=True)
            board.events.append(event)
            progress.answer(board.nodes[event.host])
            if event.status in ("failed", "unreachable") and event.host not in told:
                told.add(event.host)
                display.note(f"{board.nodes[event.host]}: {event.role or event.play} {event.status}")

        stack.enter_context(display.progress(1.0))
        log = folder / "ansible" / "ansible.log" if folder else None
        state, said = playbook.play(call, on_event, progress.task, log)
        progress.finish()
    return board, state, said


def conclude(board: Board, state: str, said: str, elapsed_s: float, as_json: bool, check: bool) -> int:
    """Print what came out; the exit code says the same."""
    if as_json:
        click.echo(json.dumps(summary(board, state, elapsed_s, said), indent=1))
        return exit_code(board, state)
    if check:
        for nodes, setting, before, after in diffs(board):
            click.echo(f"{nodes}: {_change(setting, before, after)}")
    for nodes, role, text in warnings(board):
        click.echo(f"{nodes}: {role + ': ' if role else ''}warning: {text}")
    for failure in failures(board):
        click.echo(f"{failure.nodes}: {failure.line()}")
    if board.roles():
        click.echo(f"\n{table(board)}\n")
    code = exit_code(board, state)
    good = len(board.nodes) - len(board.bad())
    change = {event.host for event in board.events if event.status == "changed"} if check else set()
    if state == "cancelled":
        click.echo(f"interrupted after {elapsed_s:.0f} s: run it again, it goes on with what is left")
        return code
    if not board.bad() and state == "failed":
        raise errors.InfrastructureError(f"ansible-playbook failed: {said or 'no reason given'}")
    words = "done, with failures" if board.bad() else "done"
    would = f" ({len(change)} would change)" if change else ""
    click.echo(
        f"{words}: {good - len(change - board.bad())} of {len(board.nodes)} nodes as wanted{would}, {elapsed_s:.0f} s"
    )
    return code


def _change(setting: str, before: str, after: str) -> str:
    if "\n" in before or "\n" in after or len(before) + len(after) > 160:
        return f"{setting} would change"
    return f"{setting}: {before or '(none)'} -> {after or '(none)'}"


# --- the commands ----------------------------------------------------------------------------------


def _common(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout, nothing else."),
        click.option("--tags", metavar="TAG,…", help="Only these roles or phases, e.g. roce_qos or verify."),
        click.option("--hosts", metavar="SET", help="Only these nodes: names, aliases, node[003-006]."),
        inventory_option,
    ):
        command = option(command)
    return command


@click.command()
@_common
@results_option
@click.option("--check", is_flag=True, help="Change nothing; show what would change, setting by setting.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Set a role's variable for this run.")
@click.option("--dry-run", is_flag=True, help="Print the command and its tasks; connect to no node.")
@click.pass_context
def setup(
    ctx: click.Context,
    source: str | None,
    hosts: str | None,
    tags: str | None,
    results: Path,
    check: bool,
    settings: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Bring nodes to the wanted state: site.yml, with progress and a table of what was done.

    A second run changes nothing. A node that cannot be brought there is named with the reason; the others go on.
    """
    from runner.rundir import hold_nodes

    run_id = datetime.now(UTC).strftime("setup-%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    ctx.exit(
        _play(
            SITE,
            read_inventory(source),
            hosts,
            tags,
            as_json,
            check=check,
            variables=_variables(settings),
            dry_run=dry_run,
            folder=results / run_id,
            hold=lambda endpoints: nullcontext() if check else hold_nodes(state_dir(), endpoints, run_id),
        )
    )


@click.command()
@_common
@click.option("--backend", help="ssh or slurm: whom to ask; default: what the inventory says.")
@click.option("--set", "settings", multiple=True, metavar="slurm.KEY=VALUE", help="How Slurm is asked, as for bench.")
@click.option("--dry-run", is_flag=True, help="Print the command and its tasks; connect to no node.")
@click.pass_context
def check(
    ctx: click.Context,
    source: str | None,
    hosts: str | None,
    tags: str | None,
    backend: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Read back what nodes are now and show where they drifted; changes nothing, takes seconds.

    Where nodes are reached through Slurm only, it shows what Slurm has for them, and why it could not start a
    benchmark on all of them.
    """
    inventory = read_inventory(source)
    own = inventory.nodes[0].backend
    known = ("ssh", "slurm") if own != "local" else ("local",)
    if backend is not None and backend not in known:
        raise errors.unknown("backend", backend, known, f"inventory {inventory.source}")
    if (backend or own) == "slurm":
        if tags is not None:
            raise errors.UsageError("--tags chooses roles, and Slurm is asked for none: leave it out")
        ctx.exit(_ask_slurm(inventory, hosts, settings, dry_run, as_json))
    if settings:
        raise errors.UsageError(f"--set slurm.… goes with --backend slurm, this backend is {backend or own}")
    ctx.exit(_play(VERIFY, inventory, hosts, tags, as_json, dry_run=dry_run))


def _play(
    playbook_file: str,
    inventory: Inventory,
    hosts: str | None,
    tags: str | None,
    as_json: bool,
    *,
    check: bool = False,
    variables: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    folder: Path | None = None,
    hold: Any = lambda endpoints: nullcontext(),
) -> int:
    from runner import playbook
    from runner.display import Display
    from runner.inventory import fold, select
    from runner.rundir import write_json_atomic

    _check_tags(tags, PHASES if playbook_file == SITE else ("verify",))
    nodes = select(inventory, hosts)
    names = tuple(node.name for node in nodes)
    display = Display(quiet=as_json)
    remote = nodes[0].backend != "local"
    with nullcontext("SSH_CONFIG") if dry_run else transport(inventory) as ssh_config:
        call = playbook.Call(
            playbook=playbook_file,
            inventory=str(Path(inventory.source).absolute()),
            hosts=names,
            ssh_config=ssh_config if remote else None,
            tags=tags,
            check=check,
            variables=variables,
        )
        if dry_run:
            listed = playbook.tasks(call)
            plan = {"command": call.command(), "nodes": [node.alias for node in nodes], "tasks": listed}
            click.echo(json.dumps(plan, indent=1) if as_json else _described(plan))
            return errors.EXIT_OK
        started = time.monotonic()
        with hold({node.endpoint: node.name for node in nodes}):
            display.note(f"{playbook_file} on {fold([node.alias for node in nodes])}")
            board, state, said = carry_out(call, nodes, display, folder)
    elapsed_s = time.monotonic() - started
    if folder is not None:
        write_json_atomic(folder / "summary.json", summary(board, state, elapsed_s, said))
        display.note(f"events: {folder / 'ansible' / 'events.jsonl'}")
    return conclude(board, state, said, elapsed_s, as_json, check)


def _described(plan: Mapping[str, Any]) -> str:
    from runner.inventory import fold

    lines = [shlex.join(plan["command"]), f"# {len(plan['tasks'])} tasks on {fold(plan['nodes'])}"]
    return "\n".join([*lines, *(f"  {task}" for task in plan["tasks"])])


# --- Slurm instead of the nodes -------------------------------------------------------------------

_SURVEYED = {"usable": errors.EXIT_OK, "down": errors.EXIT_INFRASTRUCTURE, "refused": errors.EXIT_USAGE}


def _ask_slurm(inventory: Inventory, hosts: str | None, settings: Sequence[str], dry_run: bool, as_json: bool) -> int:
    from runner import allocations, cluster, config, slurm, survey
    from runner.inventory import select

    overrides = config.parse_settings(settings)
    if other := overrides.keys() - {"slurm"}:
        raise errors.unknown("setting", f"{min(other)}.…", ["slurm.…"], "--set")
    wanted = slurm.settings({**inventory.slurm, **overrides.get("slurm", {})}, f"slurm of {inventory.source}")
    nodes = select(inventory, hosts)
    if dry_run:
        asked = [list(cluster.PARTITIONS), list(cluster.NODES), ["sbatch", "--test-only"]]
        where = wanted.login or "this machine"
        plan = {"host": where, "commands": asked}
        text = "\n".join([f"# on {where}", *(shlex.join(argv) for argv in asked)])
        click.echo(json.dumps(plan, indent=1) if as_json else text)
        return errors.EXIT_OK
    with transport(inventory) as ssh_config:
        commands = allocations.cluster(wanted, inventory.hosts, ssh_config)
        found = survey.ask(commands, nodes, named=hosts is not None)
    if as_json:
        click.echo(json.dumps({"schema": 1, "backend": "slurm", **asdict(found)}, indent=1))
    else:
        click.echo(survey.describe(found, wanted, shutil.get_terminal_size((120, 24)).columns))
    return _SURVEYED[found.state]


def roles() -> list[str]:
    return sorted(path.parents[1].name for path in ROLES.glob("*/tasks/main.yml"))


PHASES = ("validate", "install", "configure", "verify")


def _check_tags(tags: str | None, phases: Sequence[str] = PHASES) -> None:
    known = [*roles(), *phases]
    for tag in (tags or "").split(",") if tags is not None else ():
        if tag.strip() not in known:
            raise errors.unknown("tag", tag.strip(), known, "--tags")


def _variables(settings: Iterable[str]) -> dict[str, Any]:
    """`--set NAME=VALUE` as Ansible's extra variables; a name must be a role's, a value is YAML."""
    import yaml

    known = {name: option for role in roles() for name, option in _options(role).items()}
    variables = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise errors.UsageError(f"--set {setting}: write NAME=VALUE, e.g. roce_qos_mtu=9000")
        if name not in known:
            raise errors.unknown("variable", name, known, f"--set {name}")
        if known[name].get("no_log"):  # a command line is no secret
            raise errors.UsageError(
                f"--set {name}: a secret belongs in a vault or a file of mode 0600, see its role's README"
            )
        try:
            variables[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise errors.UsageError(f"--set {setting}: {text!r} is no YAML value") from None
    return variables


def _options(role: str) -> dict[str, Any]:
    import yaml

    text = (ROLES / role / "meta" / "argument_specs.yml").read_text()
    return yaml.safe_load(text)["argument_specs"]["main"]["options"]
