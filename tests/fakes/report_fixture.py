"""Synthetic runs for tests and pictures. The numbers are invented, after published ones; none was measured.

`healthy()` is a 1, 2, 4, 8-node sweep of the real cluster, `testbed()` eight containers on one kernel, and
`broken()` a cluster with a dead cell, wrong results, a slow scaling and an odd driver on one node. `nccl()` is test nccl
on a healthy cluster, `nccl_sockets()` on one without RDMA, `nccl_slow_rail()` with one bad rail. `rl()` is a workflow.
`python tests/fakes/report_fixture.py DIR` writes their reports.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import gpu_cells
import yaml

from runner.cluster.limits import busbw_factor
from runner.cluster.tools.verl_metrics import step_of
from runner.plan import config
from runner.results.records import Record
from runner.workloads.nccl import command
from runner.workloads.nccl.variants import variants
from runner.workloads.rl.record import values_of

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [f"fukushimadc-02-hgx-{n:04d}" for n in (1, 2, 3, 4, 5, 6, 7, 9)]
GIB = 2**30
CHOSEN = "micro-batch 4, recompute none: fastest by prediction of 7 choices that fit"
EXPECTED = {
    "compute_s": 4.6,
    "host_s": 1.5,
    "nvlink_s": 0.44,
    "nic_s": 1.7,
    "hidden_s": 1.7,
    "step_s": 4.68,
    "positions_per_s_per_gpu": 12_900.0,
    "binds": "GPU",
    "efficiency": 1.0,
    "base_nodes": 1,
    "rate_source": "assumed from one H200, not measured here",
    "ways": [],
}
USED = {
    "attention": "varlen",
    "precision": "bf16",
    "recompute": "none",
    "zero_stage": 3,
    "micro_batch": 4,
    "gradient_accumulation": 4,
    "compile": False,
    "liger": "loss",
    "trainer": "fast",
    "optimizer": "AdamW fused",
}
CPU_USED = {"attention": "sdpa", "liger": "none", "micro_batch": 2, "gradient_accumulation": 2}


@dataclass
class Fixture:
    plan: dict[str, Any]
    status: dict[str, Any]
    records: list[Record]
    facts: dict[str, dict[str, Any]]
    telemetry: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.plan, self.status, self.records, self.facts, self.telemetry


def _yaml(kind: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / kind / f"{name}.yaml").read_text())


def plan(*, model: str, hardware: str, counts: tuple[int, ...], repeats: int, gpus: int, device: str) -> dict[str, Any]:
    nodes = [
        {
            "name": name,
            "alias": f"node{index:03d}",
            "address": f"10.2.201.{index}",
            "gpus": gpus,
            "nics": 2 if device == "cuda" else 1,
            "nic_gbit_per_s": 400.0 if device == "cuda" else None,
        }
        for index, name in enumerate(NAMES, start=1)
    ][: max(counts)]
    cells = [
        {
            "id": f"{test}-{model}-{n}n-r{repeat}" if test == "sft" else f"{test}-{n}n-r{repeat}",
            "test": test,
            "model": model if test == "sft" else None,
            "num_nodes": n,
            "repeat": repeat,
            "hosts": NAMES[:n],
            "gpus_per_node": gpus,
            "world_size": n * gpus,
            "device": device,
            "params": {"steps": 12, "warmup_steps": 2},
            "batch": {"global_batch": 16 * n * gpus, "micro_batch": 4, "gradient_accumulation": 4},
            "chosen": CHOSEN if test == "sft" and device == "cuda" else "",
            "expected": EXPECTED if test == "sft" and device == "cuda" else None,
        }
        for test in ("torch", "sft")
        for n in counts
        for repeat in range(1, repeats + 1)
    ]
    kind = "testbed" if device == "cpu" else "fukushimadc-02"
    command = f"runner bench -i inventory/{kind} --sweep {','.join(map(str, counts))} --model {model}"
    return {
        "schema": 1,
        "run_id": "20261121-040506-synthetic",
        "created": "2026-11-21T04:05:06Z",
        "version": "0.1.0",
        "command": f"{command} --repeats {repeats}",
        "inventory": f"inventory/{kind}",
        "backend": "ssh",
        "engine": "torchrun",
        "scaling": "weak",
        "seed": 0,
        "nodes": nodes,
        "hardware": {**_yaml("hardware", hardware), "name": hardware},
        "models": {model: _yaml("models", model)},
        "targets": _yaml("targets", "default")["targets"],
        "cells": cells,
        "passed_over": [],
    }


def status(plan: dict[str, Any]) -> dict[str, Any]:
    created = datetime.fromisoformat(plan["created"])
    ends = {cell["id"]: created + timedelta(seconds=40 + 110 * cell["num_nodes"]) for cell in plan["cells"]}
    cells = {
        cell["id"]: {
            "state": "complete",
            "started": plan["created"],
            "ended": ends[cell["id"]].isoformat(),
            "error": None,
            "used": {**USED, **({} if cell["device"] == "cuda" else CPU_USED)} if cell["test"] == "sft" else {},
        }
        for cell in plan["cells"]
    }
    return {"schema": 1, "run_id": plan["run_id"], "state": "complete", "cells": cells}


def facts(plan: dict[str, Any], *, one_kernel: bool) -> dict[str, dict[str, Any]]:
    gpu = plan["cells"][0]["device"] == "cuda"
    gpus = (
        [{"index": i, "name": "NVIDIA H200", "memory_gib": 140.4, "uuid": f"GPU-{i}"} for i in range(8)] if gpu else []
    )
    fabric = [("ens1f0np0", 400_000, 9000, "mlx5_core"), ("ens2f0np0", 400_000, 9000, "mlx5_core")]
    nics = fabric if gpu else [("eth0", 10_000, 1500, "veth")]
    per_host = {
        node["name"]: {
            "hostname": node["name"],
            "kernel": "6.8.0-60-generic",
            "boot_id": "one-kernel" if one_kernel else f"boot-{node['name']}",
            "os": "Ubuntu 24.04.2 LTS" if gpu else "Debian GNU/Linux 12 (bookworm)",
            "cpu": {"model": "Intel(R) Xeon(R) Platinum 8558", "cores": 192 if gpu else 2},
            "memory_gib": 2015.3 if gpu else 23.4,
            "driver": "570.124.06" if gpu else None,
            "cuda": "12.8" if gpu else None,
            "nccl": "2.26.2" if gpu else None,
            "python": "3.11.7",
            "packages": {
                "torch": "2.13.0" if gpu else "2.13.0+cpu",
                "deepspeed": "0.19.8",
                "transformers": "5.23.0",
                "accelerate": "1.15.0",
                "shakedown": "0.1.0",
            },
            "gpus": gpus,
            "nics": [
                {"name": name, "speed_mbit_per_s": speed, "mtu": mtu, "driver": driver, "address": [node["address"]]}
                for name, speed, mtu, driver in nics
            ],
            "env": {"NCCL_IB_TC": "106", "NCCL_IB_HCA": "mlx5_0,mlx5_1"} if gpu else {"GLOO_SOCKET_IFNAME": "eth0"},
        }
        for node in plan["nodes"]
    }
    return {cell["id"]: {host: dict(per_host[host]) for host in cell["hosts"]} for cell in plan["cells"]}


def _record(plan: dict[str, Any], cell: dict[str, Any], metric: str, value: float, rank: int, **context: Any) -> Record:
    keys = ("test", "model", "num_nodes", "world_size", "repeat")
    return Record(
        run_id=plan["run_id"],
        cell=cell["id"],
        metric=metric,
        value=value,
        host=cell["hosts"][rank // cell["gpus_per_node"]],
        rank=rank,
        context=context,
        **{key: cell[key] for key in keys},
    )


def torch_records(
    plan: dict[str, Any], cell: dict[str, Any], peaks: dict[str, float], latency_us: float
) -> Iterator[Record]:
    """busbw that approaches its peak with size: time = latency + bytes ÷ peak."""
    rng = random.Random(f"{cell['id']}")
    world = cell["world_size"]
    if world == 1:
        yield from copy_records(plan, cell)
        return
    top = 33 if cell["device"] == "cuda" else 20
    for collective, peak in {**peaks, "barrier": 0.0}.items():
        for exponent in [0] if collective == "barrier" else [*range(3, top, 3), top]:
            size = 0 if collective == "barrier" else 2**exponent
            factor = 1.0 if collective == "barrier" else busbw_factor(collective, world)
            latency = latency_us * (1.0 if collective == "ping_pong" else 1.7) * rng.uniform(0.97, 1.05)
            wire_us = size * factor / (peak * 1e3) if peak else 0.0
            time_us = latency + wire_us
            context = {"collective": collective, "size_bytes": size, "iters": 20, "dtype": "float32"}
            yield _record(plan, cell, "latency_us_p50", time_us, 0, **context)
            yield _record(plan, cell, "latency_us_p99", time_us * rng.uniform(1.1, 1.4), 0, **context)
            if collective != "barrier":
                algbw = size / (time_us * 1e3)
                yield _record(plan, cell, "algbw_gb_per_s", algbw, 0, **context)
                yield _record(plan, cell, "busbw_gb_per_s", algbw * factor, 0, **context)
                yield _record(plan, cell, "wrong_values", 0, 0, **context)


def copy_records(plan: dict[str, Any], cell: dict[str, Any]) -> Iterator[Record]:
    """What one rank alone measures: its device's copies."""
    gpu = cell["device"] == "cuda"
    rates = {"copy": 4150.0, "host_to_device": 55.2, "device_to_host": 54.7} if gpu else {"copy": 11.8}
    for name, rate in rates.items():
        size = (2**33 if name == "copy" else 2**28) if gpu else 2**20
        yield _record(plan, cell, f"{name}_gb_per_s", rate, 0, size_bytes=size, iters=20)
        yield _record(plan, cell, "wrong_values", 0, 0, collective=name, size_bytes=size, iters=20)


