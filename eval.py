"""
Pass@k with intervals, truncation, and the paper's reflection analysis (§4.3), from any Hugging Face folder.

    python eval.py config/eval_toy.py --init_from=out/toy/step_000060 --out=out/toy/eval
    python eval.py config/eval_aime.py --init_from=Qwen/Qwen3-8B --out=out/eval/base      # §4.1: Pass@1, Pass@5, 80 samples
    python eval.py config/filter_deepscaler.py --init_from=out/coldstart                   # §4.1: keep accuracy in [0.125, 0.875]
    python eval.py --compare=base.json,tapo.json                                           # paired, problem by problem
    python eval.py --compare=grpo_s0.json+grpo_s1.json,tapo_s0.json+tapo_s1.json           # groups of seeds, paired by seed

Sampler, grader and prompt are those of training. Every sample is appended to OUT.samples.jsonl as soon as it is graded; the
same command continues there after a kill. Deliberately missing: majority voting, several processes (problems are dealt by
index, so that is a slice away).
"""
import collections
import json
import math
import os
import re
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configurator import configure, diff_configs, print_config, run_script
from data import BOXED_INSTRUCTION, Problem, check_prompt_fits, load_problems, load_tokenizer, render_prompt, stop_ids_of

# --- what is measured --------------------------------------------------------------------------------------------------
init_from = ""                 # Hugging Face folder or hub id
problems = ""                  # problem files, separated by commas; each is scored by itself
world = ""                     # or a toy world: 'findx' | 'chain'
split = "test"                 # of the toy world
n_problems = 0                 # the first so many of each file; 0 = all (the toy world needs a number)
instruction = BOXED_INSTRUCTION  # appended to every question; the same as in training
out = "out/eval"               # writes OUT.json and OUT.samples.jsonl
resume = True                  # read back what OUT.samples.jsonl holds; False starts it anew
seed = 0                       # of the noise, which depends on (seed, uid, sample) only: two models see the same
# --- sampling ----------------------------------------------------------------------------------------------------------
samples = 16                   # per problem; with 30 problems the standard error of 1 is 9 points, of 16 it is 2.3
temperatures = (1.0, 0.6)      # the settings are pairs (temperature, top-p): what training samples from, ...
top_ps = (1.0, 0.9)            # ... and the paper's (§4.1)
pass_k = (1,)                  # the k of Pass@k
max_new_tokens = 8192          # the cap belongs to the score: longer responses count as wrong
max_rows = 256                 # rows that decode at once
device = "auto"                # 'auto' | 'cpu' | 'cuda'
dtype = "float32"              # 'float32' | 'bfloat16'
threads = 0                    # CPU threads; 0 = torch's choice
# --- optional: a judge for ERR, behind any OpenAI-compatible address; its key is read from the environment's OPENAI_API_KEY --
judge_url = ""                 # e.g. http://localhost:8000/v1
judge_model = ""
# --- optional: keep the problems of the right difficulty (uses the first setting) ------------------------------------------
filter_out = ""                # problem file to write, accuracy beside each problem
filter_low = 0.125
filter_high = 0.875
# --- instead of sampling: compare results --------------------------------------------------------------------------------
compare = ""                   # OUT.json files separated by commas, the first is the baseline; seeds of a method joined by +
compare_out = ""               # also write the comparison as json
config = configure(globals())


# ----------------------------------------------------------------------------------------------------------------------
# Statistics: pure functions

