r"""Trajectory construction: pair selection, synthesis prompt, parsing, token roles.

TAPO (arXiv 2606.18844) §3.3, Eq. 3, Algorithm 1 lines 8-14. A wrong response y- and a right one y+
to the same question go into a synthesis prompt; the policy answers
<analysis>..</analysis><reconstruction>..</reconstruction>, and the reconstruction is the
constructed trajectory y_ref: y- up to and including its first error, a short reflection, corrected
reasoning. Naming: a construction (`is_reflection`) is the whole of y_ref; DIAGNOSIS is the role of
the inserted <reflection>; <analysis> locates the error and is trained on in the cold start only.

y_ref reuses y-'s OWN token ids (trap 1), because text does not round-trip: "3.\n" + "\nWait" has
different ids encoded as one string than as two. Only the new text is encoded, in one call. A token
that overlaps the reflection gets role DIAGNOSIS.

Deliberately missing: grading, and retries: a failed synthesis is dropped with one of DROP_REASONS
and counted (in the paper 80-90 % parse).
"""
import re
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from os.path import commonprefix  # works on any strings, not only paths

import numpy as np

import answers
from data import Problem, render_prompt
from rollout import CORRECTION, DIAGNOSIS, PREFIX, Completion, Rollout, generate

# y_ref keeps y- including its error (the paper) | keeps y- up to the error, without a diagnosis
# (InT, arXiv 2601.14209) | is a fresh solution | is y+ itself (control)
PREFIX_MODES = ("micro", "replace", "full", "copy")
_COLD_START = ("cold start the policy (coldstart.py, for a small model --synthesis=rule), or try "
               "another template")
DROP_REASONS = {  # reason: suggested fix
    # synthesis prompt + max_synthesis_tokens exceed the context; checked before sampling
    "prompt_too_long": "lower max_new_tokens or max_synthesis_tokens, or use template = 'short'",
    # the synthesis hit max_synthesis_tokens before </reconstruction>
    "unfinished": "raise max_synthesis_tokens, or cold start the policy (coldstart.py)",
    # tags missing, repeated or out of order, or an empty reflection
    "unparsable": _COLD_START,
    "no_divergence": _COLD_START,        # y_ref is only a prefix of y-
    "prefix_not_verbatim": _COLD_START,  # text before <reflection> is no prefix of y-
    "empty_prefix": _COLD_START,         # no text of y- is preserved
    "no_correction": _COLD_START,        # no text after the reflection
    "no_reflection": _COLD_START,        # untagged, and no MARKERS where y_ref leaves y-
    # the new text holds a stop token, another special token, or a tag
    "special_token": _COLD_START,
    "too_long": "raise max_new_tokens",  # y_ref is longer than max_new_tokens
}
TAGS = [f"<{slash}{name}>" for slash in ("", "/") for name in (
    "analysis", "reconstruction", "reflection", "wrong", "right", "micro", "full", "solve")]
TAG = re.compile("|".join(TAGS))
# units that a prefix must not split: a word, a number (12.5), a LaTeX command
ATOM = re.compile(r"\\?\w+(?:[.,]\d+)*", re.ASCII)
SENTENCE = re.compile(r"\s*.*?(?:[.!?](?=\s)|\n|\Z)", re.DOTALL)  # one sentence with its terminator

# Replaces the paper's judge model in DSR / ERR (§4.3): a response reflects if it expresses doubt
# about an earlier step. A planned check ("let me verify by substitution") does not count, nor does
# "wait for 5 minutes" in a word problem.
MARKERS = re.compile(
    r"\bWait\b(?! (?:times?|for|until)\b)|\b(?:[Bb]ut|[Nn]o|[Oo]h|[Hh]mm+),? wait\b"
    r"|\bHmm+\b|\b[Hh]old on\b"
    r"|(?:^|[.!?] )Actually\b|, actually\b|\b[Oo]n second thought"
    r"|\b[Ll]et(?:'s| me| us) try again\b|\b[Ll]et(?:'s| me| us) (?:re-?|double[- ])"
    r"(?:check|consider|examine|calculate|compute|think|do)\b"
    r"|\bI (?:have )?(?:made|see|found|notice) (?:a|an|the|my) (?:\w+ )?(?:mistake|error|slip)\b"
    r"|\b[Tt](?:hat|his)(?:'s| is) (?:wrong|incorrect|not right|not correct|a mistake)\b",
    re.MULTILINE)