def sft_records(
    plan: dict[str, Any], cell: dict[str, Any], step_s: float, tokens: float, memory_gib: float, noise: float
) -> Iterator[Record]:
    rng = random.Random(f"{cell['id']}")
    luck = rng.uniform(1 - noise / 2, 1 + noise / 2)
    started = 1000.0
    for step in range(12):
        measured = step >= 2
        base = step_s * luck * (1 + abs(rng.gauss(0, noise))) * (1 if measured else 1.6)
        for rank in range(cell["world_size"]):
            context = {"step": step, "measured": measured, "started_s": started}
            real = round(tokens * rng.uniform(0.994, 0.999))
            yield _record(plan, cell, "step_time_s", base * (1 - rng.uniform(0, 0.004)), rank, **context)
            yield _record(plan, cell, "tokens", real, rank, **context)
            yield _record(plan, cell, "loss_tokens", round(tokens * 0.62), rank, **context)
            yield _record(plan, cell, "positions", tokens, rank, **context)
        loss = 1.1 + 1.4 * 0.72**step + rng.gauss(0, 0.015)
        yield _record(plan, cell, "loss", loss, 0, step=step, measured=measured)
        started += base
    for rank in range(cell["world_size"]):
        rate = 724 if cell["device"] == "cuda" else 0.04
        yield _record(plan, cell, "matmul_tflop_per_s", rate * rng.uniform(0.98, 1.02), rank)
        yield _record(plan, cell, "peak_memory_gib", memory_gib * rng.uniform(0.99, 1.01), rank)
    for metric, value in {
        "sample_tokens_mean": 180.0,
        "import_time_s": 9.1,
        "build_time_s": 8.2,
        "setup_time_s": 21.4,
        "time_to_first_step_s": 38.9,
        "packing_utilisation_pct": 99.71,
        "model_parameters": 6_738_415_616,
        "model_parameters_non_embedding": 6_607_343_616,
    }.items():
        yield _record(plan, cell, metric, value, 0)


