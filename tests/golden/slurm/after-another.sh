#!/bin/bash
# shakedown-20260101-120000-ab12-torch-2n-r0: Shakedown's agent on every node of each cell, one cell after the other.
#   cell torch-2n-r0: 2 nodes placed by Slurm, at most 1800 s
# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.
#SBATCH --job-name=shakedown-20260101-120000-ab12-torch-2n-r0
#SBATCH --dependency=afterok:4711
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output=/home/user/results/20260101-120000-ab12/slurm/torch-2n-r0.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=0-00:32:00
#SBATCH --signal=USR1@60
#SBATCH --no-requeue
#SBATCH --export=NIL

# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that
# fails does not stop the next one; the job ends with the first status that is not 0.
status=0

# cell torch-2n-r0: 2 nodes placed by Slurm, at most 1800 s
srun --job-name=torch-2n-r0 --nodes=2 --ntasks=2 --ntasks-per-node=1 \
  --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --input=all --export=ALL \
  /opt/shakedown/bin/python -P -u -m runner.node <<'REQUEST'
{
 "cell": "torch-2n-r0",
 "env": {
  "NCCL_DEBUG": "WARN"
 },
 "hosts": [],
 "kind": "cell",
 "note": "it's `x` $(y) $Z \u00e9"
}
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result

exit "$status"
