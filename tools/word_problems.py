"""
Arithmetic word problems of five public sets, as three problem files: train, val and test.

    prepare(Path("data"))                     # downloads the five files
    prepare(Path("data"), Path("~/sources"))  # offline: any folder that holds copies of them

Easy enough for a tiny model to learn. A row has a worked "solution" if the source's equation gives
the answer. Uid and split are functions of question and source alone, so they do not depend on
filtering. Deliberately missing: solving for an unknown, units, rounding.
"""
import ast
import hashlib
import json
import operator
import re
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from data import Problem, save_problems

SPLITS = "train", "val", "test"
DECIMALS = 4  # numbers with more decimals are truncated fractions: no answer, no solution line
SIGNS = {ast.Add: ("+", operator.add), ast.Sub: ("-", operator.sub),
         ast.Mult: ("*", operator.mul), ast.Div: ("/", operator.truediv)}


class Row(NamedTuple):
    question: str
    answer: str
    expression: str  # formula that should give the answer; often not plain arithmetic


# ------------------------------------------------------------------------------------------------
# Readers, one per layout: text of a file -> rows with a number for an answer

def read_mawps(text: str) -> list[Row]:
    """AddSub, MultiArith, SingleEq: lEquations, lSolutions, sQuestion with spaced punctuation.

    Only "X = 3 + 4" becomes a solution: "3 + x = 7" and, likewise, SingleEq's "3 + 4 = x" do not.
    """
    return _with_answers((row["sQuestion"], row["lSolutions"][0],
                          re.sub(r"^\s*[xX]\s*=", "", row["lEquations"][0]))
                         for row in json.loads(text))


def read_svamp(text: str) -> list[Row]:
    """SVAMP: Body, often without its last full stop, Question, Answer, Equation."""
    return _with_answers((re.sub(r"(\w)\s*$", r"\1.", row["Body"]) + " " + row["Question"],
                          row["Answer"], row["Equation"]) for row in json.loads(text))


def read_asdiv(text: str) -> list[Row]:
    """ASDiv's XML: Body, Question, Answer such as "9 (apples)", Formula such as "7+2=9".

    Of several answers with units the first is used, which the question asks for first. Of a formula
    only the left side is read; remainders ("31/12=2 r7") and steps joined by ";" give no solution.
    """
    problems = ([p.find(tag).text or "" for tag in ("Body", "Question", "Answer", "Formula")]
                for p in ElementTree.fromstring(text).iter("Problem"))
    return _with_answers((f"{body} {question}", answer, formula.split("=")[0])
                         for body, question, answer, formula in problems)


def _with_answers(triples) -> list[Row]:
    """Rows whose answer is a number, alone or before a unit in brackets; not a name, 9:30, 3/7."""
    rows = []
    for question, answer, expression in triples:
        number = re.fullmatch(r"(-?[\d,]*\.?\d+)\s*(\(.*)?", str(answer).strip(), re.DOTALL)
        written = number and decimal(Fraction(number[1].replace(",", "")))
        if written:
            question = re.sub(r" ([.,?!;:])(?!\d)", r"\1", " ".join(question.split()))
            rows.append(Row(question, written, expression.strip()))
    if not rows:
        raise ValueError("no problem with a number for an answer")
    return rows


@dataclass
class Source:
    repo: str  # on GitHub
    commit: str
    path: str
    licence: str  # as the repository states it
    read: Callable[[str], list[Row]]

    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repo}/{self.commit}/{self.path}"


COPIES = ("kojima-takeshi188/zero_shot_cot", "5ef330fcdeec0cd26aee27943504f91f8ec1c33c")
SOURCES = {  # of duplicate questions the first source's copy is kept
    "AddSub": Source(*COPIES, "dataset/AddSub/AddSub.json", "none", read_mawps),
    "MultiArith": Source(*COPIES, "dataset/MultiArith/MultiArith.json", "none", read_mawps),
    "SingleEq": Source(*COPIES, "dataset/SingleEq/questions.json", "none", read_mawps),
    "SVAMP": Source(*COPIES, "dataset/SVAMP/SVAMP.json", "none; MIT at its origin", read_svamp),
    "ASDiv": Source("chaochun/nlu-asdiv-dataset", "883f90a9a65bf00304ba8f37423910fe743abc47",
                    "dataset/ASDiv.xml", "CC BY-NC 4.0", read_asdiv),
}


