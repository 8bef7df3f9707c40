"""A test `ray_probe` for the ranks that a supervisor of Ray runs as a job: its params say how it ends."""

from __future__ import annotations

import os
import sys
import time

from runner.plan.engines import ray
from runner.workloads.registry import TESTS, Test

NAME = "ray_probe"
ROW = Test(summary="", settings="", rank=NAME, metrics="", report="", packages=(), engine="ray", runs="once")
if sys.orig_argv[1:3] == ["-m", "runner.workloads"]:
    TESTS[NAME] = ROW  # type: ignore[index]


def run(job, events):
    """Write what the rank has in its environment, wait, and end as is asked for."""
    events("seen", token=ray.TOKEN in os.environ, greeting=os.environ.get("GREETING"), ray=os.environ["RAY_ADDRESS"])
    print("the rank's own words", flush=True)
    if job.params.get("nodes"):
        events.value("nodes", nodes())
    time.sleep(job.params.get("sleep_s", 0))
    if job.params.get("fails"):
        sys.stderr.write(job.params.get("says", "the rank's last words") + "\n")
        os._exit(job.params["fails"])


def nodes() -> int:
    """On how many nodes of the real Ray a task runs that takes a GPU."""
    import ray as real

    real.init()

    @real.remote(num_gpus=1)
    def where() -> str:
        time.sleep(0.5)
        return real.util.get_node_ip_address()

    there = [where.options(scheduling_strategy="SPREAD").remote() for _ in range(4)]  # type: ignore[attr-defined]
    return len(set(real.get(there)))
