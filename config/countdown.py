# What the second toy world changes of config/toy.py. Needs data/countdown (python toy.py countdown
# --levels=3) and its cold start (config/coldstart_countdown.py).
#   python train.py config/toy.py config/countdown.py config/tapo.py
init_from = "out/countdown/coldstart/final"
problems = "data/countdown/train.jsonl"
eval_problems = "data/countdown/validation.jsonl"
max_new_tokens = 57         # room for one retry, and for the longest construction
learning_rate = 1.2e-3      # GRPO and TAPO, on validation problems (docs/tables.md)
out_dir = "out/countdown/tapo"
