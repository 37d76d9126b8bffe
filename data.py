"""Problems, the chat prompt, the tokenizer, and the order in which problems are visited.

A problem file is jsonl, one {"uid", "question", "answer"[, "level"]} a line; `python -m
tools.prepare` writes the files of public data sets, `python toy.py` the files of the toy worlds.

`render_prompt` is the only place where a question becomes token ids; training and evaluation both
call it. Deliberately missing: system prompts, few-shot examples, thinking mode (the paper's policy
never uses it), data loaders.
"""
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

import jsonl
import reward

BOXED_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# noise stream of `order`, so that no other draw from `seed` shares its noise
ORDER_STREAM = 1


@dataclass
class Problem:
    uid: str
    question: str
    answer: str
    level: str = ""  # any label to break scores down by
    prompt_ids: list[int] = field(default_factory=list, repr=False)  # (P,), set by encode_prompts


# --------------------------------------------------------------------------------------------------
# Problem files

def load_problems(path: str | Path, limit: int = 0, check_answers: bool = True) -> list[Problem]:
    """Problems of a jsonl file, the first `limit` of them if limit > 0. Also reads the keys "id"
    and "problem".

    check_answers = False skips the check that the grader can read the answers, which takes seconds.

    Every defect is a ValueError naming path:line, because one bad line found after a night of
    sampling is expensive.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no problem file at {path}; `python toy.py findx --levels=1` "
                                "writes data/findx, `python -m tools.prepare` public data sets")
    problems, seen = [], {}  # seen: uid -> line number
    for number, line in jsonl.lines(path):
        if limit and len(problems) == limit:
            break
        where = f"{path}:{number}"
        problem = _problem_of(jsonl.parse(line, where), where)
        if problem.uid in seen:
            raise ValueError(f"{where}: uid {problem.uid!r} already stands on line "
                             f"{seen[problem.uid]}; samples and results go by uid; make it unique")
        seen[problem.uid] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problems; expected one JSON object per line")
    if not check_answers:
        return problems
    for problem, why in zip(problems, unusable_answers([p.answer for p in problems]), strict=True):
        if why:
            raise ValueError(f"{path}:{seen[problem.uid]}: {why}")
    prose = [p for p in problems if _is_prose(p.answer)]
    if prose:
        print(f"WARNING: {path}:{seen[prose[0].uid]}: gold answer {prose[0].answer!r} is "
              f"prose{f' (and {len(prose) - 1} more)' if prose[1:] else ''}: only the same words "
              "would equal it; is a number meant?", flush=True)
    return problems


def _is_prose(answer: str) -> bool:
    """Whether an answer has three or more words, a digit and no math symbols: "Ann has 72 clips.",
    not "July 4, 2011"."""
    words = re.findall(r"[A-Za-z]+", answer)
    mathematics = re.search(r"[\\$={}^_<>]", answer)
    return len(words) >= 3 and any(c.isdigit() for c in answer) and not mathematics


def unusable_answers(answers: list[str]) -> list[str]:
    """Reason why each answer cannot serve as gold ("" if it can): an answer that the grader cannot
    read gives reward 0 to all but the same text.

    Numbers need no worker; the grader's workers read about a hundred other answers a second.
    """
    distinct = list(dict.fromkeys(answers))
    with ThreadPoolExecutor(2) as threads:
        reasons = dict(zip(distinct, threads.map(reward.fault_of_gold, distinct), strict=True))
    return [reasons[answer] for answer in answers]


def _problem_of(row: dict, where: str) -> Problem:
    fields = {}
    for name, other in (("uid", "id"), ("question", "problem"), ("answer", "answer")):
        value = row.get(name, row.get(other))
        if type(value) not in (str, int, float) or not str(value).strip():
            raise ValueError(f"{where}: no {name} (keys: {', '.join(map(str, row)) or 'none'}); "
                             "each line needs \"uid\", \"question\" and \"answer\"")
        fields[name] = str(value)
    return Problem(**fields, level=str(row.get("level", "")))


def save_problems(problems: list[Problem], path: str | Path,
                  extra: dict[str, dict] | None = None) -> None:
    """Write problems as jsonl, atomically. extra: uid -> additional keys, which load_problems
    ignores."""
    rows = []
    for p in problems:
        row = {"uid": p.uid, "question": p.question, "answer": p.answer}
        row |= {"level": p.level} if p.level else {}
        rows.append(row | (extra or {}).get(p.uid, {}))
    jsonl.write(path, rows)


def file_mark(path: str | Path) -> str:
    """CRC-32 of a file's content, by which a run recognises its problems; "" without a file."""
    return f"{zlib.crc32(Path(path).read_bytes()):08x}" if Path(path).is_file() else ""


# --------------------------------------------------------------------------------------------------
# Tokenizer and prompt

def load_tokenizer(folder: str | Path):
    """The checkpoint's own tokenizer, a transformers PreTrainedTokenizerFast; refused if it cannot
    render a chat."""
    # imported here: transformers takes seconds to import, and reading problems does not need it
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as e:
        checkpoints = [*sorted(Path(folder).glob("step_*")), *Path(folder).glob("final")]
        if checkpoints:
            why = f"a run's folder; pass a checkpoint of it, such as {checkpoints[-1]}"
        elif Path(folder).is_dir():
            why = f"{str(e).splitlines()[0]}; copy the checkpoint's tokenizer files into it"
        else:
            why = ("no folder here, and the hub did not serve it; check the name and the network, "
                   "or make it first (the config file says how) and pass its folder")
        raise ValueError(f"no tokenizer at {folder}: {why}") from None
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer at {folder} has no chat template; use an "
                         "instruction-tuned checkpoint or add chat_template.jinja to the folder")
    _check_generation_prompt(tokenizer, folder)
    _check_vocabulary(tokenizer, Path(folder) / "config.json")
    return tokenizer


