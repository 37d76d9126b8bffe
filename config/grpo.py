# GRPO, the baseline: Eq. 1 and 2 alone.
#   python train.py config/toy.py config/grpo.py
method = "grpo"
out_dir = "out/toy/grpo"