def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the probability that k of n samples, drawn without replacement, include one of the c right."""
    if k > n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples per problem; use samples >= {k} or a smaller k")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(values, weights=None, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of sum(values) / sum(weights) when the problems (P,) are drawn again with replacement.

    weights None means ones: a mean. Resamples whose weights sum to 0 are left out.
    """
    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(draws):
        again = rng.integers(len(values), size=len(values))
        if weights[again].sum() > 0:
            ratios.append(values[again].sum() / weights[again].sum())
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def sign_flip_p(differences, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p that paired differences (P,) have mean 0: how often random signs give a sum as large in size.

    All 2^P sign patterns up to P = 16 (differences of 0 have no sign), else `draws` random ones plus the observed.
    """
    d = np.asarray(differences, float)
    d = d[d != 0]
    if len(d) == 0:
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-9)  # a pattern with the same sum in another order of addition must count
    if len(d) <= 16:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((abs(signs @ d) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = sum(abs((1 - 2 * rng.integers(2, size=len(d))) @ d) >= observed for _ in range(draws))
    return float((1 + hits) / (1 + draws))


def t_interval(values) -> tuple[float, float]:
    """95 % interval of the mean of a few seeds (n >= 2) under Student's t; (nan, nan) for one."""
    values = np.asarray(values, float)
    df = len(values) - 1
    if df < 1:
        return math.nan, math.nan
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
    t = table[df - 1] if df <= len(table) else 1.96 + 2.372 / df + 2.82 / df ** 2  # 97.5 % quantile and its expansion
    half = t * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def dsr_err(correct, reflects, located) -> dict:
    """§4.3 on boolean arrays (P, n), over the problems whose pass rate is strictly between 0 and 1.

    DSR: of the correct responses, the share that never reflects. ERR: of the responses that reflect, the share that
    located the error and ends correct. None where nothing is to be divided. Intervals are over problems.
    """
    correct, reflects, located = (np.asarray(a, bool) for a in (correct, reflects, located))
    mixed = correct.any(1) & ~correct.all(1)
    correct, reflects, located = correct[mixed], reflects[mixed], located[mixed]
    result = {"mixed_problems": int(mixed.sum())}
    for name, hit, base in (("DSR", correct & ~reflects, correct), ("ERR", reflects & located & correct, reflects)):
        found = base.any()
        result[name] = float(hit.sum() / base.sum()) if found else None
        result[name + "_interval"] = list(bootstrap_interval(hit.sum(1), base.sum(1))) if found else None
    return result


def summarise(rows_of: dict[str, list[dict]], levels: dict[str, str], ks: tuple[int, ...]) -> dict:
    """The numbers of one problem set at one setting. rows_of: uid -> its n sample rows; levels: uid -> level."""
    def mean(key):
        return float(np.mean([key(row) for rows in rows_of.values() for row in rows]))

    def scores(counts):  # counts: (n, c) per problem
        result = {}
        for k in ks:
            values = [pass_at_k(n, c, k) for n, c in counts]
            low, high = bootstrap_interval(values)
            result[str(k)] = {"value": float(np.mean(values)), "low": low, "high": high}
        return result

    per_problem = [{"uid": uid, "level": levels[uid], "n": len(rows), "c": sum(row["grade"] == "correct" for row in rows),
                    "truncated": sum(not row["finished"] for row in rows)} for uid, rows in rows_of.items()]
    by_level = collections.defaultdict(list)
    for p in per_problem:
        by_level[p["level"]].append(p)
    flags = {key: [[bool(row[key]) for row in rows] for rows in rows_of.values()] for key in ("reflects", "located")}
    correct = [[row["grade"] == "correct" for row in rows] for rows in rows_of.values()]
    return {
        "pass@k": scores([(p["n"], p["c"]) for p in per_problem]),
        "truncated": mean(lambda row: not row["finished"]),
        "no_answer": mean(lambda row: row["grade"] == "no_answer"),
        "unparsable": mean(lambda row: row["grade"] == "unparsable"),
        "timeout": mean(lambda row: row["grade"] in ("timeout", "error")),  # of the grader, not of the model
        "length": mean(lambda row: row["tokens"]),
        "reflect_rate": mean(lambda row: row["reflects"]),
        **dsr_err(correct, flags["reflects"], flags["located"]),
        "levels": {level: {"problems": len(ps), "pass@k": scores([(p["n"], p["c"]) for p in ps]),
                           "truncated": sum(p["truncated"] for p in ps) / sum(p["n"] for p in ps)}
                   for level, ps in sorted(by_level.items())} if len(by_level) > 1 else {},
        "per_problem": per_problem,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

def sample_key(row: dict) -> tuple:
    """What a stored sample answers: a changed question or answer makes another key, and is sampled again."""
    return row["uid"], row["problem"], row["temperature"], row["top_p"], row["sample"]


def read_samples(path: Path, header: dict) -> dict[tuple, dict]:
    """Stored samples by key, without their texts. A last line cut by a kill is removed from the file.

    Raises ValueError if the file's header says that they were drawn otherwise.
    """
    if not path.is_file() or not path.stat().st_size:
        return {}
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    lines = content[:content.rfind(b"\n") + 1].decode().splitlines()
    if not lines:
        return {}
    differences = diff_configs(json.loads(lines[0]), header)
    if differences:
        raise ValueError(f"{path} holds samples drawn otherwise ({'; '.join(differences)}); choose another --out, "
                         "or --resume=False to overwrite them")
    rows = ({k: v for k, v in json.loads(line).items() if k != "text"} for line in lines[1:])
    return {sample_key(row): row for row in rows}


def weights_mark(folder: str) -> str:
    """A cheap fingerprint of a checkpoint's weights (sizes and last MiB of every file), or the hub id itself."""
    mark = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 ** 20))
            mark = zlib.crc32(file.read(), zlib.crc32(f"{path.name} {size}".encode(), mark))
    return f"{mark:08x}" if mark else folder


