"""Problem files, the prompt, the order, and the preparation of data sets."""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
from data import Problem
from tools import prepare

SHARED = Path(__file__).resolve().parents[2] / "shared"
# Qwen3's ids of one user turn "What is 2+3?", non-thinking: the rendered prompt ends in an empty
# thinking block.
QWEN3_IDS = [151644, 872, 198, 3838, 374, 220, 17, 10, 18, 30, 151645, 198,
             151644, 77091, 198, 151667, 271, 151668, 271]
THINKING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt %}<a>{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}#{% endif %}")


def char_tokenizer(template=THINKING_TEMPLATE, unk="<unk>"):
    """Digits and signs, one id a character; its post-processor adds BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    specials = ["<bos>", "<eos>", "<unk>", "<u>", "<a>", "#"]
    vocab = {token: i for i, token in enumerate([*specials, *"0123456789+=?"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>",
                                        eos_token="<eos>", unk_token=unk,
                                        additional_special_tokens=["<u>", "<a>", "#"])
    tokenizer.chat_template = template
    return tokenizer


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n",
                    encoding="utf-8")
    return path


GOOD = {"uid": "a", "question": "1+1=?", "answer": "2"}


# --- problem files

def test_both_layouts_of_a_problem_file_load_alike(tmp_path):
    path = write(tmp_path / "p.jsonl", {"uid": "a", "question": "q\u2028r", "answer": "2",
                                        "level": 3}, "",
                 {"id": 7, "problem": "é", "answer": 0})
    assert data.load_problems(path) == [Problem("a", "q\u2028r", "2", "3"),
                                        Problem("7", "é", "0", "")]
    assert [p.uid for p in data.load_problems(path, limit=1)] == ["a"]


def test_files_as_windows_writes_them_are_read(tmp_path):
    """A byte-order mark, CRLF; a form feed and U+0085 inside a text end no line."""
    rows = [{"uid": "a", "question": "q\x0c\x85r", "answer": "2"},
            {"uid": "b", "question": "s\r\nt", "answer": "3"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "p.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [p.question for p in data.load_problems(tmp_path / "p.jsonl")] == [
        "q\x0c\x85r", "s\r\nt"]
    assert prepare.read_rows(tmp_path / "p.jsonl") == rows
    (tmp_path / "p.jsonl").write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"p.jsonl:1: not UTF-8 .*save the file as UTF-8"):
        data.load_problems(tmp_path / "p.jsonl")


@pytest.mark.parametrize("answer, warned", [
    ("Ann has 72 clips.", True), ("72 clips", False), ("\\text{red, 2}", False),
    ("x = 3 or x = 4", False), ("east", False),
    ("It is 5 o'clock in the evening", True)])
def test_a_gold_answer_that_is_prose_is_worth_a_warning(tmp_path, capsys, answer, warned):
    data.load_problems(write(tmp_path / "p.jsonl", GOOD, GOOD | {"uid": "b", "answer": answer}))
    out = capsys.readouterr().out
    assert (f"WARNING: {tmp_path}/p.jsonl:2: gold answer {answer!r} is prose" in out) == warned
    assert (warned or not out)


def test_saved_problems_load_back_equal(tmp_path):
    problems = [Problem("a", "x\ny \"z\" \\frac", "\\{1, 2\\}", "5"), Problem("b", "é\u2028", "0")]
    data.save_problems(problems, tmp_path / "new" / "p.jsonl")
    assert data.load_problems(tmp_path / "new" / "p.jsonl") == problems
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["p.jsonl"]


def test_two_processes_may_write_the_same_problems_side_by_side(tmp_path):
    """Bug: two cold starts of a world began in the same second, and one renamed away the
    half-written file of the other."""
    write = ("import data; problems = [data.Problem(f'u{i}', 'q', 'a') for i in range(200)]\n"
             f"for _ in range(100): data.save_problems(problems, {str(tmp_path / 'p.jsonl')!r})")
    both = [subprocess.Popen([sys.executable, "-c", write], cwd=Path(data.__file__).parent)
            for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(data.load_problems(tmp_path / "p.jsonl")) == 200
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("bad, words", [
    ('{"uid": "b", "question"', "not valid JSON"),
    ("[1, 2]", "expected a JSON object"),
    ({"question": "q", "answer": "2"}, "no uid"),
    ({"uid": "b", "answer": "2"}, "no question"),
    ({"uid": "b", "question": "  ", "answer": "2"}, "no question"),
    ({"uid": "b", "question": "q"}, "no answer"),
    ({"uid": "b", "question": "q", "answer": ""}, "no answer"),
    ({"uid": "b", "question": "q", "answer": None}, "no answer"),
    ({"uid": "b", "question": "q", "answer": ["2"]}, "no answer"),
    ({"uid": "b", "question": "q", "answer": "\\frac{"}, "answer"),
    ({"uid": "a", "question": "q", "answer": "2"}, "line 1"),
])
def test_a_bad_line_is_refused_with_its_number(tmp_path, bad, words):
    path = write(tmp_path / "p.jsonl", GOOD, "", bad)
    with pytest.raises(ValueError, match=words) as e:
        data.load_problems(path)
    assert f"{path}:3" in str(e.value) and "\n" not in str(e.value)


def test_empty_and_missing_problem_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no problems"):
        data.load_problems(write(tmp_path / "p.jsonl", "", ""))
    with pytest.raises(FileNotFoundError, match="tools.prepare"):
        data.load_problems(tmp_path / "none.jsonl")


def test_a_prompt_beyond_the_context_is_refused_by_name_and_the_last_that_fits_is_not():
    problem = data.Problem("p7", "?", "1", prompt_ids=[0] * 60)
    data.check_prompts_fit([problem], 40, 100)
    problem.prompt_ids.append(0)
    with pytest.raises(ValueError,
                       match=r"'p7'.*61 tokens.*max_new_tokens = 40.*100.*lower max_new_tokens"):
        data.check_prompts_fit([problem], 40, 100)


# --- prompt and tokenizer

@pytest.mark.skipif(not (SHARED / "data/qwen3_tokenizer").is_dir(),
                    reason="needs the Qwen3 vocabulary")
def test_the_qwen3_prompt_has_exactly_the_published_ids():
    tokenizer = data.load_tokenizer(SHARED / "data/qwen3_tokenizer")
    assert data.render_prompt(tokenizer, "What is 2+3?", "") == QWEN3_IDS
    check = json.loads((SHARED / "data/qwen3_tokenizer_check.json").read_text())
    assert check["False"]["ids"] == QWEN3_IDS
    text = tokenizer.decode(data.render_prompt(tokenizer, "Q"))
    assert text == ("<|im_start|>user\nQ\nPlease reason step by step, and put your final answer "
                    "within \\boxed{}."
                    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    config = json.loads((SHARED / "data/qwen3_tokenizer/generation_config.json").read_text())
    assert data.stop_ids_of(tokenizer, config["eos_token_id"]) == (151643, 151645)
    assert data.stop_ids_of(tokenizer, (151645,)) == (151643, 151645)


def test_a_prompt_has_one_bos_and_asks_for_no_thinking():
    """Guards trap 6."""
    tokenizer = char_tokenizer()
    # this tokenizer adds BOS by itself; the template writes it too
    assert tokenizer("1").input_ids == [0, 7]
    assert data.render_prompt(tokenizer, "1+1", "=?") == [0, 3, 7, 16, 7, 17, 18, 4, 5]


def test_characters_without_a_token_are_named():
    with pytest.raises(ValueError, match="no token for 'x' '√' in the prompt"):
        data.render_prompt(char_tokenizer(), "1+x+√+x", "")
    assert data.render_prompt(char_tokenizer(), "1+1", "")


def test_a_tokenizer_without_chat_template_or_folder_is_refused(tmp_path):
    char_tokenizer(template=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, words in (("absent", "pass its folder"),
                        ("empty", "copy the checkpoint's tokenizer "
                         "files into it")):
        with pytest.raises(ValueError, match=f"no tokenizer at .*{name}: .*; .*{words}") as e:
            data.load_tokenizer(tmp_path / name)
        assert "\n" not in str(e.value)
    (tmp_path / "run/step_000006").mkdir(parents=True)
    with pytest.raises(ValueError, match="a run's folder; pass a checkpoint .*run/step_000006"):
        data.load_tokenizer(tmp_path / "run")


@pytest.mark.parametrize("template, refused", [
    ("{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<a>{% else %}{{ m.content "
     "}}{% endif %}"
     "{% endfor %}", None),  # as Llama 2's [INST] question [/INST]
    ("{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>{{ m.content "
     "}}{% endif %}"
     "{% endfor %}", "lacks '<a>'")])
def test_a_template_that_ends_after_the_users_turn_is_refused(tmp_path, template, refused):
    """Bug: a policy trained without its assistant header."""
    char_tokenizer(template=template).save_pretrained(tmp_path)
    if refused:
        with pytest.raises(ValueError, match=f"ignores add_generation_prompt.*{refused}; add it"):
            data.load_tokenizer(tmp_path)
    else:
        assert data.load_tokenizer(tmp_path)


def test_tokens_without_a_row_of_the_embedding_are_refused_by_name(tmp_path):
    tokenizer = char_tokenizer()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    tokenizer.save_pretrained(tmp_path)
    assert data.load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has \[PAD\] beyond the 19 rows .*or add rows"):
        data.load_tokenizer(tmp_path)


def test_stop_ids_unite_tokenizer_and_config():
    tokenizer = char_tokenizer()
    assert data.stop_ids_of(tokenizer, ()) == (1,)
    assert data.stop_ids_of(tokenizer, (9, 1)) == (1, 9)
    assert data.stop_ids_of(tokenizer, (0,)) == (0, 1)  # id 0 is an id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert data.stop_ids_of(tokenizer, (9,)) == (1, 9,
                                                 tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token_id"):
        data.stop_ids_of(tokenizer, ())


# --- order

def test_every_epoch_visits_every_problem_once_and_differently():
    for epoch in range(3):
        assert sorted(data.order(50, 0, epoch)) == list(range(50))
    assert len({tuple(data.order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert (data.order(50, 1, 2) == data.order(50, 1, 2)).all()


def test_steps_drop_nothing_and_do_not_depend_on_earlier_steps():
    problems = [Problem(str(i), "q", "1") for i in range(10)]
    # 20 queries: two epochs
    steps = [data.problems_for_step(problems, 0, step, 4) for step in range(5)]
    assert [q for batch in steps for q, _ in batch] == list(range(20))
    visited = [p.uid for batch in steps for _, p in batch]
    assert Counter(visited[:10]) == Counter(visited[10:]) == Counter(str(i) for i in range(10))
    assert visited == [str(i) for epoch in (0, 1) for i in data.order(10, 0, epoch)]
    np.random.seed(1)
    assert data.problems_for_step(problems, 0, 3, 4) == steps[3]
    assert len(data.problems_for_step(problems[:3], 0, 0, 8)) == 8
