#!/usr/bin/env bash
# One policy for every N by a soft token, from the same table and value model as configs/sentiment/tilt.yaml, 800 updates (twenty
# minutes on a CPU core). Needs the sentiment setting's reference, reward, tables and value model.
set -euo pipefail
cd "$(dirname "$0")/../.."
data="--config configs/sentiment/data.yaml"
[ -d runs/dials/soft_token/export-16 ] || vbon fit $data --config configs/sentiment/wide.yaml \
  --config configs/sentiment/trainer.yaml --config configs/sentiment/tilt.yaml \
  --model experiments.dials.soft_token.SoftTokenDistillation --model.init_args.n_range null \
  --trainer.max_steps 800 --model.init_args.lr_scheduler.init_args.total_iters 800 \
  --model.init_args.optimizer.init_args.lr 5e-4 --data.policy runs/sentiment/sft/export \
  --trainer.callbacks experiments.dials.soft_token.MergedExports \
  --trainer.default_root_dir runs/dials/soft_token --trainer.logger.init_args.save_dir runs/dials/soft_token
vbon compare $data --config configs/sentiment/compare.yaml --judge null --output runs/dials/comparison --n '[2,4,8,16]' \
  --title 'Sentiment of film reviews, one policy for every N by a soft token' --policies '{
  "Soft-token N=2": "runs/dials/soft_token/export-2", "Soft-token N=4": "runs/dials/soft_token/export-4",
  "Soft-token N=8": "runs/dials/soft_token/export-8", "Soft-token N=16": "runs/dials/soft_token/export-16"}'
