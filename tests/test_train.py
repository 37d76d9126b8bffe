"""The whole loop on a tiny model: what a step computes, what it leaves on disk, how it resumes and
how it refuses.

A random model writes no right answers, so `author` stands in for the sampler where a test needs
mixed groups and real constructions: it writes toy solutions, right and wrong, and the perfect
synthesis of each pair.
"""
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HostReads

import checkpoint
import configurator
import opsd
import reflect
import rollout
import toy
import train
import update
from data import save_problems
from hf import load_hf, save_hf
from metrics import means
from model import CausalLM, ModelConfig
from rollout import Completion, Rollout

ROOT = Path(train.__file__).parent
KNOBS = {
    "instruction": "", "template": "short", "max_steps": 3, "prompts_per_step": 4,
    "samples_per_prompt": 4, "n_pos": 1, "n_neg": 1, "m_max": 2, "max_new_tokens": 60,
    "max_synthesis_tokens": 130, "learning_rate": 1e-3, "warmup_steps": 1, "threads": 1,
    "tokens_per_microbatch": 512,
    "eval_interval": 0,
    "save_interval": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny random checkpoint and problem files."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id))
    save_hf(model, tokenizer, folder / "model")
    save_problems(toy.make_problems("findx", "train", 10), folder / "train.jsonl")
    save_problems(toy.make_problems("findx", "validation", 3), folder / "held_out.jsonl")
    return folder


def run(start, out, monkeypatch, **knobs):
    """train.main() in this process, with its knobs set; returns the rows of metrics.jsonl."""
    settings = KNOBS | {"init_from": str(start / "model"), "problems": str(start / "train.jsonl"),
                        "out_dir": str(out)} | knobs
    for key, value in settings.items():
        monkeypatch.setattr(train, key, value)
    train.main()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def author(monkeypatch, solved=lambda query: True):
    """Replace the sampler: of a solved query's group the first response is right, and every
    synthesis is the perfect one."""
    tokenizer = toy.make_tokenizer()

    def complete(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return Completion(ids, [-1.0] * len(ids), True)

    def generate(model, prompts, n, *, keys, **_):
        groups = []
        for prompt, key in zip(prompts, keys, strict=True):
            text = tokenizer.decode(prompt).removeprefix(toy.USER).removesuffix(toy.ASSISTANT)
            rng = np.random.default_rng(key)
            if "<wrong>" in text:
                question, wrong = text.split("</wrong>")[0].split("\n<wrong>")
                analysis, prefix, reflection, correction = toy.construction(question, wrong)
                body = f"{prefix}<reflection>{reflection}</reflection>{correction}"
                if text.endswith("<full>"):
                    body = toy.solution(rng, question, "reflective")[0]
                groups.append([complete(f"<analysis>{analysis}</analysis>"
                                        f"<reconstruction>{body}</reconstruction>")])
            else:
                kinds = ["direct" if solved(key[-1]) else "give_up", *["give_up"] * (n - 1)]
                groups.append([complete(toy.solution(rng, text, kind)[0]) for kind in kinds])
        return groups

    monkeypatch.setattr(rollout, "generate", generate)
    monkeypatch.setattr(reflect, "generate", generate)


def rows_with_grad(monkeypatch) -> list[bool]:
    """Filled by every forward over targets: for each row, whether it is for a gradient."""
    with_grad, forward = [], CausalLM.forward

    def watch(self, inputs, targets=None, **k):
        with_grad.extend([torch.is_grad_enabled()] * len(inputs) if targets is not None else [])
        return forward(self, inputs, targets, **k)

    monkeypatch.setattr(CausalLM, "forward", watch)
    return with_grad


def around_micro_batches(monkeypatch, enter, leave) -> None:
    """enter() before the first micro-batch of an update is made, leave(how many there were) before
    its gradient is clipped."""
    collate, clip, step, batches = update.collate, torch.nn.utils.clip_grad_norm_, train.update, []

    def entered(*args, **kwargs):
        batches.clear()  # of set_old_logprobs, once a step
        enter()
        return step(*args, **kwargs)

    def counted(*args):
        batches.append(args)
        return collate(*args)

    def last_out(*args):
        leave(len(batches))
        batches.clear()
        return clip(*args)

    monkeypatch.setattr(train, "update", entered)
    monkeypatch.setattr(update, "collate", counted)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", last_out)


def rollouts_of(out, step=1):
    return [json.loads(line)
            for line in (out / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def weights_of(folder):
    return {name: p.detach() for name, p in load_hf(folder).named_parameters()}


# --------------------------------------------------------------------------------------------------
# what a step computes


def test_on_policy_ratio_is_exactly_one_and_nothing_is_clipped(start, tmp_path, monkeypatch):
    """Trap 9. Bug: old log-probs from another pass (dropout, bf16, another batch shape) make the
    first ratio differ from 1."""
    author(monkeypatch)
    for row in run(start, tmp_path / "out", monkeypatch):
        assert row["train/ratio_max"] == 1.0 and row["train/clip_fraction"] == 0.0


def test_no_extra_pass_is_spent_on_old_logprobs(start, tmp_path, monkeypatch):
    """Trap 9. One update: one training forward a micro-batch, and one of the reference when its KL
    is logged."""
    author(monkeypatch)
    calls = []
    forward = CausalLM.forward
    monkeypatch.setattr(CausalLM, "forward", lambda self, *a,
                        **k: (calls.append(1), forward(self, *a, **k))[1])
    run(start, tmp_path / "a", monkeypatch, max_steps=1, log_kl=False, tokens_per_microbatch=10**6)
    once = len(calls)
    run(start, tmp_path / "b", monkeypatch, max_steps=1, log_kl=True, tokens_per_microbatch=10**6)
    twice = len(calls) - once
    run(start, tmp_path / "c", monkeypatch, max_steps=1, log_kl=False, tokens_per_microbatch=10**6,
        updates_per_step=2)
    # the last: one old pass, two updates
    assert (once, twice, len(calls) - once - twice) == (1, 2, 3)


def test_a_rollout_of_advantage_zero_takes_no_pass_and_changes_nothing(
        start, tmp_path, monkeypatch):
    """Bugs: groups all right or all wrong left out of the denominator; moments that freeze where no
    row at all learns. The other run gives them an advantage of 1e-30, so that they take part in
    everything."""
    compute, with_grad = update.advantages, rows_with_grad(monkeypatch)
    # nothing to learn in the third step
    author(monkeypatch, solved=lambda query: query in (0, 2, 5))
    knobs = {"method": "grpo", "log_kl": False}
    rows = run(start, tmp_path / "skipped", monkeypatch, **knobs)
    # 3 mixed groups of 4; a filler in step 3
    assert len(with_grad) == 3 * 4 + 1 and all(with_grad)
    with_grad.clear()
    monkeypatch.setattr(update, "advantages", lambda *a, **k: (v := compute(*a, **k))
                        + 1e-30 * (v == 0))
    expected = run(start, tmp_path / "all", monkeypatch, **knobs)
    assert all(with_grad) and len(with_grad) == 3 * 16
    logs = ("train/entropy", "train/parity_mean", "train/parity_max", "train/trained_tokens",
            "train/clip_fraction",
            "train/ratio_max")  # of the rows that take a pass
    for row, other in zip(rows, expected, strict=True):
        for key in {k for k in row if not k.startswith("time/")} - set(logs):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    # AdamW scales an entry of gradient 1e-9 up to lr, rounding included: few entries may differ by
    # more
    ours, theirs = (weights_of(tmp_path / name / "step_000003") for name in ("skipped", "all"))
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert (apart > 1e-6).float().mean() < 0.01 and apart.max() < 1e-4


@pytest.mark.parametrize("knobs", [{"method": "grpo", "kl_coef": 0.1}, {"method": "opsd"},
                                   {"method": "sft"}], ids=str)
def test_where_the_advantage_is_not_the_whole_loss_rows_of_advantage_zero_learn(
        knobs, start, tmp_path, monkeypatch):
    """Bug: KL, OPSD and SFT lose the rows whose group is all right or all wrong, or, under Eq. 5,
    every right construction."""
    with_grad = rows_with_grad(monkeypatch)
    author(monkeypatch, solved=lambda query: query < 2 or knobs["method"] == "opsd")
    if knobs["method"] == "opsd":
        monkeypatch.setattr(update, "advantages",
                            lambda rewards, *a, **k: torch.zeros_like(rewards))
    row = run(start, tmp_path / "out", monkeypatch, max_steps=1, **knobs)[0]
    if knobs["method"] == "sft":
        assert row["reflect/correct"] == 1 and sum(with_grad) == row["reflect/kept"] > 1
        assert row["train/grad_norm"] > 0.1
    # a teacher is shown another right response: of four groups with one, the three wrong ones learn
    else:
        assert sum(with_grad) == (12 if knobs["method"] == "opsd" else 16)


@pytest.mark.parametrize("knobs", [{}, {"method": "sft"}, {"method": "opsd"},
                                   {"method": "opsd", "opsd_loss": "sampled"},
                                   {"kl_coef": 0.1, "loss_agg": "token"}, {"updates_per_step": 2}])
def test_no_micro_batch_waits_for_the_device(knobs, start, tmp_path, monkeypatch):
    """Bug: a loss or a count read inside the loop: on a GPU the next micro-batch is launched only
    when this one is done."""
    reads, looked_at = HostReads(), []

    def leave(batches):
        reads.__exit__(None, None, None)
        looked_at.append((batches, list(reads.found)))

    author(monkeypatch)
    around_micro_batches(monkeypatch, reads.__enter__, leave)
    run(start, tmp_path / "out", monkeypatch, max_steps=1, tokens_per_microbatch=200, **knobs)
    assert looked_at and all(seen > 1 and found == [] for seen, found in looked_at)


def test_second_update_of_a_step_is_off_policy(start, tmp_path, monkeypatch):
    """Bug: old log-probs recomputed inside the update loop keep the ratio at 1 for ever and
    clipping never acts."""
    author(monkeypatch)
    row = run(start, tmp_path / "out", monkeypatch, max_steps=1, updates_per_step=3,
              learning_rate=1e-2)[0]
    assert row["train/ratio_max"] > 1.001


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_sampler_and_trainer_agree_and_see_new_weights(dtype, start, tmp_path, monkeypatch):
    """Traps 8, 10. Bug: a sampler with stale weights, or another temperature in the trainer than in
    the sampler."""
    # a random model is always wrong: alternate rewards, so that weights really move
    rewards = iter(range(10**6))

    def score(rollouts):
        for r in rollouts:
            r.reward, r.grade = float(next(rewards) % 2), "correct"

    monkeypatch.setattr(train, "score", score)
    rows = run(start, tmp_path / "out", monkeypatch, method="grpo", learning_rate=0.05,
               temperature=0.7, dtype=dtype)
    assert rows[0]["train/kl_ref"] == pytest.approx(0, abs=1e-6)  # the reference computes alike
    assert rows[-1]["train/kl_ref"] > 0.01  # the policy has moved ...
    gap, most = ("mean", 0.05) if dtype == "bfloat16" else ("max", 1e-4)
    assert max(row[f"train/parity_{gap}"] for row in rows) < most  # ... and the sampler with it


def test_an_evaluation_has_the_weights_after_the_update(start, tmp_path, monkeypatch):
    """Trap 10. Bug: the sampler of the step's rollouts."""
    author(monkeypatch)
    seen = []
    monkeypatch.setattr(train, "evaluate", lambda sampler, *_, **__: seen.append(
        [p.clone() for p in sampler.parameters()]) or {"eval/pass1": 0.0})
    run(start, tmp_path / "out", monkeypatch, max_steps=2, dtype="bfloat16", learning_rate=1e-2,
        warmup_steps=0, eval_interval=1, save_interval=1,
        eval_problems=str(start / "held_out.jsonl"))
    assert len(seen) == 2
    for step, weights in enumerate(seen, 1):
        saved = load_hf(tmp_path / f"out/step_{step:06d}").parameters()
        assert all(torch.equal(w, p.bfloat16()) for w, p in zip(weights, saved, strict=True))


def test_every_parameter_changes_and_stays_fp32(start, tmp_path, monkeypatch):
    """Traps 19, 20. Bug: a frozen or forgotten tensor; bf16 masters, which lr 1e-6 cannot move."""
    author(monkeypatch)
    run(start, tmp_path / "out", monkeypatch, max_steps=1, learning_rate=1e-6, warmup_steps=0,
        dtype="bfloat16")
    before, after = weights_of(start / "model"), weights_of(tmp_path / "out" / "step_000001")
    # as they are kept
    config = json.loads((tmp_path / "out/step_000001/config.json").read_text())
    assert config["torch_dtype"] == "float32"
    for name, p in after.items():
        assert (p != before[name]).float().mean() > 0.2, name


def test_constructions_carry_roles_weights_and_their_own_group(start, tmp_path, monkeypatch):
    """§3.4. Bug: reflections in the group of the originals, or trained under the synthesis
    prompt."""
    author(monkeypatch)
    row = run(start, tmp_path / "out", monkeypatch, max_steps=1)[0]
    rollouts = rollouts_of(tmp_path / "out")
    reflections = [r for r in rollouts if r["is_reflection"]]
    assert len(rollouts) - len(reflections) == 16 and len(reflections) == 8 == row["reflect/kept"]
    for r in reflections:
        original = next(o for o in rollouts if o["query"] == r["query"])
        assert r["group"] == original["group"] + "_reflected"
        assert r["prompt_ids"] == original["prompt_ids"]
        assert set(r["roles"]) == {0, 1, 2} and r["reward"] == 1.0 and r["grade"] == "correct"
        assert r["sample_logprobs"] is None
        assert len(r["ots_weights"]) == len(r["logprobs"]) == len(r["completion_ids"])
    # two right constructions of a group: std 0, advantage 0 (Eq. 5); their rollouts, 1 right of 4,
    # do not (Eq. 1)
    assert {r["advantage"] for r in reflections} == {0.0}
    assert {round(o["advantage"], 3) for o in rollouts if not o["is_reflection"]} == {1.732, -0.577}


def test_a_run_that_loses_every_construction_says_so(start, tmp_path, monkeypatch, capsys):
    """Bug: 22 steps of `y_ref 0/64`, all of them prompt_too_long, and not a word: it was GRPO."""
    author(monkeypatch)
    monkeypatch.setattr(reflect, "build_reflection", lambda *_, **__: "unparsable")
    run(start, tmp_path, monkeypatch, max_steps=4, method="tapo")
    found = [line for line in capsys.readouterr().out.split("\n")
             if line.startswith("WARNING: no construction")]
    assert len(found) == 2
    assert "in 3 steps, so this is GRPO: most are unparsable; cold start the policy" in found[0]


def test_an_opsd_teacher_counts_in_its_micro_batch_and_reads_within_the_context(
        start, tmp_path, monkeypatch):
    """Bug: 1,024 padded tokens asked, 2,511 run; and positions beyond the model's context."""
    author(monkeypatch, solved=lambda query: True)
    read, collate = [], opsd.collate
    monkeypatch.setattr(opsd, "collate", lambda rows: read.append(rows) or collate(rows))
    budget = 150
    metrics, = run(start, tmp_path / "a", monkeypatch, max_steps=1, method="opsd",
                   tokens_per_microbatch=budget)
    lengths = [[len(r.prompt_ids) + len(r.completion_ids) for r in rows] for rows in read]
    assert all(len(row) == 1 or len(row) * max(row) <= budget
               for row in lengths) and any(len(row) > 1 for row in lengths)
    assert metrics["opsd/taught"] > 0 == metrics["opsd/teacher_too_long"]
    longest = max(map(max, lengths))
    set_teachers = opsd.set_teachers
    monkeypatch.setattr(opsd, "set_teachers", lambda *args,
                        **k: set_teachers(*args, **k | {"context": longest - 1}))
    read.clear()
    fewer, = run(start, tmp_path / "b", monkeypatch, max_steps=1, method="opsd")
    assert max(len(r.prompt_ids) + len(r.completion_ids) for rows in read for r in rows) < longest
    both = fewer["opsd/taught"] + fewer["opsd/teacher_too_long"]
    assert both == pytest.approx(metrics["opsd/taught"])
    assert fewer["opsd/teacher_too_long"] > 0


FLAGS = [{"method": "grpo"}, {"method": "opsd"}, {"method": "opsd", "opsd_loss": "sampled"},
         {"method": "sft"}, {"prefix_mode": "copy"}, {"prefix_mode": "full"},
         {"decoupled": False}, {"weighting": "none"}, {"diagnosis": "ots"},
         {"diagnosis": "train"}, {"train_prefix": False}, {"ref_advantage": "orig"}, {"lam": 0.5},
         {"loss_agg": "token"}, {"loss_norm": "merged"}, {"kl_coef": 0.1, "updates_per_step": 2}]


def test_every_variant_runs_and_trains_something_else(start, tmp_path, monkeypatch):
    """Bug: a flag that is read nowhere. All from one start, one step, other weights from every one
    of them."""
    author(monkeypatch)
    base = {"max_steps": 1, "warmup_steps": 0, "ref_advantage": "reward"}
    run(start, tmp_path / "base", monkeypatch, **base)
    seen = {"base": weights_of(tmp_path / "base" / "step_000001")}
    for number, flags in enumerate(FLAGS):
        row = run(start, tmp_path / str(number), monkeypatch, **(DEFAULTS | base | flags))[0]
        assert np.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0, flags
        weights = weights_of(tmp_path / str(number) / "step_000001")
        for other, theirs in seen.items():
            assert any(not torch.equal(p, theirs[name]) for name,
                       p in weights.items()), f"{flags} trained just like {other}"
        seen[str(flags)] = weights
    # and one that must NOT: where every construction is right, Eq. 5 has no spread to learn from,
    # and TAPO is GRPO
    run(start, tmp_path / "group", monkeypatch, **(DEFAULTS | base | {"ref_advantage": "group"}))
    silent = weights_of(tmp_path / "group/step_000001")
    assert all(torch.equal(p, silent[name]) for name, p in seen[str({"method": "grpo"})].items())


def test_another_weighting_is_one_entry_of_the_dictionary(start, tmp_path, monkeypatch):
    """README, 'A weighting of your own'. Bug: a knob that is read nowhere, or that weighs ordinary
    rollouts too."""
    author(monkeypatch)
    monkeypatch.setitem(train.WEIGHTINGS, "likelihood", lambda logprobs, _, low,
                        high: logprobs.detach().exp().clamp(low, high))
    monkeypatch.setitem(train.__annotations__, "weighting", configurator.one_of(*train.WEIGHTINGS))
    knobs = {"max_steps": 1, "warmup_steps": 0, "ref_advantage": "reward"}
    for name, more in (("ots", {}), ("likelihood", {"weighting": "likelihood"}),
                       ("none", {"weighting": "none"})):
        run(start, tmp_path / name, monkeypatch, **{"weighting": "ots"} | knobs | more)
    seen = {folder.name: weights_of(folder / "step_000001") for folder in tmp_path.iterdir()}

    def equal(a, b):
        return all(torch.equal(p, seen[b][name]) for name, p in seen[a].items())

    assert not equal("ots", "likelihood") and not equal("none", "likelihood")
    assert not equal("none", "ots")
    r = next(r for r in rollouts_of(tmp_path / "likelihood") if r["is_reflection"])
    assert r["ots_weights"] == pytest.approx([max(0.01, math.exp(lp)) for lp in r["logprobs"]],
                                             rel=1e-5)


DEFAULTS = {key: getattr(train, key) for flags in FLAGS for key in flags}


def test_dropping_negatives_drops_wrong_constructions_only(start, tmp_path, monkeypatch):
    """Table 4, w/o Negative. Bug: it also drops the wrong rollouts, or the wrong constructions
    stay."""
    author(monkeypatch)
    score = train.score

    def half_wrong(rollouts):
        score(rollouts)
        for i, r in enumerate(r for r in rollouts if r.is_reflection):
            r.reward = float(i % 2)

    monkeypatch.setattr(train, "score", half_wrong)
    kept = {}
    for keep in ("all", "right"):
        row = run(start, tmp_path / keep, monkeypatch, max_steps=1, keep=keep)[0]
        rollouts = rollouts_of(tmp_path / keep)
        kept[keep] = [r["reward"] for r in rollouts if r["is_reflection"]]
        assert sum(r["reward"] == 0 for r in rollouts if not r["is_reflection"]) == 12
        assert row["reflect/correct"] == 0.5  # the log still tells how many were right
        assert row["reflect/kept"] == len(kept[keep])
    assert sorted(kept["all"]) == [0.0] * 4 + [1.0] * 4 and kept["right"] == [1.0] * 4


def test_only_constructions_that_state_something_false_are_left_out_as_unfaithful(
        start, tmp_path, monkeypatch):
    """Bug: keep = 'faithful' that goes by the reward."""
    author(monkeypatch)
    score, judged = train.score, (True, False, None)

    def judge(rollouts):
        score(rollouts)
        for i, r in enumerate(r for r in rollouts if r.is_reflection):
            r.faithful, r.reward = judged[i % 3], float(i % 2)

    monkeypatch.setattr(train, "score", judge)
    run(start, tmp_path / "out", monkeypatch, max_steps=1, keep="faithful")
    kept = [(r["faithful"], r["reward"]) for r in rollouts_of(tmp_path / "out")
            if r["is_reflection"]]
    assert set(kept) == {(True, 0.0), (True, 1.0), (None, 0.0), (None, 1.0)}


def test_a_prompt_belongs_to_its_problem_whatever_uids_other_files_use(
        start, tmp_path, monkeypatch):
    """Bug: prompts kept by uid, so that held-out problems numbered alike replace the questions
    trained on."""
    author(monkeypatch)
    for split, name in (("train", "train.jsonl"), ("validation", "held_out.jsonl")):
        problems = toy.make_problems("findx", split, 8)
        for i, p in enumerate(problems):
            p.uid = str(i)
        save_problems(problems, tmp_path / name)
    run(start, tmp_path / "out", monkeypatch, max_steps=1, method="grpo",
        problems=str(tmp_path / "train.jsonl"),
        eval_problems=str(tmp_path / "held_out.jsonl"))
    for r in rollouts_of(tmp_path / "out"):
        assert r["prompt"] == toy.USER + r["question"] + toy.ASSISTANT


def test_an_unfinished_response_is_wrong_even_with_the_right_box():
    """Bug: a truncated response that happens to have boxed the answer already is rewarded for never
    stopping."""
    problem = toy.make_problems("findx", "train", 1)[0]
    r = Rollout(problem, "0", [1], [2], [0], finished=False,
                text=f"\\boxed{{{problem.answer}}} and so on")
    train.score([r])
    assert (r.reward, r.grade) == (0.0, "truncated")


def test_learning_rate_is_a_function_of_the_step():
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    rates = [update.set_learning_rate(optimizer, step, learning_rate=1.0, warmup_steps=4,
                                      max_steps=14) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates == rates[:4] + sorted(rates[4:], reverse=True)
    assert rates[9] == pytest.approx(0.5) and 0 < rates[-1] < 0.05
    assert optimizer.param_groups[0]["lr"] == rates[-1]


# --------------------------------------------------------------------------------------------------
# a run that cannot learn says so


def test_a_run_that_cannot_learn_says_so(start, tmp_path, monkeypatch, capsys):
    """Bug: loss 0 for a night. All rewards equal, all truncated: each has its own warning."""
    # an id that is never sampled: nothing ever ends
    monkeypatch.setattr(train, "stop_ids_of", lambda *_: (10**6,))
    row = run(start, tmp_path / "out", monkeypatch, max_steps=1, max_new_tokens=3)[0]
    printed = capsys.readouterr().out
    assert ("WARNING: this run cannot learn from such a step: in every group all rewards are "
            "equal") in printed
    assert "too hard" in printed
    assert "WARNING: every response was truncated at max_new_tokens = 3" in printed
    assert row["train/loss"] == 0.0 and row["train/grad_norm"] == 0.0  # and nothing is NaN


def test_twenty_steps_without_an_eligible_query_are_announced(start, tmp_path, monkeypatch, capsys):
    run(start, tmp_path / "out", monkeypatch, max_steps=20, max_new_tokens=2, prompts_per_step=1,
        samples_per_prompt=2)
    lines = [line for line in capsys.readouterr().out.splitlines()
             if "no query was eligible" in line]
    assert len(lines) == 1 and "for 20 steps" in lines[0] and "lower n_pos" in lines[0]


def test_a_parity_gap_raises_the_alarm(start, tmp_path, monkeypatch, capsys):
    """Trap 8. The author's log-probs are made up: that must not pass unnoticed."""
    author(monkeypatch)
    run(start, tmp_path / "out", monkeypatch, max_steps=1)
    assert "WARNING: sampler and trainer disagree" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# disk: resume, kill, full


VOLATILE = ("time/",)


def same_numbers(a, b):
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in a] == [
        {k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in b]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
        dtype, start, tmp_path, monkeypatch):
    """Trap 22. Bug: other queries, noise, learning rate or moments after a resume; being off by one
    step."""
    author(monkeypatch)
    knobs = {"max_steps": 5, "ref_advantage": "reward", "dtype": dtype}
    whole = run(start, tmp_path / "whole", monkeypatch, **knobs)

    class Killed(Exception):
        pass

    def killed_at_4(step, *_):
        if step == 4:  # one step after the last checkpoint
            raise Killed
        return ""

    monkeypatch.setattr(train, "save_interval", 3)
    with monkeypatch.context() as patch:
        patch.setattr(train, "console_line", killed_at_4)
        with pytest.raises(Killed):
            run(start, tmp_path / "parts", monkeypatch, **knobs, save_interval=3)
    # a line torn by the kill
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"step": 5, "train/lo')
    parts = run(start, tmp_path / "parts", monkeypatch, **knobs, save_interval=3, resume=True)
    assert [row["step"] for row in parts] == [1, 2, 3, 4, 5] and same_numbers(whole, parts)
    ours, theirs = (weights_of(tmp_path / name / "step_000005") for name in ("whole", "parts"))
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    for step in range(1, 6):
        assert rollouts_of(tmp_path / "whole", step) == rollouts_of(tmp_path / "parts", step)


def launch(start, out, *more):
    arguments = KNOBS | {"init_from": start / "model", "problems": start / "train.jsonl",
                         "out_dir": out}
    return [sys.executable, str(ROOT / "train.py"),
            *(f"--{key}={value}" for key, value in arguments.items()), *more]


def test_kill_9_at_any_moment_leaves_a_run_that_resumes_to_the_same_losses(start, tmp_path):
    """Bug: a torn checkpoint, rollout file or log after a kill."""
    knobs = ["--max_steps=6", "--save_interval=1", "--method=grpo", "--log_kl=False"]
    quiet = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL,
             "stderr": subprocess.PIPE}
    subprocess.run(launch(start, tmp_path / "whole", *knobs), check=True, **quiet)
    out = tmp_path / "killed"
    child = subprocess.Popen(launch(start, out, *knobs), start_new_session=True, **quiet)
    deadline = time.time() + 120
    while not (out / "step_000002").exists() and child.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert 0 < len(checkpoint.checkpoints(out))
    for folder in checkpoint.checkpoints(out):
        load_hf(folder)
    for file in (out / "rollouts").glob("step_*"):
        [json.loads(line) for line in file.read_text().splitlines()]
    subprocess.run(launch(start, out, *knobs, "--resume=True"), check=True, **quiet)
    logs = [(folder / "metrics.jsonl").read_text().splitlines()
            for folder in (tmp_path / "whole", out)]
    whole, resumed = ([json.loads(line) for line in lines] for lines in logs)
    assert len(whole) == 6 and same_numbers(whole, resumed)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_where(start, tmp_path, monkeypatch):
    """Bug: the old checkpoint is deleted, or overwritten in place, before the new one is
    complete."""
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    run(start, tmp_path / "out", monkeypatch, max_steps=2, method="grpo")
    before = weights_of(tmp_path / "out/step_000002")
    for victim in ("save_hf", "dcp.save"):
        with monkeypatch.context() as patch:
            patch.setattr(f"checkpoint.{victim}", full)
            with pytest.raises(ValueError,
                               match=r"cannot save .*step_000004 .*No space left.*goes on from "
                                     r".*step_000002"):
                model, tokenizer = load_hf(start / "model"), toy.make_tokenizer()
                optimizer = torch.optim.AdamW(model.parameters())
                saver = checkpoint.Saver(tokenizer, {"out_dir": tmp_path / "out", "keep_last": 1})
                saver.save(tmp_path / "out/step_000004", model, optimizer, 4)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path / "out")] == ["step_000002"]
    assert not list((tmp_path / "out").glob(".step*"))
    assert all(torch.equal(p, before[name]) for name,
               p in weights_of(tmp_path / "out/step_000002").items())


def test_a_write_that_really_fails_ends_in_one_line(start, tmp_path):
    """Bug: safetensors and torch.distributed.checkpoint raise exceptions of their own, one not even
    an Exception."""
    out, limit = tmp_path / "out", 60_000  # bytes a file may have: the weights need 82,000

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(launch(start, out, "--max_steps=1", "--method=grpo"), capture_output=True,
                          text=True,
                          preexec_fn=small_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: cannot save" in done.stderr and "goes on from the start" in done.stderr
    assert checkpoint.checkpoints(out) == [] and not list(out.glob(".step*"))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1  # what was computed is kept


def test_only_the_newest_checkpoints_are_kept(start, tmp_path, monkeypatch):
    run(start, tmp_path / "out", monkeypatch, max_steps=4, save_interval=1, keep_last=2,
        method="grpo")
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path / "out")] == [
        "step_000003", "step_000004"]


