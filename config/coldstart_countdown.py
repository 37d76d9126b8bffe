# The cold start of the third toy world. Two seeds stopped after 3,000 and 2,600 steps, with 50 and 43 % of the held-out problems;
# nearly all of it is gained after step 1,600. 95 % are then solved by one of eight samples.
#   python coldstart.py config/coldstart_toy.py config/coldstart_countdown.py
world = "countdown"
levels = ("3",)             # three numbers; four ("4", max_new_tokens = 75) are not tried yet
n_problems = (0, 0, 0)      # all there are: 1,656 train, 206 validation, 225 test
out_dir = "out/countdown/coldstart"

max_steps = 6000
max_new_tokens = 57         # as in RL: room for one retry (48), and for the longest construction
max_synthesis_tokens = 120
stop_at_pass1 = 0.42        # picking a number of the range is right in 10 %, one random try in 18 %
n_eval = 200
