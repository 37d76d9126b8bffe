"""From rollouts to one optimizer step: padded micro-batches, one loss over all of them, AdamW.

RL, the cold start, measurements and benchmarks all call `update`, each with its own loss. Token
weights in the loss (`Rollout.loss_scale`) are computed over the whole step beforehand, so the
gradient depends neither on how rows are split into micro-batches nor on the number of ranks
(trap 12).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from advantage import advantages, loss_scales
from memory import tokens_that_fit
from metrics import add_up, reduce_sums
from parallel import FSDPModule, balance, gather, whole, world_size
from rollout import PREFIX, Rollout


@dataclass
class Batch:
    """One micro-batch: rows right-padded, and shifted into inputs and targets, by `collate` only.

    Every (B,T) tensor is aligned with `targets`: column t describes token targets[:, t]. `targets`
    drops the leading columns in which no row has a completion token, so that the head skips them.
    """
    rows: list[Rollout]
    inputs: torch.Tensor           # (B,T0) int64, T0 >= T
    targets: torch.Tensor          # (B,T) int64, predicted from inputs[:, :T0 - T + t + 1]
    completion_mask: torch.Tensor  # (B,T) fp32, 1 on completion tokens, the stop token included
    mask: torch.Tensor             # (B,T) fp32, 1 on tokens that carry gradient
    ots: torch.Tensor              # (B,T) fp32, 1 on tokens that Eq. 7 weighs
    sample_logprobs: torch.Tensor  # (B,T) fp32, 0 where unknown
    old_logprobs: torch.Tensor     # (B,T) fp32, 0 where unknown
    advantages: torch.Tensor       # (B,) fp32
    is_reflection: torch.Tensor    # (B,) fp32, 1 for constructed trajectories
    loss_scale: torch.Tensor       # (B,) fp32

    def to(self, device) -> "Batch":
        """Copy to another device without blocking the host."""
        return replace(self, **{name: value.to(device, non_blocking=True)
                                for name, value in vars(self).items() if torch.is_tensor(value)})

    def columns_of(self, b: int) -> slice:
        """Columns of row b's completion tokens."""
        first = len(self.rows[b].prompt_ids) - 1 - (self.inputs.shape[1] - self.targets.shape[1])
        return slice(first, first + len(self.rows[b].completion_ids))


def collate(rollouts: list[Rollout]) -> Batch:
    """Rollouts of any lengths -> one right-padded Batch.

    prompt [5, 6], completion [7, 8, 2] next to prompt [5], completion [9, 2]:
        inputs   5 6 7 8      targets   6 7 8 2      completion_mask   0 1 1 1
                 5 9 2 0                9 2 0 0                        1 1 0 0
    Masks come from lengths: a completion that contains the padding id is handled (trap 5).
    """
    ids = pad_sequence([torch.tensor(r.prompt_ids + r.completion_ids) for r in rollouts],
                       batch_first=True)
    skip = min(len(r.prompt_ids) for r in rollouts) - 1

    def columns(values: list) -> torch.Tensor:
        """A list per row, with an entry per completion token (None: all 0) -> (B,T)"""
        rows = [[0.0] * (len(r.prompt_ids) - 1) + (of_row or [0.0] * len(r.completion_ids))
                for r, of_row in zip(rollouts, values, strict=True)]
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True)[:, skip:]

    return Batch(
        rollouts, ids[:, :-1], ids[:, skip + 1:],
        columns([[1.0] * len(r.completion_ids) for r in rollouts]),
        *(columns([getattr(r, name) for r in rollouts])
          for name in ("mask", "ots", "sample_logprobs", "old_logprobs")),
        *(torch.tensor([float(getattr(r, name)) for r in rollouts])
          for name in ("advantage", "is_reflection", "loss_scale")))


def microbatches_of(rollouts: list[Rollout], tokens_per_microbatch: int) -> list[list[Rollout]]:
    """This rank's micro-batches as lists of rollouts; the same number on every rank, >= 1.

    A rank that runs out of rows, or a step without trainable rows, gets a filler: one masked token,
    flagged as a reflection so that the logs do not count it as sampled by the policy.
    """
    filler = Rollout(None, "", [0], [0], [PREFIX], True, "", is_reflection=True, mask=[0.0])
    rollouts = rollouts or [filler]
    rows = [*rollouts, filler]
    return [[rows[i] for i in index]
            for index in balance([len(r) for r in rollouts], tokens_per_microbatch)]


