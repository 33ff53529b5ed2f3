#!/usr/bin/env bash
# The demo: SFT -> reference table -> vBoN at two N, KL-RL at two beta -> comparison. `make demo` runs it.
# Each stage is one `vbon` command, printed before it runs. The two strengths of a method run side by side, one
# thread each, which suits a model this small.
set -euo pipefail
cd "$(dirname "$0")/../.."
data="--config configs/demo/data.yaml"
export TOKENIZERS_PARALLELISM=false
began=$SECONDS

stage() {  # print a command, run it
  printf '\n\033[1m[%3ds] vbon %s\033[0m\n' $((SECONDS - began)) "$*"
  vbon "$@"
}

pair() {  # run two commands side by side, one thread each; show the first, keep the second's output in a file
  local log=$1 first=$2 second=$3
  printf '\n\033[1m[%3ds] vbon %s\n       vbon %s   (output in %s)\033[0m\n' $((SECONDS - began)) "$first" "$second" "$log"
  mkdir -p "$(dirname "$log")"
  OMP_NUM_THREADS=1 vbon $second > "$log" 2>&1 &
  local other=$!
  OMP_NUM_THREADS=1 vbon $first
  wait "$other" || { cat "$log"; exit 1; }
}

rm -rf runs/demo/table  # it belongs to the policy that SFT is about to make
stage fit $data --config configs/demo/sft.yaml
stage predict $data --config configs/demo/table.yaml
vbon="fit $data --config configs/demo/vbon.yaml"
pair runs/demo/vbon-n16.log \
  "$vbon --model.init_args.n 4 --trainer.default_root_dir runs/demo/vbon-n4" \
  "$vbon --model.init_args.n 16 --trainer.default_root_dir runs/demo/vbon-n16"
kl_rl="fit $data --config configs/demo/kl_rl.yaml"
pair runs/demo/kl_rl-b0.1.log \
  "$kl_rl --model.init_args.beta 0.3 --trainer.default_root_dir runs/demo/kl_rl-b0.3" \
  "$kl_rl --model.init_args.beta 0.1 --trainer.default_root_dir runs/demo/kl_rl-b0.1"
stage compare $data --config configs/demo/compare.yaml
printf '\nDone in %d s. Table, picture and texts: runs/demo/comparison. Curves: tensorboard --logdir runs/demo\n' \
  $((SECONDS - began))
