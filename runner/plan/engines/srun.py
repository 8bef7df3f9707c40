"""Engine `srun`: a step of Slurm's own inside the job, which Slurm's daemons start and connect."""

from __future__ import annotations

from runner.plan.engines.ranks import MPI_SETTINGS, Launch, Ranks


def launch(ranks: Ranks) -> Launch:
    """One srun on the first node for all ranks; the step takes its environment from there.

    It runs inside the step of the agents and shares all that this holds. Everything is said again that srun would else
    take from the variables of that step, where it means the agents.
    """
    nodes = len(ranks.nodes)
    command = (
        "srun",
        "--overlap",
        f"--mpi={ranks.mpi_plugin}",
        f"--nodes={nodes}",
        f"--ntasks={nodes * ranks.gpus_per_node}",
        f"--ntasks-per-node={ranks.gpus_per_node}",
        f"--nodelist={','.join(node.alias for node in ranks.nodes)}",
        "--distribution=block",
        "--cpu-bind=none",
        "--mem=0",
        "--kill-on-bad-exit=1",
        "--wait=0",
        "--input=none",
        "--export=ALL",
        "env",
        *(f"OMPI_MCA_{name}={value}" for name, value in MPI_SETTINGS.items()),
        ranks.nodes[0].python,
        "-m",
        "runner.workloads",
        ranks.cell_dir,
    )
    return Launch(argv=(command, *(None for _ in ranks.nodes[1:])))