_ASK = r"""You are given a problem, an incorrect response to it and a correct one. Compare the two
and find the FIRST error of the incorrect one. State where it is (quote the words) and of which
type: arithmetic slip, sign error, misread condition, wrong formula, missing case, invalid step, or
another. """
_ASK_MICRO = _ASK + r"""Then rewrite the incorrect response so that it notices its own mistake and
recovers:
1. Copy it, character for character, from its first word up to and including the first error. Keep
the mistaken thought exactly as it stands: do not repair, shorten or reformat anything.
2. Insert one or two short sentences that notice and name the mistake, the way one talks to oneself.
3. Continue with corrected reasoning up to the final answer, in the style, layout and level of
detail of the response.
Never mention that another response, an analysis or these instructions exist.

Answer in exactly this format, each tag once, nothing before or after it:
<analysis>location and type of the first error</analysis>
<reconstruction>copied beginning, error included
<reflection>short remark that names the mistake</reflection>
corrected reasoning ... \boxed{answer}</reconstruction>
"""
_ASK_FULL = _ASK + r"""Then solve the problem afresh, from the beginning up to the final answer,
taking care where the error was, in the style, layout and level of detail of the incorrect response.
Never mention that another response, an analysis or these instructions exist.

Answer in exactly this format, each tag once, nothing before or after it:
<analysis>location and type of the first error</analysis>
<reconstruction>complete solution ... \boxed{answer}</reconstruction>
"""
_EXAMPLE = r"""
# Example
## Problem
Solve 3x + 5 = 20.
## Incorrect response
Subtracting 5 from both sides gives 3x = 16.
Dividing by 3 gives x = 16/3, so the answer is \boxed{16/3}.
## Correct response
We have 3x = 20 - 5 = 15, hence x = \boxed{5}.
## Answer
<analysis>Location: "gives 3x = 16", first line. Type: arithmetic slip, 20 - 5 is 15.</analysis>
"""
_EXAMPLE_MICRO = _EXAMPLE + r"""<reconstruction>Subtracting 5 from both sides gives 3x = 16.
<reflection>Wait, 20 - 5 is 15, not 16. I slipped in the subtraction.</reflection>
So 3x = 15. Dividing by 3 gives x = 5, so the answer is \boxed{5}.</reconstruction>
"""
_EXAMPLE_FULL = _EXAMPLE + r"""<reconstruction>Subtracting 5 from both sides gives 3x = 15.
Dividing by 3 gives x = 5, so the answer is \boxed{5}.</reconstruction>
"""
_YOUR_TURN = """
# Your turn
## Problem
{question}
## Incorrect response
{wrong}
## Correct response
{right}
## Answer"""

# {question}, {wrong}, {right} are the only fields; every other brace is LaTeX. "teacher": OPSD's
# privileged prompt.
TEMPLATES = {
    "long": {  # for language models
        "micro": _ASK_MICRO + _EXAMPLE_MICRO + _YOUR_TURN,
        "full": _ASK_FULL + _EXAMPLE_FULL + _YOUR_TURN,
        "teacher": "{question}\n\nHere is a correct solution for reference:\n{right}\n\nNow solve "
                   "the problem yourself, step by step and in your own words, without mentioning "
                   "it. Put your final answer within \\boxed{}.",
    },
    # for the toy world, whose vocabulary has no words for instructions: the last tag is the
    # instruction
    "short": {
        "micro": "{question}\n<wrong>{wrong}</wrong><right>{right}</right><micro>",
        "full": "{question}\n<wrong>{wrong}</wrong><right>{right}</right><full>",
        "teacher": "{question}\n<right>{right}</right><solve>",
    },
}


# --------------------------------------------------------------------------------------------------
# before the synthesis: which pairs, which prompt


