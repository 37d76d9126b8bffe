"""The cold start trains what it says: nothing from planted mistakes, one denominator, the same run
after a resume."""
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_reflect import tokenizer_of

import coldstart
import jsonl
import reflect
import reward
import rollout
import toy
from checkpoint import checkpoints
from data import Problem, file_mark, load_tokenizer, render_prompt, save_problems
from hf import load_hf, save_hf
from model import CausalLM, ModelConfig
from parallel import Unsharded
from rollout import Completion

TINY = """--instruction= --template=short --max_new_tokens=12 --batch_size=6 --epochs=1
    --learning_rate=0.01 --warmup_steps=2 --tokens_per_microbatch=400 --eval_interval=2
    --eval_samples=2 --save_interval=2 --threads=1""".split()


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(autouse=True)
def exact_grader(monkeypatch):
    """Toy answers are integers: no worker process with sympy for the noise that an untrained model
    writes."""
    def grade_many(texts, golds, **_):
        found = [re.findall(r"\\boxed\{(\d+)\}", text)[-1:] for text in texts]
        return [reward.Grade(float(a == [g]), "correct" if a == [g] else "wrong", a[0] if a
                             else None)
                for a, g in zip(found, golds)]
    monkeypatch.setattr(reward, "grade_many", grade_many)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    """A folder with a tiny model, worked examples and held-out problems."""
    folder = tmp_path_factory.mktemp("start")
    save_hf(tiny_model(), tokenizer, folder / "model")
    questions = [p.question for p in toy.make_problems("findx", "train", 20)]
    jsonl.write(folder / "examples.jsonl",
                toy.worked_examples(questions, 54, 0))
    save_problems(toy.make_problems("findx", "validation", 3), folder / "held_out.jsonl")
    return folder


@pytest.fixture
def run(start):
    """run(folder, *more, steps=3): coldstart.py in this process, as the command line would run it.
    The knobs are module globals: they are put back."""
    def call(folder, *more, steps=3):
        before, examples = dict(vars(coldstart)), start / f"examples_{steps}.jsonl"
        jsonl.write(examples, jsonl.read(start / "examples.jsonl")[:6 * steps])
        arguments = [*TINY, f"--init_from={start / 'model'}", f"--examples={examples}",
                     f"--out_dir={folder}", f"--eval_problems={start / 'held_out.jsonl'}", *more]
        try:
            original = coldstart.configure
            coldstart.configure = lambda knobs: original(knobs, arguments)
            coldstart.main()
        finally:
            vars(coldstart).update(before)
    return call


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_hf(folder / "final").state_dict()


def config_of(**changes):
    knobs = {k: v for k, v in vars(coldstart).items() if k == k.lower()
             and type(v) in (bool, int, float, str, tuple)}
    return SimpleNamespace(**knobs | {"instruction": ""} | changes)


def tiny_model():
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    return CausalLM(ModelConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id))


def written(tokenizer, question, text, no_loss=()):
    return coldstart.written(tokenizer, render_prompt(tokenizer, question, ""), text, no_loss)


def toy_rows(tokenizer, n):
    questions = [p.question for p in toy.make_problems("findx", "train", 50)]
    return [written(tokenizer, e["prompt"], e["completion"], e.get("no_loss", ()))
            for e in toy.worked_examples(questions, n, 0)]


def shown(tokenizer, row):
    """The completion with one underscore for every character whose token carries no loss."""
    pieces = [(tokenizer.decode([i]), m) for i, m in zip(row.completion_ids, row.mask)]
    return "".join(piece if m else "_" * len(piece) for piece, m in pieces)


# --- rows ---

def test_a_row_is_the_rendered_prompt_the_completion_and_the_stop_token(tokenizer):
    row = written(tokenizer, "x*7-21=35", "Try 8: 8*7=56, 56-21=35 ok. Answer: \\boxed{8}")
    assert row.prompt_ids == render_prompt(tokenizer, "x*7-21=35", "")
    said = "Try 8: 8*7=56, 56-21=35 ok. Answer: \\boxed{8}<|im_end|>"
    assert tokenizer.decode(row.completion_ids) == said
    assert row.mask == [1.0] * len(row.completion_ids)


