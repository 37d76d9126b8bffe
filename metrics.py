"""Training metrics, console output, wandb and tensorboard.

Metrics are collected as sums: "name" and, if the metric is a mean, its denominator "name#"; names
that end in "_max" are maxima. Sums add up over micro-batches and processes; `means` divides once.
"""
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch

import reflect
from advantage import kl_to_ref
from parallel import gather, rank, world_size
from reward import score
from rollout import CORRECTION, DIAGNOSIS, EVALUATION, PREFIX, Rollout, sample_rollouts


def add_up(sums: dict, more: dict) -> None:
    """Add `more` into `sums`; values may be floats, or tensors on a device (no host sync then)."""
    for name, value in more.items():
        if name not in sums:
            sums[name] = value
        elif name.endswith("_max"):
            is_tensor = hasattr(value, "maximum")
            sums[name] = value.maximum(sums[name]) if is_tensor else max(value, sums[name])
        else:
            sums[name] = sums[name] + value


def reduce_sums(sums: dict[str, float]) -> dict[str, float]:
    """Sums added up over all ranks ("_max": the maximum); ranks may have different names."""
    total: dict[str, float] = {}
    for part in gather([sums]):
        add_up(total, part)
    return total


def means(sums: dict) -> dict[str, float]:
    """{"a": 6, "a#": 3, "b": 2} -> {"a": 2.0, "b": 2.0}. Means with denominator 0 are omitted."""
    values = {name: float(value) for name, value in sums.items()}
    return {name: value / values.get(name + "#", 1.0) for name, value in values.items()
            if not name.endswith("#") and values.get(name + "#", 1.0) > 0}


def sums_of(prefix: str, values: dict[str, list]) -> dict[str, float]:
    """{prefix + name: sum, prefix + name + "#": count} of each list."""
    sums = {}
    for name, several in values.items():
        sums[prefix + name] = float(sum(several))
        sums[prefix + name + "#"] = float(len(several))
    return sums


def rollout_sums(rollouts: list[Rollout]) -> dict[str, float]:
    """rollout/* of the step's ordinary rollouts; lengths in tokens."""
    rewards: dict[int, set] = {}
    for r in rollouts:
        rewards.setdefault(r.query, set()).add(r.reward)
    lengths = [len(r.completion_ids) for r in rollouts]
    values = {
        "pass1": [r.reward for r in rollouts],
        "length": lengths,
        "length_correct": [len(r.completion_ids) for r in rollouts if r.reward > 0],
        "length_wrong": [len(r.completion_ids) for r in rollouts if r.reward == 0],
        "truncated": [not r.finished for r in rollouts],
        "reflect_rate": [reflect.reflects(r.text) for r in rollouts],
        "zero_variance_groups": [len(values) == 1 for values in rewards.values()]}
    for grade in ("no_answer", "unparsable", "timeout", "error"):  # separate from wrong (trap 23)
        values[grade] = [r.grade == grade for r in rollouts]
    return sums_of("rollout/", values) | {"rollout/tokens": float(sum(lengths))}


