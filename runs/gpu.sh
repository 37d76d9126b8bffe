#!/usr/bin/env bash
# Queue of GPU tests and benchmarks, most valuable first. Every entry has a time limit and writes
# its result at once; finished entries are skipped. So a few minutes on a machine are useful, and
# the same command continues later (delete OUT to start over).
#   TOKENIZER=Qwen/Qwen3-0.6B bash runs/gpu.sh  # a hub id, or a folder with Qwen3's tokenizer files
#   VENV=none MODEL=FOLDER WORDS=FOLDER TOKENIZER=FOLDER bash runs/gpu.sh  # without network
# Results: OUT/phases.jsonl (seconds, memory), OUT/logs, OUT/smollm, OUT/*.json.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
OUT=${OUT:-out/gpu} TOKENIZER=${TOKENIZER:-Qwen/Qwen3-0.6B}
mkdir -p "$OUT"
# tools.phase reports a failed entry; the queue continues with the next one
entry() { python -m tools.phase "$OUT" "$@" || true; }
bench() {  # bench NAME SECONDS SIZE ROWS PROMPT_LENGTH MAX_NEW_TOKENS FLAGS
  entry "bench_$1" "$2" python -m tools.bench --dtype=bfloat16 --out="$OUT/bench_$1.json" \
    --size="$3" --rows="$4" --prompt_length="$5" --max_new_tokens="$6" "${@:7}"
}
update() { bench "update_$1" 120 "${@:2:4}" --what=limits,update --repeats=3 "${@:6}"; }

# CUDA graphs, no host syncs, bf16 kernels, FSDP2 over NCCL
entry tests 180 python -m pytest -q tests/test_gpu.py
# decoding throughput against transformers, the roofline, and nano-vllm's published figures
bench nano_0p6b 120 qwen3_0p6b 256 128 192 --what=nano --repeats=2
bench decode_0p6b 150 qwen3_0p6b 256 128 192 --what=rollout --repeats=1
# updates of 16k and 65k ragged tokens, and of the shape of a cold-start step; then compiled
for compile in False True; do
  update 1p7b_16k_$compile qwen3_1p7b 24 256 768 --compile=$compile
  update 0p6b_16k_$compile qwen3_0p6b 24 256 768 --compile=$compile --tokens_per_microbatch=24576
  update 0p6b_65k_$compile qwen3_0p6b 96 256 768 --compile=$compile --tokens_per_microbatch=24576
  update 135m_$compile smollm2_135m 64 64 288 --compile=$compile --tokens_per_microbatch=24576
done
# an evaluation of 27,900 samples; GRPO steps by phase
bench evaluation 150 smollm2_135m 4096 96 192 --what=evaluation
bench phases_135m 120 smollm2_135m 256 96 192 --what=phases --repeats=3
bench phases_0p6b 180 qwen3_0p6b 128 128 512 --what=phases --repeats=2
# a pretrained model with GRPO and TAPO
entry smollm "${SMOLLM_SECONDS:-600}" env OUT="$OUT/smollm" \
  RESULTS="$OUT/smollm/results" bash runs/smollm.sh
# three steps of a randomly initialised Qwen3-0.6B: log-prob parity of sampler and trainer, peak
# memory against tools.plan (kl_coef: with random weights all rewards are 0, so that only the KL
# term has a gradient)
entry qwen3_make 60 python -m tools.gpu make "$TOKENIZER" "$OUT/qwen3"
[ -f "$OUT/problems.jsonl" ] || python -c "import toy; from data import save_problems as save
save(toy.make_problems('findx', 'train', 100), '$OUT/problems.jsonl')"
entry qwen3_steps 150 python -m tools.gpu qwen3-0.6b --init_from="$OUT/qwen3" \
  --problems="$OUT/problems.jsonl" --out_dir="$OUT/run_qwen3" --max_steps=3 --prompts_per_step=8 \
  --samples_per_prompt=8 --max_new_tokens=1024 --tokens_per_microbatch=8192 --max_rows=64 \
  --eval_interval=0 --save_interval=0 --dtype=bfloat16 --kl_coef=0.01
# decoding an 8B model with long prompts; decode-step attention kernels; profile
bench decode_8b 240 qwen3_8b 64 1792 96 --what=rollout --repeats=1
bench attention 90 qwen3_0p6b 256 512 512 --what=attention
bench profile 150 qwen3_0p6b 256 128 192 --what=profile
