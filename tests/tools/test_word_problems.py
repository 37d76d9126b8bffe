"""Word problems: the three layouts, worked solutions, the split, duplicates, and the files they
become."""
import json
import re
import urllib.request
from fractions import Fraction
from pathlib import Path

import pytest

import data
from data import Problem
from tools import word_problems
from tools.word_problems import (
    Row,
    prepare,
    read_asdiv,
    read_mawps,
    read_svamp,
    solution,
    split_of,
    without_duplicates,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = {"AddSub": "AddSub.json", "MultiArith": "MultiArith.json", "SingleEq": "questions.json",
         "SVAMP": "SVAMP.json"}


def mawps(*rows):
    return json.dumps(
        [{"iIndex": i, "lEquations": [equation], "lSolutions": [answer], "sQuestion": question}
         for i, (question, equation, answer) in enumerate(rows)])


def svamp(*rows):
    return json.dumps([{"Body": body, "Question": question, "Equation": equation, "Answer": answer}
                       for body, question, equation, answer in rows])


def asdiv(*rows):
    tags = ("Body", "Question", "Answer", "Formula")
    problems = "".join("<Problem ID='p'>" + "".join(f"<{t}>{v}</{t}>" for t, v in zip(tags, row)) +
                       "</Problem>" for row in rows)
    return ('<?xml version="1.0" encoding="UTF-8" ?>\n'
            f"<File><ProblemSet>{problems}</ProblemSet></File>\n")


def boxed(answer, *lines):
    return "\n".join([*lines, f"The answer is \\boxed{{{answer}}}."])


def test_mawps_takes_the_unknown_off_the_left_and_the_blanks_off_the_marks():
    rows = read_mawps(mawps((" Ann 's cat , a big one , ate 2 .  And 3 ? ", "X = 2 + 3 ", "5.0"),
                            ("Solve me ?", "2 + X = 7", 5.0), ("Right side?", "45*3=x", 135.0),
                            ("Bare?", "x=84/12", 7)))
    assert rows == [Row("Ann 's cat, a big one, ate 2. And 3?", "5", "2 + 3"),
                    Row("Solve me?", "5", "2 + X = 7"), Row("Right side?", "135", "45*3=x"),
                    Row("Bare?", "7", "84/12")]
    assert [solution(r.expression, r.answer) for r in rows] == [
        boxed(5, "2 + 3 = 5"), "", "", boxed(7, "84 / 12 = 7")]


def test_svamp_bodies_get_their_full_stop():
    rows = read_svamp(svamp(("If he had $ 4 at the start", "How much?", "( 4.0 - 3.0 )", 1.0),
                            ("He ate 9 cookies. ", "How many?", "( 9.0 - 9.0 )", 0.0)))
    assert rows == [Row("If he had $ 4 at the start. How much?", "1", "( 4.0 - 3.0 )"),
                    Row("He ate 9 cookies. How many?", "0", "( 9.0 - 9.0 )")]


def test_asdiv_reads_numbers_with_their_units_and_the_left_side_of_the_formula():
    rows = read_asdiv(asdiv(("Seven &lt; nine.", "How many ?", "9 (apples)", "7+2=9"),
                            ("A pool,", "find  both. ", "8 (ft); 128 (sq. ft)", "2W=16"),
                            ("Of 1,050 ml", "left?", "1,050.50  (ml)", "31/12=2 r7")))
    assert rows == [Row("Seven < nine. How many?", "9", "7+2"),
                    Row("A pool, find both.", "8", "2W"),
                    Row("Of 1,050 ml left?", "1050.5", "31/12")]


@pytest.mark.parametrize("answer",
                         ["Mrs. Hilt", "5:45", "6th", "5/2", "-(1/3)", "18; 12",
                          "0.6666666666666666", ""])
def test_an_answer_that_is_no_plain_number_is_dropped(answer):
    rows = read_asdiv(asdiv(("A.", "Kept?", "1 (cup)", "3-2=1"),
                            ("B.", "Dropped?", answer, "1+1=2")))
    assert [r.question for r in rows] == ["A. Kept?"]


@pytest.mark.parametrize("equation, answer, lines", [
    ("7+2", "9", ["7 + 2 = 9"]),
    ("((32.0+42.0)-35.0)", "39", ["32 + 42 = 74", "74 - 35 = 39"]),
    ("(17+18/2)-18/2", "17", ["18 / 2 = 9", "17 + 9 = 26", "18 / 2 = 9", "26 - 9 = 17"]),
    ("( ( 4.0 - 8.0 ) + 5.0 )", "1", ["4 - 8 = -4", "-4 + 5 = 1"]),
    ("86 - (45-86)", "127", ["45 - 86 = -41", "86 - -41 = 127"]),
    ("0.1+0.2", "0.3", ["0.1 + 0.2 = 0.3"]),  # in floats: 0.30000000000000004
    ("147.60/(1-0.18)", "180", ["1 - 0.18 = 0.82", "147.6 / 0.82 = 180"]),
    ("15*12*(1+6/100)", "190.8",
     ["15 * 12 = 180", "6 / 100 = 0.06", "1 + 0.06 = 1.06", "180 * 1.06 = 190.8"]),
    ("2-2", "0", ["2 - 2 = 0"]),
    ("9999999999999999*9999999999999999", str(9999999999999999 ** 2),
     [f"9999999999999999 * 9999999999999999 = {9999999999999999 ** 2}"]),
])
def test_solution_is_one_exact_line_per_operation(equation, answer, lines):
    assert solution(equation, answer) == boxed(answer, *lines)


@pytest.mark.parametrize("equation, answer", [
    ("7+2", "8"),  # does not give the answer
    ("2/3*3", "2"),  # gives it, but 2/3 is no decimal
    ("0.3333333333333333+0.3333333333333333+0.08333333333333333", "0.75"),  # only if rounded
    ("9", "9"),  # nothing worked out
    ("8/0", "8"), ("2W", "8"), ("GCD(12,16)", "4"), ("1 (quarter)*25 (cent/quarter)", "25"),
    ("2+x", "5"),
    ("2**3", "8"), ("'a'+'b'", "8"), ("1,050+2", "1052"), ("True+1", "2"), ("1e999-1", "1"),
    ("", "1"), ("(" * 999, "1"),
    ("__import__('os')", "1"), ("\0", "1"),
])
def test_no_solution_where_the_equation_does_not_exactly_give_the_answer(equation, answer):
    assert solution(equation, answer) == ""


def test_the_split_depends_on_question_and_source_alone():
    questions = [f"What is {i} + 1?" for i in range(4000)]
    shares = {source: [[split_of(q, source) for q in questions].count(s) / 4000
                       for s in ("train", "val", "test")] for source in ("ASDiv", "SVAMP")}
    assert shares["ASDiv"] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert shares["SVAMP"] == pytest.approx([0.4, 0.0, 0.6], abs=0.03) and shares["SVAMP"][1] == 0
    assert [split_of(q, "ASDiv") for q in (
        "What is 0 + 1?", "What is 34 + 1?", "What is 6 + 1?")] == ["train", "val", "test"]
    assert all(split_of(q, "SVAMP") == "test" for q in questions if split_of(q, "ASDiv") == "test")


def test_the_first_of_problems_with_the_same_letters_and_digits_stays():
    problems = [Problem("a", "How many, Ann?", "1"), Problem("b", "How many 2?", "2"),
                Problem("c", "how many ann ?", "3")]
    assert [p.uid for p in without_duplicates(problems)] == ["a", "b"]


@pytest.fixture
def copies(tmp_path):
    folder = tmp_path / "copies"
    for name in ("AddSub", "MultiArith", "SingleEq"):
        (folder / name).mkdir(parents=True)
        rows = [(f"{name} has {i} + 1 pens . How many ?", f"X = {i} + 1", i + 1.0)
                for i in range(30)]
        (folder / name / FILES[name]).write_text(mawps(*rows, ("All have 3 pens?", "X=1+2", 3)),
                                                 encoding="utf-8")
    (folder / "AQuA").mkdir()
    # another set, the same name
    (folder / "AQuA" / "questions.json").write_text("[]", encoding="utf-8")
    (folder / "SVAMP.json").write_text(
        svamp(*((f"S has {i} pens", "How many?", "1+1", 5) for i in range(30))), encoding="utf-8")
    (folder / "ASDiv.xml").write_text(asdiv(("All have", "3 pens ?", "3 (pens)", "x=3")),
                                      encoding="utf-8")
    return folder


def test_prepare_writes_three_files_that_load(copies, tmp_path):
    counts = prepare(tmp_path / "out", copies)
    rows = {
        s: [json.loads(line)
            for line in (tmp_path / "out" / f"word_problems_{s}.jsonl").open(encoding="utf-8")]
        for s in ("train", "val", "test")}
    assert counts == {s: (len(rows[s]), sum("solution" in r for r in rows[s])) for s in rows}
    everything = [r for s in rows for r in rows[s]]
    assert len(everything) == 3 * 30 + 30 + 1  # "All have 3 pens?" once
    assert {r["level"] for r in everything if r["question"].startswith("All have")} == {"AddSub"}
    # SVAMP's equations here are wrong
    assert all(("solution" in r) == (r["level"] != "SVAMP") for r in everything)
    assert all(split_of(r["question"], r["level"]) == s for s in rows for r in rows[s])
    loaded = data.load_problems(tmp_path / "out" / "word_problems_train.jsonl")
    assert [(p.uid, p.question, p.answer, p.level) for p in loaded] == [
        (r["uid"], r["question"], r["answer"], r["level"]) for r in rows["train"]]
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    prepare(tmp_path / "out", copies)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_a_missing_or_strange_file_is_named(copies, tmp_path):
    (copies / "ASDiv.xml").write_text("<File><Problem><Body>no question</Body></Problem></File>",
                                      encoding="utf-8")
    with pytest.raises(ValueError,
                       match="^ASDiv: not the layout of "
                       "https://raw.githubusercontent.com/chaochun/"):
        prepare(tmp_path / "out", copies)
    for text in ("<File>", "<File></File>"):
        (copies / "ASDiv.xml").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="^ASDiv: not the layout"):
            prepare(tmp_path / "out", copies)
    (copies / "SVAMP.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="^SVAMP: not the layout"):
        prepare(tmp_path / "out", copies)
    (copies / "SVAMP.json").unlink()
    with pytest.raises(ValueError, match="^SVAMP: no SVAMP.json below .*; copy https://"):
        prepare(tmp_path / "out", copies)
    assert not (tmp_path / "out").exists()


def test_without_network_the_error_names_both_ways_out(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise urllib.request.URLError("no route to host")
    monkeypatch.setattr(word_problems.urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match="cannot download https://.*/AddSub.json .*connect to the "
                       "network, or pass a "
                       "folder that holds copies of AddSub.json, .*ASDiv.xml$") as e:
        prepare(tmp_path / "out")
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not (SHARED / "word_problems_train.jsonl").is_file(),
                    reason="no shared word problems here")
def test_split_uids_and_solutions_agree_with_the_shared_files():
    count = 0
    for split in ("train", "val", "test"):
        for line in (SHARED / f"word_problems_{split}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            assert split_of(row["question"], row["level"]) == split
            assert row[
                "uid"] == f"{row['level'].lower()}-{word_problems._sha1(row['question'])[-8:]}"
            *lines, last = row.get("solution", boxed(row["answer"])).split("\n")
            assert last == boxed(row["answer"])
            for text in lines:
                a, op, b, c = re.fullmatch(r"(-?[\d.]+) ([-+*/]) (-?[\d.]+) = (-?[\d.]+)",
                                           text).groups()
                a, b, c = map(Fraction, (a, b, c))
                assert c == {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}[op]
                assert solution(text.split("=")[0],
                                word_problems.decimal(
                                    c)) == f"{text}\n{boxed(word_problems.decimal(c))}"
            count += 1
    assert count == 4348
