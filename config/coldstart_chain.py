# The cold start of the other toy world; slower, because three operations must be right in a row.
#   python coldstart.py config/coldstart_toy.py config/coldstart_chain.py
world = "chain"
out_dir = "out/chain/coldstart"

max_steps = 6000
max_new_tokens = 80
max_synthesis_tokens = 200
stop_at_pass1 = 0.41
