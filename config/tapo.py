# TAPO as the toy world needs it: it differs from train.py's defaults, Eq. 5 and 6, in two knobs.
#   python train.py config/toy.py config/tapo.py
method = "tapo"
# Nearly every construction of the toy is right: under Eq. 5 their advantages would all be 0.
ref_advantage = "reward"
# A mean over all rollouts: as a loss of their own, three constructions would weigh as much as 256.
loss_norm = "merged"
out_dir = "out/toy/tapo"
