"""
Arithmetic word problems of five public sets, as three problem files: train, val and test.

    from word_problems import prepare
    prepare(Path("data"))                      # downloads the five files
    prepare(Path("data"), Path("~/sources"))   # offline: any folder that holds copies of them

Small enough for a tiny model to learn. Where a source writes an equation that gives its answer, a
row carries a worked "solution". Uid and split are functions of question and source alone, so they
survive another filter. Deliberately missing: solving for an unknown, units, rounding.
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
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from data import Problem, save_problems

SPLITS = ("train", "val", "test")
DECIMALS = 4  # a number that needs more is a third cut short: no answer, no line of a solution
SIGNS = {ast.Add: ("+", operator.add), ast.Sub: ("-", operator.sub),
         ast.Mult: ("*", operator.mul), ast.Div: ("/", operator.truediv)}


class Row(NamedTuple):
    question: str
    answer: str
    expression: str  # what the source says gives the answer; often not arithmetic at all


# ------------------------------------------------------------------------------------------------
# Readers, one per layout: text of a file -> rows with a number for an answer

def read_mawps(text: str) -> list[Row]:
    """AddSub, MultiArith, SingleEq: lEquations, lSolutions and sQuestion, with blanks around marks.

    Only "X = 3 + 4" becomes a solution: "3 + x = 7" would have to be solved, and in SingleEq, where
    x stands anywhere, "3 + 4 = x" is no exception.
    """
    return _with_answers((row["sQuestion"], row["lSolutions"][0],
                          re.sub(r"^\s*[xX]\s*=", "", row["lEquations"][0]))
                         for row in json.loads(text))


def read_svamp(text: str) -> list[Row]:
    """SVAMP: Body, Question, Answer, Equation; the body often ends without a full stop."""
    def join(body: str, question: str) -> str:
        return f"{body}{'.' if body[-1:].isalnum() else ''} {question}"
    return _with_answers((join(row["Body"].strip(), row["Question"]), row["Answer"],
                          row["Equation"]) for row in json.loads(text))


def read_asdiv(text: str) -> list[Row]:
    """ASDiv's XML: Body, Question, Answer such as "9 (apples)", Formula such as "7+2=9".

    Many answers are no number (names, times, fractions, several numbers without a unit): dropped.
    Of several with units the first is asked for first. Formula "31/12=2 r7" has 31/12 on its left,
    which is not the answer, so remainders and steps joined by ";" end without a solution.
    """
    return _with_answers((f"{p.findtext('Body')} {p.findtext('Question')}", p.findtext("Answer"),
                          p.findtext("Formula").split("=")[0])
                         for p in ElementTree.fromstring(text).iter("Problem"))


def _with_answers(triples) -> list[Row]:
    rows = []
    for question, answer, expression in triples:
        number = re.fullmatch(r"(-?[\d,]*\.?\d+)\s*(\(.*)?", str(answer).strip(), re.DOTALL)
        written = number and decimal(Fraction(number[1].replace(",", "")))
        if written:
            question = re.sub(r" ([.,?!;:])(?!\d)", r"\1", " ".join(question.split()))
            rows.append(Row(question, written, expression.strip()))
    return rows


@dataclass
class Source:
    repo: str
    commit: str
    path: str
    licence: str  # as the repository states it
    read: Callable[[str], list[Row]]

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/{self.repo}/{self.commit}/{self.path}"


KOJIMA = ("kojima-takeshi188/zero_shot_cot", "5ef330fcdeec0cd26aee27943504f91f8ec1c33c")
SOURCES = {  # in the order in which they are searched for duplicates: the first copy stays
    "AddSub": Source(*KOJIMA, "dataset/AddSub/AddSub.json", "none stated", read_mawps),
    "MultiArith": Source(*KOJIMA, "dataset/MultiArith/MultiArith.json", "none stated", read_mawps),
    "SingleEq": Source(*KOJIMA, "dataset/SingleEq/questions.json", "none stated", read_mawps),
    "SVAMP": Source(*KOJIMA, "dataset/SVAMP/SVAMP.json",
                    "none stated; arkilpatel/SVAMP, where it comes from: MIT", read_svamp),
    "ASDiv": Source("chaochun/nlu-asdiv-dataset", "883f90a9a65bf00304ba8f37423910fe743abc47",
                    "dataset/ASDiv.xml", "CC BY-NC 4.0", read_asdiv),
}


# ------------------------------------------------------------------------------------------------
# Solutions, split, duplicates

def decimal(x: Fraction) -> str:
    """x as a plain decimal, exactly; "" if that takes more than DECIMALS places."""
    scaled = x * 10 ** DECIMALS
    if scaled.denominator != 1:
        return ""
    return f"{Decimal(scaled.numerator).scaleb(-DECIMALS):f}".rstrip("0").rstrip(".")


def solution(equation: str, answer: str) -> str:
    """A line "a op b = c" per operation, innermost first, then the boxed answer.

    "" unless the equation (its one side, "(3+4)*2") is arithmetic and gives exactly the answer.
    """
    lines = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(repr(node.value))  # repr gives back the digits written: 0.1 is a tenth
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if not isinstance(node, ast.BinOp) or type(node.op) not in SIGNS:
            raise ValueError("not arithmetic")
        sign, operation = SIGNS[type(node.op)]
        left, right = value(node.left), value(node.right)
        result = operation(left, right)
        a, b, c = map(decimal, (left, right, result))
        if not (a and b and c):
            raise ValueError("the line would have to be rounded")
        lines.append(f"{a} {sign} {b} = {c}")
        return result

    try:
        right = value(ast.parse(equation.strip(), mode="eval").body) == Fraction(answer)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return ""
    return "\n".join([*lines, f"The answer is \\boxed{{{answer}}}."]) if lines and right else ""


def split_of(question: str, source: str) -> str:
    """By the question's sha1: odd ones of SVAMP to test; of all others a tenth to test, a tenth to val.

    (1 is odd: SVAMP has no val.)
    """
    number = int(_sha1(question), 16)
    if source == "SVAMP" and number % 2:
        return "test"
    return {0: "test", 1: "val"}.get(number % 10, "train")


def without_duplicates(problems: list[Problem]) -> list[Problem]:
    """The first of all problems whose questions have the same letters and digits."""
    first: dict[str, Problem] = {}
    for p in problems:
        first.setdefault("".join(c for c in p.question.lower() if c.isalnum()), p)
    return list(first.values())


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8")).hexdigest()


# ------------------------------------------------------------------------------------------------
# Preparing

def prepare(out: Path, local: Path | None = None) -> dict[str, tuple[int, int]]:
    """Write word_problems_{train,val,test}.jsonl into `out`: split -> (problems, with solution)."""
    problems, worked = [], {}
    for name, source in SOURCES.items():
        text = _text(name, local)
        try:
            rows = source.read(text)
        except (LookupError, TypeError, AttributeError, SyntaxError, json.JSONDecodeError) as e:
            raise ValueError(f"{name}: {Path(source.path).name} is not laid out as {source.url} "
                             f"({type(e).__name__}: {e})") from None
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
    source = SOURCES[name]
    path = Path(source.path)
    if local is not None:
        # questions.json may be the name of other files too: one in a folder SingleEq goes first
        copies = sorted(Path(local).expanduser().rglob(path.name),
                        key=lambda copy: (copy.parent.name != path.parent.name, copy))
        if not copies:
            raise ValueError(f"{name}: no {path.name} below {local}; copy {source.url} there")
        return copies[0].read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(source.url, timeout=60) as answer:
            return answer.read().decode("utf-8")
    except OSError as e:  # URLError and a timeout alike
        files = ", ".join(Path(s.path).name for s in SOURCES.values())
        raise ValueError(f"{name}: cannot download {source.url} ({e}); connect to the network, "
                         f"or pass a folder that holds copies of {files}") from None
