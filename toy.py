r"""CPU-sized toy worlds: problems, tokenizer, worked solutions with planted mistakes, and exact
error labels for any solution.

findx: guess and check. The evidence shows whether a guess is wrong, so reflection can pay off.
    x*7-21=35        Try 6: 6*7=42, 42-21=21 low. Wait, 6 is too low. Try 8: 8*7=56, 56-21=35 ok.
                     Answer: \boxed{8}
countdown: combine all given numbers, each once, to land in a range of ten. A miss is visible, and
several routes reach the answer.
    5,9,15=12..21    Try 15+5=20, 20-9=11 low. Wait, 11 is too low. Try 15-5=10, 10+9=19 ok.
                     Answer: \boxed{19}
    The answer is the only value in the range that the numbers can make (reason: section countdown
    below).

    python toy.py findx --levels=1 --out=data/findx

writes train.jsonl, validation.jsonl and test.jsonl (problems), coldstart.jsonl (worked examples of
both formats of §3.2, for coldstart.py) and model/ (a fresh small Qwen3 with the world's tokenizer).
The author of the examples makes mistakes and gives up after most failed checks, the habit that RL
has to unlearn; the analysis of a synthesis example audits every statement. `audit` and
`construction` are exact for any text, including the model's own: ground truth of localisation.

Deliberately missing: negative numbers, division, values above 99 (three digits are learnt far too
slowly).
"""
import argparse
import ast
import itertools
import operator
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch

import jsonl
from configurator import run_script
from data import Problem, save_problems
from hf import save_hf
from model import CausalLM, ModelConfig
from reflect import TEMPLATES

WORLDS = {"findx": 0, "countdown": 2}  # world -> number in the noise key of its problems
SPLITS = ("train", "validation", "test")
LEVELS = {"findx": ("1", "2", "3"), "countdown": ("3", "4")}
LARGEST_X, LARGEST_VALUE = 15, 99

# Share of each kind of example in the cold-start set. The first three are ordinary solutions.
# give_up / (give_up + reflective) is the share of mistakes without a reflection, well above one
# half on purpose.
SHARES = {"direct": 0.29, "reflective": 0.16, "give_up": 0.34, "micro": 0.15, "full": 0.03,
          "solve": 0.03}

# --------------------------------------------------------------------------------------------------
# Problems


def make_problems(world: str, split: str, n: int, seed: int = 0,
                  levels: tuple[str, ...] = ()) -> list[Problem]:
    """n distinct problems of one split, in an order drawn from `seed`; n = 0 takes all.

    The split is a hash of the question's text (80 % train, 10 % validation, 10 % test), so splits
    are disjoint whatever n and seed are. Levels, () for all: findx 1 (small values), 2 (large), 3
    (left side decreasing in x); countdown 3 and 4 (count of given numbers).
    """
    if world not in WORLDS or split not in SPLITS:
        raise ValueError(f"no toy problems for world = {world!r}, split = {split!r}; use "
                         f"{tuple(WORLDS)} and {SPLITS}")
    rng = np.random.default_rng((seed, WORLDS[world], SPLITS.index(split)))
    levels = levels or LEVELS[world]
    everything = _all_findx() if world == "findx" else sum(map(_all_countdown, levels), [])
    pool = [p for p in everything if p.level in levels and split_of(p.question) == split]
    if n > len(pool):
        raise ValueError(f"n = {n}: {world} has only {len(pool)} {split} problems, levels = "
                         f"{levels}; ask for fewer")
    return [replace(pool[i]) for i in rng.permutation(len(pool))[:n or None]]  # copies


def split_of(question: str) -> str:
    return {0: "test", 1: "validation"}.get(zlib.crc32(question.encode()) % 10, "train")


