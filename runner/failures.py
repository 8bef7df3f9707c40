"""Kinds of failure: what each means, whose fault it is, and what to do. Pure.

Every failure has one of these kinds: a cell's error, a bad node, a command's error with `--json`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of failure: its title, whose fault it is, whether a retry may succeed, and what to do.

    `retry` is for infrastructure, which may work the next time, never for a user's or a configuration's fault.
    `continues`: another try gets further where it goes on from a checkpoint of the last one.
    `headline` is that of a run in which all cells completed and all findings are of this kind.
    """

    title: str
    fault: str
    retry: bool = False
    advice: str = ""
    headline: str = ""
    continues: bool = False


NODE, CONFIGURATION, USER, TOOL, NOBODY = "node", "configuration", "user", "tool", "not identifiable"

# Every kind that agents, backends and `blame` report, and every kind found in a run's measurements.
KINDS: Mapping[str, Kind] = {
    # reaching a node
    "unreachable": Kind("A node cannot be reached", NODE, True, "check that it is up and its sshd and network answer"),
    "host_key_changed": Kind(
        "A host key is not the pinned one", CONFIGURATION, False, "compare it before you trust it"
    ),
    "host_key_unknown": Kind(
        "No host key is known", CONFIGURATION, False, "pin it: ssh-keyscan, and compare the fingerprint"
    ),
    "refused_key": Kind("A node refuses the key", CONFIGURATION, False, "authorize the key there (role ssh_mesh)"),
    "lost_connection": Kind("A node was lost", NODE, True, "see whether it was restarted or lost its network"),
    "hung": Kind("A node stopped answering", NODE, True, "look at its console and its network"),
    # what is found before anything starts
    "environment_missing": Kind(
        "Software is missing or does not fit",
        CONFIGURATION,
        False,
        "install the environment on this node as on the others",
    ),
    "module_missing": Kind(
        "An environment module is missing", CONFIGURATION, False, "see `module avail` there, and runner_modules"
    ),
    "not_shared": Kind(
        "A folder is not shared",
        CONFIGURATION,
        False,
        "name a folder that this machine and all nodes see at the same path (runner_shared, --work)",
    ),
    "version_mismatch": Kind("Versions differ", CONFIGURATION, False, "install the controller's version there"),
    "in_use": Kind("A node is in use", CONFIGURATION, False, "wait for that run or choose other nodes"),
    "wrong_address": Kind(
        "A node has a wrong address of another", CONFIGURATION, False, "correct its /etc/hosts or DNS"
    ),
    "copy_differs": Kind(
        "A node's copy differs from what was sent", NODE, True, "see its disk, and whether files were changed meanwhile"
    ),
    "clock": Kind("A clock is wrong", CONFIGURATION, False, "let chrony or NTP set the node's clock"),
    "disk_full": Kind("A disk is full", NODE, True, "free some disk"),
    "port_taken": Kind("A port is taken", NOBODY, True, "see what uses it there; another try takes the next port"),
    "gpu_failed": Kind("A GPU failed", NODE, True, "drain the node and reset the GPU"),
    "gpu_unavailable": Kind(
        "A GPU does not answer",
        NODE,
        True,
        "see nvidia-smi there, whether the driver and its library have one version, and CUDA_VISIBLE_DEVICES",
    ),
    "fabric_not_ready": Kind(
        "The NVSwitch fabric is not ready",
        NODE,
        True,
        "start the node's fabric manager in the driver's version, and see its log",
    ),
    "driver_too_old": Kind(
        "The driver is missing, or too old for this CUDA",
        CONFIGURATION,
        False,
        "see nvidia-smi there: install or upgrade the driver, or take software for an older CUDA (conda_env_profile, "
        "nccl_build_cuda_home)",
    ),
    "nic_failed": Kind("A network adapter failed", NODE, True, "see its port, its cable and the node's kernel log"),
    "interface_missing": Kind(
        "The network is not as it is named",
        CONFIGURATION,
        False,
        "compare NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA and the host names with what the node has",
    ),
    "file_system_failed": Kind(
        "A file system failed", NODE, True, "see the mount and the kernel log of the node, and the server of the mount"
    ),
    "shared_memory_full": Kind(
        "Shared memory ran out",
        CONFIGURATION,
        False,
        "free or enlarge /dev/shm; in a container with --shm-size or --ipc=host",
    ),
    "limit_reached": Kind(
        "A limit of the node was reached",
        CONFIGURATION,
        False,
        "raise it: ulimit -l for RDMA, -n for files, -u for threads",
    ),
    "not_permitted": Kind(
        "A permission is missing", CONFIGURATION, False, "see the owner and mode of what it names, and the run's user"
    ),
    # data and weights
    "hub_unreachable": Kind(
        "The model hub does not answer",
        CONFIGURATION,
        False,
        "give a folder instead (--weights: one that the nodes have), or let the hub be reached (HF_ENDPOINT, a proxy)",
    ),
    "weights_unusable": Kind(
        "The weights cannot be used",
        USER,
        False,
        "correct the name or the files of --weights or --model; for gated ones accept the licence and set HF_TOKEN",
    ),
    "checkpoint_unusable": Kind(
        "A checkpoint makes no usable model",
        TOOL,
        False,
        "look at the stage that wrote it, and at the disk; that stage alone can run again (--stages)",
    ),
    # how ranks end
    "rank_killed": Kind("A rank was killed", NOBODY, True, "look in the node's log for what killed it"),
    "out_of_memory": Kind("A node ran out of memory", NODE, True, "see what else uses its memory, or offload less"),
    "cuda_out_of_memory": Kind(
        "GPU memory ran out",
        USER,
        False,
        "lower the micro batch or use more nodes; see with nvidia-smi whether others use that GPU",
    ),
    "rank_hung": Kind("A rank hung", NODE, True, "look at the node, and at where the rank is stuck"),
    "rank_crashed": Kind("A rank crashed", NOBODY, False, "read its last lines"),
    "script_failed": Kind("The program failed", USER, False, "read its last lines"),
    "lost_peers": Kind("Ranks lost each other", NOBODY, True, "look at the network between these nodes"),
    "timed_out": Kind(
        "A cell ran out of time", NOBODY, False, "raise the test's timeout_s, or see what was slow", continues=True
    ),
    "launcher_failed": Kind("The launcher failed", TOOL, False, "read its last lines"),
    # Ray
    "never_joined": Kind(
        "A node has not joined Ray",
        NODE,
        True,
        "see the last lines of its `ray start`, and whether it reaches the head's address and ports",
    ),
    "ray_died": Kind(
        "Ray ended on a node",
        NODE,
        True,
        "see ray.log and the folder ray among its artefacts, and what the node's log says of killed processes",
    ),
    "ray_refused": Kind(
        "Ray refuses the token of this run",
        CONFIGURATION,
        False,
        "see whether another Ray answers at the address that it names, and that nothing sets SHAKEDOWN_RAY_TOKEN",
    ),
    "accelerate_refused": Kind(
        "Accelerate refuses its configuration",
        CONFIGURATION,
        False,
        "see accelerate.yaml in the cell's folder, and the keys that this version of Accelerate knows",
    ),
    "wrong_world_size": Kind(
        "Another number of ranks started than planned",
        CONFIGURATION,
        False,
        "let --engine start them; `accelerate launch --cpu` starts one process, whatever --num_processes says",
    ),
    "rollout_out_of_memory": Kind(
        "The rollout has not enough GPU memory",
        USER,
        False,
        "--set verl.rl.actor_rollout_ref.rollout.gpu_memory_utilization=0.7 where no memory is left for the KV cache, "
        "--set verl.rl.actor_rollout_ref.rollout.gpu_memory_utilization=0.3 where less is free than it asks for "
        "(without it: 0.5); else a smaller rollout.max_model_len, or a larger rollout.tensor_model_parallel_size",
    ),
    "gpus_missing": Kind(
        "A node has fewer GPUs than asked for",
        NODE,
        True,
        "see nvidia-smi there, CUDA_VISIBLE_DEVICES, and the GPUs that the job was granted",
    ),
    # the controller
    "not_gathered": Kind("Artefacts were not gathered", NODE, True, "they are still on the node"),
    "controller_disk_full": Kind("The controller's disk is full", CONFIGURATION, False, "free some disk and resume"),
    "interrupted": Kind("A cell was interrupted", USER, False, "finish it with --resume"),
    # Slurm
    "time_limit": Kind(
        "Slurm's time limit passed", CONFIGURATION, False, "ask for more time, or for less work", continues=True
    ),
    "node_failed": Kind("Slurm lost a node", NODE, True, "see `scontrol show node` for the reason"),
    "job_cancelled": Kind("The job was cancelled", USER, False, "finish it with --resume"),
    "not_in_slurm": Kind(
        "Slurm does not know a node", CONFIGURATION, False, "add it to slurm.conf, or name nodes that Slurm has"
    ),
    "not_started": Kind("The job did not start", NOBODY, False, "see the queue's reason"),
    "slurm_unreachable": Kind("Slurm does not answer", NOBODY, True, "check that slurmctld runs and answers here"),
    "preempted": Kind("The job was preempted", NOBODY, True, "choose a QoS or partition that is not preempted"),
    "prolog_failed": Kind("A prolog failed", NODE, True, "see the node's slurmd log"),
    # complete cells that do not remain valid when a run is resumed
    "plan_changed": Kind(
        "The plan has changed since a cell was measured", USER, False, "measure the cell again with --resume"
    ),
    "drift": Kind(
        "A node has changed since a cell was measured",
        CONFIGURATION,
        False,
        "restore the environment, or measure the cell again with --resume --accept-drift",
    ),
    # what the records and facts of complete cells show
    "wrong_values": Kind(
        "Wrong results",
        NOBODY,
        False,
        "run the test on fewer nodes at a time to find the node, GPU or link at fault",
        headline="Collectives return wrong results",
    ),
    "torn_output": Kind(
        "The output of a tool is torn",
        TOOL,
        False,
        "see the rank's own output among the artefacts, and measure the cell again",
        headline="Measurements are incomplete",
    ),
    "socket_fallback": Kind(
        "NCCL uses sockets, not RDMA",
        CONFIGURATION,
        False,
        "see that the NICs and libibverbs are there (ibv_devinfo), that NCCL_IB_DISABLE is not set, and that "
        "NCCL_IB_HCA names them",
        headline="NCCL does not use RDMA",
    ),
    "rail_missing": Kind(
        "A NIC carries nothing",
        NODE,
        False,
        "see its link and its port (ibv_devinfo, role roce_qos), and that NCCL_IB_HCA names every NIC",
        headline="A NIC is not used",
    ),
    "wrong_nic": Kind(
        "Other NICs than on other nodes", CONFIGURATION, False, "name the same ones on every node in NCCL_IB_HCA"
    ),
    "no_gpudirect": Kind(
        "No GPUDirect RDMA",
        CONFIGURATION,
        False,
        "load nvidia_peermem or use a driver with DMA-BUF, turn ACS off; --set nccl.gpudirect=true takes it at any "
        "distance between GPU and NIC",
        headline="Data between nodes goes through host memory",
    ),
    "no_nvls": Kind(
        "No NVLink SHARP",
        CONFIGURATION,
        False,
        "start the fabric manager in the driver's version, and see that NCCL_NVLS_ENABLE is not 0",
        headline="NVLink SHARP is not used",
    ),
    "setting_ignored": Kind(
        "A setting had no effect",
        CONFIGURATION,
        False,
        "compare with a run without it before you rely on it",
        headline="NCCL did not do what it was told",
    ),
    "slow_rail": Kind(
        "A rail is slower than the others",
        NOBODY,
        False,
        "see both ends of it, its cables and its switch: link rate, error counters, PFC (role roce_qos)",
        headline="A rail is slow",
    ),
    "slow_fabric": Kind(
        "The fabric is far from its ceiling",
        NOBODY,
        False,
        "see in the tables of nodes and rails whether NVLink or a rail is slow, and see PFC and ECN (role roce_qos)",
        headline="The fabric is slow",
    ),
    "above_ceiling": Kind(
        "Faster than the hardware allows",
        CONFIGURATION,
        False,
        "compare runner_nics_per_node, runner_nic_gbit_per_s and the hardware file with the nodes",
    ),
    "gpu_wrong_values": Kind(
        "A GPU gives wrong values",
        NODE,
        False,
        "take the node out of use and run dcgmi diag -r 4 there; if the same GPU errs again, replace it",
        headline="A GPU gives wrong values",
    ),
    "gpu_memory_errors": Kind(
        "A GPU's memory has errors",
        NODE,
        False,
        "see nvidia-smi -q -d ECC,ROW_REMAPPER there; drain the node and reset the GPU, replace it if rows cannot be "
        "remapped",
        headline="A GPU's memory has errors",
    ),
    "slow_node": Kind(
        "All GPUs of a node are slow",
        NODE,
        False,
        "compare its power limits, clocks, driver settings, BIOS and cooling with those of another node",
        headline="A node is slower than the others",
    ),
    "slow_gpu": Kind(
        "A GPU is slow",
        NODE,
        False,
        "compare nvidia-smi -q of this GPU with a good one's; run the test on its node alone, and replace the GPU if "
        "it stays slow",
        headline="A GPU is slower than the others",
    ),
    "throttled": Kind(
        "A GPU is throttled",
        NODE,
        False,
        "see nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE there: its cooling and power supply, and its power limit "
        "and clock settings",
        headline="A GPU is throttled",
    ),
    "gpu_drift": Kind(
        "A GPU becomes slower as it works",
        NODE,
        False,
        "run --test gpu --set gpu.soak_s=600 on its node and see its temperature, its fans or its cold plate",
        headline="A GPU becomes slower as it works",
    ),
    "slow_pcie": Kind(
        "The link between a GPU and its host is slow",
        NODE,
        False,
        "see LnkSta of the GPU in lspci -vv: its width and rate, on every bridge above it; reseat the GPU or its riser",
        headline="A GPU's link to its host is slow",
    ),
    "slow_peer": Kind(
        "The link between GPUs is slow",
        NODE,
        False,
        "see nvidia-smi nvlink -s and -e there, and the log of the fabric manager; drain the node and reset its GPUs",
        headline="A link between GPUs is slow",
    ),
    "busy_gpu": Kind(
        "A GPU is used by somebody else",
        CONFIGURATION,
        False,
        "end what uses it, or wait for it, and measure again",
        headline="A GPU was used by somebody else",
    ),
    "below_hardware": Kind(
        "All GPUs are slower than their hardware allows",
        NOBODY,
        False,
        "see whether runner_hardware names these GPUs, and what limits their power and clocks",
    ),
    "no_records": Kind(
        "Nothing was measured",
        TOOL,
        False,
        "read the output of its ranks in benchmark.log",
        headline="Cells completed without a measurement",
    ),
    "not_a_number": Kind(
        "Training computed NaN",
        NOBODY,
        False,
        "lower the learning rate (--set verl.KEY=VALUE), see the data and the rewards of that step, and go on from a "
        "checkpoint before it",
        headline="Training computed NaN",
    ),
    "idle_step": Kind(
        "Steps of training wait",
        NOBODY,
        False,
        "see the timeline of phases; larger batches make a fixed part of a step smaller",
    ),
    "uneven_rollout": Kind(
        "Rollout waits for few answers",
        NOBODY,
        False,
        "see the lengths of answers: with a lower data.max_response_length, or more answers for each GPU, more are at "
        "work",
    ),
    "environment": Kind(
        "Nodes are set up differently",
        CONFIGURATION,
        False,
        "make it the same on all nodes",
        headline="Nodes are not set up the same",
    ),
    "unknown": Kind(
        "A cell failed", NOBODY, False, "read benchmark.log"
    ),  # also of runs of versions that recorded no kinds
}