def select_pairs(rollouts: list[Rollout], *, n_pos: int, n_neg: int, m_max: int,
                 key: tuple[int, ...]) -> tuple[list[tuple[Rollout, Rollout]], dict[str, int]]:
    """Difficulty-aware candidate selection, Alg. 1 lines 8-11, Eq. 3: scored rollouts -> [(y-, y+),
    ...], and counts.

    A group is eligible iff it has at least n_pos right and n_neg wrong responses; then up to m_max
    of its wrong ones are paired, each with a right one drawn uniformly from the same group. A
    truncated response counts as wrong but is never paired: it has not ended. A response that
    the grader could not judge is not paired either: it may be right. key: counters, e.g. (seed,
    PAIRING, step). Every group draws its own noise, so its pairs do not depend on which other
    groups this process holds (trap 7).
    """
    groups: dict[str, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    pairs, eligible, truncated = [], 0, 0
    for name, group in groups.items():
        right, wrong = [r for r in group if r.reward > 0], [r for r in group if r.reward <= 0]
        if len(right) < n_pos or len(wrong) < n_neg:
            continue
        # skip truncated and ungraded responses: they may be right
        usable = [r for r in wrong if r.finished and r.grade not in ("timeout", "error")]
        # not hash(), which is salted per process
        noise = np.random.SeedSequence((*key, zlib.crc32(name.encode())))
        rng = np.random.Generator(np.random.Philox(noise))
        pairs += [(usable[i], right[rng.integers(len(right))])
                  for i in rng.permutation(len(usable))[:m_max]]
        eligible += 1
        truncated += sum(not r.finished for r in wrong)
    return pairs, {"eligible": eligible, "candidates": len(pairs), "skipped_truncated": truncated}


@dataclass
class Construction:
    """Synthesis and outcome of one pair (y-, y+)."""
    wrong: Rollout
    prompt_ids: list[int]          # synthesis prompt; [] for copies
    synthesis: Completion | None   # completion of the prompt; None for copies and prompt_too_long
    outcome: Rollout | str         # y_ref, not yet scored, or one of DROP_REASONS


def construct(model, tokenizer, pairs: list[tuple[Rollout, Rollout]], *, prefix_mode: str,
              template: str, decoupled: bool, key: tuple[int, ...], max_new_tokens: int,
              max_synthesis_tokens: int = 0, by_rule: bool = False,
              **sampling) -> list[Construction]:
    """Alg. 1 lines 12-14: for every pair the policy writes a synthesis, from which y_ref is built
    -> one Construction per pair.

    key: counters (seed, REFLECTION, step); a pair's noise depends on its own query alone, not on
    which other queries this process holds. max_synthesis_tokens = 0 means 2 * max_new_tokens.
    by_rule: rule_synthesis writes the synthesis instead of the policy. prefix_mode 'copy' needs no
    synthesis: y_ref is y+ itself.
    """
    if prefix_mode == "copy":
        return [Construction(wrong, [], None, copy_correct(wrong, correct, decoupled=decoupled))
                for wrong, correct in pairs]
    limit = max_synthesis_tokens or 2 * max_new_tokens
    built, asked, keys = [], [], []
    for wrong, correct in pairs:
        prompt = synthesis_prompt(tokenizer, wrong.problem, wrong.text, correct.text, template,
                                  prefix_mode)
        built.append(Construction(wrong, prompt, None, "prompt_too_long"))  # replaced if it fits
        if len(prompt) + limit > model.config.max_position_embeddings:
            continue
        if by_rule:
            text = rule_synthesis(wrong.text, correct.text)
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            built[-1].synthesis = Completion(ids, [], finished=True)
        else:
            asked.append(built[-1])
            # index of the pair within its query, so that every pair has its own noise
            earlier = sum(other.wrong.query == wrong.query for other in built[:-1])
            keys.append((*key, wrong.query, earlier))
    written = generate(model, [c.prompt_ids for c in asked], 1, keys=keys, max_new_tokens=limit,
                       **sampling)
    for construction, (completion,) in zip(asked, written, strict=True):
        construction.synthesis = completion
    for construction in built:
        if construction.synthesis:
            construction.outcome = build_reflection(
                tokenizer, construction.wrong, construction.synthesis, decoupled=decoupled,
                prefix_mode=prefix_mode, max_new_tokens=max_new_tokens)
    return built


def synthesis_prompt(tokenizer, problem: Problem, wrong: str, right: str,
                     template: str = "long", kind: str = "micro") -> list[int]:
    """Ids (P,) of the prompt that asks for y_ref (§3.3); kind: a prefix_mode, or 'teacher' for
    OPSD's privileged prompt, which shows no wrong response. In RL y_ref is trained under the
    question, not under this prompt."""
    kind = "micro" if kind == "replace" else kind
    if kind not in TEMPLATES.get(template, {}):
        raise ValueError(f"template = {template!r} has no prompt for {kind!r}; use template = "
                         "'long' | 'short' with prefix_mode = 'micro' | 'full'")
    fields = {"question": problem.question, "wrong": _showable(tokenizer, wrong),
              "right": _showable(tokenizer, right)}
    # One re.sub pass, no str.format: braces in the template and in the inserted LaTeX stay as is.
    text = re.sub(r"\{(question|wrong|right)\}", lambda match: fields[match[1]],
                  TEMPLATES[template][kind])
    return render_prompt(tokenizer, text, instruction="")


def _showable(tokenizer, text: str) -> str:
    """Remove tags and special tokens, which would close the response's block or the chat turn, and
    characters that the tokenizer cannot encode.

    Removed, not escaped: a small vocabulary may lack escape characters. If the preserved prefix
    contained a removed piece, the policy's copy is not verbatim and the construction is dropped.
    """
    specials = [tokenizer.convert_ids_to_tokens(i) for i in sorted(_special_ids(tokenizer))]
    while True:
        shown = _without_unknown(tokenizer, _without(text, TAGS + specials))
        if shown == text:
            return text
        text = shown  # repeat: a removal may join its neighbours into another tag


def _without(text: str, pieces: list[str]) -> str:
    """Remove `pieces` from text, including those that a removal creates: "<mi<micro>cro>" becomes
    the empty string."""
    ends, longest = tuple({piece[-1] for piece in pieces}), max(map(len, pieces))
    kept: list[str] = []
    for character in text:
        kept.append(character)
        if character in ends:  # it may complete a piece
            tail = "".join(kept[-longest:])
            found = max((len(piece) for piece in pieces if tail.endswith(piece)), default=0)
            del kept[len(kept) - found:]
    return "".join(kept)


def _without_unknown(tokenizer, text: str) -> str:
    """Remove the characters that the tokenizer encodes as its unknown id. Sub-character tokens
    share a character's offsets, so characters are marked by index, never copied by offset."""
    if tokenizer.unk_token_id is None:
        return text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    unknown = set()
    for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if token == tokenizer.unk_token_id:
            unknown.update(range(start, end))
    return "".join(character for i, character in enumerate(text) if i not in unknown)


def _special_ids(tokenizer) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {i for i, token in added if token.special}


# --------------------------------------------------------------------------------------------------
# a synthesis written by rule, for the cold start of a model too small to follow the prompt (not in
# the paper)

_NUMBER = r"(-?\d+(?:\.\d+)?)"
# a op b = c (EQUATION) and a op b is not c (DENIAL), neither of them part of a longer expression
EQUATION, DENIAL = (re.compile(
    rf"(?<![\w.,])(?<![-+*/] ){_NUMBER} ?([-+*/]) ?{_NUMBER} ?{is_} ?{_NUMBER}"
    r"(?!\d|[.,]\d| ?[-+*/])") for is_ in ("=", "is not"))


def rule_pairs(rollouts: list[Rollout]) -> list[tuple[Rollout, Rollout]]:
    """Scored rollouts -> per group the pair (y-, y+) with the most leading sentences in common. A
    y+ must state nothing false. A group in which no y- diverges from a y+ gives no pair."""
    groups: dict[str, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    pairs = []
    for group in groups.values():
        candidates = []
        rights = [r for r in group if r.reward > 0 and all(statements(r.text))]
        for wrong in (r for r in group if r.finished and r.grade == "wrong"):
            for right in rights:
                shared = parting(sentences(wrong.text), sentences(right.text))
                candidates += [(shared, wrong, right)] if shared is not None else []
        if candidates:
            # max returns the first of ties
            pairs.append(max(candidates, key=lambda candidate: candidate[0])[1:])
    return pairs


def sentences(text: str) -> list[str]:
    """Split text into sentences and lines, each with its terminator and leading whitespace: their
    concatenation is the text."""
    return [sentence for sentence in SENTENCE.findall(text) if sentence]


def parting(wrong: list[str], right: list[str]) -> int | None:
    """Index of the first differing sentence; None if one list is a prefix of the other."""
    pairs = zip(wrong, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a.strip() != b.strip()), None)


def rule_synthesis(wrong_text: str, right_text: str) -> str:
    r"""The synthesis that the policy should write: y- up to and including the first sentence that
    differs from y+, a remark that names the error in it, then y+ from that sentence on.

        y- "3 + 4 = 7\nThe answer is 7."   y+ "3 * 4 = 12\nThe answer is 12."   gives
        3 + 4 = 7\n<reflection>Wait, 3 + 4 is not the right step here.</reflection>\n3 * 4 = 12\n...
    """
    wrong, right = sentences(wrong_text), sentences(right_text)
    i = parting(wrong, right)
    preserved, said, better = "".join(wrong[:i + 1]).rstrip(), wrong[i].strip(), right[i].strip()
    kind, remark = name_error(said)
    gap = "\n" if "\n" in wrong_text else " "
    return (f'<analysis>Location: "{said[:120]}". Type: {kind}. It should be "{better[:120]}".'
            f"</analysis>\n<reconstruction>{preserved}{gap}<reflection>{remark}</reflection>{gap}"
            f"{''.join(right[i:]).strip()}</reconstruction>")


def name_error(said: str) -> tuple[str, str]:
    """A wrong sentence -> (type of its error, a remark that names it)."""
    if found := EQUATION.search(said):
        a, sign, b, c = found.groups()
        if holds(found.groups()):
            return "wrong step", f"Wait, {a} {sign} {b} is not the right step here."
        return "arithmetic slip", f"Wait, {a} {sign} {b} is not {c}."
    if answer := answers.extract_boxed(said):
        return "wrong answer", f"Wait, the answer is not {answer}."
    return "invalid step", f'Wait, "{said[:80].rstrip(".!?")}" is not right.'


def statements(text: str) -> list[bool]:
    """Truth values of every `a op b = c` and every `a op b is not c` in a text."""
    return [*map(holds, EQUATION.findall(text)), *(not holds(e) for e in DENIAL.findall(text))]


def holds(equation: tuple[str, str, str, str]) -> bool:
    """Whether a match (a, op, b, c) of EQUATION is true in exact arithmetic."""
    a, sign, b, c = equation
    a, b, c = Fraction(a), Fraction(b), Fraction(c)
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b != 0 and a == c * b}[sign]


