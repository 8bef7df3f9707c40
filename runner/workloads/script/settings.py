"""The settings of test `script`: `runner launch` makes them, and `--set script.KEY=VALUE` changes them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat

from runner.system.schema import ConfigFile

Words = Annotated[tuple[str, ...], Field(min_length=1)]


class ScriptTest(ConfigFile):
    """`argv` are the user's words, `folder` is where they are started on the node, and `python` the Python there that
    runs them and starts ranks ("": the node's own). `env` is set for the program; variables of the names in `env_pass`
    are the user's own, whose values no file has. `resume_arg` are the words that a run which is resumed adds.
    `resumed`: it has them. `timeout_s` is the time limit in seconds, None for none.
    """

    argv: Words
    folder: Annotated[str, Field(pattern=r"^/")]
    python: str = ""
    env: dict[str, str] = Field(default_factory=dict)
    env_pass: tuple[str, ...] = ()
    resume_arg: str = ""
    resumed: bool = False
    timeout_s: PositiveFloat | None = None