def reflect_sums(selected: dict[str, int], outcomes: list[Rollout | str],
                 kept: int) -> dict[str, float]:
    """reflect/* of one step, always with the same keys.

    selected: the counts of select_pairs. outcomes: for each candidate its drop reason, or its
    scored y_ref, after the update with logprobs and ots_weights. kept: how many y_ref pass
    reflect.is_kept.
    """
    built = [r for r in outcomes if not isinstance(r, str)]
    lost = [reason for reason in outcomes if isinstance(reason, str)]
    groups: dict[str, set[float]] = {}  # reflections only, also if decoupled = False
    for r in built:
        groups.setdefault(r.group, set()).add(r.reward)
    never_parsed = ("prompt_too_long", "unfinished", "unparsable")
    not_verbatim = [0 for reason in lost if reason in ("prefix_not_verbatim", "empty_prefix")]
    values: dict[str, list] = {
        "parsed": [1] * len(built) + [reason not in never_parsed for reason in lost],
        # no rate for prefix_mode 'full' and 'copy', which preserve no prefix
        "verbatim": [1 for r in built if PREFIX in r.roles] + not_verbatim,
        "correct": [r.reward > 0 for r in built],
        "length": [len(r.completion_ids) for r in built],
        # among constructions with statements: none is false (a right answer may just be copied)
        "faithful": [r.faithful for r in built if r.faithful is not None],
        "faithful_right": [r.faithful for r in built if r.faithful is not None and r.reward > 0],
        # under Eq. 5 only mixed groups and single constructions can have a non-zero advantage
        "mixed_groups": [len(rewards) > 1 for rewards in groups.values()],
        "ots_first_diagnosis": [r.ots_weights[r.roles.index(DIAGNOSIS)] for r in built
                                if r.ots_weights is not None and DIAGNOSIS in r.roles]}
    tokens = []
    for r in built:
        if r.logprobs is not None:
            tokens += zip(r.roles, r.logprobs, r.ots_weights, strict=True)
    for name, role in (("prefix", PREFIX), ("diagnosis", DIAGNOSIS), ("correction", CORRECTION)):
        values[f"logprob_{name}"] = [logprob for of, logprob, _ in tokens if of == role]
        values[f"ots_{name}"] = [weight for of, _, weight in tokens if of == role]
    dropped = {f"dropped_{reason}": lost.count(reason) for reason in reflect.DROP_REASONS}
    counts = selected | dropped | {"kept": kept}
    counts = {f"reflect/{name}": float(count) for name, count in counts.items()}
    return counts | sums_of("reflect/", values)


def train_sums(batch, logprobs, entropy, old_logprobs, weights, ref_logprobs=None) -> dict:
    """train/* of one micro-batch, on its device. All (B,T); ref_logprobs None: no KL is logged."""
    own = batch.completion_mask * (1 - batch.is_reflection[:, None])  # the policy's own samples
    constructed = batch.mask * batch.is_reflection[:, None]
    with torch.no_grad():
        gap = own * (batch.sample_logprobs - old_logprobs).abs()
        sums = {
            "train/trained_tokens": batch.mask.sum(),
            "train/entropy": (own * entropy).sum(), "train/entropy#": own.sum(),
            "train/parity_mean": gap.sum(), "train/parity_mean#": own.sum(),
            "train/parity_max": gap.max(),
            "train/ots_weight": (constructed * weights).sum(),
            "train/ots_weight#": constructed.sum()}
        if ref_logprobs is not None:
            kl = kl_to_ref(logprobs, ref_logprobs, own)
            sums |= {"train/kl_ref": kl.sum(), "train/kl_ref#": own.sum()}
    return sums


def evaluate(model, tokenizer, problems: list, n: int, *, seed: int,
             **sampling) -> dict[str, float]:
    """eval/*: Pass@1 on held-out problems at the training temperature, n samples of each.

    eval.py has the full protocol (T 0.6, Pass@k, intervals). sampling: see rollout.generate.
    """
    queries = list(enumerate(problems))[rank()::world_size()]
    rollouts = sample_rollouts(model, tokenizer, queries, n, key=(seed, EVALUATION),
                               progress="evaluation" if rank() == 0 else "", **sampling)
    score(rollouts)
    return means(reduce_sums(sums_of("eval/", {
        "pass1": [r.reward for r in rollouts], "truncated": [not r.finished for r in rollouts],
        "length": [len(r.completion_ids) for r in rollouts]})))


PARITY_ALARM = 0.1  # mean |sampler - trainer log-prob|; healthy is 1e-5 in fp32, 0.02 in bf16


