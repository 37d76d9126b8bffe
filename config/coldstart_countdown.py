# The cold start of the second toy world. Two seeds stopped after 3,000 and 2,600 steps at 50 and
# 43 % held-out Pass@1, nearly all gained after step 1,600. Pass@8 is then 95 %.
#   python toy.py countdown --levels=3
#   python coldstart.py config/coldstart_toy.py config/coldstart_countdown.py
init_from = "data/countdown/model"
examples = "data/countdown/coldstart.jsonl"
eval_problems = "data/countdown/validation.jsonl"
out_dir = "out/countdown/coldstart"

max_new_tokens = 57         # as in RL: room for one retry (48), and for the longest construction
stop_at_pass1 = 0.42        # chance: a random number of the range scores 10 %, one random try 18 %
eval_samples = 4            # per problem; about 200 problems
