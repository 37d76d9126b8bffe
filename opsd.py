"""OPSD, on-policy self-distillation (arXiv 2601.18734): a model teaches itself.

The student answers the plain question. The teacher is the frozen initial model (init_from) with a
correct solution in its prompt; it gives a next-token distribution at every token of the student's
own response. The solution is a correct response of the same group (the data sets here hold answers,
not solutions). The loss is `advantage.generalised_jsd`; with opsd_loss = 'sampled' the advantage of
a token is the teacher's log-prob minus the current student's, recomputed at each of a step's
updates.
"""
import dataclasses

import numpy as np
import torch

import reflect
from parallel import whole
from rollout import Rollout
from update import Batch, collate


def set_teachers(tokenizer, rollouts: list[Rollout], *, template: str, key: tuple[int, ...],
                 context: int) -> dict[str, float]:
    """Set r.teacher_prompt_ids (P',) of every rollout that can have a teacher -> opsd/* sums.

    A rollout has no teacher, and an all-zero mask, if its group has no other correct response
    (given the rollout itself the teacher would only copy), or if teacher prompt + response exceed
    the model's context. Pass all rollouts of a query together. key: counters (seed, PAIRING, step).
    """
    groups: dict[int, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.query, []).append(r)
    too_long = 0
    for query, group in groups.items():
        rng = np.random.default_rng((*key, query))  # one stream per query
        for r in group:
            right = [other for other in group if other.reward > 0 and other is not r]
            prompt = None
            if right:
                chosen = right[rng.integers(len(right))]
                prompt = reflect.synthesis_prompt(tokenizer, r.problem, "", chosen.text, template,
                                                  "teacher")
                if len(prompt) + len(r.completion_ids) > context:
                    prompt, too_long = None, too_long + 1
            r.teacher_prompt_ids = prompt
            if not prompt:
                r.mask = [0.0] * len(r.completion_ids)
    taught = sum(r.teacher_prompt_ids is not None for r in rollouts)
    return {"opsd/taught": float(taught), "opsd/taught#": len(rollouts),
            "opsd/teacher_too_long": float(too_long), "opsd/teacher_too_long#": len(rollouts)}


def student_and_teacher(model, teacher, batch: Batch, *, temperature: float, loss: str, beta: float,
                        clip: float) -> tuple[torch.Tensor, ...]:
    """Run both on the same completions -> student's logprobs, entropy (B,T), and a third (B,T).

    The third is, with loss = 'jsd', the divergence to the teacher over the whole vocabulary, with
    'sampled' the teacher's log-prob of the sampled token. The teacher's prompt is longer, so its
    columns are shifted to align with the student's. No gradient reaches the teacher.
    """
    read = [dataclasses.replace(r, prompt_ids=r.teacher_prompt_ids or r.prompt_ids)
            for r in batch.rows]
    seen = collate(read).to(batch.inputs.device)                                     # (B,T')
    shift = torch.tensor([len(a.prompt_ids) - len(b.prompt_ids)
                          for a, b in zip(read, batch.rows, strict=True)])
    first = batch.inputs.shape[1] - batch.targets.shape[1]  # collate's skipped columns
    columns = torch.arange(batch.targets.shape[1]) + first + shift[:, None]          # (B,T)
    if loss == "sampled":
        columns -= seen.inputs.shape[1] - seen.targets.shape[1]
        columns = columns.clamp(0, seen.targets.shape[1] - 1)
        columns = columns.to(batch.inputs.device, non_blocking=True)
        with torch.no_grad():
            logprobs, _ = teacher(seen.inputs, seen.targets, temperature=temperature)
        student = model(batch.inputs, batch.targets, temperature=temperature)
        return *student, logprobs.gather(1, columns)
    columns = columns.clamp(0, seen.inputs.shape[1] - 1)
    columns = columns.to(batch.inputs.device, non_blocking=True)
    with torch.no_grad():
        hidden = teacher(seen.inputs)                                                # (B,T0',d)
        hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
    return model(batch.inputs, batch.targets, temperature=temperature,
                 teacher=(hidden, whole(teacher.output_weight), beta, clip))
