#!/bin/bash
# Latents and embeddings of a large data set, computed by an array of jobs that share nothing but a folder:
#     MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 PICTURES=/shared/pictures LATENTS=/shared/latents \
#         sbatch accelerate_configs/slurm_precompute.sh
# A job that was killed or timed out: submit the same again; only what is missing is computed.
#SBATCH --job-name=precompute
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

python -m utils.cache --num_shards "$SLURM_ARRAY_TASK_COUNT" --shard_index "$SLURM_ARRAY_TASK_ID" \
    --pretrained_model_name_or_path "$MODEL" --train_data_dir "$PICTURES" --output_dir "$LATENTS" \
    --resolution "${RESOLUTION:-512}" --center_crop --random_flip
