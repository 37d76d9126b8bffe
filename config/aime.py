# The paper's main experiment (§4.1), Qwen3-8B in non-thinking mode; runs/aime.sh prepares the
# inputs. Baselines: --method=grpo or opsd. The paper's loss on the diagnosis: --diagnosis=ots.
#   torchrun --nproc_per_node=8 train.py config/aime.py --init_from=out/aime/coldstart/final
#   python -m tools.plan train.py config/aime.py --gpus=8 --gpu_gb=80   # 63 of 80 GiB a GPU
init_from = "Qwen/Qwen3-8B"    # §4.1. runs/aime.sh passes the cold-started policy (§3.2)
# §4.1: accuracy of the cold-started policy within [0.125, 0.875], about 16k
problems = "data/deepscaler_filtered.jsonl"
out_dir = "out/aime/tapo"

max_steps = 500                # §4.1: one epoch of 16k queries; the ablations of §4.3 end at 200
prompts_per_step = 32          # §4.1
samples_per_prompt = 8         # §4.1: K
n_pos = 2                      # §4.1, Eq. 3
n_neg = 4                      # §4.1, Eq. 3
m_max = 4                      # §4.1
w_min = 0.01                   # §4.1, Eq. 7
w_max = 10.0                   # §4.1, Eq. 7
lam = 1.0                      # §4.1, Eq. 6
learning_rate = 1e-6           # §4.1: AdamW, warm-up, cosine
warmup_steps = 25              # length not given in the paper
diagnosis = "mask"             # NOT the paper's: it trains the diagnosis under Eq. 7 ("ots")

# Not in the paper, chosen with tools.plan for 8 GPUs of 80 GiB:
max_new_tokens = 8192          # the paper's responses have 2,000 to 5,000 tokens (§4.3)
max_synthesis_tokens = 9216    # a reconstruction as long as a response + 1,024 for the analysis
max_rows = 0                   # as memory holds: KV cache of 9k tokens a rollout, 27k a reflection
checkpoint_activations = True  # without it activations of 16k tokens take 94 GiB
dtype = "bfloat16"
eval_interval = 0              # eval.py evaluates the contests once, at a step fixed in advance
save_interval = 50             # 98 GB per checkpoint: fp32 weights and both moments
