"""Helpers of runs/gpu.sh: make a randomly initialised model of Qwen3-0.6B's shape, and report on a
training run.

    python -m tools.gpu make TOKENIZER FOLDER          # random weights, saved with the tokenizer
    python -m tools.gpu NAME [config.py] --key=value   # train.py, then parity and peak memory
"""
import re
import sys
from pathlib import Path

import torch

import failing
import jsonl
import train
from configurator import configure
from data import load_tokenizer
from hf import save_hf
from model import CausalLM, ModelConfig, num_params
from tools.plan import train_table


def make(tokenizer_name: str, folder: str) -> None:
    tokenizer = load_tokenizer(tokenizer_name)
    torch.manual_seed(0)
    # ModelConfig's defaults are Qwen3-0.6B's
    model = CausalLM(ModelConfig(eos_token_id=tokenizer.eos_token_id))
    save_hf(model, tokenizer, folder)
    print(f"{folder}: {num_params(model):,} random parameters, {len(tokenizer):,} tokens")


def report(name: str, argv: list[str]) -> None:
    config = configure(vars(train), argv)
    table = train_table(config)
    print(table)
    failing.run(train.main)
    rows = jsonl.read(Path(config["out_dir"]) / "metrics.jsonl")
    planned = re.search(r"^ +peak +([\d.]+)", table, re.MULTILINE)[1]
    machine, peak = "cpu", "not measured, no GPU"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    gaps = " ".join(f"{row['train/parity_mean']:.1e}" for row in rows)
    largest = " ".join(f"{row['train/parity_max']:.1e}" for row in rows)
    print(
        f"\n{name} on {machine}, {config['dtype']}: |sampler - trainer| mean {gaps} max {largest}; "
        f"peak memory {peak}, planned {planned} GiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"] and len(sys.argv) == 4:
        make(sys.argv[2], sys.argv[3])
    elif len(sys.argv) > 2:
        report(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(__doc__)
