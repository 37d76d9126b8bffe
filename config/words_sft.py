# The start of runs/smollm.sh: a small instruction model learns one-line solutions of word problems
# (GSM8K's long ones teach it far less: Pass@1 12 % instead of 22).
#   python coldstart.py config/words_sft.py   # after runs/smollm.sh has made its examples
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
examples = "out/smollm/data/solved.jsonl"  # training problems with a worked solution, 2,263
out_dir = "out/smollm/sft"

epochs = 2                     # a third makes it surer, not better; RL needs answers that differ
batch_size = 64
learning_rate = 3e-4           # the usual size for a model this small
warmup_steps = 10
max_new_tokens = 96            # a solution has 26 tokens on average, 98 at most
eval_interval = 0
save_interval = 0              # half a minute on a GPU
dtype = "bfloat16"
