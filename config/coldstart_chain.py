# The cold start of the world chain: twelve minutes, because several operations must be right in a row.
#   python coldstart.py config/coldstart_toy.py config/coldstart_chain.py
world = "chain"
levels = ()                 # 2 to 5 operations
n_problems = (8000, 500, 1000)
out_dir = "out/chain/coldstart"

max_steps = 6000
max_new_tokens = 80
max_synthesis_tokens = 200
stop_at_pass1 = 0.41
