"""The rollout "hf" of verl's asynchronous kind: tokens in, tokens out, by transformers. For smoke tests on CPUs alone.

`Replica` starts a `Server` on its first worker's node; `Adapter`, in the worker, sends it the weights after each
update, over Ray and as whole tensors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

# What generation does not do: {sampling parameter: its values that ask for nothing}.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, -1, 0),
    "repetition_penalty": (None, 1.0),
}


def actor_name(replica: int) -> str:
    """The name of the server of the replica of this rank, by which its adapter finds it."""
    return f"hf_server_{replica}"


def sampling(parameters: Mapping[str, Any], room: int) -> tuple[int, float]:
    """(the number of tokens to generate, the temperature) of verl's sampling `parameters`; `room` tokens fit at most.

    Raises ValueError for a parameter that would be passed over.
    """
    temperature = float(parameters.get("temperature", 1.0))
    for name, neutral in NEUTRAL.items() if temperature else ():
        if parameters.get(name) not in neutral:
            raise ValueError(f"rollout hf has no {name} (got {parameters[name]!r}): leave it out, or use vllm")
    asked = parameters.get("max_tokens") or parameters.get("max_new_tokens") or room
    return max(min(int(asked), room), 0), temperature


class Server:
    """The model of one replica: an actor of Ray."""

    def __init__(self, model_path: str, ends: set[int], max_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)  # beside it a rank computes on the same cores
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.ends, self.max_tokens = ends, max_tokens
        self.step: int | None = None  # of the weights
        self.turn = asyncio.Lock()  # one request at a time, and none while weights change

    def address(self) -> str:
        """The address of the server's node."""
        return ray.util.get_node_ip_address()

    async def generate(
        self, prompt_ids: list[int], sampling_params: Mapping[str, Any], request_id: str, **_: Any
    ) -> TokenOutput:
        """Tokens after `prompt_ids` up to an end or the limit, with the logarithm of each one's probability."""
        count, temperature = sampling(sampling_params, self.max_tokens - len(prompt_ids))
        async with self.turn:
            tokens, logs = await asyncio.to_thread(self._generate, list(prompt_ids), count, temperature)
            step = self.step
        return TokenOutput(
            token_ids=tokens, log_probs=logs, stop_reason="completed", extra_fields={"global_steps": step}
        )

    @torch.no_grad()
    def _generate(self, prompt: list[int], count: int, temperature: float) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        logs: list[float] = []
        fed, past = torch.tensor([prompt]), None
        while len(tokens) < count and not (tokens and tokens[-1] in self.ends):
            answer = self.model(fed, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            log_probabilities = torch.log_softmax(answer.logits[0, -1].float() / (temperature or 1.0), -1)
            best = log_probabilities.argmax() if not temperature else torch.multinomial(log_probabilities.exp(), 1)
            token = int(best)
            tokens.append(token)
            logs.append(float(log_probabilities[token]))
            fed = torch.tensor([[token]])
        return tokens, logs

    async def update(self, weights: Mapping[str, torch.Tensor], step: int | None) -> None:
        """Take over `weights`, those after the trainer's `step`. Raises ValueError for a name that the model lacks."""
        async with self.turn:
            found = self.model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
            if found.unexpected_keys:
                raise ValueError(f"weights that the model of the rollout lacks: {', '.join(found.unexpected_keys[:3])}")
            self.model.tie_weights()
            self.step = step

    async def set_global_steps(self, step: int) -> None:
        """Note which step the weights are of."""
        self.step = step

    # What a server on a GPU frees and takes back; here there is nothing to free. `abort_all_requests` aborts none: a
    # request is over in a moment, and `update` waits for it.
    async def _idle(self, *_: object, **__: object) -> None:
        pass

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _idle
    resume_generation = abort_all_requests = start_profile = stop_profile = _idle


class Replica(RolloutReplica):
    """Starts the server of one replica."""

    async def launch_servers(self) -> None:
        """Start the server on the node of the replica's first worker, and wait until its model is loaded."""
        from transformers import AutoTokenizer, GenerationConfig

        path = self.model_config["path"]
        tokenizer = AutoTokenizer.from_pretrained(path)
        ends = {tokenizer.eos_token_id}
        if os.path.exists(os.path.join(path, "generation_config.json")):
            more = GenerationConfig.from_pretrained(path).eos_token_id
            ends.update(more if isinstance(more, list) else [more])
        node = await self.workers[0].__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        server = (
            ray.remote(Server)
            .options(
                name=actor_name(self.replica_rank),
                max_concurrency=self.max_concurrency,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
            )
            .remote(path, ends - {None}, self.config.prompt_length + self.config.response_length)
        )
        self.servers, self._server_handle = [server], server
        # verl tells servers apart by it; nobody connects to it.
        self._server_address = f"{await server.address.remote()}:{40000 + self.replica_rank}"


class Adapter(BaseRollout):
    """The rollout's part in a rank of the trainer."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        ranks = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        self.replica = int(os.environ["RANK"]) // ranks

    async def resume(self, tags: list[str]) -> None:
        """Nothing was freed."""

    async def release(self) -> None:
        """Nothing to free."""

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **_: Any,
    ) -> None:
        """Send all weights to the server. Raises ValueError for any other format than whole named tensors."""
        if wire_format != "named_tensors":
            raise ValueError(f"rollout hf takes named_tensors, got {wire_format}")
        whole = {name: tensor.detach().to("cpu").clone() for name, tensor in weights}
        await ray.get_actor(actor_name(self.replica)).update.remote(whole, global_steps)
