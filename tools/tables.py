"""Markdown tables of a sweep: results of runs/ablations.sh in, docs/tables.md out.

    python -m tools.tables out/ablations                          # print all tables
    python -m tools.tables out/ablations --update=docs/tables.md  # fill in <!-- table NAME -->

A row is a group of runs OUT/WORLD/ROW_s<seed>, with an evaluation ROW_s<seed>.json beside each.
Pass@1 is in % on test problems; +- is the standard deviation over seeds. Differences are
tools.compare's paired comparison, seed by seed with the same seeds of the baseline: in points, with
the 95 % interval (Student's t) and p (all sign flips) over seeds. Missing results are left out, so
an unfinished sweep can be tabulated.
"""
import argparse
import json
import math
import re
from pathlib import Path

import numpy as np

import jsonl
from configurator import run_script
from tools.compare import compare_runs

# kinds of tokens in tools.measure's 'shift'
KINDS = ["ordinary, right", "ordinary, wrong", *(f"{mode}, {part}" for mode in ("micro", "full")
    for part in ("prefix", "diagnosis", "its first token", "correction"))]
T1, T06 = (1.0, 1.0), (0.6, 0.9)  # (temperature, top-p)
TAPO, GRPO, METRICS = "tapo", "grpo", "metrics.jsonl"
ROWS = {  # row: description
    "solutions": "SFT on worked solutions", "coldstart": "cold start", "grpo": "GRPO",
    "opsd": "OPSD", "tapo": "**TAPO** (A = r, merged loss mean)",
    "copy": "control: y_ref is a copy of y+",
    "grpo_long": "GRPO at TAPO's wall time",
    "published": "TAPO as published (Eq. 5, Eq. 6, diagnosis under OTS)",
    "full": "full reconstruction", "sft": "SFT on y_ref",
    "wo_dae_ots_neg": "w/o DAE, OTS, negatives", "wo_ots_neg": "w/o OTS, negatives",
    "wo_ots": "w/o OTS", "wo_dae": "w/o DAE",
    "zpd_222": "n_pos, n_neg, m_max = 2, 2, 2", "zpd_224": "n_pos, n_neg, m_max = 2, 2, 4",
    "zpd_153": "n_pos, n_neg, m_max = 1, 5, 3",
    "diagnosis_ots": "diagnosis trained under OTS",
    "diagnosis_ots_alone": "diagnosis trained under OTS, no OTS on the rest",  # first sweep alone
    "diagnosis_train": "diagnosis trained, weight 1 (OTS on the rest)",
    "diagnosis_train_wo_ots": "diagnosis trained, no OTS at all",
    "ref_group": "constructions normalised in their own group (Eq. 5)",
    "ref_orig": "constructions normalised by rollout statistics",
    "luffy": "LUFFY's weights", "replace": "error replaced, no diagnosis (as InT)",
    "faithful": "only faithful constructions (no false equation)",
    "prefix_masked": "prefix masked", "separate": "separate loss means (Eq. 6)",
    "base": "initial policy without reflection", "base_grpo": "GRPO without cold start",
    "base_tapo": "TAPO without cold start",
    "base_opsd": "OPSD without cold start"}
WORDS = {row: words.replace("**", "") for row, words in ROWS.items()}
SHORT = {row: words.split(" (")[0] for row, words in WORDS.items()}  # for charts and headings
TABLES = {  # name: (rows, baseline of the differences)
    "1": (["solutions", "coldstart", "grpo", "opsd", "tapo", "copy", "published"], GRPO),
    "control": (["copy", "tapo"], "copy"),
    "equal time": (["grpo_long", "tapo"], "grpo_long"),
    "2": (["coldstart", "grpo", "opsd", "tapo", "copy"], None),
    "3": (["grpo", "sft", "full", "tapo"], TAPO),
    "4": (["wo_dae_ots_neg", "wo_ots_neg", "wo_ots", "wo_dae", "tapo"], TAPO),
    "5": (["zpd_222", "zpd_224", "tapo", "zpd_153"], TAPO),
    "own": (["diagnosis_ots", "diagnosis_train", "diagnosis_train_wo_ots",
             "wo_ots", "prefix_masked", "ref_group", "ref_orig", "separate", "tapo"], TAPO),
    "relatives": (["grpo", "copy", "luffy", "replace", "faithful", "tapo"], TAPO),
    "no cold start": (["base", "base_grpo", "base_opsd", "base_tapo"], "base_grpo")}
