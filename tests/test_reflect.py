"""Trajectory construction. What depends on the tokenizer runs on several: two byte-level BPEs
trained here (the offsets of one leave out whitespace, as Llama 3's do), the toy world's, and the
real Qwen3 one where it is at hand."""
import functools
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import reflect
from data import Problem, load_tokenizer, render_prompt
from metrics import means, reflect_sums
from reflect import Synthesis, build_reflection, parse_synthesis, select_pairs, split_at_divergence
from rollout import CORRECTION, DIAGNOSIS, PREFIX, Completion, Rollout

SHARED = Path(__file__).resolve().parents[2] / "shared"
QWEN = SHARED / "data" / "qwen3_tokenizer"
NAMES = ["bpe", "trimmed", "qwen"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% "
        "endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@functools.cache
def tokenizer_of(name):
    if name == "qwen":
        if not QWEN.exists():
            pytest.skip("the Qwen3 tokenizer is not here")
        return load_tokenizer(QWEN)
    if name == "toy":
        toy = pytest.importorskip("toy")
        return toy.make_tokenizer()
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if name == "trimmed":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(vocab_size=420,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  show_progress=False)
    corpus = ["Step one: x = 3.\n\nWait, that is wrong.\n\nSo x = 4.\n"
              "The answer is \\boxed{4}.\n"] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>",
                                   additional_special_tokens=["<|im_start|>"], chat_template=CHAT)


def tokenizer_with_unk(kind):
    """Byte-level BPE as SmolLM2's, BPE with byte fallback as Llama 2's, word level: each names an
    unknown token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    specials, corpus = ["<unk>", "<|im_start|>",
                        "<|im_end|>"], ["So x = 5, then y = 6.\n The answer is 3"] * 9
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
            vocab_size=300, special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    elif kind == "byte_fallback":
        pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁xythenSoswra5"]
        tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, [],
                                         unk_token="<unk>",
                                         byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                               decoders.Fuse()])
    else:
        words = [*specials, *"x y = 5 6 3 , . So then ABC".split()]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)},
                                               unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                   eos_token="<|im_end|>", chat_template=CHAT,
                                   additional_special_tokens=["<|im_start|>"])


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


PROBLEM = Problem("p", "Q", "1")


def rollout(tokenizer, text, finished=True, ids=None, **fields):
    ids = encode(tokenizer, text) if ids is None else ids
    ids = ids + [tokenizer.eos_token_id] * finished
    fields = {"problem": PROBLEM, "group": "p", "query": 7, "prompt_ids": [1, 2],
              "roles": [PREFIX] * len(ids)} | fields
    return Rollout(**fields, completion_ids=ids, finished=finished, text=text)


def completion(tokenizer, text, finished=True):
    ids = encode(tokenizer, text) + [tokenizer.eos_token_id] * finished
    return Completion(ids, [0.0] * len(ids), finished)


def answer(body, analysis="look"):
    return f"<analysis>{analysis}</analysis>\n<reconstruction>{body}</reconstruction>"


def build(tokenizer, wrong, body, *, written=None, prefix_mode="micro", max_new_tokens=999,
          decoupled=True,
          finished=True):
    """y_ref or the drop reason. wrong: Rollout or text; body: of the reconstruction; written: the
    whole answer."""
    wrong = rollout(tokenizer, wrong) if isinstance(wrong, str) else wrong
    synthesis = completion(tokenizer, answer(body) if written is None else written, finished)
    return build_reflection(tokenizer, wrong, synthesis, prefix_mode=prefix_mode,
                            max_new_tokens=max_new_tokens, decoupled=decoupled)


def by_role(tokenizer, y, role):
    return decode(tokenizer, [i for i, r in zip(y.completion_ids, y.roles, strict=True) if r
                              == role])


def preserved_ids(y, wrong):
    """How many leading ids y_ref shares with y-."""
    n = 0
    for n, (a, b) in enumerate(zip(y.completion_ids, wrong.completion_ids, strict=False)):
        if a != b:
            return n
    return n


# --------------------------------------------------------------------------------------------------
# splicing and roles

WRONG = "First, x = 3.\nThen 2x = 6. So the answer is \\boxed{6}."
BODY = ("First, x = 3.\n<reflection>Wait, x is 4, not 3.</reflection>\nThen 2x = 8. So the answer "
        "is "
        "\\boxed{8}.")


@pytest.mark.parametrize("name", NAMES)
def test_y_ref_reads_as_prefix_diagnosis_correction_and_ends_with_the_stop_token(name):
    """Guards trap 1: the prefix is y-'s own ids."""
    tokenizer = tokenizer_of(name)
    y = build(tokenizer, WRONG, BODY)
    assert y.text == BODY.replace("<reflection>", "").replace("</reflection>", "")
    assert y.text == decode(tokenizer, y.completion_ids[:-1])
    assert y.completion_ids[-1] == tokenizer.eos_token_id and y.roles[-1] == CORRECTION
    assert y.finished
    assert len(y.roles) == len(y.completion_ids)
    assert (y.problem.uid, y.query, y.group, y.prompt_ids, y.is_reflection) == (
        "p", 7, "p_reflected", [1, 2], True)
    # those of the synthesis are of another density, that of its own prompt
    assert y.sample_logprobs is None
    assert build(tokenizer, WRONG, BODY, decoupled=False).group == "p"


@pytest.mark.parametrize("name", ["bpe", "qwen"])
def test_every_token_that_touches_the_diagnosis_is_diagnosis_and_no_other(name):
    tokenizer = tokenizer_of(name)
    y = build(tokenizer, WRONG, BODY)
    assert by_role(tokenizer, y, PREFIX) == "First, x = 3.\n"
    # ".\n" is one token and touches it
    assert by_role(tokenizer, y, DIAGNOSIS).rstrip("\n") == "Wait, x is 4, not 3."
    assert by_role(tokenizer, y, CORRECTION).lstrip("\n").startswith("Then 2x = 8.")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", ["", ".", ". ", ".\n"])
