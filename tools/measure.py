"""What the paper's reviewers asked for, measured on one checkpoint: how far constructed trajectories are from the policy, role by
role; what each group does to the gradient; whether the policy finds its own errors, and recovers from them.

    python measure.py config/measure_toy.py --init_from=out/toy/tapo_s0/step_000060 --out=out/toy/tapo_s0.measured.json

No training: one step's rollouts and constructions are drawn as train.py draws them, then looked at.

shift      of ordinary rollouts, micro-reflective and full trajectories, per role and under the plain question: mean log-prob,
           entropy, OTS weight (Eq. 7), and kl, the mean of log q(y_t) - log p(y_t) over sampled tokens: an estimate without bias
           of KL(q || p), q what wrote the token (the policy shown y- and y+), p the policy shown the question alone.
gradient   norm of the part of the loss's gradient that right rollouts, wrong rollouts and constructions have, for constructions
           in a group of their own (Eq. 4, 5), with A = r, and mixed into the rollouts' group ('w/o DAE').
errors     exact in a toy world alone: constructions that keep exactly what stands before the end of the first error; how
           often a response looks again after its own first error, and how often it then ends right, unasked and forced to.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import reflect
import toy
from advantage import advantages, loss_scales, loss_totals, ots_weights, policy_loss, token_weights, train_mask
from configurator import above, at_least, configure, one_of, print_config, run_script
from data import Problem, encode_prompts, load_problems, load_tokenizer, stop_ids_of
from model import load_hf
from parallel import pick_device
from reward import grade_many
from rollout import (
    CORRECTION,
    DIAGNOSIS,
    PAIRING,
    PREFIX,
    REFLECTION,
    Completion,
    Rollout,
    collate,
    completion_text,
    generate,
    microbatches,
)
from train import sample_rollouts, score

init_from = ""                                  # the checkpoint
problems = ""                                   # jsonl; a toy world's for `errors`
out = "measured.json"
n_problems: at_least(0) = 0                     # the first so many; 0 = all
instruction = ""
template: one_of(*reflect.TEMPLATES) = "short"
seed: at_least(0) = 0
samples_per_prompt: at_least(2) = 8
temperature: above(0) = 1.0
max_new_tokens: at_least(1) = 54
max_synthesis_tokens: at_least(0) = 120
n_pos: at_least(1) = 2                          # Eq. 3
n_neg: at_least(1) = 4
m_max: at_least(1) = 4
diagnosis: one_of("mask", "ots", "train") = "mask"  # of the gradient, with ...
train_prefix = True
ots = True
w_min: at_least(0) = 0.01
w_max: above(0) = 10.0
lam: at_least(0) = 1.0
loss_agg: one_of("sequence", "token") = "sequence"
loss_norm: one_of("separate", "merged") = "merged"
clip_eps: above(0) = 0.2
continuations: at_least(1) = 4                  # of every erroneous beginning
marker = "Wait, "                               # how a forced reflection begins
max_rows = 256
tokens_per_microbatch = 2048
device = "auto"
threads = 1

ROLES = {"prefix": PREFIX, "diagnosis": DIAGNOSIS, "correction": CORRECTION}
ESTIMATORS = {  # name: (constructions have a group of their own, ref_advantage)
    "decoupled, Eq. 5": (True, "group"), "decoupled, A = r": (True, "reward"), "one mixed group": (False, "group")}


def construct(model, tokenizer, rollouts, problem_of, stop_ids, c, prefix_mode) -> list[tuple[Rollout, Completion] | str]:
    """Alg. 1 lines 8-14 on scored rollouts: a construction with the synthesis it came from, or the reason it was dropped."""
    pairs, _ = reflect.select_candidates(rollouts, n_pos=c.n_pos, n_neg=c.n_neg, m_max=c.m_max, key=(c.seed, PAIRING, 0))
    prompts = [reflect.synthesis_prompt(tokenizer, problem_of[wrong.query], wrong.text, right.text, c.template, prefix_mode)
               for wrong, right in pairs]
    written = generate(model, prompts, 1, max_new_tokens=c.max_synthesis_tokens or 2 * c.max_new_tokens, stop_ids=stop_ids,
                       keys=[(c.seed, REFLECTION, 0, i) for i in range(len(pairs))], temperature=c.temperature,
                       max_rows=c.max_rows)
    results = []
    for (wrong, _), (completion,) in zip(pairs, written, strict=True):
        built = reflect.build_reflection(tokenizer, wrong, completion, prefix_mode=prefix_mode, decoupled=True,
                                         stop_id=wrong.completion_ids[-1], max_new_tokens=c.max_new_tokens)
        results.append(built if isinstance(built, str) else (built, completion))
    score([result[0] for result in results if not isinstance(result, str)], problem_of)
    return results


@torch.no_grad()
def look(model, rollouts: list[Rollout], c) -> list[np.ndarray]:
    """Per rollout (3, C): log-prob, entropy and OTS weight of its completion's tokens under the plain question."""
    found = [None] * len(rollouts)
    for index in microbatches(rollouts, c.tokens_per_microbatch):
        batch = collate([rollouts[i] for i in index], [0.0] * len(index)).to(model.output_weight.device)
        logprobs, entropy = model(batch.inputs, batch.targets, temperature=c.temperature)
        all_three = torch.stack([logprobs, entropy, ots_weights(logprobs, entropy, c.w_min, c.w_max)]).cpu().numpy()
        for row, i in enumerate(index):
            start = len(rollouts[i].prompt_ids) - 1
            found[i] = all_three[:, row, start:start + len(rollouts[i].completion_ids)]
    return found


