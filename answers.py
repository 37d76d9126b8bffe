r"""Answer extraction and answer equivalence, as pure functions of text.

The answer is the last balanced \boxed{...} outside a thinking block. Two answers are equivalent if

1. their texts are equal once spaces, fractions, separators, zeros and units are normalised; or
2. both are rational numbers of exactly the same value: 0.333 is not 1/3, and math-verify is not
   asked; or
3. math-verify (sympy) finds them equal part by part: items of a list or set in any order, items of
   a tuple in the given order.

Arithmetic left undone is wrong where the gold answer is a number: 38+44 for 82, 12/3 for 4. Twelve
steps of RL on word problems are enough to learn it otherwise (docs/results.md).

math-verify may never terminate (reward.py runs it in a process with a time limit) and alone is too
lenient for a reward: it reads 3(4) as 7 and 72.6 cm as 72.6 m. The rules prefer false negatives: a
rejected right answer costs one sample, an accepted wrong answer is reinforced.
Deliberately missing: answers in prose or spread over several boxes, approximations, partial credit.
"""
import re
from fractions import Fraction
from functools import lru_cache

MAX_CHARS = 2000  # per answer; the longest gold answer of known data sets has 92


# --- the answer in the text ---

_BOX_TOKENS = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...} or \fbox{...}, the outer one of a nested pair; None
    if there is none.

    A box inside a thinking block is a draft: only what follows </think> counts, and nothing after
    an unclosed <think>. Escaped braces do not count as braces. One pass, linear in the text.
    """
    if "think>" in text:
        text = text.rpartition("</think>")[2].partition("<think>")[0]
    starts = [i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0]
    if not starts:
        return None
    # stack of open braces: start of the content for a box, -1 for any other brace
    opened, last = [], None
    for token in _BOX_TOKENS.finditer(text, min(starts)):
        if token[0] == "}":
            begin = opened.pop() if opened else -1
            last = (begin, token.start()) if begin >= 0 else last
        elif token[0] == "{":
            opened.append(-1)
        elif token[0] != "\\{" and token[0][-1] == "{":
            opened.append(token.end())
    return text[last[0]:last[1]].strip() if last else None


# --- 1. canonical text --- Invariants: no rewrite changes the value, and if both sides name a unit,
# the units must be equal.

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "∪": r"\cup ", "∈": r"\in ",
    "±": r"\pm ", "²": "^2", "³": "^3", "∅": r"\emptyset ", "，": ",", "：": ":",
    "（": "(", "）": ")", "％": "%", "€": r"\$",
    "£": r"\$", "~": " "})
_COMMANDS = {
    **dict.fromkeys("left right displaystyle textstyle limits big Big bigl bigr Bigl Bigr bigg "
                    "Bigg bf it rm boldsymbol bm underline large Large LARGE huge small".split(),
                    ""),
    **dict.fromkeys(["emptyset", "varnothing"], r"\{\}"),
    # spaces, and the math delimiters \( \) \[ \]
    **dict.fromkeys(["quad", "qquad", *"()[],;:> "], " "),
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], r"\frac"),
    "degree": r"^\circ", "%": "%", "$": r"\dollar ",
    **dict.fromkeys("textnormal textrm textbf textit mathrm mathbf mathit mbox".split(), r"\text"),
    "geq": r"\ge", "geqslant": r"\ge", "leq": r"\le", "leqslant": r"\le", "ne": r"\neq",
    "gt": ">", "lt": "<"}
_COMMAND = re.compile(r"\\([a-zA-Z]+|[^a-zA-Z])")


def _rewrite(s: str, rules) -> str:
    """rules: (substring that must occur, a cheap test before the regex; pattern; replacement)."""
    for key, pattern, by in rules:
        s = re.sub(pattern, by, s) if key in s else s
    return s


_NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
_BASES = {word: str(i) for i, word in enumerate(_NUMBERS, 2)} | {"sixteen": "16"}


def _repeating(m: re.Match) -> str:
    """0.1\\overline{6} = (16 - 1) / 90 = 1/6: digits through the first period minus digits before
    it, over a 9 per period digit followed by a 0 per digit before it."""
    whole, before, period = m[1] or "0", m[2], m[3]
    over = int("9" * len(period) + "0" * len(before))
    return f"\\frac{{{int(whole + before + period) - int(whole + before)}}}{{{over}}}"


_TYPESETTING = (  # formatting that does not change the answer
    ("color", r"\\(?:text)?color *\{\w+\}", ""),
    ("*", r"^(\*{1,3})([^*]+)\1$", r"\2"),  # Markdown's **42**
    ("\\\\", r"(?:\\\\)+\s*$", ""))  # a line break at the end
_SPELLINGS = (
    ("\\", r"(\d*)\.(\d{0,9})\\(?:overline|bar|dot) *\{(\d{1,9})\}", _repeating),
    # 204_{\text{five}}
    ("_", rf"_ *\{{? *(?:\\text *\{{)? *({'|'.join(_BASES)}) *\}}?\}}?",
     lambda m: f"_{{{_BASES[m[1]]}}}"),
    ("\\log", r"\\log *_ *(?:\{(\w+)\}|(\w)) *(?:\{([^{}]*)\}|(\d+)$)",
     lambda m: f"\\log_{{{m[1] or m[2]}}}({m[3] or m[4]})"),
    ("m", r"(?<![a-zA-Z])([apAP])\. ?[mM](?![a-zA-Z])\.?", r"\1m"),  # p.m.
    ("\\frac", r"\\frac *(\d|\\pi) *(\d)", r"\\frac{\1}{\2}"),  # \frac12
    ("\\frac", r"\\frac *\{([^{}]*)\} *(\w)", r"\\frac{\1}{\2}"),  # \frac{40}7
    ("\\frac", r"\\frac *(\w) *\{", r"\\frac{\1}{"),  # \frac3{4}
    ("\\sqrt", r"\\sqrt *(\d)", r"\\sqrt{\1}"),
    ("\\begin", r"[\[(] *\\begin\{(?:array|matrix)\}(?: *\{[^{}]*\})?|\\begin\{bmatrix\}",
     r"\\begin{pmatrix}"),
    ("\\end", r"\\end\{(?:array|matrix)\} *[\])]|\\end\{bmatrix\}", r"\\end{pmatrix}"),
    *((word, rf"(?:, *)?(?:\\text *\{{ *{word} *\}}|(?<![a-zA-Z\\]){word}(?![a-zA-Z]))", ", ")
      for word in ("and", "or")),
    (" !=", " !=", r"\\neq "),  # but 5!=120 is a factorial
    ("<=", "<=", r"\\le "), (">=", ">=", r"\\ge "), ("**", r"\*\*", "^"))
_SPACING = (
    ("\\text", r"\\text *\{([^{}]*)\}", r"\1"),
    (" ", r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])", lambda m: m[0].replace(" ", "")),  # 5 000 000
    ("{", r"([_^]) *\{(\w)\}", r"\1\2"),
    # not in \pi r, nor in 2 3
    (" ", r"(\\[a-zA-Z]+ (?=[a-zA-Z]))|(\d (?=\d))| ", lambda m: m[1] or m[2] or ""))
_WHOLE_TEXT = re.compile(r"\\text *\{([^{}]*)\}")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_SCIENTIFIC = re.compile(r"[-+]?\d+(?:\.\d+)?[eE][-+]?\d{1,3}")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_FRACTION = re.compile(r"([-+]?)(?:(\d+)(?= \d+/|\\[dt]?frac) ?)?"
                       r"(?:\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)/(\d+))")


@lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> tuple[str, str]:
    r"""Canonical text of an answer, and its unit, "" for none.

    Rational numbers become reduced fractions, so that equal texts mean equal values; only a
    division that leaves no remainder (`12/3`) stays, see settle:
    `\dfrac{2}{4}`, `.50` -> `1/2`; `033` -> `33`; `2\frac12` -> `5/2`; `1,234` -> `1234`; `\left(1,
    2\right)` -> `(1,2)`; `5\text{ meters}` -> `5`, `m`.
    """
    s = answer.strip()
    if len(s) > MAX_CHARS:
        return s, ""
    if s.isdecimal() and s.isascii():  # most answers of most data sets
        return s.lstrip("0") or "0", ""
    if _DECIMAL.fullmatch(s) or _FRACTION.fullmatch(s):
        return _rational(s), ""
    if "boxed" in s:  # some gold answers are boxed
        s = extract_boxed(s) or s
    s = _rewrite(s.translate(_UNICODE), _TYPESETTING).strip()
    if "\\\\" in s and "\\begin" not in s:  # doubled backslashes, as in JSON escaped twice
        s = s.replace("\\\\", "\\")
    # 11,\! 111: a comma that separates thousands, not answers
    s = re.sub(r"\\!\s*", "", s)
    s = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), s).replace("$", " ")
    s = re.sub(r"\s*\{\s*,\s*\}\s*", ",", s) if "{" in s else s  # 10{,}000
    s = " ".join(s.split()).rstrip(" ,;")
    # outer braces left over from {\bf 42} and \underline{42}
    while s[:1] == "{" and _closing(s, 0) == len(s) - 1:
        s = s[1:-1].strip()
    if (m := _WHOLE_TEXT.fullmatch(s)) and re.search(r"\d", m[1]):
        s = m[1].strip()
    # drop a full stop, but not the dots of 0.333...
    s = s[:-1].rstrip() if s.endswith(".") and not s.endswith("..") else s
    s, unit = _take_unit(_rewrite(s, _SPELLINGS))
    # 79,380, but neither 32, 349 nor (1,234)
    s = s.replace(",", "") if _THOUSANDS.fullmatch(s) else s
    s = _rewrite(s, _SPACING).strip()
    # restore the space in 32, 349: the worker normalises again, and 32,349 would become 32349
    s = s.replace(",", ", ") if _THOUSANDS.fullmatch(s) else s
    for _ in range(3):
        if s[:1] != "(" or _closing(s, 0) != len(s) - 1 or len(_split(s[1:-1], ",;")) != 1:
            break
        s = s[1:-1]  # (1/3), (A)
    return _rational(s), unit


def _rational(s: str) -> str:
    """A decimal, fraction or mixed number as a reduced fraction; any other text unchanged."""
    if _DECIMAL.fullmatch(s) or _SCIENTIFIC.fullmatch(s):
        return str(Fraction(s.rstrip(".")))
    m = _FRACTION.fullmatch(s)
    if not m:
        return s
    whole, numerator, denominator = int(m[2] or 0), int(m[3] or m[5]), int(m[4] or m[6])
    if denominator == 0 or (m[2] and (numerator < 0 or denominator < 0)):
        return s
    value = whole + Fraction(numerator, denominator)
    if value.denominator == 1 != denominator and not whole:  # a division left undone, see settle
        return f"{m[1].strip('+')}{numerator}/{denominator}"
    return str(-value if m[1] == "-" else value)


def is_rational(core: str) -> bool:
    return re.fullmatch(r"-?\d+(?:/[1-9]\d*)?", core) is not None


_UNITS = {name: names.split()[0].strip("-") for names in (  # every name of a unit -> its first
    "m meter metre", "cm centimeter centimetre", "mm millimeter millimetre",
    "km kilometer kilometre", "in inch inche", "ft foot feet", "yd yard", "mi mile", "g gram",
    "kg kilogram", "lb pound", "oz ounce", "s sec second", "min minute", "h hr hour", "day", "week",
    "month", "year yr", "l liter litre", "ml milliliter millilitre", "gal gallon", "mph",
    "km/h kph", "m/s", "deg degree", "rad radian", "% percent pct percentage", "$ dollar", "cent",
    "am", "pm", "- unit st nd rd th") for name in names.split()}  # `square units`, `5th`: no unit
_THINGS = re.compile(  # apples, students: plural nouns that neither scale the number nor qualify it
    r"(?!.*(?:th|dozen|\bten|\bscore|hundred|thousand|million|billion|halve|quarter|third|les|plu|"
    r"minu|time|doe|thi|thu|ye)s)(?:(?!and|or|not|than|over|per|more|less)[a-z]{3,} ){0,2}"
    r"(?:[a-z]{3,}s|people|children|men|women|fish|sheep)")
_UNIT = re.compile(r" *(?:\\text *\{(?P<text>[^{}]*)\}|"
                   r"(?<![a-zA-Z\\])(?P<bare>[a-zA-Z]{2,}(?: [a-zA-Z]+){0,2}))"
                   r" *(?:\^ *\{?(?P<power>[23])\}?)?$")
_DEGREES = re.compile(r"(.*?) *\^ *(?:\\circ|\{ *\\circ *\}) *(?:\\text *\{ *)?([CF]?) *\}?")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def _take_unit(s: str) -> tuple[str, str]:
    r"""Split off the unit: `72.6 \text{ m}` -> ('72.6', 'm'). A right answer may omit its unit but
    not replace it: m is not cm."""
    if s.startswith("\\dollar "):
        return s.removeprefix("\\dollar ").strip(), "$"
    if s.endswith("%"):
        return s[:-1].rstrip(), "%"
    if _TRIGONOMETRIC.search(s):  # in sin 30 degrees the degrees are part of the value
        degrees = r"(\d+(?:\.\d+)?) *\^ *(?:\\circ|\{ *\\circ *\})"
        return re.sub(degrees, r"(\\frac{\1\\pi}{180})", s), ""
    if s.endswith("\\dollar"):
        return s.removesuffix("\\dollar").strip(), "$"
    if m := _DEGREES.fullmatch(s):
        return m[1], "deg" + m[2]
    m = _UNIT.search(s)
    core = s[:m.start()] if m else ""
    # the text before the unit must be a complete expression with a number
    if re.search(r"\d|\\pi", core) and core[-1] not in "+-*/=^_,\\":
        words = (m["text"] if m["bare"] is None else m["bare"]).lower().replace(".", "").split()
        power = {"square": "2", "sq": "2", "cubic": "3"}.get(words[0] if words else "", "")
        name, _, inner = " ".join(words[1:] if power else words).partition("^")  # \text{cm^2}
        singular = name[:-1] if len(name) > 2 and name[-1] == "s" else name
        unit = _UNITS.get(name, _UNITS.get(singular)) if name else ""
        # 72 clips, but not x+2 clips
        one_number = m["text"] or is_rational(_rational(core.replace(",", "").strip()))
        if unit is None and one_number and _THINGS.fullmatch(name):
            unit = name[:-1]
        if unit is not None:
            power = m["power"] or inner.strip("{}") or power
            return core, unit + ("^" + power if unit and power else "")
    return s, ""


# --- 2. comparison by text and exact fractions ---

def settle(answer: str | None, gold: str) -> str | None:
    """Grade status of a pair; None if only a computer algebra system can decide."""
    if answer is None:
        return "no_answer"
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return "correct" if answer.strip() == gold.strip() else "unparsable"
    (a, unit_a), (g, unit_g) = normalise(answer), normalise(gold)
    if not a:
        return "unparsable"
    # 20 degrees may be 20 degrees C
    celsius = "deg" in (unit_a, unit_g) and unit_a[:3] == unit_g[:3]
    if unit_a and unit_g and unit_a != unit_g and not celsius:
        return "wrong"
    if a == g:  # also 28% and 28: the question may ask for per cent
        return "correct"
    # 1000,99 where the gold says 1000.99
    if re.fullmatch(r"\d+,\d+", a) and a.replace(",", ".") == gold.strip(" $"):
        return "correct"
    if is_rational(a) and is_rational(g):  # 28% and 0.28; but 12/3 is a division left undone
        percent = "%" in (unit_a, unit_g)
        x, y = (Fraction(v) / (100 if unit == "%" else 1) for v, unit in ((a, unit_a), (g, unit_g)))
        return "correct" if x == y and (percent or "/" not in a) else "wrong"
    if is_rational(g) and _left_undone(a):
        return "wrong"
    if re.fullmatch("[A-J]", g) and (m := _OPTION.match(a)):
        return "correct" if m[1] == g else "wrong"
    if _is_word(a) or _is_word(g) or (len(a) == len(g) == 1 and (a + g).isalpha()):
        return "correct" if len(a) > 1 and a.casefold() == g.casefold() else "wrong"
    return None


_OPTION = re.compile(r"\(?([A-J])[).][^,;(+*/^=-]")  # (C) 12, C. 12
_ARITHMETIC = re.compile(r"(?:[\d.(){}^+*/-]|\\(?:cdot|times|div|frac)(?![a-z]))+")
_SUM_OR_PRODUCT = re.compile(r"[\d)}] *(?:[+*-]|\\(?:cdot|times|div)(?![a-z]))")
_SCIENTIFIC_LATEX = re.compile(r"-?[\d.]+\\(?:cdot|times) *10\^(?:\d|\{-?\d+\})")


def _left_undone(s: str) -> bool:
    r"""Whether s is arithmetic that is not carried out: 38+44, 3(4), 2^3+1; but a power alone is a
    closed form (2^{10}, \frac{1}{24^2}), and so is 3\times10^8."""
    return bool(_ARITHMETIC.fullmatch(s) and not _SCIENTIFIC_LATEX.fullmatch(s)
                and ("^" not in s or _SUM_OR_PRODUCT.search(s)))


def _is_word(s: str) -> bool:
    """Whether s is a word (Even, YYZ) and not a product of variables (`xy`, `abc`)."""
    return s.isalpha() and len(s) > 1 and (len(s) > 3 or not s.islower())


# --- 3. structure, and math-verify for its parts: `same` and `check_readable` run in a worker ---

class Unparsable(Exception):
    pass


def same(answer: str, gold: str) -> bool:
    """Whether two answers are equivalent. Raises Unparsable if the answer cannot be parsed; any
    other exception is an error of the grader."""
    settled = settle(answer, gold)
    if settled is not None:
        return settled == "correct"
    a, g = normalise(answer)[0], normalise(gold)[0]
    (label_a, value_a), (label_g, value_g) = _label(a), _label(g)
    if (value_a, value_g) != (a, g):
        if label_a == label_g or (not label_a and _is_name(label_g)):
            return same(value_a, value_g)
        if label_a and label_g:  # two equations
            return _verify(a, g)
        letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", label_a)))
        # for gold 5 accept m+n=5, not x^2=5
        return bool(label_a) and (_is_name(label_a) or len(letters) != 1) and same(value_a, g)
    (kind_a, items_a), (kind_g, items_g) = _items(a), _items(g)
    named = _names_items(items_a)
    if named != _names_items(items_g):  # AB=4, CD=5 against 4, 5: order matters
        return {kind_a, kind_g} <= {"list", "()"} and _same_in_order(items_a, items_g)
    counted = "\\{" not in a + g and not any(item[:1] in ("(", "[") for item in items_a + items_g)
    if kind_a == kind_g == "list" and counted:
        return _same_items(items_a, items_g)
    # sets, and lists of points or intervals: duplicates do not matter
    if kind_a == kind_g == "list":
        return all(any(same(x, y) for x in items_a) for y in items_g) and \
            all(any(same(x, y) for y in items_g) for x in items_a)
    if kind_a == kind_g != "":
        clock = kind_g == ":" and re.search(r":0\d", a + g)  # 12:05 is not 12:5
        return not clock and _same_in_order(items_a, items_g)
    if {kind_a, kind_g} == {"", "list"} and len(items_a) == len(items_g) == 1:  # \{2\} and 2
        return same(items_a[0], items_g[0])
    # gold 1:2 accepts 1/2, but gold 1/2 does not accept 1:2, which may be odds
    if kind_g == ":" and not kind_a and len(items_g) == 2:
        return same(a, f"\\frac{{{items_g[0]}}}{{{items_g[1]}}}")
    interval_a, interval_g = _interval(a), _interval(g)
    if (interval_a and kind_g[:1] in list("([")) or (interval_g and kind_a[:1] in list("([")):
        return same(interval_a or a, interval_g or g)
    if (kind_a or kind_g) and not re.search(r"[<>]|\\(?:le|ge|neq|cup|mathbb)(?![a-zA-Z])", a + g):
        return False
    return _verify(a, g)  # including relations and unions that _interval cannot convert


def _same_items(items_a: list[str], items_g: list[str]) -> bool:
    """Whether two lists hold the same items with the same counts, in any order."""
    left = list(items_a)
    for g in items_g:
        found = next((i for i, a in enumerate(left) if same(a, g)), None)
        if found is None:
            return False
        del left[found]
    return not left


_BOUND = re.compile(r"([A-Za-z])(<|>|\\le|\\ge) *"
                    r"([^<>\\]+|\\frac\{[^{}]*\}\{[^{}]*\}|-?\\(?:sqrt|pi).*)")
_BOUNDS = re.compile(r"(.+?)(<|\\le) *([A-Za-z])(<|\\le) *(.+)")


def _interval(s: str) -> str:
    r"""`x\ge3` -> `[3,\infty)`, `-1\le x<2` -> `[-1,2)`; "" for anything else."""
    if (m := _BOUNDS.fullmatch(s)) and not re.search(r"[<>,]|\\[lg]e(?![a-z])", m[1] + m[5]):
        return f"{'(['[m[2] != '<']}{m[1]},{m[5]}{')]'[m[4] != '<']}"
    if m := _BOUND.fullmatch(s):
        low, closed = m[2] in (">", "\\ge"), m[2][0] == "\\"
        return f"{'(['[closed]}{m[3]},\\infty)" if low else f"(-\\infty,{m[3]}{')]'[closed]}"
    return ""


def _same_in_order(items_a: list[str], items_g: list[str]) -> bool:
    return len(items_a) == len(items_g) and all(map(same, items_a, items_g))


def _closing(s: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`, -1 if unclosed. The kinds of bracket may
    differ: [0,1) is an interval."""
    depth = 0
    for i in range(start, len(s)):
        depth += (s[i] in "([{") - (s[i] in ")]}")
        if depth == 0:
            return i
    return -1


