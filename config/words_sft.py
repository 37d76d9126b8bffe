# First phase of runs/smollm.sh: SFT of a small instruction model on one-line solutions of word
# problems (GSM8K's long solutions give far less: Pass@1 12 % instead of 22).
#   python coldstart.py config/words_sft.py   # after runs/smollm.sh has made its examples
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
examples = "out/smollm/data/solved.jsonl"  # training problems with a worked solution, 2,263
out_dir = "out/smollm/sft"

epochs = 2                     # a third lowers entropy, not errors; RL needs diverse answers
batch_size = 64
learning_rate = 3e-4           # the usual size for a model this small
warmup_steps = 10
max_new_tokens = 96            # a solution has 26 tokens on average, 98 at most
eval_interval = 0
save_interval = 0              # no intermediate checkpoints: half a minute on a GPU
dtype = "bfloat16"
