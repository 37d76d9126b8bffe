#!/usr/bin/env bash
# Dry run of every phase on real problems with Qwen3's tokenizer, in minutes on two CPU cores, to
# find errors in text, token ids, grading or files before a large run. The model is tiny and
# overfitted to a few examples ("lessons"); its scores mean nothing.
#   TOKENIZER=~/models/Qwen3-8B bash runs/rehearsal.sh
# TOKENIZER: a folder with Qwen3's tokenizer files. PROBLEMS, GSM8K, AIME24, AIME25, HMMT_FEB25:
# local copies of the data sets (.jsonl, .json, .parquet); others are downloaded from the hub.
# Delete OUT (out/rehearsal) to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
: "${TOKENIZER:?set it to a folder with the tokenizer files of a Qwen3 model}"
OUT=${OUT:-out/rehearsal} DEEPSCALER=${PROBLEMS:-} SECONDS=0
# glibc: reuse the memory of the head's large temporaries instead of remapping it; halves the time
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
mkdir -p "$OUT"
say() { echo "== $((SECONDS / 60)):$(printf %02d $((SECONDS % 60))) $*"; }
run() {  # run LOG COMMAND: all output to OUT/LOG.log, summary lines to the screen
  local log="$OUT/$1.log"; shift
  python "$@" > "$log" 2>&1 || { tail -n 20 "$log"; return 1; }
  grep -E "^(step|WARNING|saved|filter:|written|[a-z0-9_]+: [0-9,]+ rows|[0-9,]+ problems ->)" \
    "$log" | cut -c1-200 || true
}

say "data: real problems"
for name in aime24 aime25 hmmt_feb25 gsm8k deepscaler; do  # deepscaler last: overlap check
  var=${name^^}
  [ -f "$OUT/data/$name.jsonl" ] || run "data_$name" -m tools.prepare $name \
    --out="$OUT/data/$name.jsonl" ${!var:+--from="${!var}"}
done
python -m tools.rehearsal make "$TOKENIZER" "$OUT/data/deepscaler.jsonl" "$OUT"

say "untrained model on GSM8K: two steps that must warn that they cannot learn"
run untrained train.py config/rehearsal.py --init_from="$OUT/tiny" --out_dir="$OUT/untrained" \
  --problems="$OUT/data/gsm8k.jsonl" --prompts_per_step=2 --max_new_tokens=32
grep -q "WARNING: this run cannot learn" "$OUT/untrained.log"

say "cold start from worked examples, SFT and IFT format"
run taught coldstart.py config/coldstart_rehearsal.py --init_from="$OUT/tiny" \
  --out_dir="$OUT/taught" --examples="$OUT/lessons.jsonl" --eval_problems="$OUT/problems.jsonl"
say "cold start from the policy's own rollouts (§3.2)"
run coldstart coldstart.py config/coldstart_rehearsal.py --init_from="$OUT/taught/final" \
  --out_dir="$OUT/coldstart" --examples= --problems="$OUT/problems.jsonl" --queries_per_round=4 \
  --epochs=1 --learning_rate=1e-5 --eval_problems=
say "difficulty filter (§4.1)"
run filter eval.py config/filter_deepscaler.py --init_from="$OUT/coldstart/final" \
  --problems="$OUT/problems.jsonl" --filter_out="$OUT/filtered.jsonl" --out="$OUT/filter" \
  --temperatures="(0.7,)" --max_new_tokens=80 --dtype=float32

for method in tapo grpo opsd; do
  say "$method"
  run $method train.py config/rehearsal.py --method=$method --init_from="$OUT/coldstart/final" \
    --problems="$OUT/filtered.jsonl" --out_dir="$OUT/$method" \
    --max_steps=$([ $method = tapo ] && echo 2 || echo 1)
done

say "evaluation: five sets in one run"
sets=$OUT/problems.jsonl
for name in gsm8k aime24 aime25 hmmt_feb25; do sets+=,$OUT/data/$name.jsonl; done
run eval eval.py config/eval_aime.py --init_from="$OUT/tapo/step_000002" --out="$OUT/eval" \
  --n_problems=2 --samples=5 --problems="$sets" --max_new_tokens=64 --dtype=float32
grep -A5 "pass@1" "$OUT/eval.log"
python -m tools.report "$OUT"/{tapo,grpo,opsd} --evals="$OUT/eval.json" --out="$OUT/report.html"

say "check of the saved files against transformers"
python -m tools.rehearsal check "$OUT" tapo grpo opsd untrained
say "done"
