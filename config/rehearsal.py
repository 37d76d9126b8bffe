# Real problems with Qwen3's tokenizer for a tiny model: all of train.py. See runs/rehearsal.sh.
#   python train.py config/rehearsal.py --method=grpo --max_steps=1 --out_dir=out/rehearsal/grpo
init_from = "out/rehearsal/taught/final"
problems = "out/rehearsal/problems.jsonl"
out_dir = "out/rehearsal/tapo"

max_steps = 2
prompts_per_step = 6
samples_per_prompt = 8         # the paper's K; n_pos = 2, n_neg = 4 by default, also the paper's
temperature = 0.7              # less mass on the tail of 151,669 tokens: the model is undertrained
max_new_tokens = 80
max_synthesis_tokens = 128

learning_rate = 1e-5
warmup_steps = 1
tokens_per_microbatch = 2048
