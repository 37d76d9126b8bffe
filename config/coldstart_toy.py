# A 175k-parameter model learns the world findx from nothing: one CPU thread, minutes. Leaves out/toy/coldstart/final
# and data/findx_{train,validation,test}.jsonl.
#   python coldstart.py config/coldstart_toy.py
init_from = "scratch"
world = "findx"
levels = ("1",)             # x*a+b and x*a-b with values below 50: what two cores learn in minutes
instruction = ""
template = "short"
out_dir = "out/toy/coldstart"

max_steps = 3000
batch_size = 16
learning_rate = 4e-3
warmup_steps = 50
weight_decay = 0.1
beta2 = 0.99
tokens_per_microbatch = 1024
max_new_tokens = 54         # as in RL: room for one retry
max_synthesis_tokens = 120

stop_at_pass1 = 0.34        # RL needs room to improve: the probes that compared methods started here
eval_interval = 200
eval_samples = 4
n_eval = 100
n_problems = (0, 0, 0)      # all there are: 3,005 train, about 370 validation and test
save_interval = 200
threads = 1                 # so small a model gains nothing from a second thread