@lru_cache(maxsize=1)
def _all_findx() -> list[Problem]:
    """All 11,984 questions of three forms whose values stay within 0..99."""
    problems = []
    for form in ("x*{a}+{b}", "x*{a}-{b}", "{b}-x*{a}"):
        for a in range(2, 10):
            for b in range(1, 60):
                left = form.format(a=a, b=b)
                values = {x: [true for _, _, true in calculate(left, x)]
                          for x in range(1, LARGEST_X + 1) if in_range(calculate(left, x))}
                # > 2: at least two different wrong guesses stay in range
                for x, v in values.items() if len(values) > 2 else ():
                    level = "3" if form[0] == "{" else "1" if max(v) < 50 else "2"
                    question = f"{left}={v[-1]}"
                    problems.append(Problem(f"findx:{question}", question, str(x), level))
    return problems


# --------------------------------------------------------------------------------------------------
# Arithmetic: `calculate` is the source of every true value

OPERATIONS = {ast.Add: ("+", operator.add), ast.Sub: ("-", operator.sub),
              ast.Mult: ("*", operator.mul)}


@lru_cache(maxsize=1 << 16)
def _tree(left: str) -> ast.expr:
    return ast.parse(left, mode="eval").body


def calculate(question: str, x: int | None = None,
              slips: dict[int, int] | None = None) -> list[tuple[str, int, int]]:
    """Evaluate the left side, innermost operation first -> [(operation, value written, true value
    of that operation)].

    x*7-21 at x = 6 is [('6*7', 42, 42), ('42-21', 21, 21)]; slips = {0: 41} writes 41 for the first
    operation and carries it on: [('6*7', 41, 42), ('41-21', 20, 20)].
    """
    lines: list[tuple[str, int, int]] = []

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return x
        left, right = value(node.left), value(node.right)
        sign, function = OPERATIONS[type(node.op)]
        true = function(left, right)
        written = (slips or {}).get(len(lines), true)
        lines.append((f"{left}{sign}{right}", written, true))
        return written

    value(_tree(question.partition("=")[0]))
    return lines


def is_countdown(question: str) -> bool:
    return ".." in question


def target_of(question: str) -> int:
    return int(question.partition("=")[2])


@lru_cache(maxsize=1 << 16)
def answer_of(question: str) -> int:
    """The unique right answer, computed from the question alone."""
    if is_countdown(question):
        low, high = range_of(question)
        return next(value for value in reachable(numbers_of(question)) if low <= value <= high)
    return next(x for x in range(1, LARGEST_X + 1)
                if calculate(question, x)[-1][1] == target_of(question))


def in_range(lines: list[tuple[str, int, int]]) -> bool:
    return all(0 <= v <= LARGEST_VALUE for _, written, true in lines for v in (written, true))


# --------------------------------------------------------------------------------------------------
# Worked solutions


def solution(rng: np.random.Generator, question: str,
             kind: str) -> tuple[str, list[tuple[int, int]]]:
    """A worked solution, and the (start, end) character spans of its planted mistakes, which carry
    no loss.

    direct: right at once. reflective: a mistake, 'Wait', then the right solution. give_up: a
    mistake whose answer is boxed anyway. The evidence after a mistake is true and is trained on;
    the mistake itself is not, otherwise the model learns to make it.
    """
    answer = answer_of(question)
    if is_countdown(question):
        found = routes(numbers_of(question), answer)
        right, fail = attempt(question, found[rng.integers(len(found))]), _failed_route
    else:
        right, fail = trial(question, answer), _failed_guess
    pieces = [(right + boxed(answer), True)]
    if kind != "direct":
        failed, reached = fail(rng, question)
        doubt = (too_far(question, reached), True)
        given_up = [("Answer: \\boxed{", True), (str(reached), False), ("}", True)]
        pieces = [*failed, *given_up] if kind == "give_up" else [*failed, doubt, *pieces]
    text, no_loss = "", []
    for piece, learn in pieces:
        if not learn:
            no_loss.append((len(text), len(text) + len(piece)))
        text += piece
    return text, no_loss


def _failed_guess(rng: np.random.Generator, question: str) -> tuple[list[tuple[str, bool]], int]:
    """A wrong guess and its evidence -> [(text, whether it is trained on)], the guess."""
    guess = wrong_guess(rng, question)
    evidence = trial(question, guess).removeprefix(f"Try {guess}")
    return [("Try ", True), (str(guess), False), (evidence, True)], guess


