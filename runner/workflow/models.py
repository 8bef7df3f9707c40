"""The model that a workflow starts from: a name, a folder, or an id of the Hugging Face hub, as a folder here."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import InfrastructureError, RunnerError, UsageError, unknown
from runner.system.wording import size_text
from runner.workloads import weights
from runner.workloads.data import hub
from runner.workloads.rl import tiny

NAMES: Mapping[str, str] = {  # what people say -> the hub's id
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
_INSTEAD = "give --model a folder"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_KEPT = (".json", ".jinja", ".txt", ".model", ".md", "LICENSE")  # ends of the files beside the weights
_INTERVAL_S = 0.5  # between two looks at what has arrived

Bytes = Callable[[int, int], None]


@dataclass(frozen=True)
class Model:
    """A model in a folder on this machine, whole as far as can be seen without loading it.

    `about` is what is known of where it comes from, `notes` are lines for the user.
    """

    name: str
    folder: Path
    about: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def find(model: str | None, cache: Path, on_progress: Bytes | None = None) -> Model:
    """The model that is asked for, fetched if it is on the hub; None: the tiny one, made below `cache`.

    `on_progress` is called with (bytes, bytes in total) while it is fetched. Raises UsageError for a model that there
    is not, that is not whole, or that takes a licence; InfrastructureError for a hub that does not answer.
    """
    if model is None or model == tiny.NAME:
        folder, made = tiny.make(cache / "models")
        return Model(tiny.NAME, folder, made.about)
    if is_local(model):
        return _checked(Model(Path(model).expanduser().name, Path(model).expanduser().absolute(), {"folder": model}))
    return _checked(_fetched(hub_id(model), on_progress))


def preview(model: str | None, cache: Path, work: Path) -> Model:
    """As `find`, but nothing is contacted, made or fetched: `folder` is where it would be, below `work` if only the hub
    knows.
    """
    if model is None or model == tiny.NAME:
        return Model(tiny.NAME, tiny.place(cache / "models"), {})
    if is_local(model):
        return find(model, cache)
    source = hub_id(model)
    try:
        return _checked(_cached(source))
    except RunnerError:
        from huggingface_hub import get_token

        name = _plain(source.partition("@")[0])
        note = f"model {source}: not here yet, fetched from the hub when it starts"
        if get_token() is None:
            note += "; HF_TOKEN is not set, which a model that takes a licence needs"
        return Model(name, work / name, {}, (note,))


def is_local(model: str) -> bool:
    """Whether a model is given by its folder."""
    return weights.is_path(model) or os.path.isdir(model)


def hub_id(model: str) -> str:
    """The hub's `id` or `id@revision` of a model by name or id. Raises UsageError for what is neither."""
    if hub.ID.fullmatch(model):
        return model
    if model.lower() in NAMES:
        return NAMES[model.lower()]
    raise unknown(
        "model", model, [*NAMES, tiny.NAME], "--model takes a folder, an id of the hub (OWNER/NAME), or a name"
    )


def _plain(repo: str) -> str:
    return repo.replace("/", "--").replace("@", "--")


def _checked(model: Model) -> Model:
    """The model itself. Raises UsageError where it is not whole, or verl could not ask it."""
    if fault := weights.fault(model.folder):
        raise UsageError(f"model {model.folder}: its weights {fault}", "weights_unusable")
    if not any((model.folder / name).exists() for name in _TOKENIZERS):
        raise UsageError(f"model {model.folder} has no tokenizer (tokenizer.json): copy it there", "weights_unusable")
    if not _template(model.folder):
        raise UsageError(
            f"model {model.folder}: its tokenizer has no chat template, with which verl asks questions: take an "
            "instruct model, or add chat_template.jinja",
            "weights_unusable",
        )
    return model


def _template(folder: Path) -> bool:
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


# ---- the hub ----


