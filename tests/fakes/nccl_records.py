"""Plans and records of test `nccl`, as ranks on GPUs would have written them: what a test plants is said in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from runner.plan import config
from runner.results.records import Record
from runner.workloads.nccl import variants

SIZES = [8 << (3 * step) for step in range(11)]  # 8 B to 8 GiB
HOSTS = ("node-a", "node-b")


def plan(
    *settings: str, hosts: Sequence[str] = HOSTS, gpus: int = 8, nics: int = 2, device: str = "cuda", **hardware: Any
) -> dict[str, Any]:
    """A plan of all cells of the test on `hosts`, whose NICs have 400 Gbit/s each."""
    params = config.load_test("nccl", config.parse_settings(settings).get("nccl", {})).model_dump()
    params["max_bytes"] = params["max_bytes"] or 8 << 30
    cells = [
        {
            "id": f"nccl-{suffix}-{len(hosts)}n-r1", "test": "nccl", "num_nodes": len(hosts), "gpus_per_node": gpus,
            "world_size": len(hosts) * gpus, "device": device, "hosts": list(hosts), "params": own, "repeat": 1,
        }
        for suffix, own in variants.variants(params, len(hosts), gpus).items()
    ]  # fmt: skip
    nodes = [{"name": host, "nics": nics, "nic_gbit_per_s": 400.0} for host in hosts]
    rates = {**config.load_hardware("h200-sxm").model_dump(), **hardware}
    return {"cells": cells, "nodes": nodes, "hardware": rates, "seed": 0, "targets": []}


def cell(planned: Mapping[str, Any], part: str = "all_reduce-") -> dict[str, Any]:
    """The first cell of a plan whose id has `part`."""
    return next(one for one in planned["cells"] if part in one["id"])


def summaries(planned: Mapping[str, Any], not_judged: str | None = None) -> list[dict[str, Any]]:
    """The cells of summary.json, all complete."""
    kept = ("id", "test", "num_nodes", "world_size", "repeat", "hosts", "device")
    more = {"state": "complete", "metrics": {}, "limits": {}, "not_judged": not_judged}
    return [{**{name: one[name] for name in kept}, **more} for one in planned["cells"]]


def value(one: Mapping[str, Any], metric: str, number: float, rank: int = 0, **context: Any) -> Record:
    params = one["params"]
    own = {"collective": params["collective"], "split": params["split"], **context}
    if params["rail"] is not None:
        own["rail"] = params["rail"]
    host = one["hosts"][rank // one["gpus_per_node"]]
    return Record(
        "run", one["id"], "nccl", None, one["num_nodes"], one["world_size"], 1, metric, number, host, rank, own
    )  # fmt: skip


def table(
    one: Mapping[str, Any],
    busbw: Callable[[int], float] = lambda size: 92.0,
    sizes: Iterable[int] = SIZES,
    wrong: int = 0,
    latency_us: float = 20.0,
) -> list[Record]:
    """The rows that rank 0 reads: `busbw` GB/s by size, where `latency_us` allows it."""
    found = []
    ranks = one["world_size"]
    for size, in_place in itertools.product(sizes, (False, True)):
        context = {"size_bytes": size, "in_place": in_place, "dtype": "float32"}
        factor = 2 * (ranks - 1) / ranks
        time = latency_us + size * factor / (busbw(size) * 1e3)
        algbw = size / (time * 1e3)
        found += [
            value(one, "latency_us_mean", time, **context),
            value(one, "algbw_gb_per_s", algbw, **context),
            value(one, "busbw_gb_per_s", algbw * factor, **context),
            value(one, "wrong_values", wrong, **context),
        ]
    return found


def chosen(one: Mapping[str, Any], algorithm: str = "RING", protocol: str = "SIMPLE", share: int = 1) -> list[Record]:
    """The algorithm of every size as rank 0 reads it; `share`: what one rank has is 1 ÷ `share` of the size."""
    return [
        value(one, "algorithm", size // share, of=one["params"]["collective"], algorithm=algorithm, protocol=protocol)
        for size in SIZES
    ]


def evidence(
    one: Mapping[str, Any],
    net: Mapping[str, str] | str = "IB",
    nics: Mapping[str, Sequence[str]] | Sequence[str] = ("mlx5_0", "mlx5_1"),
    gpudirect: Mapping[str, bool] | bool = True,
    nvls: Mapping[str, bool] | bool = True,
    collnet: bool = False,
    settings: Mapping[str, str] | None = None,
) -> list[Record]:
    """What every rank says; a mapping is by host, for whom it names."""
    found = []
    for rank in range(one["world_size"]):
        host, local = one["hosts"][rank // one["gpus_per_node"]], rank % one["gpus_per_node"]

        def of(what: Any, otherwise: Any, host: str = host) -> Any:
            return what.get(host, otherwise) if isinstance(what, Mapping) else what

        network, adapters = of(net, "IB"), of(nics, ("mlx5_0", "mlx5_1"))
        direct = of(gpudirect, True) and network != "Socket"
        number = local * len(adapters) // one["gpus_per_node"]
        via = f"NET/{network}/{number}{'/GDRDMA' if direct else ''}"
        channel = {"via": via, "net": network, "nic": adapters[number], "gpudirect": direct}
        found += [
            value(one, "nics", len(adapters), rank, net=network, link=None, names=list(adapters)),
            value(one, "channels", 4, rank, **channel),
            value(one, "channels", 32, rank, via="P2P/CUMEM", net=None, nic=None, gpudirect=None),
            value(one, "gpudirect", int(direct), rank),
            value(one, "nvls", int(of(nvls, True)), rank),
            value(one, "collnet", int(collnet), rank),
        ]
        if settings:
            found.append(value(one, "settings", len(settings), rank, values=dict(settings)))
    return found
