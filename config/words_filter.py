# §4.1 for runs/smollm.sh: keep the problems that the cold-started model solves sometimes.
#   python eval.py config/words_filter.py
init_from = "out/smollm/coldstart/final"
problems = "out/smollm/data/train.jsonl"
filter_out = "out/smollm/data/filtered.jsonl"
filter_low = 0.125             # 1 of 8
filter_high = 0.875            # 7 of 8
samples = 8                    # K of training
temperatures = (1.0,)          # as in training
top_ps = (1.0,)
max_new_tokens = 96
max_rows = 4096
dtype = "bfloat16"
out = "out/smollm/filter"
