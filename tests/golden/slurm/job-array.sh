#!/bin/bash
# shakedown-20260101-120000-ab12-sweep: Shakedown's agent on every node of each cell, one cell after the other, each a task of an array.
#   cell torch-2n-r1: 2 nodes placed by Slurm, at most 1800 s
#   cell torch-2n-r2: 2 nodes placed by Slurm, at most 3600 s
# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.
#SBATCH --job-name=shakedown-20260101-120000-ab12-sweep
#SBATCH --array=0-1%1
#SBATCH --output=/home/user/results/20260101-120000-ab12/slurm/sweep.log.%a
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=0-01:02:00
#SBATCH --signal=USR1@60
#SBATCH --no-requeue
#SBATCH --export=NIL

# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that
# fails does not stop the next one; the job ends with the first status that is not 0.
status=0

case "$SLURM_ARRAY_TASK_ID" in
0)
# cell torch-2n-r1: 2 nodes placed by Slurm, at most 1800 s
srun --job-name=torch-2n-r1 --nodes=2 --ntasks=2 --ntasks-per-node=1 \
  --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --input=all --export=ALL \
  /opt/shakedown/bin/python -P -u -m runner.node <<'REQUEST'
{
 "cell": "torch-2n-r0",
 "env": {
  "NCCL_DEBUG": "WARN"
 },
 "hosts": [],
 "kind": "cell",
 "note": "it's `x` $(y) $Z \u00e9",
 "repeat": 1
}
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result
;;
1)
# cell torch-2n-r2: 2 nodes placed by Slurm, at most 3600 s
srun --job-name=torch-2n-r2 --nodes=2 --ntasks=2 --ntasks-per-node=1 \
  --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --input=all --export=ALL \
  /opt/shakedown/bin/python -P -u -m runner.node <<'REQUEST'
{
 "cell": "torch-2n-r0",
 "env": {
  "NCCL_DEBUG": "WARN"
 },
 "hosts": [],
 "kind": "cell",
 "note": "it's `x` $(y) $Z \u00e9",
 "repeat": 2
}
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result
;;
esac

exit "$status"
