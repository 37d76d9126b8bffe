"""The whole way of a text, from a problem file through cold start, training and evaluation back to
the files, on tokenizers of five kinds: byte-level BPE with and without an unk token, byte fallback,
word level, and Qwen3's own where it is at hand."""
import json

import pytest
import torch
from test_reflect import tokenizer_of, tokenizer_with_unk

import coldstart
import eval as evaluation
import jsonl
import reflect
import rollout
import train
from data import load_tokenizer
from hf import save_hf
from model import CausalLM, ModelConfig
from rollout import Completion

WORDS = ["Ann has 😀 3 + 4 = ? x", "∠ABC = 30° ∴ 你好，世界", "a\u2028b\x85c\x0cd",
         "line one\r\nline two", "w" * 400]
# all that the word level knows
PLAIN = ["x = 5 , y = 6 .", "So x = 3 , then y = 5 .", "y = 6", "x = 5 then", "ABC = 3"]
BARE = ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}")
RIGHT = "x = 3\ny = 5\nThe answer is \\boxed{5}."
WRONG = "x = 3\ny = 6 \u2028😀∴\nThe answer is \\boxed{6}."


def word_level_with_everything(right: str):
    """Word level that knows the plain questions, the responses' words and every word of the
    prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    split = pre_tokenizers.Split(r" ", "isolated")
    pieces = sorted({piece for text in (*PLAIN, right) for piece,
                     _ in split.pre_tokenize_str(text)})
    vocab = {w: i for i, w in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                   eos_token="<|im_end|>",
                                   additional_special_tokens=["<|im_start|>"], chat_template=BARE)


@pytest.fixture(params=["bpe", "byte_level", "byte_fallback", "qwen"])
def folder(request, tmp_path):
    """A tiny model under one of the tokenizers, and problem files whose uids are alike."""
    tokenizer = tokenizer_of(request.param) if request.param in (
        "bpe", "qwen") else tokenizer_with_unk(request.param)
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
        max_position_embeddings=8192, eos_token_id=tokenizer.eos_token_id))
    save_hf(model, tokenizer, tmp_path / "model")
    for name, words in (("train", "?"), ("held_out", "!")):
        rows = [{"uid": str(i), "question": q + words, "answer": "5", "solution": RIGHT} for i,
                q in enumerate(WORDS)]
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"{name}.jsonl").write_bytes(text.encode("utf-8-sig"))
    return tmp_path


def scripted(tokenizer):
    """Half of a group's responses are right, half wrong; a synthesis is the one that reflect's rule
    writes."""
    def complete(text):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return Completion(ids, [-1.0] * len(ids), True)

    def generate(model, prompts, n, **_):
        texts = [RIGHT, WRONG] * (n // 2) if n > 1 else [reflect.rule_synthesis(WRONG, RIGHT)]
        return [[complete(text) for text in texts] for _ in prompts]
    return generate


def set_knobs(monkeypatch, module, **knobs):
    for key, value in knobs.items():
        monkeypatch.setattr(module, key, value)


def test_no_character_is_lost_between_a_problem_file_and_the_rollouts(folder, monkeypatch):
    tokenizer = load_tokenizer(folder / "model")
    for module in (rollout, reflect, evaluation):
        monkeypatch.setattr(module, "generate", scripted(tokenizer))
    small = {"init_from": str(folder / "model"), "max_new_tokens": 300, "device": "cpu",
             "threads": 1}
    optimiser = {"tokens_per_microbatch": 1024, "learning_rate": 1e-3, "warmup_steps": 0,
                 "eval_interval": 0}

    set_knobs(monkeypatch, coldstart, **small, **optimiser, problems=str(folder / "train.jsonl"),
              out_dir=str(folder / "taught"), synthesis="rule", template="short", n_sft=9, n_ift=9,
              samples_per_prompt=2, epochs=1,
              max_synthesis_tokens=900)
    coldstart.main()
    found = [r for row in jsonl.read(folder / "taught/examples.jsonl")[1:] for r in row["results"]]
    assert [r["outcome"] for r in found] == ["kept"] * 5 and found[0]["wrong"] == WRONG

    set_knobs(monkeypatch, train, **small | {"init_from": str(folder / "taught/final")},
              **optimiser, method="tapo", problems=str(folder / "train.jsonl"),
              eval_problems=str(folder / "held_out.jsonl"),
              out_dir=str(folder / "out"), max_steps=1, prompts_per_step=5, samples_per_prompt=6,
              n_pos=1, n_neg=1, m_max=1,
              template="short",
              max_synthesis_tokens=900)
    train.main()
    rows = jsonl.read(folder / "out/rollouts/step_000001.jsonl")
    kept = [r for r in rows if r["is_reflection"]]
    assert len(kept) == 5 and {r["question"] for r in rows} == {q + "?" for q in WORDS}
    for r in rows:  # the training question, not the held-out one of the same uid
        assert r["question"].replace("\r\n", "\n") in r["prompt"].replace("\r\n", "\n")
    for r in kept:
        assert r["text"].startswith("x = 3\ny = 6 \u2028😀∴") and "Wait" in r["text"]
        assert r["reward"] == 1

    set_knobs(monkeypatch, evaluation, **small | {"init_from": str(folder / "out/step_000001")},
              out=str(folder / "eval"), problems=str(folder / "held_out.jsonl"), samples=2,
              temperatures=(1.0,),
              top_ps=(1.0,))
    evaluation.main()
    assert {row["text"] for row in jsonl.read(folder / "eval.samples.jsonl")[1:]} == {RIGHT, WRONG}
    result = json.loads((folder / "eval.json").read_text())
    assert result["settings"][0]["pass@k"]["1"]["value"] == 0.5


def test_a_word_level_tokenizer_names_what_it_cannot_write_and_trains_on_the_rest(
        tmp_path, monkeypatch):
    right = "x = 3\ny = 5\nThe answer is \\boxed{5}."
    tokenizer = word_level_with_everything(right)
    model = CausalLM(ModelConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id))
    save_hf(model, tokenizer, tmp_path / "model")
    for name, questions in (("plain", PLAIN), ("emoji", ["x = 😀"])):
        jsonl.write(tmp_path / f"{name}.jsonl",
                    [{"uid": i, "question": q, "answer": 5, "solution": right}
                     for i, q in enumerate(questions)])
    plain, emoji = (str(tmp_path / f"{name}.jsonl") for name in ("plain", "emoji"))
    rows = coldstart.read_examples(plain, tokenizer, "", 256)
    assert [tokenizer.decode(row.completion_ids[:-1]).replace(" ", "")
            for row in rows] == [right.replace(" ", "")] * 5
    with pytest.raises(ValueError, match="the tokenizer has no token for '😀' in the prompt"):
        coldstart.read_examples(emoji, tokenizer, "", 256)
    tokenizer.chat_template = BARE.replace("<|im_start|>", "assistant")
    with pytest.raises(ValueError,
                       match="the tokenizer has no token for the chat template's own words in the "
                             "prompt"):
        coldstart.read_examples(plain, tokenizer, "", 256)
