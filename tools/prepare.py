"""Problem files from public data sets.

    python -m tools.prepare deepscaler --eval_files=data/aime24.jsonl,data/aime25.jsonl
    python -m tools.prepare aime24                        # also aime25, hmmt_feb25, math500, gsm8k
    python -m tools.prepare aime24 --from=~/aime.parquet  # offline: a .jsonl, .json, .parquet copy
    python -m tools.prepare gsm8k_train --solutions=True  # with worked solutions, for coldstart.py
    python -m tools.prepare word_problems                 # see tools/word_problems.py; three files
"""
import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import answers
import jsonl
from configurator import run_script
from data import Problem, load_problems, save_problems, unusable_answers
from tools import word_problems


@dataclass
class Source:
    repo: str  # data set id on the Hugging Face hub
    file: str  # the only file read
    licence: str  # as the data set's card states it
    train: bool = False  # training sets are tested for overlap with the evaluation sets


SOURCES = {
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json", "MIT",
                         train=True),
    "gsm8k_train": Source("openai/gsm8k", "main/train-00000-of-00001.parquet", "MIT", train=True),
    "gsm8k": Source("openai/gsm8k", "main/test-00000-of-00001.parquet", "MIT"),
    "math500": Source("HuggingFaceH4/MATH-500", "test.jsonl",
                      "none stated on the card; MATH itself is MIT"),
    "aime24": Source("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet",
                     "none stated on the card; the problems are the MAA's"),
    "aime25": Source("MathArena/aime_2025", "data/train-00000-of-00001.parquet",
                     "CC BY-NC-SA 4.0; the problems are the MAA's"),
    "hmmt_feb25": Source("MathArena/hmmt_feb_2025", "data/train-00000-of-00001.parquet",
                         "CC BY-NC-SA 4.0; the problems are HMMT's"),}


def download(source: Source) -> Path:
    """Local path of the source's file, fetched through the hub's own cache."""
    try:
        from huggingface_hub import hf_hub_download
        return Path(hf_hub_download(source.repo, source.file, repo_type="dataset"))
    # hub errors come from several HTTP libraries; the remedy is the same
    except Exception as e:
        raise ValueError(f"cannot download {source.file} of {source.repo} from the hub "
                         f"({type(e).__name__}); fetch it "
                         "elsewhere and pass --from=PATH (.jsonl, .json or .parquet)") from None


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl, .json (a list of objects) or .parquet file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError(f"reading {path} needs pyarrow; `pip install pyarrow`, or pass a "
                             ".jsonl copy") from None
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as e:
            raise ValueError(
                f"{path} is not a readable parquet file ({str(e).splitlines()[0]})") from None
    if path.suffix == ".jsonl":
        return [jsonl.parse(line, f"{path}:{number}") for number, line in jsonl.lines(path)]
    if path.suffix != ".json":
        raise ValueError(
            f"{path}: unknown kind of file {path.suffix!r}; expected .jsonl, .json or .parquet")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid json ({e})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects")
    return rows


def normalise_rows(rows: list[dict], name: str) -> tuple[list[Problem], dict[str, int]]:
    """Rows of any known layout -> problems without duplicates, and the number of dropped rows by
    reason.

    A row without a unique text id gets its index in the source as uid, so that uids do not depend
    on filtering. Copies of a question with the same answer become one problem; if their answers
    differ all copies are dropped (DeepScaleR holds such pairs).
    """
    dropped = dict.fromkeys(("no question", "no answer", "unparsable answer", "duplicate",
                             "copies disagree"), 0)
    complete: list[Problem] = []
    ids = [row.get("uid") or row.get("id") for row in rows]
    count = Counter(uid for uid in ids if isinstance(uid, str))
    for i, row in enumerate(rows, 1):
        question = _first(row, "question", "problem", "Question", "Problem")
        answer = _first(row, "answer", "final_answer", "expected_answer", "Answer")
        # GSM8K: worked solution, four hashes, answer; with thousands separators
        if "####" in answer:
            answer = answer.rsplit("####", 1)[1].strip().replace(",", "")
        if not question or not answer:
            dropped["no answer" if question else "no question"] += 1
            continue
        uid = ids[i - 1]
        uid = uid if isinstance(uid, str) and count[uid] == 1 else f"{name}-{i:05d}"
        complete.append(Problem(uid, question, answer, _first(row, "level", "difficulty")))
    by_text: dict[str, list[Problem]] = {}
    for problem, why in zip(complete, unusable_answers([p.answer for p in complete]), strict=True):
        if why:
            dropped["unparsable answer"] += 1
        else:
            by_text.setdefault(" ".join(problem.question.lower().split()), []).append(problem)
    problems = []
    for copies in by_text.values():
        if len({answers.normalise(p.answer) for p in copies}) > 1:
            dropped["copies disagree"] += len(copies)
        else:
            problems.append(copies[0])
            dropped["duplicate"] += len(copies) - 1
    return problems, dropped


