# §4.1: keep the training queries that the cold-start model solves sometimes. Writes
# data/deepscaler_filtered.jsonl, with the accuracy on each problem; the same command continues
# after a kill.
#   python -m tools.prepare deepscaler
#   python eval.py config/filter_deepscaler.py --init_from=out/aime/coldstart/final
problems = "data/deepscaler.jsonl"
filter_out = "data/deepscaler_filtered.jsonl"
filter_low = 0.125             # 1 of 8
filter_high = 0.875            # 7 of 8
samples = 8                    # K of training: 0 of 8 and 8 of 8 would give no advantage
temperatures = (1.0,)          # as in training
top_ps = (1.0,)
max_new_tokens = 8192
# Qwen3-8B on one GPU of 80 GiB: weights 15.3 GiB; KV cache of a row of 1,024 + 8,192 tokens at
# 36 layers x 2 x 8 heads x 128 x 2 bytes 1.3 GiB; peak 67 of 73.6 GiB.
max_rows = 40
dtype = "bfloat16"
out = "out/filter_deepscaler"
