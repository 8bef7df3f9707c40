"""What NCCL, CUDA, loaders, kernels and libraries say as a rank dies, and the kind of failure that it proves.

Each message is shortened from a public report or from the source of who says it, names changed.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from runner.failures import CONFIGURATION, KINDS, NODE, USER
from runner.launch import blame
from runner.launch.spellings import SPELLINGS, kind_of
from runner.launch.talk import AgentSession
from runner.node import lastwords
from runner.node.protocol import Outcome

NCCL = (
    "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, {what}, "
    "NCCL version 2.20.5\n{code}\nLast error:\n{last}"
)
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."
INTERNAL = "ncclInternalError: Internal check failed."
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
CUDA = "ncclUnhandledCudaError: Call to CUDA function failed."


def nccl(code: str, last: str, what: str = "unhandled system error (run with NCCL_DEBUG=INFO for details)") -> str:
    return NCCL.format(code=code, last=last, what=what)


SAID: dict[str, list[str]] = {
    "gpu_failed": [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "RuntimeError: transform: failed to synchronize: cudaErrorECCUncorrectable: uncorrectable ECC error encountered",
        "RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution",
        nccl(CUDA, "Cuda failure 214 'uncorrectable ECC error encountered'", "unhandled cuda error"),
        "pynvml.NVMLError_GpuIsLost: GPU is lost",
        "torch.AcceleratorError: CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
        "NVRM: Xid (PCI:0000:4b:00 GPU-I:05): 95, pid=7194, Uncontained: FBHUB. RST: Yes, D-RST: No",
        "NVRM: Xid (PCI:0000:91:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
        "Unable to determine the device handle for GPU0000:9B:00.0: Unknown Error",
    ],
    "fabric_not_ready": [
        "rank 0: all_reduce_perf failed with status 2: gpu: CUDA failure: system not yet initialized",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
        "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
        "RuntimeError: cuda runtime error (802) : system not yet initialized at /tmp/THCGeneral.cpp:50",
        nccl(CUDA, "Cuda failure 802 'system not yet initialized'", "unhandled cuda error"),
        'CUDA error at bandwidthTest.cu:256 code=802(cudaErrorSystemNotReady) "cudaSetDevice(currentDevice)"',
        "jaxlib.XlaRuntimeError: INTERNAL: CUDA_ERROR_SYSTEM_NOT_READY: system not yet initialized",
        "gpu: Test CUDA failure common.cu:1030 'system not yet initialized'",
    ],
    "driver_too_old": [
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
        "host: Test CUDA failure util.cu:674 'CUDA driver version is insufficient for CUDA runtime version'",
        "rank 0: all_reduce_perf failed with status 2: host: CUDA failure: CUDA driver version is insufficient for CUDA runtime version",
        nccl(CUDA, "Cuda failure 35 'CUDA driver version is insufficient for CUDA runtime version'"),
        "RuntimeError: CUDA error: the provided PTX was compiled with an unsupported toolchain.",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW",
        "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.4, please update your driver: unknown",
    ],
    "gpu_unavailable": [
        'rank 0: all_reduce_perf failed with status 2: node1: CUDA failure: invalid device ordinal',
        'rank 0: all_reduce_perf failed with status 5: Invalid number of GPUs: 8 requested but only 4 were found.',
        'rank 0: all_reduce_perf failed with status 1: [ERROR] The number of requested GPUs (8) is greater than the number of GPUs available (4)',
        'RuntimeError: CUDA error: unknown error',
        'RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 999: unknown error',
        'Failed to initialize NVML: Unknown Error',
        "RuntimeError: CUDA error: no CUDA-capable device is detected",
        "RuntimeError: No CUDA GPUs are available",
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "RuntimeError: CUDA error: invalid device ordinal",
        nccl(INTERNAL, "Duplicate GPU detected : rank 0 and rank 4 both on CUDA device 7000", "internal error"),
        "pynvml.NVMLError_LibRmVersionMismatch: Driver/library version mismatch",
        "RuntimeError: CUDA error: system has unsupported display driver / cuda driver combination",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
    ],
    "in_use": [
        'rank 0: all_reduce_perf failed with status 2: node1: CUDA failure: all CUDA-capable devices are busy or unavailable',
        "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable",
        nccl(CUDA, "Cuda failure 46 'CUDA-capable device(s) is/are busy or unavailable'"),
        "RuntimeError: cudaErrorDevicesUnavailable: all CUDA-capable devices are busy or unavailable",
        "cupy_backends.cuda.api.driver.CUDADriverError: CUDA_ERROR_DEVICE_UNAVAILABLE: busy",
    ],
    "rollout_out_of_memory": [
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine.",
        "ValueError: The model's max seq len (131072) is larger than the maximum number of tokens that can be stored in KV cache (56736). Try increasing `gpu_memory_utilization`",
        "ValueError: To serve at least one request with the models's max seq len (32768), (14.50 GiB KV cache is needed, which is larger than the available KV cache memory (6.20 GiB). Based on the available memory, the estimated maximum model length is 8192.",
        "ValueError: To serve at least one request with the model's max seq len (917504), 23.38 GiB KV cache is needed, which is larger than the available KV cache memory (22.61 GiB).",
        "ValueError: Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired GPU memory utilization (0.8, 12.39 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    ],
    "cuda_out_of_memory": [
        'rank 0: all_reduce_perf failed with status 2: node1: CUDA failure: out of memory',
        "rank 0: all_reduce_perf failed with status 3: node1: NCCL failure: unhandled cuda error (run with NCCL_DEBUG=INFO for details) / Cuda failure 2 'out of memory'",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB",
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "RuntimeError: CUDA error: out of memory",
        nccl(CUDA, "Cuda failure 2 'out of memory'", "unhandled cuda error"),
        nccl(CUDA, "Failed to CUDA calloc 6291456 bytes", "unhandled cuda error"),
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "torch.AcceleratorError: CUDA error: out of memory",
    ],
    "checkpoint_unusable": [
        "rank 0: checkpoint unusable: /c/sft.1 has no latest_checkpointed_iteration.txt: nothing was saved there",
        "rank 0: checkpoint unusable: step 4 is the newest, and /c/ppo.1/global_step_4/actor is not there",
        "rank 0: checkpoint unusable: its model does not load: Error while deserializing header (/m/.sft.1.partial)",
        "rank 0: checkpoint unusable: its model lacks 2 weights: model.embed_tokens.weight (/m/.sft.1.partial)",
        "rank 0: checkpoint unusable: its model computes NaN or infinity (/m/.sft.1.partial)",
    ],
    "wrong_world_size": [
        "accelerate launch started this process alone, as it does with --cpu whatever --num_processes says: set X=true",
        "accelerate launch started this process alone",
        "rank 0: world size is 1, planned: 2",
        "world size is 16, planned: 32",
        "world size is 8, planned: 1",
    ],
    "weights_unusable": [
        'ValueError: The checkpoint you are trying to load has model type `qwen9` but Transformers does not recognize this architecture.',
        'ValueError: The repository a/b contains custom code which must be executed to correctly load the model.',
        "OSError: some-org/some-model is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'\nIf this is a private repository, pass a token",
        "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/a/b.",
        "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-66)",
        "huggingface_hub.utils._errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-66)",
        "OSError: a/b does not appear to have a file named config.json. Checkout 'https://huggingface.co/a/b/tree/main'",
        "requests.exceptions.HTTPError: 404 Client Error: Not Found for url: https://huggingface.co/a/b/config.json",
        "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge",
        "rank 0: cannot read weights 'a/b': a/b is not a local folder and is not a valid model identifier listed on 'x'",
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name'",
    ],
    "hub_unreachable": [
        'RuntimeError: An error occurred while downloading using `hf_transfer`. Consider disabling HF_HUB_ENABLE_HF_TRANSFER',
        'http.client.RemoteDisconnected: Remote end closed connection without response',
        'huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url: https://huggingface.co/a',
        "rank 0: cannot read weights 'a/b': We couldn't connect to 'http://127.0.0.1:9' to load the files",
        "OSError: We couldn't connect to 'https://huggingface.co' to load this file, couldn't find it in the cache",
        "requests.exceptions.ConnectionError: (MaxRetryError('HTTPSConnectionPool(host=\\'huggingface.co\\', port=443): Max "
        "retries exceeded with url: /a/b (Caused by NewConnectionError: [Errno 111] Connection refused'))'",
        "httpx.ConnectError: [Errno 111] Connection refused",
        "huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the file on the Hub",
        "ConnectionError: Couldn't reach 'a/b' on the Hub (ConnectionError)",
        "urllib.error.URLError: <urlopen error [Errno -3] Temporary failure in name resolution>",
        "requests.exceptions.ReadTimeout: (ReadTimeoutError(\"HTTPSConnectionPool(host='x', port=443): Read timed out.\"), '')",
        "ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate",
    ],
    "environment_missing": [
        'rank 0: all_reduce_perf failed with status 127: all_reduce_perf: error while loading shared libraries: libmpi.so.40: cannot open shared object file: No such file or directory',
        'rank 0: all_reduce_perf failed with status 1: Incompatible NCCL versions. nccl-tests was compiled with NCCL 2.28, but is running with NCCL 22707.',
        'RuntimeError: The detected CUDA version (12.1) mismatches the version that was used to compile PyTorch (11.8).',
        'RuntimeError: operator torchvision::nms does not exist',
        "OSError: /env/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by /env/x.so)",
        'bash: line 3: torchrun: command not found',
        "ModuleNotFoundError: No module named 'deepspeed'",
        "/opt/env/bin/python: No module named torch.distributed",
        "ImportError: /env/torch/lib/libtorch_cuda.so: undefined symbol: ncclCommRegister",
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
        "OSError: libnccl.so.2: cannot open shared object file: No such file or directory",
        "/env/bin/python3: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by /env/bin/python3)",
        "/env/bin/python: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file",
        "bash: line 1: /opt/env/bin/python: No such file or directory",
        "/usr/bin/env: 'python3': No such file or directory",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "AssertionError: Torch not compiled with CUDA enabled",
        "deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)",
        "python: symbol lookup error: /env/libnccl-net.so: undefined symbol: ncclNetPlugin_v9",
    ],
    "shared_memory_full": [
        'srun: error: node001: task 3: Bus error (core dumped)',
        'run.sh: line 53:  5954 Bus error               (core dumped) python x.py',
        nccl(SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-VPyhzw (size 21823872), error: No space left on device (28)"),
        nccl(SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-cjY8K5 (size 10617216)"),
        "RuntimeError: unable to write to file </torch_31911_952036340_6686>: No space left on device (28)",
        "RuntimeError: DataLoader worker (pid 30882) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.",
        "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
        "OSError: [Errno 28] No space left on device: '/dev/shm/tmpabc'",
        "RuntimeError: unable to open shared memory object </torch_16550_876314950> in read-write mode: No space left",
        "Fatal Python error: Bus error",
        nccl(SYSTEM, "Error: failed to extend /dev/shm/nccl-UbzKZ9 to 9637892 bytes"),
    ],
    "disk_full": [
        "ray.exceptions.OutOfDiskError: Local disk is full",
        'RuntimeError: [enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/97: file write failed',
        "OSError: [Errno 28] No space left on device: '/scratch/run/checkpoint.pt'",
        "OSError: [Errno 122] Disk quota exceeded: '/home/user/.cache/huggingface'",
        "safetensors_rust.SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)",
        "RuntimeError: [enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/1: No space left on device",
        "sqlite3.OperationalError: database or disk is full",
        "rank 3: cannot write: Disk quota exceeded",
    ],
    "out_of_memory": [
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
        'srun: error: node001: task 3: Out Of Memory',
        "MemoryError: Unable to allocate 24.0 GiB for an array with shape (1, 3221225472)",
        "OSError: [Errno 12] Cannot allocate memory",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: you tried",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=602.0. Some of the step tasks have been OOM Killed.",
        "Out of memory: Killed process 3121 (python) total-vm:921012kB, anon-rss:820000kB",
        "RuntimeError: std::bad_alloc",
    ],
    "port_taken": [
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        "OSError: [Errno 98] Address already in use",
        "RuntimeError: [enforce fail at tcp/device.cc:202] bind: Address already in use",
        "RuntimeError: The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use).",
        nccl(SYSTEM, "Call to bind failed: Address already in use"),
    ],
    "not_permitted": [
        "PermissionError: [Errno 13] Permission denied: '/data/train.bin'",
        "OSError: [Errno 1] Operation not permitted",
        "bash: line 1: /opt/env/bin/python: Permission denied",
        nccl(SYSTEM, "Error: failed to open /dev/shm/nccl-a: Permission denied"),
        "RuntimeError: [Errno 13] Permission denied: '/dev/nvidia0'",
    ],
    "file_system_failed": [
        "OSError: [Errno 116] Stale file handle: '/home/user/run'",
        "OSError: [Errno 30] Read-only file system: '/scratch/x'",
        "OSError: [Errno 5] Input/output error: '/data/train.bin'",
        "OSError: [Errno 107] Transport endpoint is not connected: '/mnt/weights/config.json'",
        "OSError: [Errno 117] Structure needs cleaning: '/scratch/x'",
        "bash: line 1: cd: /home/user: Stale NFS file handle",
    ],
    "limit_reached": [
        'rank 0: all_reduce_perf failed with status 3: node1: NCCL failure: unhandled system error / Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory',
        nccl(SYSTEM, "Call to ibv_reg_mr failed with error Cannot allocate memory"),
        nccl(SYSTEM, "Call to ibv_create_qp failed with error Cannot allocate memory"),
        nccl(SYSTEM, "Call to ibv_create_qp failed with error Unknown error -12"),
        "OSError: [Errno 24] Too many open files",
        "RuntimeError: can't start new thread",
        "BlockingIOError: [Errno 11] Resource temporarily unavailable",
    ],
    "interface_missing": [
        'rank 0: all_reduce_perf failed with status 3: node1: NCCL failure: internal error / NET/IB : No IP interface found.',
        nccl(INTERNAL, "Bootstrap : no socket interface found"),
        nccl(SYSTEM, "Call to ibv_modify_qp failed with error Invalid argument errno 22"),
        nccl(SYSTEM, "Call to ibv_modify_qp failed with 19 No such device"),
        nccl("ncclInvalidUsage: This usually reflects invalid usage of NCCL library.", "Error: network AWS Libfabric not found."),
        "RuntimeError: [enforce fail at gloo/transport/tcp/device.cc:79] ifa != nullptr. Unable to find address for: ib9",
        "RuntimeError: [enforce fail at device.cc:84] Unable to find interface for: [bond7]",
        "socket.gaierror: [Errno -2] Name or service not known",
        "torch.distributed.DistNetworkError: The IPv6 network addresses of (node9, 29500) cannot be retrieved "
        "(gai error: -3 - Temporary failure in name resolution).",
    ],
    "nic_failed": [
        nccl(SYSTEM, "NET/IB : mlx5_3:1 Got async event : port error"),
        nccl(SYSTEM, "NET/IB : mlx5_0:1 Got async error event: port active lost, device fatal"),
        nccl(SYSTEM, "NET/IB : mlx5_4:1 Got async event : local catastrophic error"),
        nccl(SYSTEM, "Call to ibv_open_device failed"),
        nccl(SYSTEM, "NET/IB : mlx5_3:1 async fatal event on QP (0x732d78661238): invalid request local work queue error"),
        "RuntimeError: IBV_EVENT_PORT_ERR on mlx5_2",
    ],
    "lost_peers": [
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
        "ray.exceptions.ActorUnavailableError: The actor 1f2e is unavailable: The actor is temporarily unavailable: RpcError: RPC Error message: failed to connect to all addresses",
        "ray.exceptions.NodeDiedError: Task failed due to the node (where this task was running)  was dead or unavailable.",
        'rank 0: all_reduce_perf failed with status 4: node1: Test timeout (600s) common.cu:523',
        'rank 0: all_reduce_perf failed with status 3: node1: NCCL failure: remote process exited or there was a network error',
        "[rank3]:[F1121 04:58:56.5 ProcessGroupNCCL.cpp:1553] [PG ID 0 PG GUID 0(default_pg) Rank 3] ProcessGroupNCCL's watchdog got stuck for 480 seconds without making progress in monitoring enqueued collectives.",
        '[rank5]:[E1121 04:58:56.5 ProcessGroupNCCL.cpp:1375] [PG ID 0 Rank 5] Received a dump signal due to a collective timeout from rank 3',
        nccl(REMOTE, "socketProgressOpt: Call to recv from 10.0.0.2<33759> failed : Connection reset by peer"),
        nccl(INTERNAL, "Net : Connection closed by remote peer node2<50260>", "internal error"),
        nccl(SYSTEM, "socketStartConnect: Connect to 10.0.0.2<45763> failed : Software caused connection abort"),
        nccl(SYSTEM, "socketPollConnect: Connect to 10.0.0.4<56849> returned 113(No route to host) errno 115(Operation now in progress)"),
        nccl(REMOTE, "NET/IB: Got completion from peer 10.0.0.3<36315> with status=12 opcode=0 len=0 vendor err 129 (Recv)"),
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234",
        "RuntimeError: Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144] no error",
        "torch.distributed.DistStoreError: Timed out after 1801 seconds waiting for clients. 1/3 clients joined.",
        "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect to (10.0.0.9, 46229).",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "torch.distributed.DistBackendError: [1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via "
        "c10d key-value store by key '0', but store->get('0') got error: Connection reset by peer",
        "torch.distributed.DistBackendError: NCCL communicator was aborted on rank 3.",
        "RuntimeError: Rank 1 failed to pass monitoredBarrier in 1800000 ms",
        "BrokenPipeError: [Errno 32] Broken pipe",
        nccl(SYSTEM, "NET/IB : Got completion with error 12, opcode 0, len 0, vendor err 129"),
        nccl(INTERNAL, "Bootstrap : timed out after 1200 seconds [rank 24]"),
        "[rank12]:[E ProcessGroupNCCL.cpp:1282] [Rank 12] NCCL watchdog thread terminated with exception: [Rank 12] Watchdog "
        "caught collective operation timeout: WorkNCCL(SeqNum=2203, OpType=ALLREDUCE, Timeout(ms)=1800000)",
        "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection to the C10d store has failed.",
    ],
    "rank_killed": [
        "RuntimeError: DataLoader worker (pid 4018) is killed by signal: Killed.",
        "RuntimeError: DataLoader worker (pid 4018) is killed by signal: Terminated.",
        "run.sh: line 53:  5954 Killed                  python x.py",
        "Killed",
        "bash: line 1: 42 Killed                     /opt/env/bin/python -m runner.workloads",
    ],
    "rank_crashed": [
        "ValueError: bad",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "RuntimeError: CUDA error: unspecified launch failure",
        "RuntimeError: CUDA error: device-side assert triggered",
        "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 132096, Hardware limit: 101376.",
        "KeyError: 'model.embed_tokens.weight'",
        "AssertionError",
        "FileNotFoundError: [Errno 2] No such file or directory: '/data/train.bin'",
    ],
}  # fmt: skip
CASES = [(kind, said) for kind, all_said in SAID.items() for said in all_said]

FRAMES = [f"frame #{n}: c10::cuda::f(int) + 0x{n:x} (0x7f6c80e858f9 in /env/torch/lib/libc10.so)" for n in range(44)]
HELP = [
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.",
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1.",
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
]
BEFORE = [
    "[W1121 04:58:56.598321713 socket.cpp:697] [c10d] The client socket has failed to connect to [n]:2 (errno: 111 - Connection refused).",
    "Error caught was: No module named 'triton'",
    "/env/x.py:84: UserWarning: [Errno 28] No space left on device: falling back",
    "Loading checkpoint shards:  50%|█████     | 1/2 [00:01<00:01,  1.01s/it]",
]
AFTER = [
    "",
    "Exception raised from c10_cuda_check_implementation at ../c10/cuda/CUDAException.cpp:44 (most recent call first):",
    *FRAMES,
    "",
    "Exception ignored in: <function _Writer.__del__ at 0x7f>",
    "Traceback (most recent call last):",
    '  File "/env/x.py", line 3, in __del__',
    "ConnectionResetError: [Errno 104] Connection reset by peer",
    "[rank0]:[W1121 04:58:57.1 ProcessGroupNCCL.cpp:1250] Warning: WARNING: process group has NOT been destroyed: No module named x",
    f"Extension modules: {', '.join(['numpy.core._multiarray_umath'] * 300)}",
]


def sessions(*names: str) -> list[AgentSession]:
    return [AgentSession(name, (), {}, rc=0, answered=True) for name in names]


def died(*stderr: str, rc: int | None = 1, rank: str = "rank0") -> Outcome:
    kept = lastwords.keep("\n".join(stderr).splitlines())  # as a node sends it
    return Outcome.from_json({"rc": rc, "ranks": {rank: {"started": True, "ended": False, "stderr": kept}}})


@pytest.mark.parametrize(("kind", "said"), CASES)
def test_a_message_proves_its_kind(kind, said):
    found = blame.blame(sessions("a", "b"), {"a": died(said), "b": Outcome(stopped="stop")})
    assert found["kind"] == kind
    assert found["host"] == (None if kind == "lost_peers" else "a")


@pytest.mark.parametrize(("kind", "said"), CASES)
def test_it_proves_the_same_between_warnings_stacks_and_what_the_interpreter_could_not_clean_up(kind, said):
    first, *rest = said.splitlines()
    trace = ["Traceback (most recent call last):", '  File "/env/train.py", line 3, in <module>', "    main()"]
    if not blame_form(said):
        trace = []
    tail = [*BEFORE, *trace, first, *rest, *(HELP if "CUDA" in said else []), *AFTER]
    found = blame.blame(sessions("a", "b"), {"a": died(*tail), "b": Outcome(stopped="stop")})
    assert found["kind"] == kind
    assert re.sub(r"^(?:ERROR|rank \d): ", "", first.rpartition("] ")[2])[:60] in found["message"]


def blame_form(said: str) -> bool:
    """Whether Python raises it."""
    return lastwords.endings(said.splitlines())[0].form in (lastwords.Form.BARE, lastwords.Form.LAUNCHER)


@pytest.mark.parametrize(("kind", "said"), [case for case in CASES if case[0] != "lost_peers"])
def test_first_hand_proof_beats_what_victims_say(kind, said):
    lost = died(SAID["lost_peers"][0])
    found = blame.blame(sessions("a", "b", "c"), {"a": lost, "b": died(said), "c": lost})
    assert (found["kind"], found["host"]) == (kind, "b")


@pytest.mark.parametrize("said", SAID["lost_peers"])
def test_on_one_node_no_network_is_to_blame(said):
    found = blame.blame(sessions("a"), {"a": died(said)})
    assert found["kind"] in ("rank_crashed", "rank_hung") and found["host"] == "a"


def test_on_one_node_a_collective_that_never_ended_is_a_rank_that_hung():
    found = blame.blame(sessions("a"), {"a": died(SAID["lost_peers"][-2])})
    assert (found["kind"], found["host"]) == ("rank_hung", "a")


@pytest.mark.parametrize("said", [*SAID["rank_crashed"], *SAID["lost_peers"], *SAID["cuda_out_of_memory"], ""])
def test_a_gpu_of_which_the_kernel_says_that_it_failed_is_the_cause(said):
    xid = "NVRM: Xid (PCI:0000:4b:00 GPU-I:05): 95, pid=7194, Uncontained: FBHUB"
    fell = replace(died(said), kernel=[xid])
    lost = died(SAID["lost_peers"][0])
    found = blame.blame(sessions("a", "b", "c"), {"a": lost, "b": fell, "c": lost})
    assert (found["kind"], found["host"]) == ("gpu_failed", "b")
    assert found["message"].endswith("; the kernel: Xid 95 on 0000:4b:00.0: Uncontained: FBHUB")


def test_a_killed_worker_where_the_kernel_counted_a_kill_ran_out_of_memory():
    worker = died("RuntimeError: DataLoader worker (pid 4018) is killed by signal: Killed.")
    assert blame.blame(sessions("a"), {"a": replace(worker, oom_kills=1)})["kind"] == "out_of_memory"


def test_what_a_data_loader_logged_explains_its_exception():
    shm = "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm)."
    tail = [
        shm,
        "Traceback (most recent call last):",
        "RuntimeError: DataLoader worker (pid(s) 4018) exited unexpectedly",
    ]
    assert blame.blame(sessions("a"), {"a": died(*tail)})["kind"] == "shared_memory_full"


OF_A_TASK = """Traceback (most recent call last):
  File "/src/runner/workloads/__main__.py", line 49, in main
    TESTS[job.test].load_rank().run(job, events)
  File "/env/ray/_private/worker.py", line 1015, in get_objects
    raise value.as_instanceof_cause()
