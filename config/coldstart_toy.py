# A 177k-parameter model learns findx from random weights, in minutes on one CPU thread.
#   python toy.py findx --levels=1 && python coldstart.py config/coldstart_toy.py
init_from = "data/findx/model"              # random weights, and the toy's tokenizer
examples = "data/findx/coldstart.jsonl"     # worked examples of both formats, one epoch
eval_problems = "data/findx/validation.jsonl"
instruction = ""
template = "short"          # with --problems: the synthesis prompt in the toy's vocabulary
out_dir = "out/toy/coldstart"

epochs = 1
batch_size = 16
learning_rate = 4e-3
warmup_steps = 50
weight_decay = 0.1
beta2 = 0.99
tokens_per_microbatch = 1024
max_new_tokens = 54         # as in RL: room for one retry
max_rows = 1024             # all at once: rows are nearly free at this model size

stop_at_pass1 = 0.34        # headroom for RL; pilot runs that compared methods started here
eval_interval = 200
eval_samples = 1            # x 352 problems: about as many samples as 4 x 100 problems
save_interval = 200
threads = 1                 # a second thread gains nothing at this model size