# --------------------------------------------------------------------------------------------------
# after the synthesis: parse, align with y-, build


@dataclass
class Synthesis:
    """A parsed reconstruction; prefix + diagnosis + correction is its text without the tags."""
    prefix: str      # before <reflection>; "" if untagged
    diagnosis: str   # between the reflection tags; "" if untagged
    correction: str  # after </reflection>; the whole reconstruction if untagged
    tagged: bool


def parse_synthesis(text: str) -> Synthesis | str:
    r"""Text of a synthesis -> its parts, or the drop reason "unparsable".

    Both blocks are required, each tag once, in order; the reflection tags once, in order, inside
    the reconstruction, or not at all. Text around the blocks, such as a stop token, is ignored.
    Newlines just inside the reconstruction tags are formatting and are stripped. All others are
    content, including those next to the reflection tags: "3.\n<reflection>Wait.</reflection>\nSo"
    gives "3.\nWait.\nSo".
    """
    parts = _between(text, "analysis", "reconstruction")
    if parts is None:
        return "unparsable"
    body = parts[3].strip("\n")
    if not re.search("</?reflection>", body):
        return Synthesis("", "", body, tagged=False)
    parts = _between(body, "reflection")
    return Synthesis(*parts, tagged=True) if parts and parts[1].strip() else "unparsable"