def worked_solutions(rows: list[dict]) -> dict[str, str]:
    """GSM8K: question -> worked solution without calculator annotations <<2*3=6>>, ending with the
    boxed answer."""
    solutions = {}
    for row in rows:
        steps, marked, answer = _first(row, "answer").rpartition("####")
        if not marked:
            raise ValueError(f"no worked solution for {_first(row, 'question')[:60]!r}: no line "
                             "#### ends its answer")
        steps = re.sub(r"<<[^<>]*>>", "", steps).strip()
        answer = answer.strip().replace(",", "")
        solutions[_first(row, "question")] = f"{steps}\nThe answer is \\boxed{{{answer}}}."
    return solutions


def _first(row: dict, *names: str) -> str:
    """First non-empty value among these keys, as text; "" if there is none."""
    return next((str(row[n]).strip() for n in names if row.get(n) is not None
                 and str(row[n]).strip()), "")


def overlapping(train: list[Problem], evaluation: list[Problem], n: int = 8, share: float
                = 0.5) -> set[str]:
    """Uids of training problems that repeat an evaluation problem.

    Two problems match when at least `share` of the shorter one's word n-grams occur in the other. A
    single common n-gram is not enough: "m and n are relatively prime positive integers. Find m + n"
    occurs in a thousand problems.
    """
    evaluation_grams = [_ngrams(p.question, n) for p in evaluation]
    holders: dict[tuple, list[int]] = {}  # n-gram -> the evaluation problems that contain it
    for i, grams in enumerate(evaluation_grams):
        for gram in grams:
            holders.setdefault(gram, []).append(i)
    found = set()
    for problem in train:
        grams, common = _ngrams(problem.question, n), {}
        for gram in grams:
            for i in holders.get(gram, ()):
                common[i] = common.get(i, 0) + 1
        if any(count >= share * min(len(grams), len(evaluation_grams[i]))
               for i, count in common.items()):
            found.add(problem.uid)
    return found


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Word n-grams, of letters and digits only; a text of fewer than n words is one gram."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}


def main() -> None:
    """Prepare one data set; see the docstring of this file."""
    parser = argparse.ArgumentParser(prog="python -m tools.prepare", allow_abbrev=False,
                                     description="prepare a problem file")
    parser.add_argument("name", help=" | ".join([*SOURCES, "word_problems"]))
    parser.add_argument("--from", dest="path", default="",
                        help="local .jsonl, .json or .parquet instead of the hub "
                        "(word_problems: a folder with its five files)")
    parser.add_argument("--out", default="",
                        help="problem file to write, default data/NAME.jsonl (word_problems: a "
                        "folder)")
    parser.add_argument("--solutions", choices=("True", "False"), default="False",
                        help="gsm8k_train: keep the worked solutions, for coldstart.py")
    parser.add_argument("--eval_files", default="",
                        help="training sets: problem files not to overlap with, separated "
                        "by commas; default: the evaluation sets already prepared beside --out")
    args = parser.parse_args()
    if args.name == "word_problems":
        counts = word_problems.prepare(Path(args.out or "data/word_problems"), Path(args.path)
                                       if args.path else None)
        for split, (problems, solved) in counts.items():
            print(f"word_problems_{split}.jsonl: {problems:,} problems, {solved:,} with a worked "
                  "solution")
        for name, source in word_problems.SOURCES.items():
            print(f"{name}: {source.repo}, licence: {source.licence}")
        return
    if args.name not in SOURCES:
        raise ValueError(
            f"unknown data set {args.name!r}; known: {', '.join(SOURCES)}, word_problems")
    if args.solutions == "True" and args.name != "gsm8k_train":
        raise ValueError(
            f"--solutions=True: {args.name} has no worked solutions here; use it with gsm8k_train")
    source, out = SOURCES[args.name], Path(args.out or f"data/{args.name}.jsonl")
    rows = read_rows(args.path or download(source))
    problems, dropped = normalise_rows(rows, args.name)
    if source.train:
        beside = [out.with_name(f"{name}.jsonl") for name, s in SOURCES.items() if not s.train]
        files = args.eval_files.split(",") if args.eval_files else [path for path in beside
            if path.is_file()]
        for path in files:
            repeated = overlapping(problems, load_problems(path))
            dropped[f"in {Path(path).name}"] = len(repeated)
            problems = [p for p in problems if p.uid not in repeated]
        if not files:
            print("WARNING: no evaluation file known, overlap was not tested; prepare those first "
                  "or pass --eval_files")
    if not problems:
        raise ValueError(
            f"none of the {len(rows)} rows of {args.path or source.repo} is a usable problem; "
            f"keys of the first: {', '.join(rows[0]) if rows else 'none'}")
    extra = None
    if args.solutions == "True":
        worked = worked_solutions(rows)
        extra = {p.uid: {"solution": worked[p.question]} for p in problems}
    save_problems(problems, out, extra)
    print(f"{args.name}: {len(rows):,} rows -> {len(problems):,} problems in {out}")
    print("dropped: " +
          (", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
           or "none"))
    print(f"source:  {args.path or f'{source.repo} ({source.file})'}")
    print(f"licence: {source.licence}")


if __name__ == "__main__":
    run_script(main)