def _fetched(source: str, on_progress: Bytes | None) -> Model:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if constants.HF_HUB_OFFLINE:
        return _cached(source)
    api = HfApi()
    repo, _, revision = source.partition("@")
    try:
        info = api.model_info(repo, revision=revision or None, files_metadata=True, timeout=20)
    except Exception as error:
        raise _error(repo, error) from error
    licence = _licence(info)
    if info.gated and get_token() is None:
        raise _gated(repo, "and set HF_TOKEN")
    wanted = {one.rfilename: one.size or 0 for one in info.siblings or () if _is_wanted(one.rfilename, info)}
    if not any(name.endswith((".safetensors", ".bin")) for name in wanted):
        raise UsageError(f"model {repo!r} on the hub has no weights of transformers; take another", "weights_unusable")
    cache = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    total = sum(wanted.values())
    _require_space(repo, cache, total)
    try:
        with _watched(cache / "blobs", total, on_progress):
            # By its name, not by its commit: so it is found by this name without the hub, too.
            folder = Path(api.snapshot_download(repo, revision=revision or None, allow_patterns=list(wanted)))
    except Exception as error:
        raise _error(repo, error) from error
    about = {"hub": repo, "commit": folder.name, "license": licence}
    return Model(_plain(repo), folder, about, (f"model {repo} at {folder.name[:12]}, licence: {licence}",))


def _cached(source: str) -> Model:
    """A model of the hub that was fetched before; the hub is not asked. Raises InfrastructureError where it was not."""
    from huggingface_hub import HfApi

    repo, _, revision = source.partition("@")
    kept = [f"*{end}" for end in (*_KEPT, ".safetensors")]
    try:
        folder = Path(
            HfApi().snapshot_download(
                repo, revision=revision or None, local_files_only=True, allow_patterns=kept, ignore_patterns="*/*"
            )
        )
    except Exception as error:
        raise _error(repo, error) from error
    return Model(_plain(repo), folder, {"hub": repo, "commit": folder.name})


def _is_wanted(name: str, info: Any) -> bool:
    """Whether a file of a repository is needed: of weights in two formats only safetensors, no folders."""
    if "/" in name or name.startswith("."):
        return False
    safe = any(one.rfilename.endswith(".safetensors") and "/" not in one.rfilename for one in info.siblings)
    return name.endswith((*_KEPT, ".safetensors" if safe else ".bin"))


def _licence(info: Any) -> str:
    card = info.card_data or {}
    named = card.get("license_name") or card.get("license")
    return str(named or "not stated: see the model's page")


def _require_space(repo: str, cache: Path, total: int) -> None:
    missing = total - _arrived(cache / "blobs")
    free = shutil.disk_usage(_existing(cache)).free
    if missing > free:
        raise InfrastructureError(
            f"model {repo!r}: {size_text(missing)} are to be fetched to {cache.parent}, where {size_text(free)} are "
            "free: free some space, or set HF_HOME to another disk",
            "controller_disk_full",
        )


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above that is there."""
    return next(one for one in (path, *path.parents) if one.exists())


def _arrived(blobs: Path) -> int:
    """The bytes in a folder of downloads."""
    total = 0
    with suppress(OSError), os.scandir(blobs) as entries:  # it is not there yet
        for entry in entries:
            with suppress(OSError):  # it has just got its final name
                total += entry.stat().st_size
    return total


@contextmanager
def _watched(blobs: Path, total: int, on_progress: Bytes | None) -> Iterator[None]:
    """While the block runs, say how much has arrived: the hub's own bars are different in each of its releases."""
    if on_progress is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        most = 0  # a file that is being renamed is not seen
        while not ended.wait(_INTERVAL_S):
            most = max(most, min(_arrived(blobs), total))
            on_progress(most, total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _gated(repo: str, then: str) -> UsageError:
    from huggingface_hub import constants

    return UsageError(
        f"model {repo!r} is gated: accept its licence at {constants.ENDPOINT}/{repo} {then}", "weights_unusable"
    )


def _error(repo: str, error: Exception) -> RunnerError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(repo, "with the account whose token is in HF_TOKEN, which has no access yet")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"model {repo!r} is not on the hub, or private: correct --model, or set HF_TOKEN", "weights_unusable"
        )
    return hub.error_of("model", repo, error, _INSTEAD)