# Kinds of earlier versions -> the kinds that replaced them.
_FORMER = {"rank_died": "rank_crashed", "node_unreachable": "hung"}


def current(kind: object) -> str:
    """The name in KINDS of a kind that a run of any version recorded; `unknown` for any other value."""
    name = _FORMER.get(str(kind), str(kind))
    return name if name in KINDS else "unknown"


@dataclass(frozen=True)
class Problem:
    """Why a node cannot be used: a kind in KINDS, and a message of one line."""

    kind: str
    message: str


@dataclass(frozen=True)
class Suspect:
    """What the records of a test show to be wrong: a kind in KINDS, where it was seen, and the evidence for it.

    `host` is the node at fault, None where no single node can be named; `confidence` is `high`, `medium`, `low` or
    NOBODY. An `observation` is worth knowing but proves no fault: it never fails a run.
    """

    kind: str
    where: str
    evidence: str
    confidence: str
    host: str | None = None
    observation: bool = False


def node_lines(bad: Iterable[Mapping[str, str] | str]) -> list[str]:
    """One line per node with all its problems, from {"host", "alias", "kind", "message"} of each problem in `bad`.

    An entry may be such a line already, as in plans of earlier versions.
    """
    nodes: dict[str, list[str]] = defaultdict(list)
    for one in bad:
        if isinstance(one, str):
            node, _, message = one.partition(": ")
        else:
            node, message = f"{one['alias']} ({one['host']})", one["message"]
        nodes[node].append(message)
    return [f"{node}: {'; '.join(messages)}" for node, messages in nodes.items()]