def written_logprobs(reflection: Rollout, synthesis: Completion, role: int) -> list[float] | None:
    """Log-probs with which the synthesis wrote the tokens of one role, or None where it wrote them as other ids."""
    ids = [i for i, of in zip(reflection.completion_ids[:-1], reflection.roles, strict=False) if of == role]  # no stop token
    starts = (s for s in range(len(synthesis.ids) - len(ids), -1, -1) if synthesis.ids[s:s + len(ids)] == ids)
    start = next(starts, None)
    return None if start is None or not ids else synthesis.logprobs[start:start + len(ids)]


def shift(model, ordinary: list[Rollout], built: dict[str, list[tuple[Rollout, Completion]]], c) -> dict[str, dict]:
    """{"ordinary" | "micro correction" | ...: {tokens, logprob, entropy, ots, kl, kl_tokens}}, means over tokens."""
    rows: dict[str, list] = {}
    for r, values in zip(ordinary, look(model, ordinary, c), strict=True):
        rows.setdefault("ordinary, right" if r.reward > 0 else "ordinary, wrong", []).append((values, None))
    for mode, pairs in built.items():
        for (r, synthesis), values in zip(pairs, look(model, [r for r, _ in pairs], c), strict=True):
            for name, role in ROLES.items():
                at = np.flatnonzero(np.array(r.roles) == role)
                at = at[at < len(r.completion_ids) - 1]  # the stop token was appended, nobody wrote it
                if len(at):
                    q = None if role == PREFIX else written_logprobs(r, synthesis, role)
                    gap = None if q is None else np.array(q) - values[0, at]
                    rows.setdefault(f"{mode}, {name}", []).append((values[:, at], gap))
                    if role == DIAGNOSIS:  # where it leaves y-, and all the surprise is
                        first = values[:, at[:1]], None if gap is None else gap[:1]
                        rows.setdefault(f"{mode}, its first token", []).append(first)
    result = {}
    for name, pieces in rows.items():
        logprob, entropy, weight = np.concatenate([values for values, _ in pieces], axis=1).mean(1).tolist()
        apart = [gap for _, gap in pieces if gap is not None]
        kl = float(np.concatenate(apart).mean()) if apart else None
        if name.startswith("ordinary") or name.endswith("prefix"):
            kl = 0.0  # the policy itself wrote them, under this very prompt
        result[name] = {"tokens": sum(values.shape[1] for values, _ in pieces), "logprob": logprob, "entropy": entropy,
                        "ots": weight, "kl": kl, "kl_tokens": sum(map(len, apart))}
    return result


