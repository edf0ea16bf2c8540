#!/bin/bash
# Trains a recipe on machines that Slurm lends, and continues by itself until it is done:
#
#   sbatch --nodes=4 recipes/launch/slurm.sh recipes/launch/fsdp2.yaml recipes/pretrain/gpt-1b.yaml train.tokens=2e11
#
# One task is one process on one GPU. Five minutes before the time is up, or when the job has to make room, Slurm sends
# SIGTERM to the tasks; all save the last completed step and exit with 75, and the job goes back into the queue. Any
# other failure ends it. The same command continues a run that was cancelled. `out`, `data.cache` and the corpora must
# lie where all machines see them.
#
# There is no torchrun between Slurm and the processes: it would kill them 30 seconds after SIGTERM and hide their exit
# code.
#SBATCH --job-name=lmssl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lmssl-%j.log
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch [--nodes=N] $0 LAUNCH_FILE RECIPE [KEY=VALUE ...]" >&2
  exit 2
fi
launch_file=$1
shift
python=${PYTHON:-python}

# What accelerate tells its processes of the launch file, asked of accelerate itself.
settings=$("$python" -m accelerate.commands.launch --config_file "$launch_file" --num_machines 1 --num_processes 2 \
  --main_process_port 0 --no_python env | grep -E '^(ACCELERATE|FSDP|PARALLELISM_CONFIG)_' | sort -u)
while IFS= read -r setting; do export "${setting?}"; done <<< "$settings"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

code=0
# shellcheck disable=SC2016 # each task reads its own numbers
srun --wait=120 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec "$0" -m lmssl train "$@"
' "$python" "$@" || code=$?

if [ "$code" -eq 75 ]; then
  echo "stopped by a signal after saving; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
