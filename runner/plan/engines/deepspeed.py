"""Engine `deepspeed`: DeepSpeed's own launcher on the controller."""

from __future__ import annotations

from pathlib import PurePath

from runner.plan.engines.ranks import Launch, Ranks
from runner.system.process import MARKER


def launch(ranks: Ranks) -> Launch:
    """DeepSpeed's own launcher on the controller, with a hostfile, and pdsh where the nodes are remote.

    The launcher inserts its arguments and exports into remote shells unquoted, so it gets only numbers and paths that
    the inventory has checked; everything else is in job.json. The nodes' environment comes from a `.deepspeed_env`
    file, since the launcher itself exports neither PATH nor most variables; on this machine it passes on its own.
    """
    python = ranks.nodes[0].python
    hostfile = str(PurePath(ranks.launcher_dir, "hostfile"))
    env_file = str(PurePath(ranks.launcher_dir, "deepspeed_env"))
    remote = ["--launcher=pdsh", "--force_multi"] if ranks.ssh_config else []
    exports = {"PATH": f"{PurePath(python).parent}:/usr/local/bin:/usr/bin:/bin", MARKER: ranks.marker, **ranks.env}
    head_env = {"DS_ENV_FILE": env_file}
    if not ranks.ssh_config:
        head_env |= ranks.env
    else:
        head_env["PDSH_SSH_ARGS_APPEND"] = f"-F {ranks.ssh_config}"
    return Launch(
        argv=tuple(None for _ in ranks.nodes),
        head=(
            python,
            "-m",
            "deepspeed.launcher.runner",
            f"--hostfile={hostfile}",
            *remote,
            "--no_ssh_check",
            f"--master_addr={ranks.master_address}",
            f"--master_port={ranks.master_port}",
            "--module",
            "runner.workloads",
            ranks.cell_dir,
        ),
        head_env=head_env,
        files={
            "hostfile": "".join(f"{node.alias} slots={ranks.gpus_per_node}\n" for node in ranks.nodes),
            "deepspeed_env": "".join(f"{key}={value}\n" for key, value in exports.items()),
        },
    )
