# The paper's cold start (§3.2): Qwen3-8B learns to diagnose itself, from its own right and wrong
# rollouts on DeepScaleR. One corrective trajectory per query at most.
#   torchrun --nproc_per_node=8 coldstart.py config/coldstart_aime.py
init_from = "Qwen/Qwen3-8B"    # §4.1
problems = "data/deepscaler.jsonl"  # §3.2: about 40k queries
out_dir = "out/aime/coldstart"

n_sft = 30000                  # §3.2: question -> trajectory
n_ift = 15000                  # §3.2: synthesis prompt -> analysis + reconstruction
epochs = 3                     # §3.2
learning_rate = 5e-6           # §3.2: cosine
warmup_steps = 50              # §3.2

# Not in the paper:
batch_size = 32
samples_per_prompt = 8         # K of the RL phase
max_new_tokens = 8192
max_synthesis_tokens = 9216
max_rows = 0                   # as many as memory holds
queries_per_round = 64         # 8 per GPU
checkpoint_activations = True
dtype = "bfloat16"
eval_interval = 0
