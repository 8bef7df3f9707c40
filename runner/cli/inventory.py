"""`runner inventory` shows the nodes of an inventory; `runner inventory init` writes a new one."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from runner import errors
from runner.cli.options import POSITIVE, Commands, inventory_option, json_option, read_inventory
from runner.cluster.backends import BACKENDS, LOCAL, SLURM, SSH
from runner.system.wording import counted

if TYPE_CHECKING:
    from runner.cluster.inventory import Inventory, Node
    from runner.cluster.scaffold import Answers


@click.group("inventory", cls=Commands, invoke_without_command=True)
@inventory_option
@click.option("--hosts", metavar="SET", help="Only these nodes.")
@click.option(
    "--ssh-config",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write ssh_config and known_hosts there.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
@click.pass_context
def inventory(ctx: click.Context, source: str | None, hosts: str | None, folder: Path | None, as_json: bool) -> None:
    """The nodes as the product sees them; or the ssh_config that reaches them."""
    if ctx.invoked_subcommand is None:
        _show(source, hosts, folder, as_json)
    elif typed := _typed(ctx):
        option = _option(ctx, typed[0]).opts[-1]
        raise errors.UsageError(
            f"{option} is an option of `runner inventory` only: {ctx.invoked_subcommand} has its own options"
        )


def _show(source: str | None, hosts: str | None, folder: Path | None, as_json: bool) -> None:
    from tabulate import tabulate

    from runner.cluster.inventory import select
    from runner.cluster.ssh import known_hosts, ssh_config
    from runner.system.files import disk_errors, write_text_atomic

    inventory = read_inventory(source)
    nodes = select(inventory, hosts)
    if folder is not None:
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            pinned = (folder / "known_hosts").absolute()
            write_text_atomic(pinned, known_hosts(inventory))
            write_text_atomic(folder / "ssh_config", ssh_config(inventory, str(pinned)))
        click.echo(f"ssh -F {shlex.quote(str(folder / 'ssh_config'))} {nodes[0].alias}")
    elif as_json:
        click.echo(json.dumps([_described(node) for node in nodes], indent=1))
    else:
        rows = [
            {
                "alias": n.alias, "name": n.name, "address": n.endpoint, "user": n.become or n.user or "-",
                "gpus": n.gpus or "auto", "hardware": n.hardware, "nics": f"{n.nics} × {n.nic_gbit_per_s or '?'} Gb/s",
                "host key": "pinned" if n.host_key else "known_hosts",
            }
            for n in nodes
        ]  # fmt: skip
        click.echo(tabulate(rows, headers="keys"))


# --- init ------------------------------------------------------------------------------------------


class _Checked(click.ParamType):
    """Text that `check` converts to a value; where it raises UsageError, a terminal prompts again."""

    def __init__(self, name: str, check: Callable[[str], Any]) -> None:
        self.name = name
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._check(value)
        except errors.UsageError as error:
            raise click.BadParameter(str(error), ctx, param) from None


def _described(node: Node) -> dict[str, Any]:
    """What the inventory says of a node: where that is, the user has said."""
    return {name: value for name, value in asdict(node).items() if name != "inventory"}


def _backend(text: str) -> str:
    if text not in BACKENDS:
        raise errors.unknown("backend", text, BACKENDS)
    return text


def _hardware(text: str) -> str:
    from runner.plan import config

    if text not in config.names("hardware"):
        raise errors.unknown("hardware", text, config.names("hardware"))
    return text


def _hosts(text: str) -> tuple[str, ...]:
    from runner.cluster import scaffold

    return scaffold.hosts(text)


def _gpus(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise errors.UsageError(f"{text!r} is neither a number above 0 nor auto")
    return text if text == "auto" else int(text)


@inventory.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    default=SSH,
    type=_Checked("NAME", _backend),
    show_default=True,
    help="ssh, slurm, or local: this machine.",
)
@click.option("--hosts", type=_Checked("SET", _hosts), help="The nodes' names, by position: a,b,c or gpu[01-04].")
@click.option("--address", type=_Checked("SET", _hosts), help="As many addresses, where names do not resolve.")
@click.option("--port", default=22, show_default=True, type=click.IntRange(1, 65535), help="Of the nodes' sshd.")
@click.option("--user", default="root", show_default=True, help="Who logs in on the nodes.")
@click.option("--key-file", metavar="PATH", help="The private key; default: as ssh chooses.")
@click.option("--python", metavar="PATH", help="Of the nodes' environment; default: that of `runner setup`.")
@click.option("--gpus", default="auto", type=_Checked("N", _gpus), show_default=True, help="Per node; auto: left open.")
@click.option(
    "--hardware",
    default="unknown",
    type=_Checked("NAME", _hardware),
    show_default=True,
    help="One of configs/hardware.",
)
@click.option("--nics", default=1, show_default=True, type=click.IntRange(min=0), help="Of the fabric, per node.")
@click.option("--nic-gbit", type=POSITIVE, help="Rate of a NIC in Gb/s, one way.")
@click.option("--partition", help="Of Slurm; default: Slurm's own.")
@click.option("--account", help="Of Slurm; default: Slurm's own.")
@click.option("--login", metavar="HOST", help="Where Slurm's commands run, over ssh; default: on this machine.")
@click.option("--force", is_flag=True, help="Replace DIR/hosts.yml.")
@json_option
@click.pass_context
def init(ctx: click.Context, folder: Path, force: bool, as_json: bool, **values: Any) -> None:
    """Write DIR/hosts.yml, a commented inventory to start from.

    On a terminal, it prompts for the options that are not given.
    """
    from runner.cluster import scaffold
    from runner.system.nodeset import fold

    answers = _answers(ctx, values)
    read = scaffold.create(folder, answers, force)
    path = folder / scaffold.FILE
    if as_json:
        click.echo(json.dumps({"path": str(path), "nodes": [_described(node) for node in read.nodes]}, indent=1))
        return
    click.echo(f"wrote {path}: {fold([node.name for node in read.nodes])}")
    if answers.reached.remote and answers.gpus is None:
        click.echo("before `runner bench`, set runner_gpus_per_node and runner_device there")
    click.echo("next:")
    for command, why in _next(folder, read):
        click.echo(f"  {command}\n      {why}")


def _next(folder: Path, read: Inventory) -> list[tuple[str, str]]:
    """The next steps with a new inventory: (command, purpose)."""
    from runner.cluster import scaffold

    where = shlex.quote(str(folder))
    pin = []
    if command := scaffold.keyscan(read):
        pin = [
            (f"{command} > {shlex.quote(str(folder / 'known_hosts'))}", "pin host keys; compare the fingerprints first")
        ]
    asked = "what Slurm has" if BACKENDS[read.nodes[0].backend].scheduled else "what the nodes are now"
    return [(f"runner inventory -i {where}", "the nodes as they are read"), *pin, (f"runner check -i {where}", asked)]


# The prompts by backend. There is none for addresses, nor for how a login node is reached.
_QUESTIONS: Mapping[str, Mapping[str, str]] = {
    SSH: {
        "hosts": "Names of the nodes, such as gpu[01-04]",
        "port": "Port of their sshd",
        "user": "User there",
        "key_file": "Private key (empty: as ssh chooses)",
        "python": "Python of their environment",
        "gpus": "GPUs per node (auto: left open)",
        "hardware": "Hardware, one of configs/hardware",
        "nics": "NICs of the fabric per node",
        "nic_gbit": "Rate of a NIC in Gb/s, one way (empty: unknown)",
    },
    SLURM: {
        "hosts": "Names that Slurm has for the nodes, such as gpu[01-04]",
        "partition": "Partition (empty: Slurm's default)",
        "account": "Account (empty: Slurm's default)",
        "login": "Host for Slurm's commands (empty: this machine)",
        "python": "Python of the nodes' environment",
        "gpus": "GPUs per node (auto: left open)",
        "hardware": "Hardware, one of configs/hardware",
        "nics": "NICs of the fabric per node",
        "nic_gbit": "Rate of a NIC in Gb/s, one way (empty: unknown)",
    },
    LOCAL: {},
}
_EMPTY_IS_NONE = ("key_file", "nic_gbit", "partition", "account", "login")
_SLURM_ONLY = ("partition", "account", "login")
_ANY_BACKEND = ("backend", "force", "as_json")


def _typed(ctx: click.Context) -> list[str]:
    """The names of the parameters that were given on the command line."""
    names = [str(param.name) for param in ctx.command.params if isinstance(param, click.Option)]
    return [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def _option(ctx: click.Context, name: str) -> click.Option:
    (option,) = (param for param in ctx.command.params if param.name == name and isinstance(param, click.Option))
    return option


def _fitting(name: str) -> list[str]:
    """The names of the backends for which the option `name` is allowed."""
    if name in _ANY_BACKEND:
        return [*BACKENDS]
    return [kind.name for kind in BACKENDS.values() if (kind.scheduled if name in _SLURM_ONLY else kind.remote)]


def _answers(ctx: click.Context, values: dict[str, Any]) -> Answers:
    """The answers: given as options, entered on a terminal, or defaults. Raises UsageError for conflicting options."""
    from runner.cluster import scaffold

    typed = _typed(ctx)
    asking = sys.stdin.isatty()
    values["python"] = values["python"] or scaffold.PYTHON
    if asking and "backend" not in typed:
        values["backend"] = _ask(
            ctx, "backend", "Nodes are reached over ssh, through slurm, or local: this machine", SSH
        )
    backend = values["backend"]
    for name in typed:
        fitting = _fitting(name)
        if backend not in fitting:
            raise errors.UsageError(
                f"{_option(ctx, name).opts[0]} requires --backend {' or '.join(fitting)}; here it is {backend}"
            )
    for name, question in _QUESTIONS[backend].items() if asking else ():
        if name not in typed and not (name == "hardware" and values["gpus"] == "auto"):
            values[name] = _ask(ctx, name, question, values[name])
    if not BACKENDS[backend].remote:
        return scaffold.Answers(("localhost",), backend)
    if values["hosts"] is None:
        raise errors.UsageError(
            "--hosts is missing: name the nodes, as in --hosts 'gpu[01-04]', or add --backend local"
        )
    addresses = values.pop("address") or ()
    if addresses and len(addresses) != len(values["hosts"]):
        given, wanted = counted(len(addresses), "address", "addresses"), counted(len(values["hosts"]), "name")
        raise errors.UsageError(f"--address has {given}, --hosts {wanted}")
    names, gpus, nic_gbit = (values.pop(name) for name in ("hosts", "gpus", "nic_gbit"))
    return scaffold.Answers(
        names, addresses=addresses, gpus=None if gpus == "auto" else gpus, nic_gbit_per_s=nic_gbit, **values
    )


def _ask(ctx: click.Context, name: str, question: str, default: Any) -> Any:
    """Prompt on the terminal until the answer is valid; on stderr, since stdout may be read by programs."""
    option, optional = _option(ctx, name), name in _EMPTY_IS_NONE

    def convert(text: Any) -> Any:
        return None if optional and text == "" else option.type.convert(text, option, ctx)

    shown = "" if optional else default
    return click.prompt(question, default=shown, value_proc=convert, show_default=not optional, err=True)
