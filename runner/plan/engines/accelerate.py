"""Engine `accelerate`: its supervisors, and the configuration of Accelerate that each node gets. Pure.

A supervisor (`runner.node.accelerate`) runs on every node: it writes the node's configuration, has Accelerate's own
loader read it back, and becomes `accelerate launch`. So no shell expands a node's rank, and a batch script knows
nothing of it. A user's configuration (`accelerate config`) says how to train; where it runs is decided here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.errors import UsageError, unknown
from runner.plan.engines.ranks import Launch, Ranks

# Keys of a user's configuration that say where it runs: the plan's values replace them.
PLACED = (
    "compute_environment",
    "num_machines",
    "num_processes",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "rdzv_backend",
    "same_network",
    "gpu_ids",
    "use_cpu",
)
# Those that say how it trains, handed on.
_PLAIN = (
    "distributed_type",
    "mixed_precision",
    "fp16",
    "downcast_bf16",
    "main_training_function",
    "enable_cpu_affinity",
    "debug",
    "dynamo_backend",
)
# The keys of the sections, as `accelerate launch` has them for options: it ignores any other without a word.
_SECTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "deepspeed_config": (
        "",
        (
            "deepspeed_config_file",
            "zero_stage",
            "offload_optimizer_device",
            "offload_param_device",
            "offload_optimizer_nvme_path",
            "offload_param_nvme_path",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "zero3_init_flag",
            "zero3_save_16bit_model",
            "deepspeed_hostfile",
            "deepspeed_exclusion_filter",
            "deepspeed_inclusion_filter",
            "deepspeed_multinode_launcher",
            "deepspeed_moe_layer_cls_names",
        ),
    ),
    "fsdp_config": (
        "fsdp_",
        (
            "version",
            "offload_params",
            "min_num_params",
            "sharding_strategy",
            "reshard_after_forward",
            "auto_wrap_policy",
            "transformer_layer_cls_to_wrap",
            "backward_prefetch",
            "state_dict_type",
            "forward_prefetch",
            "use_orig_params",
            "cpu_ram_efficient_loading",
            "sync_module_states",
            "activation_checkpointing",
            "activation_checkpointing_offload",
        ),
    ),
    "fp8_config": (
        "fp8_",
        (
            "backend",
            "use_autocast_during_eval",
            "margin",
            "interval",
            "format",
            "amax_history_len",
            "amax_compute_algo",
            "override_linear_precision",
            "opt_level",
            "enable_fsdp_float8_all_gather",
            "pad_inner_dim",
        ),
    ),
    "dynamo_config": ("dynamo_", ("backend", "mode", "use_fullgraph", "use_dynamic", "use_regional_compilation")),
    "parallelism_config": (
        "",
        tuple(
            f"parallelism_config_{name}"
            for name in (
                "dp_replicate_size",
                "dp_shard_size",
                "tp_size",
                "cp_size",
                "cp_backend",
                "cp_comm_strategy",
                "sp_size",
                "sp_backend",
                "sp_seq_length",
                "sp_seq_length_is_variable",
                "sp_attn_implementation",
            )
        ),
    ),
}
# What other hardware and launchers need.
_ELSEWHERE = (
    "megatron_lm_config",
    "mpirun_config",
    "tpu_name",
    "tpu_zone",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "command_file",
    "commands",
    "tpu_vm",
    "tpu_env",
)
_TYPES: Mapping[str, str | None] = {
    "NO": None,
    "MULTI_GPU": None,
    "MULTI_CPU": None,
    "DEEPSPEED": "deepspeed_config",
    "FSDP": "fsdp_config",
}
_PRECISIONS = ("no", "fp16", "bf16", "fp8")
# Accelerate's script refuses these beside a DeepSpeed file, which has them.
_IN_FILE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)
# DeepSpeed's own ways to other nodes: every node is started already.
_DEEPSPEEDS_NODES = ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter")


@dataclass(frozen=True)
class Place:
    """A node's place in a launch: its number among `machines`, each with `gpus` ranks, which meet at `address`:`port`.

    `device` is "cuda" or "cpu".
    """

    machine_rank: int
    machines: int
    gpus: int
    address: str
    port: int
    device: str

    @property
    def processes(self) -> int:
        """The ranks of all nodes together, which is what Accelerate calls `num_processes`."""
        return self.machines * self.gpus


def launch(ranks: Ranks) -> Launch:
    """A supervisor on each node, which becomes that node's `accelerate launch`."""
    return Launch(
        argv=tuple(
            (
                node.python,
                "-m",
                "runner.node.accelerate",
                ranks.cell_dir,
                f"--machine-rank={index}",
                f"--machines={len(ranks.nodes)}",
                f"--gpus={ranks.gpus_per_node}",
                f"--address={ranks.master_address}",
                f"--port={ranks.master_port}",
            )
            for index, node in enumerate(ranks.nodes)
        )
    )


