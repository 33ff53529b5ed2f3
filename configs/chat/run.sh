#!/usr/bin/env bash
# Conversations with a ground truth: SFT -> reference table -> vBoN -> comparison.
#   bash configs/chat/run.sh         SmolLM2-135M-Instruct answers small sums
#   bash configs/chat/run.sh small   the model that ships with the package names the side of a film that it is asked about
set -euo pipefail
cd "$(dirname "$0")/../.."
export TOKENIZERS_PARALLELISM=false
configs=configs/chat
data=(--config $configs/data.yaml)
sft=() vbon=() compare=(--config $configs/compare.yaml)
if [ "${1:-}" = small ]; then
  data+=(--config $configs/small.yaml)
  sft=(--config $configs/small_sft.yaml) vbon=(--config $configs/small_vbon.yaml)
  compare=(--config $configs/small_compare.yaml)
fi

stage() {
  printf '\n\033[1m[%4ds] vbon %s\033[0m\n' $SECONDS "$*"
  vbon "$@"
}

python $configs/make_data.py
stage fit --config $configs/data.yaml --config $configs/sft.yaml "${data[@]:2}" "${sft[@]}"
stage predict "${data[@]}" --config $configs/table.yaml
stage fit "${data[@]}" --config $configs/vbon.yaml "${vbon[@]}"
stage compare "${data[@]}" "${compare[@]}"
printf '\nDone in %d s.\n' $SECONDS
