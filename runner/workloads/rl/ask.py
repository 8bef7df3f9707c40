"""A model in a folder is loaded and asked one question."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from runner.errors import InfrastructureError
from runner.system.wording import counted

KIND = "checkpoint_unusable"
TOKENS = 64  # of an answer, at most


def ask(folder: Path, question: str, device: str) -> str:
    """The model's answer to `question`, without sampling; `device` is "cuda" or "cpu".

    An answer may be empty, if the model ends at once. Raises InfrastructureError where the folder cannot be loaded or
    lacks weights of the model, and where the model does not compute with numbers.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: dict[str, Any]
    model: Any
    tokenizer: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, found = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(folder, f"does not load: {error}") from error
    tied = getattr(model, "all_tied_weights_keys", {})
    if lacking := sorted(set(found["missing_keys"]) - set(tied)):
        raise _unusable(folder, f"lacks {counted(len(lacking), 'weight')}: {', '.join(lacking[:3])}")
    model = model.to(device).eval()
    text = question
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"].to(
        device
    )
    with torch.inference_mode():
        if not torch.isfinite(model(tokens).logits).all():
            raise _unusable(folder, "computes NaN or infinity")
        made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))


def _unusable(folder: Path, why: str) -> InfrastructureError:
    return InfrastructureError(f"checkpoint unusable: its model {why} ({folder})", KIND)