def boxed(answer: int) -> str:
    return f"Answer: \\boxed{{{answer}}}"


def trial(question: str, guess: int, slips: dict[int, int] | None = None) -> str:
    """One guess with its evidence; the verdict compares the value reached with the target: 'low',
    'high' or 'ok'."""
    lines = calculate(question, guess, slips)
    evidence = ", ".join(f"{operation}={written}" for operation, written, _ in lines)
    target = target_of(question)
    return f"Try {guess}: {evidence}{verdict(lines[-1][1], target, target)}"


def verdict(value: int, low: int, high: int) -> str:
    return " low. " if value < low else " high. " if value > high else " ok. "


def too_far(question: str, value: int) -> str:
    """A true reflection on a guess, or on the value that a route reached."""
    low, high = range_of(question) if is_countdown(question) else [answer_of(question)] * 2
    side = "too low" if value < low else "too high" if value > high else "right"
    return f"Wait, {value} is {side}. "


def wrong_guess(rng: np.random.Generator, question: str, exclude: tuple[int, ...] = ()) -> int:
    """A wrong x, near the right one (weight 1 / distance), whose evidence stays within 0..99."""
    answer = answer_of(question)
    guesses = [g for g in range(1, LARGEST_X + 1)
               if g not in (answer, *exclude) and in_range(calculate(question, g))]
    weights = np.array([1 / abs(g - answer) for g in guesses])
    return int(rng.choice(guesses, p=weights / weights.sum()))


def random_slip(rng: np.random.Generator, question: str, x: int) -> tuple[int, int]:
    """(index of an operation, a wrong value near its true one), such that all values stay within
    0..99 and the final one is wrong. One always exists: the last operation can be off by one."""
    true = calculate(question, x)
    for i in rng.permutation(len(true)):
        for off in rng.permutation([-10, -2, -1, -1, 1, 1, 2, 10]):
            lines = calculate(question, x, {int(i): true[i][1] + int(off)})
            if in_range(lines) and lines[-1][1] != true[-1][1]:
                return int(i), true[i][1] + int(off)


def wrong_solution(rng: np.random.Generator, question: str) -> str:
    """A finished solution with a wrong answer, as a policy might write it: the y- of a planted
    synthesis example."""
    if is_countdown(question):
        return _wrong_countdown(rng, question)
    guess, draw = wrong_guess(rng, question), rng.random()
    if draw < 0.5:  # a true check that fails, its guess boxed anyway
        return trial(question, guess) + boxed(guess)
    if draw < 0.7:  # reflection, then a second wrong guess: check fails or is faked
        again = wrong_guess(rng, question, exclude=(guess,))
        second = trial(question, again, {1: target_of(question)} if draw < 0.6 else {})
        return trial(question, guess) + too_far(question, guess) + second + boxed(again)
    where, written = random_slip(rng, question, guess)
    if draw < 0.8:                                     # evidence faked to reach the target
        where, written = 1, target_of(question)
    return trial(question, guess, {where: written}) + boxed(guess)


# --------------------------------------------------------------------------------------------------
# Ground truth about a solution: its first false statement, and the text of a perfect reflection


@dataclass
class Judgement:
    """One statement of a solution, compared with the truth. `audit` stops after the first wrong
    one."""
    # character index after the statement and its delimiter: a preserved prefix may end here
    end: int
    ok: bool
    audit: str  # '3 vs 2 wrong. ': written, true, judgement; '' for malformed text
    reflection: str     # 'Wait, 3 is wrong. ': true reflection on this statement; '' likewise


STATEMENT = re.compile(r"([^=,\n]*)=(\d+)(, |\n| low\. | high\. | ok\. )")
CONCLUSION = re.compile(r"Answer: \\boxed\{(\d+)\}")
DELIMITER = re.compile(r", |\. |\n|\}")