# rows whose seeds number cold starts, not training runs: excluded from paired differences
STARTS = ("solutions", "coldstart", "base")
# Published Pass@1 in % on AIME 2024, AIME 2025 and HMMT Feb 2025 (Tables 1, 3, 4, 5) as
# {row: (its scores, TAPO's)}. Table 3 ends at step 200. Single runs of an 8B model.
TAPO_200, TAPO_500 = (46.67, 36.46, 20.62), (62.50, 46.88, 31.46)
PAPER = {
    "grpo": ((52.92, 46.88, 28.75), TAPO_500), "opsd": ((57.71, 43.33, 24.17), TAPO_500),
    "sft": ((30.62, 20.21, 12.29), TAPO_200), "full": ((42.29, 33.75, 18.75), TAPO_200),
    "wo_dae_ots_neg": ((52.71, 41.46, 20.83), TAPO_500),
    "wo_ots_neg": ((49.17, 36.67, 21.67), TAPO_500), "wo_ots": ((57.29, 45.83, 21.46), TAPO_500),
    "zpd_222": ((51.88, 37.92, 22.08), TAPO_500), "zpd_224": ((57.92, 40.21, 24.17), TAPO_500),
    "zpd_153": ((57.08, 48.96, 30.42), TAPO_500)}


def find_rows(folder: Path) -> dict[str, dict[int, Path]]:
    """{row: {seed: path of its evaluation}}; in cold-start rows the seed is the start's number."""
    rows: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        named = re.fullmatch(r"(.+)_[sc](\d+)", path.stem)
        if named:
            rows.setdefault(named[1], {})[int(named[2])] = path
    return rows


def setting_of(path: Path, setting: tuple) -> dict:
    settings = json.loads(path.read_text())["settings"]
    return next(s for s in settings if (s["temperature"], s["top_p"]) == setting)


