#!/usr/bin/env bash
# Sweep behind docs/tables.md and docs/results.md: methods x seeds, two processes in parallel.
# Finished jobs are skipped and interrupted ones resumed, so the same command continues after a
# kill. Takes hours on two cores.
#   bash runs/ablations.sh                        # everything, then the tables and the report
#   bash runs/ablations.sh 'findx (grpo|tapo) '   # only jobs "WORLD ROW SEED" that match
#   LIST=1 bash runs/ablations.sh                 # the jobs, in order
# Each line of the function `jobs` is a table row: to compare your own variant, add a line.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/ablations} JOBS=${JOBS:-2}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

row() {  # row WORLD NAME SEEDS FLAGS: one job per seed
  local world=$1 name=$2 seed; shift 2
  local seeds=$1; shift
  for seed in $seeds; do echo "$world $name $seed $*"; done
}
EIGHT="0 1 2 3 4 5 6 7" FOUR="0 1 2 3"
QUIET=--log_kl=False                    # the KL is only logged; without it a step is a fifth faster
rate_of() {  # best learning rate on validation problems, if other than the world's config file's
  case $1-$2 in
    countdown-opsd | countdown-luffy) echo --learning_rate=2.4e-3 ;;
    *-sft) echo --learning_rate=3e-5 ;;
  esac
}
tapo() { row "$1" "$2" "${SEEDS:-$FOUR}" config/tapo.py $QUIET "${@:3}"; }

jobs() {
  local world method flag rate seed kl
  # Learning-rate sweep on validation problems, with seeds used for nothing else.
  for method in grpo tapo published opsd; do
    for rate in 3e-4 6e-4 1.2e-3; do
      row findx tune_${method}_$rate "8 9" config/$method.py --learning_rate=$rate $QUIET
    done
    for rate in 3e-4 6e-4 1.2e-3 2.4e-3; do
      case $method in grpo | tapo) seed="8 9" ;; *) seed=8 ;; esac
      row countdown tune_${method}_$rate "$seed" config/$method.py --learning_rate=$rate $QUIET
    done
  done
  # OPSD's best rate was the highest of the four, so a higher one is tried
  row countdown tune_opsd_4.8e-3 8 config/opsd.py --learning_rate=4.8e-3 $QUIET
  for rate in 3e-5 1e-4 3e-4; do  # SFT on y_ref: RL's best rates are far too high
    row findx tune_sft_$rate "8 9" config/tapo.py --method=sft --learning_rate=$rate $QUIET
  done
  for method in luffy replace; do
    case $method in luffy) flag=--weighting=luffy ;; replace) flag=--prefix_mode=replace ;; esac
    for rate in 3e-4 6e-4 1.2e-3; do
      row findx tune_${method}_$rate "8 9" config/tapo.py $flag --learning_rate=$rate $QUIET
    done
    for rate in 6e-4 1.2e-3 2.4e-3; do
      row countdown tune_${method}_$rate "8 9" config/tapo.py $flag --learning_rate=$rate $QUIET
    done
  done
  for seed in $EIGHT; do for world in findx countdown; do  # Table 1, all methods of a seed first
    kl=$QUIET; if [ "$seed" -lt 2 ]; then kl=; fi
    row $world grpo $seed config/grpo.py $kl
    row $world tapo $seed config/tapo.py $kl
    SEEDS=$seed tapo $world copy --prefix_mode=copy        # control: is it imitation of y+?
    if [ "$seed" -lt 4 ]; then
      row $world published $seed config/published.py $(rate_of $world published) $kl
      row $world opsd $seed config/opsd.py $(rate_of $world opsd) $kl
    fi
  done; done
  for world in findx countdown; do                         # ours: components of 'published'
    tapo $world ref_group --ref_advantage=group
    tapo $world separate --loss_norm=separate
    tapo $world luffy --weighting=luffy $(rate_of $world luffy)  # related: LUFFY's weights
    tapo $world replace --prefix_mode=replace              # related: error repaired, not kept
    tapo $world faithful --keep=faithful                   # no constructions with a false equation
  done
  row findx sft "$FOUR" config/tapo.py --method=sft $(rate_of findx sft) $QUIET  # Table 3
  tapo findx full --prefix_mode=full
  tapo findx wo_dae_ots_neg --decoupled=False --weighting=none --keep=right  # Table 4
  tapo findx wo_ots_neg --weighting=none --keep=right
  tapo findx wo_ots --weighting=none
  tapo findx wo_dae --decoupled=False                      # ours: DAE alone removed
  tapo findx zpd_222 --n_pos=2 --n_neg=2 --m_max=2         # Table 5; 2, 4, 4 is TAPO
  tapo findx zpd_224 --n_pos=2 --n_neg=2 --m_max=4
  tapo findx zpd_153 --n_pos=1 --n_neg=5 --m_max=3
  tapo findx diagnosis_ots --diagnosis=ots                 # ours: training on diagnosis tokens
  tapo findx diagnosis_train --diagnosis=train
  tapo findx diagnosis_train_wo_ots --diagnosis=train --weighting=none
  row findx grpo_long "$FOUR" config/grpo.py --max_steps=95 $QUIET  # wall time of TAPO's 60 steps
  row countdown grpo_long "$FOUR" config/grpo.py --max_steps=80 $QUIET
  for method in grpo tapo opsd; do                         # Table 1, no cold start
    row findx base_$method "$FOUR" config/$method.py $QUIET
  done
  tapo findx prefix_masked --train_prefix=False            # ours: no gradient on the prefix
  tapo findx ref_orig --ref_advantage=orig                 # ours: baseline = the rollouts' mean
}

