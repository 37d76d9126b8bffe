# The cold start of the rehearsal: a tiny model with Qwen3's vocabulary overfits a few examples.
# See runs/rehearsal.sh.
#   python coldstart.py config/coldstart_rehearsal.py
init_from = "out/rehearsal/tiny"
examples = "out/rehearsal/lessons.jsonl"
eval_problems = "out/rehearsal/problems.jsonl"  # training problems: others are too hard
out_dir = "out/rehearsal/taught"

epochs = 45
batch_size = 4                 # 72 examples: 18 steps an epoch
learning_rate = 5e-3
warmup_steps = 20
beta2 = 0.99
tokens_per_microbatch = 900    # one IFT row each: the head then skips its long prompt
temperature = 0.7              # as in RL
max_new_tokens = 80
max_synthesis_tokens = 128
eval_interval = 0
save_interval = 100
