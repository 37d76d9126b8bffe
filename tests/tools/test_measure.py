"""Measurements against what they are by definition: each number worked out another way, on a tiny model and perfect texts."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import measure
import toy
import train
from data import Problem, save_problems
from model import CausalLM, ModelConfig, save_hf
from rollout import CORRECTION, DIAGNOSIS, PREFIX, Completion, Rollout

TOKENIZER = toy.make_tokenizer()
QUESTION = "x*7-21=35"
PROBLEMS = {0: Problem("findx:" + QUESTION, QUESTION, "8")}


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalLM(ModelConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, eos_token_id=TOKENIZER.eos_token_id)).eval()


def knobs(**changed) -> SimpleNamespace:
    defaults = {k: v for k, v in vars(measure).items() if k == k.lower() and type(v) in (int, float, str, bool)}
    return SimpleNamespace(**defaults | changed)


def rollout(text: str, reward: float, **more) -> Rollout:
    ids = ids_of(text) + [TOKENIZER.eos_token_id]
    return Rollout("p", "0", ids_of(QUESTION), ids, [PREFIX] * len(ids), True, text, reward=reward,
                   sample_logprobs=[-1.0] * len(ids), **more)


def reflection(prefix: str, diagnosis: str, correction: str, reward: float = 1.0) -> Rollout:
    pieces = [(ids_of(prefix), PREFIX), (ids_of(diagnosis), DIAGNOSIS), (ids_of(correction), CORRECTION)]
    ids = [i for piece, _ in pieces for i in piece] + [TOKENIZER.eos_token_id]
    roles = [role for piece, role in pieces for _ in piece] + [CORRECTION]
    return Rollout("p", "0_reflected", ids_of(QUESTION), ids, roles, True, prefix + diagnosis + correction, is_reflection=True,
                   reward=reward)


MISS, AGAIN = "Try 6: 6*7=42, 42-21=21 low. ", "Wait, 6 is too low. "
RIGHT = "Try 8: 8*7=56, 56-21=35 ok. Answer: \\boxed{8}"
WRONG = MISS + "Answer: \\boxed{6}"


def test_look_is_the_softmax_of_the_model_at_each_completion_token(model):
    r = rollout(RIGHT, 1.0)
    (logprob, entropy, weight), _ = measure.look(model, [r, rollout(WRONG, 0.0)], knobs(temperature=0.7))
    inputs = torch.tensor([r.prompt_ids + r.completion_ids])
    p = torch.log_softmax((model(inputs) @ model.output_weight.T)[0].double() / 0.7, -1)
    p = p[len(r.prompt_ids) - 1:-1]
    assert logprob == pytest.approx(p[range(len(p)), r.completion_ids].detach().numpy(), abs=1e-5)
    assert entropy == pytest.approx(-(p.exp() * p).sum(-1).detach().numpy(), abs=1e-5)
    assert weight == pytest.approx(np.clip(np.exp(logprob + entropy), 0.01, 10), abs=1e-5)


def test_kl_is_what_the_writer_gave_minus_what_the_policy_gives_and_0_for_the_policys_own_words(model):
    y_ref, c = reflection(MISS, AGAIN, RIGHT), knobs()
    text = f"<analysis>{RIGHT}{AGAIN}</analysis><reconstruction>{MISS}<reflection>{AGAIN}</reflection>{RIGHT}</reconstruction>"
    ids = ids_of(text)
    written = Completion(ids, [-0.01 * i for i in range(len(ids))], True)
    found = measure.shift(model, [rollout(WRONG, 0.0), rollout(RIGHT, 1.0)], {"micro": [(y_ref, written)]}, c)
    logprob = measure.look(model, [y_ref], c)[0][0]
    for name, role, tag in (("micro, diagnosis", DIAGNOSIS, "<reflection>"), ("micro, correction", CORRECTION, "</reflection>")):
        first = ids.index(ids_of(tag)[0]) + 1  # where the reconstruction says it, not the analysis
        at = [i for i, of in enumerate(y_ref.roles[:-1]) if of == role]
        gaps = [written.logprobs[first + j] - logprob[i] for j, i in enumerate(at)]
        assert found[name]["kl"] == pytest.approx(np.mean(gaps), abs=1e-5) and found[name]["kl_tokens"] == len(at)
        assert found[name]["logprob"] == pytest.approx(logprob[at].mean(), abs=1e-5)
        if role == DIAGNOSIS:
            assert found["micro, its first token"]["kl"] == pytest.approx(gaps[0], abs=1e-5)
    assert [found[name]["kl"] for name in ("ordinary, right", "ordinary, wrong", "micro, prefix")] == [0, 0, 0]
    assert found["micro, prefix"]["tokens"] == len(ids_of(MISS))


def test_words_that_the_synthesis_wrote_as_other_ids_have_no_kl(model):
    y_ref = reflection(MISS, AGAIN, RIGHT)
    found = measure.shift(model, [], {"micro": [(y_ref, Completion(ids_of("<analysis>"), [-1.0], False))]}, knobs())
    assert found["micro, correction"]["kl"] is None and found["micro, correction"]["kl_tokens"] == 0


def test_gradient_norms_are_those_of_training_and_their_parts_add_up(model):
    """'all' is the norm that train.update reports for the same rollouts, and the parts sum to it as vectors."""
    ordinary = [rollout(RIGHT, 1.0), rollout(WRONG, 0.0), rollout(MISS + AGAIN + RIGHT, 1.0), rollout(WRONG, 0.0)]
    built, c = [reflection(MISS, AGAIN, RIGHT), reflection(MISS, AGAIN, WRONG, 0.0)], knobs()
    found = measure.gradients(model, ordinary, built, c)
    row = found["decoupled, A = r"]
    assert [row["right_advantage"], row["wrong_advantage"]] == pytest.approx([1, -1], abs=1e-4)
    assert row["constructed_advantage"] == 0.5
    assert found["decoupled, Eq. 5"]["constructed_advantage"] == pytest.approx(0, abs=1e-6)
    assert found["one mixed group"]["right_advantage"] == pytest.approx(1, abs=1e-4)  # 3 of 6 are right either way

    settings = {k: v for k, v in vars(train).items() if k == k.lower() and type(v) in (int, float, str, bool)}
    c_train = SimpleNamespace(**settings | {"log_kl": False, "ref_advantage": "reward", "loss_norm": "merged"})
    values = train.advantages(torch.tensor([r.reward for r in ordinary + built]), [0] * 6, [r.group for r in ordinary + built],
                              [r.is_reflection for r in ordinary + built], ref_advantage="reward")
    for r, value in zip(ordinary + built, values.tolist(), strict=True):
        r.advantage = value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sums = train.update(model, None, optimizer, ordinary + built, None, c_train, 0, 1, torch.device("cpu"),
                        torch.autocast("cpu", enabled=False))
    model.eval()
    assert row["all"] == pytest.approx(sums["train/grad_norm"], rel=1e-4)
    angle = row["cosine"]
    assert row["all"] ** 2 == pytest.approx(row["rollouts"] ** 2 + row["constructed"] ** 2
                                            + 2 * angle * row["rollouts"] * row["constructed"], rel=1e-3)


def test_right_constructions_alone_have_no_gradient_under_eq_5_and_one_under_a_equal_r(model):
    ordinary = [rollout(RIGHT, 1.0), rollout(WRONG, 0.0)]
    found = measure.gradients(model, ordinary, [reflection(MISS, AGAIN, RIGHT) for _ in range(2)], knobs())
    assert found["decoupled, Eq. 5"]["constructed"] == 0 < found["decoupled, A = r"]["constructed"]
    mixed = found["one mixed group"]
    assert mixed["wrong_advantage"] == pytest.approx(-math.sqrt(3), abs=1e-4)  # pushed further down than by -1
    assert mixed["right_advantage"] == mixed["constructed_advantage"] == pytest.approx(1 / math.sqrt(3), abs=1e-4)


def test_recovery_counts_from_the_end_of_the_first_error(model, monkeypatch):
    """Two of three responses have an error. Left alone, one continuation of two looks again and is right; forced, all look
    again and half are right."""
    asked = []

    def generate(_, prompts, n, **__):
        asked.append(prompts)
        after = "6 is too low. "
        texts = [AGAIN + RIGHT, WRONG + AGAIN] if len(asked) == 1 else [after + RIGHT, after + WRONG]
        return [[Completion(ids_of(text) + [TOKENIZER.eos_token_id], [0.0], True) for text in texts] for _ in prompts]

    monkeypatch.setattr(measure, "generate", generate)
    ordinary = [rollout(WRONG, 0.0), rollout(RIGHT, 1.0), rollout(MISS + AGAIN + RIGHT, 1.0)]
    found = measure.recovery(model, TOKENIZER, ordinary, PROBLEMS, (TOKENIZER.eos_token_id,), knobs(continuations=2))
    assert [TOKENIZER.decode(prompt) for prompt in asked[0]] == [QUESTION + MISS] * 2
    assert [TOKENIZER.decode(prompt) for prompt in asked[1]] == [QUESTION + MISS + "Wait, "] * 2
    assert found == {"responses": 3, "with_an_error": 2,
                     "unasked_reflects": 0.5, "unasked_right": 0.5, "unasked_right_if_reflects": 1,
                     "forced_reflects": 1, "forced_right": 0.5, "forced_right_if_reflects": 0.5}


def test_localised_constructions_keep_exactly_the_first_error():
    exactly, too_long = reflection(MISS, AGAIN, RIGHT), reflection(MISS + "Answer: ", "Wait, 6 is wrong. ", RIGHT, 0.0)
    found = measure.constructions([(exactly, None), "unparsable", (too_long, None)], PROBLEMS, TOKENIZER, exact=True)
    assert found == {"candidates": 3, "kept": 2, "right": 1, "groups": 1, "mixed_groups": 1, "localised": 1}


def test_the_script_writes_every_measurement_of_a_checkpoint(model, tmp_path, monkeypatch):
    save_hf(model, TOKENIZER, tmp_path / "model")
    save_problems(toy.make_problems("findx", "validation", 3), tmp_path / "problems.jsonl")
    for key, value in {"init_from": str(tmp_path / "model"), "problems": str(tmp_path / "problems.jsonl"),
                       "out": str(tmp_path / "deep" / "measured.json"), "samples_per_prompt": 2, "max_new_tokens": 8,
                       "max_synthesis_tokens": 8}.items():
        monkeypatch.setattr(measure, key, value)
    measure.main()
    found = json.loads((tmp_path / "deep" / "measured.json").read_text())
    assert {"pass1", "reflect_rate", "shift", "gradient", "constructions", "recovery"} <= set(found)
    assert found["shift"]["ordinary, wrong"]["logprob"] < 0 and found["gradient"]["one mixed group"]["all"] == 0
    monkeypatch.setattr(measure, "problems", "")
    with pytest.raises(ValueError, match="problems is not set"):
        measure.main()
