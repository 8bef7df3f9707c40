#!/bin/bash
# shakedown-20260101-120000-ab12-sweep: Shakedown's agent on every node of each cell, one cell after the other.
#   cell sft-llama-2-7b-1n-r0: 1 node placed by Slurm, at most 3600 s
#   cell sft-llama-2-7b-2n-r0: 2 nodes placed by Slurm, at most 3600 s
#   cell sft-llama-2-7b-4n-r0: 4 nodes placed by Slurm, at most 3600 s
#   cell sft-llama-2-7b-8n-r0: 8 nodes placed by Slurm, at most 3600 s
# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.
#SBATCH --job-name=shakedown-20260101-120000-ab12-sweep
#SBATCH --output=/home/user/results/20260101-120000-ab12/slurm/sweep.log
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gres=gpu:8
#SBATCH --time=0-04:08:00
#SBATCH --signal=USR1@60
#SBATCH --no-requeue
#SBATCH --export=NIL

# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that
# fails does not stop the next one; the job ends with the first status that is not 0.
status=0

# cell sft-llama-2-7b-1n-r0: 1 node placed by Slurm, at most 3600 s
echo '--- cell sft-llama-2-7b-1n-r0'
srun --job-name=sft-llama-2-7b-1n-r0 --nodes=1 --ntasks=1 --ntasks-per-node=1 --relative=0 --time=0-01:02:00 \
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
 "num_nodes": 1
}
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result

# cell sft-llama-2-7b-2n-r0: 2 nodes placed by Slurm, at most 3600 s
echo '--- cell sft-llama-2-7b-2n-r0'
srun --job-name=sft-llama-2-7b-2n-r0 --nodes=2 --ntasks=2 --ntasks-per-node=1 --relative=0 --time=0-01:02:00 \
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
 "num_nodes": 2
}
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result

# cell sft-llama-2-7b-4n-r0: 4 nodes placed by Slurm, at most 3600 s
echo '--- cell sft-llama-2-7b-4n-r0'
srun --job-name=sft-llama-2-7b-4n-r0 --nodes=4 --ntasks=4 --ntasks-per-node=1 --relative=0 --time=0-01:02:00 \
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
 "num_nodes": 4
}
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result

# cell sft-llama-2-7b-8n-r0: 8 nodes placed by Slurm, at most 3600 s
echo '--- cell sft-llama-2-7b-8n-r0'
srun --job-name=sft-llama-2-7b-8n-r0 --nodes=8 --ntasks=8 --ntasks-per-node=1 --relative=0 --time=0-01:02:00 \
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
 "num_nodes": 8
}
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result

exit "$status"
