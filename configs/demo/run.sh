#!/usr/bin/env bash
# The demo: SFT -> reference table -> value model -> one policy for every N, and KL-RL -> comparison. `make demo` runs it.
# Each stage is one `vbon` command, printed before it runs. The two policies are trained side by side, one thread each,
# which suits a model this small.
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
stage fit $data --config configs/demo/value.yaml
pair runs/demo/kl_rl.log \
  "fit $data --config configs/demo/dial.yaml" \
  "fit $data --config configs/demo/kl_rl.yaml --model.init_args.beta 0.2"
stage compare $data --config configs/demo/compare.yaml
printf '\nDone in %d s. Table, picture and texts: runs/demo/comparison. Curves: tensorboard --logdir runs/demo\n' \
  $((SECONDS - began))