def _split(s: str, separators: str) -> list[str]:
    """Split at separators outside brackets; empty parts are dropped."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(s):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and c in separators:
            parts.append(s[begin:i])
            begin = i + 1
    return [part for part in (*parts, s[begin:]) if part.strip()]


def _label(s: str) -> tuple[str, str]:
    r"""Left-hand side and last value of an equation or membership: `x=1+1=2` -> ('x', '2'), `x\in
    S` -> ('x', 'S'), `5` -> ('', '5'). Approximations are dropped: `\sqrt2\approx1.41` -> ('',
    '\sqrt2')."""
    s = re.sub(r"\\approx.*", "", re.sub(r"^([A-Za-z]\w*)\\approx", r"\1=", s))
    sides = _split(re.sub(r"\\in(?![a-zA-Z])", "=", s), "=")
    relation = re.search(r"[<>]|\\(?:le|ge|neq|equiv)(?![a-zA-Z])", s)
    if len(sides) < 2 or len(_split(s, ",;")) > 1 or relation:
        return "", s
    return sides[0] if len(sides) == 2 or _is_name(sides[0]) else "", sides[-1]


def _is_name(label: str) -> bool:
    r"""Whether an answer may omit this left-hand side: x, x_1, f(x), (p,q), A:B, \angle ABC."""
    return bool(re.fullmatch(r"(?!.*\\(?:sqrt|frac))[A-Za-z\\(][A-Za-z\\_{}(),:'0-9]*", label))


def _names_items(items: list[str]) -> bool:
    return len({_label(item)[0] for item in items} - {""}) > 1


def _items(s: str) -> tuple[str, list[str]]:
    r"""(kind, items). kind: 'list' for `a,b`, `\{a,b\}`, `a\pm b`; '()', '[)' ... for tuples and
    intervals; ':' for a ratio; '' for a single value."""
    if s.startswith("{") and _closing(s, 0) == len(s) - 1:
        return _items(s[1:-1])
    is_set = s.startswith("\\{") and _closing(s, 1) == len(s) - 1
    parts = _split(s[2:-2] if is_set else s, ";" if ";" in s else ",")
    items = [sign for item in parts for sign in _signs(item)]
    if is_set or len(items) > 1:
        return "list", items
    if s[:1] in ("(", "[") and _closing(s, 0) == len(s) - 1:
        items = _split(s[1:-1], ",;")
        if len(items) > 1:
            return s[0] + s[-1], items
    items = _split(s, ":")
    return ":" if len(items) > 1 else "", items


def _signs(s: str) -> list[str]:
    r"""Expand `1\pm\sqrt2` into two answers. Two \pm can mean two or four answers: left unchanged,
    and math-verify cannot parse them."""
    if s.count("\\pm") != 1 or s.count("\\mp") > 1:
        return [s]
    both = [s.replace("\\pm", x).replace("\\mp", y) for x, y in ("+-", "-+")]
    return [re.sub(r"(?:^|(?<=[(={]))\+", "", one) for one in both]


@lru_cache(maxsize=1024)
def _parse(s: str, is_real: bool):
    """Parse a canonical text to a sympy object: decimals exact, letters case-sensitive, 2\\frac12
    is 5/2 even in a product."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Float, Rational
    if re.search(r"\d \d|\\l?dots|(?:^|[^\\a-zA-Z\]{}^_])\{|[\d)}]\\\{", s):
        raise ValueError("numbers or groups side by side, or dots")
    # The parser adds adjacent numbers, to read mixed numbers: 3(4) = 7, 2\binom{4}{2} = 8. So every
    # implicit product gets a \cdot.
    s = re.sub(r"(?<![\d.^_])(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})", s)
    s = re.sub(r"(?:(?<=\d)(?<![_^]\d)|(?<=\)))(?=\(|\\binom)|(?<=\))(?=\d|\\frac)", r"\\cdot ", s)
    s = re.sub(r"(\\(?:frac|binom)\{[^{}]*\}\{[^{}]*\})(?=[\d(]|\\frac|\\binom)", r"\1\\cdot ", s)
    expr = latex2sympy(
        s, is_real=is_real, conversion_config=ConversionConfig(lowercase_symbols=False),
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True,
                                                 boxed="none"))
    return expr.xreplace({x: Rational(str(x)) for x in expr.atoms(Float)})


