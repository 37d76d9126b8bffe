#!/usr/bin/env bash
# Fault injection: real training runs, killed at random moments in several ways, resumed to the end
# and compared with an uninterrupted run. Trains its own small model; 15 minutes on two CPU cores.
# Linux only.
#   bash runs/chaos.sh [ROUNDS [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS=1
OUT=${OUT:-out/chaos}
[ -f "$OUT/data/model/config.json" ] || python toy.py findx --levels=1 --out="$OUT/data"
# A weak model suffices: some right, some wrong, some parsable reflections; 700 steps.
head -n 11200 "$OUT/data/coldstart.jsonl" > "$OUT/data/few.jsonl"
[ -f "$OUT/model/final/meta.json" ] ||
  python coldstart.py config/coldstart_toy.py --out_dir="$OUT/model" --init_from="$OUT/data/model" \
    --examples="$OUT/data/few.jsonl" --eval_problems= --stop_at_pass1=0 --resume=True
python -m tools.chaos "$OUT" "$@"