def judgement(end: int, ok: bool, written: int, true: int | str, reflection: str) -> Judgement:
    return Judgement(end, ok, f"{written} vs {true} {'ok' if ok else 'wrong'}. ", reflection)


def malformed(text: str, position: int) -> list[Judgement]:
    """[Judgement] of a text without a statement at `position`; [] while its delimiter is missing.
    """
    delimiter = DELIMITER.search(text, position)
    return [Judgement(delimiter.end(), False, "", "")] if delimiter else []


def audit(question: str, text: str) -> list[Judgement]:
    """Judge a solution statement by statement up to its first error, or up to the end of an
    unfinished text.

    A true check that fails is an error too, of the guess: after the evidence its result is compared
    with the target. Malformed text is an error that ends at the next delimiter.
    """
    judged = []
    for one in (_judge_countdown if is_countdown(question) else _judge_findx)(question, text):
        judged.append(one)
        if not one.ok:
            break
    return judged


def _judge_findx(question: str, text: str) -> Iterator[Judgement]:
    """Judgements for `audit`, which stops iterating at the first error."""
    start = re.match(r"Try (\d+): ", text)
    if not start:
        yield from malformed(text, 0)
        return
    position, guess = start.end(), int(start[1])
    for operation, _, true in calculate(question, guess):
        statement = STATEMENT.match(text, position)
        if not statement:
            yield from malformed(text, position)
            return
        position, written = statement.end(), int(statement[2])
        # name the wrong number only: a check, its diagnosis and a second try fit into 54 tokens
        yield judgement(position, statement[1] == operation and written == true, written, true,
                        f"Wait, {written} is wrong. ")
    target, said = target_of(question), statement[3]
    yield judgement(position, said == verdict(written, target, target) == " ok. ", written, target,
                    too_far(question, guess))
    yield from _judge_conclusion(text, position, guess)


def _judge_conclusion(text: str, position: int, reached: int) -> Iterator[Judgement]:
    conclusion = CONCLUSION.match(text, position)
    if conclusion:
        final = int(conclusion[1])
        yield judgement(conclusion.end(), final == reached, final, reached,
                        f"Wait, {reached} is right. ")
    else:
        yield from malformed(text, position)


def first_error(question: str, text: str) -> int | None:
    """Character index where a preserved prefix must end, after the first false statement or failed
    check; None without an error."""
    return next((one.end for one in audit(question, text) if not one.ok), None)


def diagnosis_is_true(question: str, text: str) -> bool:
    """Whether the first reflection of a text makes a true statement about a real mistake in it.

    findx: the guess called too low (high) directly after its check is too low (high). Otherwise the
    first error must be directly followed by its reference reflection.
    """
    said = re.search(r"Try (\d+): [^.]* (?:low|high)\. Wait, \1 is too (low|high)\. ", text)
    if said and not is_countdown(question):
        guess, answer = int(said[1]), answer_of(question)
        return guess != answer and (guess < answer) == (said[2] == "low")
    error = next((one for one in audit(question, text) if not one.ok), None)
    return bool(error and error.reflection) and text.startswith(error.reflection, error.end)


def construction(question: str, wrong: str) -> tuple[str, str, str, str] | None:
    """(analysis, prefix, reflection, correction) of the perfect micro-reflective trajectory for any
    wrong solution.

    None if nothing is wrong, or if the error is malformed text, which has no audit text.
    """
    judged = audit(question, wrong)
    if not judged or judged[-1].ok or not judged[-1].audit:
        return None
    error, answer = judged[-1], answer_of(question)
    if " right" in error.reflection:
        correction = boxed(answer)
    elif is_countdown(question):  # the route that shares most of `wrong`'s start
        tries = [attempt(question, route) for route in routes(numbers_of(question), answer)]
        correction = max(tries, key=lambda text: len(commonprefix([text, wrong]))) + boxed(answer)
    else:
        correction = trial(question, answer) + boxed(answer)
    return "".join(j.audit for j in judged), wrong[:error.end], error.reflection, correction