@pytest.mark.parametrize("head", ["", " ", "\n", "\n\n", "."])
def test_no_diagnosis_character_escapes_its_role_at_any_seam(name, tail, head):
    # brute force: decode the ids one by one, a token owns the characters that appear with it
    tokenizer = tokenizer_of(name)
    before, diagnosis, correction = "x = 3" + tail, head + "Wait, é€ no" + tail, head + "So 4"
    ids, roles = reflect.encode_with_roles(tokenizer, before, diagnosis, correction, PREFIX)
    start, end = len(before), len(before) + len(diagnosis)
    text = before + diagnosis + correction
    assert decode(tokenizer, ids) == text
    for i, role in enumerate(roles):
        # a cut character belongs to all of its tokens
        low = len(decode(tokenizer, ids[:i]).rstrip("\ufffd"))
        high = len(decode(tokenizer, ids[:i + 1]))
        if low < end and high > start:
            assert role == DIAGNOSIS, (text[low:high], role)
        # there, whitespace that no offset claims may turn its neighbour into DIAGNOSIS
        elif name != "trimmed":
            assert role == (PREFIX if low < start else CORRECTION), (text[low:high], role)


@pytest.mark.parametrize("name", NAMES)
def test_preserved_prefix_keeps_the_ids_that_were_sampled(name):
    # The sampled ids need not be the tokenizer's own choice: here y- was sampled in single
    # characters.
    tokenizer = tokenizer_of(name)
    ids = [i for character in WRONG for i in encode(tokenizer, character)]
    wrong = rollout(tokenizer, WRONG, ids=ids)
    assert ids != encode(tokenizer, WRONG)
    y = build(tokenizer, wrong, BODY)
    kept = len("First, x = 3.\n")
    assert y.completion_ids[:kept] == ids[:kept] and y.roles[:kept] == [PREFIX] * kept
    assert y.text.startswith("First, x = 3.\nWait")


def test_seam_of_qwen3_is_spliced_not_joined():
    # "x = 3.\n" + "\nWait": ".\n" and "\n" stay two tokens, although the joined text has the single
    # token ".\n\n"
    tokenizer = tokenizer_of("qwen")
    wrong = rollout(tokenizer, "x = 3.\nSo 6.")
    prefix = encode(tokenizer, "x = 3.\n")
    y = build(tokenizer, wrong, "x = 3.\n<reflection>\nWait, no.</reflection> It is 4.")
    assert y.completion_ids[:len(prefix)] == prefix == wrong.completion_ids[:len(prefix)]
    assert y.completion_ids[len(prefix):len(prefix) + 2] == encode(tokenizer, "\nWait")
    assert encode(tokenizer, "x = 3.\n\nWait") != prefix + encode(tokenizer, "\nWait")
    assert y.text == "x = 3.\n\nWait, no. It is 4."


@pytest.mark.parametrize("name", ["bpe", "qwen"])
def test_divergence_inside_a_token_moves_the_rest_of_it_into_the_new_text(name):
    # y- has ".\n\n" as one token, y_ref keeps only the ".": the token goes, its "." is encoded anew
    # and stays PREFIX
    tokenizer = tokenizer_of(name)
    wrong = rollout(tokenizer, "x = 3.\n\nSo 6.")
    y = build(tokenizer, wrong, "x = 3.<reflection> Wait, no.</reflection> It is 4.")
    assert y.text == "x = 3. Wait, no. It is 4."
    assert preserved_ids(y, wrong) == len(encode(tokenizer, "x = 3"))
    assert by_role(tokenizer, y, PREFIX) == "x = 3."
    assert by_role(tokenizer, y, DIAGNOSIS) == " Wait, no."


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mark", ["é", "€", "𝔸", "🙃", "∑", "未"])
def test_characters_of_several_tokens_at_the_seam_stay_whole(name, mark):
    tokenizer = tokenizer_of(name)
    text = f"a {mark}{mark} b {mark}"
    ids = encode(tokenizer, text)
    for end in range(len(text) + 1):
        n = reflect.token_boundary(tokenizer, ids, text[:end])
        assert text[:end].startswith(decode(tokenizer, ids[:n]))
        assert all(not text[:end].startswith(decode(tokenizer, ids[:m]))
                   for m in range(n + 1, len(ids) + 1))
    wrong = rollout(tokenizer, f"x = {mark}{mark}. Then 6.")
    y = build(tokenizer, wrong,
              f"x = {mark}<reflection>{mark} Wait, {mark}.</reflection>{mark} so 4.")
    assert y.text == f"x = {mark}{mark} Wait, {mark}.{mark} so 4."
    assert f"{mark} Wait, {mark}." in by_role(tokenizer, y, DIAGNOSIS)


def test_bytes_that_are_no_character_can_be_preserved():
    # A policy may sample half a character; it decodes to U+FFFD and must not stop the splice or be
    # encoded anew.
    tokenizer = tokenizer_of("bpe")
    half = encode(tokenizer, "€")[:1]
    assert decode(tokenizer, half) == "\ufffd"
    ids = encode(tokenizer, "x = ") + half + encode(tokenizer, " so. Then 6.")
    wrong = rollout(tokenizer, decode(tokenizer, ids), ids=ids)
    y = build(tokenizer, wrong, "x = \ufffd so.<reflection> Wait.</reflection> It is 4.")
    assert y.completion_ids[:len(encode(tokenizer, "x = ")) + 1] == encode(tokenizer, "x = ") + half
    assert y.text == "x = \ufffd so. Wait. It is 4."


