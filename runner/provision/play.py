"""Runs a playbook, and records and shows its events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.provision.board import Board
from runner.provision.progress import Progress

if TYPE_CHECKING:
    from runner.cluster.inventory import Node
    from runner.provision.playbook import Call, Event
    from runner.report.progress import Display


SITE = "site.yml"


VERIFY = "playbooks/verify.yml"


def carry_out(call: Call, nodes: Sequence[Node], display: Display, folder: Path | None) -> tuple[Board, str, str]:
    """Run the playbook `call` on `nodes`, with progress on `display`.

    Events and Ansible's output are written to `folder`/ansible; None writes no files. Returns the board, the state
    (complete, failed or cancelled), and Ansible's own error or "". Raises InfrastructureError for a full disk.
    """
    from runner.cluster import reasons
    from runner.provision import playbook
    from runner.system.files import disk_errors

    by_name = {node.name: node for node in nodes}
    board = Board({node.name: node.alias for node in nodes})
    progress = Progress(call, display, len(nodes))
    reported: set[str] = set()
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
                event = replace(event, message=reasons.explain(by_name[event.host], None, lines))
            if events:
                print(json.dumps(asdict(event), ensure_ascii=False), file=events, flush=True)
            board.events.append(event)
            progress.answer(board.nodes[event.host])
            if event.status in ("failed", "unreachable") and event.host not in reported:
                reported.add(event.host)
                display.note(f"{board.nodes[event.host]}: {event.role or event.play} {event.status}")

        stack.enter_context(display.progress(1.0))
        log = folder / "ansible" / "ansible.log" if folder else None
        state, error = playbook.play(call, on_event, progress.task, log)
        progress.finish()
    return board, state, error