ray.exceptions.RayTaskError(ValueError): \x1b[36mray::TaskRunner.run()\x1b[39m (pid=7, ip=10.0.0.1, actor_id=ab)
  File "/env/verl/trainer/main_ppo.py", line 3, in run
    trainer.init_workers()
ray.exceptions.RayTaskError({name}): \x1b[36mray::Server.launch()\x1b[39m (pid=9, ip=10.0.0.2, actor_id=cd)
  File "/env/verl/x.py", line 3, in f
    raise ValueError("x")
{said}"""


@pytest.mark.parametrize("kind", ["rollout_out_of_memory", "cuda_out_of_memory", "lost_peers", "environment_missing"])
def test_what_a_task_of_ray_raised_on_another_node_is_what_its_driver_died_of(kind):
    for said in SAID[kind]:
        if re.match(r"[\w.]+Error: ", said) and "\n" not in said:
            tail = OF_A_TASK.format(name=said.partition(":")[0], said=said).splitlines()
            found = blame.blame(sessions("a", "b"), {"a": died(*tail), "b": Outcome(stopped="stop")})
            assert found["kind"] == kind and said[:60] in found["message"], found


# --- the table ------------------------------------------------------------------------------------


def test_each_kind_has_five_members_and_each_row_its_source():
    assert {kind for kind, said in SAID.items() if len(said) < 5} == set()
    assert {row.kind for row in SPELLINGS} <= set(KINDS)
    assert all(row.source for row in SPELLINGS)


def test_each_kind_of_the_table_has_messages():
    assert {row.kind for row in SPELLINGS} - {"time_limit", "preempted", "node_failed"} <= set(SAID)


def test_a_user_or_a_setting_is_never_tried_again():
    assert [k for k, kind in KINDS.items() if kind.fault in (USER, CONFIGURATION) and kind.retry] == []
    assert [k for k in SAID if KINDS[k].fault == NODE and not KINDS[k].retry] == []


def test_the_first_text_that_proves_more_than_a_complaint_counts():
    assert kind_of(["Connection closed by peer", "uncorrectable ECC error encountered"]) == "gpu_failed"
    assert kind_of(["ValueError: x", "Connection closed by peer"]) == "lost_peers"
    assert kind_of(["ValueError: x"]) is None
