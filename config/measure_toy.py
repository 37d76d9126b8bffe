# python measure.py config/measure_toy.py --init_from=out/toy/tapo_s0/step_000060 --out=out/toy/tapo_s0.measured.json
problems = "data/findx_validation.jsonl"
out = "out/toy/measured.json"
n_problems = 200
continuations = 2
max_rows = 1024             # as in config/toy.py