def test_tokens_of_a_planted_mistake_carry_no_loss_and_their_neighbours_do(tokenizer):
    text = "Try 12: 12*7=84, 84-21=63 high. Answer: \\boxed{12}"
    row = written(tokenizer, "x*7-21=35", text, [(4, 6), (len(text) - 3, len(text) - 1)])
    assert shown(tokenizer, row) == "Try __: 12*7=84, 84-21=63 high. Answer: \\boxed{__}<|im_end|>"


def test_of_the_toy_solutions_only_a_first_guess_whose_check_fails_is_masked(tokenizer):
    masked = 0
    for row in toy_rows(tokenizer, 64):
        text = tokenizer.decode(row.completion_ids)
        failed = re.match(r"Try \d+: .*? (low|high)\. ", text)
        assert shown(tokenizer, row).startswith("Try _") == bool(failed)
        if text.startswith("<analysis>"):
            assert shown(tokenizer, row) == text
        masked += bool(failed)
    assert masked > 10


# --- the update ---

def gradients(model, rows, budget=400):
    """What the update leaves in the weights' gradients, with an optimizer that does nothing."""
    found = []
    optimizer = SimpleNamespace(
        step=lambda: found.extend(p.grad.clone() for p in model.parameters()),
        zero_grad=lambda set_to_none: model.zero_grad())
    stats = coldstart.imitate(model, optimizer, rows, tokens_per_microbatch=budget, grad_clip=1e9,
                              device="cpu")
    return found, stats


def test_a_masked_token_gets_no_gradient_whatever_it_is(tokenizer):
    model = tiny_model()
    prompt, target = tokenizer("x*7")["input_ids"], tokenizer("84")["input_ids"]
    # the last completion token is masked: nothing is predicted from it, so it can only matter as a
    # target
    rows = [[coldstart.imitated(prompt, [*target, last],
                                [1.0, 1.0, 0.0])] for last in tokenizer("35")["input_ids"]]
    (one, loss_one), (two, loss_two) = (gradients(model, r) for r in rows)
    assert loss_one == loss_two and loss_one["train/trained_tokens"] == 2
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    # the same token with its mask on does matter
    rows[0][0].mask[-1] = 1.0
    assert any(not torch.equal(a, b) for a, b in zip(one, gradients(model, rows[0])[0]))


def test_loss_and_gradient_are_the_formula_and_do_not_depend_on_the_microbatches(tokenizer):
    model = tiny_model()
    rows = toy_rows(tokenizer, 7)
    whole, stats = gradients(model, rows, 10 ** 6)
    parts, parted = gradients(model, rows, 1)
    total, count = 0.0, 0.0
    for r in rows:  # straight from the definition, row by row
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        logprobs = torch.log_softmax(model(ids[:, :-1]) @ model.head_weight.T, -1).gather(
            -1, ids[:, 1:, None])[0, :, 0]
        total = total - (logprobs[len(r.prompt_ids) - 1:] * torch.tensor(r.mask)).sum()
        count += sum(r.mask)
    assert stats["train/trained_tokens"] == count
    assert stats["train/loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert parted["train/loss"] == pytest.approx(stats["train/loss"], rel=1e-5)
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    for a, b, e in zip(whole, parts, expected):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- runs ---

def test_three_steps_end_to_end_leave_a_model_and_metrics(tmp_path, run):
    run(tmp_path)
    rows = metrics(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3] and all(r["train/grad_norm"] > 0 for r in rows)
    assert [("eval/pass1" in r) for r in rows] == [False, True, True]
    assert len(load_tokenizer(tmp_path / "final")) == 60
    assert load_hf(tmp_path / "final").config.vocab_size == 60
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, run):
    run(tmp_path / "whole", steps=5)
    steps = []
    original = coldstart.imitate

    def dies_in_its_fourth_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(coldstart, "imitate", dies_in_its_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", steps=5)
    assert [folder.name for folder in checkpoints(tmp_path / "killed")] == ["step_000002"]
    run(tmp_path / "killed", "--resume=True", steps=5)
    timeless = [[{k: v for k, v in row.items()
                  if not k.startswith("time/")} for row in metrics(tmp_path / name)]
                for name in ("whole", "killed")]
    assert timeless[0] == timeless[1] and len(steps) == 7
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint_and_no_final_model(
        tmp_path, monkeypatch, run):
    steps, original = [], coldstart.imitate

    def preempted_in_its_third_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(coldstart, "imitate", preempted_in_its_third_step)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, steps=5)
    assert stop.value.code == 143 and not (tmp_path / "final").exists()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_000003"]  # keep_last = 1
    run(tmp_path, "--resume=True", steps=5)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 5] and len(steps) == 5


