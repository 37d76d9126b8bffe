# tools.measure on word problems, for runs/smollm.sh.
#   python -m tools.measure config/measure_words.py --init_from=out/smollm/coldstart/final
problems = "out/smollm/data/val.jsonl"
out = "results/smollm/svamp/measured/coldstart_c0.json"
max_new_tokens = 96
max_synthesis_tokens = 256
max_rows = 1024
tokens_per_microbatch = 16384