def warnings_of(m: dict[str, float], *, method: str, max_new_tokens: int, dry_steps: int,
                lost_steps: int) -> list[str]:
    """Console warnings for the symptoms of a run that cannot learn.

    dry_steps: consecutive steps without an eligible query. lost_steps: consecutive steps with
    candidates of which no construction was kept (reflect.is_kept).
    """
    found = []
    if m["rollout/truncated"] == 1:
        found.append(f"every response was truncated at max_new_tokens = {max_new_tokens}: raise "
                     "it, or check the stop ids")
    if m["rollout/zero_variance_groups"] == 1:
        why = ("too hard for this model, or its answers do not follow the format"
               if m["rollout/pass1"] < 0.5 else "too easy for this model")
        found.append("this run cannot learn from such a step: in every group all rewards are "
                     f"equal, so every advantage is 0 (mean reward {m['rollout/pass1']:.2f}: the "
                     f"problems are {why})")
    if m.get("train/parity_mean", 0) > PARITY_ALARM:
        found.append("sampler and trainer disagree: mean |log-prob gap| "
                     f"{m['train/parity_mean']:.3f} is above {PARITY_ALARM}: stale weights, or "
                     "another temperature or mask in one of the two")
    if m["train/skipped"]:
        found.append(f"the update was skipped: loss {m['train/loss']}, gradient norm "
                     f"{m['train/grad_norm']}")
    if lost_steps >= 3 and m["reflect/candidates"]:
        dropped = {name: m[f"reflect/dropped_{name}"] for name in reflect.DROP_REASONS}
        reason = max(dropped, key=dropped.get)
        why = ("`keep` leaves most out" if 2 * sum(dropped.values()) < m["reflect/candidates"]
               else f"most are {reason}; {reflect.DROP_REASONS[reason]}")
        found.append(f"no construction was kept in {lost_steps} steps, so this is GRPO: {why}")
    if method in ("tapo", "sft") and dry_steps >= 20:
        found.append(f"no query was eligible for {dry_steps} steps (Eq. 3): {method} has nothing "
                     "to reflect upon; lower n_pos or n_neg, or sample more")
    return found


def console_line(step: int, max_steps: int, m: dict[str, float]) -> str:
    """One line of key metrics per step."""
    def show(name: str, form: str) -> str:
        value = m.get(name, math.nan)
        return "-" if math.isnan(value) else format(value, form)

    parts = [f"step {step:4d}/{max_steps}",
             f"pass@1 {show('rollout/pass1', '.3f')}",
             f"len {show('rollout/length', '.1f')} cut {show('rollout/truncated', '.2f')}",
             f"loss {show('train/loss', '+.4f')} grad {show('train/grad_norm', '.3f')} "
             f"kl {show('train/kl_ref', '.4f')}"]
    if "reflect/candidates" in m:
        parts.append(f"y_ref {show('reflect/kept', '.0f')}/{show('reflect/candidates', '.0f')} "
                     f"right {show('reflect/correct', '.2f')} "
                     f"mixed {show('reflect/mixed_groups', '.2f')} "
                     f"ots {show('train/ots_weight', '.2f')}")
    return " | ".join([*parts, f"lr {show('train/lr', '.1e')}", f"{show('time/step', '.2f')} s"])


def open_log(log_to: str, config: dict, first_step: int) -> Callable[[int, dict[str, float]], None]:
    """-> log(step, metrics) to wandb or tensorboard; imported only on demand.

    A resumed run continues the same log. For repeated steps tensorboard drops the old values,
    wandb keeps them.
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
        raise ValueError(f"log_to = {log_to!r} needs a package that is not installed: `pip install "
                         f"{log_to}`, or leave log_to out, metrics.jsonl holds the same "
                         "numbers") from None
    out.mkdir(parents=True, exist_ok=True)
    if log_to == "wandb":
        mark = out / "wandb_id"  # lives in out_dir: once the folder is deleted, a run gets a new id
        if not mark.is_file():
            mark.write_text(secrets.token_hex(4))
        try:
            run = wandb.init(project=os.environ.get("WANDB_PROJECT", "tapo"), resume="allow",
                             name=config["out_dir"], id=mark.read_text(), dir=str(out),
                             config=config)
        except Exception as e:  # no login, no network
            raise ValueError(f"log_to = 'wandb': {e} Log in, or set WANDB_MODE=offline and `wandb "
                             "sync` later") from None
        return lambda step, metrics: run.log(metrics, step=step)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def write(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run loses nothing

    return write