def command(python: str, config: str, log_dir: str, program: Sequence[str]) -> list[str]:
    """`accelerate launch` of the environment of `python`, which starts `program` once a rank as it is.

    All after the program's first word is the program's (Accelerate parses no further).
    """
    options = [f"--config_file={config}", f"--log_dir={log_dir}", "--no_python"]
    return [python, "-m", "accelerate.commands.launch", *options, *program]


def environment(device: str) -> dict[str, str]:
    """Variables of `accelerate launch` on a node whose ranks are of `device`.

    Accelerate starts several ranks on CPUs as if they were GPUs only: `--cpu` starts one, whatever is asked for.
    """
    return {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}


def check(asked: Mapping[str, Any], device: str, where: str) -> None:
    """Raise UsageError, which begins with `where`, for a configuration that Accelerate would refuse or ignore in part.

    `asked` is what `accelerate config` writes, or some of it.
    """
    known = (*PLACED, *_PLAIN, *_SECTIONS, *_ELSEWHERE)
    for key in asked:
        if key not in known:
            raise unknown("key", str(key), known, where)
    if asked.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise UsageError(f"{where}: compute_environment is {asked['compute_environment']}: only LOCAL_MACHINE is known")
    if given := [key for key in _ELSEWHERE if asked.get(key)]:
        raise UsageError(f"{where}: {given[0]} is of hardware or of a launcher that is not used here: remove it")
    for name in _SECTIONS:
        _check_section(asked.get(name), name, where)
    kind = _type(asked)
    if kind not in _TYPES:
        raise unknown("distributed_type", str(kind), _TYPES, where)
    both = [name for name in _TYPES.values() if name and asked.get(name)]
    if len(both) > 1:
        raise UsageError(f"{where}: {both[0]} and {both[1]} exclude each other: remove one of them")
    for name in both:
        if _TYPES[kind] != name:
            right = next(each for each, section in _TYPES.items() if section == name)
            raise UsageError(
                f"{where}: {name} has no effect with distributed_type {kind}: say {right}, or remove the section"
            )
    _check_precision(asked, device, where)
    if device == "cpu" and kind in ("FSDP", "DEEPSPEED"):
        raise UsageError(f"{where}: distributed_type {kind} needs GPUs, the ranks are CPUs: say MULTI_CPU")
    _check_deepspeed(asked.get("deepspeed_config") or {}, asked, where)


def _check_section(section: object, name: str, where: str) -> None:
    prefix, keys = _SECTIONS[name]
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise UsageError(f"{where}: {name} is {section!r}: a section of keys and values is expected")
    full = [prefix + key for key in keys]
    for key in section:
        if key not in full and key not in keys:
            raise unknown(f"key of {name}", str(key), full, where)


def _check_precision(asked: Mapping[str, Any], device: str, where: str) -> None:
    precision = _precision(asked)
    if precision not in _PRECISIONS:
        raise unknown("mixed_precision", precision, _PRECISIONS, where)
    if device == "cpu" and precision in ("fp16", "fp8"):
        raise UsageError(f"{where}: mixed_precision {precision} needs GPUs, the ranks are CPUs: say bf16 or no")
    if asked.get("fp8_config") and precision != "fp8":
        raise UsageError(
            f"{where}: fp8_config has no effect with mixed_precision {precision}: say fp8, or remove the section"
        )


