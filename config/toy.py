# The toy world findx: a few minutes on two CPU cores. Needs data/findx and out/toy/coldstart, which
# runs/toy.sh creates.
#   python train.py config/toy.py config/tapo.py      # or grpo, opsd, published
init_from = "out/toy/coldstart/final"
problems = "data/findx/train.jsonl"
eval_problems = "data/findx/validation.jsonl"
instruction = ""            # the toy's questions are equations, its tokenizer has no English
template = "short"
out_dir = "out/toy/run"     # each method's config file overrides it

max_steps = 60
prompts_per_step = 32
samples_per_prompt = 8
max_new_tokens = 54         # room for one retry; a truncated response is wrong
max_synthesis_tokens = 120
max_rows = 1024             # all at once: rows are nearly free at this model size

learning_rate = 6e-4        # best of three for GRPO, TAPO and OPSD, on validation (docs/tables.md)
warmup_steps = 5
tokens_per_microbatch = 1024
eval_interval = 20
eval_samples = 4
save_interval = 20
threads = 1                 # a second thread gains nothing; run two methods side by side instead
