"""Engine `mpirun`: Open MPI's launcher, on the controller for several nodes, on the node itself for one."""

from __future__ import annotations

from pathlib import PurePath

from runner.plan.engines.ranks import MPI_SETTINGS, Launch, Ranks
from runner.system.process import MARKER


def launch(ranks: Ranks) -> Launch:
    """One mpirun for all ranks: over ssh it starts its daemon on each node, which starts the ranks there.

    Daemons connect back to it, so nodes must reach the controller. It forwards no environment but what it is told to;
    all that need not be there before a rank's process starts is in job.json.
    """
    alone, per_node = len(ranks.nodes) == 1, ranks.gpus_per_node
    exports = {MARKER: ranks.marker, **ranks.env}
    command = (
        "mpirun",
        "--allow-run-as-root",  # whom the inventory or a container makes the user is meant to be it
        *(
            ("--host", f"localhost:{per_node}")  # without it, there are as many slots as cores
            if alone
            else ("--hostfile", str(PurePath(ranks.launcher_dir, "hostfile")))
        ),
        "--map-by",
        f"ppr:{per_node}:node",
        "--bind-to",
        "none",
        *(word for name, value in MPI_SETTINGS.items() for word in ("--mca", name, value)),
        *(word for name, value in exports.items() for word in ("-x", f"{name}={value}")),
        ranks.nodes[0].python,
        "-m",
        "runner.workloads",
        ranks.cell_dir,
    )
    if alone:
        return Launch(argv=(command,))
    # Open MPI 4 and 5 name these settings differently, and each ignores the other's names in the environment. Its
    # daemons carry the mark, so that one which has lost mpirun is found and ended like a rank.
    agent, daemon = f"ssh -F {ranks.ssh_config}", f"env {MARKER}={ranks.marker}"
    return Launch(
        argv=tuple(None for _ in ranks.nodes),
        head=command,
        head_env={
            "OMPI_MCA_plm_rsh_agent": agent,
            "PRTE_MCA_plm_ssh_agent": agent,
            "OMPI_MCA_orte_launch_agent": f"{daemon} orted",
            "PRTE_MCA_prte_launch_agent": f"{daemon} prted",
            # Else some nodes start the daemons of others, with an ssh that has neither the keys nor the ports.
            "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
            "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
        },
        files={"hostfile": "".join(f"{node.alias} slots={per_node}\n" for node in ranks.nodes)},
    )