def _check_generation_prompt(tokenizer, folder) -> None:
    """Refuse a template that ends after the user's turn: the policy would be trained without its
    assistant header."""
    def render(*contents: str, add_generation_prompt: bool) -> str:
        turns = [{"role": role, "content": content}
                 for role, content in zip(("user", "assistant"), contents)]
        return tokenizer.apply_chat_template(turns, tokenize=False,
                                             add_generation_prompt=add_generation_prompt)

    prompt = render("Q", add_generation_prompt=True)
    if prompt == render("Q", add_generation_prompt=False):  # legitimate for [INST] Q [/INST]
        header = render("Q", "ANSWER", add_generation_prompt=False).partition("ANSWER")[0]
        if header.strip() != prompt.strip():
            raise ValueError(f"the chat template at {folder} ignores add_generation_prompt: after "
                             f"the user's turn it lacks {header.removeprefix(prompt)!r}; add it, "
                             "inside {% if add_generation_prompt %}")


def _check_vocabulary(tokenizer, config: Path) -> None:
    """Refuse tokens without an embedding row (id >= vocab_size in config.json), by name."""
    rows = 0
    if config.is_file():
        rows = json.loads(config.read_text(encoding="utf-8")).get("vocab_size", 0)
    extra = [token for token, i in tokenizer.get_vocab().items() if rows and i >= rows]
    if extra:
        raise ValueError(f"the tokenizer has {', '.join(sorted(extra)[:5])} beyond the {rows} rows "
                         f"of the embedding ({config}: vocab_size); take such added tokens out of "
                         "the tokenizer's files, or add rows "
                         "(model.resize_token_embeddings(len(tokenizer)) in transformers) and "
                         "save both")


def render_prompt(tokenizer, question: str, instruction: str = BOXED_INSTRUCTION) -> list[int]:
    """Token ids (P,) of one user turn and the assistant header, with thinking mode off.

    The template writes every special token itself, BOS included, so the tokenizer must add none of
    its own. Raises ValueError when the text holds characters that the tokenizer does not know.
    """
    turns = [{"role": "user", "content": question + instruction}]
    text = tokenizer.apply_chat_template(turns, tokenize=False,
                                         add_generation_prompt=True, enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        chars = [c for c in dict.fromkeys(question + instruction)
                 if unknown in tokenizer(c, add_special_tokens=False)["input_ids"]]
        missing = " ".join(map(repr, chars[:9])) or "the chat template's own words"
        raise ValueError(f"the tokenizer has no token for {missing} in the prompt "
                         f"{question[:60]!r}; is this the tokenizer these problems and this "
                         "instruction were made for?")
    return ids


def stop_ids_of(tokenizer, config_eos: tuple[int, ...]) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's eos, those of (generation_)config.json, and
    <|endoftext|>.

    These sources disagree in practice: Qwen3's tokenizer names only <|im_end|>, its generation
    config also <|endoftext|>, and a sampler that misses a stop id samples on to max_new_tokens.
    """
    ids = {*config_eos, tokenizer.eos_token_id, tokenizer.get_vocab().get("<|endoftext|>")} - {None}
    if not ids:
        raise ValueError("neither the tokenizer nor the model config names an end-of-sequence "
                         "token; set eos_token_id")
    return tuple(sorted(ids))


def encode_prompts(tokenizer, problems: list[Problem], instruction: str) -> None:
    """Set prompt_ids of every problem; not stored by uid, because two files may share uids."""
    for p in problems:
        p.prompt_ids = render_prompt(tokenizer, p.question, instruction)


def check_prompts_fit(problems: list[Problem], max_new_tokens: int, context: int) -> None:
    """Refuse a prompt that leaves less than max_new_tokens of a model's context (lengths in
    tokens)."""
    for p in problems:
        if len(p.prompt_ids) + max_new_tokens > context:
            raise ValueError(f"problem {p.uid!r}: a prompt of {len(p.prompt_ids)} tokens + "
                             f"max_new_tokens = {max_new_tokens} do not fit the model's context "
                             f"of {context}; lower max_new_tokens or remove the problem")


# --------------------------------------------------------------------------------------------------
# Order: a function of counters, so that resuming and sharding over ranks need no state

@lru_cache(maxsize=2)
def order(n_problems: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation (n_problems,) in which epoch number `epoch` visits the problems."""
    noise = np.random.SeedSequence((seed, ORDER_STREAM, epoch))
    return np.random.Generator(np.random.Philox(noise)).permutation(n_problems)


def problems_for_step(problems: list[Problem], seed: int, step: int,
                      per_step: int) -> list[tuple[int, Problem]]:
    """The `per_step` queries of step `step` as (query_index, problem); query_index counts over the
    whole run.

    Epochs are concatenated and nothing is dropped, so a step may span two permutations. Such a step
    (or one with per_step > the number of problems) can hold the same problem twice, under different
    query_index.
    """
    n, batch = len(problems), []
    for query in range(step * per_step, (step + 1) * per_step):
        epoch, position = divmod(query, n)
        batch.append((query, problems[order(n, seed, epoch)[position]]))
    return batch