def _telemetry(plan: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    rng = random.Random(7)
    return {
        cell["id"]: {
            host: [
                {"time_s": 1000.0 + second, **{f"gpu{gpu}_util_pct": round(rng.gauss(94, 1)) for gpu in range(8)}}
                for second in range(40)
            ]
            for host in cell["hosts"]
        }
        for cell in plan["cells"]
        if cell["test"] == "sft"
    }


EFFICIENCY = {1: 1.0, 2: 0.993, 4: 0.974, 8: 0.941}
ALL_REDUCE = {1: 478.0, 2: 171.0, 4: 119.0, 8: 104.0}


def _peaks(nodes: int) -> dict[str, float]:
    all_reduce = ALL_REDUCE[nodes]
    return {
        "all_reduce": all_reduce,
        "all_gather": all_reduce * (0.75 if nodes == 1 else 0.93),
        "reduce_scatter": all_reduce * (0.76 if nodes == 1 else 0.94),
        "all_to_all": 330.0 if nodes == 1 else {2: 21.5, 4: 14.6, 8: 12.4}[nodes],
        "broadcast": 340.0 if nodes == 1 else 91.0,
        "send_recv": 360.0 if nodes == 1 else 58.4 / 8,  # each of 8 GPUs has its share of the NICs
        "ping_pong": 380.0 if nodes == 1 else 47.2,
    }


def healthy(
    counts: tuple[int, ...] = (1, 2, 4, 8), repeats: int = 3, efficiency: dict[int, float] = EFFICIENCY
) -> Fixture:
    """A healthy cluster of 8 × H200 nodes, Llama-2 7B."""
    p = plan(model="llama-2-7b", hardware="h200-sxm", counts=counts, repeats=repeats, gpus=8, device="cuda")
    records: list[Record] = []
    for cell in p["cells"]:
        n = cell["num_nodes"]
        if cell["test"] == "torch":
            records += torch_records(p, cell, _peaks(n), latency_us=7.5 if n == 1 else 14.0 + n)
        else:
            step_s = 16 * 4096 / (11_400 * efficiency[n])
            records += sft_records(p, cell, step_s, 16 * 4096, 60 + 75 / n, noise=0.004)
    return Fixture(p, status(p), records, facts(p, one_kernel=False), _telemetry(p))


def testbed(counts: tuple[int, ...] = (1, 2, 4, 8)) -> Fixture:
    """Eight containers on two cores: everything works, no speed means anything."""
    p = plan(model="tiny", hardware="cpu", counts=counts, repeats=1, gpus=1, device="cpu")
    records: list[Record] = []
    for cell in p["cells"]:
        n = cell["num_nodes"]
        if cell["test"] == "torch":
            peaks = dict.fromkeys(_peaks(1), 1.9 / n)
            records += torch_records(p, cell, peaks, latency_us=140.0 * n)
        else:
            records += sft_records(p, cell, 0.35 * n, 1024, 0.9, noise=0.08)
    return Fixture(p, status(p), records, facts(p, one_kernel=True))


def one_gpu() -> Fixture:
    """One node with one GPU: nothing to exchange with, so its own copies are measured."""
    p = plan(model="tiny", hardware="h200-sxm", counts=(1,), repeats=1, gpus=1, device="cuda")
    records: list[Record] = []
    for cell in p["cells"]:
        if cell["test"] == "torch":
            records += copy_records(p, cell)
        else:
            records += sft_records(p, cell, 0.02, 1024, 3.1, noise=0.01)
    return Fixture(p, status(p), records, facts(p, one_kernel=False))


def gpus() -> Fixture:
    """Test gpu on eight nodes of 8 × H200: one GPU is slow, one is hot and throttled, one has lost NVLinks."""
    p = plan(model="llama-2-7b", hardware="h200-sxm", counts=(8,), repeats=1, gpus=8, device="cuda")
    shape = {"test": "gpu", "id": "gpu-llama-2-7b-8n-r1", "model": "llama-2-7b", "chosen": "", "expected": None}
    p["cells"] = [{**p["cells"][0], **shape}]
    p["command"] += " --test gpu"
    hot = gpu_cells.Plant(
        {"bf16": 0.9, "fp8": 0.88}, clock_mhz=1430.0, temperature_c=88.0, throttle={"hw_thermal_slowdown": 37.0}
    )
    plants = {
        (NAMES[2], 5): gpu_cells.Plant({"bf16": 0.87, "fp8": 0.885}),
        (NAMES[6], 1): hot,
        (NAMES[4], 6): gpu_cells.Plant({"peer": 0.72}, values={"nvlinks_active": (12, {"links": 18})}),
        (NAMES[0], 3): gpu_cells.Plant({"hbm": 0.943}),
    }
    return Fixture(p, status(p), gpu_cells.records(p, p["cells"][0], plants), facts(p, one_kernel=False))


def broken() -> Fixture:
    """A dead rank on 8 nodes, an odd driver, wrong results of one collective, poor scaling on 4 nodes."""
    fixture = healthy(efficiency={**EFFICIENCY, 4: 0.87})
    dead = fixture.plan["cells"][-1]["id"]
    fixture.records = [record for record in fixture.records if record.cell != dead]
    fixture.status["state"] = "failed"
    swap = {
        "host": "fukushimadc-02-hgx-0009",
        "by": None,
        "cell": dead,
        "kind": "hung",
        "reason": "has not answered for 30 s",
        "at": "",
    }
    fixture.status["replaced"] = [swap]
    fixture.status["cells"][dead] = {
        "state": "failed",
        "attempt": 2,
        "started": fixture.plan["created"],
        "ended": fixture.plan["created"],
        "error": {
            "kind": "cuda_out_of_memory",
            "message": "rank19 died (exit 1): torch.OutOfMemoryError: CUDA out of memory",
            "host": NAMES[2],
            "stderr": [
                '  File "runner/workloads/sft.py", line 214, in run',
                "    engine.backward(loss)",
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity "
                "of 139.81 GiB of which 1.12 GiB is free.",
            ],
        },
    }
    for per_host in fixture.facts.values():
        if NAMES[4] in per_host:
            per_host[NAMES[4]]["driver"] = "550.90.07"
            per_host[NAMES[4]]["kernel"] = "6.8.0-52-generic"
    cell = next(c for c in fixture.plan["cells"] if c["id"] == "torch-2n-r2")
    context = {"collective": "all_to_all", "size_bytes": 2**21, "iters": 20, "dtype": "float32"}
    fixture.records.append(_record(fixture.plan, cell, "wrong_values", 4096, 0, **context))
    return fixture


NCCL_SIZES = tuple(2**exponent for exponent in range(3, 34))
NCCL_COLLECTIVES = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"),
    *("reduce", "send_recv", "gather", "scatter", "hypercube"),
)


