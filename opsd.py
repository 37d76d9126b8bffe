"""OPSD, on-policy self-distillation (arXiv 2601.18734): the baseline in which a model teaches itself.

The student answers the plain question. The teacher is the same model with a right solution in its prompt, and says at
every token of the student's own response how it would have gone on. The solution is a right response of the same group
(the data sets here hold answers, not solutions). Its divergence is `advantage.generalised_jsd`; with opsd_loss =
'sampled' the advantage of a token is the teacher's log-prob minus the current student's, at every one of several updates.
"""
import dataclasses

import numpy as np
import torch

import reflect
from data import Problem
from parallel import whole
from rollout import Batch, Rollout, collate


def teacher_prompts(tokenizer, rollouts: list[Rollout], problem_of: dict[int, Problem], template: str,
                    key: tuple[int, ...], context: int) -> list[list[int] | None]:
    """Per rollout the ids (P',) under which the teacher reads it. None where its group has no right response but it (after
    its own text the teacher would only copy), [] where prompt and response exceed the model's context.

    Rollouts of a query stand together. key: counters (seed, PAIRING, step)."""
    groups: dict[int, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.query, []).append(r)
    prompts = []
    for query, group in groups.items():
        rng = np.random.default_rng((*key, query))  # one query's noise does not depend on which others are here
        for r in group:
            right = [other for other in group if other.reward > 0 and other is not r]
            chosen = right[rng.integers(len(right))] if right else None
            prompt = chosen and reflect.teacher_prompt(tokenizer, problem_of[query], chosen.text, template)
            prompts.append([] if prompt and len(prompt) + len(r.completion_ids) > context else prompt)
    return prompts


def teacher_sums(rollouts: list[Rollout], prompts: list[list[int] | None]) -> dict[str, float]:
    """Shares of a step's rollouts: read by a teacher, and too long for it."""
    return {"opsd/taught": float(sum(map(bool, prompts))), "opsd/taught#": len(rollouts),
            "opsd/teacher_too_long": float(sum(p == [] for p in prompts)), "opsd/teacher_too_long#": len(rollouts)}


def as_read(rollouts: list[Rollout], prompts: list[list[int] | None]) -> list[Rollout]:
    """Every rollout under its teacher's prompt, or under its own if it has no teacher."""
    return [dataclasses.replace(r, prompt_ids=prompt or r.prompt_ids) for r, prompt in zip(rollouts, prompts, strict=True)]


def student_and_teacher(model, teacher, batch: Batch, rollouts: list[Rollout], prompts: list[list[int] | None], *,
                        temperature: float, loss: str, beta: float, clip: float) -> tuple[torch.Tensor, ...]:
    """Both on the same completions -> logprobs, entropy (B, T) of the student, and a third (B, T): with loss = 'jsd' the
    divergence to the teacher over the whole vocabulary, with 'sampled' the teacher's log-prob of the sampled token.

    The teacher's prompt is longer, so its columns are shifted to meet the student's. No gradient reaches the teacher.
    """
    read = as_read(rollouts, prompts)
    seen = collate(read, [0.0] * len(read)).to(batch.inputs.device)                               # (B, T')
    shift = torch.tensor([len(a.prompt_ids) - len(b.prompt_ids) for a, b in zip(read, rollouts, strict=True)])
    columns = (torch.arange(batch.inputs.shape[1]) + shift[:, None]).clamp(max=seen.inputs.shape[1] - 1)
    columns = columns.to(batch.inputs.device, non_blocking=True)                                  # (B, T)
    if loss == "sampled":
        with torch.no_grad():
            teacher_logprobs = teacher(seen.inputs, seen.targets, temperature=temperature)[0].gather(1, columns)
        return *model(batch.inputs, batch.targets, temperature=temperature), teacher_logprobs
    with torch.no_grad():
        hidden = teacher(seen.inputs)                                                             # (B, T', d)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))            # (B, T, d)
    head = None if teacher is model else whole(teacher.output_weight)                             # None: the student's own
    return model(batch.inputs, batch.targets, temperature=temperature, teacher=(hidden, head, beta, clip))
