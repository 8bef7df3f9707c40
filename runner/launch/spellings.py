"""The spellings of failures: what NCCL, CUDA, loaders, kernels and libraries say, and the kind that it proves. Pure.

Asked only of what ended a process (`node.lastwords`), never of other lines. The first row that matches decides, so a
row stands above those whose words its own message contains as well: what cannot be downloaded was refused a connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from runner.cluster import xids


class Spelling:
    """A row: the `kind` of failure, who says so (`source`), and what (`words`: regular expressions, any case)."""

    def __init__(self, kind: str, source: str, *words: str) -> None:
        self.kind, self.source, self.words = kind, source, words
        self._found = re.compile("|".join(f"(?:{each})" for each in words), re.IGNORECASE | re.MULTILINE)

    def matches(self, text: str) -> bool:
        """Whether `text` has one of the words."""
        return bool(self._found.search(text))


# What a rank says that has lost others: it proves that there is a failure, not where.
COMPLAINT = "lost_peers"
# The same where a collective did not end: on one node, no network can have lost it.
WAITED = (
    r"watchdog caught collective operation timeout",
    r"NCCL watchdog thread .*(?:timed? ?out|stuck)",
    r"heartbeat monitor timed out",
    r"watchdog (?:hang|got stuck)",
    r"collective timeout",
    r"dump signal",
    r"detected by watchdog",
    r"\btest timeout \(\d+s\)",  # nccl-tests
)

SPELLINGS = (
    # What runs out of time, memory or its turn: told by Slurm, the kernel and the C library.
    Spelling("time_limit", "slurmstepd", r"cancelled at .* due to time limit"),
    Spelling("preempted", "slurmstepd", r"cancelled at .* due to preemption"),
    Spelling("node_failed", "slurmstepd", r"cancelled at .* due to node failure"),
    Spelling("out_of_memory", "slurmstepd, srun", r"oom[ _-]kill", r"task \d+: out of memory"),
    Spelling("out_of_memory", "Ray", r"killed due to the node running low on memory"),
    Spelling("out_of_memory", "Linux", r"out of memory: kill", r"memory cgroup out of memory"),
    # A GPU, its driver and its fabric. CUDA's messages: cudaGetErrorString, and the names of enum cudaError.
    Spelling(
        "fabric_not_ready",
        "CUDA",
        r"system not yet initialized",
        r"SystemNotReady",
        r"SYSTEM_NOT_READY",
        r"\berror:? 802\b",
    ),
    Spelling(
        "gpu_failed",
        "CUDA",
        r"uncorrectable (?:ECC|NVLink) error",
        r"ECCUncorrectable",
        r"ECC_UNCORRECTABLE",
        r"NvlinkUncorrectable",
        r"NVLINK_UNCORRECTABLE",
        r"double[- ]bit (?:ECC )?error",
        r"or a hardware error",
        r"cudaErrorContained",
        r"CUDA_ERROR_CONTAINED",
    ),
    Spelling(
        "gpu_failed",
        "NVIDIA's driver, NVML",
        r"fallen off the bus",
        r"\bGPU is lost",
        r"GPU_IS_LOST",
        r"RmInitAdapter failed",
    ),
    Spelling("gpu_failed", "NVML", r"unable to determine the device handle for gpu", r"gpu requires reset"),
    # As MPI ends a program that has lost another.
    Spelling(COMPLAINT, "test nccl", r"_perf failed with status \d+ without a word"),
    # Of which CUDA says the same as of an old one.
    Spelling("gpu_unavailable", "test nccl", r"no NVIDIA driver is loaded"),
    Spelling("rank_killed", "test nccl", r"_perf was killed by SIG(?:KILL|TERM|INT|HUP)\b"),
    Spelling(
        "driver_too_old",
        "CUDA",
        r"driver version is insufficient",
        r"InsufficientDriver",
        r"unsupported toolchain",
        r"UnsupportedPtxVersion",
        r"UNSUPPORTED_PTX_VERSION",
    ),
    Spelling("driver_too_old", "PyTorch", r"nvidia driver on your system is too old"),
    Spelling("driver_too_old", "nvidia-container-cli", r"unsatisfied condition: (?:cuda|driver|brand)"),
    Spelling(
        "driver_too_old", "CUDA", r"forward compatibility was attempted on non supported HW", r"CompatNotSupported"
    ),
    Spelling("gpu_unavailable", "NVML", r"driver/library version mismatch", r"LIB_RM_VERSION_MISMATCH"),
    Spelling(
        "gpu_unavailable",
        "CUDA",
        r"unsupported display driver",
        r"SystemDriverMismatch",
        r"SYSTEM_DRIVER_MISMATCH",
        r"no cuda-capable device",
        r"cudaErrorNoDevice",
        r"CUDA_ERROR_NO_DEVICE",
        r"invalid device ordinal",
        r"cudaErrorInvalidDevice\b",
        r"CUDA_ERROR_INVALID_DEVICE",
    ),
    Spelling("gpu_unavailable", "NCCL", r"duplicate gpu detected"),
    Spelling(
        "gpu_unavailable",
        "nccl-tests, rccl-tests",
        r"invalid number of GPUs: \d+ requested",
        r"number of requested GPUs \(\d+\) is greater",
    ),
    Spelling(
        "gpu_unavailable",
        "CUDA, NCCL",
        r"\berror:? 999\b",
        r"cuda (?:error|failure)\b.*unknown error",
        r"cudaErrorUnknown",
    ),
    Spelling("gpu_unavailable", "NVML, PyTorch", r"failed to initialize NVML", r"cuda driver initialization failed"),
    Spelling(
        "gpu_unavailable",
        "PyTorch",
        r"no cuda gpus are available",
        r"found no nvidia driver",
        r"cuda unknown error - this",
        r"torch\.cuda\.is_available\(\) (?:is|returned) false",
    ),
    Spelling(
        "gpu_unavailable", "nvidia-smi, NVML", r"couldn'?t communicate with the nvidia driver", r"Driver Not Loaded"
    ),
    Spelling("gpu_unavailable", "nvidia-container-cli", r"nvidia-container-cli: initialization error"),
    Spelling(
        "in_use",
        "CUDA",
        r"devices? (?:\(s\) |is/|are |\(s\) is/are )*(?:all )?busy or unavailable",
        r"device\(s\) is/are busy",
        r"cudaErrorDevicesUnavailable",
        r"CUDA_ERROR_DEVICE_UNAVAILABLE",
    ),
    Spelling("in_use", "runner.workloads.gpu", r"it is used by others: "),
    # Of the GPU's memory that the rollout takes for itself, before words of CUDA that may stand below.
    Spelling(
        "rollout_out_of_memory",
        "vLLM",
        r"no available memory for the cache blocks",
        r"larger than the maximum number of tokens that can be stored in (?:the )?KV cache",
        r"KV\s+cache is needed, which is larger than the available KV",
        r"free memory on device .*is less than desired GPU memory utilization",
    ),
    Spelling(
        "cuda_out_of_memory", "PyTorch", r"\bcuda out of memory", r"cuda\.OutOfMemoryError", r"torch\.OutOfMemoryError"
    ),
    Spelling("cuda_out_of_memory", "CUDA, NCCL", r"cuda (?:error|failure|runtime error)\b.*out of memory"),
    Spelling(
        "cuda_out_of_memory", "CUDA", r"cudaErrorMemoryAllocation", r"CUDA_ERROR_OUT_OF_MEMORY", r"cudaMalloc failed"
    ),
    Spelling("cuda_out_of_memory", "NCCL", r"failed to cuda \w*alloc", r"failed to allocate \d+ bytes of device"),
    Spelling("cuda_out_of_memory", "cuBLAS, cuDNN", r"CU(?:BLAS|DNN|SOLVER|SPARSE|FFT)_STATUS_(?:ALLOC_FAILED)"),
    Spelling("checkpoint_unusable", "workloads.rl", r"\bcheckpoint unusable: "),
    # The hub and the weights, before the words of connections.
    Spelling(
        "weights_unusable",
        "transformers",
        r"does not recognize this architecture",
        r"unrecognized configuration class",
        r"tokenizer class \S+ does not exist",
        r"execute the (?:configuration|code|model) file",
        r"contains custom code which must be executed",
    ),
    Spelling(
        "hub_unreachable",
        "hf_transfer, hf_xet, http.client",
        r"using `?hf_transfer",
        r"CAS service error|ReqwestMiddleware",
        r"\bhttp\.client\.|RemoteDisconnected",
        r"the read operation timed out",
    ),
    Spelling(
        "weights_unusable",
        "huggingface_hub",
        r"(?:GatedRepo|RepositoryNotFound|RevisionNotFound|HFValidation)Error",
        r"RemoteEntryNotFoundError",
        r"DisabledRepoError",
        r"(?<!Local)EntryNotFoundError",
        r"\b(?:401|403|404) Client Error",
        r"repository not found for url",
        r"gated repo",
        r"is restricted\. you must",
        r"invalid (?:user|username|credentials)",
    ),
    Spelling(
        "weights_unusable",
        "transformers",
        r"not a local folder and is not a valid model identifier",
        r"does not appear to have (?:a )?files? named",
        r"no file named .* found in directory",
        r"not a valid git identifier",
        r"incorrect path_or_model_id",
        r"unrecognized model in",
        r"can't load (?:the )?(?:configuration|config|model|tokenizer|feature extractor)\b",
        r"unable to load weights from",
        r"size mismatch for \S+: copying a param",
    ),
    Spelling(
        "weights_unusable",
        "safetensors",
        r"error while deserializing header",
        r"SafetensorError: .*(?:header|metadata|incomplete)",
    ),
    Spelling(
        "weights_unusable",
        "PyTorch",
        r"PytorchStreamReader failed",
        r"invalid magic number; corrupt file",
        r"weights only load failed",
    ),
    Spelling("hub_unreachable", "transformers", r"couldn't connect to '?https?:", r"couldn't connect to the hub"),
    Spelling(
        "hub_unreachable",
        "huggingface_hub",
        r"LocalEntryNotFoundError",
        r"OfflineModeIsEnabled",
        r"outgoing traffic has been disabled",
        r"trying to locate the file on the hub",
        r"HfHubHTTPError",
        r"(?:429|50\d) (?:Client|Server) Error",
        r"cannot find an appropriate cached snapshot",
        r"consistency check failed",
    ),
    Spelling("hub_unreachable", "datasets", r"couldn't reach .* on the hub", r"couldn't reach https?:"),
    Spelling(
        "hub_unreachable",
        "requests, urllib3",
        r"HTTPS?Connection(?:Pool)?\(",
        r"max retries exceeded with url",
        r"\bMaxRetryError",
    ),
    Spelling(
        "hub_unreachable",
        "requests",
        r"requests\.exceptions\.(?:\w*Connect\w*|\w*Timeout|SSLError|ProxyError|ChunkedEncodingError)",
    ),
    Spelling(
        "hub_unreachable",
        "httpx, urllib, aiohttp",
        r"\bhttpx\.",
        r"\bhttpcore\.",
        r"urllib\.error\.",
        r"\burlopen error",
        r"aiohttp\.client",
    ),
    Spelling("hub_unreachable", "OpenSSL", r"CERTIFICATE_VERIFY_FAILED", r"certificate verify failed"),
    # Software that is not there, or does not fit.
    Spelling(
        "environment_missing",
        "PyTorch, CUDA",
        r"mismatches the version that was used to compile",
        r"operator \S+ does not exist",
        r"device kernel image is invalid",
        r"failed to open libnvrtc",
        r"could not load library lib",
        r"failed to map segment from shared object",
    ),
    Spelling(
        "environment_missing",
        "Python",
        r"ModuleNotFoundError",
        r"no module named",
        r"\bImportError\b",
        r"cannot import name",
    ),
    Spelling(
        "environment_missing",
        "importlib.metadata",
        r"PackageNotFoundError",
        r"DistributionNotFound",
        r"VersionConflict",
    ),
    Spelling(
        "environment_missing",
        "the dynamic loader",
        r"cannot open shared object file",
        r"undefined symbol:",
        r"symbol lookup error",
        r"version [`'‘]?(?:GLIBC|CXXABI|NCCL|OPENSSL)\w*[.\d]*['’]? not found",
        r"wrong ELF class",
        r"invalid ELF header",
        r"file too short",
        r"cannot allocate memory in static TLS",
    ),
    Spelling(
        "environment_missing",
        "shells",
        r"command not found",
        r"bad interpreter",
        r"exec format error",
        r"executable file not found",
    ),
    Spelling(
        "environment_missing",
        "shells, env, exec",
        r"^(?:\S*/)?(?:(?:ba|da|z|k)?sh|env|exec|nohup|timeout|setsid|srun|numactl)\b.*no such file or directory",
    ),
    Spelling(
        "environment_missing",
        "Python",
        r"can't open file .*no such file",
        r"failed to get the python codec",
        r"no module named encodings",
    ),
    Spelling("environment_missing", "srun, slurmd", r"execve\(\).*no such file", r"_find_path_in_dirs"),
    Spelling(
        "environment_missing",
        "CUDA, PyTorch",
        r"no kernel image is available",
        r"NoKernelImageForDevice",
        r"not compiled with cuda",
    ),
    Spelling(
        "environment_missing",
        "PyTorch",
        r"doesn'?t have nccl built in",
        r"built without nccl",
        r"not compiled with nccl",
    ),
    Spelling(
        "environment_missing",
        "DeepSpeed",
        r"MissingCUDAException",
        r"CUDA_HOME (?:does not exist|environment variable)",
        r"CUDAMismatchException",
    ),
    Spelling(
        "environment_missing",
        "torch.utils.cpp_extension",
        r"ninja is required",
        r"error building extension",
        r"unable to jit load",
    ),
    Spelling(
        "environment_missing",
        "FlashAttention, transformers",
        r"toggled on, but it cannot be used",
        r"package flash_attn seems",
    ),
    Spelling("environment_missing", "NumPy", r"numpy\.dtype size changed", r"compiled using numpy 1\.x cannot be run"),
    Spelling("environment_missing", "Linux (SIGILL)", r"illegal instruction"),
    Spelling("environment_missing", "nccl-tests", r"incompatible NCCL versions"),
    # Limits of the node. Permissions first: a folder may be /dev/shm, and a device may be of InfiniBand.
    Spelling(
        "not_permitted",
        "Python, C library",
        r"permission denied",
        r"operation not permitted",
        r"PermissionError",
        r"\bEACCES\b",
    ),
    Spelling(
        "file_system_failed",
        "Python, C library",
        r"stale (?:NFS )?file handle",
        r"\bESTALE\b",
        r"read-only file system",
        r"\bEROFS\b",
        r"\binput/output error",
        r"remote i/o error",
        r"structure needs cleaning",
        r"host is down",
    ),
    Spelling(
        "file_system_failed",
        "FUSE, Lustre",
        r"""transport endpoint is not connected: ['\"]?/""",
        r"cannot send after transport endpoint",
    ),
    Spelling(
        "limit_reached",
        "NCCL, rdma-core",
        r"ibv_\w+.*(?:cannot allocate memory|error:? (?:unknown error )?-?12\b)",
        r"locked memory",
        r"memlock",
    ),
    Spelling(
        "limit_reached",
        "Python, C library",
        r"too many open files",
        r"can't start new thread",
        r"resource temporarily unavailable",
    ),
    Spelling(
        "limit_reached",
        "OpenMP, OpenBLAS",
        r"thread creation failed",
        r"pthread_create failed",
        r"cannot create thread",
    ),
    Spelling(
        "shared_memory_full",
        "NCCL",
        r"shared memory segment",
        r"failed to (?:extend|open|create) /dev/shm",
        r"/dev/shm/nccl-",
    ),
    Spelling(
        "shared_memory_full",
        "PyTorch",
        r"insufficient shared memory",
        r"out of shared memory",
        r"shared memory limit",
        r"(?:write to|open|from|truncate|resize)\b.* </?(?:torch_|psm_|\w*shm)",
        r"shared memory (?:object|file)",
    ),
    Spelling(
        "shared_memory_full",
        "C library, Python",
        r"/dev/shm",
        r"\bshm_open\b",
        r"\(shm\)",
        r"multiprocessing/shared_memory",
    ),
    Spelling(
        "shared_memory_full",
        "UCX, Open MPI",
        r"shm_?(?:mm|seg|get|at)\b.*(?:failed|no space)",
        r"backing file .*enough space",
    ),
    Spelling("shared_memory_full", "Linux (SIGBUS)", r"\bbus error\b", r"\bSIGBUS\b"),
    Spelling(
        "disk_full",
        "Python, C library, Rust",
        r"no space left on device",
        r"\bENOSPC\b",
        r"errno 28\b",
        r"os error 28\b",
        r"disk quota exceeded",
        r"\bEDQUOT\b",
        r"errno 122\b",
        r"os error 122\b",
    ),
    Spelling("disk_full", "Ray", r"\bOutOfDiskError"),
    Spelling("disk_full", "PyTorch", r"PytorchStreamWriter failed writing", r"unexpected pos \d+ vs"),
    Spelling("disk_full", "huggingface_hub, SQLite", r"not enough (?:free )?disk space", r"database or disk is full"),
    Spelling(
        "out_of_memory",
        "Python, C library",
        r"\bMemoryError\b",
        r"cannot allocate memory",
        r"\bENOMEM\b",
        r"errno 12\b",
    ),
    Spelling(
        "out_of_memory", "C++, PyTorch", r"std::bad_alloc", r"DefaultCPUAllocator", r"not enough memory: you tried"
    ),
    # The network: first what a node says of itself.
    Spelling(
        "port_taken",
        "PyTorch, gloo, Python",
        r"EADDRINUSE",
        r"address already in use",
        r"errno:? 98\b",
        r"port is already (?:bound|in use)",
    ),
    Spelling(
        "nic_failed",
        "NCCL",
        r"got async (?:fatal )?(?:error )?event ?: (?:port|device|local)",
        r"async fatal event on",
        r"IBV_EVENT_(?:PORT_ERR|DEVICE_FATAL)",
    ),
    Spelling("nic_failed", "rdma-core", r"ibv_open_device failed", r"failed to (?:query|open) (?:ib )?device"),
    Spelling(
        "interface_missing",
        "NCCL",
        r"no (?:socket |IP )?interface found",
        r"no device found",
        r"bootstrap : no",
        r"ibv_modify_qp .*(?:invalid argument|no data available|network is unreachable)",
        r"remote IB device is incompatible",
        r"\bnetwork .{1,40} not found",
    ),
    Spelling("interface_missing", "gloo", r"unable to find (?:interface|address) for", r"ifa != nullptr"),
    Spelling(
        "interface_missing",
        "C library",
        r"name or service not known",
        r"name resolution",
        r"nodename nor servname",
        r"gai error",
        r"no such device\b",
        r"unknown host",
        r"could not resolve host",
    ),
    # Who was killed, if nothing above tells why.
    Spelling(
        "rank_killed",
        "PyTorch, shells",
        r"killed by signal: (?:killed|terminated)",
        r"^(?:.*: line \d+: +\d+ )?killed\b",
    ),
    # What a rank says that has lost others.
    Spelling(COMPLAINT, "PyTorch", *WAITED),
    Spelling(
        COMPLAINT,
        "NCCL",
        r"ncclRemoteError",
        r"remote process (?:has )?exited",
        r"connection closed by (?:remote )?peer",
        r"socket(?:Start|Poll|Finalize)\w*: ",
        r"socketProgress",
        r"exceeded (?:timeouts|retries)",
        r"connect(?:ion)? to \S+ failed",
        r"got completion (?:from peer|with error|with status)",
        r"ncclTimeoutError",
        r"bootstrap .*timed out",
        r"timed out waiting for peer",
        r"ibv_modify_qp .*(?:timed out|110)",
        r"communicator was aborted",
        r"proxy call to rank",
        r"socket recv failed",
        r"net : call to ",
        r"connection reset",
        r"no route to host",
        r"software caused connection abort",
    ),
    Spelling(
        COMPLAINT,
        "gloo",
        r"gloo/transport",
        r"gloo connectFullMesh",
        r"timed out waiting \d+ms for",
        r"application timeout caused pair",
    ),
    Spelling(
        COMPLAINT,
        "c10d",
        r"DistNetworkError",
        r"DistStoreError",
        r"(?:client )?socket has (?:failed|timed out)",
        r"socket timeout",
        r"recvValue",
        r"sendBytes",
        r"remote server shutdown",
        r"store->get",
        r"TCPStore",
        r"clients? joined",
        r"wait timeout after",
        r"monitoredBarrier",
        r"barrier timed out",
        r"timed out (?:initializing|waiting for)",
    ),
    Spelling(COMPLAINT, "torchrun", r"Rendezvous\w*Error", r"connection to the c10d store"),
    Spelling(
        COMPLAINT,
        "Open MPI, UCX",
        r"peer process has unexpectedly disconnected",
        r"endpoint (?:is not connected|timeout)",
        r"remote (?:access )?error",
    ),
    Spelling(
        COMPLAINT,
        "Ray",
        r"\bActor(?:Died|Unavailable)Error",
        r"\b(?:NodeDied|OwnerDied|ObjectLost|WorkerCrashed|LocalRayletDied)Error",
        r"the actor died unexpectedly before finishing",
        r"the actor is dead because its node has died",
    ),
    Spelling(
        COMPLAINT,
        "Python",
        r"Connection(?:Refused|Reset|Aborted)Error",
        r"BrokenPipeError",
        r"broken pipe",
        r"connection (?:refused|timed out)",
        r"network is unreachable",
        r"host is unreachable",
        r"\bTimeoutError\b.*errno 110",
        r"transport endpoint is not connected",
    ),
)


_WAITED = Spelling(COMPLAINT, "PyTorch", *WAITED)


def kind_of(texts: Iterable[str]) -> str | None:
    """The kind that the first of `texts` proves; a complaint only where none proves more. None: no known spelling."""
    complaint = None
    for text in texts:
        kind = _kind(text)
        if kind not in (None, COMPLAINT):
            return kind
        complaint = complaint or kind
    return complaint


@lru_cache(4096)  # the ranks of one cell say the same
def _kind(text: str) -> str | None:
    if xids.serious(text):
        return "gpu_failed"
    return next((row.kind for row in SPELLINGS if row.matches(text)), None)


def waited(text: str) -> bool:
    """Whether a rank says that others did not take part in a collective."""
    return _WAITED.matches(text)
