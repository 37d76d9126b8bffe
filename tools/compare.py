"""Paired comparison of eval.py's results, problem by problem.

    python -m tools.compare base.json tapo.json                                # the baseline first
    python -m tools.compare grpo_s0.json+grpo_s1.json tapo_s0.json+tapo_s1.json  # seed by seed
    python -m tools.compare base.json tapo.json --out=comparison.json
    python -m tools.compare --scores base.json tapo.json            # each result by itself
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np

from configurator import run_script, write_json
from eval import bootstrap_interval, percent, percent_with_interval, table


def sign_flip_p(differences, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of the sign-flip permutation test that paired differences (P,) have mean 0.

    Exact over all sign patterns for up to 16 non-zero differences, else over `draws` random sign
    patterns and the observed one.
    """
    d = np.asarray(differences, float)
    d = d[d != 0]
    # tolerance: equal sums may differ in rounding, by order of addition
    observed = abs(d.sum()) * (1 - 1e-9)
    if len(d) <= 16:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((abs(signs @ d) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = sum(abs((1 - 2 * rng.integers(2, size=len(d))) @ d) >= observed for _ in range(draws))
    return float((1 + hits) / (1 + draws))


def t_interval(values) -> tuple[float, float]:
    """95 % confidence interval of the mean over seeds (at least two), by Student's t."""
    values = np.asarray(values, float)
    df = len(values) - 1
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
                 2.179, 2.160, 2.145, 2.131)
    # 97.5 % quantile; beyond the list its asymptotic expansion
    t = quantiles[df - 1] if df <= len(quantiles) else 1.96 + 2.372 / df + 2.82 / df ** 2
    half = t * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def read_result(path: Path) -> dict[tuple, dict]:
    """Settings of an OUT.json, keyed by (set, temperature, top_p, max_new_tokens)."""
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}")
    try:
        settings = json.loads(path.read_text())["settings"]
        return {(s["set"], s["temperature"], s["top_p"], s["max_new_tokens"]): s for s in settings}
    except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{path} is not a result of eval.py ({type(e).__name__}: {e})") from None


def compare_runs(groups: list[list[Path]]) -> list[dict]:
    """Compare every group of results with the first, per problem set and sampling setting. A group
    holds one file per training seed.

    difference: paired difference of pass@1, mean over problems and seeds. Its 95 % confidence
    interval is over problems (bootstrap) for one seed and over seeds (Student's t) for more: only
    the latter includes the variance between training runs. p: sign-flip test over the same units
    as the interval, problems for one seed and seeds for more.
    """
    if len(groups) < 2 or len({len(group) for group in groups}) > 1:
        raise ValueError(
            "compare needs two or more results, or groups of equally many seeds (paired in order); "
            f"got {len(groups)} group(s) of {', '.join(str(len(group)) for group in groups)}")
    loaded, found = [[read_result(path) for path in group] for group in groups], []
    shared = [key for key in loaded[0][0]
              if all(key in result for group in loaded for result in group)]
    if not shared:
        raise ValueError("these results share no problem set measured at one temperature, top-p "
                         "and max_new_tokens")
    for key in shared:
        accuracy = [[{p["uid"]: p["c"] / p["n"] for p in result[key]["per_problem"]}
                     for result in group] for group in loaded]
        uids = sorted(accuracy[0][0])
        for path, rates in zip(sum(groups, []), sum(accuracy, []), strict=True):
            if sorted(rates) != uids:
                raise ValueError(f"{path} ({len(rates)} problems) and {groups[0][0]} ({len(uids)}) "
                                 "were not measured "
                                 f"on the same problems of {key[0]}, only "
                                 f"{len(rates.keys() & set(uids))} are shared")
        # (G, seeds, P)
        accuracy = np.array([[[rates[uid] for uid in uids] for rates in group]
                             for group in accuracy])
        for group, theirs in zip(groups[1:], accuracy[1:], strict=True):
            by_seed, by_problem = (theirs - accuracy[0]).mean(1), (theirs - accuracy[0]).mean(0)
            low, high = t_interval(by_seed) if len(by_seed) > 1 else bootstrap_interval(by_problem)
            found.append(
                dict(zip(("set", "temperature", "top_p", "max_new_tokens"), key, strict=True)) |
                {"problems": len(uids), "baseline": "+".join(map(str, groups[0])),
                 "other": "+".join(map(str, group)), "baseline_pass@1": float(accuracy[0].mean()),
                 "other_pass@1": float(theirs.mean()), "difference": float(by_seed.mean()),
                 "low": low, "high": high,
                 "p": sign_flip_p(by_seed if len(by_seed) > 1 else by_problem),
                 "by_seed": by_seed.tolist()})
    return found


def comparison_table(found: list[dict]) -> str:
    """One line per comparison; pass@1 in %, differences in points."""
    rows = [["result", "set", "T", "top-p", "problems", "seeds", "baseline", "pass@1",
             "difference", "95 % CI", "p"]]
    for d in found:
        points = [100 * d[key] for key in ("difference", "low", "high")]
        rows.append([d["other"], d["set"], f"{d['temperature']:g}", f"{d['top_p']:g}",
                     str(d["problems"]), str(len(d["by_seed"])), percent(d["baseline_pass@1"]),
                     percent(d["other_pass@1"]), f"{points[0]:+.1f}",
                     f"[{points[1]:+.1f}, {points[2]:+.1f}]", f"{d['p']:.4f}"])
    return f"baseline: {found[0]['baseline']}\n{table(rows)}"


def score_table(paths: list[Path]) -> str:
    """One line per result: pass@1 in % and its 95 % interval over problems in every setting."""
    rows: list[list[str]] = []
    for path in paths:
        settings = read_result(path)
        heads = [f"{name} T {t:g} top-p {p:g}" for name, t, p, _ in settings]
        if not rows:
            rows.append(["pass@1, %", *heads])
        if heads != rows[0][1:]:
            raise ValueError(f"{path} has other problem sets or settings than {paths[0]}")
        if any("1" not in s["pass@k"] for s in settings.values()):
            raise ValueError(f"{path} has no pass@1; evaluate with 1 in pass_k")
        rows.append([path.stem, *(percent_with_interval(s["pass@k"]["1"])
                                  for s in settings.values())])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.compare",
                                     description="paired comparison of evaluation results",
                                     allow_abbrev=False)
    parser.add_argument("results", nargs="+", help="OUT.json files of eval.py, the baseline first; "
                        "+ joins the seeds of one method")
    parser.add_argument("--out", default="", help="also write the comparison as json")
    parser.add_argument("--scores", action="store_true", help="only each result's own pass@1")
    args = parser.parse_args()
    if args.scores:
        print(score_table(list(map(Path, args.results))))
        return
    groups = [[Path(path) for path in group.split("+")] for group in args.results]
    found = compare_runs(groups)
    if args.out:
        write_json(Path(args.out), found)
    print(comparison_table(found))


if __name__ == "__main__":
    run_script(main)
