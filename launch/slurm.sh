#!/usr/bin/env bash
# Training on machines that SLURM gives; the same command again goes on from the last checkpoint.
#
#     sbatch launch/slurm.sh configs/powermoe_1b.py --mesh.data=-1
#
# The folder of the run must be on a disk that all machines share.
#
#SBATCH --job-name=stickjax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# One process for each GPU: it takes that of its rank on the machine, so all must see all (no --gpus-per-task).
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Before the time is up, all save at one step and stop.
#SBATCH --signal=TERM@180
set -euo pipefail
# Every process learns from srun who the others are. When one ends badly, srun ends the others at once; without it they
# would end by themselves, within half a minute.
srun --kill-on-bad-exit=1 python -m stickjax.train "$@"
