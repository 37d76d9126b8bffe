"""What is measured during a run, and what a person sees of it.

Everything is collected as sums: "name" and, where it is a mean, its denominator "name#"; names that end in "_max" are
maxima. Sums add up over micro-batches and processes, and `means` divides once, at the end.
"""
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import reflect
from rollout import Rollout


def add_up(sums: dict, more: dict) -> None:
    """Add `more` into `sums`; values may be floats or tensors on a device (then nothing here waits for it)."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value
        elif name.endswith("_max"):
            sums[name] = value.maximum(sums[name]) if hasattr(value, "maximum") else max(value, sums[name])
        else:
            sums[name] = sums[name] + value


def means(sums: dict) -> dict[str, float]:
    """{"a": 6, "a#": 3, "b": 2} -> {"a": 2.0, "b": 2.0}. A mean over nothing has no value and is left out."""
    values = {name: float(value) for name, value in sums.items()}
    return {name: value / values.get(name + "#", 1.0) for name, value in values.items()
            if not name.endswith("#") and values.get(name + "#", 1.0) > 0}


def rollout_sums(rollouts: list[Rollout]) -> dict[str, float]:
    """rollout/*: of the step's ordinary rollouts; lengths in tokens."""
    sums: dict[str, float] = {}

    def add(name: str, values) -> None:
        values = list(values)
        add_up(sums, {f"rollout/{name}": float(sum(values)), f"rollout/{name}#": len(values)})

    add("pass1", (r.reward for r in rollouts))
    add("length", (len(r.completion_ids) for r in rollouts))
    add("length_correct", (len(r.completion_ids) for r in rollouts if r.reward > 0))
    add("length_wrong", (len(r.completion_ids) for r in rollouts if r.reward == 0))
    add("truncated", (not r.finished for r in rollouts))
    add("reflect_rate", (reflect.reflects(r.text) for r in rollouts))
    for grade in ("no_answer", "unparsable", "timeout", "error"):  # counted apart from wrong (trap 23)
        add(grade, (r.grade == grade for r in rollouts))
    rewards: dict[int, set] = {}
    for r in rollouts:
        rewards.setdefault(r.query, set()).add(r.reward)
    add("zero_variance_groups", (len(values) == 1 for values in rewards.values()))
    sums["rollout/tokens"] = float(sum(len(r.completion_ids) for r in rollouts))
    return sums


def warnings_of(m: dict[str, float], dry_steps: int, lost_steps: int, c) -> list[str]:
    """What a run that cannot learn looks like, to be said where it cannot be missed. c: the config. In a row: dry_steps had
    no eligible query, lost_steps had candidates of which none became a construction."""
    found = []
    if m["rollout/truncated"] == 1:
        found.append(f"every response was truncated at max_new_tokens = {c.max_new_tokens}: raise it, or check the stop ids")
    if m["rollout/zero_variance_groups"] == 1:
        why = ("too hard for this model, or its answers do not follow the format" if m["rollout/pass1"] < 0.5
               else "too easy for this model")
        found.append("this run cannot learn from such a step: in every group all rewards are equal, so every advantage is 0 "
                     f"(mean reward {m['rollout/pass1']:.2f}: the problems are {why})")
    if m["train/parity_mean"] > c.parity_alarm:
        found.append(f"sampler and trainer disagree: mean |log-prob gap| {m['train/parity_mean']:.3f} is above parity_alarm = "
                     f"{c.parity_alarm}: stale weights, or another temperature or mask in one of the two")
    if m["train/skipped"]:
        found.append(f"the update was skipped: loss {m['train/loss']}, gradient norm {m['train/grad_norm']}; "
                     f"max_bad_steps = {c.max_bad_steps} such steps in a row end the run")
    if lost_steps >= 3:
        reason = max(reflect.DROP_REASONS, key=lambda name: m.get(f"reflect/dropped_{name}", 0))
        found.append(f"no construction came of any candidate in {lost_steps} steps, so this is GRPO: most are {reason}; "
                     f"{reflect.DROP_REASONS[reason]}")
    if c.method in ("tapo", "sft") and dry_steps >= 20:
        found.append(f"no query was eligible for {dry_steps} steps (Eq. 3 with n_pos = {c.n_pos}, n_neg = {c.n_neg}): "
                     f"{c.method} has nothing to reflect upon")
    return found


def console_line(step: int, m: dict[str, float], c) -> str:
    """The numbers a person watches, one line a step."""
    def show(name: str, form: str) -> str:
        value = m.get(name, math.nan)
        return "-" if math.isnan(value) else format(value, form)

    parts = [f"step {step:4d}/{c.max_steps}",
             f"pass@1 {show('rollout/pass1', '.3f')}",
             f"len {show('rollout/length', '.1f')} cut {show('rollout/truncated', '.2f')}",
             f"loss {show('train/loss', '+.4f')} grad {show('train/grad_norm', '.3f')} kl {show('train/kl_ref', '.4f')}"]
    if c.method in ("tapo", "sft"):
        parts.append(f"y_ref {show('reflect/kept', '.0f')}/{show('reflect/candidates', '.0f')} "
                     f"right {show('reflect/correct', '.2f')} mixed {show('reflect/mixed_groups', '.2f')} "
                     f"ots {show('train/ots_weight', '.2f')}")
    return " | ".join([*parts, f"lr {show('train/lr', '.1e')}", f"{show('time/step', '.2f')} s"])


def open_log(log_to: str, config: dict, first_step: int) -> Callable[[int, dict[str, float]], None]:
    """What to call with (step, metrics) besides writing metrics.jsonl. wandb and tensorboard are imported only if asked for.

    A resumed run goes on in the same place. The steps that it does once more are there already: tensorboard drops the old
    values, wandb keeps them.
    """
    if not log_to:
        return lambda step, metrics: None
    out = Path(config["out_dir"])
    try:
        if log_to == "wandb":
            import wandb
        else:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f"log_to = {log_to!r} needs a package that is not installed: `pip install {log_to}`, or leave log_to "
                         "out, metrics.jsonl holds the same numbers") from None
    out.mkdir(parents=True, exist_ok=True)
    if log_to == "wandb":
        mark = out / "wandb_id"  # lives and goes with the run's folder: a new run in its place is another one to wandb, too
        if not mark.is_file():
            mark.write_text(secrets.token_hex(4))
        try:
            run = wandb.init(project=os.environ.get("WANDB_PROJECT", "tapo"), name=config["out_dir"], id=mark.read_text(),
                             resume="allow", dir=str(out), config=config)
        except Exception as e:  # no login, no network
            raise ValueError(f"log_to = 'wandb': {e} Log in, or set WANDB_MODE=offline and `wandb sync` later") from None
        return lambda step, metrics: run.log(metrics, step=step)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def write(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a kill loses nothing

    return write
