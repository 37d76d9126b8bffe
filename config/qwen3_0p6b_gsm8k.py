# The smallest meaningful run on a real model: Qwen3-0.6B-Base, GSM8K, one GPU of 24 GiB. We have
# not run it. GRPO results reported by others at this size: a base model gained 17 points (38.2 to
# 55.2 %, maokaicheng.me/en/blog/grpo-math-reasoning), the post-trained model lost 10 on GSM8K
# (ritwikraha.dev/posts/2026-02-28-verifier-rl-grpo-math.html), so start from the base model.
#   python -m tools.prepare gsm8k
#   python -m tools.prepare gsm8k_train
#   python coldstart.py config/coldstart_qwen3_0p6b_gsm8k.py
#   python train.py config/qwen3_0p6b_gsm8k.py
# Then evaluate, paired with the cold start:
#   python eval.py --init_from=out/gsm8k/tapo/step_000200 --problems=data/gsm8k.jsonl \
#     --max_new_tokens=512 --samples=4 --dtype=bfloat16 --max_rows=64 --out=out/gsm8k/eval_tapo
# Baseline: add --method=grpo --out_dir=out/gsm8k/grpo. Of these numbers only K, Eq. 3's and lr are
# the paper's. tools.plan --gpus=1 --gpu_gb=24, prompts of 1,024 tokens assumed: peak 20.2 GiB =
# persistent 7.8 + sampling 12.4 (update 8.6).
init_from = "out/gsm8k/coldstart/final"
problems = "data/gsm8k_train.jsonl"
eval_problems = "data/gsm8k.jsonl"
out_dir = "out/gsm8k/tapo"

max_steps = 200
prompts_per_step = 16
samples_per_prompt = 8
max_new_tokens = 512           # GSM8K needs 150 to 300
max_synthesis_tokens = 768
max_rows = 24                  # limited by reflections: KV cache of 3,328 tokens a row, 0.36 GiB
learning_rate = 1e-6           # the usual value
warmup_steps = 10
checkpoint_activations = True  # without it a micro-batch is a single row
dtype = "bfloat16"
eval_interval = 100
eval_samples = 1               # per problem; 1,319 problems: a standard error of 1.3 points
