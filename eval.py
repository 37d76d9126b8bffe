"""Pass@k with intervals, truncation, and the paper's reflection analysis (§4.3), from any Hugging
Face folder.

    python eval.py config/eval_toy.py --init_from=out/toy/tapo/step_000060 --out=out/toy/tapo/eval
    python eval.py config/eval_aime.py --init_from=Qwen/Qwen3-8B --out=out/base  # §4.1: contests
    python eval.py config/filter_deepscaler.py --init_from=out/aime/coldstart/final  # §4.1

Sampler, grader and prompt are those of training. Every graded sample is appended to
OUT.samples.jsonl, and the same command resumes there after a kill. Deliberately missing: majority
voting, multiple processes (noise depends on the problem alone, so sharding problems by index would
not change a sample).
"""
import collections
import functools
import json
import math
import os
import re
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import jsonl
import reflect
import reward
from checkpoint import weights_mark
from configurator import at_least, between, configure, one_of, print_config, run_script, write_json
from data import (
    BOXED_INSTRUCTION,
    Problem,
    check_prompts_fit,
    encode_prompts,
    load_problems,
    load_tokenizer,
    save_problems,
    stop_ids_of,
)
from hf import load_hf
from memory import rows_that_fit
from model import num_params
from parallel import pick_device
from rollout import EVALUATION, completion_text, generate

# --- what is measured -----------------------------------------------------------------------------
init_from = ""                      # Hugging Face folder or hub id
problems = ""                       # problem files, separated by commas; each is scored separately
n_problems: at_least(0) = 0         # problems taken from the start of each file; 0 = all
instruction = BOXED_INSTRUCTION     # appended to every question; the same as in training
out = "out/eval"                    # writes OUT.json, OUT.problems.txt and OUT.samples.jsonl
resume = True                       # reuse the samples in OUT.samples.jsonl; False overwrites them
seed: at_least(0) = 0               # noise depends on (seed, uid, sample) only, not on the model
# --- sampling -------------------------------------------------------------------------------------
samples: at_least(1) = 16           # per problem; 1 sample on 30 problems: standard error 9 points
temperatures = (1.0, 0.6)           # one per setting: 1.0 as in training, 0.6 as in §4.1
top_ps = (1.0, 0.9)                 # one per temperature: 1.0 as in training, 0.9 as in §4.1
pass_k = (1,)                       # values of k in Pass@k
max_new_tokens: at_least(1) = 8192  # affects the score: longer responses count as wrong
max_rows: at_least(0) = 256         # rows that decode at once; 0: as many as free memory holds
device: one_of("auto", "cpu", "cuda") = "auto"
dtype: one_of("float32", "bfloat16") = "float32"
compile = False                     # torch.compile the blocks; takes a minute at start
threads: at_least(0) = 0            # CPU threads; 0 = torch's choice
# --- optional: a judge for ERR behind any OpenAI-compatible address (key: OPENAI_API_KEY) ---------
judge_url = ""                      # e.g. http://localhost:8000/v1
judge_model = ""
# --- optional: keep the problems of middling accuracy in the first setting ------------------------
filter_out = ""                     # problem file to write, with the accuracy of each problem
filter_low: between(0, 1) = 0.125
filter_high: between(0, 1) = 0.875

# fields that identify a stored sample
SAMPLE_KEY = ("temperature", "top_p", "uid", "problem", "sample")
OTHER_OUT = "choose another --out, or --resume=False to overwrite it"


# --------------------------------------------------------------------------------------------------
# Statistics: pure functions