# --------------------------------------------------------------------------------------------------
# bad input: one line with value, rule and fix


@pytest.mark.parametrize("knobs, says", [
    ({"n_pos": 2, "n_neg": 4},
     r"n_pos \+ n_neg = 2 \+ 4 exceeds samples_per_prompt = 4.*lower them "
     r"or sample more"),
    ({"method": "ppo"}, r"method = 'ppo' must be one of 'tapo', 'grpo', 'opsd', 'sft'"),
    ({"temperature": 0.0}, r"temperature = 0.0 must be above 0"),
    ({"samples_per_prompt": 1, "method": "grpo"}, r"samples_per_prompt = 1 must be at least 2"),
    ({"max_steps": 0}, r"max_steps = 0 must be at least 1"),
    ({"max_rows": -1}, r"max_rows = -1 must be at least 0"),
    ({"init_from": ""}, r"init_from is not set; pass --init_from=PATH"),
    ({"problems": "nowhere.jsonl"}, r"no problem file at nowhere.jsonl"),
    ({"init_from": "/nowhere/model"}, r"/nowhere/model"),
    ({"max_new_tokens": 300},
     r"max_new_tokens = 300 do not fit the model's context of 256; lower "
     r"max_new_tokens"),
    ({"instruction": "Think in English."}, r"tokenizer has no token for .*in the prompt"),
])
def test_bad_input_is_refused_at_start_in_one_line(start, tmp_path, monkeypatch, knobs, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says) as refusal:
        run(start, tmp_path / "out", monkeypatch, **knobs)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_resume_with_a_changed_config_lists_the_differences(start, tmp_path, monkeypatch):
    run(start, tmp_path / "out", monkeypatch, max_steps=2, method="grpo")
    with pytest.raises(ValueError,
                       match=r"config has changed since .*: lam: 1.0 -> 2.0; learning_rate: 0.001 "
                             r"-> 0.5"):
        run(start, tmp_path / "out", monkeypatch, max_steps=2, method="grpo", resume=True,
            learning_rate=0.5, lam=2.0)


def test_a_second_run_in_the_same_folder_is_refused(start, tmp_path, monkeypatch):
    run(start, tmp_path / "out", monkeypatch, max_steps=1, method="grpo")
    with pytest.raises(ValueError,
                       match=r"out_dir = .* already holds a run; continue it with --resume=True"):
        run(start, tmp_path / "out", monkeypatch, max_steps=1, method="grpo")


def test_errors_leave_the_script_with_one_line_and_exit_code_1(start, tmp_path):
    done = subprocess.run(launch(start, tmp_path / "out", "--n_neg=9"), capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: n_pos + n_neg = 1 + 9")
    assert done.stderr.count("\n") == 1


def test_means_divide_sums_once():
    """Bug: the mean of per-batch means, wrong when batches differ in size."""
    assert means({"a": 6.0, "a#": 3.0, "b": 2.0, "c": 0.0, "c#": 0.0}) == {"a": 2.0, "b": 2.0}
