#!/usr/bin/env bash
# The same recipe at small size on SmolLM2-135M: low-rank adapters, all weights, or a tower beside it. An hour on a CPU core.
# Needs the sentiment setting's reward, and what configs/sentiment/smollm2_sft.yaml says. Then: python experiments/capacity/record.py smollm2
set -euo pipefail
cd "$(dirname "$0")/../.."
data="--config configs/sentiment/data.yaml --config configs/sentiment/smollm2.yaml"
reference=runs/smollm2/sft/export body=runs/smollm2/body value=runs/smollm2/value/export

[ -d "$reference" ] || vbon fit --config configs/sentiment/data.yaml --config configs/sentiment/sft.yaml \
  --config configs/sentiment/smollm2_sft.yaml

# 32 responses to each of 96 training prompts, 64 to each of 24 held-out ones.
for table in train:32:runs/smollm2/table test:64:runs/smollm2/table-test; do
  IFS=: read -r split samples path <<< "$table"
  vbon predict $data --config configs/sentiment/table.yaml --model.init_args.samples "$samples" \
    --model.init_args.rows_per_pass 256 --data.table_splits "[$split]" --data.reference_table "$path"
done

# The value model has the reference's first six of thirty layers: every candidate token goes through it.
[ -d "$body" ] || python experiments/capacity/first_layers.py "$reference" 6 "$body"
[ -d "$value" ] || vbon fit $data --config configs/sentiment/value.yaml --model.init_args.body "$body" \
  --data.train.stop 176 --data.val.start 176 --data.val.stop 192 --data.table_splits '[train]' \
  --model.init_args.responses_per_prompt 8 --model.init_args.bins 16 --model.init_args.lr_scheduler.init_args.max_lr 2e-4 \
  --model.init_args.lr_scheduler.init_args.total_steps 160 --trainer.max_steps 160 --trainer.val_check_interval 20 \
  --trainer.default_root_dir runs/smollm2/value

train() {  # name, the policy, the learning rate
  [ -d "runs/smollm2/$1/export" ] || vbon fit $data --config configs/sentiment/trainer.yaml \
    --config configs/sentiment/tilt.yaml --model.init_args.n_range null --data.table_splits '[train]' \
    --model.init_args.responses_per_prompt 2 --model.init_args.draws 8 \
    --trainer.max_steps 60 --model.init_args.lr_scheduler.init_args.total_iters 60 --trainer.log_every_n_steps 1 \
    --model.init_args.optimizer.init_args.lr "$3" --data.policy "$2" --data.reference "$reference" \
    --data.value_model "$value" --trainer.callbacks vbon_lightning.callbacks.PolicyExport \
    --trainer.default_root_dir "runs/smollm2/$1" --trainer.logger.init_args.save_dir "runs/smollm2/$1"
}

train lora "{name: $reference, tilt: null, lora: {r: 32, lora_alpha: 64, target_modules: all-linear}}" 1e-3
train tower "{name: $reference, tilt: $value}" 5e-4
train whole "$reference" 1e-4

vbon compare $data --config configs/sentiment/compare.yaml --data.reference_table runs/smollm2/table-test \
  --n '[2,4,8,16]' --output runs/smollm2/comparison --title 'Sentiment of film reviews, SmolLM2-135M' --policies '{
    "LoRA": "runs/smollm2/lora/export", "Tower": {"name": "runs/smollm2/tower/export", "dial": 8},
    "Whole": "runs/smollm2/whole/export"}'