def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): probability that k of n samples, drawn without replacement, include
    one of the c right ones."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples per problem; raise "
                         "samples or lower k")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(values, weights=None, draws: int = 2000,
                       seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap percentile interval of sum(values) / sum(weights), resampling problems (P,)
    with replacement.

    weights = None: all ones, i.e. the mean. Resamples whose weights sum to 0 are skipped.
    """
    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(draws):
        again = rng.integers(len(values), size=len(values))
        if weights[again].sum() > 0:
            ratios.append(values[again].sum() / weights[again].sum())
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def dsr_err(correct, reflects) -> dict:
    """§4.3 on boolean arrays (P, n), over the problems whose pass rate is strictly between 0 and 1.

    DSR: share of correct responses that never reflect. ERR: share of reflecting responses that end
    correct; this rule assumes that they located and diagnosed the error (the judge checks it). None
    if the denominator is 0. Intervals are over problems.
    """
    correct, reflects = (np.asarray(a, bool) for a in (correct, reflects))
    mixed = correct.any(1) & ~correct.all(1)
    correct, reflects = correct[mixed], reflects[mixed]
    result = {"mixed_problems": int(mixed.sum())}
    for name, hit, base in (("DSR", correct & ~reflects, correct),
                            ("ERR", reflects & correct, reflects)):
        some, interval = bool(base.any()), name + "_interval"
        result[name] = float(hit.sum() / base.sum()) if some else None
        result[interval] = list(bootstrap_interval(hit.sum(1), base.sum(1))) if some else None
    return result


def summarise(rows_of: dict[str, list[dict]], levels: dict[str, str], ks: tuple[int, ...]) -> dict:
    """Metrics of one problem set in one sampling setting. rows_of: uid -> its n sample rows;
    levels: uid -> level."""
    def share(*grades):
        return float(np.mean([row["grade"] in grades for rows in rows_of.values() for row in rows]))

    def scores(problems):
        result = {}
        for k in ks:
            values = [pass_at_k(p["n"], p["c"], k) for p in problems]
            low, high = bootstrap_interval(values)
            result[str(k)] = {"value": float(np.mean(values)), "low": low, "high": high}
        truncated, total = (sum(p[key] for p in problems) for key in ("truncated", "n"))
        return {"pass@k": result, "truncated": truncated / total}

    per_problem = [{"uid": uid, "level": levels[uid], "n": len(rows),
                    "c": sum(map(is_correct, rows)),
                    "truncated": sum(row["grade"] == "truncated" for row in rows)}
                   for uid, rows in rows_of.items()]
    by_level = collections.defaultdict(list)
    for p in per_problem:
        by_level[p["level"]].append(p)
    reflects, lengths = (np.array([[row[key] for row in rows] for rows in rows_of.values()])
                         for key in ("reflects", "tokens"))
    return scores(per_problem) | {
        "no_answer": share("no_answer"),
        "unparsable": share("unparsable"),
        "timeout": share("timeout", "error"),  # of the grader; correctness unknown
        "length": float(lengths.mean()),
        "reflect_rate": float(reflects.mean()),
        **dsr_err([[is_correct(row) for row in rows] for rows in rows_of.values()], reflects),
        "levels": {level: {"problems": len(members)} | scores(members)
                   for level, members in sorted(by_level.items())} if len(by_level) > 1 else {},
        "per_problem": per_problem,
    }


# --------------------------------------------------------------------------------------------------
# Sampling

def load_sets(c) -> dict[str, list[Problem]]:
    """Problem sets by name. uids must be unique over all of them: they key the samples and the
    noise."""
    sets, holder = {}, {}
    for path in c.problems.split(","):
        name = Path(path).stem
        if name in sets:
            raise ValueError(f"two problem files are called {name}; rename one, results are kept "
                             "by name")
        sets[name] = load_problems(path, c.n_problems)
        for p in sets[name]:
            if p.uid in holder:
                raise ValueError(f"uid {p.uid!r} is in {holder[p.uid]} and in {name}; make them "
                                 "unique")
        holder |= {p.uid: name for p in sets[name]}
    return sets


def sample_key(row: dict) -> tuple:
    return tuple(row[key] for key in SAMPLE_KEY)


def is_correct(row: dict) -> bool:
    """Whether a stored sample counts as right. A truncated one never does: its grade is
    "truncated"."""
    return row["grade"] == "correct"


def load_model(c, tokenizer, problems: list[Problem]):
    """The model in c.dtype on c.device and its stop ids. Checks that every prompt fits its
    context."""
    device = pick_device(c.device)
    if c.threads:
        torch.set_num_threads(c.threads)
    model = load_hf(c.init_from, dtype=getattr(torch, c.dtype), device=device,
                    num_tokens=len(tokenizer), compile=c.compile)
    check_prompts_fit(problems, c.max_new_tokens, model.config.max_position_embeddings)
    stop_ids = stop_ids_of(tokenizer, model.config.eos_token_id)
    print(f"{num_params(model):,} parameters on {device}, stop ids {stop_ids}", flush=True)
    return model, stop_ids


def sample_all(c, problems: list[Problem],
               path: Path) -> dict[tuple[float, float], dict[str, list[dict]]]:
    """(temperature, top-p) -> uid -> its c.samples graded rows. Samples only what the file at
    `path` does not hold."""
    tokenizer = load_tokenizer(c.init_from)
    encode_prompts(tokenizer, problems, c.instruction)
    # a stored sample belongs to one prompt and one gold answer; if either changes, sample again
    marks = {p.uid: zlib.crc32(json.dumps([p.prompt_ids, p.answer]).encode()) for p in problems}
    header = {"weights": weights_mark(c.init_from), "seed": c.seed,
              "max_new_tokens": c.max_new_tokens, "dtype": c.dtype}
    stored = collections.defaultdict(dict)
    for row in jsonl.begin_or_resume(path, header, OTHER_OUT, resume=c.resume):
        del row["text"]  # texts stay in the file: they may not fit in memory
        stored[sample_key(row)[:-1]][row["sample"]] = row
    model, rows, results = None, 0, {}
    with open(path, "a", encoding="utf-8") as file:
        for temperature, top_p in zip(c.temperatures, c.top_ps, strict=True):
            groups = {p.uid: stored[temperature, top_p, p.uid, marks[p.uid]] for p in problems}
            missing = [p for p in problems if not set(range(c.samples)) <= set(groups[p.uid])]
            if missing and model is None:
                model, stop_ids = load_model(c, tokenizer, problems)
                longest = max(len(p.prompt_ids) for p in problems)
                rows = c.max_rows or rows_that_fit(model, longest, c.max_new_tokens)
            # problems per write to disk: 4 full batches, as the end of each call leaves rows idle
            at_once = max(1, -(-4 * rows // c.samples))
            bar = tqdm(total=len(problems), initial=len(problems) - len(missing), unit=" problems",
                       desc=f"T {temperature} top-p {top_p}", disable=not missing)
            for start in range(0, len(missing), at_once):
                now = missing[start:start + at_once]
                completions = generate(
                    model, [p.prompt_ids for p in now], c.samples,
                    keys=[(c.seed, EVALUATION, 0, zlib.crc32(p.uid.encode())) for p in now],
                    max_new_tokens=c.max_new_tokens, stop_ids=stop_ids, temperature=temperature,
                    top_p=top_p, max_rows=rows)
                drawn = [(p, i, completion, completion_text(tokenizer, completion))
                         for p, group in zip(now, completions, strict=True)
                         for i, completion in enumerate(group)]
                grades = reward.grade_many([text for *_, text in drawn],
                                           [p.answer for p, *_ in drawn])
                for (p, i, completion, text), grade in zip(drawn, grades, strict=True):
                    row = {"temperature": temperature, "top_p": top_p, "uid": p.uid,
                           "problem": marks[p.uid], "sample": i, "tokens": len(completion.ids),
                           "answer": grade.answer,
                           # truncated counts as wrong, as in training
                           "grade": grade.status if completion.finished else "truncated",
                           "reflects": reflect.reflects(text)}
                    groups[p.uid][i] = row
                    file.write(json.dumps(row | {"text": text}, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(now))
            bar.close()
            results[temperature, top_p] = {uid: [group[i] for i in range(c.samples)]
                                           for uid, group in groups.items()}
    return results


# --------------------------------------------------------------------------------------------------
# Judge model (optional): does a reflecting response locate and diagnose a real error?

JUDGE_PROMPT = """\
Below are a math problem and one student's response, in which the student doubts an earlier step.
Did the student point at a step that really is wrong? Did they say correctly what is wrong with it?
Think briefly, then end with exactly one line: LOCATED: yes|no DIAGNOSED: yes|no

# Problem
{question}

# Response
{response}"""


def ask_judge(url: str, model: str, question: str, response: str) -> dict | None:
    """{"located", "diagnosed"} from an OpenAI-compatible chat endpoint, or None if its reply has no
    verdict line."""
    content = JUDGE_PROMPT.format(question=question, response=response)
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions",
                                     json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        text = json.load(reply)["choices"][0]["message"]["content"]
    verdicts = re.findall(r"LOCATED:\W*(yes|no)\W+DIAGNOSED:\W*(yes|no)", text or "", re.IGNORECASE)
    if not verdicts:
        return None
    located, diagnosed = (word.lower() == "yes" for word in verdicts[-1])
    return {"located": located, "diagnosed": diagnosed}


def judge_all(c, problems: list[Problem], rows: list[dict], samples_path: Path,
              path: Path) -> dict[tuple, dict | None]:
    """Verdicts on `rows` by sample_key. Verdicts already stored at `path` are not requested again.

    If the judge fails, only the remaining verdicts are lost: all samples are on disk before the
    first call.
    """
    header = {"judge_model": c.judge_model, "prompt": zlib.crc32(JUDGE_PROMPT.encode()),
              "samples": weights_mark(c.init_from)}
    verdicts = {sample_key(row): row["verdict"]
                for row in jsonl.begin_or_resume(path, header, OTHER_OUT, resume=c.resume)}
    wanted = {sample_key(row) for row in rows} - set(verdicts)
    question = {p.uid: p.question for p in problems}
    stored = jsonl.read(samples_path)[1:]  # the first line is the header
    todo = list({sample_key(row): row for row in stored if sample_key(row) in wanted}.values())
    pool, done = ThreadPoolExecutor(8), 0
    asked = pool.map(functools.partial(ask_judge, c.judge_url, c.judge_model),
                     [question[row["uid"]] for row in todo], [row["text"] for row in todo])
    bar = tqdm(asked, total=len(todo), desc="judge", disable=not todo)
    with open(path, "a", encoding="utf-8") as file:
        try:
            for row, verdict in zip(todo, bar, strict=True):
                kept = {key: row[key] for key in SAMPLE_KEY}
                print(json.dumps(kept | {"verdict": verdict}), file=file, flush=True)
                verdicts[sample_key(row)] = verdict
                done += 1
        # unreachable, timed out, disconnected, or not a chat completion
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as e:
            print(f"WARNING: the judge at {c.judge_url} failed after {done} of {len(todo)} "
                  f"verdicts ({type(e).__name__}: {e}); no sample is lost, the same command asks "
                  "for the rest", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return verdicts


# --------------------------------------------------------------------------------------------------
# Printing and the script

def table(rows: list[list[str]]) -> str:
    """Rows of cells in aligned columns: the first left-aligned, all others right-aligned."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, widths)])
                     for name, *cells in rows)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def percent_with_interval(score: dict) -> str:
    """{"value": 0.373, "low": 0.349, "high": 0.398} -> '37.3 [34.9, 39.8]'."""
    value, low, high = (percent(score[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def results_table(settings: list[dict]) -> str:
    """One line per problem set and setting, one more per level; in %, 95 % intervals over problems
    in brackets."""
    rates = ("no_answer", "unparsable", "timeout", "reflect_rate", "DSR", "ERR")

    def scores(part):
        passes = part["pass@k"].values()
        return [*map(percent_with_interval, passes), percent(part["truncated"])]

    rows = [["set", "T", "top-p", "problems", "samples",
             *(f"pass@{k}" for k in settings[0]["pass@k"]), "truncated", "length", "no answer",
             "unparsable", "timeout", "reflects", "DSR", "ERR"]]
    for s in settings:
        rows.append([s["set"], f"{s['temperature']:g}", f"{s['top_p']:g}",
                     str(len(s["per_problem"])), str(s["samples"]), *scores(s),
                     f"{s['length']:.0f}", *(percent(s[rate]) for rate in rates)])
        for level, part in s["levels"].items():
            rows.append([f"  level {level or '-'}", "", "", str(part["problems"]), "",
                         *scores(part), "", *[""] * len(rates)])
    return table(rows)


def problems_table(settings: list[dict]) -> str:
    """One line per problem and setting: the counts behind the means."""
    rows = [["problem", "level", "set", "T", "top-p", "right", "samples", "truncated"]]
    for s in settings:
        rows += [[p["uid"], p["level"], s["set"], f"{s['temperature']:g}", f"{s['top_p']:g}",
                  str(p["c"]), str(p["n"]), str(p["truncated"])] for p in s["per_problem"]]
    return table(rows)


def check_config(c) -> None:
    """Refuse before sampling settings that would fail after it; messages give value, rule, fix."""
    for key in ("init_from", "problems"):
        if not getattr(c, key):
            raise ValueError(f"{key} is not set; pass --{key}=PATH")
    if len(c.temperatures) != len(c.top_ps) or not c.temperatures:
        raise ValueError(f"temperatures = {c.temperatures} and top_ps = {c.top_ps} form pairs; "
                         "give as many of both")
    if not (c.pass_k and all(type(k) is int and 1 <= k <= c.samples for k in c.pass_k)):
        raise ValueError(f"pass_k = {c.pass_k}: every k must be in 1..samples = {c.samples}; raise "
                         "samples or lower k")
    if c.filter_out and c.filter_low > c.filter_high:
        raise ValueError(f"filter_low = {c.filter_low}, filter_high = {c.filter_high}: expected 0 "
                         "<= low <= high <= 1")
    if bool(c.judge_url) != bool(c.judge_model):
        raise ValueError(f"judge_url = {c.judge_url!r} and judge_model = {c.judge_model!r}: set "
                         "both or neither")


def write_filtered(c, problems: list[Problem], rows_of: dict[str, list[dict]]) -> None:
    """§4.1: save the problems whose accuracy is within [filter_low, filter_high], each with its
    accuracy."""
    accuracy = {uid: sum(map(is_correct, rows)) / len(rows) for uid, rows in rows_of.items()}
    kept = [p for p in problems if c.filter_low <= accuracy[p.uid] <= c.filter_high]
    if not kept:
        mean = sum(accuracy.values()) / len(accuracy)
        raise ValueError(f"this run cannot learn: no problem's accuracy is within [{c.filter_low}, "
                         f"{c.filter_high}], the mean is {mean:.2f}; take "
                         f"{'a stronger model or easier' if mean < 0.5 else 'harder'} problems")
    save_problems(kept, c.filter_out, {p.uid: {"accuracy": accuracy[p.uid]} for p in kept})
    too_hard = sum(value < c.filter_low for value in accuracy.values())
    print(f"filter: {c.filter_out} has {len(kept):,} of {len(problems):,} problems; "
          f"{too_hard:,} were too hard, {len(problems) - len(kept) - too_hard:,} too easy")


def main() -> None:
    config = configure(globals())
    c = SimpleNamespace(**config)
    check_config(c)
    sets = load_sets(c)
    print_config(config, c.out + ".json")

    problems = [p for members in sets.values() for p in members]
    result_path, samples_path, judge_path = (
        Path(c.out + end) for end in (".json", ".samples.jsonl", ".judge.jsonl"))
    sampled = sample_all(c, problems, samples_path)
    settings, to_judge = [], []
    for (temperature, top_p), rows_of in sampled.items():
        for name, members in sets.items():
            mine = {p.uid: rows_of[p.uid] for p in members}
            how = {"set": name, "temperature": temperature, "top_p": top_p, "samples": c.samples,
                   "max_new_tokens": c.max_new_tokens}
            levels = {p.uid: p.level for p in members}
            settings.append(how | summarise(mine, levels, c.pass_k))
            mixed = [rows for rows in mine.values() if 0 < sum(map(is_correct, rows)) < len(rows)]
            to_judge.append([row for rows in mixed for row in rows if row["reflects"]])
    result = {"config": config, "model": c.init_from, "settings": settings}
    write_json(result_path, result)
    Path(c.out + ".problems.txt").write_text(problems_table(settings) + "\n", encoding="utf-8")

    print(f"\n{c.init_from}, at most {c.max_new_tokens:,} tokens; in %, 95 % intervals over "
          "problems")
    print(results_table(settings), flush=True)
    if c.judge_url:
        verdicts = judge_all(c, problems, sum(to_judge, []), samples_path, judge_path)
        for s, rows in zip(settings, to_judge, strict=True):
            judged = [(is_correct(row), verdicts[sample_key(row)]) for row in rows
                      if verdicts.get(sample_key(row))]
            right = sum(correct and v["located"] and v["diagnosed"] for correct, v in judged)
            s |= {"judged": len(judged), "to_judge": len(rows),
                  "ERR_judge": right / len(judged) if judged else None}
            print(f"{s['set']} T {s['temperature']:g}: ERR {percent(s['ERR_judge'])} by "
                  f"{c.judge_model}, {len(judged)} of {len(rows)} reflecting responses judged")
        write_json(result_path, result)
    if c.filter_out:
        write_filtered(c, problems, next(iter(sampled.values())))
    print(f"written: {result_path}, {samples_path}")


if __name__ == "__main__":
    run_script(main)
