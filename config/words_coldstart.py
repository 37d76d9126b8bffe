# §3.2 for runs/smollm.sh: from the model's own right and wrong answers, both formats.
#   python coldstart.py config/words_coldstart.py
init_from = "out/smollm/sft/final"
problems = "out/smollm/data/train.jsonl"
out_dir = "out/smollm/coldstart"
synthesis = "rule"             # 135M parameters do not follow the prompt: 0 of 12 could be parsed
template = "short"             # 150 tokens; the long one, of 700, is for a model that reads it

# few: with as many as n_ift 85 % of the answers reflect afterwards, on right steps too
n_sft = 100
n_ift = 1000                   # the paper's 30,000 and 15,000 in small: what a thousand pairs give
queries_per_round = 512
samples_per_prompt = 8         # K of the training that follows
max_new_tokens = 96            # room for a solution, a remark and a second try
max_synthesis_tokens = 256
max_rows = 4096                # a row of 250 tokens takes 6 MB
epochs = 2
batch_size = 64
learning_rate = 1e-4
warmup_steps = 10
eval_interval = 0
save_interval = 0
dtype = "bfloat16"
