#!/bin/bash
# shakedown-20260101-120000-ab12-sweep: Shakedown's agent on every node of each cell, one cell after the other.
#   cell sft: 2 nodes placed by Slurm, at most 1800 s
#   cell merge-sft: 1 node placed by Slurm, at most 600 s
# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.
#SBATCH --job-name=shakedown-20260101-120000-ab12-sweep
#SBATCH --output=/home/user/results/20260101-120000-ab12/slurm/sweep.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=0-00:44:00
#SBATCH --signal=USR1@60
#SBATCH --no-requeue
#SBATCH --export=NIL

# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that
# fails ends the job: the next one needs what it leaves.
status=0

# cell sft: 2 nodes placed by Slurm, at most 1800 s
echo '--- cell sft'
srun --job-name=sft --nodes=2 --ntasks=2 --ntasks-per-node=1 --relative=0 --time=0-00:32:00 \
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
[ "$status" -eq 0 ] || exit "$status"

# cell merge-sft: 1 node placed by Slurm, at most 600 s
echo '--- cell merge-sft'
srun --job-name=merge-sft --nodes=1 --ntasks=1 --ntasks-per-node=1 --relative=0 --time=0-00:12:00 \
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
[ "$status" -eq 0 ] || exit "$status"

exit "$status"
