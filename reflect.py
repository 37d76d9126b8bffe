"""Trajectory construction: which mistakes to learn from, the synthesis prompt, parsing, token roles. Text lives here.

TAPO (arXiv 2606.18844) §3.3, Algorithm 1 lines 8-14, Eq. 3. A wrong response y- and a correct one y+ to the same question go into
a synthesis prompt; the policy answers <analysis>..</analysis><reconstruction>..</reconstruction>; the reconstruction is the
constructed trajectory y_ref: y- up to and including its first error, a short reflection, corrected reasoning.

y_ref keeps y-'s OWN token ids (trap 1): text seams do not round-trip ("3.\n" + "\nWait" re-encodes to other ids), so only the
newly written part is encoded, once. Every token gets a role, and a token that touches the reflection counts as reflection.

Deliberately missing: the model (train.py samples between synthesis_prompt and build_reflection), grading, retries of failed
syntheses. What fails is dropped under one of DROP_REASONS and counted: the paper reports that 80-90 % parse.
"""
import re
import zlib
from dataclasses import dataclass

import numpy as np

from data import Problem, render_prompt
from rollout import CORRECTION, DIAGNOSIS, PREFIX, Completion, Rollout

PREFIX_MODES = ("micro", "full", "copy")  # y_ref keeps y-'s prefix (the paper) | is a fresh solution | is a copy of y+ (control)
DROP_REASONS = (
    "unfinished",           # the synthesis hit its cap before it closed the reconstruction
    "unparsable",           # tags missing, repeated, out of order, or an empty reflection
    "empty_prefix",         # nothing of y- is preserved
    "prefix_not_verbatim",  # what stands before the reflection is not how y- begins
    "no_divergence",        # y_ref says nothing that y- does not say
    "no_correction",        # it stops after the reflection
    "special_token",        # the new text holds a stop token, another special token, or a tag
    "too_long",             # more than max_new_tokens
)
TAG = re.compile(r"</?(?:analysis|reconstruction|reflection|wrong|right|micro|full|solve)>")
ATOM = re.compile(r"\\?\w+(?:[.,]\d+)*")  # never cut inside: a word, a number (12.5 and 1,000 are one), a LaTeX command
SENTENCE = re.compile(r"\s*.*?(?:[.!?](?=\s)|\n|\Z)", re.DOTALL)  # up to and including the end of the first sentence

# Rule-based stand-in for the paper's judge in DSR / ERR (§4.3): a response "reflects" when it says that it doubts an earlier step.
# Planned checks ("let me verify by substitution") are not doubts, and "they wait for 5 minutes" is a word problem.
MARKERS = re.compile(
    r"\bWait\b(?!\s+(?:times?|for|until)\b)|\b(?i:but|oh|no|hmm+),?\s+wait\b|\bHmm+\b|\bHold on\b|(?:^|[.!?,;]\s+|\n)[Aa]ctually\b"
    r"|(?i:\bon second thought|\blet(?:'s| me| us) (?:re-?|double[- ]?)(?:check|consider|examine|think|calculate|compute|do|evaluate|visit)"
    r"|\bI(?:'ve| have)? (?:just )?(?:made|make|see|found|notice|spot) (?:a|an|the|my) (?:\w+ )?(?:mistake|error|slip)"
    r"|\b(?:that|this)(?: step| line)?(?:'s| is| was| can't be| cannot be| isn't) (?:not )?(?:wrong|right|correct|incorrect|a mistake)\b"
    r"(?<!that is right)(?<!that is correct)(?<!this is right)(?<!this is correct))")

