"""Cells of test `gpu` as its ranks record them, with faults planted into GPUs. The numbers are invented."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from runner.results.records import Record

RATES = {"bf16": 724.0, "fp8": 1240.0, "hbm": 4180.0, "to_gpu": 55.2, "to_host": 54.6, "peer": 392.0}
SOAK, BLOCKS, PROCESS = 10, 5, 4711


@dataclass(frozen=True)
class Plant:
    """What is wrong with one GPU: factors of its rates by RATES' names, and what NVML says of it.

    `drift` is the share of its rate that is lost over the soak, `lonely` a GPU to which its link is slow, `values`
    replaces what is recorded by metric.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    clock_mhz: float = 1620.0
    temperature_c: float = 64.0
    throttle: Mapping[str, float] = field(default_factory=dict)
    drift: float = 0.0
    lonely: int | None = None
    wrong: int = 0
    wrong_to: int | None = None
    values: Mapping[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)


Plants = Mapping[tuple[str, int], Plant]
NO_PLANTS: Plants = MappingProxyType({})
HEALTHY = Plant()


def uuid(host: str, gpu: int) -> str:
    """The UUID of a GPU."""
    return f"GPU-{host[-4:]}-{gpu}"


def records(
    plan: Mapping[str, Any],
    cell: Mapping[str, Any],
    plants: Plants = NO_PLANTS,
    noise: float = 0.004,
    seed: object = "",
) -> list[Record]:
    """The records of one cell on GPUs. Every value has `noise` of its own, and each GPU half as much for good."""
    return list(_records(plan, cell, plants, noise, random.Random(f"{cell['id']} {seed}")))


def _records(
    plan: Mapping[str, Any], cell: Mapping[str, Any], plants: Plants, noise: float, rng: random.Random
) -> Iterator[Record]:
    number = cell["gpus_per_node"]
    together = [rng.gauss(1, noise) for _ in range(SOAK)]  # what happens to all GPUs at the same time

    def about(value: float) -> float:
        return value * max(0.05, rng.gauss(1, noise))

    for rank in range(cell["world_size"]):
        host, gpu = cell["hosts"][rank // number], rank % number
        plant = plants.get((host, gpu), HEALTHY)
        made = rng.gauss(1, noise / 2)

        def record(metric: str, value: float, rank: int = rank, host: str = host, gpu: int = gpu, **context: Any):
            return Record(
                run_id=plan["run_id"],
                cell=cell["id"],
                metric=metric,
                value=value,
                host=host,
                rank=rank,
                context={"gpu": gpu, "uuid": uuid(host, gpu), **context},
                **{key: cell[key] for key in ("test", "model", "num_nodes", "world_size", "repeat")},
            )

        def rate(name: str, plant: Plant = plant, made: float = made) -> float:
            return about(RATES[name] * plant.rates.get(name, 1.0) * made)

        for precision in ("bf16", "fp8"):
            for block in range(SOAK):
                value = rate(precision) * together[block] * (1 - plant.drift * block / (SOAK - 1))
                context = {"precision": precision, "block": block}
                yield record("matmul_tflop_per_s", value, shapes="llama-2-7b", **context)
                wrong = plant.wrong if block == 3 and precision == "bf16" else 0
                yield record("wrong_values", wrong, check="repeated product", seed=17, **context)
            yield record("matmul_drift_pct", about(-100 * plant.drift) - 0.4, precision=precision)
        for block in range(BLOCKS):
            yield record("hbm_copy_gb_per_s", rate("hbm"), block=block, size_bytes=1 << 30)
            for metric, name in (("host_to_device_gb_per_s", "to_gpu"), ("device_to_host_gb_per_s", "to_host")):
                near = 0 if gpu < number / 2 else 1
                for numa, share in ((near, 1.0), (1 - near, 0.93)):
                    context = {"block": block, "numa": numa, "local": numa == near, "size_bytes": 1 << 28}
                    yield record(metric, share * rate(name), **context)
        yield record("wrong_values", 0, check="copy in memory", seed=17)
        for statistic, off in (("mean", 0.0), ("min", -0.02), ("max", 0.03)):
            yield record("sm_clock_mhz", plant.clock_mhz * rng.gauss(1 + off, 0.008), statistic=statistic)
            yield record("temperature_c", plant.temperature_c * rng.gauss(1 + off, 0.03), statistic=statistic)
            yield record("power_w", min(700.0, 690.0 * rng.gauss(1 + off, 0.01)), statistic=statistic)
        for reason in ("sw_power_cap", "hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown"):
            usual = rng.gauss(90, 4) if reason == "sw_power_cap" else 0.0
            yield record("throttle_share_pct", plant.throttle.get(reason, min(usual, 100.0)), reason=reason)
        state: dict[str, tuple[float, Mapping[str, Any]]] = {
            "sm_clock_max_mhz": (1980.0, {}),
            "power_limit_w": (700.0, {"default_w": 700.0}),
            "ecc_uncorrected": (0, {"before": 0}),
            "pcie_generation": (5, {"max": 5}),
            "pcie_width": (16, {"max": 16}),
            "nvlinks_active": (18, {"links": 18}),
            "other_processes": (0, {"pids": []}),
            "util_before_pct": (0, {}),
            "memory_used_before_gib": (0.6, {"memory_gib": 140.4}),
            **plant.values,
        }
        for metric, (value, context) in state.items():
            yield record(metric, value, **context)
        if gpu:
            continue
        for source in range(number):
            for target in range(number):
                ends = [plants.get((host, end), HEALTHY) for end in (source, target)]
                if source == target:
                    continue
                share = min(end.rates.get("peer", 1.0) for end in ends)
                if ends[0].lonely == target or ends[1].lonely == source:
                    share = 0.5
                context = {"source": source, "target": target}
                for block in range(BLOCKS):
                    yield record("peer_gb_per_s", about(share * RATES["peer"]), block=block, direct=True, **context)
                wrong = 8 if ends[0].wrong_to == target else 0
                yield record("wrong_values", wrong, check="copy between GPUs", seed=17, **context)


def plan(
    nodes: int,
    gpus: int = 8,
    repeats: int = 1,
    device: str = "cuda",
    names: Mapping[tuple[int, int], str] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """(plan, its cells as summary.json has them, facts) of test `gpu` on nodes called `node1`, `node2` …

    `names` are those of GPUs that are no H200, by node from 1 and GPU.
    """
    hosts = [f"node{n}" for n in range(1, nodes + 1)]
    cells = [
        {
            "id": f"gpu-{nodes}n-r{repeat}",
            "test": "gpu",
            "model": "llama-2-7b",
            "num_nodes": nodes,
            "repeat": repeat,
            "hosts": hosts,
            "gpus_per_node": gpus,
            "world_size": nodes * gpus,
            "device": device,
            "state": "complete",
            "not_judged": None if device == "cuda" else "ranks ran on the CPU: targets are for GPUs",
        }
        for repeat in range(1, repeats + 1)
    ]
    hardware = {
        "gpu": "H200 SXM",
        "bf16_peak_tflop_per_s": 989,
        "fp8_peak_tflop_per_s": 1979,
        "hbm_gb_per_s": 4800,
    }
    seen = {
        host: {
            "boot_id": host,
            "gpus": [{"index": g, "name": names.get((n, g), "NVIDIA H200")} for g in range(gpus)],
        }
        for n, host in enumerate(hosts, start=1)
    }
    return {"run_id": "r", "hardware": hardware, "cells": cells}, cells, {cell["id"]: seen for cell in cells}