# --------------------------------------------------------------------------------------------------
# countdown. The grader compares the box with one gold answer. A boxed expression would not work:
# many are right, and by value the bare target, copied from the question, is right too. So the
# target is a range of ten with exactly one value that the numbers can make, the answer: every right
# route ends in it and a slip misses it. Guessing a number of the range is right 1 time in 10,
# guessing from the answers of the most similar training problems up to 3 in 10: so also count right
# answers whose statements are all true. Cost: numbers that reach nearly every value give no
# problem, so more than four would need values above 99. A route is a list of steps
# [(operation, value written)], e.g. [('15+9', 24), ('24-5', 19)].

LARGEST_GIVEN, RANGE = 20, 10
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)(, | low\. | high\. | ok\. )")
# Share of each fault in the y- of a synthesis example, see _wrong_countdown.
FAULTS = {"give_up": 0.3, "again": 0.1, "slip": 0.2, "number": 0.15, "unused": 0.05, "verdict": 0.1,
          "box": 0.1}


@lru_cache(maxsize=2)
def _all_countdown(level: str) -> list[Problem]:
    """Problems of every `level` numbers from 2..20 and every two-digit value that they reach by
    different routes and that is the only reachable value in a range. One range per value: two
    overlapping ones could put the same problem into two splits. Level 4 takes seconds."""
    problems, rng, size = [], np.random.default_rng(0), int(level)
    for numbers in itertools.combinations(range(2, LARGEST_GIVEN + 1), size):
        found = [(-1, 0), *sorted(reachable(numbers).items()), (LARGEST_VALUE + 1, 0)]
        for (below, _), (value, n_routes), (above, _) in zip(found, found[1:], found[2:]):
            lows = range(max(below + 1, value - RANGE + 1), min(above - RANGE, value) + 1)
            # size - 1: with four numbers, two routes may be one with its first two steps swapped
            if value >= 10 and n_routes >= size - 1 and lows:
                low = lows[rng.integers(len(lows))]
                question = f"{','.join(map(str, numbers))}={low}..{low + RANGE - 1}"
                problems.append(Problem(f"countdown:{question}", question, str(value), level))
    return problems


def numbers_of(question: str) -> tuple[int, ...]:
    return tuple(map(int, question.partition("=")[0].split(",")))


def range_of(question: str) -> tuple[int, int]:
    """(lowest, highest) value of the target range."""
    low, high = question.partition("=")[2].split("..")
    return int(low), int(high)


@lru_cache(maxsize=1 << 16)
def moves(numbers: tuple[int, ...]) -> list[tuple[str, int, tuple[int, ...]]]:
    """All operations on two of the numbers, the larger one first: [(operation, value, remaining
    numbers)].

    (5, 9, 15) gives ('15+9', 24, (5, 24)), ('15-9', 6, (5, 6)), ('15*9', 135, (5, 135)) and six
    more.
    """
    found = []
    for a, b in dict.fromkeys(itertools.combinations(sorted(numbers, reverse=True), 2)):
        rest = list(numbers)
        rest.remove(a)
        rest.remove(b)
        for sign, function in OPERATIONS.values():
            value = function(a, b)
            found.append((f"{a}{sign}{b}", value, tuple(sorted((*rest, value)))))
    return found


@lru_cache(maxsize=1 << 16)
def reachable(numbers: tuple[int, ...]) -> dict[int, int]:
    """{value 0..99 that all the numbers can make: number of routes that stay within 0..99}.

    No negative steps: they only rewrite such a route with other signs. A route through a value
    above 99 is not counted, but its final value is still a key, so that the answer of a problem
    really is unique.
    """
    if len(numbers) == 1:
        return {numbers[0]: 1} if numbers[0] <= LARGEST_VALUE else {}
    found: dict[int, int] = {}
    for _, value, left in moves(numbers):
        for end, n in reachable(left).items():
            found[end] = found.get(end, 0) + (n if value <= LARGEST_VALUE else 0)
    return found


