#!/usr/bin/env bash
# Train on machines that SLURM allocates. The same command, run again, continues from the last checkpoint.
#
#     sbatch launch/slurm.sh configs/powermoe_1b.py --mesh.data=-1
#
# The run folder must be on a disk that all machines share.
#
#SBATCH --job-name=stickjax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# One process per GPU. A process takes the GPU with the number of its local rank, so every process must see all GPUs of
# its machine: do not use --gpus-per-task.
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SLURM sends SIGTERM 180 seconds before the time limit. All processes then save at the same step and stop.
#SBATCH --signal=TERM@180
set -euo pipefail
# The processes find each other by the variables that srun sets. If one process fails, --kill-on-bad-exit makes srun end
# the others at once. Without it they would notice and end after up to half a minute.
srun --kill-on-bad-exit=1 python -m stickjax.train "$@"
