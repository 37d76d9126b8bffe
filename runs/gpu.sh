#!/usr/bin/env bash
# What only a GPU can show, as a queue: most valuable first, every entry with a time limit and its
# result on disk as soon as it is there, finished ones skipped. So minutes on a bare machine count,
# and the same command goes on later (delete OUT to start anew).
#   TOKENIZER=Qwen/Qwen3-0.6B bash runs/gpu.sh  # a hub id, or a folder with Qwen3's tokenizer files
#   VENV=none MODEL=FOLDER WORDS=FOLDER TOKENIZER=FOLDER bash runs/gpu.sh  # without network
# Results: OUT/phases.jsonl (seconds, memory), OUT/logs, OUT/smollm, OUT/*.json.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
OUT=${OUT:-out/gpu} TOKENIZER=${TOKENIZER:-Qwen/Qwen3-0.6B}
mkdir -p "$OUT"
# one that fails has said so, and does not hold up the next
entry() { python -m tools.phase "$OUT" "$@" || true; }
bench() {
  entry "bench_$1" "$2" python -m tools.bench --dtype=bfloat16 --out="$OUT/bench_$1.json" "${@:3}"
}

# CUDA graphs, no waiting for the device, bf16 kernels, FSDP2 over NCCL
entry tests 180 python -m pytest -q tests/test_gpu.py
# a pretrained model with GRPO and TAPO
entry smollm "${SMOLLM_SECONDS:-600}" env OUT="$OUT/smollm" bash runs/smollm.sh
# Qwen3-0.6B's shape, random weights: three steps; log-probs of sampler and trainer, peak memory
# against tools.plan (kl_coef: a random model solves nothing, and without it no row would have a
# gradient)
entry qwen3_make 60 python -m tools.gpu make "$TOKENIZER" "$OUT/qwen3"
[ -f "$OUT/problems.jsonl" ] || python -c "import toy; from data import save_problems as save
save(toy.make_problems('findx', 'train', 100), '$OUT/problems.jsonl')"
entry qwen3_steps 150 python -m tools.gpu qwen3-0.6b --init_from="$OUT/qwen3" \
  --problems="$OUT/problems.jsonl" --out_dir="$OUT/run_qwen3" --max_steps=3 --prompts_per_step=8 \
  --samples_per_prompt=8 --max_new_tokens=1024 --tokens_per_microbatch=8192 --max_rows=64 \
  --eval_interval=0 --save_interval=0 --dtype=bfloat16 --kl_coef=0.01
# decoding and training on Qwen3's shapes, against transformers and the limits of the machine
bench decode_0p6b 180 --what=rollout --size=qwen3_0p6b --rows=256 \
  --prompt_length=128 --max_new_tokens=192 --repeats=1
bench update_1p7b 120 --what=update --size=qwen3_1p7b --rows=24 \
  --prompt_length=256 --max_new_tokens=768 --repeats=3
bench decode_8b 240 --what=rollout --size=qwen3_8b --rows=64 \
  --prompt_length=1792 --max_new_tokens=96 --repeats=1
