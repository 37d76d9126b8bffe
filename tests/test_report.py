"""The report page: self-contained, everything escaped, no run too bare or too torn to be shown."""
import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import report

EVIL = '<script>alert("x")</script> & <b>bold</b>'


def save_tokenizer(folder) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens that never saw 'é' or '≈': those come out as two and three partial pieces."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator([f"Try {i}: {i}*7=42, 42-21=21 low. Wait, {i} is too low. ok. Answer: " for i in range(20)] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def findx(rng) -> tuple[str, int, list[tuple[str, int]], list[tuple[str, int]], list[tuple[str, int]]]:
    """One problem: question, x, and (text, role) parts of a wrong solution, a reflection on it and a right solution."""
    a, x, guess = int(rng.integers(2, 10)), int(rng.integers(3, 15)), int(rng.integers(2, 15))
    guess += guess == x
    b = int(rng.integers(1, 2 * a))
    first = f"Try {guess}: {guess}*{a}={guess * a}, {guess * a}-{b}={guess * a - b} {'low' if guess < x else 'high'}.\n"
    retry = f"Try {x}: {x}*{a}={x * a}, {x * a}-{b}={x * a - b} ok.\nAnswer: \\boxed{{{x}}}"
    wrong = [(first + f"Answer: \\boxed{{{guess}}}", 0)]
    fixed = [(first, 0), (f"Wait, {guess} is too {'low' if guess < x else 'high'}, as {guess * a - b} ≠ {x * a - b}.\n", 1), (retry, 2)]
    return f"{a}*x-{b}={x * a - b}", x, wrong, fixed, [(retry, 0)]


