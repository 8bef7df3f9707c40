"""The command `runner`: parses options, calls the commands, and converts errors into exit codes.

Everything heavier than click is imported inside the command that needs it, so that `--help` is fast.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import click

from runner import __version__, errors
from runner.cli.options import Commands

# Every command's module, imported when the command is used: name -> (module, attribute, short help).
_COMMANDS = {
    "bench": ("bench", "bench", "Benchmark nodes: collectives and DeepSpeed fine-tuning, with a report."),
    "check": ("setup", "check", "Read the current state of nodes and show where they drifted."),
    "data": ("data", "data", "Prepare training data: tokenise, pack, cache."),
    "inventory": (
        "inventory",
        "inventory",
        "Show the nodes as the product sees them; init: write an inventory.",
    ),
    "launch": ("launch", "launch", "Start your own program on nodes, and watch it."),
    "report": ("report", "report", "Judge a run again and rewrite its report; default: the newest run."),
    "runs": ("runs", "runs", "Look at runs and stop them: list, show, tail, stop."),
    "setup": ("setup", "setup", "Bring nodes to the desired state: site.yml, with progress and a table."),
    "testbed": ("testbed", "testbed", "Start and stop a cluster of containers on this machine."),
    "tune": ("tune", "tune", "Find the fastest settings of a model on nodes, which bench then uses."),
    "workflow": ("workflow", "workflow", "Train a model in stages: fine-tuning, then PPO or GRPO on Ray, with verl."),
}


class _Commands(Commands):
    """A group with the names and help of its commands, which are imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            module, attribute, _ = _COMMANDS[cmd_name]
            return getattr(import_module(f"runner.cli.{module}"), attribute)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            if name in _COMMANDS:
                rows.append((name, _COMMANDS[name][2]))
            elif command := super().get_command(ctx, name):
                rows.append((name, command.get_short_help_str(80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="shakedown")
def cli() -> None:
    """Shakedown: bring up, benchmark and accept a multi-node GPU cluster."""


def main() -> None:
    """Entry point: prints one line for a user's error, a traceback for a bug; exits with the command's exit code."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt  # so that everything open is cleaned up

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    code = run(cli, sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end is known: Python's own way out must not become another
    sys.exit(code)


def run(command: click.Command, arguments: Sequence[str]) -> int:
    """Run `command` with `arguments`; returns the exit code, and prints an error that is not a bug.

    Notes that were added to the error have lines of their own.
    """
    notes: Sequence[str] = ()
    try:
        return command.main(list(arguments), prog_name="runner", standalone_mode=False) or errors.EXIT_OK
    except errors.RunnerError as error:
        failure, notes = _failure(error.exit_code, str(error), error.kind, error.nodes), _notes(error)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:  # the whole help, not one line
        click.echo(error.format_message(), err=True)
        return errors.EXIT_USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        failure = _failure(errors.EXIT_USAGE, f"{error.format_message()}{hint}")
    except BrokenPipeError:  # `runner ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.EXIT_OK
    except OSError as error:  # a disk, a folder, a file: an error of the environment, not of the program
        failure = _failure(errors.EXIT_INFRASTRUCTURE, errors.os_error_text(error), errors.disk_kind(error))
        notes = _notes(error)
    except (KeyboardInterrupt, click.Abort):
        failure = _failure(errors.EXIT_INTERRUPTED, "interrupted")
    click.echo("\n".join([f"runner: {failure['message']}", *notes]), err=True)
    if wants_json(command, arguments):
        with suppress(OSError):  # stdout is closed
            click.echo(json.dumps({"error": failure}, indent=1))
    return int(failure["code"])


def _notes(error: BaseException) -> Sequence[str]:
    return getattr(error, "__notes__", ())


def _failure(
    code: int, message: str, kind: str | None = None, nodes: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """An error as `--json` prints it."""
    return {"code": code, "message": message, "kind": kind, "nodes": list(nodes)}


def wants_json(command: click.Command, arguments: Sequence[str]) -> bool:
    """Whether the command in `arguments` has an option `--json`, and it was given.

    The command's own parser runs again, tolerant of errors, since the error may be in the options: arguments after
    `--` or of a script do not count. Without a command, `--json` before a `--` counts.
    """
    rest, context = list(arguments), None
    while True:
        tolerant = {"resilient_parsing": True, "ignore_unknown_options": True, "allow_extra_args": True}
        context = click.Context(command, context, **{**command.context_settings, **tolerant})
        given, rest, _ = command.make_parser(context).parse_args(rest)
        if given.get("as_json") or not isinstance(command, click.Group):
            return bool(given.get("as_json"))
        chosen = None
        if rest:
            with suppress(click.ClickException, errors.RunnerError):
                chosen = command.get_command(context, rest[0])
        if chosen is None:
            before = arguments[: arguments.index("--")] if "--" in arguments else arguments
            return "--json" in before
        command, rest = chosen, rest[1:]


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script: eval "$(runner completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "runner", "_RUNNER_COMPLETE").source())


if __name__ == "__main__":
    main()
