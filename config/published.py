# TAPO as published in §3: Eq. 5's advantages, Eq. 6's two means, the diagnosis trained under
# OTS (Eq. 8).
#   python train.py config/toy.py config/published.py
method = "tapo"
ref_advantage = "group"
loss_norm = "separate"
diagnosis = "ots"
out_dir = "out/toy/published"
