"""The roles: their names, phases and variables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from runner import errors
from runner.system.places import ROLES


def roles() -> list[str]:
    """The names of the roles, sorted."""
    return sorted(path.parents[1].name for path in ROLES.glob("*/tasks/main.yml"))


PHASES = ("validate", "install", "configure", "verify")


def check_tags(tags: str | None, phases: Sequence[str] = PHASES) -> None:
    """Raise UsageError where `tags` (comma-separated, None for all) has one that is neither a role nor in `phases`."""
    known = [*roles(), *phases]
    for tag in (tags or "").split(",") if tags is not None else ():
        if tag.strip() not in known:
            raise errors.unknown("tag", tag.strip(), known, "--tags")


def variables_of(settings: Iterable[str]) -> dict[str, Any]:
    """`--set NAME=VALUE` as Ansible's extra variables; the name is a variable of a role, the value is YAML.

    Raises UsageError for an unknown name, a secret, or a value that is not YAML.
    """
    import yaml

    known = {name: option for role in roles() for name, option in _options(role).items()}
    variables = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise errors.UsageError(f"--set {setting}: write NAME=VALUE, e.g. roce_qos_mtu=9000")
        if name not in known:
            raise errors.unknown("variable", name, known, f"--set {name}")
        if known[name].get("no_log"):  # a command line is visible to all users
            raise errors.UsageError(
                f"--set {name}: a secret belongs in a vault or a file of mode 0600, see its role's README"
            )
        try:
            variables[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise errors.UsageError(f"--set {setting}: {text!r} is not a YAML value") from None
    return variables


def _options(role: str) -> dict[str, Any]:
    import yaml

    text = (ROLES / role / "meta" / "argument_specs.yml").read_text()
    return yaml.safe_load(text)["argument_specs"]["main"]["options"]