def routes(numbers: tuple[int, ...], target: int) -> list[list[tuple[str, int]]]:
    """All routes from the numbers to the target value, within 0..99."""
    if len(numbers) == 1:
        return [[]]
    return [[(operation, value), *rest] for operation, value, left in moves(numbers)
            if value <= LARGEST_VALUE and reachable(left).get(target, 0)
            for rest in routes(left, target)]


def attempt(question: str, route: list[tuple[str, int]], said: str = "") -> str:
    """One try with its evidence and its verdict: `said` if given, else the true one."""
    return "Try " + ", ".join(f"{operation}={value}" for operation, value in route) + (
        said or verdict(route[-1][1], *range_of(question)))


def wrong_route(rng: np.random.Generator, question: str, fault: str = "") -> list[tuple[str, int]]:
    """The nearest miss of eight random routes. `fault` planted in each route: 'slip', a wrong value
    that is carried on; 'number', an operand that is not available; 'unused', a number left over at
    the end; '' or any other, none."""
    (low, high), answer, tries = range_of(question), answer_of(question), []
    while len(tries) < 8:
        left, route = numbers_of(question), []
        steps = len(left) - (2 if fault == "unused" else 1)
        faulty = rng.integers(steps) if fault in ("slip", "number") else None
        while len(route) < steps:
            options = [move for move in moves(left) if move[1] <= LARGEST_VALUE]
            operation, value, after = options[rng.integers(len(options))]
            if len(route) == faulty:
                rest = list(after)
                rest.remove(value)
                if fault == "slip":
                    near = [value + off for off in (-10, -2, -1, 1, 2, 10)
                            if 0 <= value + off <= LARGEST_VALUE]
                    value = near[rng.integers(len(near))]
                else:
                    first = int(re.match(r"\d+", operation)[0])
                    there = list(left)
                    there.remove(first)
                    others = [calculate(f"{first}{sign}{n}") for sign in "+-*"
                              for n in range(2, LARGEST_GIVEN + 1) if n not in there]
                    possible = [i for i, line in enumerate(others) if in_range(line)]
                    (operation, value, _), = others[rng.choice(possible)]
                after = tuple(sorted((*rest, value)))
            route.append((operation, value))
            left = after
        if value != answer:
            tries.append(route)
    return min(tries, key=lambda route: max(low - route[-1][1], route[-1][1] - high, 0))


def _failed_route(rng: np.random.Generator, question: str) -> tuple[list[tuple[str, bool]], int]:
    """_failed_guess for countdown: the operations are the mistake, their values are true."""
    route = wrong_route(rng, question)
    pieces = [("Try ", True)]
    for i, (operation, value) in enumerate(route):
        end = ", " if i + 1 < len(route) else verdict(value, *range_of(question))
        pieces += [(operation, False), (f"={value}{end}", True)]
    return pieces, value


def _wrong_countdown(rng: np.random.Generator, question: str) -> str:
    """give_up: a true miss, its value boxed anyway. again: a miss, a reflection, a second miss.
    slip, number, unused: see wrong_route. verdict: a miss with verdict ok. box: a right route, but
    another number of the range is boxed."""
    fault = str(rng.choice(list(FAULTS), p=list(FAULTS.values())))
    answer, before = answer_of(question), ""
    if fault == "box":
        low, high = range_of(question)
        other = int(rng.choice([n for n in range(low, high + 1) if n != answer]))
        return attempt(question, routes(numbers_of(question), answer)[0]) + boxed(other)
    if fault == "again":
        first = wrong_route(rng, question)
        before = attempt(question, first) + too_far(question, first[-1][1])
    route = wrong_route(rng, question, fault)
    said = " ok. " if fault == "verdict" else ""
    return before + attempt(question, route, said) + boxed(route[-1][1])