# ------------------------------------------------------------------------------------------------
# Solutions, split, duplicates, files

def decimal(x: Fraction) -> str:
    """x as a plain decimal, exactly; "" if that takes more than DECIMALS places."""
    scaled = x * 10 ** DECIMALS
    whole, part = divmod(abs(scaled.numerator), 10 ** DECIMALS)
    text = f"{'-' * (x < 0)}{whole}.{part:0{DECIMALS}d}".rstrip("0").rstrip(".")
    return text if scaled.denominator == 1 else ""


def solution(equation: str, answer: str) -> str:  # equation: one side only, "(3 + 4) * 2"
    """A line "a op b = c" per operation, then the boxed answer; "" unless the last c equals it."""
    lines = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(repr(node.value))  # repr keeps the digits as written: 0.1 is 1/10
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if not isinstance(node, ast.BinOp) or type(node.op) not in SIGNS:
            raise ValueError("not arithmetic")
        sign, operation = SIGNS[type(node.op)]
        numbers = [value(node.left), value(node.right)]
        numbers.append(operation(*numbers))
        a, b, c = map(decimal, numbers)
        if not (a and b and c):
            raise ValueError("a line would be rounded")
        lines.append(f"{a} {sign} {b} = {c}")
        return numbers[2]

    try:
        holds = value(ast.parse(equation.strip(), mode="eval").body) == Fraction(answer)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return ""
    return "\n".join([*lines, f"The answer is \\boxed{{{answer}}}."]) if lines and holds else ""


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8")).hexdigest()


def split_of(question: str, source: str) -> str:
    """Split by the question's sha1: odd SVAMP hashes to test; of others 1/10 each to test, val."""
    number = int(_sha1(question), 16)
    odd_svamp = source == "SVAMP" and number % 2  # 1 is odd: no SVAMP problem is in val
    return "test" if odd_svamp else {0: "test", 1: "val"}.get(number % 10, "train")


def without_duplicates(problems: list[Problem]) -> list[Problem]:
    """Keep the first of the problems whose questions have the same letters and digits."""
    first: dict[str, Problem] = {}
    for p in problems:
        first.setdefault("".join(c for c in p.question.lower() if c.isalnum()), p)
    return list(first.values())


def prepare(out: Path, local: Path | None = None) -> dict[str, tuple[int, int]]:
    """Write word_problems_{train,val,test}.jsonl into `out`: split -> (problems, with solution)."""
    texts = {name: _text(name, local) for name in SOURCES}
    problems, worked = [], {}
    for name, source in SOURCES.items():
        try:
            rows = source.read(texts[name])
        except (LookupError, TypeError, AttributeError, ValueError, SyntaxError) as e:
            raise ValueError(f"{name}: not the layout of {source.url()} ({e!r})") from None
        for question, answer, expression in rows:
            uid = f"{name.lower()}-{_sha1(question)[-8:]}"
            problems.append(Problem(uid, question, answer, name))
            worked.setdefault(uid, solution(expression, answer))
    extra = {uid: {"solution": lines} for uid, lines in worked.items() if lines}
    counts, problems = {}, without_duplicates(problems)
    for split in SPLITS:
        part = [p for p in problems if split_of(p.question, p.level) == split]
        save_problems(part, Path(out).expanduser() / f"word_problems_{split}.jsonl", extra)
        counts[split] = (len(part), sum(p.uid in extra for p in part))
    return counts


def _text(name: str, local: Path | None) -> str:
    """Text of a source's file: searched by name below `local` if given, otherwise downloaded."""
    source, path = SOURCES[name], Path(SOURCES[name].path)
    if local is not None:  # questions.json is a common name: prefer the copy in a folder SingleEq
        copies = sorted(Path(local).expanduser().rglob(path.name),
                        key=lambda copy: (copy.parent.name != path.parent.name, copy))
        if not copies:
            raise ValueError(f"{name}: no {path.name} below {local}; copy {source.url()} there")
        return copies[0].read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(source.url(), timeout=60) as answer:
            return answer.read().decode("utf-8")
    except OSError as e:  # URLError and a timeout alike
        files = ", ".join(Path(s.path).name for s in SOURCES.values())
        raise ValueError(f"{name}: cannot download {source.url()} ({e}); connect to the network, "
                         f"or pass a folder that holds copies of {files}") from None