def _check_deepspeed(section: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> None:
    stage = section.get("zero_stage")
    if stage is not None and str(stage) not in ("0", "1", "2", "3"):
        raise UsageError(f"{where}: zero_stage is {stage!r}: 0, 1, 2 or 3 is expected")
    if "deepspeed_config_file" not in section:
        return
    twice = [key for key in _IN_FILE if section.get(key) is not None]
    twice += ["mixed_precision"] if asked.get("mixed_precision") is not None else []
    if twice:
        raise UsageError(
            f"{where}: {' and '.join(twice)} beside deepspeed_config_file, which decides it: remove one of the two"
        )


def _type(asked: Mapping[str, Any]) -> str:
    given = asked.get("distributed_type")
    if given is None:
        return next((kind for kind, section in _TYPES.items() if section and asked.get(section)), "MULTI_GPU")
    return "NO" if given is False else str(given)  # YAML reads a bare NO as false


def _precision(asked: Mapping[str, Any]) -> str:
    given = asked.get("mixed_precision")
    if given is None:
        return "fp16" if asked.get("fp16") else "no"
    return "no" if given is False else str(given).lower()


def rendered(asked: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The configuration of one node: the user's, which `check` has passed, with what is decided here in its place."""
    kind = _type(asked)
    placed: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # One rank is started as many are: Accelerate's way for one sets no RANK.
        "distributed_type": kind if _TYPES[kind] else "MULTI_GPU",
        "num_machines": place.machines,
        "num_processes": place.processes,
        "machine_rank": place.machine_rank,
        "main_process_ip": place.address,
        "main_process_port": place.port,
        "rdzv_backend": "static",
        "same_network": True,
        "gpu_ids": "all",
        "use_cpu": place.device == "cpu",
    }
    fixed = ("distributed_type", "mixed_precision", "fp16")
    own = {key: asked[key] for key in (*_PLAIN, *_SECTIONS) if key in asked and key not in fixed}
    by_file = "deepspeed_config_file" in (asked.get("deepspeed_config") or {})
    if not by_file:
        own = {"mixed_precision": _precision(asked), **own}
    if kind == "DEEPSPEED":
        section = asked.get("deepspeed_config") or {}
        kept = {key: value for key, value in section.items() if key not in _DEEPSPEEDS_NODES}
        own["deepspeed_config"] = {**kept, "deepspeed_multinode_launcher": "standard"}
    return placed | own


def replaced(asked: Mapping[str, Any], place: Place) -> list[str]:
    """`key: the user's → what runs` for each key of the user's configuration that the plan has another value for.

    The rank of a machine is not among them, which one file cannot have for several.
    """
    ours = rendered(asked, place)
    keys = [key for key in PLACED if key in asked and key != "machine_rank" and asked[key] is not None]
    changed = [f"{key}: {asked[key]} → {ours[key]}" for key in keys if str(asked[key]) != str(ours[key])]
    theirs = (asked.get("deepspeed_config") or {}).get("deepspeed_multinode_launcher")
    if theirs not in (None, "standard"):
        changed.append(f"deepspeed_multinode_launcher: {theirs} → standard")
    return changed


def text(config: Mapping[str, Any], comments: Iterable[str] = ()) -> str:
    """The YAML of a configuration, in its order, below the comments. JSON's values are YAML's, without a package."""
    lines = [f"# {line}" for line in comments]
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{key}:", *(f"  {inner}: {_value(own)}" for inner, own in value.items())]
        else:
            lines.append(f"{key}: {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        digits, e, power = repr(value).partition("e")
        return digits + (".0" if e and "." not in digits else "") + e + power  # YAML 1.1 reads 1e-05 as a word
    written = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() or ord(each) > 0xFFFF else f"\\u{ord(each):04x}" for each in written)


def batch_text(asked: Mapping[str, Any], processes: int, per_device: int | None = None) -> str:
    """What one step of the optimizer takes: batch per device × GPUs × accumulation, as far as the configuration knows.

    Accelerate's file has no batch per device, and accumulation only in its DeepSpeed section.
    """
    known = (asked.get("deepspeed_config") or {}).get("gradient_accumulation_steps")
    steps = known if isinstance(known, int) else None
    words = [
        "batch per device" if per_device is None else str(per_device),
        f"{processes:,} ranks",
        "the script's accumulation" if steps is None else f"{steps} accumulated",
    ]
    product = " × ".join(words)
    if per_device is None or steps is None:
        return f"effective batch: {product}"
    return f"effective batch: {product} = {per_device * processes * steps:,}"
