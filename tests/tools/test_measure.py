"""Measurements against what they are by definition: each number worked out another way, on a tiny
model and perfect texts."""
import functools
import json
import math

import numpy as np
import pytest
import torch

import reflect
import toy
from advantage import advantages
from data import Problem, save_problems
from hf import save_hf
from model import CausalLM, ModelConfig
from reflect import Construction
from rollout import CORRECTION, DIAGNOSIS, PREFIX, Completion, Rollout
from tools import measure
from train import loss_of
from update import set_loss_scales, update

TOKENIZER = toy.make_tokenizer()
QUESTION = "x*7-21=35"
PROBLEM = Problem("findx:" + QUESTION, QUESTION, "8")
LOOKING = {"temperature": 1.0, "tokens_per_microbatch": 2048, "w_min": 0.01, "w_max": 10.0}
LEARNING = LOOKING | {"clip_eps": 0.2, "diagnosis": "mask", "train_prefix": True,
                      "lam": 1.0, "loss_agg": "sequence", "loss_norm": "merged"}


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalLM(ModelConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
        eos_token_id=TOKENIZER.eos_token_id)).eval()


def rollout(text: str, reward: float) -> Rollout:
    ids = ids_of(text) + [TOKENIZER.eos_token_id]
    return Rollout(PROBLEM, "0", ids_of(QUESTION), ids, [PREFIX] * len(ids), True, text,
                   reward=reward, sample_logprobs=[-1.0] * len(ids))


def reflection(prefix: str, diagnosis: str, correction: str, reward: float = 1.0) -> Rollout:
    ids, roles = [], []
    for text, role in ((prefix, PREFIX), (diagnosis, DIAGNOSIS), (correction, CORRECTION)):
        ids += ids_of(text)
        roles += [role] * (len(ids) - len(roles))
    return Rollout(PROBLEM, "0_reflected", ids_of(QUESTION), [*ids, TOKENIZER.eos_token_id],
                   [*roles, CORRECTION], True, prefix + diagnosis + correction,
                   is_reflection=True, reward=reward)


def built(y_ref, text: str = "") -> Construction:
    ids = ids_of(text)
    return Construction(None, [], Completion(ids, [-0.01 * i for i in range(len(ids))], True),
                        y_ref)


MISS, AGAIN = "Try 6: 6*7=42, 42-21=21 low. ", "Wait, 6 is too low. "
RIGHT = "Try 8: 8*7=56, 56-21=35 ok. Answer: \\boxed{8}"
WRONG = MISS + "Answer: \\boxed{6}"


def test_look_is_the_softmax_of_the_model_at_each_completion_token(model):
    r, looking = rollout(RIGHT, 1.0), LOOKING | {"temperature": 0.7}
    (logprob, entropy, weight), _ = measure.look(model, [r, rollout(WRONG, 0.0)], **looking)
    inputs = torch.tensor([r.prompt_ids + r.completion_ids])
    p = torch.log_softmax((model(inputs) @ model.output_weight.T)[0].double() / 0.7, -1)
    p = p[len(r.prompt_ids) - 1:-1].detach()
    assert logprob == pytest.approx(p[range(len(p)), r.completion_ids].numpy(), abs=1e-5)
    assert entropy == pytest.approx(-(p.exp() * p).sum(-1).numpy(), abs=1e-5)
    assert weight == pytest.approx(np.clip(np.exp(logprob + entropy), 0.01, 10), abs=1e-5)


def test_kl_is_what_the_writer_gave_minus_what_the_policy_gives_and_0_for_its_own_words(model):
    y_ref = reflection(MISS, AGAIN, RIGHT)
    c = built(y_ref, f"<analysis>{RIGHT}{AGAIN}</analysis><reconstruction>{MISS}"
                     f"<reflection>{AGAIN}</reflection>{RIGHT}</reconstruction>")
    written = c.synthesis
    found = measure.shift(model, [rollout(WRONG, 0.0), rollout(RIGHT, 1.0)], {"micro": [c]},
                          **LOOKING)
    logprob = measure.look(model, [y_ref], **LOOKING)[0][0]
    for name, role, tag in (("micro, diagnosis", DIAGNOSIS, "<reflection>"),
                            ("micro, correction", CORRECTION, "</reflection>")):
        # the reconstruction's words, not the analysis'
        first = written.ids.index(ids_of(tag)[0]) + 1
        at = [i for i, of in enumerate(y_ref.roles[:-1]) if of == role]
        gaps = [written.logprobs[first + j] - logprob[i] for j, i in enumerate(at)]
        assert found[name]["kl"] == pytest.approx(np.mean(gaps), abs=1e-5)
        assert found[name]["kl_tokens"] == len(at)
        assert found[name]["logprob"] == pytest.approx(logprob[at].mean(), abs=1e-5)
        if role == DIAGNOSIS:
            assert found["micro, its first token"]["kl"] == pytest.approx(gaps[0], abs=1e-5)
    for name in ("ordinary, right", "ordinary, wrong", "micro, prefix"):
        assert found[name]["kl"] == 0
    assert found["micro, prefix"]["tokens"] == len(ids_of(MISS))


