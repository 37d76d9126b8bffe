# What the third toy world changes of config/toy.py. Needs data/countdown_*.jsonl and its cold start (runs/ablations.sh).
#   python train.py config/toy.py config/countdown.py config/tapo.py
init_from = "out/countdown/coldstart/final"
problems = "data/countdown_train.jsonl"
eval_problems = "data/countdown_validation.jsonl"
max_new_tokens = 57         # room for one retry, and for the longest construction
learning_rate = 1.2e-3      # GRPO and TAPO, on validation problems (RESULTS.md)
out_dir = "out/countdown/tapo"
