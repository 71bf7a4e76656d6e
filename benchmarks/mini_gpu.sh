#!/usr/bin/env bash
# hadal-mini on one GPU that is lent for ten minutes at a time. What is to be kept is copied to $OUT.
#
#   bash benchmarks/mini_gpu.sh try        # a minute: rate with and without FP8, the data pipeline's rate
#   bash benchmarks/mini_gpu.sh train      # at most MINUTES; the same line again goes on until it has finished
#   bash benchmarks/mini_gpu.sh measure    # accuracy of 4,500 problems, a minute
#
# Then, anywhere: python benchmarks/adopt_mini.py adopt FOLDER, where FOLDER holds what lies in $OUT/hadal-mini.
set -euo pipefail
RUN=${RUN:-runs/hadal-mini}
MINUTES=${MINUTES:-8.9}
KEEP=${OUT:?the folder that comes back}/hadal-mini
PYTHON=${PYTHON:-python}

keep() {
  mkdir -p "$KEEP/data/train"
  for name in export export-ema metrics.jsonl recipe.json accuracy.json; do
    if [ -e "$RUN/$name" ]; then cp -r "$RUN/$name" "$KEEP/"; fi
  done
  cp "$RUN"/data/train/report.* "$KEEP/data/train/"
}

case "${1:-}" in
  try)
    for fp8 in true false; do
      rm -rf runs/mini-try
      $PYTHON -m hadal.train recipes/mini.toml --out runs/mini-try --set data.path=runs/mini-try-data \
        --set train.tokens=8e6 --set train.fp8=$fp8 --set log.accuracy_every_steps=0 --set train.batch_tokens_start=0 \
        --set log.heldout_tokens=65536 --set checkpoint.every_minutes=0
    done
    head -30 runs/mini-try-data/train/report.md
    ;;
  train)
    $PYTHON -m hadal.train recipes/mini.toml --out "$RUN" --resume --set train.max_minutes="$MINUTES" "${@:2}"
    keep
    ;;
  measure)
    $PYTHON benchmarks/adopt_mini.py measure "$RUN" --device cuda
    keep
    ;;
  *)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
