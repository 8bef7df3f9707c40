"""What the layers of the model of `sft` compute when they are compiled, recomputed or in 8 bits: run on each of two ranks.

    torchrun --nproc-per-node 2 tests/layers_probe.py FOLDER

FOLDER/arms.json holds a list of arms; rank 0 writes FOLDER/found.json with one dictionary for each:

    losses    of each step
    graphs    that torch.compile has made, of how many `frames` it has looked at
    gathered  weights of layers (in numbers) that are in memory between forward and backward pass
    optimizer what updates the weights
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import model_probe

SEQ_LEN = 64
STEPS = 3


def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, **more: Any) -> Any:
    """STAND-IN for torch's varlen attention, which needs a GPU: one operation with the boundaries as a tensor."""
    sample = torch.bucketize(torch.arange(query.shape[2]), more["cu_seq_lens_q"], right=True)
    visible = (sample[:, None] == sample[None]).tril()
    result = functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling, enable_gqa=True)
    return result.transpose(1, 2), None


def batch(draw: torch.Generator) -> dict[str, Any]:
    """A row of one to six samples, and their boundaries."""
    cuts = torch.randperm(SEQ_LEN - 2, generator=draw)[: int(torch.randint(6, (), generator=draw))] + 1
    bounds = [0, *sorted(cuts.tolist()), SEQ_LEN]
    places = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(bounds)])
    ids = 3 * places % 64
    ends = torch.tensor(bounds, dtype=torch.int32)
    more = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": SEQ_LEN, "max_length_k": SEQ_LEN}
    return {"input_ids": ids[None], "position_ids": places[None], "use_cache": False, **more}


def run(
    stage: int,
    num_layers: int,
    recomputed: str = "none",
    compiled: bool = False,
    recipe: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Train a model of `num_layers` with ZeRO `stage` for some steps; `more` goes into DeepSpeed's section."""
    import deepspeed
    import torch.distributed as dist
    from transformers.integrations import HfDeepSpeedConfig

    from runner.workloads.sft import float8, layers, versions
    from runner.workloads.sft.engine import optimizer_name
    from runner.workloads.sft.model import build_model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, "stage3_max_live_parameters": 10}
    zero |= {"stage3_prefetch_bucket_size": 10, "stage3_max_reuse_distance": 10, **more}
    config = {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
        "zero_optimization": zero,
    }
    alive = HfDeepSpeedConfig(config)
    model = build_model(
        {**model_probe.MODEL, "num_layers": num_layers}, attention="probe", dtype=torch.bfloat16, seed=3
    )
    del alive
    model.train()
    if recipe is not None:
        float8.convert(model, recipe, emulate=True)
    # What torch's compiler does before it writes code, which takes minutes for a CPU.
    layers.arrange(
        model, recomputed=recomputed, compiled=compiled, checkpoint=versions.checkpoint(config), backend="aot_eager"
    )
    gathered: list[Any] = []
    for layer in model.model.layers:  # ZeRO-3 gathers for all of a layer, or for each module in it
        for module in [layer] if compiled or recomputed == "selective" else layer.modules():
            if module is layer or isinstance(module, torch.nn.Linear):
                module.forward = _watched(module, module.forward, gathered)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    draw = torch.Generator().manual_seed(dist.get_rank())
    losses, held = [], 0
    for _ in range(STEPS):
        arguments = batch(draw)
        layers.mark_dynamic(arguments)
        gathered.clear()
        logits = engine(**arguments).logits
        held = sum(count for storage, count in gathered if not storage.expired())
        loss = functional.cross_entropy(logits[0, :-1].float(), arguments["input_ids"][0, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    counters = torch._dynamo.utils.counters
    return {
        "losses": losses,
        "graphs": counters["stats"]["unique_graphs"],
        "frames": counters["frames"]["total"],
        "breaks": dict(counters["graph_break"]),
        "gathered": held,
        "optimizer": optimizer_name(engine),
    }


def _watched(module: Any, forward: Any, gathered: list[Any]) -> Any:
    from torch.multiprocessing.reductions import StorageWeakRef

    def run(*inputs: Any, **more: Any) -> Any:
        result = forward(*inputs, **more)
        for weight in module.parameters():
            if weight.dim() == 2:
                gathered.append((StorageWeakRef(weight.data.untyped_storage()), weight.numel()))
        return result

    return run


if __name__ == "__main__":
    import os
    import warnings

    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore")
    import deepspeed
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    ALL_ATTENTION_FUNCTIONS.register("probe", attention)
    folder = Path(sys.argv[1])
    found = [run(**arm) for arm in json.loads((folder / "arms.json").read_text())]
    if int(os.environ["RANK"]) == 0:
        (folder / "found.json").write_text(json.dumps(found))
