"""Measurements of one checkpoint that the paper's reviewers asked for: distribution shift of the
constructed trajectories by token role, each group's part of the gradient, and whether the policy
finds its own errors and recovers from them.

    python -m tools.measure config/measure_toy.py --init_from=out/toy/tapo_s0/step_000060

No training: one step's rollouts and constructions are sampled as in train.py, then analysed.

shift      mean log-prob, entropy, OTS weight (Eq. 7) and kl per role, given the plain question, for
           ordinary rollouts, micro-reflective and full trajectories. kl: mean of
           log q(y_t) - log p(y_t) over sampled tokens, an unbiased estimate of KL(q || p); q is the
           policy given y- and y+, which sampled the token, p the policy given the question alone.
gradient   norms of the gradient's parts from right rollouts, wrong rollouts and constructions, with
           the constructions as a separate group (Eq. 4, 5), with A = r, and mixed into the
           rollouts' group ('w/o DAE').
DSR, ERR   §4.3, by the rules of eval.py, on this step's rollouts.
decides    how often a response stops after a right attempt, and how often it continues after a
           wrong one. Exact in a toy world, elsewhere judged by an attempt's last number.

Only in a toy world, where the ground truth is known:
ERR_true   of the responses that reflect, the share that states something true about a real error of
           its own and ends correct.
localised  constructions whose preserved prefix ends exactly at the end of the first error.
recovery   how often a response reflects after its own first error, and how often it then ends
           right: by itself ('unasked') and with a forced reflection.
"""
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import reflect
import toy
from advantage import ots_weights
from configurator import above, at_least, configure, one_of, print_config, run_script
from data import (
    BOXED_INSTRUCTION,
    encode_prompts,
    load_problems,
    load_tokenizer,
    stop_ids_of,
)
from eval import dsr_err
from hf import load_hf
from parallel import microbatches, pick_device
from reflect import Construction
from reward import grade_many, score
from rollout import (
    CORRECTION,
    DIAGNOSIS,
    PAIRING,
    PREFIX,
    REFLECTION,
    ROLLOUT,
    Completion,
    Rollout,
    completion_text,
    generate,
    sample_rollouts,
)
from train import loss_of
from update import collate, microbatches_of, set_advantages, set_loss_scales

init_from = ""                                  # the checkpoint
problems = ""                                   # jsonl; exact measurements need a toy world's
out = "measured.json"
n_problems: at_least(0) = 0                     # use only the first n problems; 0 = all
instruction = BOXED_INSTRUCTION
template: one_of(*reflect.TEMPLATES) = "short"
seed: at_least(0) = 0
samples_per_prompt: at_least(2) = 8
temperature: above(0) = 1.0
max_new_tokens: at_least(1) = 54
max_synthesis_tokens: at_least(0) = 120
n_pos: at_least(1) = 2                          # Eq. 3
n_neg: at_least(1) = 4
m_max: at_least(1) = 4
diagnosis: one_of("mask", "ots", "train") = "mask"  # 'gradient': how diagnosis tokens are trained
train_prefix = True
w_min: at_least(0) = 0.01
w_max: above(0) = 10.0
lam: at_least(0) = 1.0
loss_agg: one_of("sequence", "token") = "sequence"
loss_norm: one_of("separate", "merged") = "merged"
clip_eps: above(0) = 0.2
continuations: at_least(1) = 4                  # 'recovery': samples per erroneous prefix
marker = "Wait, "                               # 'recovery': text that starts a forced reflection
max_rows: at_least(0) = 256
tokens_per_microbatch: at_least(1) = 2048
device: one_of("auto", "cpu", "cuda") = "auto"
threads: at_least(0) = 1

CONTINUATION = 11  # noise stream, distinct from those of rollout.py
ROLES = {"prefix": PREFIX, "diagnosis": DIAGNOSIS, "correction": CORRECTION}
ESTIMATORS = {  # name: (decoupled: constructions form a separate group, ref_advantage)
    "decoupled, Eq. 5": (True, "group"), "decoupled, A = r": (True, "reward"),
    "one mixed group": (False, "group")}


def built_of(constructions: list[Construction]) -> list[Construction]:
    """Constructions that were not dropped."""
    return [c for c in constructions if isinstance(c.outcome, Rollout)]