def gradient(model, rollouts: list[Rollout], scale: torch.Tensor, c) -> torch.Tensor:
    """Gradient (P,) of the policy loss (Eq. 2, 8), every rollout's tokens counted by its scale (N,)."""
    model.zero_grad(set_to_none=True)
    for index in microbatches(rollouts, c.tokens_per_microbatch) if rollouts else []:
        batch = collate([rollouts[i] for i in index], scale[index].tolist()).to(model.output_weight.device)
        logprobs, entropy = model(batch.inputs, batch.targets, temperature=c.temperature)
        mask = train_mask(batch.completion_mask, batch.roles, batch.is_reflection, diagnosis=c.diagnosis,
                          train_prefix=c.train_prefix)
        weights = token_weights(logprobs, entropy, batch.roles, batch.is_reflection, diagnosis=c.diagnosis, ots=c.ots,
                                w_min=c.w_min, w_max=c.w_max)
        policy_loss(logprobs, logprobs.detach(), batch.advantages[:, None], mask, weights, batch.loss_scale,
                    c.clip_eps)[0].backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def gradients(model, ordinary: list[Rollout], constructed: list[Rollout], c) -> dict[str, dict]:
    """Per estimator the gradient's norm, those of its parts, the cosine of constructions and rollouts, mean advantages."""
    everything, result = ordinary + constructed, {}
    is_reflection = torch.tensor([float(r.is_reflection) for r in everything])
    lengths = torch.tensor([
        int(train_mask(torch.ones(1, len(r.roles)), torch.tensor([r.roles]), is_reflection[i:i + 1], diagnosis=c.diagnosis,
                       train_prefix=c.train_prefix).sum()) for i, r in enumerate(everything)])
    scale = loss_scales(lengths, is_reflection, loss_totals(lengths, is_reflection), lam=c.lam, loss_agg=c.loss_agg,
                        loss_norm=c.loss_norm)
    parts = {"right": [not r.is_reflection and r.reward > 0 for r in everything],
             "wrong": [not r.is_reflection and r.reward <= 0 for r in everything],
             "constructed": [r.is_reflection for r in everything]}
    for name, (decoupled, ref_advantage) in ESTIMATORS.items():
        groups = [r.group if decoupled else str(r.query) for r in everything]
        values = advantages(torch.tensor([r.reward for r in everything]), [r.query for r in everything], groups,
                            [r.is_reflection for r in everything], ref_advantage=ref_advantage)
        for r, value in zip(everything, values.tolist(), strict=True):
            r.advantage = value
        found, row = {}, {}
        for part, chosen in parts.items():
            index = [i for i, wanted in enumerate(chosen) if wanted]
            found[part] = gradient(model, [everything[i] for i in index], scale[index], c)
            row |= {part: float(found[part].norm()), f"{part}_advantage": float(values[index].mean()) if index else None}
        rollouts = found["right"] + found["wrong"]
        cosine = torch.nn.functional.cosine_similarity(rollouts, found["constructed"], dim=0)
        result[name] = row | {"rollouts": float(rollouts.norm()), "all": float((rollouts + found["constructed"]).norm()),
                              "cosine": float(cosine)}
    model.zero_grad(set_to_none=True)
    return result