def largest_microbatch(model, optimizer, **how) -> int:
    """tokens_per_microbatch = 0: the largest that fits on every rank. how: see tokens_that_fit."""
    return min(gather([tokens_that_fit(model, optimizer, world_size=world_size(), **how)]))


def set_advantages(rollouts: list[Rollout], *, ref_advantage: str,
                   decoupled: bool = True) -> None:
    """Set r.advantage of a step's scored rollouts (Eq. 1, 4, 5). decoupled = False: one group per
    query."""
    values = advantages(
        torch.tensor([r.reward for r in rollouts]), [r.query for r in rollouts],
        [r.group if decoupled else str(r.query) for r in rollouts],
        [r.is_reflection for r in rollouts], ref_advantage=ref_advantage)
    for r, value in zip(rollouts, values.tolist(), strict=True):
        r.advantage = value


def set_loss_scales(rollouts: list[Rollout], *, lam: float, loss_agg: str, loss_norm: str) -> None:
    """Set r.loss_scale: its denominator is counted over all rollouts of the step (Eq. 2, 6)."""
    lengths = torch.tensor([sum(r.mask) for r in rollouts])
    is_reflection = torch.tensor([float(r.is_reflection) for r in rollouts])
    scales = loss_scales(lengths, is_reflection, lam=lam, loss_agg=loss_agg, loss_norm=loss_norm)
    for r, scale in zip(rollouts, scales.tolist(), strict=True):
        r.loss_scale = scale


@torch.no_grad()
def set_old_logprobs(model, rollouts: list[Rollout], *, temperature: float,
                     tokens_per_microbatch: int, device) -> None:
    """Set r.old_logprobs of this rank's rows, from the policy before the step's updates (Eq. 2).

    With one update per step the old policy is the policy itself: no extra forward (trap 9).
    """
    for rows in microbatches_of(rollouts, tokens_per_microbatch):
        batch = collate(rows).to(device)
        logprobs = model(batch.inputs, batch.targets, temperature=temperature)[0]
        for b, r in enumerate(rows):
            r.old_logprobs = logprobs[b, batch.columns_of(b)].tolist()


def update(model, optimizer, rollouts: list[Rollout], loss_fn: Callable[[Batch], tuple], *,
           tokens_per_microbatch: int, grad_clip: float, device) -> dict[str, float]:
    """Alg. 1 lines 21-22: one optimizer step on the sum of loss_fn over all rollouts -> sums of
    train/* over all processes.

    loss_fn(batch) -> (scalar loss, {name: sum}). Every rank passes all rollouts in the same order
    and processes its share of them. No host sync inside the loop. If loss or gradient norm is not
    finite the step is skipped: weights and moments do not change. Both are reduced over all
    processes, so every process takes the same branch.
    """
    sums: dict = {}
    batches = microbatches_of(rollouts, tokens_per_microbatch)
    keep_gathered = isinstance(model, FSDPModule) and world_size() == 1
    for rows in batches:
        if keep_gathered:  # weights are cast once for all micro-batches
            model.set_reshard_after_backward(rows is batches[-1])
        batch = collate(rows).to(device)
        loss, more = loss_fn(batch)
        # FSDP averages gradients over ranks, but loss_scale is already global
        (loss * world_size()).backward()
        add_up(sums, more | {"train/loss": loss.detach()})
    norm = float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)))
    sums = reduce_sums({name: float(value) for name, value in sums.items()})
    finite = math.isfinite(sums["train/loss"]) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"train/grad_norm": norm, "train/skipped": float(not finite)}


def set_learning_rate(optimizer, step: int, *, learning_rate: float, warmup_steps: int,
                      max_steps: int) -> float:
    """Linear warm-up, then cosine to 0, as a function of the step alone -> the learning rate."""
    if step < warmup_steps:
        rate = learning_rate * (step + 1) / warmup_steps
    else:
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        rate = learning_rate * (0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
