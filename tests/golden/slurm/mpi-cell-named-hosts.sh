#!/bin/bash
# job: Shakedown's agent on every node of each cell, one cell after the other.
#   cell probe-all_reduce-2n-r1: 2 nodes on node[001-002], at most 600 s
# By hand: `sbatch THIS_FILE`, with no SBATCH_* variable set, since those win over the lines below.
#SBATCH --job-name=job
#SBATCH --output=/srv/results/20260102-030405-abcd/slurm/job.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gres=gpu:8
#SBATCH --nodelist=node001,node002
#SBATCH --time=0-00:12:00
#SBATCH --signal=USR1@60
#SBATCH --no-requeue
#SBATCH --export=NIL

# Rank, node list and master address come from Slurm inside each task, not from this shell. A cell that
# fails does not stop the next one; the job ends with the first status that is not 0.
status=0

# cell probe-all_reduce-2n-r1: 2 nodes on node[001-002], at most 600 s
# The agent of its first node starts all ranks: srun --overlap --mpi=pmix --nodes=2 --ntasks=16 --ntasks-per-node=8 --nodelist=node001,node002 --distribution=block --cpu-bind=none --mem=0 --kill-on-bad-exit=1 --wait=0 --input=none --export=ALL env OMPI_MCA_pml=ob1 'OMPI_MCA_btl=^openib,ofi,uct,usnic,smcuda' OMPI_MCA_btl_vader_single_copy_mechanism=none 'OMPI_MCA_coll=^hcoll' /opt/shakedown/env/bin/python -m runner.workloads /var/tmp/shakedown/20260102-030405-abcd/probe-all_reduce-2n-r1.1
srun --job-name=probe-all_reduce-2n-r1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=node001,node002 \
  --cpu-bind=none --kill-on-bad-exit=1 --wait=60 --input=all --export=ALL \
  /opt/shakedown/env/bin/python -P -u -m runner.node <<'REQUEST'
...
REQUEST
result=$?; [ "$status" -ne 0 ] || status=$result

exit "$status"
