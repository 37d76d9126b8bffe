# Test word problems, not used to choose any setting: SVAMP, and the other test problems.
#   python eval.py config/words_eval.py --init_from=out/smollm/coldstart/final --out=out/smollm/eval
problems = "out/smollm/data/svamp.jsonl,out/smollm/data/rest.jsonl"
samples = 16
temperatures = (1.0, 0.6)      # as in training, and §4.1's
top_ps = (1.0, 0.9)
pass_k = (1, 8)
max_new_tokens = 96
max_rows = 4096
dtype = "bfloat16"
