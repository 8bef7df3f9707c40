"""`runner inventory`: the nodes as the product sees them."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli.options import inventory_option, read_inventory

if TYPE_CHECKING:
    pass


@click.command("inventory")
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
def show_inventory(source: str | None, hosts: str | None, folder: Path | None, as_json: bool) -> None:
    """The nodes as the product sees them; or the ssh_config that reaches them."""

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
        click.echo(json.dumps([asdict(node) for node in nodes], indent=1))
    else:
        rows = [
            {
                "alias": n.alias, "name": n.name, "address": f"{n.address}:{n.port}", "user": n.user,
                "gpus": n.gpus or "auto", "hardware": n.hardware, "nics": f"{n.nics} × {n.nic_gbit_per_s or '?'} Gb/s",
                "host key": "pinned" if n.host_key else "known_hosts",
            }
            for n in nodes
        ]  # fmt: skip
        click.echo(tabulate(rows, headers="keys"))