def _between(text: str, *names: str) -> list[str] | None:
    """Split text at the tags <a>, </a>, <b>, </b> of names a, b; None unless every tag occurs once
    and in order."""
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    return re.split("|".join(tags), text) if re.findall("|".join(tags), text) == tags else None


def split_at_divergence(synthesis: Synthesis, wrong_text: str) -> tuple[str, str, str] | str:
    """-> (preserved prefix, an exact prefix of y-; diagnosis; correction), or a drop reason.

    With reflection tags the prefix ends at <reflection>; whitespace before the tag that y- lacks
    belongs to the diagnosis. Without tags the prefix is the longest common prefix with y-, cut back
    to the start of a partly shared word or number ("x = 12" and "x = 13" diverge before the 1); the
    next sentence is the diagnosis if it expresses doubt, else the drop reason is "no_reflection".
    """
    # y_ref starts with the leading whitespace of y-, whether or not the policy copied it
    lead = wrong_text[:len(wrong_text) - len(wrong_text.lstrip())]
    whole = lead + (synthesis.prefix + synthesis.diagnosis + synthesis.correction).lstrip()
    if wrong_text.startswith(whole.rstrip()):
        return "no_divergence"
    if synthesis.tagged:
        copied = lead + synthesis.prefix.lstrip()
        end = len(commonprefix([copied, wrong_text]))
        if copied[end:].strip() or _boundary(wrong_text, end) != end:
            return "prefix_not_verbatim"
        diagnosis, correction = copied[end:] + synthesis.diagnosis, synthesis.correction
    else:
        end = len(commonprefix([whole, wrong_text]))
        end = _boundary(wrong_text, _boundary(whole, end))
        diagnosis = SENTENCE.match(whole, end)[0]
        correction = whole[end + len(diagnosis):]
    if not wrong_text[:end].strip():
        return "empty_prefix"
    if not correction.strip():
        return "no_correction"
    if not synthesis.tagged and not reflects(diagnosis):
        return "no_reflection"
    return wrong_text[:end], diagnosis, correction