def _judge_countdown(question: str, text: str) -> Iterator[Judgement]:
    """Judgements for `audit`, which stops iterating at the first error. An unavailable operand, or
    a result with numbers left over, is judged against the list of available numbers."""
    if not text.startswith("Try "):
        yield from malformed(text, 0)
        return
    position, left, said = len("Try "), list(numbers_of(question)), ", "

    def not_there(written: int) -> Judgement:
        there = ",".join(map(str, left))
        return judgement(position, False, written, there, f"Wait, {there}, not {written}. ")

    while said == ", " and len(left) > 1:
        step = STEP.match(text, position)
        if not step:
            yield from malformed(text, position)
            return
        first, second, written = int(step[1]), int(step[3]), int(step[4])
        position, said = step.end(), step[5]
        for number in (first, second):
            if number not in left:
                yield not_there(number)
            left.remove(number)
        operation = f"{first}{step[2]}{second}"
        true = calculate(operation)[0][2]
        yield judgement(position, written == true, written, true,
                        f"Wait, {operation} is {true}, not {written}. ")
        left.append(written)
    if said == ", ":  # one number left, but the text announces another step
        yield from malformed(text, position)
        return
    if len(left) > 1:
        yield not_there(written)
    low, high = range_of(question)
    yield judgement(position, said == verdict(written, low, high) == " ok. ", written,
                    f"{low}..{high}", too_far(question, written))
    yield from _judge_conclusion(text, position, written)


# --------------------------------------------------------------------------------------------------
# Cold-start examples (§3.2)


def example_row(prompt: str, completion: str, no_loss: list[tuple[int, int]]) -> dict:
    """A line of coldstart.py's examples. Loss falls on the completion and its stop token, except on
    the (start, end) character spans of planted mistakes."""
    row = {"prompt": prompt, "completion": completion}
    return row | ({"no_loss": no_loss} if no_loss else {})


def ift_example(rng: np.random.Generator, question: str, mode: str = "micro") -> dict:
    """IFT format: synthesis prompt -> analysis + reconstruction; in mode 'full' the reconstruction
    is a complete solution without a preserved prefix. The prompt templates are reflect.py's, the
    same as in RL."""
    wrong = wrong_solution(rng, question)
    right = solution(rng, question, "direct" if rng.random() < 0.6 else "reflective")[0]
    analysis, prefix, reflection, correction = construction(question, wrong)
    body = f"{prefix}<reflection>{reflection}</reflection>{correction}" if mode == "micro" else (
        solution(rng, question, "direct")[0])
    prompt = TEMPLATES["short"][mode].format(question=question, wrong=wrong, right=right)
    return example_row(
        prompt, f"<analysis>{analysis}</analysis><reconstruction>{body}</reconstruction>", [])


def teacher_example(rng: np.random.Generator, question: str) -> dict:
    """Format of the self-distillation teacher: question with a right solution -> a solution, never
    of kind give_up."""
    right, _ = solution(rng, question, "direct" if rng.random() < 0.6 else "reflective")
    completion = solution(rng, question, "direct" if rng.random() < 0.6 else "reflective")
    prompt = TEMPLATES["short"]["teacher"].format(question=question, right=right)
    return example_row(prompt, *completion)


def example(rng: np.random.Generator, question: str, shares: dict[str, float]) -> dict:
    """One example of a kind drawn from `shares`; direct, reflective and give_up are SFT format:
    question -> solution."""
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    if kind in ("micro", "full"):
        return ift_example(rng, question, kind)
    if kind == "solve":
        return teacher_example(rng, question)
    return example_row(question, *solution(rng, question, kind))


# --------------------------------------------------------------------------------------------------
# Tokenizer

WORDS = ("Try ", ": ", ", ", " low. ", " high. ", " ok. ", " wrong. ", "Wait, ", " is too low. ",
         " is too high. ", " is right. ", " is wrong. ", " is ", ", not ", ". ", " vs ", "Answer: ",
         "\\boxed{")
TAGS = ("<analysis>", "</analysis>", "<reconstruction>", "</reconstruction>", "<reflection>",
        "</reflection>", "<wrong>", "</wrong>", "<right>", "</right>", "<micro>", "<full>",
        "<solve>")
