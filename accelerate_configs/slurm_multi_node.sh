#!/bin/bash
# Two machines with 8 GPUs each, for as many time limits as the training takes:
#     sbatch accelerate_configs/slurm_multi_node.sh train_text_to_image.py --output_dir /shared/runs/large ...
# Ten minutes before its time is up the job is asked to stop: it saves, is queued again and goes on from there.
# --output_dir must be a folder that the machines share. A job that was lost with its machine: the same once more.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
port=$((10000 + SLURM_JOB_ID % 50000))             # two jobs may share a machine
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun no longer takes it over from the job
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540          # or torchrun kills after 30 s, in the middle of a large checkpoint

steps= asked=
trap 'asked=yes; [[ ! $steps ]] || kill -USR1 "$steps" || true' USR1 # srun passes it to torchrun, and that to the training
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "${nodes[0]}:$port" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 "$@" --resume_from_checkpoint latest &
steps=$!
while kill -0 "$steps" 2> /dev/null; do
    wait "$steps" || true # the signal ends the waiting
done
code=0
wait "$steps" || code=$?

# torchrun ends with 1 where the training ended with 75, saved and not finished, and where it failed while it saved.
if [[ $code != 0 && $asked && ${SLURM_RESTART_COUNT:-0} -lt ${MOST_RESTARTS:-100} ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
exit "$code"
