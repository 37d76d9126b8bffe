# A 177k-parameter model learns the world findx from nothing: one CPU thread, minutes.
#   python toy.py findx --levels=1 && python coldstart.py config/coldstart_toy.py
init_from = "data/findx/model"              # random weights, and the toy's tokenizer
examples = "data/findx/coldstart.jsonl"     # worked examples of both formats, seen once each
eval_problems = "data/findx/validation.jsonl"
instruction = ""
out_dir = "out/toy/coldstart"

epochs = 1
batch_size = 16
learning_rate = 4e-3
warmup_steps = 50
weight_decay = 0.1
beta2 = 0.99
tokens_per_microbatch = 1024
max_new_tokens = 54         # as in RL: room for one retry
max_rows = 1024             # all at once: rows of so small a model cost next to nothing

stop_at_pass1 = 0.34        # RL needs room: the probes that compared methods started here
eval_interval = 200
eval_samples = 1            # of 352 problems: as many samples as 4 of 100 problems
save_interval = 200
threads = 1                 # so small a model gains nothing from a second thread
