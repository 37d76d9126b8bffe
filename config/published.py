# TAPO as published in §3: group-normalised advantages (Eq. 5), separate loss means (Eq. 6), the
# diagnosis trained under OTS (Eq. 8).
#   python train.py config/toy.py config/published.py
method = "tapo"
ref_advantage = "group"
loss_norm = "separate"
diagnosis = "ots"
out_dir = "out/toy/published"