def _boundary(text: str, end: int) -> int:
    """`end`, or the start of the ATOM match that strictly contains it."""
    return next((m.start() for m in ATOM.finditer(text) if m.start() < end < m.end()), end)


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_boundary(tokenizer, ids: list[int], prefix: str) -> int:
    """Largest n such that `prefix` starts with the decoded ids[:n]; the decoded ids must start with
    `prefix`.

    Bisection on the decoded length, which never shrinks as ids are added, then steps back out of a
    split character: in a byte-level vocabulary one character can be several tokens, and a part of
    it decodes to U+FFFD.
    """
    n = bisect_right(range(1, len(ids) + 1), len(prefix),
                     key=lambda n: len(_decode(tokenizer, ids[:n])))
    while not prefix.startswith(_decode(tokenizer, ids[:n])):
        n -= 1
    return n


def encode_with_roles(tokenizer, before: str, diagnosis: str, correction: str,
                      before_role: int) -> tuple[list[int], list[int]]:
    r"""Encode the three texts as ONE string -> ids (C,), roles (C,).

    before "3.", diagnosis "\n\nWait.", correction " So": tokens 3 | .\n\n | Wait | . | _So have
    roles 0 1 1 1 2. Offsets that exclude a token's leading space (as Llama 3's do) are extended
    back to the end of the previous token.
    """
    encoding = tokenizer(before + diagnosis + correction, add_special_tokens=False,
                         return_offsets_mapping=True)
    start, end = len(before), len(before) + len(diagnosis)
    spans, roles = encoding["offset_mapping"], []
    for i, (low, high) in enumerate(spans):
        low = min(low, spans[i - 1][1]) if i else 0
        # CRITICAL: a token that shares one character with the reflection is DIAGNOSIS, otherwise
        # the reflection leaks into the gradient
        touches = low < end and high > start and start < end
        roles.append(DIAGNOSIS if touches else before_role if low < start else CORRECTION)
    return encoding["input_ids"], roles