settings() {  # settings WORLD train|eval: config files and flags of that script
  case $1-$2 in
    findx-train) echo config/toy.py ;;
    *-train) echo config/toy.py "config/$1.py" ;;
    findx-eval) echo config/eval_toy.py ;;
    countdown-eval)
      echo config/eval_toy.py --problems=data/countdown/test.jsonl --max_new_tokens=57 ;;
  esac
}
data() {  # data WORLD FOLDER [FLAGS]: problems, worked examples and a randomly initialised model
  local world=$1 folder=$2 level; shift 2
  case $world in findx) level=1 ;; countdown) level=3 ;; esac
  [ -f "$folder/model/config.json" ] ||
    python toy.py "$world" --levels="$level" --out="$folder" "$@"
}
logged() {  # logged LOG COMMAND: append the output to LOG; print its last lines on failure
  local log=$1; shift
  python "$@" >> "$log" 2>&1 || { echo "FAILED: $*"; tail -n 5 "$log"; return 1; }
}
# start_of WORLD ROW SEED: kind and number of the cold start; seeds 0 and 4 share one, 1 and 5, ...
start_of() {
  local kind=coldstart
  case $2 in base_*) kind=base ;; esac
  echo "$kind $(($3 % 4))"
}
coldstart() {  # coldstart WORLD KIND NUMBER: each with its own examples and random weights
  local world=$1 kind=$2 folder=$OUT/$1/$2_c$3 made=$OUT/$1/data_c$3
  local flags=(config/coldstart_toy.py) kinds=()
  if [ "$world" != findx ]; then flags+=("config/coldstart_$world.py"); fi
  if [ "$kind" = base ]; then  # examples without reflections
    made=$OUT/$world/data_base_c$3 kinds=(--kinds=direct,give_up)
  fi
  mkdir -p "$OUT/$world"
  data "$world" "$made" --seed="$3" "${kinds[@]}" >> "$folder.log"
  logged "$folder.log" coldstart.py "${flags[@]}" --init_from="$made/model" \
    --examples="$made/coldstart.jsonl" --seed="$3" --out_dir="$folder" --resume=True
  [ -f "$folder.json" ] || logged "$folder.log" eval.py $(settings "$world" eval) \
    --init_from="$folder/final" --out="$folder"
  echo "$(date +%T) $world $kind $3"
}
# run WORLD ROW SEED FLAGS: train from the cold start of its seed, then evaluate on test problems
run() {
  local world=$1 name=$2 seed=$3 folder=$OUT/$1/$2_s$3; shift 3
  local kind number
  read -r kind number <<< "$(start_of "$world" "$name" "$seed")"
  [ ! -f "$folder.json" ] || return 0
  logged "$folder.log" train.py $(settings "$world" train) "$@" --seed="$seed" \
    --out_dir="$folder" --resume=True --init_from="$OUT/$world/${kind}_c$number/final"
  case $name in
    tune_*) cp "$folder/config.json" "$folder.json" ;;  # metrics.jsonl suffices, no test problems
    *) logged "$folder.log" eval.py $(settings "$world" eval) --out="$folder" \
         --init_from="$(ls -d "$folder"/step_* | tail -n 1)" ;;
  esac
  echo "$(date +%T) $world $name seed $seed: $(grep -c '"step"' "$folder/metrics.jsonl") steps"
}

