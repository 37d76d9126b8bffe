#!/usr/bin/env bash
# The whole method on two CPU cores: cold start of a small randomly initialised model, then GRPO,
# TAPO and OPSD from the cold-start checkpoint; tables and out/toy/report.html at the end. Finished
# parts are skipped, interrupted ones resumed. SEEDS=5 runs the three methods with five seeds,
# STEPS=4 is a quick trial.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
SEEDS=${SEEDS:-1} OUT=${OUT:-out/toy} STEPS=${STEPS:-60}
last=step_$(printf %06d "$STEPS")
export OMP_NUM_THREADS=1
mkdir -p "$OUT/eval" "$OUT/logs"

train() {  # train NAME SEED: one run; prefixes console lines with its name
  [ ! -f "$OUT/$1_s$2/$last/meta.json" ] || return 0
  python train.py config/toy.py "config/$1.py" --seed="$2" --out_dir="$OUT/$1_s$2" \
    --init_from="$OUT/coldstart/final" --max_steps="$STEPS" --resume=True 2>&1 |
    tee -a "$OUT/logs/$1_s$2.log" |
    { grep --line-buffered -E "^(step|WARNING|error|Traceback)" || true; } | sed -u "s/^/[$1 s$2] /"
}
evaluate() {  # evaluate NAME FOLDER: test problems, at T 1 and at T 0.6 with top-p 0.9
  local log="$OUT/logs/eval_$1.log"
  [ -f "$OUT/eval/$1.json" ] ||
    python eval.py config/eval_toy.py --init_from="$2" --out="$OUT/eval/$1" > "$log" 2>&1 ||
    { tail -n 20 "$log"; return 1; }
  echo "== evaluated $1"
}

# level 1: x*a+b and x*a-b with values below 50, learnable in minutes on two cores
[ -f data/findx/model/config.json ] || python toy.py findx --levels=1 --out=data/findx

echo "== cold start: SFT of a randomly initialised model (§3.2)"
python coldstart.py config/coldstart_toy.py --out_dir="$OUT/coldstart" --resume=True
evaluate coldstart "$OUT/coldstart/final" & waiting=$!

for ((seed = 0; seed < SEEDS; seed++)); do
  echo "== GRPO, TAPO and OPSD, seed $seed, two processes in parallel"
  wait $waiting
  train tapo $seed & tapo=$!
  train grpo $seed
  train opsd $seed & opsd=$!
  wait $tapo
  evaluate grpo_s$seed "$OUT/grpo_s$seed/$last"
  evaluate tapo_s$seed "$OUT/tapo_s$seed/$last"
  wait $opsd
  evaluate opsd_s$seed "$OUT/opsd_s$seed/$last" & waiting=$!
done
wait $waiting

list() { for ((s = 0; s < SEEDS; s++)); do echo "$OUT/eval/$1_s$s.json"; done | paste -sd+; }
python -m tools.compare "$(list grpo)" "$(list tapo)" "$(list opsd)"
python -m tools.report "$OUT"/{tapo,grpo,opsd}_s* --out="$OUT/report.html" \
  --evals="$(ls "$OUT"/eval/*.json | grep -v samples | paste -sd,)"
echo "== 95 % intervals over problems"
python -m tools.compare --scores "$OUT"/eval/{coldstart,grpo_s*,opsd_s*,tapo_s*}.json
echo "== open $OUT/report.html"
