"""The toy world is the ground truth of the CPU experiments: what it says about itself has to be
exact."""
import itertools
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import reward
import toy
from data import load_problems
from hf import load_hf

QUESTION = "x*7-21=35"
COUNTDOWN = "5,9,15=12..21"


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def samples(world: str, n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [(rng, problem) for problem in toy.make_problems(world, "train", n, seed=seed)]


def last_boxed(text: str) -> str:
    return re.findall(r"\\boxed\{(\d+)\}", text)[-1]


def learnt(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with everything that carries no loss replaced by underscores."""
    for start, end in spans:
        text = text[:start] + "_" * (end - start) + text[end:]
    return text


def false_statements(question: str, text: str) -> list[str]:
    """An audit that shares nothing with toy.audit: every `a op b=c`, every `a op b is c` and every
    verdict, by eval."""
    false = [m[0] for m in re.finditer(r"(\d+[-+*]\d+)(?:=| is )(\d+)", text)
             if eval(m[1]) != int(m[2])]
    if "x" in question:
        left, target = question.split("=")
        value = {g: eval(left.replace("x", str(g))) for g in range(1, 100)}
        answer = next(g for g in range(1, 16) if value[g] == int(target))
        for m in re.finditer(r"Try (\d+): [^:]*?=(\d+) (low|high|ok)\. ", text):
            reached = value[int(m[1])]
            holds = {"low": reached < int(target), "high": reached > int(target), "ok": int(m[1])
                     == answer}
            if not holds[m[3]] or reached != int(m[2]):
                false.append(m[0])
        for m in re.finditer(r"Wait, (\d+) is too (low|high)", text):
            if (int(m[1]) < answer) != (m[2] == "low"):
                false.append(m[0])
    if ".." in question:
        *given, low, high = map(int, re.findall(r"\d+", question))
        for m in re.finditer(r"Try ([^.]*=(\d+)) (low|high|ok)\. ", text):
            # every number once, and in the end one is left: the value that the verdict is about
            left = Counter(given)
            for a, b, made in re.findall(r"(\d+)[-+*](\d+)=(\d+)", m[1]):
                left.subtract([int(a), int(b)])
                if min(left.values()) < 0:
                    false.append(m[0])
                left[int(made)] += 1
            if +left != Counter([int(m[2])]) or not agrees(m[3], int(m[2]), low, high):
                false.append(m[0])
        false += [m[0] for m in re.finditer(r"Wait, (\d+) is (?:too )?(low|high|right)\. ", text)
                  if not agrees(m[2], int(m[1]), low, high)]
    return false


def agrees(word: str, value: int, low: int, high: int) -> bool:
    return {"low": value < low, "high": value > high, "ok": low <= value <= high,
            "right": low <= value <= high}[word]


def values(numbers: tuple[int, ...]) -> set[int]:
    """Everything that + - * make of the numbers, each used once, by splitting them in two in every
    way."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for size in range(1, len(numbers)):
        for left in itertools.combinations(range(len(numbers)), size):
            right = [i for i in range(len(numbers)) if i not in left]
            for a in values(tuple(numbers[i] for i in left)):
                for b in values(tuple(numbers[i] for i in right)):
                    found |= {a + b, a - b, a * b}
    return found


# --- problems ---

@pytest.mark.parametrize("world", toy.WORLDS)
def test_splits_are_disjoint_and_do_not_depend_on_n_or_seed(world):
    questions = {}
    for split in toy.SPLITS:
        for n, seed in ((50, 0), (400, 1)):
            for problem in toy.make_problems(world, split, n, seed=seed):
                assert questions.setdefault(problem.question, split) == split
    small = toy.make_problems(world, "test", 50, seed=3)
    assert small == toy.make_problems(world, "test", 400, seed=3)[:50]
    assert small != toy.make_problems(world, "test", 50, seed=4)


def test_problems_are_the_callers_own():
    """Bug: the pool is kept, so that a uid or a prompt written to a problem shows in everybody's
    next call."""
    toy.make_problems("findx", "test", 2)[0].uid = "changed"
    assert toy.make_problems("findx", "test", 2)[0].uid.startswith("findx:")


def test_findx_holds_the_stated_problems_each_with_exactly_one_solution():
    problems = [p for split in toy.SPLITS for p in toy.make_problems("findx", split, 0)]
    assert len(problems) == len({p.uid for p in problems}) == 11_984
    for p in problems[::37]:
        left, target = p.question.split("=")
        assert [x for x in range(1, 16) if eval(left.replace("x", str(x)))
                == int(target)] == [int(p.answer)]
    assert {p.level for p in problems} == {"1", "2", "3"}
    assert {p.level for p in toy.make_problems("findx", "train", 20, levels=("3",))} == {"3"}


def test_countdown_ranges_hold_one_value_alone_that_several_routes_reach():
    """Bug: a second value in the range makes a right answer wrong; one route only makes it no
    countdown."""
    problems = [p for split in toy.SPLITS for p in toy.make_problems("countdown", split, 0)]
    assert len(problems) == len({p.uid for p in problems}) == 5_446
    offsets = Counter()
    for p in problems[::23]:
        *numbers, low, high = map(int, re.findall(r"\d+", p.question))
        assert [v for v in values(tuple(numbers)) if low <= v <= high] == [int(p.answer)]
        assert high - low == 9 and 10 <= int(p.answer) <= 99 and len(numbers) == int(p.level)
        routes = toy.routes(tuple(numbers), int(p.answer))
        # not the same steps in another order
        assert len({frozenset(route) for route in routes}) >= 2
        for route in routes:
            text = toy.attempt(p.question, route) + toy.boxed(int(p.answer))
            assert toy.first_error(p.question, text) is None
            assert false_statements(p.question, text) == []
        offsets[int(p.answer) - low] += 1
    # no place in the range is worth guessing
    assert max(offsets.values()) < 0.2 * sum(offsets.values())
    assert {p.level for p in toy.make_problems("countdown", "train", 20, levels=("3",))} == {"3"}


def test_bad_requests_name_the_value_and_the_rule():
    with pytest.raises(ValueError, match="findy"):
        toy.make_problems("findy", "train", 3)
    with pytest.raises(ValueError, match="only .* test problems"):
        toy.make_problems("findx", "test", 20_000)


# --- solutions ---

@pytest.mark.parametrize("world", toy.WORLDS)
def test_direct_and_reflective_solutions_are_right_and_give_ups_wrong(world):
    for rng, p in samples(world, 400):
        for kind in ("direct", "reflective", "give_up"):
            text, _ = toy.solution(rng, p.question, kind)
            assert (last_boxed(text) == p.answer) == (kind != "give_up"), text
            assert ("Wait, " in text) == (kind == "reflective")


@pytest.mark.parametrize("world", toy.WORLDS)
def test_every_statement_of_a_right_solution_is_true_and_planted_mistakes_carry_no_loss(world):
    masked = 0
    for rng, p in samples(world, 600, seed=1):
        assert toy.solution(rng, p.question, "direct")[1] == []
        for kind in ("direct", "reflective", "give_up"):
            text, spans = toy.solution(rng, p.question, kind)
            false = false_statements(p.question, text)
            if world == "findx":
                # nothing but the guess is wrong: its evidence and verdict are true and learnt, the
                # number itself is not
                assert false == [], text
                guess = re.match(r"Try (\d+)", text)[1]
                blank = "_" * len(guess)
                expected = text if kind == "direct" else re.sub(r"^Try \d+", f"Try {blank}", text)
                if kind == "give_up":
                    expected = re.sub(r"\{\d+\}", f"{{{blank}}}", expected)
                assert learnt(text, spans) == expected
            else:
                # what is tried in vain is masked, what comes of it is true and learnt
                assert false == [], text
                first, verdict, rest = re.fullmatch(
                    r"(Try .*?)( ok| low| high)(\. .*)", text).groups()
                if kind != "direct":
                    first = re.sub(r"\d+[-+*]\d+(?==)", lambda m: "_" * len(m[0]), first)
                if kind == "give_up":
                    rest = re.sub(r"\{\d+", lambda m: "{" + "_" * (len(m[0]) - 1), rest)
                assert learnt(text, spans) == first + verdict + rest
            masked += len(spans)
    assert masked > 1000


def test_a_verdict_speaks_of_the_result_and_a_diagnosis_of_x_where_the_left_side_falls():
    assert toy.trial("50-x*3=35", 6) == "Try 6: 6*3=18, 50-18=32 low. "
    text, _ = toy.solution(np.random.default_rng(0), "50-x*3=35", "reflective")
    assert not false_statements("50-x*3=35", text)
    analysis, prefix, reflection, correction = toy.construction(
        "50-x*3=35", toy.trial("50-x*3=35", 6) + toy.boxed(6))
    assert reflection == "Wait, 6 is too high. " and correction.startswith("Try 5: ")


def test_the_author_of_the_cold_start_gives_up_more_often_than_it_reflects():
    shares = toy.SHARES
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["reflective"] / (shares["reflective"] + shares["give_up"]) < 0.45


def test_wrong_solutions_are_wrong_and_their_guesses_lie_near_the_truth():
    distance = []
    for world in toy.WORLDS:
        for rng, p in samples(world, 500, seed=2):
            text = toy.wrong_solution(rng, p.question)
            assert last_boxed(text) != p.answer
            if world == "findx":
                distance.append(abs(int(re.match(r"Try (\d+)", text)[1]) - int(p.answer)))
    assert min(distance) == 1 and np.median(distance) <= 3


# --- the truth about a mistake ---

@pytest.mark.parametrize("text, end", [
    ("Try 8: 8*7=56, 56-21=35 ok. Answer: \\boxed{8}", None),
    ("Try 6: 6*7=42, 42-21=21 low. Answer: \\boxed{6}", "low. "),
    ("Try 6: 6*7=42, 42-21=21 low. Wait, 6 is too low. Try 8: 8*7=56, 56-21=35 ok. Answer: "
     "\\boxed{8}", "low. "),
    # a slip, not the failed check after it
    ("Try 6: 6*7=41, 41-21=20 low. Answer: \\boxed{6}", "41, "),
    ("Try 6: 6*7=42, 42-21=22 low. Answer: \\boxed{6}", "low. "),
    # true by itself, but not what 6 stands for
    ("Try 6: 7*7=49, 49-21=28 low. Answer: \\boxed{6}", "49, "),
    ("Try 6: 6*7=42, 42-21=35 ok. Answer: \\boxed{6}", "ok. "),
    ("Try 6: 6*7=42, 42-21=21 high. Answer: \\boxed{6}", "high. "),
    # right guess, wrong verdict
    ("Try 8: 8*7=56, 56-21=35 low. Answer: \\boxed{9}", "low. "),
    ("Try 8: 8*7=56, 56-21=35 ok. Answer: \\boxed{6}", "{6}"),
    # unfinished, nothing wrong so far
    ("Try 8: 8*7=56, 56-2", None),
    # not of the world's form
    ("Try 8: 8*7-21=35 ok. Answer: \\boxed{9}", "ok. "),
    ("8, Try 6: ", "8, "),
])
def test_first_error_of_findx_is_the_exact_character_behind_it(text, end):
    expected = None if end is None else text.index(end) + len(end)
    assert toy.first_error(QUESTION, text) == expected


# said: the diagnosis, None where the audit has no words
@pytest.mark.parametrize("text, end, said", [
    ("Try 15+9=24, 24-5=19 ok. Answer: \\boxed{19}", None, ""),
    ("Try 9-5=4, 4+15=19 ok. Answer: \\boxed{19}", None, ""),                       # another route
    # the smaller number first
    ("Try 9+15=24, 24-5=19 ok. Answer: \\boxed{19}", None, ""),
    ("Try 15+5=20, 20-9=11 low. Wait, 11 is too low. Try 15+9=24, ", "low. ",
     "Wait, 11 is too low. "),
    ("Try 15+5=20, 20+9=29 ok. Answer: \\boxed{29}", "ok. ", "Wait, 29 is too high. "),
    ("Try 15+5=20, 20-9=11 high. Answer: \\boxed{11}", "high. ", "Wait, 11 is too low. "),
    ("Try 15+9=24, 24-5=19 low. Answer: \\boxed{19}", "low. ", "Wait, 19 is right. "),
    ("Try 15+9=23, 23-5=18 ok. Answer: \\boxed{18}", "23, ", "Wait, 15+9 is 24, not 23. "),
    ("Try 15+9=24, 24-5=18 ok. Answer: \\boxed{18}", "ok. ", "Wait, 24-5 is 19, not 18. "),
    ("Try 5-9=4, 15+4=19 ok. Answer: \\boxed{19}", "4, ", "Wait, 5-9 is -4, not 4. "),
    ("Try 15+5=20, 20-7=13 ok. Answer: \\boxed{13}", "ok. ", "Wait, 9, not 7. "),  # never given
    ("Try 15+5=20, 20-5=15 ok. Answer: \\boxed{15}", "ok. ", "Wait, 9, not 5. "),  # used before
    # used twice in one step
    ("Try 9+9=18, 18-5=13 ok. ", "18, ", "Wait, 5,15, not 9. "),
    # a number left over
    ("Try 15+5=20 ok. Answer: \\boxed{20}", "ok. ", "Wait, 9,20, not 20. "),
    ("Try 15+9=24, 24-5=19 ok. Answer: \\boxed{12}", "{12}", "Wait, 19 is right. "),
    # nothing is left to go on with
    ("Try 15+9=24, 24-5=19, 19-5=14 ok. ", ", 19-5=14 ok. ", None),
    # a guess without a route
    ("Answer: \\boxed{19}", "{19}", None),
    # unfinished, nothing wrong so far
    ("Try 15+9=24, 24-", None, ""),
])
def test_countdown_audits_are_exact_in_place_and_words(text, end, said):
    expected = None if end is None else text.index(end) + len(end)
    assert toy.first_error(COUNTDOWN, text) == expected
    built = toy.construction(COUNTDOWN, text)
    assert (built is None) == (not said)
    if built:
        assert built[1] == text[:expected] and built[2] == said
        assert toy.diagnosis_is_true(COUNTDOWN, text[:expected] + said)
        assert not toy.diagnosis_is_true(COUNTDOWN, text[:expected] + "Wait, 14 is too low. ")


@pytest.mark.parametrize("world", toy.WORLDS)
def test_first_error_finds_every_planted_mistake_and_no_other(world):
    for rng, p in samples(world, 300, seed=3):
        assert toy.first_error(p.question, toy.solution(rng, p.question, "direct")[0]) is None
        for kind in ("reflective", "give_up"):
            text, spans = toy.solution(rng, p.question, kind)
            delimiter = re.compile(r" (low|high)\. ").search(text, spans[0][0])
            assert toy.first_error(p.question, text) == delimiter.end()


def test_constructions_localise_the_error_and_say_nothing_false_after_it():
    slips = 0
    for rng, p in samples("findx", 600, seed=4):
        wrong = toy.wrong_solution(rng, p.question)
        analysis, prefix, reflection, correction = toy.construction(p.question, wrong)
        assert wrong.startswith(prefix) and len(prefix) == toy.first_error(p.question, wrong)
        assert false_statements(p.question, reflection
                                + correction) == [] and last_boxed(correction) == p.answer
        assert reflection.startswith("Wait, ")
        marks = re.findall(r"(\d+) vs (\d+) (ok|wrong)\. ", analysis)
        assert [m[2] for m in marks] == ["ok"] * (len(marks) - 1) + ["wrong"]
        assert all((m[0] == m[1]) == (m[2] == "ok") for m in marks)
        # what the audit calls wrong is the last number that the prefix states
        assert re.findall(r"\d+", prefix)[-1] == marks[-1][0]
        named = re.search(r"Wait, (\d+) is wrong\. $", reflection)
        if named:  # a slip: the reflection names the number that is wrong
            assert named[1] == marks[-1][0]
        slips += bool(named)
    assert slips > 50


def test_countdown_constructions_keep_the_reasoning_and_end_right_under_the_grader():
    """Whatever went wrong: a miss, a slip, a number that is not there or left over, a false
    verdict, another box."""
    rights, golds, said = [], [], Counter()
    for rng, p in samples("countdown", 600, seed=4):
        wrong = toy.wrong_solution(rng, p.question)
        analysis, prefix, reflection, correction = toy.construction(p.question, wrong)
        assert wrong.startswith(prefix) and len(prefix) == toy.first_error(p.question, wrong)
        assert toy.first_error(p.question, prefix + reflection) == len(prefix)
        assert toy.diagnosis_is_true(p.question, prefix + reflection + correction)
        assert false_statements(p.question, reflection + correction) == []
        marks = re.findall(r"(\S+) vs (\S+) (ok|wrong)\. ", analysis)
        assert [m[2] for m in marks] == ["ok"] * (len(marks) - 1) + ["wrong"]
        *_, (written, true, _) = marks
        form = re.sub(r"[\d,]*\d", "N", reflection)
        # names the value that the try reached
        if form in ("Wait, N is too low. ", "Wait, N is too high. "):
            assert written in reflection and false_statements(p.question, prefix) == (
                [prefix[prefix.rindex("Try "):]] if prefix.endswith(" ok. ") else [])
        # names what there is to use
        elif form == "Wait, N, not N. ":
            there = list(map(int, true.split(",")))
            assert reflection == f"Wait, {true}, not {written}. "
            assert (int(written) not in there or len(there) > 1)
        elif form == "Wait, N is right. ":
            assert prefix.endswith(toy.boxed(int(written)))
            assert correction == toy.boxed(int(p.answer))
        else:
            assert form in ("Wait, N+N is N, not N. ", "Wait, N-N is N, not N. ",
                            "Wait, N*N is N, not N. ")
            form = "slip"
        said[form] += 1
        rights.append(prefix + reflection + correction)
        golds.append(p.answer)
    assert min(said.values()) > 30 and len(said) == 5, said
    assert {g.status for g in reward.grade_many(rights, golds)} == {"correct"}


def test_countdown_grading_takes_any_route_and_no_copy_of_the_question():
    """Bug: a grader that compares values is satisfied by the target itself, which the question
    states."""
    *numbers, low, high = re.findall(r"\d+", COUNTDOWN)
    for route in toy.routes((5, 9, 15), 19):
        assert reward.grade(toy.attempt(COUNTDOWN, route) + toy.boxed(19), "19").reward == 1
    for copied in (*numbers, low, high, f"{low}..{high}", "5,9,15"):
        assert reward.grade(f"\\boxed{{{copied}}}", "19").reward == 0


def test_a_construction_is_exact_on_the_documented_example():
    assert toy.construction(QUESTION, "Try 6: 6*7=41, 41-21=20 low. Answer: \\boxed{6}") == (
        "41 vs 42 wrong. ", "Try 6: 6*7=41, ", "Wait, 41 is wrong. ",
        "Try 8: 8*7=56, 56-21=35 ok. Answer: \\boxed{8}")
    assert toy.construction(QUESTION, "Try 6: 6*7=42, 42-") is None
    # the correction goes by the route that shares its beginning with what was tried
    assert toy.construction(COUNTDOWN, "Try 15+9=24, 24+5=29 high. Answer: \\boxed{29}") == (
        "24 vs 24 ok. 29 vs 29 ok. 29 vs 12..21 wrong. ", "Try 15+9=24, 24+5=29 high. ",
        "Wait, 29 is too high. ", "Try 15+9=24, 24-5=19 ok. Answer: \\boxed{19}")


# --- cold-start examples ---

@pytest.mark.parametrize("world", toy.WORLDS)
@pytest.mark.parametrize("mode", ["micro", "full"])
def test_a_synthesis_example_answers_its_own_prompt(world, mode):
    for rng, p in samples(world, 100, seed=5):
        example = toy.ift_example(rng, p.question, mode)
        wrong = re.search(r"<wrong>([\s\S]*)</wrong>", example["prompt"])[1]
        form = r"<analysis>[\s\S]+</analysis><reconstruction>([\s\S]+)</reconstruction>"
        body = re.fullmatch(form, example["completion"])[1]
        assert last_boxed(re.search(r"<right>([\s\S]*)</right>",
                                    example["prompt"])[1]) == p.answer == last_boxed(body)
        if mode == "micro":
            assert wrong.startswith(body.split("<reflection>")[0])
            assert body.count("<reflection>") == 1
        else:
            assert "<reflection>" not in body and false_statements(p.question, body) == []
        assert "no_loss" not in example


def test_the_teacher_never_gives_up():
    for rng, p in samples("findx", 100, seed=6):
        assert last_boxed(toy.teacher_example(rng, p.question)["completion"]) == p.answer


# --- tokenizer ---

def test_the_tokenizer_round_trips_exactly_and_its_offsets_are_characters(tokenizer):
    for world in toy.WORLDS:
        for rng, p in samples(world, 100, seed=7):
            example = toy.ift_example(rng, p.question)
            for text in (example["prompt"], example["completion"],
                         toy.solution(rng, p.question, "reflective")[0]):
                encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                assert tokenizer.decode(encoded["input_ids"]) == text
                assert tokenizer.unk_token_id not in encoded["input_ids"]
                pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
                assert [text[a:b] for a, b in encoded["offset_mapping"]] == pieces


def test_the_tokenizer_reloads_from_its_folder_with_template_and_special_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": QUESTION}]
    for t in (tokenizer, again):
        ids = t.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False,
                                    return_dict=False)
        assert t.decode(ids) == f"<|user|>{QUESTION}<|assistant|>"
        assert t.eos_token == "<|im_end|>" and t.eos_token_id != t.pad_token_id and len(t) == 60
    text = "Try 6: 6*7=42, 42-21=21 low. Wait, 6 is too low. <|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text


def test_tags_are_single_tokens_that_no_decode_skips(tokenizer):
    for tag in toy.TAGS:
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == tag


def test_a_character_outside_the_vocabulary_is_detectable(tokenizer):
    assert tokenizer.unk_token_id in tokenizer("x^2=4")["input_ids"]
    assert tokenizer.unk_token_id is not None
    assert tokenizer.unk_token_id not in tokenizer("x*2=4")["input_ids"]


def test_solutions_fit_their_token_budgets(tokenizer):
    def length(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])
    longest = {"direct": 0, "reflective": 0}
    for rng, p in [(rng, p) for rng, p in samples("findx", 3000, seed=8)]:
        for kind in longest:
            longest[kind] = max(longest[kind], length(toy.solution(rng, p.question, kind)[0]))
    assert longest["direct"] <= 26 and longest["reflective"] + 1 <= 54   # + 1: the stop token
    config = runpy.run_path(str(Path(toy.__file__).parent / "config/countdown.py"))
    for p in toy.make_problems("countdown", "train", 600, seed=8, levels=("3",)):
        built = "".join(toy.construction(p.question, toy.wrong_solution(rng, p.question))[1:])
        for text in (built, toy.solution(rng, p.question, "reflective")[0]):
            assert length(text) + 1 <= config["max_new_tokens"]
        synthesis = toy.ift_example(rng, p.question)["completion"]
        assert length(synthesis) + 1 <= 120  # max_synthesis_tokens of config/toy.py