@torch.no_grad()
def look(model, rollouts: list[Rollout], *, temperature: float, tokens_per_microbatch: int,
         w_min: float, w_max: float) -> list[np.ndarray]:
    """Per rollout an array (3, C): log-prob, entropy and OTS weight of each completion token, given
    the plain question."""
    found = [None] * len(rollouts)
    for index in microbatches([len(r) for r in rollouts], tokens_per_microbatch):
        batch = collate([rollouts[i] for i in index]).to(model.output_weight.device)
        logprobs, entropy = model(batch.inputs, batch.targets, temperature=temperature)
        weights = ots_weights(logprobs, entropy, w_min, w_max)
        all_three = torch.stack([logprobs, entropy, weights]).cpu().numpy()
        for b, i in enumerate(index):
            found[i] = all_three[:, b, batch.columns_of(b)]
    return found


def written_logprobs(y_ref: Rollout, synthesis: Completion, role: int) -> list[float] | None:
    """Synthesis log-probs of one role's tokens; None if the synthesis lacks that id sequence."""
    pairs = zip(y_ref.completion_ids[:-1], y_ref.roles, strict=False)  # without the stop token
    ids = [i for i, of in pairs if of == role]
    # take the last match: the analysis may quote the same ids
    for start in range(len(synthesis.ids) - len(ids), -1, -1):
        if ids and synthesis.ids[start:start + len(ids)] == ids:
            return synthesis.logprobs[start:start + len(ids)]
    return None


def shift(model, ordinary: list[Rollout], built: dict[str, list[Construction]],
          **looking) -> dict[str, dict]:
    """{"ordinary, right" | "micro, correction" | ...: {tokens, logprob, entropy, ots, kl,
    kl_tokens}}.

    Means over tokens. looking: see `look`.
    """
    rows: dict[str, list] = {}
    for r, values in zip(ordinary, look(model, ordinary, **looking), strict=True):
        name = "ordinary, right" if r.reward > 0 else "ordinary, wrong"
        rows.setdefault(name, []).append((values, None))
    for mode, constructions in built.items():
        looked = look(model, [c.outcome for c in constructions], **looking)
        for c, values in zip(constructions, looked, strict=True):
            for name, role in ROLES.items():
                at = np.flatnonzero(np.array(c.outcome.roles) == role)
                at = at[at < len(values[0]) - 1]  # the stop token was appended, not sampled
                if not len(at):
                    continue
                q = None if role == PREFIX else written_logprobs(c.outcome, c.synthesis, role)
                gap = None if q is None else np.array(q) - values[0, at]
                rows.setdefault(f"{mode}, {name}", []).append((values[:, at], gap))
                if role == DIAGNOSIS:  # departs from y-: nearly all the surprisal is here
                    first = values[:, at[:1]], None if gap is None else gap[:1]
                    rows.setdefault(f"{mode}, its first token", []).append(first)
    return {name: token_means(name, pieces) for name, pieces in rows.items()}


def token_means(name: str, pieces: list[tuple]) -> dict:
    """One row of `shift` from [(values (3, n), gaps log q - log p (n,) or None)]."""
    logprob, entropy, weight = np.concatenate([values for values, _ in pieces], axis=1).mean(1)
    gaps = [gap for _, gap in pieces if gap is not None]
    kl = float(np.concatenate(gaps).mean()) if gaps else None
    if name.startswith("ordinary") or name.endswith("prefix"):
        kl = 0.0  # sampled from the policy under this same prompt: q = p
    return {"tokens": sum(values.shape[1] for values, _ in pieces), "logprob": float(logprob),
            "entropy": float(entropy), "ots": float(weight), "kl": kl,
            "kl_tokens": sum(map(len, gaps))}


