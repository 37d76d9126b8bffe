# What the second toy world changes of config/toy.py. Needs data/chain_*.jsonl and its cold start (runs/ablations.sh).
#   python train.py config/toy.py config/chain.py config/tapo.py
init_from = "out/chain/coldstart/final"
problems = "data/chain_train.jsonl"
eval_problems = "data/chain_validation.jsonl"
max_new_tokens = 80
max_synthesis_tokens = 200
out_dir = "out/chain/tapo"