def test_words_that_the_synthesis_wrote_as_other_ids_have_no_kl(model):
    c = built(reflection(MISS, AGAIN, RIGHT), "<analysis>")
    found = measure.shift(model, [], {"micro": [c]}, **LOOKING)["micro, correction"]
    assert found["kl"] is None and found["kl_tokens"] == 0


def test_gradient_norms_are_those_of_training_and_their_parts_add_up(model):
    """'all' is the norm that update.update reports for the same rollouts; the parts sum to it."""
    ordinary = [rollout(RIGHT, 1.0), rollout(WRONG, 0.0), rollout(MISS + AGAIN + RIGHT, 1.0),
                rollout(WRONG, 0.0)]
    constructed = [reflection(MISS, AGAIN, RIGHT), reflection(MISS, AGAIN, WRONG, 0.0)]
    found = measure.gradients(model, ordinary, constructed, **LEARNING)
    row = found["decoupled, A = r"]
    assert [row["right_advantage"], row["wrong_advantage"]] == pytest.approx([1, -1], abs=1e-4)
    assert row["constructed_advantage"] == 0.5
    assert found["decoupled, Eq. 5"]["constructed_advantage"] == pytest.approx(0, abs=1e-6)
    # 3 of 6 are right either way
    assert found["one mixed group"]["right_advantage"] == pytest.approx(1, abs=1e-4)

    rows = ordinary + constructed
    values = advantages(torch.tensor([r.reward for r in rows]), [0] * 6, [r.group for r in rows],
                        [r.is_reflection for r in rows], ref_advantage="reward")
    for r, value in zip(rows, values.tolist(), strict=True):
        r.advantage = value
    for r in constructed:
        r.mask, r.ots = reflect.token_masks(r.roles, diagnosis="mask", train_prefix=True)
    set_loss_scales(rows, lam=1.0, loss_agg="sequence", loss_norm="merged")
    loss_fn = functools.partial(
        loss_of, model=model, ref_model=None, method="tapo", temperature=1.0, clip_eps=0.2,
        weighting="ots", w_min=0.01, w_max=10.0, kl_coef=0.0, log_kl=False, opsd_loss="jsd",
        opsd_beta=0.5, opsd_clip=0.0, on_policy=True)
    sums = update(model, torch.optim.SGD(model.parameters(), lr=0.0), rows, loss_fn, device="cpu",
                  tokens_per_microbatch=64, grad_clip=1.0)
    model.eval()
    assert row["all"] == pytest.approx(sums["train/grad_norm"], rel=1e-4)
    product = 2 * row["cosine"] * row["rollouts"] * row["constructed"]
    assert row["all"] ** 2 == pytest.approx(
        row["rollouts"] ** 2 + row["constructed"] ** 2 + product, rel=1e-3)


def test_right_constructions_alone_have_no_gradient_under_eq_5_and_one_under_a_equal_r(model):
    ordinary = [rollout(RIGHT, 1.0), rollout(WRONG, 0.0)]
    constructed = [reflection(MISS, AGAIN, RIGHT) for _ in range(2)]
    found = measure.gradients(model, ordinary, constructed, **LEARNING)
    assert found["decoupled, Eq. 5"]["constructed"] == 0 < found["decoupled, A = r"]["constructed"]
    mixed = found["one mixed group"]
    # pushed further down than by -1
    assert mixed["wrong_advantage"] == pytest.approx(-math.sqrt(3), abs=1e-4)
    third = pytest.approx(1 / math.sqrt(3), abs=1e-4)
    assert mixed["right_advantage"] == mixed["constructed_advantage"] == third


def test_err_by_truth_counts_reflections_on_the_true_mistake_of_mixed_problems_alone():
    """Moved from eval.py, which knows no toy world: 'Wait, 8 is too low' is no diagnosis of 8."""
    untrue = RIGHT.replace(" ok. ", " low. ") + " " + "Wait, 8 is too low. " + RIGHT
    rows = [rollout(MISS + AGAIN + RIGHT, 1.0), rollout(untrue, 1.0), rollout(RIGHT, 1.0),
            rollout(MISS + AGAIN + WRONG, 0.0),                   # one problem: 3 of 4 are right
            *[rollout(MISS + AGAIN + RIGHT, 1.0) for _ in range(4)]]  # solved always: not counted
    found = measure.reflection_rates(rows, 4, exact=True)
    assert found == {"mixed_problems": 1, "DSR": pytest.approx(1 / 3),
                     "ERR": pytest.approx(2 / 3), "ERR_true": pytest.approx(1 / 3)}
    assert "ERR_true" not in measure.reflection_rates(rows, 4, exact=False)
    assert measure.reflection_rates(rows[4:], 4, exact=True)["ERR_true"] is None