def test_a_token_that_ends_one_character_and_begins_the_next_is_not_split():
    # ids: two bytes of "€" | its last byte and "b". The first two alone are one U+FFFD, as long as
    # "€" but not "€".
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    vocabulary = {token: i for i,
                  token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "¬b"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("¬", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()

    class Fast:
        def decode(self, ids, **kwargs):
            return tokenizer.decode(ids)

    ids = tokenizer.encode("a€b").ids
    assert len(ids) == 4 and Fast().decode(ids[:3]) == "a\ufffd"
    assert [reflect.token_boundary(Fast(), ids, prefix) for prefix in ("", "a", "a€", "a€b")] == [
        0, 1, 1, 4]


def test_boundary_is_found_by_bisection():
    # 4,000 tokens a response and up to 128 candidates a step: a decode per token would take minutes
    tokenizer, calls = tokenizer_of("bpe"), []

    class Counting:
        def decode(self, ids, **kwargs):
            calls.append(len(ids))
            return tokenizer.decode(ids, **kwargs)

    text = "So x = 4. " * 400
    ids = encode(tokenizer, text)
    n = reflect.token_boundary(Counting(), ids, text[:3001])
    assert decode(tokenizer, ids[:n]) == text[:3001] or len(decode(tokenizer, ids[:n + 1])) > 3001
    assert len(calls) < 30


def test_stop_token_of_y_minus_is_never_spliced():
    tokenizer = tokenizer_of("bpe")
    y = build(tokenizer, "So x = 3.", "So x = 3.<reflection> Wait, no.</reflection> It is 4.")
    assert y.completion_ids.count(tokenizer.eos_token_id) == 1
    assert y.text == "So x = 3. Wait, no. It is 4."


def test_leading_whitespace_of_y_minus_survives_a_copy_without_it():
    tokenizer = tokenizer_of("bpe")
    wrong = rollout(tokenizer, "\n\nSo x = 3. Then 6.")
    y = build(tokenizer, wrong, "\nSo x = 3.<reflection> Wait, no.</reflection> It is 4.")
    assert y.text == "\n\nSo x = 3. Wait, no. It is 4."
    assert y.completion_ids[0] == wrong.completion_ids[0]


def test_toy_world_constructions_are_built_exactly():
    toy, tokenizer = pytest.importorskip("toy"), tokenizer_of("toy")
    rng = np.random.default_rng(0)
    for world in ("findx", "countdown"):
        for problem in toy.make_problems(world, "train", 40):
            wrong = toy.wrong_solution(rng, problem.question)
            analysis, prefix, reflection, correction = toy.construction(problem.question, wrong)
            y = build(tokenizer, wrong,
                      f"{prefix}<reflection>{reflection}</reflection>{correction}")
            assert y.text == prefix + reflection + correction
            assert [by_role(tokenizer, y, r) for r in (PREFIX, DIAGNOSIS, CORRECTION)] == [
                prefix, reflection, correction + tokenizer.eos_token]
            assert reflect.reflects(y.text)
            assert not reflect.reflects(toy.solution(rng, problem.question, "direct")[0])


# --------------------------------------------------------------------------------------------------
# parsing and divergence


def test_parsing_strips_only_the_newlines_inside_the_reconstruction_tags():
    body = "\n 1 \n<reflection>\n2 </reflection>\n 3 \n"
    text = f"so:\n<analysis>\n a \n</analysis>\n<reconstruction>{body}</reconstruction>\n<|im_end|>"
    assert parse_synthesis(text) == Synthesis(" 1 \n", "\n2 ", "\n 3 ", True)
    assert parse_synthesis(answer("all")) == Synthesis("", "", "all", False)


@pytest.mark.parametrize("text", [
    "", "x = 4", "<reconstruction>a</reconstruction>", "<analysis>a</analysis>",
    "<analysis>a</analysis><reconstruction>b",
    "<analysis>a<reconstruction>b</reconstruction>",
    "<reconstruction>b</reconstruction><analysis>a</analysis>",
    answer("a</reconstruction>b"), answer("a<reconstruction>b"),
    answer("a", analysis="b</analysis>c"),
    answer("a") * 2,
    answer("a<reflection>b"), answer("a</reflection>b<reflection>c"),
    answer("a<reflection></reflection>b"),
    answer("a<reflection>b</reflection>c<reflection>d</reflection>e"),
    answer("a<reflection> \n</reflection>b"),
])
def test_malformed_answers_are_unparsable(text):
    assert parse_synthesis(text) == "unparsable"
    assert build(tokenizer_of("bpe"), WRONG, "", written=text) == "unparsable"
    assert build(tokenizer_of("bpe"), WRONG, "", written=text, finished=False) == "unfinished"


def test_reflection_tags_may_be_talked_about_in_the_analysis():
    assert parse_synthesis(answer("a", analysis="then <reflection> comes")).tagged is False


@pytest.mark.parametrize("wrong, right, written", [
    ("3 + 4 = 7\nThe answer is \\boxed{7}.", "3 * 4 = 12\nThe answer is \\boxed{12}.",
     "3 + 4 = 7\n<reflection>Wait, 3 + 4 is not the right step here.</reflection>\n3 * 4 = 12\nThe "
     "answer is \\boxed{12}."),
    ("3 * 4 = 13\nSo \\boxed{13}.", "3 * 4 = 12\nSo \\boxed{12}.",
     "3 * 4 = 13\n<reflection>Wait, 3 * 4 is not 13.</reflection>\n3 * 4 = 12\nSo \\boxed{12}."),
    ("3 * 4 = 12\nSo \\boxed{13}.", "3 * 4 = 12\nSo \\boxed{12}.",
     "3 * 4 = 12\nSo \\boxed{13}.\n<reflection>Wait, the answer is not 13.</reflection>\nSo "
     "\\boxed{12}."),
    ("Ann has 3. Bob has 4.5 more. So \\boxed{4.5}.", "Ann has 3. He has 7.5. So \\boxed{7.5}.",
     'Ann has 3. Bob has 4.5 more. <reflection>Wait, "Bob has 4.5 more" is not right.</reflection> '
     'He has 7.5. '
     "So \\boxed{7.5}."),
])
def test_the_rule_keeps_the_wrong_sentence_names_it_and_goes_on_as_the_right_response(
        wrong, right, written):
    text = reflect.rule_synthesis(wrong, right)
    assert text.endswith(f"<reconstruction>{written}</reconstruction>")
    prefix, diagnosis, correction = split_at_divergence(parse_synthesis(text), wrong)
    assert wrong.startswith(prefix) and "Wait, " in diagnosis and reflect.reflects(diagnosis)
    assert right.endswith(correction.strip())


@pytest.mark.parametrize("text, found", [
    ("3 - 14 = 11", [False]), ("14 - 3 = 11 and 2*2=4.", [True, True]), ("3 + 4 + 5 = 12", []),
    ("12 - 4 = 8 / 2", []), ("0.1 + 0.2 = 0.3", [True]), ("1 / 0 = 3", [False]),
    ("10 / 4 = 2.5", [True]), ("7 / 3 = 2.33", [False]), ("1,200 + 1 = 1,201", []),
    ("x2 + 1 = 3", []),
    ("-3 * 2 = -6", [True]),
    ("5 * 3 = 150", [False])])
def test_equations_are_checked_exactly_and_only_where_they_stand_alone(text, found):
    assert [reflect.holds(equation) for equation in reflect.EQUATION.findall(text)] == found


def test_the_rule_takes_the_pair_with_the_longest_common_beginning():
    def response(text, reward, grade="wrong", finished=True):
        return rollout(tokenizer_of("bpe"), text, finished, reward=reward, grade=grade)
    right = response("A. B. C. D.", 1.0, "correct")
    far, near, early = response("X. B.", 0.0), response("A. B. X. D.", 0.0), response("A. B.", 0.0)
    cut = response("A. B. C. X", 0.0, "truncated", finished=False)
    unread = response("A. B. C. X.", 0.0, "timeout")  # nobody knows that it is wrong
    assert reflect.rule_pairs([far, early, near, cut, unread, right]) == [(near, right)]
    # its answer is right, its step is not
    lucky = response("A. B. 3 - 14 = 11. D.", 1.0, "correct")
    assert reflect.rule_pairs([far, lucky]) == []
    unsure = response("A. B. Wait, 3 + 4 is not 7. D.", 1.0, "correct")  # nor is what it doubts
    assert reflect.rule_pairs([far, unsure]) == []
    assert reflect.rule_pairs([near, lucky, right]) == [(near, right)]
    assert reflect.rule_pairs([early, right]) == [] and reflect.rule_pairs([near]) == []


def untagged(body, wrong):
    return split_at_divergence(parse_synthesis(answer(body)), wrong)


def test_without_tags_y_ref_diverges_where_it_stops_agreeing():
    wrong = "x = 12. So 2x = 24."
    assert untagged("x = 12. Wait, x is 13. Then 26.", wrong) == (
        "x = 12. ", "Wait, x is 13.", " Then 26.")
    assert untagged("x = 12.\nWait, 3.5 is it!\nThen 26.", wrong) == (
        "x = 12.", "\nWait, 3.5 is it!", "\nThen 26.")


@pytest.mark.parametrize("wrong, body, prefix", [
    ("x = 12. So 24.", "x = 13, no wait. Ok.", "x = "),
    ("x = 12. So 24.", "x = 125, no wait. Ok.", "x = "),
    ("x = 3.14. So.", "x = 3.2, no wait. Ok.", "x = "),
    ("x = 3. So", "x = 3.5, no wait. Ok.", "x = "),
    ("x = 1,000. So", "x = 1,200, no wait. Ok.", "x = "),
    ("we subtract 5. So", "we subtotal, no wait. Ok.", "we "),
    ("so \\frac{1}{2}. A", "so \\fbox{1}, no wait. Ok.", "so "),
    ("x = 3. So", "x = 3. Wait. Ok.", "x = 3. "),
    ("x = 3.5 So", "x = 3, no wait. Ok.", "x = "), ("x = 125. So", "x = 12, no wait. Ok.", "x = "),
])
def test_divergence_never_cuts_a_number_a_word_or_a_command(wrong, body, prefix):
    assert untagged(body, wrong)[0] == prefix


def test_missing_tags_build_with_the_first_new_sentence_as_diagnosis():
    tokenizer = tokenizer_of("bpe")
    y = build(tokenizer, "First, x = 3. Then 6.", "First, x = 3. Wait, x is 4. Then 8.")
    assert by_role(tokenizer, y, PREFIX) + by_role(
        tokenizer, y, DIAGNOSIS) == "First, x = 3. Wait, x is 4."
    assert by_role(tokenizer, y, DIAGNOSIS).strip() == "Wait, x is 4."
    assert by_role(tokenizer, y, CORRECTION) == " Then 8.<|im_end|>"
    assert y.text == "First, x = 3. Wait, x is 4. Then 8."


def test_whitespace_before_the_reflection_that_y_minus_lacks_belongs_to_the_diagnosis():
    synthesis = parse_synthesis(answer("x = 3.\n\n<reflection>Wait.</reflection>\nSo 4."))
    assert split_at_divergence(synthesis, "x = 3. So 6.") == ("x = 3.", "\n\nWait.", "\nSo 4.")
    assert split_at_divergence(synthesis, "x = 3.\nSo 6.") == ("x = 3.\n", "\nWait.", "\nSo 4.")


@pytest.mark.parametrize("reason, wrong, body", [
    ("empty_prefix", WRONG, "<reflection>Wait.</reflection> So 8."),
    ("empty_prefix", WRONG, "No. So 8. Ok."),
    ("empty_prefix", WRONG, " \n<reflection>Wait.</reflection> So 8."),
    ("empty_prefix", "\n\nFirst, x = 3.", "<reflection>Wait.</reflection> So 8."),
    ("prefix_not_verbatim", WRONG, "First x = 3.<reflection> Wait.</reflection> So 8."),
    ("prefix_not_verbatim", WRONG, "Then, x = 3.<reflection> Wait.</reflection> So 8."),
    ("prefix_not_verbatim", WRONG, WRONG + " More.<reflection> Wait.</reflection> So 8."),
    # half a number is no copy
    ("prefix_not_verbatim", "x = 12.", "x = 1<reflection> Wait.</reflection> So 8."),
    ("no_divergence", WRONG, WRONG), ("no_divergence", WRONG, "First, x = 3.\n"),
    ("no_divergence", WRONG, ""),
    ("no_divergence", WRONG, "First, x = 3.  "),
    ("no_divergence", WRONG, "First, x = 3.<reflection>\nThen 2x = 6.</reflection> So the answer"),
    ("no_correction", WRONG, "First, x = 3.<reflection> Wait.</reflection>"),
    ("no_correction", WRONG, "First, x = 3. Wait, no."),
    # a line said twice is no diagnosis
    ("no_reflection", WRONG, "First, x = 3. First, x = 3. The answer is 1."),
    # nor is a silent repair
    ("no_reflection", "0.6 + 0.1 = 0.8. So 0.8.", "0.6 + 0.1 = 0.7. So 0.7."),
    ("special_token", WRONG, "First, x = 3.<reflection> Wait.</reflection> So 8.<|im_end|> Ok."),
    ("special_token", WRONG, "First, x = 3.<reflection> Wait.<|im_start|></reflection> So 8."),
    ("special_token", WRONG, "First, x = 3.<reflection> Wait.</reflection> So <right>8.</right>"),
])
def test_each_defect_has_its_drop_reason(reason, wrong, body):
    assert reason in reflect.DROP_REASONS
    assert build(tokenizer_of("bpe"), wrong, body) == reason


def test_too_long_is_measured_with_the_stop_token():
    tokenizer = tokenizer_of("bpe")
    length = len(build(tokenizer, WRONG, BODY).completion_ids)
    assert build(tokenizer, WRONG, BODY, max_new_tokens=length - 1) == "too_long"
    assert not isinstance(build(tokenizer, WRONG, BODY, max_new_tokens=length), str)


def test_a_synthesis_cut_after_its_closing_tag_is_complete():
    tokenizer = tokenizer_of("bpe")
    assert build(tokenizer, WRONG, BODY, finished=False).text == build(tokenizer, WRONG, BODY).text


def test_all_of_y_minus_may_be_preserved():
    y = build(tokenizer_of("bpe"), WRONG, WRONG
              + "<reflection>\nWait, x is 4.</reflection> So \\boxed{8}.")
    assert y.text == WRONG + "\nWait, x is 4. So \\boxed{8}."


# --------------------------------------------------------------------------------------------------
# full and copy


def test_full_reconstruction_is_correction_throughout_except_for_a_tagged_reflection():
    tokenizer = tokenizer_of("bpe")
    y = build(tokenizer, WRONG, "Now x = 4. So \\boxed{8}.", prefix_mode="full")
    assert set(y.roles) == {CORRECTION} and y.text == "Now x = 4. So \\boxed{8}."
    assert y.group == "p_reflected"
    y = build(tokenizer, WRONG, "Now x = 3.<reflection> Wait, 4.</reflection> So \\boxed{8}.",
              prefix_mode="full")
    assert by_role(tokenizer, y, DIAGNOSIS) == " Wait, 4." and PREFIX not in y.roles
    assert by_role(tokenizer, y, CORRECTION) == "Now x = 3. So \\boxed{8}.<|im_end|>"
    assert build(tokenizer, WRONG, WRONG, prefix_mode="full") == "no_divergence"


@pytest.mark.parametrize("wrong,body,kept,correction", [
    ("Let x = 3.\nThen 2x = 5.\nSo \\boxed{5}.",
     "Let x = 3.\nThen 2x = 5.\n<reflection>Wait, 2x = 6.</reflection>\n"
     "Then 2x = 6. So \\boxed{6}.",
     "Let x = 3.\n", "Then 2x = 6. So \\boxed{6}."),
    ("Let x = 3. Then 2x = 5, so \\boxed{5}.",
     "Let x = 3. Then 2x = 5,<reflection> no wait, 6.</reflection> Then 2x = 6. So \\boxed{6}.",
     "Let x = 3. ", "Then 2x = 6. So \\boxed{6}."),
    ("So 2x = 5. \\boxed{5}", "So 2x = 5.<reflection> Wait.</reflection> So 2x = 6. \\boxed{6}", "",
     "So 2x = 6. \\boxed{6}")])
def test_replace_keeps_what_stands_before_the_sentence_with_the_error(
        wrong, body, kept, correction):
    """InT's construction. Bug: the error stays, or the diagnosis does, or the kept part has new
    ids."""
    tokenizer = tokenizer_of("bpe")
    r = rollout(tokenizer, wrong)
    y = build(tokenizer, r, body, prefix_mode="replace")
    assert y.text == kept + correction and DIAGNOSIS not in y.roles
    n = y.roles.count(PREFIX)
    assert y.completion_ids[:n] == r.completion_ids[:n]
    assert kept.startswith(decode(tokenizer, y.completion_ids[:n]))
    again = "So 2x = 5.<reflection> Wait.</reflection> So 2x = 5. \\boxed{5}"  # repairs nothing
    assert build(tokenizer, "So 2x = 5. \\boxed{5}", again,
                 prefix_mode="replace") == "no_divergence"


@pytest.mark.parametrize("correction,faithful", [
    ("19 + 9 = 28, \\boxed{28}.", True), ("19 + 9 = 11. \\boxed{28}", False),
    ("It is \\boxed{28}.", None),
    ("2 * 3 = 6, 6 - 1 = 4.", False),
    ("2 + 9 is not 11. 2 + 9 = 11.", False), ("2 + 9 is not 17.", True)])
def test_a_construction_is_faithful_where_all_it_newly_states_holds(correction, faithful):
    """Bugs: the preserved mistake counts against it, or a text without equations for it; a right
    step that is denied and then repeated counts as reasoning."""
    y = build(tokenizer_of("bpe"), WRONG + " 1 + 1 = 3.",
              WRONG + " 1 + 1 = 3.<reflection> Wait.</reflection> " + correction)
    assert y.faithful is faithful
    assert reflect.is_kept(y, "faithful") == (faithful is not False) and reflect.is_kept(y, "all")


def test_copy_mode_takes_the_ids_of_the_right_response():
    tokenizer = tokenizer_of("bpe")
    wrong = rollout(tokenizer, WRONG)
    right = rollout(tokenizer, "x = 4. \\boxed{8}", reward=1.0, sample_logprobs=[-1.0])
    y = reflect.copy_correct(wrong, right, decoupled=True)
    assert y.completion_ids == right.completion_ids and y.completion_ids is not right.completion_ids
    assert set(y.roles) == {CORRECTION} and len(y.roles) == len(y.completion_ids)
    assert y.text == right.text
    assert (y.problem.uid, y.query, y.group, y.is_reflection, y.sample_logprobs) == (
        "p", 7, "p_reflected", True, None)
    assert reflect.copy_correct(wrong, right, decoupled=False).group == "p"


# --------------------------------------------------------------------------------------------------
# candidate selection, Eq. 3


def group_of(name, n_right, n_wrong, n_truncated=0):
    tokenizer = tokenizer_of("bpe")
    kinds = [("right", 1.0, True)] * n_right + [("wrong", 0.0, True)] * n_wrong + [
        ("cut", 0.0, False)] * n_truncated
    return [rollout(tokenizer, f"{name} {kind} {i}", group=name, reward=reward, finished=finished)
            for i, (kind, reward, finished) in enumerate(kinds)]


def select(rollouts, n_pos=2, n_neg=4, m_max=4, key=(0, 3, 5)):
    pairs, counts = select_pairs(rollouts, n_pos=n_pos, n_neg=n_neg, m_max=m_max, key=key)
    return [(wrong.text, right.text) for wrong, right in pairs], counts


@pytest.mark.parametrize("grade", ("timeout", "error"))
def test_a_response_that_the_grader_could_not_judge_is_no_mistake_to_reflect_on(grade):
    rollouts = group_of("a", 2, 4)
    rollouts[2].grade = grade
    pairs, counts = select(rollouts)
    assert sorted(wrong for wrong, _ in pairs) == ["a wrong 3", "a wrong 4", "a wrong 5"]
    assert counts == {"eligible": 1, "candidates": 3, "skipped_truncated": 0}


@pytest.mark.parametrize("n_right, n_wrong, eligible", [
    (2, 4, 1), (1, 4, 0), (2, 3, 0), (8, 0, 0), (0, 8, 0), (4, 4, 1)])
def test_a_group_is_eligible_exactly_from_the_thresholds_on(n_right, n_wrong, eligible):
    pairs, counts = select(group_of("a", n_right, n_wrong))
    assert counts["eligible"] == eligible
    assert counts["candidates"] == len(pairs) == eligible * min(4, n_wrong)


def test_pairs_stay_within_the_group_and_no_wrong_response_is_used_twice():
    pairs, counts = select(group_of("a", 3, 5) + group_of("b", 3, 5) + group_of("c", 1, 7), m_max=3)
    assert counts == {"eligible": 2, "candidates": 6, "skipped_truncated": 0}
    assert all(w[:2] == r[:2] and "wrong" in w and "right" in r for w, r in pairs)
    assert len({w for w, _ in pairs}) == 6


def test_truncated_responses_count_as_wrong_but_are_never_used():
    pairs, counts = select(group_of("a", 2, 1, n_truncated=3))
    assert counts == {"eligible": 1, "candidates": 1, "skipped_truncated": 3}
    assert pairs[0][0] == "a wrong 2"
    assert select(group_of("a", 2, 0, n_truncated=4))[1]["candidates"] == 0


def test_the_choice_does_not_depend_on_other_groups_or_the_process():
    a, b = group_of("a", 4, 8), group_of("b", 4, 8)
    alone = select(a)[0]
    assert [p for p in select(b + a)[0] if p[0][0] == "a"] == alone
    # pinned: a choice that hung on hash() would change with PYTHONHASHSEED
    assert [(w.split()[-1], r.split()[-1]) for w, r in alone] == [
        ("7", "0"), ("5", "3"), ("8", "2"), ("10", "0")]
    assert select(a, key=(0, 3, 6))[0] != alone and select(a, key=(1, 3, 5))[0] != alone
    assert [(w[1:], r[1:]) for w, r in select(b)[0]] != [(w[1:], r[1:]) for w, r in alone]


def test_right_and_wrong_responses_are_drawn_uniformly():
    rollouts, seen = group_of("a", 3, 6), {}
    for step in range(600):
        for wrong, right in select(rollouts, m_max=2, key=(0, 3, step))[0]:
            seen[wrong] = seen.get(wrong, 0) + 1
            seen[right] = seen.get(right, 0) + 1
    assert all(abs(seen[f"a wrong {i}"] - 200) < 60 for i in range(3, 9))  # 200 +- 12
    assert all(abs(seen[f"a right {i}"] - 400) < 80 for i in range(3))     # 400 +- 16



# --------------------------------------------------------------------------------------------------
# prompts

LATEX = "Let $f(x)=\\frac{x}{2}$, {question} {wrong} {right} {0} {} \\1 \\g<0>, find $\\boxed{}$"


@pytest.mark.parametrize("template", ["long", "short"])
@pytest.mark.parametrize("kind", ["micro", "full", "teacher"])
def test_braces_and_backslashes_of_latex_reach_the_prompt_unchanged(template, kind):
    tokenizer = tokenizer_of("bpe")
    problem = Problem("u", "Q " + LATEX, "1")
    if kind == "teacher":
        ids = reflect.synthesis_prompt(tokenizer, problem, "", "R " + LATEX, template, "teacher")
    else:
        ids = reflect.synthesis_prompt(tokenizer, problem, "W " + LATEX, "R " + LATEX, template,
                                       kind)
        assert decode(tokenizer, ids).count("W " + LATEX) == 1
    text = decode(tokenizer, ids)
    assert text.count("Q " + LATEX) == text.count("R " + LATEX) == 1
    assert text.count(LATEX) == (2 if kind == "teacher" else 3)
    # the plain prompt's instruction has no place here
    assert "step by step, and put your final answer" not in text


def test_short_prompts_are_pinned():
    # the cold start writes the same prompts; a space more and the toy policy no longer knows what
    # is asked of it
    tokenizer, problem = tokenizer_of("toy"), Problem("u", "x*7-21=35", "8")
    for mode in ("micro", "full"):
        ids = reflect.synthesis_prompt(tokenizer, problem, "Try 6: ", "Try 8: ", "short", mode)
        text = f"x*7-21=35\n<wrong>Try 6: </wrong><right>Try 8: </right><{mode}>"
        assert ids == render_prompt(tokenizer, text, "")
    ids = reflect.synthesis_prompt(tokenizer, problem, "", "Try 8: ", "short", "teacher")
    assert ids == render_prompt(tokenizer, "x*7-21=35\n<right>Try 8: </right><solve>", "")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_level"])
def test_a_response_is_shown_as_it_is_but_for_what_really_encodes_to_unk(kind):
    """Bug: pieces smaller than a character share its offsets; copied by offset the text doubled,
    round after round."""
    tokenizer = tokenizer_with_unk(kind)
    for text in ("x = 5, then y = 6", "So 😀 ∠ABC", "∴ x = 3"):
        shown = reflect._showable(tokenizer, text)
        assert shown == (text if kind != "word_level" else shown)
        assert tokenizer.unk_token_id not in encode(tokenizer, shown)
    assert reflect._showable(tokenizer, "x = 5") == "x = 5"
    if kind == "word_level":
        assert reflect._showable(tokenizer, "x = blah 5 😀") == "x =  5 "
    for text in ("😀 x = 5. " * 4000, "<mi" * 6000 + "<micro>" + "cro>" * 6000):
        start = time.perf_counter()
        reflect._showable(tokenizer, text)
        assert time.perf_counter() - start < 5


def test_tags_and_special_tokens_in_a_response_cannot_break_the_prompt():
    tokenizer = tokenizer_of("bpe")
    bad = ("x</wrong></reconstruction><|im_end|>\n<|im_start|>user y<mi<micro>cro>"
           "<|im_<|im_end|>end|> z")
    ids = reflect.synthesis_prompt(tokenizer, Problem("u", "Q", "1"), bad, bad, "short")
    clean = reflect.synthesis_prompt(tokenizer, Problem("u", "Q", "1"), "x\nuser y z",
                                     "x\nuser y z", "short")
    assert ids == clean


@pytest.mark.parametrize("name", ["bpe", "toy"])
def test_whatever_the_policy_samples_can_be_put_into_a_prompt(name):
    # "." followed by " low. " reads ". low. ", which the toy tokenizer cuts at ". " and then has no
    # token for the l
    tokenizer = tokenizer_of(name)
    rng = np.random.default_rng(0)
    problem = Problem("u", "x*7-21=35", "8")
    for _ in range(200):
        text = decode(tokenizer, rng.integers(len(tokenizer), size=40).tolist())
        ids = reflect.synthesis_prompt(tokenizer, problem, text, text, "short")
        assert decode(tokenizer, ids).count("<wrong>") == 1
    if name == "toy":
        vocabulary = tokenizer.get_vocab()
        text = decode(tokenizer, [vocabulary["."], vocabulary[" low. "]])
        reflect.synthesis_prompt(tokenizer, problem, text, text, "short")


@pytest.mark.parametrize("mode", ["micro", "full"])
def test_the_worked_example_obeys_the_format_it_teaches(mode):
    tokenizer, prompt = tokenizer_of("bpe"), reflect.TEMPLATES["long"][mode]
    example = prompt.split("# Example\n")[1].split("# Your turn")[0]
    wrong = example.split("## Incorrect response\n")[1].split("\n## Correct")[0]
    written = example.split("## Answer\n")[1]
    y = build(tokenizer, wrong, "", written=written, prefix_mode=mode)
    assert "\\boxed{5}" in y.text and "<analysis>" not in y.text
    if mode == "micro":
        assert by_role(tokenizer, y,
                       PREFIX) == wrong.split("\n")[0] + "\n" and reflect.reflects(y.text)
        form = prompt.split("# Example")[0].split("before or after it:\n")[1]
        assert parse_synthesis(form).tagged


def test_unknown_templates_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="'long' | 'short'"):
        reflect.synthesis_prompt(tokenizer_of("bpe"), Problem("u", "Q", "1"), "a", "b", "medium")
    with pytest.raises(ValueError, match="'micro' | 'full'"):
        reflect.synthesis_prompt(tokenizer_of("bpe"), Problem("u", "Q", "1"), "a", "b", "short",
                                 "copy")


# --------------------------------------------------------------------------------------------------
# metrics and markers


def test_a_pairs_synthesis_does_not_depend_on_the_other_queries_of_its_rank(monkeypatch):
    """Guards trap 7: noise keyed by a pair's number among all pairs."""
    tokenizer, asked = tokenizer_of("bpe"), []

    def generate(model, prompts, n, *, keys, **_):
        asked.append(keys)
        return [[Completion([tokenizer.eos_token_id], [0.0], True)] for _ in prompts]

    monkeypatch.setattr(reflect, "generate", generate)
    pairs = [(rollout(tokenizer, "wrong", query=query), rollout(tokenizer, "right", query=query))
             for query in (1, 1, 2, 2)]
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096))
    for some in (pairs, pairs[2:]):
        reflect.construct(model, tokenizer, some, prefix_mode="micro", template="short",
                          decoupled=True, key=(0, 1, 5), max_new_tokens=54)
    assert asked[0][2:] == asked[1] and len(set(asked[0])) == 4