def gradient(model, rollouts: list[Rollout], loss_fn, tokens_per_microbatch: int) -> torch.Tensor:
    """Part of the loss gradient (P,) that comes from these rollouts."""
    model.zero_grad(set_to_none=True)
    for rows in microbatches_of(rollouts, tokens_per_microbatch):
        loss_fn(collate(rows).to(model.output_weight.device))[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradients(model, ordinary: list[Rollout], constructed: list[Rollout], *, temperature: float,
              tokens_per_microbatch: int, w_min: float, w_max: float, clip_eps: float,
              diagnosis: str, train_prefix: bool, lam: float, loss_agg: str, loss_norm: str,
              ) -> dict[str, dict]:
    """Per estimator: norms of the gradient and of its parts, cosine between the gradients of
    constructions and rollouts, mean advantages. The loss is train.loss_of's."""
    everything = ordinary + constructed
    for r in constructed:
        r.mask, r.ots = reflect.token_masks(r.roles, diagnosis=diagnosis,
                                            train_prefix=train_prefix)
    set_loss_scales(everything, lam=lam, loss_agg=loss_agg, loss_norm=loss_norm)
    loss_fn = functools.partial(
        loss_of, model=model, ref_model=None, method="tapo", temperature=temperature,
        clip_eps=clip_eps, weighting="ots", w_min=w_min, w_max=w_max, kl_coef=0.0, log_kl=False,
        opsd_loss="jsd", opsd_beta=0.5, opsd_clip=0.0, on_policy=True)
    parts = {"right": [r for r in ordinary if r.reward > 0],
             "wrong": [r for r in ordinary if r.reward <= 0], "constructed": constructed}
    result = {}
    for name, (decoupled, ref_advantage) in ESTIMATORS.items():
        set_advantages(everything, decoupled=decoupled, ref_advantage=ref_advantage)
        found, row = {}, {}
        for part, rows in parts.items():
            found[part] = gradient(model, rows, loss_fn, tokens_per_microbatch)
            row[part] = float(found[part].norm())
            row[f"{part}_advantage"] = mean([r.advantage for r in rows])
        rollouts = found["right"] + found["wrong"]
        cosine = torch.nn.functional.cosine_similarity(rollouts, found["constructed"], dim=0)
        result[name] = row | {"rollouts": float(rollouts.norm()), "cosine": float(cosine),
                              "all": float((rollouts + found["constructed"]).norm())}
    model.zero_grad(set_to_none=True)
    return result


def mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None


def reflection_rates(ordinary: list[Rollout], samples_per_prompt: int, exact: bool) -> dict:
    """DSR and ERR of §4.3 by rule; with `exact` also ERR_true, where reflections must be true."""
    reflects = np.array([reflect.reflects(r.text) for r in ordinary])
    shape = -1, samples_per_prompt  # rollouts of a query are adjacent
    correct = np.array([r.reward > 0 for r in ordinary]).reshape(shape)
    reflects = reflects.reshape(shape)
    rates = {key: value for key, value in dsr_err(correct, reflects).items()
             if key in ("DSR", "ERR", "mixed_problems")}
    if exact:
        told = np.array([toy.diagnosis_is_true(r.problem.question, r.text) for r in ordinary])
        mixed = (correct.any(1) & ~correct.all(1))[:, None]
        hit, base = mixed & reflects & correct & told.reshape(shape), mixed & reflects
        rates["ERR_true"] = float(hit.sum() / base.sum()) if base.any() else None
    return rates


NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def attempts(r: Rollout) -> list[str]:
    """Split a response at its reflection markers into attempts that contain a number; a truncated
    response loses its last attempt."""
    parts = [part for part in reflect.MARKERS.split(r.text) if NUMBER.search(part)]
    return parts if r.finished else parts[:-1]


def decisions(ordinary: list[Rollout], exact: bool) -> dict[str, float | None]:
    """Share of right attempts after which the response stops, share of wrong attempts after which
    it continues, and both counts. An attempt is right if its last number is the answer; with
    `exact`, an attempt that contains "Try " is right if its last try has no error."""
    found = [(r, text, r.finished and i == len(parts) - 1) for r in ordinary
             for parts in [attempts(r)] for i, text in enumerate(parts)]
    grades = grade_many([f"\\boxed{{{NUMBER.findall(text)[-1]}}}" for _, text, _ in found],
                        [r.problem.answer for r, _, _ in found])
    at = {True: [], False: []}
    for (r, text, stop), grade in zip(found, grades, strict=True):
        right = grade.reward > 0
        if exact and "Try " in text:
            tried = text[text.rfind("Try "):].split("Answer: ")[0]
            right = toy.first_error(r.problem.question, tried) is None
        at[right].append(stop if right else not stop)
    return {"stop_if_right": mean(at[True]), "right_so_far": len(at[True]),
            "retry_if_wrong": mean(at[False]), "wrong_so_far": len(at[False])}


def recovery(model, tokenizer, ordinary: list[Rollout], *, continuations: int, marker: str,
             seed: int, **sampling) -> dict[str, float]:
    """Continue every response that has an error from the end of its first error: shares that
    reflect and that end right, 'unasked' and with `marker` forced. sampling: see rollout.generate.
    """
    beginnings = []
    for r in ordinary:
        end = toy.first_error(r.problem.question, r.text)
        if end is not None and end < len(r.text):
            n = reflect.token_boundary(tokenizer, r.completion_ids, r.text[:end])
            beginnings.append((r, r.prompt_ids + r.completion_ids[:n]))
    result = {"responses": len(ordinary), "with_an_error": len(beginnings)}
    marker_ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    for name, forced in (("unasked", []), ("forced", marker_ids)):
        groups = generate(model, [ids + forced for _, ids in beginnings], continuations,
                          keys=[(seed, CONTINUATION, i) for i in range(len(beginnings))],
                          **sampling)
        texts, golds = [], []
        for (r, _), completions in zip(beginnings, groups, strict=True):
            for completion in completions:
                texts.append(tokenizer.decode(forced) + completion_text(tokenizer, completion))
                golds.append(r.problem.answer)
        again = [text.startswith(marker) for text in texts]
        right = [grade.reward > 0 for grade in grade_many(texts, golds)]
        both = [b for a, b in zip(again, right, strict=True) if a]
        result |= {f"{name}_reflects": mean(again), f"{name}_right": mean(right),
                   f"{name}_right_if_reflects": mean(both)}
    return result


def counts(constructions: list[Construction], tokenizer, exact: bool) -> dict[str, float]:
    """Counts of candidates: kept, right, groups, groups with both rewards ('mixed_groups'), stating
    equations ('state'), only true equations ('faithful'); with `exact` also localised."""
    built = [c.outcome for c in built_of(constructions)]
    groups: dict[str, set] = {}
    for r in built:
        groups.setdefault(r.group, set()).add(r.reward)
    row = {"candidates": len(constructions), "kept": len(built),
           "right": sum(r.reward > 0 for r in built), "groups": len(groups),
           "mixed_groups": sum(len(rewards) > 1 for rewards in groups.values()),
           "state": sum(r.faithful is not None for r in built),
           "faithful": sum(r.faithful is True for r in built)}
    if exact:
        row["localised"] = 0
        for r in built:
            kept = tokenizer.decode(r.completion_ids[:r.roles.count(PREFIX)])  # the prefix is first
            row["localised"] += toy.first_error(r.problem.question, r.text) == len(kept)
    return row


def main() -> None:
    """Sample one step from the checkpoint, measure it, print and write the results."""
    config = configure(globals())
    c = SimpleNamespace(**config)
    for key in ("init_from", "problems"):
        if not getattr(c, key):
            raise ValueError(
                f"{key} is not set; pass --{key}=PATH, e.g. with config/measure_toy.py")
    print_config(config, c.out)
    if c.threads:
        torch.set_num_threads(c.threads)
    tokenizer = load_tokenizer(c.init_from)
    model = load_hf(c.init_from, device=pick_device(c.device), num_tokens=len(tokenizer)).eval()
    queries = list(enumerate(load_problems(c.problems, c.n_problems)))
    encode_prompts(tokenizer, [p for _, p in queries], c.instruction)
    exact = all(p.uid.split(":")[0] in toy.WORLDS for _, p in queries)
    sampling = {"max_new_tokens": c.max_new_tokens, "temperature": c.temperature,
                "stop_ids": stop_ids_of(tokenizer, model.config.eos_token_id),
                "max_rows": c.max_rows}
    looking = {key: config[key] for key in (
        "temperature", "tokens_per_microbatch", "w_min", "w_max")}
    learning = {key: config[key] for key in (
        "clip_eps", "diagnosis", "train_prefix", "lam", "loss_agg", "loss_norm")}

    ordinary = sample_rollouts(model, tokenizer, queries, c.samples_per_prompt,
                               key=(c.seed, ROLLOUT, 0), **sampling)
    score(ordinary)
    pairs, _ = reflect.select_pairs(ordinary, n_pos=c.n_pos, n_neg=c.n_neg, m_max=c.m_max,
                                    key=(c.seed, PAIRING, 0))
    constructions = {mode: reflect.construct(
        model, tokenizer, pairs, prefix_mode=mode, template=c.template, decoupled=True,
        key=(c.seed, REFLECTION, 0), max_synthesis_tokens=c.max_synthesis_tokens, **sampling)
        for mode in ("micro", "full")}
    built = {mode: built_of(found) for mode, found in constructions.items()}
    for mode in built:
        score([x.outcome for x in built[mode]])
    measured = {
        "config": config, "pass1": mean([r.reward for r in ordinary]),
        "reflect_rate": mean([reflect.reflects(r.text) for r in ordinary]),
        **reflection_rates(ordinary, c.samples_per_prompt, exact),
        "decides": decisions(ordinary, exact),
        "shift": shift(model, ordinary, built, **looking),
        "gradient": gradients(model, ordinary, [x.outcome for x in built["micro"]],
                              **looking, **learning),
        "constructions": {mode: counts(found, tokenizer, exact and mode == "micro")
                          for mode, found in constructions.items()}}
    if exact:
        measured["recovery"] = recovery(model, tokenizer, ordinary, marker=c.marker, seed=c.seed,
                                        continuations=c.continuations, **sampling)
    Path(c.out).parent.mkdir(parents=True, exist_ok=True)
    Path(c.out).write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps({key: v for key, v in measured.items() if key != "config"}, indent=1))


if __name__ == "__main__":
    run_script(main)
