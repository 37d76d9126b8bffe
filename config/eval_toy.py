# Held-out problems of the toy world, at the training temperature and at the paper's (§4.1).
#   python eval.py config/eval_toy.py --init_from=out/toy/tapo/step_000060 --out=out/toy/tapo/eval
problems = "data/findx/test.jsonl"  # 401 problems
instruction = ""               # the toy prompt is the bare question
samples = 16
temperatures = (1.0, 0.6)
top_ps = (1.0, 0.9)
pass_k = (1, 8)
max_new_tokens = 54
max_rows = 1024                # rows are nearly free at this model size: fuller batches
threads = 1