@pytest.mark.parametrize("exact", [True, False])
def test_decisions_are_counted_at_every_attempt(exact):
    """Bug: a second attempt counted as the first, a truncated one as a stop, a lucky evidence (42
    stands in both) as right."""
    again_wrong = MISS + AGAIN + "Try 7: 7*7=49, 49-21=28 low. Answer: \\boxed{7}"
    doubted = RIGHT.split("Answer")[0] + "Wait, 8 is right. Answer: \\boxed{8}"
    cut = rollout(MISS + AGAIN + "Try 8: 8*7=56, ", 0.0)
    cut.finished = False
    question, answer = (QUESTION, "8") if exact else ("How many?", "35")
    rows = [rollout(RIGHT, 1.0), rollout(WRONG, 0.0), rollout(MISS + AGAIN + RIGHT, 1.0),
            rollout(again_wrong, 0.0), rollout(doubted, 1.0), cut]
    if not exact:  # the last number of each attempt: `35 ok.` is the answer, 21 is not
        for r in rows:
            r.problem, r.text = Problem("u", question, answer), r.text.split(" Answer")[0]
    found = measure.decisions(rows, exact)
    # three tries of 8, one of them doubted and, as the truth has it, still right; five wrong ones,
    # of which three go on
    assert found == ({"right_so_far": 4, "stop_if_right": pytest.approx(3 / 4),
                      "wrong_so_far": 5, "retry_if_wrong": pytest.approx(3 / 5)} if exact else
                     {"right_so_far": 3, "stop_if_right": pytest.approx(2 / 3),
                      "wrong_so_far": 6, "retry_if_wrong": pytest.approx(1 / 2)})


def test_recovery_counts_from_the_end_of_the_first_error(model, monkeypatch):
    """Two of three responses have an error. Left alone, one continuation of two looks again and is
    right; forced, all look again and half are right."""
    asked = []

    def generate(_, prompts, n, **__):
        asked.append([TOKENIZER.decode(prompt) for prompt in prompts])
        after = "6 is too low. "
        texts = [AGAIN + RIGHT, WRONG + AGAIN] if len(asked) == 1 else [
            after + RIGHT, after + WRONG]
        completions = [Completion(ids_of(text) + [TOKENIZER.eos_token_id], [0.0], True)
                       for text in texts]
        return [completions for _ in prompts]

    monkeypatch.setattr(measure, "generate", generate)
    ordinary = [rollout(WRONG, 0.0), rollout(RIGHT, 1.0), rollout(MISS + AGAIN + RIGHT, 1.0)]
    found = measure.recovery(model, TOKENIZER, ordinary, continuations=2, marker="Wait, ", seed=0)
    assert asked == [[QUESTION + MISS] * 2, [QUESTION + MISS + "Wait, "] * 2]
    assert found == {"responses": 3, "with_an_error": 2, "unasked_reflects": 0.5,
                     "unasked_right": 0.5, "unasked_right_if_reflects": 1, "forced_reflects": 1,
                     "forced_right": 0.5, "forced_right_if_reflects": 0.5}


def test_localised_constructions_keep_exactly_the_first_error():
    exactly = built(reflection(MISS, AGAIN, RIGHT))
    too_long = built(reflection(MISS + "Answer: ", "Wait, 6 is wrong. ", RIGHT, 0.0))
    exactly.outcome.faithful, too_long.outcome.faithful = None, True
    found = measure.counts([exactly, built("unparsable"), too_long], TOKENIZER, exact=True)
    assert found == {"candidates": 3, "kept": 2, "right": 1, "groups": 1, "mixed_groups": 1,
                     "state": 1, "faithful": 1, "localised": 1}


def test_the_script_writes_every_measurement_of_a_checkpoint(model, tmp_path, monkeypatch):
    save_hf(model, TOKENIZER, tmp_path / "model")
    save_problems(toy.make_problems("findx", "validation", 3), tmp_path / "problems.jsonl")
    knobs = {"init_from": str(tmp_path / "model"), "problems": str(tmp_path / "problems.jsonl"),
             "out": str(tmp_path / "deep" / "measured.json"), "samples_per_prompt": 2,
             "instruction": "", "max_new_tokens": 8, "max_synthesis_tokens": 8}
    for key, value in knobs.items():
        monkeypatch.setattr(measure, key, value)
    measure.main()
    found = json.loads((tmp_path / "deep" / "measured.json").read_text())
    assert {"pass1", "reflect_rate", "DSR", "ERR", "ERR_true", "shift", "gradient",
            "constructions", "decides", "recovery"} <= set(found)
    assert found["shift"]["ordinary, wrong"]["logprob"] < 0
    assert found["gradient"]["one mixed group"]["all"] == 0
    monkeypatch.setattr(measure, "problems", "")
    with pytest.raises(ValueError, match="problems is not set"):
        measure.main()
