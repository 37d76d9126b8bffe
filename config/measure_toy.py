#   python -m tools.measure config/measure_toy.py --init_from=out/toy/tapo_s0/step_000060
problems = "data/findx/validation.jsonl"
out = "out/toy/measured.json"
n_problems = 200
instruction = ""
continuations = 2
max_rows = 1024             # as in config/toy.py
