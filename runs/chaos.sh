#!/usr/bin/env bash
# Interrupted runs: real training under torchrun, killed at random moments in every way, each resumed to the end and compared
# with the run that nobody interrupted. Makes its own small model; a quarter of an hour on two CPU cores. Linux.
#   bash runs/chaos.sh [ROUNDS [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS=1
OUT=${OUT:-out/chaos}
[ -f "$OUT/model/final/meta.json" ] ||  # it need not be good: some right, some wrong, some reflections that can be parsed
  python coldstart.py config/coldstart_toy.py --out_dir="$OUT/model" --problems_dir="$OUT/data" --max_steps=700 --stop_at_pass1=0 \
    --eval_interval=0 --num_hidden_layers=2 --resume=True
python tests/chaos.py "$OUT" "$@"