def _nccl_peak(collective: str, nodes: int) -> float:
    """Bus bandwidth of healthy nodes at the largest size, in GB/s."""
    known = _peaks(nodes)
    inside = nodes == 1
    if not inside:  # by rings, which cross each boundary of nodes once
        known |= {"all_gather": 93.1, "reduce_scatter": 93.8}
    known |= {
        "reduce": 330.0 if inside else 90.0,
        "send_recv": 360.0 if inside else 44.0,
        "gather": 341.0 if inside else 88.0 / nodes,
        "scatter": 344.0 if inside else 87.0 / nodes,
        "hypercube": 210.0 if inside else 11.0,
    }
    return known[collective]


def _algorithm(collective: str, nodes: int, size: int) -> tuple[str, str]:
    """(algorithm, protocol) as NCCL might choose them."""
    protocol = "LL" if size < 64 << 10 else "LL128" if size < 4 << 20 else "SIMPLE"
    if collective == "all_reduce":
        if nodes == 1:
            return ("NVLS", "SIMPLE") if size >= 1 << 20 else ("RING", protocol)
        return ("RING" if size < 1 << 20 else "NVLS_TREE" if size >= 64 << 20 else "TREE"), protocol
    return "RING", protocol


def _nccl_cells(
    base: dict[str, Any], counts: tuple[int, ...], repeats: int, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The cells that the test's default settings, with `settings` over them, give."""
    params = {**config.load_test("nccl", settings).model_dump(), "max_bytes": NCCL_SIZES[-1]}
    for n in counts:
        for suffix, chosen in variants(params, n, 8).items():
            for repeat in range(1, repeats + 1):
                yield {
                    **base,
                    "id": f"nccl-{suffix}-{n}n-r{repeat}",
                    "num_nodes": n,
                    "repeat": repeat,
                    "hosts": NAMES[:n],
                    "world_size": 8 * n,
                    "params": chosen,
                }


def nccl_records(
    plan: dict[str, Any],
    cell: dict[str, Any],
    *,
    sockets: tuple[str, ...],
    undirected: tuple[str, ...],
    slow_rail: int | None,
) -> Iterator[Record]:
    """What the ranks of one cell say: rank 0 what nccl-tests printed, every rank what NCCL told of its transport."""
    rng = random.Random(cell["id"])
    params, nodes = cell["params"], cell["num_nodes"]
    collective, split = params["collective"], params["split"]
    fallen = sockets and nodes > 1 and split != "node"
    groups = {"none": (nodes, 8), "node": (1, 8), "rail": (nodes, 1)}[split]
    peak = _nccl_peak(collective, groups[0]) / (8 if split == "rail" else 1)
    if split == "rail":
        peak = 11.6 * rng.uniform(0.99, 1.01) * (0.45 if params["rail"] == slow_rail else 1)
    elif slow_rail is not None and nodes > 1 and split == "none":
        peak *= 0.46
    peak = min(peak, 4.1 if split == "none" else 0.5) if fallen else peak
    factor = {"reduce": 1.0, "gather": 1 - 1 / (8 * nodes), "scatter": 1 - 1 / (8 * nodes), "hypercube": 1.0}.get(
        collective
    ) or busbw_factor(collective, groups[0] * groups[1])
    alone_us = (9.0 if groups[0] == 1 else 18.0 + 4 * nodes) * (3 if fallen else 1)
    for size in (size for size in NCCL_SIZES if size >= params["min_bytes"]):
        algorithm, protocol = _algorithm(collective, groups[0], size)
        for in_place in (False, True):
            slower = 1.12 if in_place and nodes > 1 and collective in ("all_to_all", "hypercube") else 1.0
            knee = 1 + 0.25 / (1 + size / (32 << 20))
            time_us = alone_us * rng.uniform(0.98, 1.04) + size * factor / (peak * 1e3) * slower * knee
            context = {
                "collective": collective,
                "size_bytes": size,
                "in_place": in_place,
                "dtype": "float32",
                "split": split,
            }
            yield _record(plan, cell, "latency_us_mean", time_us, 0, **context)
            yield _record(plan, cell, "algbw_gb_per_s", size / time_us / 1e3, 0, **context)
            yield _record(plan, cell, "busbw_gb_per_s", size / time_us / 1e3 * factor, 0, **context)
            yield _record(plan, cell, "wrong_values", 0, 0, **context)
        # NCCL counts one rank's share of what is gathered or scattered.
        share = groups[0] * groups[1] if collective in ("all_gather", "reduce_scatter") else 1
        yield _record(plan, cell, "algorithm", size / share, 0, algorithm=algorithm, protocol=protocol)
    for rank in range(cell["world_size"]):
        host = cell["hosts"][rank // 8]
        names = ["eth0"] if sockets else ["mlx5_0", "mlx5_1"]
        net = {"net": "Socket", "link": None} if sockets else {"net": "IB", "link": "RoCE"}
        yield _record(plan, cell, "nics", len(names), rank, **net, names=names)
        if read := command.variables(params):
            yield _record(plan, cell, "settings", len(read), rank, values=read)
        if groups[0] > 1:
            direct = not sockets and host not in undirected
            for number, nic in enumerate(names):
                via = f"NET/{net['net']}/{number}" + ("/GDRDMA" if direct else "")
                yield _record(plan, cell, "channels", 8, rank, via=via, net=net["net"], nic=nic, gpudirect=direct)
            yield _record(plan, cell, "gpudirect", float(direct), rank)
        if groups[1] > 1:
            yield _record(plan, cell, "channels", 16, rank, via="P2P/CUMEM", net=None, nic=None, gpudirect=False)
        yield _record(plan, cell, "nvls", float(groups[1] > 1), rank)
        yield _record(plan, cell, "collnet", 0.0, rank)


def nccl(
    counts: tuple[int, ...] = (1, 2, 4, 8),
    repeats: int = 1,
    *,
    sockets: bool = False,
    undirected: tuple[str, ...] = (),
    slow_rail: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Fixture:
    """Test nccl on 8 × H200 nodes, without RDMA (`sockets`), without GPUDirect on some nodes, or with a slow rail."""
    p = plan(model="llama-2-7b", hardware="h200-sxm", counts=counts, repeats=1, gpus=8, device="cuda")
    base = {
        **p["cells"][0],
        "test": "nccl",
        "engine": "mpirun",
        "model": None,
        "batch": None,
        "chosen": "",
        "expected": None,
    }
    p["cells"] = list(_nccl_cells(base, counts, repeats, settings or {}))
    p["command"] += " --test nccl"
    state = status(p)
    for entry in state["cells"].values():
        entry["used"] = {"nccl_tests": "2.17.6"}
    records = [
        r for c in p["cells"] for r in nccl_records(p, c, sockets=sockets, undirected=undirected, slow_rail=slow_rail)
    ]
    return Fixture(p, state, records, facts(p, one_kernel=False))


def nccl_sockets() -> Fixture:
    """Nodes without RDMA: whatever leaves a node goes over TCP."""
    return nccl((1, 2, 4), sockets=True)


def nccl_slow_rail() -> Fixture:
    """Rail 5 of two nodes has half of its rate, and with it whatever uses all rails; one node has no GPUDirect."""
    settings = {"gpudirect": True, "buffsize": 8 << 20, "collnet": True}
    return nccl((2,), slow_rail=5, undirected=(NAMES[1],), settings=settings)


def _rl_steps(steps: int, attempts: tuple[int, ...]) -> Iterator[tuple[str, bool]]:
    """verl's line of each step of PPO, and whether it is the first of an attempt."""
    rng = random.Random(11)
    for number in range(1, steps + 1):
        longer = 1 + 0.02 * number
        first = number in attempts
        times = {
            "gen": 41.0 * longer, "reward": 1.4, "old_log_prob": 5.2, "ref": 4.9, "values": 4.1, "adv": 0.4,
            "update_critic": 16.0, "update_actor": 19.5, "update_weights": 3.6,
        }  # fmt: skip
        times = {name: seconds * rng.uniform(0.97, 1.05) for name, seconds in times.items()}
        times |= {"save_checkpoint": 11.0} if number % 10 == 0 else {}
        idle_s = 240.0 if first else 62.0 if number == 17 else rng.uniform(3.0, 5.0)
        tokens = 1024 * (180 + 210 * longer)
        mean, learned = 210 * longer, 1 - 0.9 ** (number / 2)
        data = {f"timing_s/{name}": seconds for name, seconds in times.items()} | {
            "timing_s/step": sum(times.values()) + idle_s,
            "timing_per_token_ms/gen": 1000 * times["gen"] / (1024 * mean),
            **{
                f"timing_per_token_ms/{name}": 1000 * times[name] / tokens
                for name in ("ref", "values", "adv", "update_critic", "update_actor")
            },
            "perf/total_num_tokens": tokens,
            "critic/rewards/mean": 0.08 + 0.62 * learned + rng.gauss(0, 0.02),
            "actor/reward_kl_penalty": 0.0004 * number + rng.gauss(0, 0.0004),
            "actor/ppo_kl": rng.gauss(0, 0.0002),
            "response_length/mean": mean,
            "response_length/max": 512.0,
            "response_length/clip_ratio": 0.02 + 0.001 * number,
            "global_seqlen/mean": tokens / 16,
            "global_seqlen/balanced_max": tokens / 16 * 1.01,
            "actor/grad_norm": 0.4,
        }
        if number % 10 == 0:
            data["val-core/openai/gsm8k/acc/mean@1"] = 0.05 + 0.6 * learned
        yield json.dumps({"step": number, "data": data}), first


def _sft_steps(steps: int) -> Iterator[str]:
    rng = random.Random(5)
    for number in range(1, steps + 1):
        data = {
            "train/loss": 0.42 + 0.9 * 0.93**number + rng.gauss(0, 0.012),
            "train/grad_norm": 0.8,
            "train/global_tokens": 256 * 310,
        }
        yield json.dumps({"step": number, "data": data})


RL_CELLS = {
    "sft": (
        "rl-sft",
        {"words": ["trainer.logger=[console,file,wandb,tensorboard]"], "checkpoint": "/scratch/sft.9a1c"},
    ),
    "merge-sft": ("rl-merge", {"target": "/scratch/models/sft.9a1c", "checkpoint": "/scratch/sft.9a1c"}),
    "ppo": (
        "rl",
        {
            "program": "ppo",
            "words": ["trainer.logger=[console,file,wandb,tensorboard]"],
            "checkpoint": "/scratch/ppo.77e0",
        },
    ),
    "merge-ppo": ("rl-merge", {"target": "/scratch/models/ppo.77e0", "checkpoint": "/scratch/ppo.77e0"}),
}
QUESTION = "Natalia sold 48 clips in April and half as many in May. How many did she sell in all?"
ANSWERS = {
    "merge-sft": "In May she sold 48 / 2 = <<48/2=24>>24 clips.\nShe sold 48 + 24 = <<48+24=72>>72 in all.\n#### 72",
    "merge-ppo": "In May Natalia sold 48/2 = 24 clips. In all she sold 48+24 = 72 clips.\n#### 72",
}


def rl(steps: int = 30, attempts: tuple[int, ...] = (1, 21)) -> Fixture:
    """Workflow sft-ppo on two nodes of 8 x H200, whose PPO went on once from a checkpoint; one of its steps waits."""
    p = plan(model="llama-2-7b", hardware="h200-sxm", counts=(2,), repeats=1, gpus=8, device="cuda")
    base = {**p["cells"][0], "model": None, "batch": None, "chosen": "", "expected": None}
    p["models"] = {}
    p["command"] = (
        "runner workflow sft-ppo -i inventory/fukushimadc-02 --nodes 2 --model llama-3.2-1b-instruct --data gsm8k"
    )
    p["cells"] = []
    for name, (test, params) in RL_CELLS.items():
        one = test == "rl-merge"
        hosts = base["hosts"][: 1 if one else 2]
        world_size = {"rl-sft": 16}.get(test, 1)
        p["cells"].append(
            {**base, "id": name, "test": test, "params": params, "num_nodes": len(hosts), "hosts": hosts,
             "world_size": world_size}
        )  # fmt: skip
    cells = {cell["id"]: cell for cell in p["cells"]}
    records = []
    for index, line in enumerate(_sft_steps(3 * steps)):
        found = step_of(line)
        values = values_of(found, 2.4 + 0.1 * (index % 3) if index else None, index > 0)
        records += [_record(p, cells["sft"], metric, value, 0, **context) for metric, value, context in values]
    for line, first in _rl_steps(steps, attempts):
        found = step_of(line)
        values = values_of(found, found.seconds, not first)
        records += [_record(p, cells["ppo"], metric, value, 0, **context) for metric, value, context in values]
    for name, answer in ANSWERS.items():
        records.append(_record(p, cells[name], "merge_s", 38.0, 0))
        records.append(_record(p, cells[name], "answer_s", 4.2, 0, question=QUESTION, answer=answer))
    state = status(p)
    for name, entry in state["cells"].items():
        entry["used"] = {"wandb": "offline"} if RL_CELLS[name][0] != "rl-merge" else {}
    state["workflow"] = {"name": "sft-ppo", "asked": {}}
    began = {"state": "complete", "started": p["created"], "error": None, "inputs": {}}
    data = {"sft-data": "/scratch/data/gsm8k-sft.parquet", "rl-data": "/scratch/data/gsm8k-rl.parquet"}
    state["stages"] = {
        "prepare": {
            **began,
            "ended": "2026-11-21T04:05:45Z",
            "left": {
                "model": "/scratch/models/llama-3.2-1b-instruct",
                "checksums": {"model": "0123abcd"},
                "data": data,
            },
        },
        "publish": {
            **began,
            "ended": "2026-11-21T04:05:17Z",
            "left": {"where": "/home/anna/models/gsm8k-ppo", "bytes": 2_471_645_608, "digest": "89ab"},
        },
    }
    return Fixture(p, state, records, facts(p, one_kernel=False))


if __name__ == "__main__":
    import sys

    from runner.judge import analysis
    from runner.report import page

    made_of = {"healthy": healthy, "testbed": testbed, "broken": broken, "one-gpu": one_gpu, "gpus": gpus}
    made_of |= {"rl": rl, "nccl": nccl, "nccl-sockets": nccl_sockets, "nccl-slow-rail": nccl_slow_rail}
    for name, made in {name: make() for name, make in made_of.items()}.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        page.write(folder, *made.arguments[:2], analysis.summarise(*made.arguments), *made.arguments[2:])
        print(folder / "report.html")