def test_a_diagnosis_is_true_only_of_a_mistake_that_was_made():
    """ERR in the toy world. Bug: any "Wait" counts as having found the error."""
    q = "x*7-21=35"
    tried = "Try 6: 6*7=42, 42-21=21 low. "
    assert toy.diagnosis_is_true(q, tried + "Wait, 6 is too low. " + "Try 8: 8*7=56, 56-21=35 ok. ")
    assert toy.diagnosis_is_true(q, "Try 6: 6*7=42, 42-21=35 ok. Wait, 35 is wrong. ")
    for said in ("Wait, 6 is too high. ", "Wait, 5 is too low. ", "Wait, 21 is wrong. ", ""):
        assert not toy.diagnosis_is_true(q, tried + said)
    assert not toy.diagnosis_is_true(q, "Try 8: 8*7=56, 56-21=35 ok. Wait, 8 is too low. ")


# --- files ---

def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["toy.py", *map(str, arguments)])
    toy.main()


def test_a_world_is_a_folder_of_files(tmp_path, monkeypatch):
    """Bug: files in another order, from another seed, or a model that depends on what ran before
    it."""
    for folder in ("a", "b"):
        torch.rand(3)
        run(monkeypatch, "findx", "--levels=1", "--examples=40", f"--out={tmp_path / folder}")
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "coldstart.jsonl",
                 "model/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    sizes = [len(load_problems(tmp_path / "a" / f"{split}.jsonl", check_answers=False))
             for split in toy.SPLITS]
    assert sizes == [3005, 352, 401]
    rows = [json.loads(line) for line in (tmp_path / "a/coldstart.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and any("<micro>" in row["prompt"]
                                   for row in rows) and any("no_loss" in row for row in rows)
    assert rows[0] == {"prompt": "x*3-7=23",
                       "completion": "Try 10: 10*3=30, 30-7=23 ok. Answer: \\boxed{10}"}
    # "Try 11: .. Answer: \boxed{11}": the planted mistakes
    assert rows[3]["no_loss"] == [[4, 6], [46, 48]]
    model = load_hf(tmp_path / "a/model")
    assert sum(p.numel() for p in model.parameters()) == 176_576
    run(monkeypatch, "findx", "--levels=1", "--examples=40", "--seed=1", f"--out={tmp_path / 'c'}")
    for name in ("coldstart.jsonl", "model/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes(), name
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "c/train.jsonl").read_bytes()


def test_kinds_leave_the_others_out(tmp_path, monkeypatch):
    run(monkeypatch, "countdown", "--levels=3", "--examples=60", "--kinds=direct,give_up",
        f"--out={tmp_path}")
    assert "Wait" not in (tmp_path / "coldstart.jsonl").read_text()


@pytest.mark.parametrize("arguments, says", [
    (["chain"], "world = 'chain' must be one of findx, countdown"),
    (["findx", "--levels=7"], "--levels=7: use some of 1, 2, 3"),
    (["findx", "--kinds=nice"],
     "--kinds=nice: use some of direct, reflective, give_up, micro, full, "
     "solve")])
def test_bad_arguments_are_named(arguments, says, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(says)):
        run(monkeypatch, *arguments, f"--out={tmp_path}")
