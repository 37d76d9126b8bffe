# The smallest honest run on a real model: Qwen3-0.6B-Base, GSM8K, one GPU of 24 GiB. We have not
# run it. What others saw of GRPO at this size: a base model gained 17 points (38.2 to 55.2 %,
# maokaicheng.me/en/blog/grpo-math-reasoning), the post-trained one lost 10 on GSM8K
# (ritwikraha.dev/posts/2026-02-28-verifier-rl-grpo-math.html): so start from the base.
#   python -m tools.prepare gsm8k
#   python -m tools.prepare gsm8k_train
#   python coldstart.py config/coldstart_qwen3_0p6b_gsm8k.py
#   python train.py config/qwen3_0p6b_gsm8k.py
# After it, paired with the start:
#   python eval.py --init_from=out/gsm8k/tapo/step_000200 --problems=data/gsm8k.jsonl \
#     --max_new_tokens=512 --samples=4 --dtype=bfloat16 --max_rows=64 --out=out/gsm8k/eval_tapo
# Baseline: add --method=grpo --out_dir=out/gsm8k/grpo. None of these numbers is the paper's but K,
# Eq. 3's and lr. tools.plan --gpus=1 --gpu_gb=24, prompts taken for 1,024 tokens: peak 21.4 GiB =
# persistent 9.7 + sampling 11.7 (update 7.4).
init_from = "out/gsm8k/coldstart/final"
problems = "data/gsm8k_train.jsonl"
eval_problems = "data/gsm8k.jsonl"
out_dir = "out/gsm8k/tapo"

max_steps = 200
prompts_per_step = 16
samples_per_prompt = 8
max_new_tokens = 512           # GSM8K needs 150 to 300
max_synthesis_tokens = 768
max_rows = 24                  # reflections decide: 3,328 tokens of keys and values a row, 0.36 GiB
learning_rate = 1e-6           # the usual one
warmup_steps = 10
checkpoint_activations = True  # without it a micro-batch is a single row
dtype = "bfloat16"
eval_interval = 100
eval_samples = 1               # of 1,319 problems: a standard error of 1.3 points
