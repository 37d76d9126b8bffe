# TAPO. Its knobs are train.py's defaults; what is said here is what the toy world needs.
#   python train.py config/toy.py config/tapo.py
method = "tapo"
ref_advantage = "reward"    # in the toy nearly every construction is right: Eq. 5 would give 0 everywhere (see RESULTS)
out_dir = "out/toy/tapo"
