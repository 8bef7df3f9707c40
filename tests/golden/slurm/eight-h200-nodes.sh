#!/bin/bash
# shakedown-20260101-120000-ab12-sft-llama-2-7b-8n-r0: Shakedown's agent on every node of each cell, one cell after the other.
#   cell sft-llama-2-7b-8n-r0: 8 nodes placed by Slurm, at most 3600 s
# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.
# It hands on HF_TOKEN, WANDB_API_KEY from the environment of sbatch.
#SBATCH --job-name=shakedown-20260101-120000-ab12-sft-llama-2-7b-8n-r0
#SBATCH --output=/home/user/results/20260101-120000-ab12/slurm/sft-llama-2-7b-8n-r0.log
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --account=benchmarks
#SBATCH --qos=high
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gres=gpu:h200:8
#SBATCH --constraint=roce&hgx
#SBATCH --reservation=acceptance
#SBATCH --exclude=hgx-0003,hgx-0008
#SBATCH --time=0-01:02:00
#SBATCH --signal=USR1@60
#SBATCH --no-requeue
#SBATCH --export=HF_TOKEN,WANDB_API_KEY
#SBATCH --comment=shakedown

# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that
# fails does not stop the next one; the job ends with the first status that is not 0.
status=0

# cell sft-llama-2-7b-8n-r0: 8 nodes placed by Slurm, at most 3600 s
srun --job-name=sft-llama-2-7b-8n-r0 --nodes=8 --ntasks=8 --ntasks-per-node=1 \
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
