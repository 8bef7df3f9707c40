"""The Hugging Face hub: which commit a revision is, and its libraries' errors as one line."""

from __future__ import annotations

import re

from runner.errors import InfrastructureError, RunnerError, UsageError

ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
INSTEAD = "give a local file or folder, or use 'builtin'"  # what a user may do whom the hub does not serve


def pinned(kind: str, source: str, instead: str = INSTEAD) -> tuple[str, str]:
    """The repository and commit of `id` or `id@revision`; queries the hub unless the revision is a full commit."""
    repo, _, revision = source.partition("@")
    return repo, revision if COMMIT.fullmatch(revision) else ask(kind, repo, revision or None, instead)


def ask(kind: str, repo: str, revision: str | None, instead: str = INSTEAD) -> str:
    """The commit of a revision, by one request: without a network, the loaders would retry for a minute."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE and revision and COMMIT.fullmatch(revision):
        return revision  # the loaders find it in their own cache, or report that it is missing
    try:
        info = HfApi().dataset_info if kind == "data set" else HfApi().model_info
        return str(info(repo, revision=revision, timeout=20).sha)
    except Exception as error:
        raise error_of(kind, repo, error, instead) from error


def error_of(kind: str, repo: str, error: Exception, instead: str = INSTEAD) -> RunnerError:
    """InfrastructureError where the hub did not answer, else UsageError; the hub's libraries raise many types."""
    link: BaseException | None = error
    while link is not None:
        # by name: the HTTP library that is used, and its types, differ between releases
        if re.search("Connect|Timeout|Offline|LocalEntryNotFound", type(link).__name__):
            said = f"{kind} {repo!r}: the Hugging Face hub does not answer; {instead}"
            return InfrastructureError(said, "hub_unreachable")
        link = link.__cause__ or link.__context__
    return UsageError(f"{kind} {repo!r}: {first_line(error)}; {instead}")


def first_line(error: Exception) -> str:
    """The first line of what an error says, without its full stop; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;")
