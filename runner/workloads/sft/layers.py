"""How the decoder layers of the model compute: as they are, compiled, with activations kept or computed again."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.errors import UsageError
from runner.workloads.sft import recompute


def arrange(
    model: Any, *, recomputed: str, compiled: bool, checkpoint: Callable[..., Any], backend: str = "inductor"
) -> None:
    """Set the forward pass of every decoder layer of `model`, before DeepSpeed's engine is built around it.

    `recomputed` is `none`, `selective` or `full`, for which `checkpoint` (function, *inputs) is called. `compiled`
    layers are compiled by `backend` of torch.compile: one graph for all layers, as they differ in their weights only.
    What is computed again in full is so outside of the graph, what selectively inside.

    Under ZeRO-3 the weights of a layer that is compiled or computes again are then gathered together: hooks of the
    modules inside it would cut the graph at each of them, and gather while activations are computed again.
    """
    layers = model.model.layers
    if recomputed == "full" and not compiled:
        model._set_gradient_checkpointing(True, checkpoint)  # transformers' own
        return
    if compiled or recomputed == "selective":
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [type(layers[0])])
    for layer in layers:
        forward = layer.forward
        if recomputed == "selective":
            forward = recompute.selective(forward)
        if compiled:
            forward = _compiled(forward, backend)
        if recomputed == "full":
            forward = _checkpointed(forward, checkpoint)
        layer.forward = forward


def mark_dynamic(arguments: Mapping[str, Any]) -> None:
    """Tell torch.compile that the boundaries of samples among `arguments` of a forward pass differ in number.

    Without it a second number would compile again, and the ones after it might until torch gives up.
    """
    import torch

    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            torch._dynamo.mark_dynamic(value, 0)


@contextmanager
def compiling() -> Iterator[None]:
    """A context in which layers that are compiled too often fail, instead of running several times slower.

    Raises UsageError for that, where no compiler is installed, and with a torch that compiles each layer anew.
    """
    import torch

    _require_compiler()
    if not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        raise UsageError(
            f"sft.compile needs a newer torch than {torch.__version__}, which compiles each layer by itself: "
            "set sft.compile=false"
        )
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise UsageError(
            "torch.compile compiled a layer again and again, since something differs from batch to batch: "
            f"set sft.compile=false and sft.precision=auto ({str(error).strip().splitlines()[0]})"
        ) from error


def _require_compiler() -> None:
    """Raise UsageError of one line where what torch.compile generates cannot be built: later it is a long traceback."""
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang", "cc"))):
        raise UsageError("sft.compile needs a C compiler on every node: install gcc, or set sft.compile=false")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise UsageError(
            f"sft.compile needs Python's headers on every node ({sysconfig.get_path('include')}/Python.h): install "
            "python3-dev, or set sft.compile=false"
        )


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    import torch

    compiled: Callable[..., Any] = torch.compile(forward, backend=backend)
    return compiled


def _checkpointed(forward: Callable[..., Any], checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **settings: Any) -> Any:
        return checkpoint(lambda *again: forward(*again, **settings), *inputs)

    return run