def show(values, digits: int = 1) -> str:
    """Mean +- standard deviation over seeds; the mean alone for one seed, '-' for none."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    if not values:
        return "-"
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}"
        if len(values) > 1 else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def differences(row: dict[int, Path], base: dict[int, Path]) -> dict[tuple, dict]:
    """{setting: paired comparison} over the seeds in common; {} if there are none, or if `row` is
    `base`."""
    seeds = sorted(row.keys() & base.keys())
    if row is base or not seeds:
        return {}
    return {(d["temperature"], d["top_p"]): d | {"seeds": len(seeds)}
            for d in compare_runs([[base[s] for s in seeds], [row[s] for s in seeds]])}


def points(d: dict | None) -> str:
    """Format a comparison: '+2.5 [+0.9, +4.2], p 0.008'; for one seed the difference alone."""
    if d is None:
        return ""
    value, low, high = (f"{100 * d[key]:+.1f}" for key in ("difference", "low", "high"))
    return value + (f" [{low}, {high}], p {d['p']:.3f}" if d["seeds"] > 1 else "")


def scores_table(rows: dict[str, dict[int, Path]], names: list[str], baseline: str | None) -> str:
    """Pass@1 at both settings, Pass@8, and the differences to the baseline, if any."""
    body = []
    for name in (name for name in names if name in rows):
        paths = list(rows[name].values())
        scores = [show([100 * setting_of(p, s)["pass@k"][k]["value"] for p in paths])
                  for s, k in ((T1, "1"), (T06, "1"), (T1, "8"))]
        difference = differences(rows[name], rows.get(baseline, {})) if name not in STARTS else {}
        compared = [points(difference.get(s)) for s in (T1, T06)] if baseline else []
        body.append([ROWS.get(name, name), str(len(paths)), *scores, *compared])
    return markdown(["", "seeds", "Pass@1, T 1", "Pass@1, T 0.6",
                     "Pass@8, T 1", *([f"Δ vs {SHORT[baseline]}, T 1",
                                       f"Δ vs {SHORT[baseline]}, T 0.6"] if baseline else [])],
                    body)


def verdicts_table(rows: dict[str, dict[int, Path]]) -> str:
    """Rows that the paper also has, against TAPO: the paper's difference (mean of its three
    contests) beside ours, "unresolved" if the 95 % interval over seeds contains 0. "" without such
    rows."""
    body = []
    for name in (name for name in PAPER
                 if len(rows.get(name, {}).keys() & rows.get(TAPO, {}).keys()) > 1):
        published = [a - b for a, b in zip(*PAPER[name], strict=True)]
        ours, cells = differences(rows[name], rows[TAPO]), []
        for d in (ours[T1], ours[T06]):
            same = d["difference"] * np.mean(published) > 0
            cells += [points(d), "unresolved" if d["low"] <= 0 <= d["high"] else "same sign" if same
                      else "opposite"]
        body.append(
            [ROWS[name], f"{np.mean(published):+.1f} ({', '.join(f'{p:+.1f}' for p in published)})",
             *cells])
    head = ["Δ vs TAPO", "paper: mean (AIME24, AIME25, HMMT25)", "here, T 1", "", "here, T 0.6", ""]
    return markdown(head, body) if body else ""


def habits_table(rows: dict[str, dict[int, Path]], names: list[str]) -> str:
    """Table 2: DSR and ERR (§4.3), reflection rate, truncation rate, response length."""
    body = []
    for name in (name for name in names if name in rows):
        found = [setting_of(p, T1) for p in rows[name].values()]
        values = [[100 * s[key] if s[key] is not None else None for s in found]
                  for key in ("DSR", "ERR", "reflect_rate", "truncated")]
        body.append([ROWS.get(name, name), str(len(found)), *map(show, values),
                     show([s["length"] for s in found])])
    return markdown(["", "seeds", "DSR", "ERR", "reflects", "truncated", "length, tokens"], body)


def levels_table(rows: dict[str, dict[int, Path]], names: list[str]) -> str:
    """Pass@1 at T 1 by difficulty level; "" if the evaluations have no levels."""
    found = {name: [setting_of(p, T1)["levels"] for p in rows[name].values()] for name in names
             if name in rows}
    levels = sorted({level for seeds in found.values() for of_seed in seeds for level in of_seed})
    return markdown(["Pass@1, T 1", *(f"level {level}" for level in levels)], [
        [ROWS[name], *(show([100 * of_seed[level]["pass@k"]["1"]["value"] for of_seed in seeds])
                       for level in levels)] for name, seeds in found.items()]) if levels else ""


def read_metrics(path: Path) -> list[dict]:
    """metrics.jsonl of the run that an evaluation belongs to."""
    return jsonl.read(path.with_suffix("") / METRICS)


def logs_kl(path: Path) -> bool:
    """log_kl of the run that an evaluation belongs to."""
    config = path.with_suffix("") / "config.json"
    return config.is_file() and json.loads(config.read_text())["log_kl"]


def rates_table(rows: dict[str, dict[int, Path]]) -> str:
    """Learning-rate sweep: final Pass@1 on validation problems, over seeds used for nothing else.
    """
    found: dict[str, dict[str, str]] = {}
    for name, paths in rows.items():
        if named := re.fullmatch(r"tune_(\w+)_([\d.e-]+)", name):
            ends = [100 * read_metrics(p)[-1]["eval/pass1"] for p in paths.values()]
            each = ", ".join(f"{end:.1f}" for end in ends)
            found.setdefault(named[1], {})[named[2]] = f"{np.mean(ends):.1f} ({each})"
    rates = sorted({rate for row in found.values() for rate in row}, key=float)
    return markdown(["validation Pass@1, T 1", *rates],
                    [[m, *(row.get(r, "") for r in rates)] for m, row in found.items()])


def time_table(rows: dict[str, dict[int, Path]], names: list[str]) -> str:
    """Seconds per step by phase, two processes in parallel: medians over training, of the seeds
    without KL logging if there are any. Statistics of the constructions: means over training."""
    body = []
    for name in (name for name in names if name in rows and name not in STARTS):
        paths = [p for p in rows[name].values() if p.with_suffix("").joinpath(METRICS).is_file()]
        if not paths:  # metrics are kept with another problem set
            continue
        logs = [read_metrics(p) for p in paths]
        # runs that log the KL are slower, by a forward pass of the reference model
        quiet = [log for p, log in zip(paths, logs, strict=True) if not logs_kl(p)] or logs

        def mean(key, logs=logs, average=np.mean):
            per_run = [[row[key] for row in log if key in row] for log in logs]
            return [average(values) for values in per_run if values]

        phases = [show(mean(f"time/{key}", quiet, np.median), 2)
                  for key in ("step", "generate", "reflect", "update")]
        life = [show([100 * v for v in mean(f"reflect/{key}")])
                for key in ("correct", "mixed_groups")]
        body.append([ROWS.get(name, name), *phases, show(mean("reflect/candidates")),
                     show(mean("reflect/kept")), *life,
                     show(mean("reflect/ots_first_diagnosis"), 2)])
    return markdown(["", "seconds per step", "generate", "reflect", "update", "candidates", "kept",
                     "correct, %", "mixed groups, %", "OTS, first diagnosis token"], body)


# --- tools.measure --------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, list[dict]]:
    """{row: [output of tools.measure, one per seed]}."""
    found: dict[str, list[dict]] = {}
    for path in sorted((folder / "measured").glob("*.json")):
        found.setdefault(re.sub(r"_[sc]\d+$", "", path.stem),
                         []).append(json.loads(path.read_text()))
    return dict(sorted(found.items(), key=lambda item: [*ROWS, item[0]].index(item[0])))


def shift_table(found: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: distribution shift per method and kind of token; log-probs and KL in nats."""
    body = []
    for name, seeds in found.items():
        for kind in sorted({kind for m in seeds for kind in m["shift"]},
                           key=lambda kind: [*KINDS, kind].index(kind)):
            some = [m["shift"][kind] for m in seeds if kind in m["shift"]]
            # too few tokens for a mean: rare tagged reflections of full reconstructions
            if sum(s["tokens"] for s in some) < 100:
                continue
            body.append(
                [ROWS.get(name, name),
                 kind, *(show([s[key] for s in some], 2)
                         for key in ("logprob", "entropy", "kl", "ots"))])
    return ["", "tokens", "log-prob", "entropy", "KL(synthesis, policy)", "OTS weight"], body


