# TAPO for the toy world: two knobs differ from train.py's defaults, which are Eq. 5 and 6.
#   python train.py config/toy.py config/tapo.py
method = "tapo"
# Nearly every construction of the toy is right: under Eq. 5 their advantages would all be 0.
ref_advantage = "reward"
# One mean over all rows: with separate means, 3 constructions would weigh as much as 256 rollouts.
loss_norm = "merged"
out_dir = "out/toy/tapo"