_TASK = {
    "micro": """\
Your task is to rewrite the incorrect response so that it notices its own mistake and recovers from it.

1. Compare it with the correct response and find the FIRST error. State where it is (quote the words) and of which type it is: \
arithmetic slip, sign error, misread condition, wrong formula, missing case, invalid step, or another.
2. Copy the incorrect response, character for character, from its first word up to and including that first error. Keep the \
mistaken thought exactly as it stands: do not repair, shorten or reformat anything.
3. Then insert one or two short sentences in which the writer notices and names the mistake, the way one talks to oneself.
4. Then continue with corrected reasoning up to the final answer, in the style, layout and level of detail of the incorrect \
response. Never mention that another response, an analysis or these instructions exist.""",
    "full": """\
Your task is to write a complete, correct solution that avoids the mistake of the incorrect response.

1. Compare it with the correct response and find the FIRST error. State where it is (quote the words) and of which type it is: \
arithmetic slip, sign error, misread condition, wrong formula, missing case, invalid step, or another.
2. Then solve the problem afresh from the beginning up to the final answer, taking care at that point, in the style, layout and \
level of detail of the incorrect response. Never mention that another response, an analysis or these instructions exist.""",
}
_FORMAT = {
    "micro": "<analysis>location and type of the first error</analysis>\n<reconstruction>copied beginning, error included\n"
             "<reflection>short remark that names the mistake</reflection>\ncorrected reasoning ... \\boxed{answer}</reconstruction>",
    "full": "<analysis>location and type of the first error</analysis>\n"
            "<reconstruction>complete solution ... \\boxed{answer}</reconstruction>",
}
_EXAMPLE_WRONG = "Subtracting 5 from both sides gives 3x = 16.\nDividing by 3 gives x = 16/3, so the answer is \\boxed{16/3}."
_EXAMPLE_ANALYSIS = '<analysis>Location: "gives 3x = 16" in the first line. Type: arithmetic slip, 20 - 5 is 15.</analysis>\n'
_EXAMPLE = {
    "micro": _EXAMPLE_ANALYSIS + "<reconstruction>Subtracting 5 from both sides gives 3x = 16.\n<reflection>Wait, 20 - 5 is 15, not 16. "
             "I slipped in the subtraction.</reflection>\nSo 3x = 15. Dividing by 3 gives x = 5, so the answer is \\boxed{5}.</reconstruction>",
    "full": _EXAMPLE_ANALYSIS + "<reconstruction>Subtracting 5 from both sides gives 3x = 15.\n"
            "Dividing by 3 gives x = 5, so the answer is \\boxed{5}.</reconstruction>",
}


def _long(mode: str) -> str:
    return (f"You are given a problem, an incorrect response to it and a correct one. {_TASK[mode]}\n\n"
            f"Answer in exactly this format, every tag once, nothing before or after it:\n{_FORMAT[mode]}\n\n"
            f"# Example\n## Problem\nSolve 3x + 5 = 20.\n## Incorrect response\n{_EXAMPLE_WRONG}\n"
            f"## Correct response\nWe have 3x = 20 - 5 = 15, hence x = \\boxed{{5}}.\n## Answer\n{_EXAMPLE[mode]}\n\n"
            "# Your turn\n## Problem\n{question}\n## Incorrect response\n{wrong}\n## Correct response\n{right}\n## Answer")