@pytest.mark.parametrize("diagnosis, train_prefix, mask, weighed", [
    ("mask", True, "110011", "110011"), ("mask", False, "000011", "110011"),
    ("ots", True, "111111", "111111"), ("ots", False, "001111", "111111"),
    ("train", True, "111111", "110011"), ("train", False, "001111", "110011")])
def test_what_each_token_is_for_follows_from_its_role_alone(diagnosis, train_prefix, mask,
                                                            weighed):
    """Bug: an inserted diagnosis in the gradient, or weighed by another flag than its own."""
    roles = [PREFIX, PREFIX, DIAGNOSIS, DIAGNOSIS, CORRECTION, CORRECTION]
    found = reflect.token_masks(roles, diagnosis=diagnosis, train_prefix=train_prefix)
    assert ["".join(str(int(x)) for x in values) for values in found] == [mask, weighed]


def y_ref(group, reward, roles, **fields):
    return Rollout(PROBLEM, group, [1], [5] * len(roles), roles, True, "", is_reflection=True,
                   reward=reward, **fields)


def test_metrics_match_a_count_by_hand():
    roles = [PREFIX, PREFIX, DIAGNOSIS, DIAGNOSIS, CORRECTION]
    outcomes = [
        y_ref("a_reflected", 1.0, roles, logprobs=[-1, -2, -6, -4, -3],
              ots_weights=[1, 2, 0.1, 0.5, 4], faithful=False),
        y_ref("a_reflected", 0.0, roles[1:], faithful=True, logprobs=[-3, -2, -4, -5],
              ots_weights=[3, 0.3, 0.5, 2]),
        # not part of the update: no log-probs, but it counts elsewhere
        y_ref("b_reflected", 1.0, roles),
        "unparsable", "unfinished", "prefix_not_verbatim", "too_long", "prompt_too_long",
    ]
    selected = {"eligible": 2, "candidates": 8, "skipped_truncated": 1}
    m = means(reflect_sums(selected, outcomes, kept=3))
    expected = selected | {
        "kept": 3, "parsed": 5 / 8, "verbatim": 3 / 4, "correct": 2 / 3, "mixed_groups": 1 / 2,
        "length": 14 / 3,
        "faithful": 1 / 2, "faithful_right": 0,
        "logprob_prefix": -2, "logprob_diagnosis": -4, "logprob_correction": -4,
        "ots_prefix": 2, "ots_diagnosis": 0.35, "ots_correction": 3, "ots_first_diagnosis": 0.2}
    expected |= {f"dropped_{reason}": float(reason in outcomes) for reason in reflect.DROP_REASONS}
    assert m == pytest.approx({f"reflect/{key}": value for key, value in expected.items()})


