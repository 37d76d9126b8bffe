# On-policy self-distillation (arXiv 2601.18734): the model that sees a right solution
# teaches the one that does not.
#   python train.py config/toy.py config/opsd.py
method = "opsd"
out_dir = "out/toy/opsd"
