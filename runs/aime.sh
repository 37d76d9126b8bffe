#!/usr/bin/env bash
# The paper's main experiment (§4) on one node of eight 80 GB GPUs, phase by phase. Finished phases
# are skipped and interrupted ones resumed, so the same command continues after a kill. DRY=1 only
# prints the commands.
#   MODEL=Qwen/Qwen3-8B OUT=out/aime GPUS=8 bash runs/aime.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen3-8B} OUT=${OUT:-out/aime} GPUS=${GPUS:-8} GPU_GB=${GPU_GB:-80} DRY=${DRY:-}
[ -n "$DRY" ] || source runs/setup.sh
exec 3>&1
run() { echo "+ $*" >&3; [ -n "$DRY" ] || "$@"; }
on_all() { run torchrun --standalone --nproc_per_node="$GPUS" "$@"; }
[ -n "$DRY" ] || mkdir -p "$OUT/eval" data

# evaluate NAME MODEL CONFIG PROBLEM_FILES [KNOBS]: each GPU samples a shard of the problems, then
# one process computes the scores
evaluate() {
  local name=$1 model=$2 config=$3 problems=$4 share log pids=()
  shift 4
  if [ -f "$OUT/eval/$name.json" ]; then return; fi
  # sampling noise depends only on the problem, so shards draw the samples of a single process
  for ((gpu = 0; gpu < GPUS; gpu++)); do
    share="$OUT/eval/$name.gpu$gpu" log=${DRY:+/dev/null}
    [ -n "$DRY" ] || awk "NR % $GPUS == $gpu" ${problems//,/ } > "$share.problems.jsonl"
    run env CUDA_VISIBLE_DEVICES="$gpu" python eval.py "$config" --init_from="$model" \
      --problems="$share.problems.jsonl" --out="$share" "$@" --filter_out= \
      > "${log:-$share.log}" 2>&1 & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || { tail -n 3 "$OUT/eval/$name".gpu*.log; exit 1; }; done
  if [ -z "$DRY" ]; then  # merge the shards, with one header line
    { cat "$OUT/eval/$name.gpu0.samples.jsonl"; for ((gpu = 1; gpu < GPUS; gpu++)); do
      tail -n +2 "$OUT/eval/$name.gpu$gpu.samples.jsonl"; done; } > "$OUT/eval/$name.samples.jsonl"
  fi
  run python eval.py "$config" --init_from="$model" --problems="$problems" \
    --out="$OUT/eval/$name" "$@"
}
contests() {
  evaluate "$1" "$2" config/eval_aime.py data/aime24.jsonl,data/aime25.jsonl,data/hmmt_feb25.jsonl
}

echo "== memory and compute plans of the cold start and TAPO"
plan() { run python -m tools.plan "$@" --init_from="$MODEL" --gpus="$GPUS" --gpu_gb="$GPU_GB"; }
plan coldstart.py config/coldstart_aime.py
plan train.py config/aime.py

echo "== data: evaluation sets first, so that overlapping training problems are removed"
for name in aime24 aime25 hmmt_feb25 deepscaler; do
  [ -f "data/$name.jsonl" ] || run python -m tools.prepare "$name" --out="data/$name.jsonl"
done

echo "== evaluation of the base model (§4.1)"
contests base "$MODEL"

echo "== cold start (§3.2): sampling and construction, then three epochs"
[ -f "$OUT/coldstart/final/meta.json" ] ||
  on_all coldstart.py config/coldstart_aime.py --init_from="$MODEL" --out_dir="$OUT/coldstart" \
    --resume=True
contests coldstart "$OUT/coldstart/final"

echo "== difficulty filter: training queries that the cold-start policy sometimes solves (§4.1)"
[ -f "$OUT/filtered.jsonl" ] || {
  run rm -f "$OUT/eval/filter.json"  # killed between the two writes; the samples are reused
  evaluate filter "$OUT/coldstart/final" config/filter_deepscaler.py data/deepscaler.jsonl \
    --filter_out="$OUT/filtered.jsonl"
}

for method in grpo opsd tapo; do
  echo "== $method: one epoch, then evaluation"
  last=$OUT/$method/step_000500
  [ -f "$last/meta.json" ] ||
    on_all train.py config/aime.py --method=$method --init_from="$OUT/coldstart/final" \
      --problems="$OUT/filtered.jsonl" --out_dir="$OUT/$method" --resume=True
  contests $method "$last"
done

echo "== results"
evals=("$OUT"/eval/{coldstart,grpo,opsd,tapo}.json)
run python -m tools.compare "${evals[@]}"
run python -m tools.report "$OUT"/{tapo,grpo,opsd} --out="$OUT/report.html" \
  --evals="$OUT/eval/base.json$(printf ",%s" "${evals[@]}")"
echo "== open $OUT/report.html"