def test_sums_of_two_ranks_add_up_to_those_of_one():
    selected = {"eligible": 1, "candidates": 2, "skipped_truncated": 0}
    a = [y_ref("a", 1.0, [PREFIX, DIAGNOSIS, CORRECTION], logprobs=[-1.0] * 3,
               ots_weights=[1.0] * 3), "unparsable"]
    b = [y_ref("b", 0.0, [CORRECTION] * 2, logprobs=[-2.0] * 2, ots_weights=[0.5] * 2),
         y_ref("b", 1.0, [CORRECTION])]
    one = reflect_sums({k: 2 * v for k, v in selected.items()}, a + b, kept=3)
    first, second = reflect_sums(selected, a, kept=1), reflect_sums(selected, b, kept=2)
    assert set(first) == set(second) == set(one)
    assert {k: first[k] + second[k] for k in first} == one
    assert means(first)["reflect/verbatim"] == 1
    assert "reflect/verbatim" not in means(second)  # nothing was preserved: no rate, not 100 %


def test_a_step_without_candidates_has_counts_and_no_means():
    m = means(reflect_sums({"eligible": 0, "candidates": 0, "skipped_truncated": 0}, [], 0))
    assert m["reflect/kept"] == m["reflect/eligible"] == m["reflect/dropped_unparsable"] == 0
    assert not m.keys() & {
        f"reflect/{mean}" for mean in ("correct", "parsed", "mixed_groups", "ots_prefix", "length")}


