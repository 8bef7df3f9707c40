"""The command of nccl-tests with its environment, from the settings of a cell of test `nccl`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

# The program of each collective, without `_perf`.
PROGRAMS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "alltoall",
    "all_to_all_v": "alltoallv",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "send_recv": "sendrecv",
    "gather": "gather",
    "scatter": "scatter",
    "hypercube": "hypercube",
}
_DTYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "half",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "float8_e4m3": "f8e4m3",
    "float8_e5m2": "f8e5m2",
}
# Whose time is printed: the mean of all ranks, the slowest one's where each node is a group, and where each rail is,
# that of rank 0, which is on the rail in question.
_TIMES = {"none": 1, "node": 3, "rail": 0}
# What NCCL says of its choices. INIT has channels and networks, ENV the variables that it has read, NET the NICs, and
# TUNING the algorithm of every operation, which costs rank 0 of a group some microseconds of its CPU for each.
_SUBSYSTEMS = "INIT,ENV,NET,GRAPH,TUNING"
# They would end a test by the mean over all sizes, take all ranks to one GPU, or split them in another way.
_DROPPED = ("NCCL_TESTS_MIN_BW", "NCCL_TESTS_DEVICE", "NCCL_TESTS_SPLIT", "NCCL_TESTS_SPLIT_MASK")


def program(root: str, collective: str) -> str:
    """The path of the program that measures `collective`, where role nccl_build has its builds in `root`."""
    return str(PurePath(root, "current", "bin", f"{PROGRAMS[collective]}_perf"))


def sizes(params: Mapping[str, Any]) -> list[int]:
    """The sizes in bytes that a cell's settings ask for; nccl-tests rounds each down to whole elements of each rank."""
    found = [params["min_bytes"]]
    while found[-1] * params["factor"] <= params["max_bytes"]:
        found.append(found[-1] * params["factor"])
    return found


def argv(params: Mapping[str, Any]) -> list[str]:
    """The command of every rank of a cell: one GPU each."""
    options = {
        "-b": _size(params["min_bytes"]),
        "-e": _size(params["max_bytes"]),
        "-f": params["factor"],
        "-w": params["warmup"],
        "-n": params["iters"],
        "-d": _DTYPES[params["dtype"]],
        "-c": int(params["check"]),
        "-a": _TIMES[params["split"]],
        "-t": 1,
        "-g": 1,
    }
    return [
        program(params["root"], params["collective"]),
        *(str(word) for option in options.items() for word in option),
    ]


def _size(size: int) -> str:
    """A number of bytes as people give it to nccl-tests: 8G."""
    for unit in "GMK":
        number, rest = divmod(size, 1024 ** " KMG".index(unit))
        if number and not rest:
            return f"{number}{unit}"
    return str(size)


def of_rank(params: Mapping[str, Any], gpus_per_node: int, on_gpu: bool) -> tuple[list[str], dict[str, str]]:
    """What a rank of a cell runs, as `registry.RankCommand`; what NCCL says of itself is printed."""
    found = environment(params, gpus_per_node, on_gpu, "", {})
    del found["NCCL_DEBUG_FILE"]
    return argv(params), found


def variables(params: Mapping[str, Any]) -> dict[str, str]:
    """The variables of NCCL that the settings ask for; what is null is left to NCCL and to the inventory."""
    chosen = {
        "NCCL_NVLS_ENABLE": params["nvls"],
        "NCCL_COLLNET_ENABLE": params["collnet"],
        # How far from a GPU its NIC may be: anywhere in the system, or nowhere.
        "NCCL_NET_GDR_LEVEL": None if params["gpudirect"] is None else "SYS" if params["gpudirect"] else "LOC",
        "NCCL_BUFFSIZE": params["buffsize"],
        "NCCL_ALGO": params["algo"],
        "NCCL_PROTO": params["proto"],
        "NCCL_NET": params["net"],
        "NCCL_IB_HCA": params["hca"],
        "NCCL_IB_QPS_PER_CONNECTION": params["qps_per_connection"],
        **params["variables"],
    }
    return {
        name: str(int(value) if isinstance(value, bool) else value)
        for name, value in chosen.items()
        if value is not None
    }


def split(kind: str, gpus_per_node: int) -> dict[str, str]:
    """The variables by which nccl-tests splits its ranks; with `kind` "none" there are none.

    A rank's group is its number modulo, or divided by, the GPUs of a node. The mask, which versions before 2.14 know
    as well, says the same for a power of two, and later ones read it first.
    """
    if kind == "none":
        return {}
    found = {"NCCL_TESTS_SPLIT": f"{'DIV' if kind == 'node' else 'MOD'} {gpus_per_node}"}
    if gpus_per_node & (gpus_per_node - 1) == 0:
        inside = gpus_per_node - 1
        found["NCCL_TESTS_SPLIT_MASK"] = hex(0x7FFFFFFF & ~inside if kind == "node" else inside)
    return found


def environment(
    params: Mapping[str, Any], gpus_per_node: int, on_gpu: bool, log: str, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of a rank's program, from that of the rank; NCCL writes what it says of itself to `log`.

    For a rail, the GPUs of each node are numbered from the rail's own on, so that rank 0 has it.
    """
    kept = {name: value for name, value in inherited.items() if name not in _DROPPED}
    libraries = [f"{params['root']}/current/lib", *filter(None, [inherited.get("LD_LIBRARY_PATH")])]
    found = {
        **kept,
        "LD_LIBRARY_PATH": ":".join(libraries),
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": _SUBSYSTEMS,
        "NCCL_DEBUG_FILE": log,
        **split(params["split"], gpus_per_node),
        **variables(params),
    }
    if on_gpu and params["rail"]:
        seen = inherited.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus_per_node)))
        gpus, first = seen.split(","), params["rail"]
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])
    return found