# {question}, {wrong} and {right} are the only fields; every other brace (LaTeX!) is literal, see _fill. 'teacher': OPSD's privileged prompt.
TEMPLATES = {
    "long": {  # for language models
        "micro": _long("micro"),
        "full": _long("full"),
        "teacher": "{question}\n\nFor reference, here is a correct solution:\n{right}\n\nNow solve the problem yourself, step by step and in "
                   "your own words, without mentioning that solution. Put your final answer within \\boxed{}.",
    },
    "short": {  # for the toy world, whose few tokens leave no room for instructions: the last tag is the instruction
        "micro": "{question}\n<wrong>{wrong}</wrong><right>{right}</right><micro>",
        "full": "{question}\n<wrong>{wrong}</wrong><right>{right}</right><full>",
        "teacher": "{question}\n<right>{right}</right><solve>",
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# before the synthesis: which pairs, which prompt


def select_candidates(rollouts: list[Rollout], *, n_pos: int, n_neg: int, m_max: int,
                      key: tuple[int, ...]) -> tuple[list[tuple[Rollout, Rollout]], dict[str, int]]:
    """Difficulty-aware candidate selection, Eq. 3: scored rollouts -> [(y-, y+), ...] and counts for reflect_sums.

    A group is eligible iff it has at least n_pos correct and n_neg wrong responses; then up to m_max wrong ones are paired, each
    with a correct one drawn uniformly from its own group. A truncated wrong response counts as wrong but is never used: it has no
    end to reflect from. key: counters such as (seed, PAIRING, step). Each group draws its own noise, so its pairs do not depend on
    which other groups this rank happens to hold (trap 7).
    """
    for name, value in (("n_pos", n_pos), ("n_neg", n_neg), ("m_max", m_max)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1: every pair needs a correct and a wrong response; use method = 'grpo' for none")
    groups: dict[str, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    pairs, stats = [], {"eligible": 0, "candidates": 0, "skipped_truncated": 0}
    for name, group in groups.items():
        correct = [r for r in group if r.reward > 0]
        wrong = [r for r in group if r.reward <= 0]
        if len(correct) < n_pos or len(wrong) < n_neg:
            continue
        usable = [r for r in wrong if r.finished]
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((*key, zlib.crc32(name.encode())))))  # hash() is salted
        for i in rng.permutation(len(usable))[:m_max]:
            pairs.append((usable[i], correct[rng.integers(len(correct))]))
        stats["eligible"] += 1
        stats["skipped_truncated"] += len(wrong) - len(usable)
    stats["candidates"] = len(pairs)
    return pairs, stats


def synthesis_prompt(tokenizer, problem: Problem, wrong_text: str, correct_text: str, template: str = "long",
                     prefix_mode: str = "micro") -> list[int]:
    """Ids (P,) of the prompt under which the policy writes y_ref (§3.3). Never trained on: y_ref is trained under the plain question.

    Tags and special tokens inside y- or y+ are left out, or they would end a block or a chat turn. Where that changes the preserved
    prefix, the copy is not verbatim and the construction is dropped.
    """
    return _render(tokenizer, template, prefix_mode, problem.question, wrong_text, correct_text)


def teacher_prompt(tokenizer, problem: Problem, correct_text: str, template: str = "long") -> list[int]:
    """Ids (P,) of OPSD's privileged prompt (arXiv 2601.18734): the question with a correct solution in view."""
    return _render(tokenizer, template, "teacher", problem.question, "", correct_text)


def _render(tokenizer, template: str, kind: str, question: str, wrong: str, right: str) -> list[int]:
    if kind not in TEMPLATES.get(template, {}):
        raise ValueError(f"no template {template!r} / {kind!r}; use template = {' | '.join(TEMPLATES)} and prefix_mode = micro | full")
    return render_prompt(tokenizer, _fill(TEMPLATES[template][kind], question=question, wrong=_without_tags(tokenizer, wrong),
                                          right=_without_tags(tokenizer, right)), instruction="")


def _fill(template: str, **fields: str) -> str:
    """Replace {name} for the given names in one pass: braces in the template and in the inserted texts stay as they are."""
    return re.sub(r"\{(" + "|".join(fields) + r")\}", lambda match: fields[match[1]], template)


def _without_tags(tokenizer, text: str) -> str:
    """Remove rather than escape: an escape may need characters that a small vocabulary does not have."""
    specials = [tokenizer.convert_ids_to_tokens(i) for i in sorted(_special_ids(tokenizer))]
    pattern = re.compile("|".join([TAG.pattern, *map(re.escape, specials)]))
    while pattern.search(text):  # removing the inner one of "<mi<micro>cro>" makes a new one
        text = pattern.sub("", text)
    return text.strip()


def _special_ids(tokenizer) -> set[int]:
    return set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


# ---------------------------------------------------------------------------------------------------------------------
# after the synthesis: parse, align with y-, build


@dataclass
class Synthesis:
    """A parsed answer. prefix + diagnosis + correction is the reconstruction without its tags, not a character more or less."""
    analysis: str
    prefix: str      # before <reflection>; "" if there is no such tag
    diagnosis: str   # between the reflection tags
    correction: str  # after them, or the whole reconstruction
    tagged: bool


def parse_synthesis(text: str) -> Synthesis | str:
    """The policy's answer -> its parts, or the reason to drop it ("unparsable").

    Needs <analysis>, </analysis>, <reconstruction>, </reconstruction> once each, in this order, and the reflection tags once each,
    in order, inside the reconstruction, or not at all. What stands around the two blocks is ignored (also a stop token). Newlines
    just inside the reconstruction tags belong to the format and are stripped; all others, also those next to the reflection tags,
    are content: "3.\\n<reflection>Wait.</reflection>\\nSo" reads "3.\\nWait.\\nSo".
    """
    parts = _between(text, "analysis", "reconstruction")
    if parts is None:
        return "unparsable"
    analysis, body = parts[1].strip(), parts[3].strip("\n")
    if not re.search("</?reflection>", body):
        return Synthesis(analysis, "", "", body, tagged=False)
    parts = _between(body, "reflection")
    if parts is None or not parts[1].strip():
        return "unparsable"
    return Synthesis(analysis, *parts, tagged=True)


def _between(text: str, *names: str) -> list[str] | None:
    """text cut at <a>, </a>, <b>, </b>, ...: the 2n + 1 pieces around the tags, or None unless each occurs once and in order."""
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    if re.findall("|".join(tags), text) != tags:
        return None
    return re.split("|".join(tags), text)


def split_at_divergence(synthesis: Synthesis, wrong_text: str) -> tuple[str, str, str] | str:
    """Preserved prefix (how y- begins, character for character), diagnosis, correction; or the reason to drop.

    With reflection tags the prefix ends where they stand. Whitespace before the tag that y- does not have belongs to the diagnosis.
    Without them y_ref diverges where it stops agreeing with y-, moved back to the start of a half-shared word or number
    ("x = 12" / "x = 13" diverge before the 1), and the first sentence from there on counts as the diagnosis.
    """
    lead = wrong_text[:len(wrong_text) - len(wrong_text.lstrip())]  # whitespace before y-'s first word is y-'s, copied or not
    whole = lead + (synthesis.prefix + synthesis.diagnosis + synthesis.correction).lstrip()
    if wrong_text.startswith(whole.rstrip()):
        return "no_divergence"
    if synthesis.tagged:
        copied = lead + synthesis.prefix.lstrip()
        end = _common_prefix(copied, wrong_text)
        if copied[end:].strip() or _back_to_boundary(wrong_text, end) != end:
            return "prefix_not_verbatim" if copied.strip() else "empty_prefix"
        diagnosis, correction = copied[end:] + synthesis.diagnosis, synthesis.correction
    else:
        end = _common_prefix(whole, wrong_text)
        end = _back_to_boundary(wrong_text, _back_to_boundary(whole, end))
        diagnosis = SENTENCE.match(whole, end)[0]
        correction = whole[end + len(diagnosis):]
    if not wrong_text[:end].strip():
        return "empty_prefix"
    return (wrong_text[:end], diagnosis, correction) if correction.strip() else "no_correction"


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _back_to_boundary(text: str, end: int) -> int:
    """The start of the word, number or LaTeX command that position `end` lies strictly inside of, else `end`."""
    return next((m.start() for m in ATOM.finditer(text) if m.start() < end < m.end()), end)


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_boundary(tokenizer, ids: list[int], prefix: str) -> int:
    """Largest n such that ids[:n] decode to a beginning of `prefix`, itself a beginning of the whole decoded text.

    Bisect on the decoded length, which never shrinks as ids are added; then step back over the pieces of a cut character (in a
    byte-level vocabulary one character may be several tokens, and half of it decodes to U+FFFD).
    """
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(_decode(tokenizer, ids[:middle])) <= len(prefix):
            low = middle
        else:
            high = middle - 1
    while not prefix.startswith(_decode(tokenizer, ids[:low])):
        low -= 1
    return low


def encode_with_roles(tokenizer, before: str, diagnosis: str, correction: str, before_role: int) -> tuple[list[int], list[int]]:
    """Encode the three texts as ONE string -> ids (C,), roles (C,).

    CRITICAL: a token that overlaps any diagnosis character is DIAGNOSIS, so that no reflection reaches the gradient when masked.
    before "3.", diagnosis "\\nWait.", correction "\\nSo": tokens  3 | .\\n | Wait | . | \\n | So  have roles  0 1 1 1 2 2.
    Offsets that leave out whitespace (Llama 3 trims them) are widened to their neighbours', which errs towards DIAGNOSIS.
    """
    encoding = tokenizer(before + diagnosis + correction, add_special_tokens=False, return_offsets_mapping=True)
    start, end = len(before), len(before) + len(diagnosis)
    spans, roles = encoding["offset_mapping"], []
    for i, (low, high) in enumerate(spans):
        low = min(low, spans[i - 1][1]) if i > 0 else 0
        high = max(high, spans[i + 1][0]) if i + 1 < len(spans) else end + len(correction)
        roles.append(DIAGNOSIS if low < end and high > start and diagnosis else before_role if low < start else CORRECTION)
    return encoding["input_ids"], roles


def build_reflection(tokenizer, wrong: Rollout, synthesis: Completion, *, prefix_mode: str, stop_id: int, max_new_tokens: int,
                     decoupled: bool) -> Rollout | str:
    """y- and the sampled synthesis -> the constructed trajectory y_ref, or one of DROP_REASONS.

    'micro': y-'s own ids up to the divergence, then what the policy wrote, encoded once. 'full': all of the reconstruction is new
    (CORRECTION; a tagged reflection is DIAGNOSIS nevertheless). The stop token is appended. A synthesis that hit its cap after it
    had closed the reconstruction is complete. decoupled: y_ref joins group "<group>_reflected" (§3.4) instead of the originals'.
    """
    if prefix_mode not in ("micro", "full"):
        raise ValueError(f"prefix_mode = {prefix_mode!r} builds nothing from a synthesis; use micro | full, or copy_correct for copy")
    parsed = parse_synthesis(_decode(tokenizer, synthesis.ids))
    if isinstance(parsed, str):
        return parsed if synthesis.finished else "unfinished"
    body = wrong.completion_ids[:-1] if wrong.finished else wrong.completion_ids  # without the stop token
    wrong_text = _decode(tokenizer, body)
    if prefix_mode == "micro":
        split = split_at_divergence(parsed, wrong_text)
        if isinstance(split, str):
            return split
        preserved, diagnosis, correction = split
        prefix_ids = body[:token_boundary(tokenizer, body, preserved)]
        before = preserved[len(_decode(tokenizer, prefix_ids)):]  # the divergence may lie inside a token of y-
    else:
        prefix_ids, before, diagnosis, correction = [], parsed.prefix, parsed.diagnosis, parsed.correction
        if not (before + correction).strip():
            return "no_correction"
        if wrong_text.strip().startswith((before + diagnosis + correction).strip()):
            return "no_divergence"
    new_ids, new_roles = encode_with_roles(tokenizer, before, diagnosis, correction, PREFIX if prefix_mode == "micro" else CORRECTION)
    if TAG.search(before + diagnosis + correction) or not (_special_ids(tokenizer) | {stop_id}).isdisjoint(new_ids):
        return "special_token"
    completion_ids = prefix_ids + new_ids + [stop_id]
    if len(completion_ids) > max_new_tokens:
        return "too_long"
    return _reflection(wrong, completion_ids, [PREFIX] * len(prefix_ids) + new_roles + [CORRECTION], True,
                       _decode(tokenizer, completion_ids[:-1]), decoupled)


def copy_correct(wrong: Rollout, correct: Rollout, *, decoupled: bool) -> Rollout:
    """Control for prefix_mode = 'copy': y_ref is y+ itself, no synthesis. What TAPO gains over it is not imitation of y+."""
    return _reflection(wrong, list(correct.completion_ids), [CORRECTION] * len(correct.completion_ids), correct.finished,
                       correct.text, decoupled)


def _reflection(wrong: Rollout, completion_ids: list[int], roles: list[int], finished: bool, text: str, decoupled: bool) -> Rollout:
    return Rollout(uid=wrong.uid, group=wrong.group + "_reflected" if decoupled else wrong.group, prompt_ids=wrong.prompt_ids,
                   completion_ids=completion_ids, roles=roles, finished=finished, text=text, is_reflection=True)


# ---------------------------------------------------------------------------------------------------------------------
# what happened


def reflect_sums(selected: dict[str, int], outcomes: list[Rollout | str]) -> dict[str, float]:
    """Sums of one step on one rank, always the same keys: add them over ranks, then call reflect_metrics.

    selected: from select_candidates; outcomes: per candidate y_ref, scored and if possible with .logprobs and .ots_weights, or the
    drop reason. "name#" is the denominator of the mean "name"; a name without one is a plain count.
    """
    sums = dict.fromkeys([*selected, "kept", *(f"dropped_{reason}" for reason in DROP_REASONS)], 0.0)
    roles = {"prefix": PREFIX, "diagnosis": DIAGNOSIS, "correction": CORRECTION}
    for name in ["parsed", "verbatim", "correct", "mixed_groups", "length", *(f"logprob_{r}" for r in roles),
                 *(f"ots_{r}" for r in roles), "ots_first_diagnosis"]:
        sums[name] = sums[name + "#"] = 0.0

    def add(name: str, values: list[float]) -> None:
        sums[name] += float(sum(values))
        sums[name + "#"] += len(values)

    for name, count in selected.items():
        sums[name] += count
    groups: dict[str, list[float]] = {}  # by y-'s group, that is without the originals of an undecoupled run
    for outcome in outcomes:
        if isinstance(outcome, str):
            sums[f"dropped_{outcome}"] += 1
            add("parsed", [outcome not in ("unfinished", "unparsable")])
            if outcome in ("empty_prefix", "prefix_not_verbatim"):
                add("verbatim", [0])
            continue
        sums["kept"] += 1
        add("parsed", [1])
        if PREFIX in outcome.roles:  # 'full' and 'copy' preserve nothing and have no verbatim rate
            add("verbatim", [1])
        add("correct", [outcome.reward > 0])
        add("length", [len(outcome.completion_ids)])
        groups.setdefault(outcome.group, []).append(outcome.reward)
        for kind, values in (("logprob", outcome.logprobs), ("ots", outcome.ots_weights)):
            for role_name, role in roles.items() if values is not None else ():
                add(f"{kind}_{role_name}", [v for v, r in zip(values, outcome.roles, strict=True) if r == role])
        if outcome.ots_weights is not None and DIAGNOSIS in outcome.roles:
            add("ots_first_diagnosis", [outcome.ots_weights[outcome.roles.index(DIAGNOSIS)]])
    add("mixed_groups", [len(set(rewards)) > 1 for rewards in groups.values()])  # the others carry no gradient under Eq. 5
    return sums


def reflect_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means and counts under their names in metrics.jsonl. A mean over nothing has no value and is left out."""
    return {f"reflect/{name}": value / sums.get(name + "#", 1.0) for name, value in sums.items()
            if not name.endswith("#") and sums.get(name + "#", 1.0) > 0}


def reflects(text: str) -> bool:
    """Does the response doubt an earlier step of its own (MARKERS)? "6 is low.\\nWait, try 8" does; "Let me verify." does not."""
    return MARKERS.search(text) is not None
