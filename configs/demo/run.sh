#!/usr/bin/env bash
# The demo: SFT and a reward model -> reference table -> value model -> one policy for every N, and beside it vBoN and KL-RL by
# policy gradient -> comparison. `make demo` runs it. Each stage is one `vbon` command, printed before it runs. What does not
# wait for each other runs side by side, one thread each, which suits a model this small.
set -euo pipefail
cd "$(dirname "$0")/../.."
data="--config configs/demo/data.yaml"
export TOKENIZERS_PARALLELISM=false
began=$SECONDS

stage() {  # print a command, run it
  printf '\n\033[1m[%3ds] vbon %s\033[0m\n' $((SECONDS - began)) "$*"
  vbon "$@"
}

side_by_side() {  # log of the one behind, it, the one in front
  "$2" > "$1" 2>&1 &
  local behind=$!
  "$3" || { wait; exit 1; }
  wait "$behind" || { cat "$1"; exit 1; }
}

reward() (
  export OMP_NUM_THREADS=1
  vbon fit --config configs/demo/reward.yaml
)

supervised() (
  export OMP_NUM_THREADS=1
  stage fit $data --config configs/demo/sft.yaml
)

by_policy_gradient() (
  export OMP_NUM_THREADS=1
  vbon fit $data --config configs/demo/vbon.yaml --model.init_args.n 4 &&
    vbon fit $data --config configs/demo/kl_rl.yaml --model.init_args.beta 0.6
)

by_distillation() (
  export OMP_NUM_THREADS=1
  stage fit $data --config configs/demo/value.yaml && stage fit $data --config configs/demo/dial.yaml
)

rm -rf runs/demo/table  # it belongs to the policy and the reward that are about to be made
mkdir -p runs/demo

log=runs/demo/reward.log
printf '\n\033[1m[%3ds] vbon fit --config configs/demo/reward.yaml\033[0m\n       (beside the next; output in %s)\n' \
  $((SECONDS - began)) "$log"
side_by_side "$log" reward supervised

stage predict $data --config configs/demo/table.yaml

log=runs/demo/policy_gradient.log
printf '\n\033[1m[%3ds] vbon fit %s --config configs/demo/vbon.yaml --model.init_args.n 4
       vbon fit %s --config configs/demo/kl_rl.yaml --model.init_args.beta 0.6\033[0m
       (both beside the next two; output in %s)\n' \
  $((SECONDS - began)) "$data" "$data" "$log"
side_by_side "$log" by_policy_gradient by_distillation

stage compare $data --config configs/demo/compare.yaml
printf '\nDone in %d s. Table, picture and texts: runs/demo/comparison. Curves: tensorboard --logdir runs/demo\n' \
  $((SECONDS - began))
