"""The parts of runs/gpu.sh that no script of the project does: a random model of Qwen3-0.6B's shape, and a report after a run.

    python tests/gpu.py make TOKENIZER FOLDER          # random weights, the tokenizer's own vocabulary
    python tests/gpu.py NAME [config.py] --key=value   # train.py in this process, then parity and peak memory
"""
import contextlib
import io
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import failing  # noqa: E402
import train  # noqa: E402
from configurator import configure  # noqa: E402
from data import load_tokenizer  # noqa: E402
from model import CausalLM, ModelConfig, save_hf  # noqa: E402


class Tee(io.StringIO):
    """Keeps what it shows."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        return super().write(text)


def make(tokenizer_name: str, folder: str) -> None:
    tokenizer = load_tokenizer(tokenizer_name)
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(eos_token_id=tokenizer.eos_token_id))  # the defaults are Qwen3-0.6B's
    save_hf(model, tokenizer, folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} random parameters, {len(tokenizer):,} tokens")


def report(name: str, argv: list[str]) -> None:
    config = configure(vars(train), argv)
    printed = Tee()
    with contextlib.redirect_stdout(printed):
        failing.run(train.main)
    rows = [json.loads(line) for line in (Path(config["out_dir"]) / "metrics.jsonl").read_text().splitlines()]
    planned = re.search(r"^ +peak +([\d.]+)", printed.getvalue(), re.MULTILINE)[1]
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if torch.cuda.is_available() else "not measured, no GPU"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"\n{name} on {machine}, {config['dtype']}: |sampler - trainer| mean",
          *(f"{row['train/parity_mean']:.1e}" for row in rows), "max", *(f"{row['train/parity_max']:.1e}" for row in rows),
          f"; peak memory {peak}, planned {planned} GiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"] and len(sys.argv) == 4:
        make(sys.argv[2], sys.argv[3])
    elif len(sys.argv) > 2:
        report(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(__doc__)
