#!/usr/bin/env bash
# What only a GPU can show, on one of 80 GB: tests/test_gpu.py (CUDA graphs, no waiting for the device, bf16 kernels);
# bench.py on Qwen3's shapes, against transformers and the limits of the machine; bf16 training of the toy and of a random model
# of Qwen3-0.6B's shape, three steps each (reported: |log-prob of sampler - trainer| of every step, and peak memory against what
# --plan predicts).
#   TOKENIZER=Qwen/Qwen3-0.6B bash runs/gpu.sh     # a hub id, or a folder with Qwen3's tokenizer files
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
OUT=${OUT:-out/gpu} TOKENIZER=${TOKENIZER:-Qwen/Qwen3-0.6B}
python -m pytest -q tests/test_gpu.py
bench() { python bench.py --dtype=bfloat16 --out="$OUT/bench_$1.json" "${@:2}"; }
mkdir -p "$OUT"
bench decode_8b --what=rollout --size=qwen3_8b --rows=64 --prompt_length=1792 --max_new_tokens=256 --repeats=1
bench decode_0p6b --what=rollout --size=qwen3_0p6b --rows=256 --prompt_length=128 --max_new_tokens=512 --repeats=2
# attention: cuDNN plans anew for every new shape of the cache; is it faster without?
TORCH_CUDNN_SDPA_DEPRIORITIZED=1 bench decode_0p6b_without_cudnn --what=rollout --size=qwen3_0p6b --rows=256 --prompt_length=128 \
  --max_new_tokens=512 --repeats=1
bench update_1p7b --what=update --size=qwen3_1p7b --rows=24 --prompt_length=256 --max_new_tokens=768 --repeats=3
[ -f "$OUT/toy/final/meta.json" ] ||
  python coldstart.py config/coldstart_toy.py --out_dir="$OUT/toy" --problems_dir="$OUT/data" --max_steps=700 --stop_at_pass1=0 \
    --eval_interval=0 --resume=True
# kl_coef: a random model solves nothing, and without it no row would have a gradient
python tests/gpu.py toy config/toy.py --init_from="$OUT/toy/final" --problems="$OUT/data/findx_train.jsonl" --eval_problems= \
  --out_dir="$OUT/run_toy" --max_steps=3 --dtype=bfloat16 --kl_coef=0.01
python tests/gpu.py make "$TOKENIZER" "$OUT/random"
python tests/gpu.py qwen3-0.6b --init_from="$OUT/random" --problems="$OUT/data/findx_train.jsonl" --out_dir="$OUT/run_random" \
  --max_steps=3 --prompts_per_step=8 --samples_per_prompt=8 --max_new_tokens=1024 --tokens_per_microbatch=8192 --max_rows=64 \
  --save_interval=0 --dtype=bfloat16 --kl_coef=0.01
