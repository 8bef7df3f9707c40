"""`runner setup` and `runner check`: run the playbooks, with progress, folded failures and a table of nodes and roles.

`Board` collects the events; `failures`, `warnings`, `table` and `summary` are pure functions of it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner import errors
from runner.cli.options import inventory_option, json_option, read_inventory, results_option
from runner.cluster.backends import BACKENDS
from runner.cluster.reasons import setup_command
from runner.cluster.ssh import rendered
from runner.provision.board import Board, diffs, exit_code, failures, summary, table, warnings
from runner.provision.play import SITE, VERIFY, carry_out
from runner.provision.roles import PHASES, check_tags, variables_of
from runner.system.places import cache_dir, state_dir
from runner.system.wording import counted

if TYPE_CHECKING:
    from runner.cluster.inventory import Inventory, Node
    from runner.launch.links import Survey


def conclude(
    board: Board,
    state: str,
    error: str,
    elapsed_s: float,
    as_json: bool,
    check: bool,
    source: str,
    links: Survey | None = None,
) -> int:
    """Print the results of a play and return its exit code.

    `state` is the play's, `error` Ansible's own or "", `source` the inventory, `links` how nodes are connected where
    that was asked. Raises InfrastructureError where Ansible failed and no node did.
    """
    if as_json:
        more = {"links": links.to_json()} if links else {}
        click.echo(json.dumps(summary(board, state, elapsed_s, error) | more, indent=1))
        return exit_code(board, state)
    if check:
        for nodes, setting, before, after in diffs(board):
            click.echo(f"{nodes}: {_change(setting, before, after)}")
    for nodes, role, text in warnings(board):
        click.echo(f"{nodes}: {role + ': ' if role else ''}warning: {text}")
    for failure in failures(board):
        # Modules know the inventory by its whole path.
        line = f"{failure.nodes}: {failure.line()}"
        click.echo(line.replace(f"-i {shlex.quote(whole_path(source))}", f"-i {shlex.quote(source)}"))
    if board.roles():
        click.echo(f"\n{table(board)}\n")
    if links and (described := links.described()):
        click.echo(f"{described}\n")
    code = exit_code(board, state)
    good = len(board.nodes) - len(board.bad())
    change = {event.host for event in board.events if event.status == "changed"} if check else set()
    if state == "cancelled":
        click.echo(f"interrupted after {elapsed_s:.0f} s: run it again, it continues with what is left")
        return code
    if not board.bad() and state == "failed":
        raise errors.InfrastructureError(f"ansible-playbook failed: {error or 'no reason given'}")
    words = "done, with failures" if board.bad() else "done"
    would = f" ({len(change)} would change)" if change else ""
    click.echo(
        f"{words}: {good - len(change - board.bad())} of {counted(len(board.nodes), 'node')} "
        f"as expected{would}, {elapsed_s:.0f} s"
    )
    return code


def _change(setting: str, before: str, after: str) -> str:
    if "\n" in before or "\n" in after or len(before) + len(after) > 160:
        return f"{setting} would change"
    return f"{setting}: {before or '(none)'} -> {after or '(none)'}"


# --- the commands ----------------------------------------------------------------------------------


def _common(command: Any) -> Any:
    for option in (
        json_option,
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
    """Bring nodes to the expected state: site.yml, with progress and a table of the changes.

    A second run changes nothing. A node that fails is reported with the reason; the others continue.
    """
    from runner.system.locks import hold_nodes

    run_id = datetime.now(UTC).strftime("setup-%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    ctx.exit(
        _play(
            SITE,
            read_inventory(source),
            hosts,
            tags,
            as_json,
            check=check,
            variables=variables_of(settings),
            dry_run=dry_run,
            folder=results / run_id,
            hold=lambda endpoints: nullcontext() if check else hold_nodes(state_dir(), endpoints, run_id),
        )
    )


@click.command()
@_common
@click.option("--backend", help="ssh or slurm: what is queried; default: as in the inventory.")
@click.option("--set", "settings", multiple=True, metavar="slurm.KEY=VALUE", help="Slurm's settings, as for bench.")
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
    """Read the state of the nodes and show where it drifted; changes nothing, takes seconds.

    Without --tags it also shows why a benchmark would be refused. Where nodes are reached through Slurm only, it shows
    Slurm's state of them, and why a benchmark could not start on all of them.
    """
    inventory = read_inventory(source)
    own = inventory.nodes[0].backend
    known = [name for name, row in BACKENDS.items() if row.remote == BACKENDS[own].remote]
    if backend is not None and backend not in known:
        raise errors.unknown("backend", backend, known, f"inventory {inventory.source}")
    if BACKENDS[backend or own].scheduled:
        if tags is not None:
            raise errors.UsageError("--tags selects roles, and none run through Slurm: leave it out")
        ctx.exit(_ask_slurm(inventory, hosts, settings, dry_run, as_json))
    if settings:
        raise errors.UsageError(f"--set slurm.… requires --backend slurm, this backend is {backend or own}")
    ctx.exit(_play(VERIFY, inventory, hosts, tags, as_json, backend=backend, dry_run=dry_run))


def _play(
    playbook_file: str,
    inventory: Inventory,
    hosts: str | None,
    tags: str | None,
    as_json: bool,
    *,
    backend: str | None = None,
    check: bool = False,
    variables: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    folder: Path | None = None,
    hold: Any = lambda endpoints: nullcontext(),
) -> int:
    from runner.cluster.inventory import select
    from runner.provision import playbook, profiles
    from runner.report.progress import Display
    from runner.system.files import write_json_atomic
    from runner.system.nodeset import fold

    check_tags(tags, PHASES if playbook_file == SITE else ("verify",))
    nodes = select(inventory, hosts)
    if backend:
        nodes = tuple(replace(node, backend=backend) for node in nodes)
    names = tuple(node.name for node in nodes)
    display = Display()
    remote = BACKENDS[nodes[0].backend].remote
    kept = ssh_folder(inventory.source)
    with nullcontext(str(kept / "ssh_config")) if dry_run else rendered(inventory) as ssh_config:
        call = playbook.Call(
            playbook=playbook_file,
            inventory=whole_path(inventory.source),
            hosts=names,
            ssh_config=ssh_config if remote else None,
            tags=tags,
            check=check,
            variables=variables,
        )
        of_setup = playbook_file == SITE
        here = profiles.wanted(nodes, variables or {}, of_setup) if _of_profiles(of_setup, tags) else {}
        if dry_run:
            listed = playbook.tasks(call)
            writes = ["runner", "inventory", "-i", inventory.source, "--ssh-config", str(kept)] if remote else None
            plan = {"ssh_config": writes, "command": call.command()}
            plan |= {"nodes": [node.alias for node in nodes], "tasks": listed, "profiles": sorted(here)}
            click.echo(json.dumps(plan, indent=1) if as_json else _described(plan))
            return errors.EXIT_OK
        started = time.monotonic()
        with hold({node.endpoint: node.name for node in nodes}):
            made = profiles.settle(here, display, repair=of_setup and not check)
            display.note(f"{playbook_file} on {fold([node.alias for node in nodes])}")
            board, state, error = carry_out(call, nodes, display, folder)
            for name, (problem, changed) in made.items():
                told = [problem] if problem and not check else []
                for host in here[name]:
                    board.add(host, "profiles", told, changed=changed or bool(problem and check))
            links = None
            if playbook_file == VERIFY and tags is None and state != "cancelled":
                _add_readiness(board, nodes, ssh_config)
                links = _add_links(board, nodes, ssh_config)
    elapsed_s = time.monotonic() - started
    if folder is not None:
        write_json_atomic(folder / "summary.json", summary(board, state, elapsed_s, error))
        display.note(f"events: {folder / 'ansible' / 'events.jsonl'}")
    return conclude(board, state, error, elapsed_s, as_json, check, inventory.source, links)


def _of_profiles(of_setup: bool, tags: str | None) -> bool:
    """Whether these tags, comma-separated, select what the controller has of the role conda_env."""
    phase = "install" if of_setup else "verify"
    return tags is None or bool({"conda_env", phase} & {tag.strip() for tag in tags.split(",")})


# What bench would be refused for, and the role that tells the same cause in more detail.
_TOLD_BY = {
    "environment_missing": "conda_env",
    "version_mismatch": "conda_env",
    "gpu_failed": "cuda_check",
    "unreachable": "ssh_mesh",
    "host_key_changed": "ssh_mesh",
    "refused_key": "ssh_mesh",
}


def _add_readiness(board: Board, nodes: Sequence[Node], ssh_config: str | None) -> None:
    """Add to `board` what `bench` would refuse these nodes for; a run in progress is no fault of a node."""
    from runner.launch import preflight
    from runner.launch.prepare import Options

    asked = [node for node in nodes if node.name not in board.unreachable()]
    problems = preflight.readiness(asked, Options.engine, ssh_config) if asked else {}
    for node in asked:
        failed = {role for role in board.roles() if board.state(node.name, role) == "failed"}
        remedies = [setup_command(node, role) for role in failed]
        texts = [
            problem.message
            for problem in problems.get(node.name, ())
            if problem.kind != "in_use"
            and _TOLD_BY.get(problem.kind) not in failed
            and not any(remedy in problem.message for remedy in remedies)
        ]
        busy = [problem.message for problem in problems.get(node.name, ()) if problem.kind == "in_use"]
        board.add(node.name, "bench", texts, busy)


def _add_links(board: Board, nodes: Sequence[Node], ssh_config: str | None) -> Survey | None:
    """Add to `board` how the nodes that can be reached are connected and powered; returns what they have answered."""
    from runner.launch.links import survey

    asked = [node for node in nodes if node.name not in board.unreachable()]
    if not asked:
        return None
    found = survey(asked, ssh_config)
    problems = found.problems()
    for node in (node for node in asked if node.name in found.linked):
        told = problems.get(node.name, [])
        alone = len(nodes) == 1  # what slows one machine down is its user's choice; others would wait for it
        hints = [f"{p['what']}: {p['found']} ({p['remedy']})" for p in told] if alone else []
        board.add(node.name, "links", [] if alone else told, hints)
    return found


def whole_path(source: str) -> str:
    """The path of an inventory as it is passed to Ansible, which runs elsewhere."""
    return str(Path(source).absolute())


def ssh_folder(source: str) -> Path:
    """The folder in which a dry run has the ssh_config of an inventory written, by a command that it prints as well."""
    return cache_dir() / "ssh" / hashlib.sha256(whole_path(source).encode()).hexdigest()[:12]


def _described(plan: Mapping[str, Any]) -> str:
    from runner.system.nodeset import fold

    commands = [shlex.join(command) for command in (plan["ssh_config"], plan["command"]) if command]
    if plan["profiles"]:
        commands.append(f"# profiles made here, unless they are whole: {', '.join(plan['profiles'])}")
    lines = [*commands, f"# {counted(len(plan['tasks']), 'task')} on {fold(plan['nodes'])}"]
    return "\n".join([*lines, *(f"  {task}" for task in plan["tasks"])])


# --- Slurm instead of the nodes -------------------------------------------------------------------

_SURVEYED = {"usable": errors.EXIT_OK, "down": errors.EXIT_INFRASTRUCTURE, "refused": errors.EXIT_USAGE}


def _ask_slurm(inventory: Inventory, hosts: str | None, settings: Sequence[str], dry_run: bool, as_json: bool) -> int:
    from runner.cluster import slurm as slurm_settings
    from runner.cluster.inventory import select
    from runner.launch.slurm import allocations, capacity, survey
    from runner.plan import config

    overrides = config.parse_settings(settings)
    if other := overrides.keys() - {"slurm"}:
        raise errors.unknown("setting", f"{min(other)}.…", ["slurm.…"], "--set")
    requested = slurm_settings.settings(
        {**inventory.slurm, **overrides.get("slurm", {})}, f"slurm of {inventory.source}"
    )
    nodes = select(inventory, hosts)
    if dry_run:
        asked = [capacity.PARTITIONS, capacity.NODES, capacity.CONFIG]
        asked += [capacity.RESERVATIONS] if requested.reservation else []
        argvs = [*map(list, asked), ["sbatch", "--test-only"]]
        where = requested.login or "this machine"
        plan = {"host": where, "commands": argvs}
        text = "\n".join([f"# on {where}", *(shlex.join(argv) for argv in argvs)])
        click.echo(json.dumps(plan, indent=1) if as_json else text)
        return errors.EXIT_OK
    with rendered(inventory) as ssh_config:
        commands = allocations.cluster(requested, inventory.hosts, ssh_config)
        found = survey.ask(commands, nodes, named=hosts is not None)
    if as_json:
        click.echo(json.dumps({"schema": 1, "backend": "slurm", **asdict(found)}, indent=1))
    else:
        click.echo(survey.describe(found, requested, shutil.get_terminal_size((120, 24)).columns))
    return _SURVEYED[found.state]
