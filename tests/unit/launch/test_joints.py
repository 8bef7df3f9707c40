"""The joints: what one part hands over is what the next one takes. Those that need nodes are in tests/testbed/test_joints.py.

cuda.fact, facts   -> hardware file of the plan
roce.fact          -> nccl.conf -> the settings on record of the ranks
nccl.fact          -> environment of the ranks     tests/unit/cluster/test_nccl.py, tests/roles/test_nccl_build.py
prolog and epilog  -> kind of failure
"""

from __future__ import annotations

import importlib
import json
import os
import sys

import pytest
from plans import request

from conftest import NAMES, ROOT
from role_modules import load
from runner.cluster import facts
from runner.errors import UsageError
from runner.failures import KINDS
from runner.launch import start
from runner.launch.slurm import capacity
from runner.plan import config
from runner.system import process

# --- facts to hardware file ---


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "unknown"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "unknown"),
        ("NVIDIA H100 NVL", "unknown"),
        ("NVIDIA H100 96GB HBM3", "unknown"),
        ("NVIDIA GeForce RTX 4090", "unknown"),
        ("NVIDIA A100-SXM4-80GB", "unknown"),
        ("NVIDIA B200", "unknown"),
    ],
)
def test_the_hardware_file_is_that_of_the_gpu_on_the_nodes(cluster, gpu, name):
    asked = request(cluster, hardware={"name": "cpu", **config.load_hardware("cpu").model_dump()})
    assert start._hardware(asked, cluster.nodes[:2], dict.fromkeys(NAMES, gpu))["name"] == name


@pytest.mark.parametrize(
    ("words", "gpu", "describes"),
    [
        ("H200 SXM", "NVIDIA H200", True),
        ("H100 NVL", "NVIDIA H100 NVL", True),
        ("H100 SXM", "NVIDIA H100 NVL", False),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", True),
        ("A100", "NVIDIA A100-PCIe-40GB", False),
        ("H20", "NVIDIA H200", False),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", True),
    ],
)
def test_a_file_describes_the_gpu_by_whole_words(words, gpu, describes):
    assert config.describes({"gpu": words}, gpu) is describes


def test_another_gpu_than_the_inventory_says_is_refused_with_its_file(cluster):
    """Its ceilings and its memory would be another's: efficiency wrong in silence, plans that do not fit."""
    gpus = {NAMES[0]: "NVIDIA H200", NAMES[1]: "NVIDIA H100 80GB HBM3"}
    with pytest.raises(UsageError) as error:
        start._hardware(request(cluster), cluster.nodes[:2], gpus)
    assert str(error.value) == (
        "runner_hardware h200-sxm is H200 SXM, and node002 has NVIDIA H100 80GB HBM3: its file of configs/hardware is h100-sxm"
    )


def test_hardware_that_is_unknown_on_purpose_or_not_seen_is_left_alone(cluster):
    unknown = request(cluster, hardware={"name": "unknown", **config.load_hardware("unknown").model_dump()})
    assert start._hardware(unknown, cluster.nodes, dict.fromkeys(NAMES, "NVIDIA H200"))["name"] == "unknown"
    assert start._hardware(request(cluster), cluster.nodes, {})["name"] == "h200-sxm"


@pytest.mark.parametrize(
    ("model", "name"),
    [("NVIDIA H200", "h200-sxm"), ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA A100-SXM4-80GB", "unknown")],
)
def test_what_cuda_check_publishes_is_what_chooses_the_hardware_file(tmp_path, model, name):
    """cuda.fact has the name that the driver gives, as NVML does."""
    (tmp_path / "gpus.json").write_text(json.dumps({"all": {"Product Name": model}}))
    stand_in = ROOT / "molecule" / "resources" / "stand-ins" / "nvidia-smi"
    printed = process.run(
        [str(stand_in), "-q"], timeout_s=20, env={**os.environ, "NVIDIA_SMI_STATE": str(tmp_path / "gpus.json")}
    ).stdout
    fact = load("cuda_check").describe(
        importlib.import_module("ansible.module_utils.nvidia").parse_query(printed), None, []
    )
    assert {gpu["name"] for gpu in fact["gpus"]} == {model}
    assert config.hardware_of(fact["gpus"][0]["name"]) == name


# --- roce.fact to the record of the ranks ---


@pytest.mark.parametrize("own", [{}, {"NCCL_IB_HCA": "mlx5_9"}])
def test_what_was_found_of_roce_is_on_record_of_the_ranks(tmp_path, own):
    """A variable of the inventory has precedence, as NCCL itself gives it."""
    role = load("nccl_build")
    roce = {"hca": ["mlx5_0:1", "mlx5_1:1"], "gid_index": 3, "traffic_class": 106}
    wanted = {"buffsize": 8388608, "ib_gid_index": -1, "socket_ifname": "", "sharp": "", "conf": {"NCCL_DEBUG": "WARN"}}
    lines = [f"{name}={value}" for name, value in role.conf(wanted, roce).items()]
    (tmp_path / "nccl.conf").write_text("\n".join(lines) + "\n")
    observed = facts.collect({"NCCL_CONF_FILE": str(tmp_path / "nccl.conf"), **own})["env"]
    assert {
        name: value for name, value in observed.items() if name != "NCCL_CONF_FILE" and name.startswith("NCCL_")
    } == {
        "NCCL_BUFFSIZE": "8388608",
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_GID_INDEX": "3",
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "NCCL_IB_TC": "106",
    } | own


# --- prolog to kind of failure ---


@pytest.mark.parametrize(("kind", "expected"), [("prolog", "prolog_failed"), ("epilog", "node_failed")])
@pytest.mark.parametrize("said", ["GPU 3 has fallen off the bus", "no reason given", "2 processes of job 7 are left"])
def test_a_node_that_the_prolog_drained_is_one_whose_prolog_failed(tmp_path, kind, expected, said):
    """The reason is the one that the driver itself gives scontrol."""
    folder, told = tmp_path / f"{kind}.d", tmp_path / "told"
    folder.mkdir()
    for path, script in (
        (folder / "30-gpu-health", f"echo '{said}'; exit 1"),
        (folder / "40-mounts", "exit 0"),
        (tmp_path / "scontrol", f'[ "$1" = update ] && printf "%s\\n" "$@" > {told}; exit 0'),
    ):
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    (tmp_path / "prolog.json").write_text(
        json.dumps({"total_s": 10, "site_part_limit_s": 5, "parts": {}, "scontrol": str(tmp_path / "scontrol")})
    )
    program = tmp_path / kind
    program.write_text((ROOT / "roles" / "slurm_prolog" / "files" / "driver.py").read_text())
    program.chmod(0o755)
    slurms = {**os.environ, "SLURMD_NODENAME": "gpu1", "SLURM_JOB_ID": "7"}
    assert process.run([sys.executable, str(program)], timeout_s=20, env=slurms).rc == 1
    (reason,) = [line for line in told.read_text().splitlines() if line.startswith("reason=")]
    assert reason == f"reason={kind} 30-gpu-health: {said}"
    assert capacity.node_kind(reason.removeprefix("reason=")) == expected and expected in KINDS
