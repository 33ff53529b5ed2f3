#!/usr/bin/env bash
# Whether more responses would tell the story model's value model more: it is trained on half of them (`half`) and on twice as
# many (`twice`), and decoded; a quarter of an hour each on a CPU core. First what configs/stories/value.yaml needs. The numbers are
# in docs/stories/responses.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
data="--config configs/stories/data.yaml"
decode() {  # name, the value model
  vbon compare $data --config configs/stories/compare_decoders.yaml --output "runs/stories/responses-$1" \
    --data.value_model "{name: $2, dtype: bfloat16}" --policies '{}' --decoders '{
      "Guided 16 + 16, n = 8": {"class_path": "vbon_lightning.decoding.ValueGuided", "init_args": {"n": 8, "top": 16, "draws": 16}}}'
}

half() {
  [ -d runs/stories/value-half/export ] || vbon fit $data --config configs/stories/value.yaml --data.table_samples 2048 \
    --trainer.default_root_dir runs/stories/value-half
  decode half runs/stories/value-half/export
}

twice() {
  vbon predict $data --config configs/stories/table.yaml --config configs/stories/table_large.yaml \
    --model.init_args.samples 8192 --data.reference_table runs/stories/table-twice
  [ -d runs/stories/value-twice/export ] || vbon fit $data --config configs/stories/value.yaml \
    --data.reference_table runs/stories/table-twice --trainer.default_root_dir runs/stories/value-twice
  decode twice runs/stories/value-twice/export
}

"${1:-half}"