DOUBTS = ("42-21=21 low. Wait, 6 is too low. Try 8", "So x = 3.\nWait. It is", "Hmm, it is odd",
          "but wait, 3", "Let me re-check this", "let me recheck", "Let's double-check the sum",
          "let me redo it", "Hold on, is it", "I made a mistake above",
          "I made an arithmetic error", "Actually, 7*8 is 56", "That's wrong, since",
          "No. Actually it is 5", "On second thought",
          "Let us try again")
PROSE = ("", "So x = 3 and the answer is \\boxed{3}.", "They wait for 5 minutes",
         "Wait for 5 hours", "Wait times", "The waiter brings 3", "the actual value",
         "Let me verify by substitution", "the error term is", "Let us compute",
         "the mistake Bob made", "this is right",
         "let us reduce the fraction",
         "Let's redouble")


@pytest.mark.parametrize("text, expected", [(text, True) for text in DOUBTS]
                         + [(text, False) for text in PROSE])
def test_markers_tell_doubt_from_ordinary_prose(text, expected):
    assert reflect.reflects(text) is expected


def test_every_reason_that_is_returned_is_in_the_list():
    # one that is not would be a KeyError in the middle of a run
    source = Path(reflect.__file__).read_text()
    returned = set(re.findall(r'(?:return|else) "(\w+)"', source))
    assert len(returned) == 9 and returned | {"prompt_too_long"} == set(reflect.DROP_REASONS)
