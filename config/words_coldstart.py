# §3.2 for runs/smollm.sh: both formats, from the model's own right and wrong rollouts.
#   python coldstart.py config/words_coldstart.py
init_from = "out/smollm/sft/final"
problems = "out/smollm/data/train.jsonl"
out_dir = "out/smollm/coldstart"
synthesis = "rule"             # a 135M model does not follow the prompt: 0 of 12 syntheses parsed
template = "short"             # 150 tokens; "long" has 700 and needs a stronger model

# few: with n_sft = n_ift 85 % of the responses then reflect, even after right steps
n_sft = 100
n_ift = 1000                   # 30,000 and 15,000 in the paper; about a thousand pairs here
queries_per_round = 512
samples_per_prompt = 8         # K of the RL phase
max_new_tokens = 96            # room for a solution, a reflection and a retry
max_synthesis_tokens = 256
max_rows = 4096                # a row of 250 tokens takes 6 MB
epochs = 2
batch_size = 64
learning_rate = 1e-4
warmup_steps = 10
eval_interval = 0
save_interval = 0
dtype = "bfloat16"
