#!/usr/bin/env bash
# A pretrained language model learns word problems: SFT on worked solutions, cold start from its own
# mistakes (§3.2), difficulty filter (§4.1), then GRPO, TAPO, TAPO as published and OPSD from the
# same start; tables and a page.
#   bash runs/smollm.sh                        # one GPU
#   PRESET=cpu bash runs/smollm.sh             # every phase with few problems and steps, two cores
#   SEEDS=4 METHODS="grpo tapo" bash runs/smollm.sh
# MODEL: a folder or hub id. WORDS: a folder with word_problems_{train,val,test}.jsonl, made by
# tools.prepare if it is not there. Finished phases are skipped, interrupted ones go on.
# OUT/phases.jsonl has the seconds and the memory of each.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
OUT=${OUT:-out/smollm} WORDS=${WORDS:-data/word_problems}
PRESET=${PRESET:-gpu} SEEDS=${SEEDS:-1} METHODS=${METHODS:-grpo tapo published opsd}
case $PRESET in
  gpu) RATES=${RATES:-5e-6 2e-5} SIDE=${SIDE:-4} STEPS=60
       N_SOLVED=100000 N_TRAIN=100000 N_HELD_OUT=100000
       all=() sft=() cold=() filter=() rl=() ev=() ;;
  cpu) RATES=${RATES:-2e-5} SIDE=${SIDE:-2} STEPS=3 N_SOLVED=240 N_TRAIN=64 N_HELD_OUT=24
       export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # two processes side by side
       all=(--dtype="${DTYPE:-float32}")
       sft=(--batch_size=8 --tokens_per_microbatch=1024 --threads=2)
       cold=("${sft[@]}" --queries_per_round=16 --n_sft=8 --epochs=4)
       filter=(--threads=2 --max_rows=128) ev=(--samples=4 --pass_k="(1,4)" --max_rows=128)
       rl=(--prompts_per_step=4 --eval_samples=2 --eval_interval=0 --save_interval=1
           --tokens_per_microbatch=2048 --warmup_steps=1) ;;
  *) echo "PRESET=$PRESET is unknown; use gpu or cpu"; exit 1 ;;
esac
phase() { python -m tools.phase "$OUT" "$@"; }
# a failed phase has said so itself
at_once() { while (($(jobs -rp | wc -l) >= SIDE)); do wait -n || true; done; }

mkdir -p "$OUT/data"
[ -f "$WORDS/word_problems_train.jsonl" ] ||
  phase data 600 python -m tools.prepare word_problems --out="$WORDS"
head -n "$N_TRAIN" "$WORDS/word_problems_train.jsonl" > "$OUT/data/train.jsonl"
head -n "$N_HELD_OUT" "$WORDS/word_problems_val.jsonl" > "$OUT/data/val.jsonl"
test=$WORDS/word_problems_test.jsonl
grep '"solution"' "$WORDS/word_problems_train.jsonl" | head -n "$N_SOLVED" \
  > "$OUT/data/solved.jsonl" || true
grep '"SVAMP"' "$test" | head -n "$N_HELD_OUT" > "$OUT/data/svamp.jsonl" || true
grep -v '"SVAMP"' "$test" | head -n "$N_HELD_OUT" > "$OUT/data/rest.jsonl" || true

evaluate() {  # evaluate NAME FOLDER
  phase "eval_$1" 1200 python eval.py config/words_eval.py "${all[@]}" "${ev[@]}" --init_from="$2" \
    --out="$OUT/eval/$1" --problems="$OUT/data/svamp.jsonl,$OUT/data/rest.jsonl"
}
train() {  # train METHOD RATE SEED
  phase "$1_lr$2_s$3" 3600 python train.py config/words.py "config/$1.py" "${all[@]}" "${rl[@]}" \
    --max_steps=$STEPS --learning_rate="$2" --seed="$3" --init_from="$OUT/coldstart/final" \
    --problems="$OUT/data/filtered.jsonl" --eval_problems="$OUT/data/val.jsonl" \
    --out_dir="$OUT/runs/$1_lr$2_s$3" --resume=True
}
best_rate() {  # best_rate METHOD: the one whose seed 0 ends best on the validation problems
  python - "$OUT/runs" "$1" <<'PY'
import json, pathlib, sys
def final(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n") if line]
    return rows[-1].get("eval/pass1", -1.0)
found = list(pathlib.Path(sys.argv[1]).glob(f"{sys.argv[2]}_lr*_s0"))
print(max(found, key=final).name.split("_lr")[1].removesuffix("_s0"))
PY
}

phase sft 1800 python coldstart.py config/words_sft.py "${all[@]}" "${sft[@]}" \
  --init_from="$MODEL" --examples="$OUT/data/solved.jsonl" --out_dir="$OUT/sft" --resume=True
phase coldstart 1800 python coldstart.py config/words_coldstart.py "${all[@]}" "${cold[@]}" \
  --init_from="$OUT/sft/final" --problems="$OUT/data/train.jsonl" --out_dir="$OUT/coldstart" \
  --resume=True
phase filter 1800 python eval.py config/words_filter.py "${all[@]}" "${filter[@]}" \
  --init_from="$OUT/coldstart/final" --problems="$OUT/data/train.jsonl" \
  --filter_out="$OUT/data/filtered.jsonl" --out="$OUT/filter"

for rate in $RATES; do for method in $METHODS; do at_once; train $method $rate 0 & done; done
wait
declare -A rate_of
for method in $METHODS; do
  rate_of[$method]=$(best_rate $method)
  echo "== $method: learning rate ${rate_of[$method]}"
done
at_once; evaluate solutions "$OUT/sft/final" &  # "sft" would be the method, SFT on y_ref
at_once; evaluate coldstart "$OUT/coldstart/final" &
for ((seed = 0; seed < SEEDS; seed++)); do
  for method in $METHODS; do
    run=${method}_lr${rate_of[$method]}_s$seed
    at_once
    { train $method "${rate_of[$method]}" $seed &&
      evaluate ${method}_s$seed "$OUT/runs/$run/step_$(printf %06d $STEPS)"; } &
  done
done
wait

list() { for ((s = 0; s < SEEDS; s++)); do echo "$OUT/eval/$1_s$s.json"; done | paste -sd+; }
groups=() runs=() names=(solutions coldstart)
for method in $METHODS; do
  groups+=("$(list $method)")
  for ((s = 0; s < SEEDS; s++)); do
    runs+=("$OUT/runs/${method}_lr${rate_of[$method]}_s$s")
    names+=("${method}_s$s")
  done
done
for name in "${names[@]}"; do
  echo "-- $name"
  grep -A 30 "95 % intervals over problems" "$OUT/logs/eval_$name.log" |
    grep -E "^(set|svamp|rest) " || true
done
if ((${#groups[@]} > 1)); then python -m tools.compare "${groups[@]}" --out="$OUT/compare.json"; fi
python -m tools.report "${runs[@]}" --out="$OUT/report.html" \
  --evals="$(ls "$OUT"/eval/*_s*.json "$OUT"/eval/{solutions,coldstart}.json | paste -sd,)"
# log-probs and prompts, judged by transformers
python -m tools.rehearsal check "$OUT/runs" "$(basename "${runs[0]}")"