def gradient_table(found: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: per method and estimator, gradient norms of the parts of one step, mean
    advantages."""
    body = []
    for name, seeds in found.items():
        for estimator in seeds[0]["gradient"]:
            some = [m["gradient"][estimator] for m in seeds]
            body.append(
                [ROWS.get(name, name),
                 estimator, *(show([1000 * s[key] for s in some])
                              for key in ("right", "wrong", "constructed")),
                 *(show([s[key] for s in some], 2)
                   for key in ("cosine", "wrong_advantage", "constructed_advantage"))])
    return ["", "advantage estimator", "norm of correct, 1e-3", "norm of wrong, 1e-3",
            "norm of constructed, 1e-3", "cosine to rollouts", "A of wrong",
            "A of constructed"], body


def errors_table(found: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: per method, in %, outcomes of responses after their own error, and of
    constructions. A column that any measurement lacks is left out."""
    def share(counts: dict, part: str, whole: str) -> float | None:
        return counts[part] / counts[whole] if counts[whole] else None

    def of_constructions(part: str, whole: str):
        return lambda m: share(m["constructions"]["micro"], part, whole)

    columns = {  # head: function of a measurement -> share, or None
        "responses with an error": lambda m: share(m["recovery"], "with_an_error", "responses"),
        "stops if correct": lambda m: m["decides"]["stop_if_right"],
        "retries if wrong": lambda m: m["decides"]["retry_if_wrong"],
        "reflects after error": lambda m: m["recovery"]["unasked_reflects"],
        "correct after reflecting": lambda m: m["recovery"]["unasked_right_if_reflects"],
        "correct, unprompted": lambda m: m["recovery"]["unasked_right"],
        "correct, forced reflection": lambda m: m["recovery"]["forced_right"],
        "constructions kept": of_constructions("kept", "candidates"),
        "constructions correct": of_constructions("right", "kept"),
        "faithful": of_constructions("faithful", "state"),
        "error localised": of_constructions("localised", "kept"),
        "mixed groups": of_constructions("mixed_groups", "groups"), "DSR": lambda m: m["DSR"],
        "ERR, rule-based": lambda m: m["ERR"], "ERR, ground truth": lambda m: m["ERR_true"]}
    cells = {}
    for head, of in columns.items():
        try:
            cells[head] = [show([100 * v for v in map(of, seeds) if v is not None])
                           for seeds in found.values()]
        except KeyError:
            continue
    body = [[ROWS.get(name, name), str(len(seeds)), *(column[i] for column in cells.values())]
            for i, (name, seeds) in enumerate(found.items())]
    return ["%", "seeds", *cells], body


# --- the document ---------------------------------------------------------------------------------


def all_tables(out: Path) -> dict[str, str]:
    """{'findx 1': Markdown, ..}: every table of every world that has results for it."""
    tables = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        rows, found = find_rows(folder), measured(folder)
        # rows not listed in ROWS, e.g. added by a fork
        new = [name for name in rows if name not in ROWS and not name.startswith("tune_")]
        for name, (names, baseline) in (TABLES |
                                        ({"new": ([GRPO, TAPO, *new], TAPO)} if new
                                         else {})).items():
            if any(n in rows for n in names if n not in (*STARTS, TAPO, GRPO)) or name == "1":
                table = habits_table(rows, names) if name == "2" else scores_table(rows, names,
                    baseline)
                tables[f"{folder.name} {name}"] = table
        if verdicts := verdicts_table(rows):
            tables[f"{folder.name} verdicts"] = verdicts
        if levels := levels_table(rows, TABLES["1"][0]):
            tables[f"{folder.name} levels"] = levels
        tables[f"{folder.name} rates"] = rates_table(rows)
        tables[f"{folder.name} time"] = time_table(rows, list(ROWS))
        if found:
            tables |= {f"{folder.name} {name}": markdown(*make(found))
                       for name, make in (("shift", shift_table), ("gradient", gradient_table),
                                ("errors", errors_table))}
    return {name: table for name, table in tables.items() if table.count("\n") > 1}  # with rows


def update(document: Path, tables: dict[str, str]) -> None:
    """Replace the text between <!-- table NAME --> and <!-- end -->; ValueError for an unknown
    name."""
    def new(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(
                f"{document}: there is no table {match[1]!r}; known are {', '.join(tables)}")
        return f"<!-- table {match[1]} -->\n{tables[match[1]]}\n<!-- end -->"

    text = re.sub(r"<!-- table ([\w ]+) -->.*?<!-- end -->", new,
                  document.read_text(encoding="utf-8"), flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tables",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder of runs/ablations.sh")
    parser.add_argument("--update", type=Path, help="document whose marked tables are rewritten")
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        raise FileNotFoundError(f"no folder {args.out}; bash runs/ablations.sh makes it")
    tables = all_tables(args.out)
    if args.update:
        update(args.update, tables)
    else:
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()))


if __name__ == "__main__":
    run_script(main)