def load_sets(c: dict) -> dict[str, list[Problem]]:
    """Problem sets by name; uids must be unique over all of them because they key the samples and the noise."""
    if c["world"]:
        import toy
        if c["problems"] or not c["n_problems"]:
            raise ValueError(f"world = {c['world']!r} needs n_problems > 0 and problems = ''")
        return {f"{c['world']}-{c['split']}": toy.make_problems(c["world"], c["split"], c["n_problems"])}
    if not c["problems"]:
        raise ValueError("nothing to evaluate on; set problems=a.jsonl,b.jsonl or world=findx")
    sets, holder = {}, {}
    for path in c["problems"].split(","):
        name = Path(path).stem
        if name in sets:
            raise ValueError(f"two problem files are called {name}; rename one")
        sets[name] = load_problems(path, c["n_problems"])
        for p in sets[name]:
            if holder.setdefault(p.uid, name) != name:
                raise ValueError(f"uid {p.uid!r} is in {holder[p.uid]} and in {name}; uids must be unique over all files")
    return sets


def reflection_flags(question: str, text: str, toy_world: bool) -> tuple[bool, bool]:
    """(reflects, located): does the response reflect, and did the reflection hit a real error?

    By rule: reflection is a marker in the text, and whoever reflects and then ends correct is taken to have located the
    error; ERR then only asks for the correct end. In the toy world the error before the reflection is known exactly.
    """
    import reflect
    reflects = reflect.reflects(text)
    if not toy_world or not reflects:
        return reflects, reflects
    import toy
    return True, toy.first_error(question, text) is not None


def sample_missing(c: dict, sets: dict[str, list[Problem]], path: Path) -> dict[tuple, dict]:
    """Sample and grade whatever OUT.samples.jsonl does not hold yet; all rows by key."""
    import torch
    from tqdm import tqdm

    from model import load_hf
    from reward import grade_many
    from rollout import EVALUATION, generate
    if c["threads"]:
        torch.set_num_threads(c["threads"])
    tokenizer = load_tokenizer(c["init_from"])
    header = {k: c[k] for k in ("seed", "max_new_tokens", "instruction", "dtype")} | {"weights": weights_mark(c["init_from"])}
    rows = read_samples(path, header) if c["resume"] else {}
    everything = [p for problems in sets.values() for p in problems]
    prompts = {p.uid: render_prompt(tokenizer, p.question, c["instruction"]) for p in everything}
    marks = {p.uid: zlib.crc32(json.dumps([prompts[p.uid], p.answer]).encode()) for p in everything}
    model, part = None, max(1, c["max_rows"] // c["samples"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a" if rows else "w", encoding="utf-8") as file:
        if not rows:
            print(json.dumps(header), file=file, flush=True)
        for temperature, top_p in zip(c["temperatures"], c["top_ps"], strict=True):
            keys = {p.uid: [(p.uid, marks[p.uid], temperature, top_p, i) for i in range(c["samples"])] for p in everything}
            todo = [p for p in everything if any(key not in rows for key in keys[p.uid])]
            done = len(everything) - len(todo)
            if todo and model is None:
                device = c["device"] if c["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
                model = load_hf(c["init_from"], dtype=getattr(torch, c["dtype"]), device=device, num_tokens=len(tokenizer)).eval()
                stop_ids = stop_ids_of(tokenizer, model.config.eos_token_id)
                for p in everything:
                    check_prompt_fits(p.uid, len(prompts[p.uid]), c["max_new_tokens"], model.config.max_position_embeddings)
            bar = tqdm(total=len(everything), initial=done, desc=f"T {temperature} top-p {top_p}", unit=" problems", disable=not todo)
            for start in range(0, len(todo), part):
                now = todo[start:start + part]
                groups = generate(model, [prompts[p.uid] for p in now], c["samples"], temperature=temperature, top_p=top_p,
                                  keys=[(c["seed"], EVALUATION, 0, zlib.crc32(p.uid.encode())) for p in now],
                                  max_new_tokens=c["max_new_tokens"], stop_ids=stop_ids, max_rows=c["max_rows"])
                drawn = [(p, i, x, tokenizer.decode(x.ids[:-1] if x.finished else x.ids))
                         for p, group in zip(now, groups, strict=True) for i, x in enumerate(group)]
                grades = grade_many([text for *_, text in drawn], [p.answer for p, *_ in drawn])
                for (p, i, x, text), grade in zip(drawn, grades, strict=True):
                    reflects, located = reflection_flags(p.question, text, bool(c["world"]))
                    row = {"uid": p.uid, "problem": marks[p.uid], "temperature": temperature, "top_p": top_p, "sample": i,
                           "tokens": len(x.ids), "finished": x.finished, "grade": grade.status, "answer": grade.answer,
                           "reflects": reflects, "located": located}
                    rows[sample_key(row)] = row
                    file.write(json.dumps(row | {"text": text}, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(now))
            bar.close()
    return {key: rows[key] for p in everything for t, q in zip(c["temperatures"], c["top_ps"], strict=True)
            for key in ((p.uid, marks[p.uid], t, q, i) for i in range(c["samples"]))}
