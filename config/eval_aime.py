# §4.1: Pass@1..5 at T 0.6, top-p 0.9. The paper draws 5 samples in each of 16 runs and averages
# over runs; the closed form on all 80 samples has the same expectation and less noise.
#   python -m tools.prepare aime24        # and aime25, hmmt_feb25
#   python eval.py config/eval_aime.py --init_from=Qwen/Qwen3-8B --out=out/eval/base
problems = "data/aime24.jsonl,data/aime25.jsonl,data/hmmt_feb25.jsonl"
samples = 80
temperatures = (0.6,)
top_ps = (0.9,)
pass_k = (1, 2, 3, 4, 5)
max_new_tokens = 16384         # not in the paper, whose responses grow to 5,000 tokens in training
# Qwen3-8B on one GPU of 80 GiB: weights 15.3 GiB; KV cache of a row of 1,024 + 16,384 tokens at
# 36 layers x 2 x 8 heads x 128 x 2 bytes 2.5 GiB; peak 67 of 73.6 GiB. 80 samples are 4 x 20 rows.
max_rows = 20
dtype = "bfloat16"
