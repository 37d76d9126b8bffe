"""What a run leaves on disk: whole or not at all.

    out_dir/step_000040/     a plain Hugging Face folder (transformers and vLLM load it) with, beside the weights,
        optimizer/           AdamW's moments, by torch.distributed.checkpoint: saved by N processes, loaded by any M
        meta.json            step and config; written last, a folder without it does not count
    out_dir/metrics.jsonl    one row a step
    out_dir/rollouts/        every rollout and reflection of every step

Everything is written under a temporary name and renamed, so a kill at any moment leaves the previous state usable.
Data order, noise and learning rate are functions of the step counter: there is no random state to save (trap 22).
"""
import json
import os
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from configurator import diff_configs
from model import save_hf

# With one process dcp warns that it assumes one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# Knobs that a resumed run may change: they decide where and how often, not what is learned.
MAY_CHANGE = {"resume", "device", "threads", "max_rows", "eval_interval", "eval_samples", "save_interval", "keep_last",
              "out_dir", "parity_alarm", "replicas", "offload", "timeout_minutes",
              "plan", "plan_gpus", "plan_gpu_gb", "checkpoint_activations"}


def write_lines(path: Path, rows: list[dict]) -> None:
    """Replace a jsonl file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def keep_log(path: Path, last_step: int) -> None:
    """Drop the rows after last_step from metrics.jsonl: a run killed after its last checkpoint will run those again. A last
    line torn by the kill goes with them."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    write_lines(path, [row for row in rows if row["step"] <= last_step])


def checkpoints(out_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(folder for folder in out_dir.glob("step_*") if (folder / "meta.json").is_file())


def save_checkpoint(folder: Path, model, tokenizer, optimizer, step: int, config: dict, keep_last: int) -> None:
    """Write one checkpoint, then delete all but the newest keep_last; all processes call this together.

    ValueError when it cannot be written (disk full): the older ones are intact and the message names the newest of them.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    partial = folder.with_name("." + folder.name)
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        moments = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        if first:
            save_hf(model, tokenizer, partial, state_dict=weights)
        dcp.save(moments, checkpoint_id=partial / "optimizer", no_dist=not dist.is_initialized())
        if first:
            (partial / "meta.json").write_text(json.dumps({"step": step, "config": config}, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    except (OSError, SafetensorError, CheckpointException) as e:  # "no space left", as each of the writers puts it
        shutil.rmtree(partial, ignore_errors=True)
        older = checkpoints(folder.parent)
        where = older[-1] if older else "the start, as there is no earlier checkpoint"
        reason = " ".join(str(e).split())
        raise ValueError(f"cannot save {folder} ({reason}); free space, then --resume=True goes on from {where}") from e
    if first:
        for old in checkpoints(folder.parent)[:-keep_last]:
            shutil.rmtree(old)


def load_optimizer(folder: Path, model, optimizer) -> None:
    """Put the moments of a checkpoint back, whatever number of processes wrote them."""
    moments = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(moments, checkpoint_id=folder / "optimizer", no_dist=not dist.is_initialized())
    set_optimizer_state_dict(model, optimizer, moments["optimizer"])


def find_start(config: dict) -> tuple[int, str]:
    """(steps already done, folder to load the policy from): init_from, or with resume the last checkpoint of out_dir.

    ValueError when out_dir holds a run that is not to be resumed, or when the resumed run would be another one.
    """
    out, found = Path(config["out_dir"]), checkpoints(Path(config["out_dir"]))
    if not config["resume"]:
        if (out / "metrics.jsonl").exists():
            raise ValueError(f"out_dir = {out} already holds a run; continue it with --resume=True, or choose another out_dir")
        return 0, config["init_from"]
    if not found:
        print(f"no checkpoint in {out}: starting from {config['init_from']}")
        return 0, config["init_from"]
    meta = json.loads((found[-1] / "meta.json").read_text())
    changed = [line for line in diff_configs(meta["config"], config) if line.split(":")[0] not in MAY_CHANGE]
    if changed:
        raise ValueError(f"resume = True, but the config has changed since {found[-1]}: {'; '.join(changed)}; set these back, "
                         f"or start a new run with --init_from={found[-1]} and another out_dir")
    return meta["step"], str(found[-1])
