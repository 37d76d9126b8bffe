# On-policy self-distillation (arXiv 2601.18734): the model conditioned on a right solution is the
# teacher, the model given the question alone is the student.
#   python train.py config/toy.py config/opsd.py
method = "opsd"
out_dir = "out/toy/opsd"
