#!/usr/bin/env bash
# Language models of three sizes, made alike and briefly, for towers to start from: runs/capacity/pretrain-{0.26m,1.9m,10m}/export.
# Each: 300 steps of 32 texts of 64 tokens. Half an hour on a CPU core, almost all of it the largest. First:
# python configs/demo/make_tokenizer.py runs/demo/tokenizer
set -euo pipefail
cd "$(dirname "$0")/../.."

pretrain() {  # name, hidden size, feed-forward size, layers, heads
  [ -d "runs/capacity/pretrain-$1/export" ] || vbon fit --config configs/demo/pretrain.yaml \
    --data.policy.config.hidden_size "$2" --data.policy.config.intermediate_size "$3" \
    --data.policy.config.num_hidden_layers "$4" --data.policy.config.num_attention_heads "$5" \
    --data.policy.config.num_key_value_heads "$5" \
    --model.init_args.optimizer.init_args.lr 1e-3 --model.init_args.lr_scheduler.init_args.max_lr 1e-3 \
    --model.init_args.lr_scheduler.init_args.total_steps 300 --trainer.max_steps 300 --trainer.val_check_interval 300 \
    --trainer.default_root_dir "runs/capacity/pretrain-$1" --trainer.callbacks vbon_lightning.callbacks.PolicyExport \
    --trainer.enable_checkpointing false
}

pretrain 0.26m 64 172 3 4
pretrain 1.9m 160 432 5 5
pretrain 10m 320 864 8 5