def build_reflection(tokenizer, wrong: Rollout, synthesis: Completion, *, prefix_mode: str,
                     max_new_tokens: int, decoupled: bool) -> Rollout | str:
    """y- and the sampled synthesis -> the constructed trajectory y_ref, or one of DROP_REASONS.

    'micro': y-'s own ids up to the divergence, then the policy's text, encoded in one call.
    'replace': y-'s own ids up to the start of the sentence with the error, then the correction.
    'full': all tokens are new, with role CORRECTION (DIAGNOSIS for a tagged reflection). The stop
    token is appended. A synthesis truncated after </reconstruction> is accepted. decoupled: y_ref
    gets its own advantage group (§3.4).
    """
    parsed = parse_synthesis(_decode(tokenizer, synthesis.ids))
    if isinstance(parsed, str):
        return parsed if synthesis.finished else "unfinished"
    # y- ends with its stop token: only finished responses are paired
    body, stop_id = wrong.completion_ids[:-1], wrong.completion_ids[-1]
    wrong_text = _decode(tokenizer, body)
    if prefix_mode in ("micro", "replace"):
        split = split_at_divergence(parsed, wrong_text)
        if isinstance(split, str):
            return split
        preserved, diagnosis, correction = split
        if prefix_mode == "replace":
            preserved, diagnosis, correction = before_error(preserved), "", correction.lstrip()
        prefix_ids = body[:token_boundary(tokenizer, body, preserved)]
        # the preserved prefix may end inside a token
        before, before_role = preserved[len(_decode(tokenizer, prefix_ids)):], PREFIX
    else:
        prefix_ids, before, before_role = [], parsed.prefix, CORRECTION
        preserved, diagnosis, correction = parsed.prefix, parsed.diagnosis, parsed.correction
    if wrong_text.strip().startswith((preserved + diagnosis + correction).strip()):
        return "no_divergence"
    new_ids, new_roles = encode_with_roles(tokenizer, before, diagnosis, correction, before_role)
    special = _special_ids(tokenizer) | {stop_id}
    if TAG.search(before + diagnosis + correction) or not special.isdisjoint(new_ids):
        return "special_token"
    ids = prefix_ids + new_ids + [stop_id]
    if len(ids) > max_new_tokens:
        return "too_long"
    return _reflection(wrong, ids, [PREFIX] * len(prefix_ids) + new_roles + [CORRECTION], True,
                       _decode(tokenizer, ids[:-1]), decoupled, new=diagnosis + correction)


def copy_correct(wrong: Rollout, correct: Rollout, *, decoupled: bool) -> Rollout:
    """Control, prefix_mode = 'copy': y_ref is y+ itself. A gain of TAPO over this control cannot
    come from imitating y+."""
    roles = [CORRECTION] * len(correct.completion_ids)
    return _reflection(wrong, correct.completion_ids, roles, correct.finished, correct.text,
                       decoupled, new=correct.text)


def _reflection(wrong: Rollout, ids: list[int], roles: list[int], finished: bool, text: str,
                decoupled: bool, new: str) -> Rollout:
    stated = statements(new)
    return Rollout(
        wrong.problem, query=wrong.query,
        group=wrong.group + "_reflected" if decoupled else wrong.group,
        prompt_ids=wrong.prompt_ids, completion_ids=list(ids), roles=roles, finished=finished,
        text=text, is_reflection=True,
        faithful=all(stated) if stated else None)


def before_error(preserved: str) -> str:
    """The preserved prefix without its last sentence, which holds the error; "" if none is left."""
    preserved = preserved.rstrip()
    return preserved[:len(preserved) - len(sentences(preserved)[-1].lstrip())]


def is_kept(r: Rollout, keep: str) -> bool:
    """Whether a scored construction is trained on. keep: 'all' | 'right', only if reward > 0 ('w/o
    Negative', Table 4) | 'faithful', unless it states something false (not in the paper).

    The reward checks only the answer, which the synthesis prompt shows: a construction can earn it
    without valid reasoning.
    """
    return keep == "all" or (r.reward > 0 if keep == "right" else r.faithful is not False)


def token_masks(roles: list[int], *, diagnosis: str,
                train_prefix: bool) -> tuple[list[float], list[float]]:
    """Loss mask (1: carries gradient) and OTS mask (1: weighted by Eq. 7) of a constructed
    trajectory, one entry per token.

    diagnosis = 'mask' keeps the inserted diagnosis out of the gradient; 'ots' trains it under Eq.
    7's weights (the paper), 'train' with weight 1. train_prefix = False also masks the preserved
    prefix, the policy's own wrong reasoning.

        roles 0 0 1 1 2 2, diagnosis = 'mask'   ->   1 1 0 0 1 1,  1 1 0 0 1 1
    """
    left_out = {DIAGNOSIS} if diagnosis == "mask" else set()
    left_out |= set() if train_prefix else {PREFIX}
    mask = [float(role not in left_out) for role in roles]
    weighed = [float(role != DIAGNOSIS or diagnosis == "ots") for role in roles]
    return mask, weighed


def reflects(text: str) -> bool:
    """Whether the response doubts one of its own steps (MARKERS): "6 is low. Wait, try 8" does,
    "Let me verify." does not."""
    return MARKERS.search(text) is not None
