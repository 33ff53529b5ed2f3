#!/usr/bin/env bash
# What holds a policy back: towers of three sizes beside one reference, taught by one value model, 300 steps each (an hour on
# a CPU core without the largest). Needs the sentiment setting's reference, reward, wide table, test table and value model, and pretrain.sh's models.
# After it: python experiments/capacity/record.py capacity
set -euo pipefail
cd "$(dirname "$0")/../.."
data="--config configs/sentiment/data.yaml"
reference=runs/sentiment/sft/export

train() {  # name, the policy, more
  name=$1 policy=$2
  shift 2
  [ -d "runs/capacity/$name/export" ] || vbon fit $data --config configs/sentiment/wide.yaml \
    --config configs/sentiment/trainer.yaml --config configs/sentiment/tilt.yaml --model.init_args.n_range null \
    --trainer.max_steps 300 --model.init_args.lr_scheduler.init_args.total_iters 300 \
    --data.policy "$policy" --trainer.default_root_dir "runs/capacity/$name" \
    --trainer.logger.init_args.save_dir "runs/capacity/$name" "$@"
}

for size in 0.26m 1.9m; do
  train "tower-$size" "{name: $reference, tilt: runs/capacity/pretrain-$size/export}"
done
# This one takes three to ten seconds a step on a CPU core, and 0.4 on a GPU.
train tower-10m "{name: $reference, tilt: runs/capacity/pretrain-10m/export}" --trainer.accelerator auto
train tower-value "{name: $reference, tilt: runs/sentiment/value/export}"
train tower-value-no-vectors "{name: $reference, tilt: runs/sentiment/value/export}" \
  --model experiments.capacity.fixed_vectors.FixedVectorDistillation
train tower-value-ema "{name: $reference, tilt: runs/sentiment/value/export}" --trainer.callbacks '[
  {class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.98}},
  {class_path: vbon_lightning.callbacks.DialCalibration}, {class_path: vbon_lightning.callbacks.PolicyExport}]'
[ -d runs/capacity/untied ] || python experiments/capacity/untie.py "$reference" runs/capacity/untied
train plain-untied runs/capacity/untied --data.reference "$reference" \
  --trainer.callbacks vbon_lightning.callbacks.PolicyExport
train plain "$reference" --trainer.callbacks vbon_lightning.callbacks.PolicyExport

vbon compare $data --config configs/sentiment/compare.yaml --output runs/capacity/comparison --n '[2,4,8,16]' --policies '{
  "0.26M": {"name": "runs/capacity/tower-0.26m/export", "dial": 8},
  "1.9M": {"name": "runs/capacity/tower-1.9m/export", "dial": 8},
  "10M": {"name": "runs/capacity/tower-10m/export", "dial": 8},
  "Value-body": {"name": "runs/capacity/tower-value/export", "dial": 8},
  "Averaged": {"name": "runs/capacity/tower-value-ema/export", "dial": 8},
  "No-own-vectors": {"name": "runs/capacity/tower-value-no-vectors/export", "dial": 8},
  "Plain-untied": "runs/capacity/plain-untied/export", "Plain": "runs/capacity/plain/export"}'