def recovery(model, tokenizer, ordinary: list[Rollout], problem_of: dict[int, Problem], stop_ids, c) -> dict[str, float]:
    """From the end of the first error of every response that has one: shares that look again and that end right, left
    alone and with `marker` forced upon them."""
    beginnings = []
    for r in ordinary:
        end = toy.first_error(problem_of[r.query].question, r.text)
        if end is not None and end < len(r.text):
            beginnings.append((r, reflect.token_boundary(tokenizer, r.completion_ids, r.text[:end])))
    result = {"responses": len(ordinary), "with_an_error": len(beginnings)}
    for name, forced in (("unasked", []), ("forced", tokenizer(c.marker, add_special_tokens=False)["input_ids"])):
        contexts = [r.completion_ids[:n] + forced for r, n in beginnings]
        completions = generate(
            model, [r.prompt_ids + context for (r, _), context in zip(beginnings, contexts, strict=True)], c.continuations,
            max_new_tokens=c.max_new_tokens, stop_ids=stop_ids, temperature=c.temperature, max_rows=c.max_rows,
            keys=[(c.seed, 11, i) for i in range(len(beginnings))])
        texts = [[tokenizer.decode(forced) + completion_text(tokenizer, one) for one in several] for several in completions]
        flat = [(r, text) for (r, _), several in zip(beginnings, texts, strict=True) for text in several]
        grades = grade_many([text for _, text in flat], [problem_of[r.query].answer for r, _ in flat])
        again = [text.startswith(c.marker) for _, text in flat]
        right = [grade.reward > 0 for grade in grades]
        result |= {f"{name}_reflects": float(np.mean(again)) if flat else None,
                   f"{name}_right": float(np.mean(right)) if flat else None,
                   f"{name}_right_if_reflects": float(np.mean([b for a, b in zip(again, right, strict=True) if a]))
                   if any(again) else None}
    return result


def constructions(results: list, problem_of: dict[int, Problem], tokenizer, exact: bool) -> dict[str, float]:
    """Counts of what came of the candidates: kept, right, groups with both rewards; in a toy world also localised."""
    built = [result[0] for result in results if not isinstance(result, str)]
    groups: dict[str, set] = {}
    for r in built:
        groups.setdefault(r.group, set()).add(r.reward)
    row = {"candidates": len(results), "kept": len(built), "right": sum(r.reward > 0 for r in built), "groups": len(groups),
           "mixed_groups": sum(len(rewards) > 1 for rewards in groups.values())}
    if exact:
        kept = [(r, len(tokenizer.decode([i for i, role in zip(r.completion_ids, r.roles, strict=True) if role == PREFIX])))
                for r in built]
        row["localised"] = sum(toy.first_error(problem_of[r.query].question, r.text) == n for r, n in kept)
    return row


def main() -> None:
    """Draw one step from the checkpoint, look at it, print and write what was found."""
    config = configure(globals())
    c = SimpleNamespace(**config)
    for key in ("init_from", "problems"):
        if not getattr(c, key):
            raise ValueError(f"{key} is not set; pass --{key}=PATH, e.g. with config/measure_toy.py")
    print_config(config)
    if c.threads:
        torch.set_num_threads(c.threads)
    tokenizer = load_tokenizer(c.init_from)
    model = load_hf(c.init_from, device=pick_device(c.device), num_tokens=len(tokenizer)).eval()
    stop_ids = stop_ids_of(tokenizer, model.config.eos_token_id)
    queries = list(enumerate(load_problems(c.problems, c.n_problems)))
    problem_of = dict(queries)
    encode_prompts(tokenizer, [p for _, p in queries], c.instruction)
    exact = all(p.uid.split(":")[0] in toy.WORLDS for _, p in queries)

    ordinary = sample_rollouts(model, tokenizer, queries, stop_ids, c, 0)
    score(ordinary, problem_of)
    results = {mode: construct(model, tokenizer, ordinary, problem_of, stop_ids, c, mode) for mode in ("micro", "full")}
    built = {mode: [result for result in found if not isinstance(result, str)] for mode, found in results.items()}
    measured = {
        "config": config, "pass1": float(np.mean([r.reward for r in ordinary])),
        "reflect_rate": float(np.mean([reflect.reflects(r.text) for r in ordinary])),
        "shift": shift(model, ordinary, built, c),
        "gradient": gradients(model, ordinary, [r for r, _ in built["micro"]], c),
        "constructions": {mode: constructions(found, problem_of, tokenizer, exact and mode == "micro")
                          for mode, found in results.items()}}
    if exact:
        measured["recovery"] = recovery(model, tokenizer, ordinary, problem_of, stop_ids, c)
    Path(c.out).parent.mkdir(parents=True, exist_ok=True)
    Path(c.out).write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps({key: value for key, value in measured.items() if key != "config"}, indent=1))


if __name__ == "__main__":
    run_script(main)