def _verify(answer: str, gold: str) -> bool:
    """math-verify on two expressions, with extra checks where it is known to be too lenient."""
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from sympy import Eq, Expr, simplify
    # 204_5: the parser drops the base, so only equal texts are accepted (settle)
    if re.match(r"-?\d+_", answer) or re.match(r"-?\d+_", gold):
        return False
    is_real = not should_treat_as_complex(answer + " " + gold)
    g = _parse(gold, is_real)
    try:
        a = _parse(answer, is_real)
    except Exception as problem:
        raise Unparsable from problem
    # math-verify considers any two equations without a solution equal
    if isinstance(g, Eq) and isinstance(a, Eq):
        return g == a or bool(simplify((g.lhs - g.rhs) / (a.lhs - a.rhs)).is_number)
    # no alarms: the worker process has the time limit
    if not verify(g, a, timeout_seconds=None, raise_on_error=True):
        return False
    numbers = isinstance(g, Expr) and isinstance(a, Expr) and g.is_finite
    if numbers and not (g.free_symbols or a.free_symbols):
        # math-verify compares 15 digits only
        return bool(abs((a - g).evalf(50)) <= abs(g.evalf(50)) * 10**-40 + 10**-45)
    return True


def check_readable(gold: str) -> None:
    """Raise if a part of a gold answer cannot be parsed."""
    s = _label(normalise(gold)[0])[1]
    kind, items = _items(s)
    for item in items if kind else []:
        check_readable(item)
    if not kind and not _is_word(s) and not re.match(r"-?\d+_", s):
        _parse(s, True)
