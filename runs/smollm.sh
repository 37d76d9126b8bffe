#!/usr/bin/env bash
# The experiment on a pretrained model, SmolLM2-135M on word problems: SFT on worked solutions,
# cold start from its own mistakes (§3.2), difficulty filter (§4.1), a learning rate for each method
# on validation problems, then paired seeds of every method from the same start, seed by seed.
#   bash runs/smollm.sh                        # one GPU
#   PRESET=cpu bash runs/smollm.sh             # every phase with few problems and steps, two cores;
#                                              # DTYPE=bfloat16: faster on CPUs with bf16 kernels
#   SEEDS="0 1" METHODS="grpo tapo" bash runs/smollm.sh
# MODEL: a folder or hub id. WORDS: a folder with word_problems_{train,val,test}.jsonl, made by
# tools.prepare if missing. Finished phases are skipped and interrupted ones resumed, so the same
# command extends an earlier run. RESULTS keeps the evaluations, metrics and measurements of each
# finished run, and the tables cover everything in RESULTS; OUT/phases.jsonl has the seconds and
# the memory of each phase.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
PRESET=${PRESET:-gpu}
case $PRESET in gpu) at="" ;; *) at=_$PRESET ;; esac  # keep trials apart from the experiment
OUT=${OUT:-out/smollm$at} RESULTS=${RESULTS:-results/smollm$at} WORDS=${WORDS:-data/word_problems}
case $PRESET in
  gpu) SEEDS=${SEEDS:-0 1 2 3 4 5 6 7}
       METHODS=${METHODS:-grpo tapo copy grpo_long published opsd faithful}
       RATES=${RATES:-5e-6 2e-5} SIDE=${SIDE:-4} STEPS=${STEPS:-60}
       N_SOLVED=100000 N_TRAIN=100000 N_HELD_OUT=100000
       all=() sft=() cold=() filter=() rl=() ev=() looked=() ;;
  cpu) SEEDS=${SEEDS:-0} METHODS=${METHODS:-grpo tapo copy}
       RATES=${RATES:-2e-5} SIDE=${SIDE:-2} STEPS=${STEPS:-3}
       N_SOLVED=${N_SOLVED:-240} N_TRAIN=${N_TRAIN:-64} N_HELD_OUT=${N_HELD_OUT:-24}
       export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # two processes in parallel
       all=(--dtype="${DTYPE:-float32}")
       sft=(--batch_size=8 --tokens_per_microbatch=1024 --threads=2 --save_interval=20)
       cold=("${sft[@]}" --queries_per_round=16 --n_sft=8 --epochs=4)
       filter=(--threads=2 --max_rows=128) ev=(--samples=8 --max_rows=128)
       looked=(--n_problems=8 --max_rows=128 --tokens_per_microbatch=1024)
       rl=(--prompts_per_step=4 --eval_samples=2 --eval_interval=0 --save_interval=1
           --tokens_per_microbatch=2048 --warmup_steps=1) ;;
  *) echo "PRESET=$PRESET is unknown; use gpu or cpu"; exit 1 ;;
esac
phase() { python -m tools.phase "$OUT" "$@"; }
# wait for one of SIDE slots; tools.phase has reported a failed phase
at_once() { while (($(jobs -rp | wc -l) >= SIDE)); do wait -n || true; done; }

mkdir -p "$OUT/data" "$RESULTS"
[ -f "$WORDS/word_problems_train.jsonl" ] ||
  phase data 600 python -m tools.prepare word_problems --out="$WORDS"
head -n "$N_TRAIN" "$WORDS/word_problems_train.jsonl" > "$OUT/data/train.jsonl"
head -n "$N_HELD_OUT" "$WORDS/word_problems_val.jsonl" > "$OUT/data/val.jsonl"
test=$WORDS/word_problems_test.jsonl
grep '"solution"' "$WORDS/word_problems_train.jsonl" | head -n "$N_SOLVED" \
  > "$OUT/data/solved.jsonl" || true
grep '"SVAMP"' "$test" | head -n "$N_HELD_OUT" > "$OUT/data/svamp.jsonl" || true
grep -v '"SVAMP"' "$test" | head -n "$N_HELD_OUT" > "$OUT/data/rest.jsonl" || true

