# RL on word problems with SmolLM2-135M, settings shared by all methods; needs the cold start of
# runs/smollm.sh.
#   python train.py config/words.py config/tapo.py --out_dir=out/smollm/tapo
init_from = "out/smollm/coldstart/final"
problems = "out/smollm/data/filtered.jsonl"
eval_problems = "out/smollm/data/val.jsonl"
template = "short"             # as in the cold start

max_steps = 60
prompts_per_step = 32          # §4.1
samples_per_prompt = 8         # §4.1: K
max_new_tokens = 96            # a solution has 26 tokens; room for a reflection and a retry
max_synthesis_tokens = 256
max_rows = 1024                # all at once
learning_rate = 1e-5           # runs/smollm.sh tries rates on the validation problems
warmup_steps = 5
tokens_per_microbatch = 16384  # runs/smollm.sh has four runs share a GPU
eval_interval = 20
eval_samples = 4               # per problem; 361 problems: a standard error of 1.2 points
save_interval = 20
keep_last = 1
dtype = "bfloat16"