measure() {  # measure WORLD RUN: tools.measure on its last checkpoint, on validation problems
  local world=$1 folder=$OUT/$1/$2 out=$OUT/$1/measured/$2.json flags=(config/measure_toy.py) last
  if [ -f "$out" ]; then return; fi
  case $world in countdown) flags+=(--max_new_tokens=57) ;; esac
  last=$folder/final
  [ -d "$last" ] || last=$(ls -d "$folder"/step_* | tail -n 1)
  logged "$folder.log" -m tools.measure "${flags[@]}" --init_from="$last" --out="$out" \
    --problems="data/$world/validation.jsonl"
  echo "$(date +%T) $world $2 measured"
}

case ${1:-} in
  job-coldstart) coldstart "${@:2}"; exit ;;
  job-run) run "${@:2}"; exit ;;
  job-measure) measure "${@:2}"; exit ;;
esac
if [ -n "${LIST:-}" ]; then jobs; exit; fi
source runs/setup.sh
mkdir -p "$OUT"
jobs | grep -E "${1:-.}" > "$OUT/jobs"
for world in $(cut -d " " -f 1 "$OUT/jobs" | sort -u); do data "$world" "data/$world"; done
while read -r world name seed _; do
  echo "$world $(start_of "$world" "$name" "$seed")"
done < "$OUT/jobs" | awk '!seen[$0]++' |
  xargs -P "$JOBS" -L 1 bash runs/ablations.sh job-coldstart
xargs -P "$JOBS" -L 1 bash runs/ablations.sh job-run < "$OUT/jobs"

MAIN="grpo tapo copy published opsd"  # rows to measure and plot; scores cover all cold-started rows
echo "== measurements, on the first four seeds"
for world in "$OUT"/*/; do
  for name in coldstart $MAIN; do
    for mark in c0 c1 c2 c3 s0 s1 s2 s3; do
      [ ! -d "$world${name}_$mark" ] || echo "$(basename "$world") ${name}_$mark"
    done
  done
done | xargs -P "$JOBS" -L 1 bash runs/ablations.sh job-measure

python -m tools.tables "$OUT" | tee "$OUT/tables.md"
# archive of the tables' input files
tar cJf "$OUT.tar.xz" "$OUT"/*/*.json "$OUT"/*/measured "$OUT"/*/*/{config.json,metrics.jsonl}
for world in "$OUT"/*/; do
  runs=() evals=()
  for name in $MAIN; do
    for folder in "$world$name"_s*/; do [ ! -d "$folder" ] || runs+=("$folder"); done
  done
  for name in $MAIN coldstart '*'; do
    for file in "$world"$name"_"[cs]*.json; do
      if [[ ! -f $file || $file == *tune_* || $file == */base* ]]; then continue; fi
      [[ " ${evals[*]} " == *" $file "* ]] || evals+=("$file")
    done
  done
  ((${#evals[@]})) || continue  # only tuning runs
  python -m tools.report "${runs[@]}" --evals="$(IFS=,; echo "${evals[*]}")" \
    --measured="$(ls "$world"measured/*.json | paste -sd,)" \
    --out="${world%/}.html" --png="${world}figures"
done
