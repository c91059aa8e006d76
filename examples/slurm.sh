#!/bin/bash
# Trains on two machines with four GPUs each. The job is requeued at each time limit until the run has finished.
#
#   $ sbatch examples/slurm.sh --dataset_name user/faces --resolution 64 --mixed_precision bf16 --output_dir my-model
#
#SBATCH --job-name=ddpm-faces
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# `srun` starts one process per GPU, so that every process receives signals and its exit code is known.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec python training/train.py "$@"' train "$@"
code=$?

# 75: the run was preempted, and its checkpoint is saved (docs/guides/resume.md).
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