CHARACTERS = "0123456789+-*=()x?}.,: \n"
EOS, PAD, UNKNOWN = "<|im_end|>", "<|pad|>", "<|unknown|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|assistant|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    # enable_thinking is accepted and changes nothing
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def make_tokenizer():
    """A transformers PreTrainedTokenizerFast of single characters, the world's words and tags, 60
    ids in all.

    Longest match first; any other character becomes the unknown id, which data.render_prompt
    refuses.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = (EOS, PAD, USER, ASSISTANT, UNKNOWN)
    pieces = sorted(WORDS + TAGS, key=len, reverse=True)
    vocabulary = {token: i for i, token in enumerate((*special, *CHARACTERS, *WORDS, *TAGS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    pattern = Regex("|".join(map(re.escape, pieces)) + r"|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"])


# --------------------------------------------------------------------------------------------------
# Files

EXAMPLES = 10  # noise stream of the worked examples, distinct from rollout.py's
N_EXAMPLES = {"findx": 48_000, "countdown": 96_000}  # seen once each, 16 a step


def worked_examples(questions: list[str], n: int, seed: int, kinds=()) -> list[dict]:
    """n examples for coldstart.py, their kinds drawn by SHARES; kinds: the allowed ones, () = all.
    """
    shares = {kind: share for kind, share in SHARES.items() if not kinds or kind in kinds}
    shares = {kind: share / sum(shares.values()) for kind, share in shares.items()}
    found: list[dict] = []
    for block in range(-(-n // 16)):
        rng = np.random.default_rng((seed, EXAMPLES, block))
        drawn = [questions[i] for i in rng.integers(len(questions), size=16)]
        found += [example(rng, question, shares) for question in drawn]
    return found[:n]


def make_model(folder: Path, seed: int) -> None:
    """Save a random Qwen3 of 177 thousand parameters and the tokenizer as a Hugging Face folder."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        rope_theta=10000.0, eos_token_id=tokenizer.eos_token_id))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)  # std 0.08: the usual 0.02 is meant for widths of 1000
    save_hf(model, tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="write a toy world's files", allow_abbrev=False)
    parser.add_argument("world", help=" | ".join(WORLDS))
    parser.add_argument("--out", default="", help="folder, default data/WORLD")
    parser.add_argument("--levels", default="", help="difficulty levels, separated by commas; "
                        "default all: findx 1,2,3, countdown 3,4")
    parser.add_argument("--kinds", default="", help="kinds of worked examples, separated by "
                        "commas; default all: " + ", ".join(SHARES))
    parser.add_argument("--examples", type=int, default=0, help="worked examples, default "
                        + ", ".join(f"{n:,} ({world})" for world, n in N_EXAMPLES.items()))
    parser.add_argument("--seed", type=int, default=0, help="of the examples and the model")
    args = parser.parse_args()
    if args.world not in WORLDS:
        raise ValueError(f"world = {args.world!r} must be one of {', '.join(WORLDS)}")
    levels, kinds = (tuple(filter(None, text.split(","))) for text in (args.levels, args.kinds))
    for name, given, known in (("levels", levels, LEVELS[args.world]),
                               ("kinds", kinds, tuple(SHARES))):
        if set(given) - set(known):
            raise ValueError(f"--{name}={','.join(given)}: use some of {', '.join(known)}")
    out = Path(args.out or f"data/{args.world}")
    for split in SPLITS:
        problems = make_problems(args.world, split, 0, levels=levels)
        save_problems(problems, out / f"{split}.jsonl")
        print(f"{out / split}.jsonl: {len(problems):,} problems")
        if split == "train":
            questions = [p.question for p in problems]
    n = args.examples or N_EXAMPLES[args.world]
    examples = worked_examples(questions, n, args.seed, kinds)
    jsonl.write(out / "coldstart.jsonl", examples)
    print(f"{out / 'coldstart.jsonl'}: {n:,} worked examples")
    make_model(out / "model", args.seed)
    print(f"{out / 'model'}: a fresh model")


if __name__ == "__main__":
    run_script(main)