def test_an_update_that_is_not_finite_is_skipped_and_a_third_in_a_row_ends_the_run(
        tmp_path, monkeypatch, run):
    """Bug: NaN in one gradient, NaN in every weight from then on, and saved."""
    run(tmp_path / "one", steps=1)
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def not_finite_from_the_second_on(*args):
        norms.append(clip(*args))
        return norms[-1] * (1.0 if len(norms) == 1 else float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", not_finite_from_the_second_on)
    with pytest.raises(ValueError, match="not finite in 3 steps in a row"):
        run(tmp_path / "out", "--save_interval=1", "--warmup_steps=0", steps=9)
    assert [row["train/skipped"] for row in metrics(tmp_path / "out")] == [0, 1, 1, 1]
    saved = load_hf(checkpoints(tmp_path / "out")[-1]).state_dict()
    assert all(weight.isfinite().all() for weight in saved.values())


def test_it_stops_at_the_asked_pass1_and_a_finished_run_is_not_run_again(
        tmp_path, monkeypatch, run):
    monkeypatch.setattr(coldstart, "evaluate", lambda *args,
                        **_: {"eval/pass1": 0.5, "eval/truncated": 0.0})
    run(tmp_path, "--stop_at_pass1=0.4", steps=9)
    assert [r["step"] for r in metrics(tmp_path)] == [1, 2]
    run(tmp_path, "--stop_at_pass1=0.4", "--resume=True", steps=9)
    assert len(metrics(tmp_path)) == 2


def test_solutions_of_a_file_are_learnt_and_a_line_without_one_is_named(tmp_path, run):
    lines = [{"question": p.question, "solution": toy.trial(p.question, int(p.answer))
              + toy.boxed(int(p.answer))}
             for p in toy.make_problems("findx", "train", 4)]
    jsonl.write(tmp_path / "solved.jsonl", lines)
    source = [f"--examples={tmp_path / 'solved.jsonl'}", "--epochs=6", "--batch_size=4"]
    run(tmp_path / "taught", *source)
    losses = [r["train/loss"] for r in metrics(tmp_path / "taught")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    del lines[2]["solution"]
    jsonl.write(tmp_path / "solved.jsonl", lines)
    with pytest.raises(ValueError,
                       match='solved.jsonl:3: no "prompt" with "completion", nor "question" with '
                             '"solution"'):
        run(tmp_path / "again", *source)


def test_a_line_is_a_question_to_be_instructed_or_a_prompt_as_it_stands(tmp_path, tokenizer):
    """Bug: the instruction behind a synthesis prompt; a span of no loss that is ignored; an example
    cut by the context."""
    path = tmp_path / "examples.jsonl"
    jsonl.write(path, [{"prompt": "x*7-21=35<micro>", "completion": "Try 8", "no_loss": [[4, 5]]},
                       {"question": "x*7-21=35", "solution": "Try 8", "no_loss": [[4, 5]]},
                       {"question": "x=2", "solution": "2"}])
    rows = coldstart.read_examples(str(path), tokenizer, "+1", 1024)
    assert [tokenizer.decode(row.prompt_ids) for row in rows] == [
        "<|user|>x*7-21=35<micro><|assistant|>", "<|user|>x*7-21=35+1<|assistant|>",
        "<|user|>x=2+1<|assistant|>"]
    assert [shown(tokenizer, row) for row in rows] == [
        "Try _<|im_end|>", "Try _<|im_end|>", "2<|im_end|>"]
    longest = max(map(len, rows))
    assert len(coldstart.read_examples(str(path), tokenizer, "+1", longest)) == 3
    said = f"examples.jsonl:[12]: an example of {longest} tokens does not fit .* of {longest - 1}"
    with pytest.raises(ValueError, match=said):
        coldstart.read_examples(str(path), tokenizer, "+1", longest - 1)


@pytest.mark.parametrize("knob, message", [
    ("--init_from=", "init_from"), ("--problems=x.jsonl", "exactly one"),
    ("--examples=", "exactly one"), ("--template=brief", "brief"), ("--batch_size=0", "batch_size"),
    ("--examples=nowhere.jsonl", "nowhere.jsonl")])
def test_a_bad_knob_is_refused_at_start(tmp_path, knob, message, run):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, knob)
    assert not list(tmp_path.iterdir())


# --- the paper's examples ---

@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """A policy that answers a question wrong, then right, and a synthesis prompt with the perfect
    construction. The fixture is the list of the questions it was asked."""
    asked = []

    def answers(text, n):
        question = text.split("\n")[0]
        right = toy.answer_of(question)
        wrong = toy.trial(question, right + 1) + toy.boxed(right + 1)
        if not text.endswith("<micro>"):
            asked.append(question)
            return [wrong, toy.trial(question, right) + toy.boxed(right)] * (n // 2)
        analysis, prefix, reflection, correction = toy.construction(question, wrong)
        body = f"{prefix}<reflection>{reflection}</reflection>{correction}"
        return [f"<analysis>{analysis}</analysis><reconstruction>{body}</reconstruction>"] * n

    def generate(model, prompts, n, **_):
        texts = [tokenizer.decode(ids).removeprefix("<|user|>").removesuffix("<|assistant|>")
                 for ids in prompts]
        ids = [[[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in answers(
            text, n)] for text in texts]
        return [[Completion(i, [0.0] * len(i), True) for i in group] for group in ids]

    monkeypatch.setattr(rollout, "generate", generate)
    monkeypatch.setattr(reflect, "generate", generate)
    return asked


def rollout_config(folder, tokenizer, **changes):
    """Seven problems whose guess answer + 1 can be checked, in rounds of three."""
    problems = [p for p in toy.make_problems("findx", "train", 3000)
                if p.level == "1" and toy.in_range(toy.calculate(p.question, int(p.answer) + 1))
                and int(p.answer) < 15]
    save_problems(problems[:7], folder / "problems.jsonl")
    save_hf(tiny_model(), tokenizer, folder / "policy")
    return config_of(**{
        "init_from": str(folder / "policy"), "problems": str(folder / "problems.jsonl"),
        "out_dir": str(folder), "template": "short", "queries_per_round": 3,
        "samples_per_prompt": 2, "max_new_tokens": 54,
        "max_synthesis_tokens": 100} | changes)


def rollout_rows(tokenizer, c, trained=False):
    model = load_hf(c.init_from, num_tokens=len(tokenizer))
    how = {knob: getattr(c, knob) for knob in coldstart.EXAMPLE_KNOBS}
    header = {"weights": coldstart.weights_mark(c.init_from),
              "problems": file_mark(c.problems)} | how
    usable = coldstart.sample_examples(
        None if trained else Unsharded(model, dtype=c.dtype, device="cpu"), tokenizer,
        coldstart.load_problems(c.problems),
        path=Path(c.out_dir) / "examples.jsonl", resume=c.resume,
        wanted=c.n_sft + c.n_ift, header=header,
        max_rows=c.max_rows, stop_ids=(tokenizer.eos_token_id,), **how)
    return coldstart.both_formats(usable, n_sft=c.n_sft, n_ift=c.n_ift, train_prefix=c.train_prefix)


def test_rollout_examples_mask_the_preserved_prefix_and_train_the_whole_synthesis(
        tmp_path, tokenizer, scripted):
    rows = rollout_rows(tokenizer, rollout_config(tmp_path, tokenizer, n_sft=4, n_ift=3))
    assert len(rows) == 7 and len(scripted) == len(set(scripted)) == 7
    for row in rows[:4]:
        text = tokenizer.decode(row.completion_ids)
        assert text.startswith("Try ")
        assert re.fullmatch(r"_+Wait, \d+ is too high\. Try .* ok\. Answer: .*<\|im_end\|>",
                            shown(tokenizer, row))
        assert "<micro>" not in tokenizer.decode(row.prompt_ids)
    for row in rows[4:]:
        assert tokenizer.decode(row.prompt_ids).endswith("<micro><|assistant|>")
        assert set(row.mask) == {1.0}
        assert tokenizer.decode(row.completion_ids).startswith("<analysis>")


def test_at_most_one_example_per_query_and_no_more_queries_than_needed(
        tmp_path, tokenizer, scripted):
    rows = rollout_rows(tokenizer, rollout_config(tmp_path, tokenizer, n_sft=2, n_ift=1))
    assert len(rows) == 3 and len(scripted) == 3  # one round of three was enough


def test_the_sampling_phase_goes_on_where_it_was_killed(tmp_path, tokenizer, scripted):
    c = rollout_config(tmp_path, tokenizer, n_sft=5, n_ift=2)
    whole = rollout_rows(tokenizer, c)
    c.resume = True
    lines = (tmp_path / "examples.jsonl").read_text().splitlines(keepends=True)
    # killed while it wrote the second round
    (tmp_path / "examples.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    scripted.clear()
    assert rollout_rows(tokenizer, c) == whole
    assert len(scripted) == 4                                           # rounds two and three only
    scripted.clear()
    assert rollout_rows(tokenizer, c, trained=True) == whole and scripted == []
    (tmp_path / "examples.jsonl").unlink()  # a trained policy's would be other examples
    with pytest.raises(ValueError, match="holds 0 examples, but .* put the file back"):
        rollout_rows(tokenizer, c, trained=True)


def test_examples_of_other_problems_or_another_seed_are_not_taken_for_ours(
        tmp_path, tokenizer, scripted):
    """Bug: a new run in the folder of one that was cut off trains on the old run's examples."""
    c = rollout_config(tmp_path, tokenizer, n_sft=2, n_ift=1)
    rollout_rows(tokenizer, c)
    c.resume, c.seed = True, 1
    with pytest.raises(ValueError,
                       match="examples.jsonl was made otherwise .seed: 0 -> 1.; choose another "
                             "out_dir, or --res"):
        rollout_rows(tokenizer, c)
    c.seed = 0
    lines = Path(c.problems).read_text().splitlines(keepends=True)
    Path(c.problems).write_text("".join(lines[3:]))
    with pytest.raises(ValueError, match="made otherwise .problems: "):
        rollout_rows(tokenizer, c)
    scripted.clear()
    c.resume = False                      # anew, on the problems that are there now
    assert len(rollout_rows(tokenizer, c)) == 3 and len(scripted) == 3
    uids = {r["uid"] for row in jsonl.read(tmp_path / "examples.jsonl")[1:] for r in row["results"]}
    assert uids <= {json.loads(line)["uid"] for line in lines[3:]}


def test_a_response_with_a_line_separator_is_read_back_after_a_kill(
        tmp_path, tokenizer, scripted, monkeypatch):
    """Bug: str.splitlines cuts the stored round in two."""
    text = rollout.completion_text
    monkeypatch.setattr(rollout, "completion_text", lambda *args: text(*args) + "\u2028\x85")
    c = rollout_config(tmp_path, tokenizer, n_sft=2, n_ift=1)
    whole = rollout_rows(tokenizer, c)
    c.resume = True
    scripted.clear()
    assert rollout_rows(tokenizer, c) == whole and scripted == []


def test_a_rule_writes_the_synthesis_where_the_model_cannot(tmp_path, monkeypatch):
    """The pair with the longest common beginning; the trajectory is y-'s own ids, the remark, y+
    from there on."""
    tokenizer, n_asked = tokenizer_of("bpe"), []
    right = "3 + 4 = 7\n7 * 2 = 14\nThe answer is \\boxed{14}."
    wrong = ["9 - 4 = 5\nThe answer is \\boxed{5}.",
             "3 + 4 = 7\n7 * 2 = 13\nThe answer is \\boxed{13}."]

    def generate(model, prompts, n, **_):
        n_asked.append(n)
        ids = [[*tokenizer(t, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id] for t in (*wrong, right)]
        return [[Completion(i, [0.0] * len(i), True) for i in ids] for _ in prompts]

    monkeypatch.setattr(rollout, "generate", generate)
    # never asked
    monkeypatch.setattr(reflect, "generate", lambda model, prompts, n, **_: [] if not prompts
                        else 1 / 0)
    c = rollout_config(tmp_path, tokenizer, synthesis="rule", samples_per_prompt=3, n_sft=2,
                       n_ift=2, queries_per_round=2, max_new_tokens=200, max_synthesis_tokens=400)
    save_problems([Problem(str(i), f"{i} and 4, twice?", "14") for i in range(4)],
                  tmp_path / "problems.jsonl")
    model = CausalLM(ModelConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16,
                                 num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                 head_dim=8,
                                 max_position_embeddings=2048))
    save_hf(model, tokenizer, tmp_path / "policy")
    rows = rollout_rows(tokenizer, c)
    assert n_asked == [3, 3] and len(rows) == 4
    for row in rows[:2]:
        kept = tokenizer(wrong[1], add_special_tokens=False)["input_ids"]
        assert row.completion_ids[:4] == kept[:4] and row.mask[:4] == [0.0] * 4
        assert tokenizer.decode(row.completion_ids) == (
            "3 + 4 = 7\n7 * 2 = 13\nWait, 7 * 2 is not 13.\n7 * 2 = 14\nThe answer is "
            "\\boxed{14}.<|im_end|>")
    for row in rows[2:]:
        text = tokenizer.decode(row.completion_ids)
        assert text.startswith('<analysis>Location: "7 * 2 = 13". Type: arithmetic slip.')
        assert "<reflection>Wait, 7 * 2 is not 13.</reflection>" in text


def test_wrong_constructions_teach_nothing(tmp_path, tokenizer, scripted, monkeypatch):
    build = coldstart.reflect.build_reflection

    def spoil(*args, **kwargs):
        y_ref = build(*args, **kwargs)
        y_ref.text = y_ref.text.replace("boxed{", "boxed{1")
        return y_ref
    monkeypatch.setattr(coldstart.reflect, "build_reflection", spoil)
    with pytest.raises(ValueError, match="gave no example .*wrong"):
        rollout_rows(tokenizer, rollout_config(tmp_path, tokenizer))


def test_an_untrained_model_gives_no_example_and_is_told_so(tmp_path, tokenizer):
    with pytest.raises(ValueError,
                       match="this run cannot learn: 7 problems gave no example .*start from a "
                             "model that") as e:
        rollout_rows(tokenizer, rollout_config(tmp_path, tokenizer, max_new_tokens=8))
    assert "\n" not in str(e.value)
