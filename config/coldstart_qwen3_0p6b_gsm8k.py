# §3.2 for the run of config/qwen3_0p6b_gsm8k.py: a model this small rarely follows the synthesis
# prompt, so SFT on its right constructions comes first.
#   python -m tools.prepare gsm8k_train
#   python coldstart.py config/coldstart_qwen3_0p6b_gsm8k.py
init_from = "Qwen/Qwen3-0.6B-Base"
problems = "data/gsm8k_train.jsonl"
out_dir = "out/gsm8k/coldstart"

n_sft = 2000                   # the paper's ratio of 2 : 1, at a fifteenth of its size
n_ift = 1000
max_new_tokens = 512
max_synthesis_tokens = 768
max_rows = 24
dtype = "bfloat16"
eval_interval = 0