flags_of() {  # flags_of METHOD: config file and flags
  case $1 in
    copy) echo config/tapo.py --prefix_mode=copy ;;        # control: is it imitation of y+?
    faithful) echo config/tapo.py --keep=faithful ;;       # no constructions with a false equation
    grpo_long) echo config/grpo.py ;;                      # control: TAPO's wall time
    *) echo "config/$1.py" ;;
  esac
}
steps_of() {  # steps_of METHOD: for grpo_long those that fit into TAPO's time, by the tuning runs
  [ "$1" = grpo_long ] || { echo "$STEPS"; return; }
  if [ ! -f "$OUT/long_steps" ]; then  # counted once: a later call must resume with as many
    python - "$OUT/runs" "$STEPS" > "$OUT/long_steps.new" <<'PY' || return 1
import pathlib, statistics, sys
import jsonl
def seconds(method):
    logs = pathlib.Path(sys.argv[1]).glob(f"tune_{method}_*/metrics.jsonl")
    rows = [row for log in logs for row in jsonl.read(log)]
    if not rows:
        sys.exit(f"grpo_long needs tuning runs of {method}: two RATES, grpo and tapo in METHODS")
    return statistics.mean(row["time/step"] for row in rows)
print(round(int(sys.argv[2]) * seconds("tapo") / seconds("grpo")))
PY
    mv "$OUT/long_steps.new" "$OUT/long_steps"
  fi
  cat "$OUT/long_steps"
}
train() {  # train NAME METHOD RATE SEED
  phase "$1" 3600 python train.py config/words.py $(flags_of "$2") "${all[@]}" "${rl[@]}" \
    --max_steps="$(steps_of "$2")" --learning_rate="$3" --seed="$4" \
    --init_from="$OUT/coldstart/final" \
    --problems="$OUT/data/filtered.jsonl" --eval_problems="$OUT/data/val.jsonl" \
    --out_dir="$OUT/runs/$1" --resume=True
}
look() {  # look NAME FOLDER: evaluate on both test sets, measure on validation, copy to RESULTS
  local set
  for set in svamp rest; do
    phase "eval_$1_$set" 1200 python eval.py config/words_eval.py "${all[@]}" "${ev[@]}" \
      --init_from="$2" --out="$OUT/eval/$set/$1" --problems="$OUT/data/$set.jsonl"
    mkdir -p "$RESULTS/$set"
    cp "$OUT/eval/$set/$1.json" "$RESULTS/$set/"
  done
  phase "measure_$1" 1200 python -m tools.measure config/measure_words.py "${looked[@]}" \
    --init_from="$2" --problems="$OUT/data/val.jsonl" --out="$RESULTS/svamp/measured/$1.json"
  if [ -d "$OUT/runs/$1" ]; then
    mkdir -p "$RESULTS/svamp/$1"
    cp "$OUT/runs/$1"/{metrics.jsonl,config.json} "$RESULTS/svamp/$1/"
  fi
}
best_rate() {  # best_rate METHOD: learning rate with the best final validation Pass@1, seed 100;
               # the first of RATES if none was tuned
  python - "$OUT/runs" "$1" $RATES <<'PY'
import pathlib, sys
import jsonl
def final(log):
    rows = jsonl.read(log)
    return rows[-1].get("eval/pass1", -1.0) if rows else -1.0
found = [log for log in pathlib.Path(sys.argv[1]).glob(f"tune_{sys.argv[2]}_*/metrics.jsonl")
         if log.parent.name.split("_")[-1] in sys.argv[3:]]
print(max(found, key=final).parent.name.split("_")[-1] if found else sys.argv[3])
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
at_once; look solutions_c0 "$OUT/sft/final" &
at_once; look coldstart_c0 "$OUT/coldstart/final" &

declare -A rate_of
tuned=()
for method in $METHODS; do  # variants of TAPO use TAPO's rate
  case $method in copy | faithful | grpo_long) continue ;; esac
  tuned+=("$method")
  [[ $RATES == *" "* ]] || continue  # a single rate needs no tuning
  for rate in $RATES; do at_once; train "tune_${method}_$rate" "$method" "$rate" 100 & done
done
wait
for method in "${tuned[@]}"; do
  rate_of[$method]=$(best_rate "$method")
  echo "== $method: learning rate ${rate_of[$method]}"
done
rate_of[grpo_long]=${rate_of[grpo]:-}
if [[ " $METHODS " == *" grpo_long "* ]]; then
  long=$(steps_of grpo_long)  # ends here if there are no tuning runs
  echo "== grpo_long: $long steps"
fi
for seed in $SEEDS; do
  for method in $METHODS; do
    at_once
    rate=${rate_of[$method]:-${rate_of[tapo]:-${RATES%% *}}}
    last=step_$(printf %06d "$(steps_of "$method")")
    { train "${method}_s$seed" "$method" "$rate" "$seed" &&
      look "${method}_s$seed" "$OUT/runs/${method}_s$seed/$last"; } &
  done
done
wait

python -m tools.tables "$RESULTS" | tee "$RESULTS/tables.md"
runs=() evals=()
for method in $METHODS; do
  for seed in $SEEDS; do  # finished runs only
    [ ! -f "$RESULTS/svamp/${method}_s$seed.json" ] || {
      runs+=("$OUT/runs/${method}_s$seed") evals+=("$RESULTS/svamp/${method}_s$seed.json"); }
  done
done
((${#runs[@]})) || { echo "no run finished; see $OUT/logs"; exit 1; }
python -m tools.report "${runs[@]}" --out="$OUT/report.html" \
  --evals="$(IFS=,; echo "${evals[*]},$(ls "$RESULTS"/svamp/*_c0.json | paste -sd,)")" \
  --measured="$(ls "$RESULTS"/svamp/measured/*.json | paste -sd,)"
# check log-probs and prompts against transformers
python -m tools.rehearsal check "$OUT/runs" "$(basename "${runs[0]}")"