def make_run(folder, *, reflections: bool, steps=60, seed=0, reward_gain=0.3, questions_per_step=2, hostile=False):
    """A run folder as train.py leaves it, its numbers made up but of realistic size and noise."""
    rng = np.random.default_rng(seed)
    (folder / "rollouts").mkdir(parents=True)
    tokenizer = save_tokenizer(folder / "tokenizer")
    config = dict(method="tapo" if reflections else "grpo", out_dir=str(folder), seed=seed, max_steps=steps, learning_rate=6e-4,
                  prompts_per_step=32, samples_per_prompt=8, lam=1.0, problems="data/findx.jsonl", diagnosis="mask",
                  ref_advantage="reward" if reflections else "group")
    (folder / "config.json").write_text(json.dumps(config))

    def noise(scale):
        return float(rng.normal(0, scale))

    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            t = step / steps
            row = {"step": step, "rollout/pass1": 0.34 + reward_gain * t**0.6 + noise(0.03), "train/loss": 0.01 + noise(0.02),
                   "train/grad_norm": 0.9 - 0.3 * t + abs(noise(0.12)) + 5 * (step == 37), "rollout/length": 31 + 14 * t + noise(1.2),
                   "train/kl_ref": 0.08 * t + abs(noise(0.004)), "train/lr": 6e-4, "train/entropy": 0.5 - 0.2 * t,
                   "time/step": 0.66, "time/generate": 0.27 + noise(0.01), "time/grade": 0.01, "time/reflect": 0.0,
                   "time/update": 0.3 + noise(0.01), "time/tokens_per_second": 32000 + noise(900)}
            if reflections:
                row |= {"train/ots_weight": 0.985 + noise(0.006), "time/reflect": 0.09, "time/step": 0.76,
                        "reflect/eligible": round(14 + noise(2)), "reflect/candidates": round(39 + noise(4)),
                        "reflect/parsed": min(1, 0.84 + 0.1 * t + noise(0.02)), "reflect/kept": round(31 + noise(3)),
                        "reflect/verbatim": 0.96 + noise(0.01), "reflect/mixed_groups": abs(noise(0.04)),
                        "reflect/correct": 0.97 + noise(0.01), "reflect/length": 47 + noise(1),
                        "reflect/dropped_unparsable": round(abs(4 + noise(1))), "reflect/dropped_no_divergence": round(2 + noise(0.6)),
                        "reflect/dropped_special_token": 0, "reflect/logprob_prefix": -0.42 + noise(0.03),
                        "reflect/logprob_diagnosis": -1.6 + 0.7 * t + noise(0.1), "reflect/logprob_correction": -0.25 + noise(0.02),
                        "reflect/ots_prefix": 1.01 + noise(0.01), "reflect/ots_diagnosis": 0.55 + 0.2 * t + noise(0.03),
                        "reflect/ots_correction": 1.02 + noise(0.01), "reflect/ots_first_diagnosis": 0.06 + 0.1 * t + abs(noise(0.01))}
            if step % 10 == 0:
                row |= {"eval/pass1": 0.36 + reward_gain * t**0.6 + noise(0.01), "eval/length": 30 + 14 * t, "eval/truncated": 0.02}
            file.write(json.dumps(row) + "\n")
            if step % 2 == 0 or step == 1:
                rollouts = [r for q in range(questions_per_step) for r in make_rollouts(rng, tokenizer, step, q, reflections, hostile)]
                (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    return folder


def make_rollouts(rng, tokenizer, step, query, reflections, hostile) -> list[dict]:
    question, x, wrong, fixed, right = findx(rng)
    if hostile:
        question, wrong = EVIL, [(EVIL + " café ≈ 3", 0)]
        fixed = [(EVIL + " café", 0), (" ≈ Wait", 1), (" no.", 2)]
    out = []
    for parts, reward, is_reflection in [(wrong, 0.0, False), (right, 1.0, False)] + [(fixed, 1.0, True)] * reflections:
        ids, roles = [], []
        for text, role in parts:
            new = tokenizer.encode(text)
            ids, roles = ids + new, roles + [role] * len(new)
        ids, roles = ids + [tokenizer.eos_token_id], roles + [roles[-1]]
        weights = [float(np.clip(rng.lognormal(0, 0.12), 0.01, 10)) for _ in ids]
        if 1 in roles:
            weights[roles.index(1)] = 0.06
            weights[roles.index(1) + 1] = 0.3
        logprobs = [-abs(float(rng.normal(0, 0.4))) for _ in ids]
        text = "".join(text for text, _ in parts)
        out.append(dict(uid=f"findx-{step}-{query}", group=f"{step}-{query}" + "_reflected" * is_reflection, query=query, step=step,
                        prompt_ids=[1, 2], completion_ids=ids, roles=roles, finished=True, text=text, is_reflection=is_reflection,
                        sample_logprobs=None if is_reflection else logprobs, reward=reward, grade="correct" if reward else "wrong",
                        answer=text.split("{")[-1][:-1] if "{" in text else None, advantage=1.0 if reward else -0.58,
                        logprobs=logprobs if is_reflection else None, ots_weights=weights if is_reflection else None,
                        prompt=question, question=question, gold=str(x)))
    return out


def make_eval(path, rate, seed=0, n=120, samples=16):
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(7).normal(0, 0.25, n)
    c = [int(rng.binomial(samples, float(np.clip(rate + h, 0, 1)))) for h in hard]
    settings = []
    for temperature, top_p, lift in ((1.0, 1.0, 0.0), (0.6, 0.9, 0.06)):
        values = {k: float(min(1, lift + np.mean([1 - np.prod([(samples - ci - j) / (samples - j) for j in range(k)]) for ci in c])))
                  for k in (1, 5)}
        settings.append({"temperature": temperature, "top_p": top_p, "samples": samples, "max_new_tokens": 54,
                         "pass@k": {str(k): {"value": v, "low": v - 0.03, "high": min(1, v + 0.03)} for k, v in values.items()},
                         "truncated": 0.021, "no_answer": 0.004, "DSR": 0.351, "ERR": 0.487 if rate > 0.6 else None, "reflect_rate": 0.6,
                         "per_problem": [{"uid": f"p{i}", "level": "1", "n": samples, "c": ci, "truncated": 0} for i, ci in enumerate(c)]})
    path.write_text(json.dumps({"config": {}, "model": "m", "settings": settings}))
    return path
