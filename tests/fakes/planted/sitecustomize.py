"""Faults planted at the boundary of a run's own processes, by PLANTED: every Python of a cell imports this first.

- `token`: Ray's start finds another token in its file than its run has;
- `gpus`: Ray's start is told of one GPU less than the run has asked for;
- `vllm`: STAND-IN for verl's trainer with vLLM, which no machine without a GPU has: it says what vLLM 0.19 says of a
  GPU that others use, in the place where it does, and fails as it does;
- `fails`: the job of Ray is a rank that fails by itself.
"""

import os
import re
import sys
from pathlib import Path

VLLM = (
    "ValueError: Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired GPU memory utilization "
    "(0.5, 7.75 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)


def _without_memory(job, events):
    print(f"(EngineCore_DP0 pid={os.getpid()}) {VLLM}", file=sys.stderr, flush=True)
    raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


def _fails(job, events):
    raise SystemError("no rules today")


_planted = os.environ.get("PLANTED", "")
_ray_starts = os.path.basename(sys.argv[0]) == "ray" and sys.argv[1:2] == ["start"]
if _planted == "token" and _ray_starts:
    Path(os.environ["RAY_AUTH_TOKEN_PATH"]).write_text("f" * 64)
if _planted == "gpus" and _ray_starts:
    sys.argv[:] = [re.sub(r"(?<=--num-gpus=)\d+", lambda n: str(int(n[0]) - 1), word) for word in sys.argv]
if _planted in ("vllm", "fails") and "runner.workloads" in sys.orig_argv:
    from runner.workloads.rl import driver

    driver.run = _without_memory if _planted == "vllm" else _fails
