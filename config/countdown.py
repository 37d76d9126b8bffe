# Changes to config/toy.py for the second toy world. Needs data/countdown (python toy.py countdown
# --levels=3) and the cold start (config/coldstart_countdown.py).
#   python train.py config/toy.py config/countdown.py config/tapo.py
init_from = "out/countdown/coldstart/final"
problems = "data/countdown/train.jsonl"
eval_problems = "data/countdown/validation.jsonl"
max_new_tokens = 57         # room for one retry, and for the longest construction
learning_rate = 1.2e-3      # best for GRPO and TAPO on validation (docs/tables.md)
out_dir = "out/countdown/tapo"
