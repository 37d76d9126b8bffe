"""Training report: run folders in, one self-contained HTML page out.

    python -m tools.report out/toy/tapo out/toy/grpo --evals=tapo.json,grpo.json --out=report.html

Sections: scores, the six curves of Fig. 3, constructed trajectories (number, accuracy, log-prob and
OTS weight by role), tools.measure's results (--measured), time per phase, and twenty trajectories
token by token. Folders and files whose names differ only in a trailing `_s<digits>` (`_c<digits>`:
cold starts) are seeds of one method, shown as mean and one standard deviation. Rows of tools.tables
are shown under their description there.

Deliberately missing: scripts and network requests (forbidden by the page's
Content-Security-Policy), and statistics of its own: every number was logged by train.py, eval.py or
tools.measure, and differences are tools.compare's.
"""
import argparse
import json
import math
import re
from datetime import datetime, timezone
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

import jsonl
from configurator import run_script
from tools import tables
from tools.compare import compare_runs
from tools.tables import SHORT, WORDS

FIGURE_3 = {  # metric key: title, in the order of the paper's panels
    "train/ots_weight": "OTS weight, mean", "train/loss": "Policy-gradient loss",
    "rollout/pass1": "Training accuracy, %", "train/grad_norm": "Gradient norm",
    "rollout/length": "Response length, tokens", "train/kl_ref": "KL to the reference"}
HELD_OUT = {
    "eval/pass1": "Held-out accuracy, %", "eval/length": "Held-out length, tokens",
    "eval/truncated": "Held-out truncated"}
MEASURED = {  # function that makes the table: caption
    tables.shift_table:
        "Distribution shift: means over tokens, under the policy given the question alone. "
        "KL(synthesis, policy): divergence of the policy given a wrong and a correct response, "
        "which sampled the tokens, from the policy given the question alone.",
    tables.gradient_table:
        "Gradient norms: contributions of correct rollouts, wrong rollouts and constructions to "
        "the gradient of one step, for three advantage estimators of the constructions. A: mean "
        "advantage.",
    tables.errors_table:
        "Error recovery: how often a response reflects after its first error, and how often it "
        "ends correct, unprompted or with a forced reflection; then the quality of the "
        "constructions. Judged by the toy world's ground truth."}
REFLECTION = {
    "reflect/eligible": "Eligible queries (Eq. 3)", "reflect/candidates": "Candidate pairs",
    "reflect/kept": "Constructions kept", "reflect/parsed": "Share parsed",
    "reflect/verbatim": "Share with verbatim prefix", "reflect/correct": "Share correct",
    "reflect/mixed_groups": "Groups with both rewards",
    "reflect/length": "Construction length, tokens"}
# evaluations that agree in these fields are comparable
SETTING = ("set", "temperature", "top_p", "max_new_tokens")
PHASES = ("generate", "reflect", "grade", "update")
ROLES = ("prefix", "diagnosis", "correction")  # indexed by the role ids of a rollout file
N_TRAJECTORIES = 20
# a span of one role with more than 3 * FOLD tokens is folded; FOLD stay visible at either end
FOLD = 40
ROLLOUT = dict(  # defaults of the keys that a line of a rollout file may lack
    step=0, uid="", query=0, question="", gold="", completion_ids=[], roles=[], text="",
    is_reflection=False, answer=None, reward=math.nan, advantage=math.nan, logprobs=None,
    sample_logprobs=None, ots_weights=None)
# (light, dark) after Okabe and Ito, safe for colour-blind readers; m0.. methods, p0.. phases
COLOURS = {
    "m0": ("#0072b2", "#5cb3ec"), "m1": ("#d55e00", "#ff8f4d"), "m2": ("#009e73", "#35c79c"),
    "m3": ("#b0508c", "#e08fc2"), "m4": ("#a87900", "#e3b32c"), "m5": ("#3a9bd5", "#9ad4fb"),
    "m6": ("#6b6b6b", "#a8a8a8"), "prefix": ("#c77700", "#e9a13b"),
    "diagnosis": ("#a3418a", "#e08fc2"), "correction": ("#0a6fb0", "#62b5ec"),
    "right": ("#00704f", "#45cfa4"), "wrong": ("#b3400a", "#ff9a63"), "p0": ("#0b4f6c", "#8fd0ea"),
    "p1": ("#2a86a8", "#4fa3c4"), "p2": ("#72b7cf", "#2b6d88"), "p3": ("#b06a00", "#e0a040"),
    "p4": ("#c9c4bc", "#55585d"), "ink": ("#1c1b1a", "#eceae6"), "soft": ("#5f5c58", "#a5a29c"),
    "page": ("#faf9f7", "#131416"), "card": ("#fff", "#1b1d20"), "rule": ("#e3dfd9", "#303338"),
    "grid": ("#edeae5", "#282b2f"), "tint": ("14%", "26%")}


# --- reading --------------------------------------------------------------------------------------


class Run(NamedTuple):
    folder: Path
    config: dict
    rows: list[dict]  # metrics, one row per step, ascending


def label_runs(paths: list[Path]) -> dict[str, list[Path]]:
    """Group paths by method: 'out/tapo_s0', 'out/tapo_s1' -> {'tapo': [both]}. Duplicate names are
    prefixed with their parent folder's."""
    names = [p.stem if p.suffix == ".json" else p.resolve().name for p in paths]
    methods = {}
    for path, name in zip(paths, names, strict=True):
        parent = f"{path.resolve().parent.name}/" if names.count(name) > 1 else ""
        methods.setdefault(parent + re.sub(r"_[sc]\d+$", "", name), []).append(path)
    return methods


def load_run(folder: Path) -> Run:
    missing = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a run folder: no {' and no '.join(missing)} in it")
    rows = {}  # a step may occur twice after a resume: the later row wins
    for row in jsonl.read(folder / "metrics.jsonl"):
        if not isinstance(row.get("step"), int):
            raise ValueError(
                f"{folder / 'metrics.jsonl'}: a row without an integer 'step': {str(row)[:60]}")
        rows[row["step"]] = row
    config = jsonl.parse((folder / "config.json").read_text(encoding="utf-8"),
                         str(folder / "config.json"))
    return Run(folder, config, [rows[step] for step in sorted(rows)])


def number(value) -> float:
    """A logged value, plain or {'value': ..}, as a float; nan stands for 'not logged'."""
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if isinstance(value, (int, float)) else math.nan


def model_size(run: Run) -> int:
    """Number of parameters, from the safetensors headers of the newest checkpoint, else of
    `init_from`; 0 if neither exists."""
    start = Path(str(run.config.get("init_from") or "-"))
    for folder in [*sorted(run.folder.glob("step_*"), reverse=True), start]:
        tensors = {}
        for shard in folder.glob("*.safetensors"):
            with open(shard, "rb") as file:
                tensors |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if tensors:
            return sum(math.prod(tensor["shape"]) for tensor in tensors.values()
                       if "shape" in tensor)
    return 0


# --- curves ---------------------------------------------------------------------------------------


class Line(NamedTuple):
    label: str
    colour: str         # a name in COLOURS
    steps: np.ndarray   # (N,) where at least one seed logged the key
    raw: np.ndarray     # (N,) mean over seeds
    mean: np.ndarray    # (N,) the same, smoothed
    spread: np.ndarray  # (N,) standard deviation of the smoothed seeds; 0 for a single seed


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of (N,) over the finite values in the window (odd): no lag, no padding
    values at the edges."""
    def total(x):
        return np.convolve(np.pad(x, window // 2), np.ones(window), "valid")

    count = total(np.isfinite(values).astype(float))
    return np.where(count > 0, total(np.nan_to_num(values)) / np.maximum(count, 1), np.nan)


def make_line(runs: list[Run], key: str, label: str = "", colour: str = "m0") -> Line:
    logged = [{row["step"]: v for row in run.rows if math.isfinite(v := number(row.get(key)))}
              for run in runs]
    steps = sorted(set().union(*logged))
    if not steps:
        return Line(label, colour, *[np.zeros(0)] * 4)
    # (S, N)
    values = np.array([[seed.get(step, math.nan) for step in steps] for seed in logged if seed])
    values *= 100 if key.endswith("/pass1") else 1  # in %, like every accuracy on the page
    window = 1 if len(steps) < 20 else min(len(steps) // 15, 30) // 2 * 2 + 1
    smoothed = np.array([smooth(seed, window) for seed in values])
    n = np.isfinite(smoothed).sum(0)
    # sample standard deviation (n - 1), as there are few seeds
    spread = np.where(n > 1, np.nanstd(smoothed, 0) * np.sqrt(n / np.maximum(n - 1, 1)), 0.0)
    return Line(label, colour, np.array(steps), np.nanmean(values, 0), np.nanmean(smoothed, 0),
                spread)


def show(x: float, digits: int = 3) -> str:
    """0.03124 -> '0.0312', 61234.5 -> '61,234', -1 with a real minus sign, nan -> an en dash."""
    text = f"{x:,.0f}" if abs(x) >= 10**digits else f"{x:.{digits}g}"
    return text.replace("-", "−") if math.isfinite(x) else "–"


def ticks(low: float, high: float, n: int) -> list[float]:
    """At most n + 1 round numbers within [low, high]."""
    size = 10.0 ** math.floor(math.log10((high - low) / n))
    size *= next(m for m in (1, 2, 5, 10) if m * size >= 0.999 * (high - low) / n)
    return [k * size for k in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) +
                                    1)]


def panel(title: str, lines: list[Line], key: str) -> str:
    """One chart: smoothed lines over faint raw ones, last values in the legend, the values of a
    step on hover."""
    legend = "".join(f'<li style="--c:var(--{line.colour})">{escape(line.label)} <b>'
                     f"{show(line.mean[-1]) if len(line.steps) else '–'}</b></li>"
                     for line in lines)
    head = (f'<figure class="panel"><h3 title="{escape(key)}">{escape(title)}</h3>'
            f'<ul class="legend">{legend}</ul>')
    lines = [line for line in lines if len(line.steps)]
    if not lines:
        return head + f'<p class="missing">not logged<br><code>{escape(key)}</code></p></figure>'
    x0, x1 = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    raw = np.concatenate([line.raw for line in lines])
    drawn = np.concatenate([[line.mean - line.spread, line.mean + line.spread] for line in lines],
                           axis=1).ravel()
    everything = np.r_[raw, drawn]
    low, high = np.quantile(everything, (0.02, 0.98))
    if np.ptp(everything) < 2 * (high - low):
        # without outliers show the full range; else spikes are clipped and labelled with the peak
        low, high = everything.min(), everything.max()
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    if low < 0 <= raw.min():
        low = 0.0  # a non-negative metric's axis starts at 0

    def X(step):
        return 48 + 324 * (step - x0) / max(x1 - x0, 1)

    def Y(value):
        return 6 + 162 * (high - value) / (high - low)

    def points(steps, values):
        return " ".join(f"{X(s):.1f},{Y(v):.1f}" for s, v in zip(steps, values, strict=True))

    svg = [f'<svg viewBox="0 0 380 190" role="img" aria-label="{escape(title)}"><g class="grid">']
    for v in ticks(low, high, 5):
        svg.append(
            f'<path d="M48 {Y(v):.1f}H372"/><text x="41" y="{Y(v) + 4:.1f}">{show(v)}</text>')
    for v in ticks(x0, max(x1, x0 + 5), 5):
        svg.append(f'<text class="x" x="{X(v):.1f}" y="185">{show(v, 6)}</text>' if v <= x1 else "")
    svg.append(
        '</g><svg class="marks" x="42" y="3" width="336" height="168" viewBox="42 3 336 168">')
    for line in lines:
        svg.append(f'<g style="--c:var(--{line.colour})">')
        if line.spread.any():
            up, down = line.mean + line.spread, line.mean - line.spread
            svg.append(f'<polygon points="{points(line.steps, up)} '
                       f'{points(line.steps[::-1], down[::-1])}"/>')
        if not np.array_equal(line.raw, line.mean):
            svg.append(f'<polyline class="raw" points="{points(line.steps, line.raw)}"/>')
        svg.append(f'<polyline points="{points(line.steps, line.mean)}"/>')
        if len(line.steps) < 20:
            dots = (p.split(",") for p in points(line.steps, line.mean).split())
            svg += [f'<circle cx="{x}" cy="{y}" r="2.8"/>' for x, y in dots]
        svg.append("</g>")
    svg.append("</svg>")
    if raw.max() > high:
        svg.append(f'<text class="peak" x="370" y="16">peak {show(raw.max())} ↑</text>')
    every = np.unique(np.concatenate([line.steps for line in lines]))
    every = every[np.unique(np.linspace(0, len(every) - 1, 120).round().astype(int))]
    values = [dict(zip(line.steps.tolist(), line.raw.tolist(), strict=True)) for line in lines]
    width = 324 / len(every) + 1
    for step in every.tolist():
        said = [f"{line.label} {show(v[step])}" for line, v in zip(lines, values, strict=True)
                if step in v]
        svg.append(f'<rect x="{X(step) - width / 2:.1f}" y="6" width="{width:.1f}" height="162">'
                   f"<title>{escape(chr(10).join([f'step {step}', *said]))}</title></rect>")
    return head + "".join(svg) + "</svg></figure>"


def colour_of(label: str, methods: dict) -> str:
    """Name of a method's colour, the same in every chart."""
    return f"m{list(methods).index(label) % 7}" if label in methods else "soft"


def method_lines(methods: dict[str, list[Run]], key: str, shown: dict | None = None) -> list[Line]:
    return [make_line(runs, key, SHORT.get(label, label), colour_of(label, methods))
            for label, runs in methods.items() if shown is None or label in shown]


def role_lines(runs: list[Run], what: str) -> list[Line]:
    lines = [make_line(runs, f"reflect/{what}_{role}", role, role) for role in ROLES]
    first = make_line(runs, f"reflect/{what}_first_diagnosis", "first diagnosis token", "m6")
    return lines + [first] * bool(len(first.steps))


def reflects(run: Run) -> bool:
    """Does the run construct trajectories? Also True if all are dropped, so that the page shows the
    reasons."""
    return any(key.startswith("reflect/") for row in run.rows for key in row)


# --- sections -------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]], caption: str) -> str:
    """Cells are HTML, the caption is text. A row's first cell is its heading. Wide tables scroll in
    their own box."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ""
    for heading, *cells in rows:
        body += f'<tr><th scope="row">{heading}</th>' + "".join(f"<td>{cell}</td>"
            for cell in cells) + "</tr>"
    return (f'<p class="note">{escape(caption)}</p><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(caption)}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def name_of(label: str, methods: dict, names: dict = WORDS) -> str:
    """A method's name as HTML, with a chip of its colour."""
    colour = colour_of(label, methods)
    return f'<span class="key" style="--c:var(--{colour})">{escape(names.get(label, label))}</span>'


def runs_section(methods: dict[str, list[Run]]) -> str:
    rows = []
    for label, runs in methods.items():
        size = max(map(model_size, runs))
        power = min(len(str(size)) - 1, 9) // 3
        steps = max((row["step"] for run in runs for row in run.rows), default=0)
        accuracy, seconds = make_line(runs, "rollout/pass1").raw, make_line(runs, "time/step").raw
        tenth = max(1, len(accuracy) // 10)
        date = max((run.folder / "metrics.jsonl").stat().st_mtime for run in runs)
        rows.append([
            name_of(label, methods), str(len(runs)), f"{steps:,}", show(size / 1000**power) +
            ("", " k", " M", " B")[power] if size else "–",
            f"{accuracy[:tenth].mean():.1f} → <b>{accuracy[-tenth:].mean():.1f}</b>"
            if len(accuracy) else "–", show(seconds.mean()) if len(seconds) else "–",
            f"{datetime.fromtimestamp(date, timezone.utc):%Y-%m-%d}"])
    out = table(["Method", "Runs", "Steps", "Parameters", "Training accuracy, %",
                 "Seconds per step", "Date"], rows,
                "Training accuracy: mean of the first and of the last tenth of the steps.")
    settings = []
    for key in dict.fromkeys(key for runs in methods.values() for run in runs
                             for key in run.config):
        texts = [dict.fromkeys(json.dumps(run.config.get(key)) for run in runs)
                 for runs in methods.values()]
        settings.append([f"<code>{escape(', '.join(text))}</code>" for text in ([key], *texts)])
    head = ["Setting", *(name_of(label, methods, SHORT) for label in methods)]
    differ = [row for row in settings if len(set(row[1:])) > 1 and row[0] != "<code>out_dir</code>"]
    if differ:
        out += table(head, differ, "Settings that differ between methods.")
    everything = table(head, settings,
                       "Where the seeds of a method differ, their values are separated by commas.")
    return out + f"<details><summary>All {len(settings)} settings</summary>{everything}</details>"


def pass_at(group: list[dict], k: int) -> tuple[float, float, float]:
    """(Pass@k, low, high) in %: low and high are the confidence interval of a single evaluation, or
    mean -+ standard deviation over several."""
    found = [s.get("pass@k", {}).get(str(k), {}) for s in group]
    values = [100 * number(p) for p in found]
    if len(group) > 1:
        mean, sd = np.mean(values), np.std(values, ddof=1)
        return mean, mean - sd, mean + sd
    interval = found[0] if isinstance(found[0], dict) else {}
    return values[0], 100 * number(interval.get("low")), 100 * number(interval.get("high"))


def differences(evals: dict[str, list[Path]]) -> dict[str, dict]:
    """{label: {setting: paired comparison with the first label over the seeds in common}}, or
    {label: {"why": reason}} if there is none."""
    seeds = [{re.search(r"(_[sc]\d+)?$", path.stem)[0]: path for path in paths}
             for paths in evals.values()]
    compared = {}
    for label, theirs in list(zip(evals, seeds, strict=True))[1:]:
        # a baseline without a seed number is paired with every seed
        base = {seed: seeds[0].get(seed, seeds[0].get("")) for seed in theirs}
        # a cold start's _c0 is never paired with a training run's _s0
        common = [seed for seed in theirs if base[seed]]
        try:
            found = compare_runs([[group[seed] for seed in common]
                                  for group in (base, theirs)]) if common else []
            compared[label] = {tuple(d[key] for key in SETTING): d | {"seeds": common}
                               for d in found}
        except ValueError as error:
            compared[label] = {"why": str(error)}
    return {label: found or {"why": "no seed in common"} for label, found in compared.items()}


def forests(compared: dict[str, dict], first: str) -> list[tuple[str, list[tuple[str, dict]]]]:
    """[(title, [(label, comparison)])], one per setting at temperature 1, or per setting if none is
    at temperature 1."""
    settings = dict.fromkeys(setting for found in compared.values() for setting in found
                             if setting != "why")
    return [(f"Δ Pass@1 vs {SHORT.get(first, first)}, points ({setting[0]}, T {setting[1]:g})",
             [(label, found[setting]) for label, found in compared.items() if setting in found])
            for setting in [setting for setting in settings if setting[1] == 1] or settings]


def forest_reach(rows: list[tuple[str, dict]]) -> tuple[float, float]:
    """Axis range (low, high) in points: covers 0, all seeds, and all intervals except those over
    two seeds, which are too wide."""
    values = [0.0]
    for _, d in rows:
        values += d["by_seed"] + [d["low"], d["high"]] * (len(d["by_seed"]) != 2)
    low, high = 100 * min(values), 100 * max(values)
    margin = 0.05 * max(high - low, 1.0)
    return low - margin, high + margin


def signed(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def delta(d: dict) -> str:
    """A comparison as HTML: the difference and its interval; on hover the number of seeds and p."""
    return (f'<span title="seeds in common: {len(d["seeds"])}, p = '
            f'{d["p"]:.3f}">{signed(d["difference"])} '
            f"<small>{signed(d['low'])} to {signed(d['high'])}</small></span>")


def forest(title: str, rows: list[tuple[str, dict]], methods: dict) -> str:
    """Forest plot, one row per method: seeds as dots, mean, confidence interval. Positions are in
    %, so that the plot scales to any width."""
    low, high = forest_reach(rows)

    def X(points):
        return f"{100 * (points - low) / (high - low):.2f}%"

    marks = ticks(low, high, 8)
    grid = "".join(f'<line{" class=zero" * (v == 0)} x1="{X(v)}" x2="{X(v)}" y2="28"/>'
                   for v in marks)
    axis = "".join(f'<text x="{X(v)}" y="14">{show(v)}</text>' for v in marks)
    lines = ""
    for label, d in rows:
        left, right, mean = (X(100 * d[key]) for key in ("low", "high", "difference"))
        dots = "".join(
            f'<circle cx="{X(100 * v)}" cy="8" r="3"><title>{seed[1:]} {signed(v)}</title></circle>'
            for seed, v in zip(d["seeds"], d["by_seed"], strict=True))
        name = name_of(label, methods, SHORT)
        lines += (
            f'<li style="--c:var(--{colour_of(label, methods)})">{name}<svg '
            f'aria-hidden="true">{grid}{dots}<line class="interval" x1="{left}" x2="{right}" '
            f'y1="18" y2="18"/>'
            f'<circle class="mean" cx="{mean}" cy="18" r="5.5"/></svg>{delta(d)}</li>')
    return (f'<figure class="panel forest"><h3>{escape(title)}</h3><p class="note">Dots: training '
            f'seeds. Below them: mean over seeds and its 95 % interval.</p><ul>{lines}'
            f'<li><i></i><svg aria-hidden="true">{axis}</svg></li></ul></figure>')


def evals_section(evals: dict[str, list[Path]], compared: dict[str, dict], methods: dict) -> str:
    """Forest plots against the first method; then one table per problem set and sampling setting.
    """
    by_setting, first = {}, next(iter(evals), "")
    for label, paths in evals.items():
        for path in paths:
            for s in jsonl.parse(path.read_text(encoding="utf-8"), str(path)).get("settings", []):
                by_setting.setdefault(tuple(s.get(key) for key in SETTING), {}).setdefault(label,
                    []).append(s)
    out = "".join(forest(title, rows, methods) for title, rows in forests(compared, first))
    for setting, groups in by_setting.items():
        every = [s for group in groups.values() for s in group]
        ks = sorted({int(k) for s in every for k in s.get("pass@k", {})}) or [1]
        rows = []
        for label, group in groups.items():
            cells = []
            for value, low, high in (pass_at(group, k) for k in ks):
                spread = f"{low:.1f}–{high:.1f}".replace("nan–nan", "")
                if len(group) > 1:
                    spread = f"± {value - low:.1f}"
                cells.append(f"<b>{value:.1f}</b> <small>{spread}</small>" if math.isfinite(value)
                             else "–")
            d = compared.get(label, {})
            cells.append(delta(d[setting]) if setting in d
                         else f'<span title="{escape(d.get("why", ""))}">–</span>')
            for key in ("truncated", "no_answer", "reflect_rate", "DSR", "ERR"):
                cells.append(show(100 * np.mean([number(s.get(key)) for s in group])))
            rows.append(
                [name_of(label, methods) + f" <small>{len(group)} runs</small>" * (len(group) > 1),
                 *cells])
        head = ["Model", *(f"Pass@{k}" for k in ks),
                f"Δ Pass@1 <small>vs {escape(SHORT.get(first, first))}</small>", "Truncated",
                "No answer", "Reflects", "DSR", "ERR"]
        samples, problems = ("–".join(dict.fromkeys(f"{f(n):,}" for f in (min, max))) for n in (
            [s.get("samples", 0) for s in every], [len(s.get("per_problem", [])) for s in every]))
        name, temperature, top_p, cap = setting
        caption = (f"{name}, temperature {temperature}, top-p {top_p}: {samples} samples of at "
                   f"most {cap} tokens")
        out += table(head, rows, f"{caption} for each of {problems} problems. All in %.")
    return out + (
        '<p class="note">In small type: the 95 % interval of a single evaluation, or the standard '
        'deviation over several. Δ: paired by ' "problem and training seed, over the shared seeds, "
        "with its 95 % interval over seeds, or over problems if only one seed is "
        "shared. DSR: share of correct answers reached without reflection. ERR: share of "
        "responses that reflect and " "end correct. Both over problems with a pass rate strictly "
        "between 0 and 1.</p>" if out
        else '<p class="missing">no evaluation files were given (<code>--evals</code>)</p>')


def reflection_section(methods: dict[str, list[Run]]) -> str:
    constructing = {label: runs for label, runs in methods.items() if any(map(reflects, runs))}
    if not constructing:
        return '<p class="missing">not logged: none of these runs constructs trajectories</p>'
    panels = [panel(title, method_lines(methods, key, constructing), key)
              for key, title in REFLECTION.items()]
    for label, runs in constructing.items():
        of = f", {SHORT.get(label, label)}" if len(constructing) > 1 else ""
        logged = {key for run in runs for row in run.rows for key, v in row.items()
                  if number(v) > 0}
        reasons = sorted(key.split("dropped_")[1] for key in logged
                         if key.startswith("reflect/dropped_"))
        lines = [make_line(runs, f"reflect/dropped_{reason}", reason.replace("_", " "),
                           f"m{6 - i % 7}") for i, reason in enumerate(reasons)]
        panels += [panel("Log-prob by role" + of, role_lines(runs, "logprob"),
                         "reflect/logprob_<role>"),
                   panel("OTS weight by role" + of, role_lines(runs, "ots"), "reflect/ots_<role>"),
                   panel("Dropped, by reason" + of, lines, "reflect/dropped_<reason>")]
    return f'<div class="panels">{"".join(panels)}</div>'


def measured_section(measured: dict[str, list[Path]], methods: dict) -> str:
    """The tables of tools.tables, each method's name on its first row only."""
    out, found = "", {}
    for label, paths in measured.items():
        found[label] = [jsonl.parse(path.read_text(encoding="utf-8"), str(path)) for path in paths]
        for path, m in zip(paths, found[label], strict=True):
            if not {"shift", "gradient", "constructions"} <= m.keys():
                raise ValueError(f"{path} is not a result of tools.measure")
    for make, caption in MEASURED.items():
        rows = []
        for label, seeds in found.items():
            # tools.measure writes 'recovery' only in a toy world
            if make is not tables.errors_table or all("recovery" in m for m in seeds):
                head, lines = make({label: seeds})
                rows += [
                    [name_of(label, methods) * (i == 0), *(escape(cell).replace("-", "−")
                    for cell in cells)] for i, (_, *cells) in enumerate(lines)]
        out += table([escape(cell).replace("1e-3", "10⁻³") for cell in head], rows,
                     caption) if rows else ""
    return out


def time_section(methods: dict[str, list[Run]]) -> str:
    rows = []
    for label, runs in methods.items():
        mean = {key: line.raw.mean() if len((line := make_line(runs, f"time/{key}")).steps)
                else math.nan for key in ("step", *PHASES, "tokens_per_second")}
        phases = {name: mean[name] for name in PHASES}
        phases["other"] = np.maximum(0.0, mean["step"] - np.nansum(list(phases.values())))
        rows.append((label, phases, mean))
    longest = np.nanmax([0.0, *(np.nansum(list(phases.values())) for _, phases, _ in rows)])
    if not longest:
        return '<p class="missing">not logged<br><code>time/*</code></p>'
    body = []
    for label, phases, mean in rows:
        x, bar = 0.0, '<svg class="bar" viewBox="0 0 300 16" aria-hidden="true">'
        for i, (name, seconds) in enumerate(phases.items()):
            width = 300 * np.nan_to_num(seconds) / longest
            bar += (f'<rect class="p{i}" x="{x:.1f}" width="{max(width - 1.5, 0):.1f}" height="16" '
                    f'rx="2">' f"<title>{name} {show(seconds)} s</title></rect>")
            x += width
        cells = [*map(show, phases.values()), f"<b>{show(mean['step'])}</b>",
                 show(mean["tokens_per_second"])]
        body.append([name_of(label, methods), bar + "</svg>", *cells])
    head = [f'<span class="key p{i}">{name}</span>' for i, name in enumerate((*PHASES, "other"))]
    return table(["Method", "", *head, "step", "sampled tokens / s"], body,
                 "Seconds per step, mean over the run.")


# --- trajectories ---------------------------------------------------------------------------------


def pick_trajectories(folder: Path, n: int, reflections: bool) -> list[tuple[dict, list[dict]]]:
    """Up to n pairs (rollout, ordinary rollouts of its query): training is split into n segments;
    the first rollout of each is taken, then the second of each, ..: evenly spread, not selected by
    quality."""
    files, stretches = sorted((folder / "rollouts").glob("step_*.jsonl")), []
    for part in np.array_split(np.arange(len(files)), max(1, min(n, len(files)))):
        for file in (files[i] for i in part):
            rollouts = [ROLLOUT | rollout for rollout in jsonl.read(file)]
            ordinary = [r for r in rollouts if not r["is_reflection"]]
            if chosen := [r for r in rollouts if r["is_reflection"] == reflections][:n]:
                queries = [(r["uid"], r["query"]) for r in chosen]
                same = [[o for o in ordinary if (o["uid"], o["query"]) == query]
                        for query in queries]
                stretches.append(list(zip(chosen, same, strict=True)))
                break
    picked = [stretch[i] for i in range(n) for stretch in stretches if i < len(stretch)][:n]
    return sorted(picked, key=lambda pair: pair[0]["step"])


def pieces(tokenizer, ids: list[int]) -> list[tuple[int, int, str]]:
    """[(start, end, text)], one per token; tokens that hold only part of a UTF-8 character (decoded
    alone they give U+FFFD) are merged with the next ones, up to four tokens: a character has at
    most four bytes."""
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False,
                                clean_up_tokenization_spaces=False)
        if "\ufffd" not in text or end == len(ids) or end - start == 4:
            out.append((start, end, text))
            start = end
    return out


def tokens_html(rollout: dict, roles: list[str], tokenizer, masked: str = "", detailed: bool
                = True) -> str:
    """A <span class=role> per span of one role, inside it a <span> per token; hover: id, log-prob,
    OTS weight.

    roles (C,) are class names, `masked` is the role without gradient. Folded tokens are plain text
    unless `detailed`.
    """
    if tokenizer is None:
        return escape(rollout["text"])
    ids, weights = rollout["completion_ids"], rollout["ots_weights"] or []
    logprobs = rollout["logprobs"] or rollout["sample_logprobs"] or []

    def span(start, end, text):
        said = []
        for i in range(start, end):
            logprob = f" · log-prob {number(logprobs[i]):.3f}" if i < len(logprobs) else ""
            weight = f" · OTS {number(weights[i]):.3f}" if i < len(weights) else ""
            said.append(f"id {ids[i]}{logprob}{weight}" + " · no gradient" * (roles[i] == masked))
        weight = min((number(w) for w in weights[start:end]), default=math.nan)
        mark = ' class="w1"' if weight < 0.1 else ' class="w2"' if weight < 0.5 else ""
        text = escape(text).replace("\n", "<i>↵</i>\n")
        return f'<span{mark} title="{escape(chr(10).join(said))}">{text}</span>'

    html = ""
    for role, stretch in groupby(pieces(tokenizer, ids), key=lambda piece: roles[piece[0]]):
        stretch = list(stretch)
        cut = FOLD if len(stretch) > 3 * FOLD else len(stretch)
        html += f'<span class="{role}">' + "".join(span(*piece)
            for piece in stretch[:cut]) + "</span>"
        if hidden := stretch[cut:-cut]:
            inside = "".join(span(*piece) if detailed else escape(piece[2]) for piece in hidden)
            html += f"<details><summary>{hidden[-1][1] - hidden[0][0]:,} more tokens</summary>"
            html += f'<span class="{role}">{inside}</span></details>'
            html += f'<span class="{role}">' + "".join(span(*piece)
                for piece in stretch[-cut:]) + "</span>"
    return html


def column(title: str, rollout: dict, tokens: str, count: str) -> str:
    reward, advantage = number(rollout["reward"]), number(rollout["advantage"])
    verdict = ('<span class="right">✓ correct</span>' if reward > 0 else
               '<span class="wrong">✗ wrong</span>')
    answer = f"answer <b>{escape(str(rollout['answer']))}</b>" if rollout[
        "answer"] is not None else "no answer"
    return (f"<section><h4>{title}</h4><p>{verdict} · {answer} · reward {show(reward)} · advantage "
            f"{'+' if advantage > 0 else ''}{show(advantage)}<br>{count}</p>"
            f'<div class="tokens" tabindex="0" role="region" '
            f'aria-label="{title}">{tokens}</div></section>')


def card(rollout: dict, siblings: list[dict], tokenizer, masked: str) -> str:
    """HTML of a construction between its source, a wrong rollout, and a right rollout of the group;
    or of an ordinary rollout alone."""
    ids, columns = rollout["completion_ids"], []

    def ordinary(title, r, kept=0):
        n = len(r["completion_ids"])
        roles = ["prefix"] * kept + ["ordinary"] * (n - kept)
        columns.append(column(title, r, tokens_html(r, roles, tokenizer, detailed=False),
                              f"{n:,} tokens"))

    if rollout["is_reflection"]:
        roles = [ROLES[i] if i in (0, 1, 2) else "ordinary" for i in rollout["roles"]]
        roles += ["ordinary"] * (len(ids) - len(roles))
        kept = next((i for i, role in enumerate(roles) if role != "prefix"), len(roles))
        wrong, right = ([r for r in siblings if (number(r["reward"]) > 0) == is_right]
                        for is_right in (False, True))
        source = [r for r in wrong if kept and r["completion_ids"][:kept] == ids[:kept]]
        if source:
            known = all(r["completion_ids"] == source[0]["completion_ids"] for r in source)
            title = ("The wrong rollout it starts from" if known else
                     "A wrong rollout with this prefix")
            ordinary(title, source[0], kept)
        elif wrong:
            ordinary("A wrong rollout of the group", wrong[0])
        counts = " · ".join(f"{roles.count(role):,} {role}" for role in ROLES)
        tokens = tokens_html(rollout, roles, tokenizer, masked)
        columns.append(column("Constructed trajectory", rollout, tokens, counts))
        if right:
            ordinary("A correct rollout of the group", right[0])
    else:
        ordinary("Ordinary rollout", rollout)
    step, uid, question, gold = (escape(str(rollout[key]))
                                 for key in ("step", "uid", "question", "gold"))
    return (f'<article class="card"><h3>Step {step} <small>{uid}</small></h3><p '
            f'class="question">{question}</p><p class="gold">gold answer <b>{gold}</b></p><div '
            f'class="columns">{"".join(columns)}</div></article>')


def trajectories_section(runs: list[Run]) -> str:
    """Trajectories of the first run that constructs some; if none does, ordinary rollouts of the
    first run that saved any."""
    picked = []
    for reflections in (True, False):
        for run in runs:
            if not picked and reflects(run) >= reflections:
                picked, source = pick_trajectories(run.folder, N_TRAJECTORIES, reflections), run
    if not picked:
        return '<p class="missing">not logged: no rollouts/step_*.jsonl</p>'
    tokenizer = None
    if (source.folder / "tokenizer").is_dir():
        # takes seconds to import, so only if there are tokens to show
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source.folder / "tokenizer",
            local_files_only=True)
    masked = "diagnosis" if source.config.get("diagnosis") == "mask" else ""
    names = {"prefix": "preserved prefix", "diagnosis": "diagnosis" +
             " (no gradient)" * bool(masked), "correction": "correction", "ordinary": "ordinary",
             "w2": "OTS &lt; 0.5", "w1": "OTS &lt; 0.1"}
    legend = "".join(f'<li><span class="{css}">{name}</span></li>' for css, name in names.items())
    what = "constructed trajectories"
    if not picked[0][0]["is_reflection"]:
        what, legend = "ordinary rollouts (none are constructed)", ""
    how = "No tokenizer in the run folder: plain text."
    if tokenizer:
        how = "Hover over a token for its id, log-prob and OTS weight."
    cards = "".join(card(rollout, siblings, tokenizer, masked) for rollout, siblings in picked)
    name = escape(source.folder.resolve().name)
    return (
        f'<p class="note">{len(picked)} {what} of <b>{name}</b>, spread evenly over training and '
        f'not chosen by quality. {how}</p><ul class="roles">{legend}</ul>{cards}')


# --- the page -------------------------------------------------------------------------------------


def build_page(methods: dict[str, list[Run]], evals: dict[str, list[Path]],
               compared: dict[str, dict], measured: dict[str, list[Path]]) -> str:
    runs = [run for group in methods.values() for run in group]
    held_out = [panel(title, method_lines(methods, key), key) for key, title in HELD_OUT.items()
                if any(key in row for run in runs for row in run.rows)]
    figure_3 = [panel(title, method_lines(methods, key), key) for key, title in FIGURE_3.items()]
    sections = {
        "Runs": runs_section(methods), "Evaluation": evals_section(evals, compared, methods) +
        f'<div class="panels">{"".join(held_out)}</div>',
        "Training dynamics": '<p class="note">Bold: centred moving average, its last value beside '
        'each name. Faint: raw. Band: ' "one standard deviation over seeds. Hover for single "
        "steps.</p>" f'<div class="panels" id="figure-3">{"".join(figure_3)}</div>',
        "Reflections": reflection_section(methods),
        **({"Measurements": measured_section(measured, methods)} if measured else {}),
        "Time": time_section(methods), "Trajectories": trajectories_section(runs),}
    anchor = {name: name.lower().replace(" ", "-") for name in sections}
    nav = "".join(f'<a href="#{anchor[name]}">{name}</a>' for name in sections)
    body = "".join(f'<section id="{anchor[name]}"><h2>{name}</h2>{html}</section>'
                   for name, html in sections.items())
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLOURS.items())
                   for i in (0, 1))
    title = escape(" · ".join(SHORT.get(label, label) for label in methods))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: training '
        f'report</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta '
        'name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
        "'unsafe-inline'\">"
        f"<style>:root{{{light}}}@media "
        f"(prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE}</style></head><body>"
        f"<header><p>Training report, {len(runs)} "
        f"run{'s' * (len(runs) > 1)}</p><h1>{title}</h1><nav>{nav}</nav>"
        f"</header><main>{body}</main></body></html>\n")


STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);-webkit-text-size-adjust:100%;
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
header,main{max-width:1240px;margin:auto;padding:0 20px}
header{padding-top:44px}
header p{margin:0;color:var(--soft);font-size:14px}
h1{font-size:clamp(26px,4vw,38px);line-height:1.15;letter-spacing:-.02em;margin:2px 0 18px;
  overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;padding-bottom:14px;font-size:15px;
  border-bottom:1px solid var(--rule)}
nav a{color:var(--ink);text-decoration:none;border-bottom:2px solid transparent}
nav a:hover{border-color:var(--m0)}
main>section{padding-top:40px}
main>section:last-child{padding-bottom:60px}
h2{font-size:23px;letter-spacing:-.01em;margin:0 0 12px}
h3,h4{margin:0;font-size:15px;line-height:1.3}
small{font-size:.82em;color:var(--soft);font-weight:400}
code,.tokens{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.note{max-width:88ch;text-wrap:pretty;margin:0 0 16px;font-size:14.5px}
.note,.missing,summary,thead th,.gold{color:var(--soft)}
:focus-visible{outline:2px solid var(--m0);outline-offset:2px}

.scroll{overflow-x:auto;margin:-8px 0 22px}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:8px 18px 8px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
th{white-space:normal}tbody th{min-width:10em}thead th:has(.key){white-space:nowrap}
thead th{font-weight:500;font-size:13.5px;vertical-align:bottom}
details td{min-width:11em;white-space:normal;overflow-wrap:anywhere}
summary{cursor:pointer;font-size:14.5px;margin-bottom:12px}
.key::before,.legend li::before{content:"";display:inline-block;width:10px;height:10px;
  border-radius:3px;background:var(--c);margin-right:7px}
figure.forest{margin-bottom:22px}
.forest ul{margin:0;padding:0;font-size:14px;font-variant-numeric:tabular-nums}
.forest li{display:grid;grid-template-columns:19em 1fr 10em;gap:0 16px;align-items:center}
.forest svg{width:100%;height:28px}.forest line{stroke:var(--grid)}.forest .zero{stroke:var(--soft)}
.forest .interval{stroke:var(--c);stroke-width:2.5}.forest circle{fill:var(--c);fill-opacity:.5}
.forest .mean{fill-opacity:1;stroke:var(--card);stroke-width:1.5}
.forest text{fill:var(--soft);font-size:12px;text-anchor:middle}
.bar{display:block;width:300px;height:16px;fill:var(--c)}
.bar rect{fill:var(--c)}
.p0{--c:var(--p0)}.p1{--c:var(--p1)}.p2{--c:var(--p2)}.p3{--c:var(--p3)}.p4{--c:var(--p4)}

.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,345px),1fr));gap:16px}
.panel,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.panel{display:flex;flex-direction:column;margin:0;padding:14px 14px 8px;min-width:0}
.panel .missing{margin:auto;padding:56px 0;text-align:center;font-size:14px}
.legend,.roles{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:3px 0 6px;padding:0;
  font-size:13px;color:var(--soft)}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.legend li::before{height:3px;width:14px;vertical-align:middle}
.panel>svg{display:block;width:100%;height:auto;margin-top:auto;overflow:visible}
.grid path{stroke:var(--grid)}
.grid text,.peak{fill:var(--soft);font-size:11px;text-anchor:end;font-variant-numeric:tabular-nums}
.grid .x{text-anchor:middle}
.marks{overflow:hidden}
.marks polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.marks .raw{stroke-width:1;opacity:.32}
.marks polygon{fill:var(--c);opacity:.17}
.marks circle{fill:var(--c)}
.panel rect{fill:var(--ink);fill-opacity:0}
.panel rect:hover{fill-opacity:.09}

.roles{gap:8px 16px;margin-bottom:18px;font-size:14px}
.roles span{padding:2px 7px}
.prefix{--c:var(--prefix)}.diagnosis{--c:var(--diagnosis)}.correction{--c:var(--correction)}
.prefix,.diagnosis,.correction{color:var(--ink);padding:1px 0;
  background:color-mix(in srgb,var(--c) var(--tint),transparent);box-shadow:inset 0 -2px var(--c);
  -webkit-box-decoration-break:clone;box-decoration-break:clone}
.ordinary{color:var(--ink)}
.roles .ordinary{border:1px solid var(--rule)}
.w1,.w2{outline:1px dashed var(--soft);border-radius:2px}
.w1{outline:1.5px solid var(--ink)}
.card{padding:18px;margin-bottom:16px}
.question{white-space:pre-wrap;margin:8px 0 2px;max-width:90ch}
.gold{margin:0 0 12px;font-size:14px}
.gold b,.columns b{color:var(--ink)}
.card p,.card h3{overflow-wrap:anywhere}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:14px}
.columns section{min-width:0}
.columns p{margin:2px 0 8px;font-size:13px;color:var(--soft)}
.right,.wrong{color:var(--right);font-weight:600}
.wrong{color:var(--wrong)}
.tokens{font-size:14px;line-height:1.85;white-space:pre-wrap;overflow-wrap:anywhere;max-height:36em;overflow-y:auto;
  padding:8px 12px;background:var(--page);border:1px solid var(--rule);border-radius:7px}
.tokens summary{font:13px/1.6 system-ui,sans-serif;margin:4px 0}
.tokens i{color:var(--soft);font-style:normal;opacity:.55}
.tokens span>span:hover{background:var(--ink);color:var(--page)}
@media (max-width:600px){header,main{padding:0 16px}header{padding-top:24px}.card{padding:14px}
  .forest ul{font-size:13px}
  .forest li{grid-template-columns:1fr auto;margin-bottom:6px}.forest svg{grid-area:2/1/3/3}
  .forest i{display:none}}
"""


def draw_lines(axes, lines: list[Line]) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("step")
    for line in (line for line in lines if len(line.steps)):
        colour = COLOURS[line.colour][0]
        axes.plot(line.steps, line.raw, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(line.steps, line.mean, color=colour, label=line.label)
        low, high = line.mean - line.spread, line.mean + line.spread
        axes.fill_between(line.steps, low, high, color=colour, alpha=0.15, linewidth=0)
    if not axes.lines:
        axes.text(0.5, 0.5, "not logged", ha="center", color="gray", transform=axes.transAxes)


def draw_forest(axes, rows: list[tuple[str, dict]], methods: dict) -> None:
    axes.grid(axis="x", alpha=0.3)
    axes.axvline(0, color=COLOURS["ink"][0], linewidth=1)
    for y, (label, d) in enumerate(rows):
        colour = COLOURS[colour_of(label, methods)][0]
        axes.plot([100 * d["low"], 100 * d["high"]], [y, y], color=colour, linewidth=2)
        axes.plot([100 * v for v in d["by_seed"]], [y - 0.3] * len(d["by_seed"]), "o", color=colour,
                  alpha=0.5, markersize=4)
        axes.plot(100 * d["difference"], y, "o", color=colour, markersize=9,
                  markeredgecolor="white")
    axes.set(yticks=range(len(rows)), yticklabels=[SHORT.get(label, label) for label, _ in rows],
             xlim=forest_reach(rows), ylim=(len(rows) - 0.4, -0.8))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def save_pngs(methods: dict[str, list[Run]], trees: list[tuple[str, list[tuple[str, dict]]]],
              folder: Path) -> None:
    """Save the main figures for a README: dynamics.png; reflection.png if trajectories are
    constructed; if evaluations are comparable, forest.png with all methods and headline.png with
    the methods that have run folders."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)

    def save(name, size, n_rows, drawings):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(n_rows, len(drawings) // n_rows, squeeze=False).flat
        for axes, (title, draw, *what) in zip(panels, drawings, strict=True):
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes, *what)
        named = {line.get_label(): line for axes in figure.axes for line in axes.lines
                 if line.get_label()[0] != "_"}
        if named:
            figure.legend(named.values(), named, loc="outside lower center", ncols=5, frameon=False,
                          fontsize=9)
        figure.savefig(folder / f"{name}.png", dpi=140)

    dynamics = {key: (title, draw_lines, method_lines(methods, key))
                for key, title in FIGURE_3.items()}
    save("dynamics", (11, 5.4), 2, list(dynamics.values()))
    constructing = {label: runs for label, runs in methods.items() if any(map(reflects, runs))}
    if constructing:
        label, runs = next(iter(constructing.items()))
        save("reflection", (11, 5.4), 2, [
            *((REFLECTION[f"reflect/{name}"], draw_lines,
               method_lines(methods, f"reflect/{name}", constructing))
              for name in ("parsed", "correct", "mixed_groups", "length")),
            *((f"{name} by role, {SHORT.get(label, label)}", draw_lines, role_lines(runs, key))
              for name, key in (("Log-prob", "logprob"), ("OTS weight", "ots")))])
    if trees:
        height = 0.8 + 0.3 * max(len(rows) for _, rows in trees)
        save("forest", (8 * len(trees), height), 1,
             [(title, draw_forest, rows, methods) for title, rows in trees])
        title, rows = trees[0]
        if rows := [row for row in rows if row[0] in methods]:
            save("headline", (11, 3.6), 1,
                 [dynamics["rollout/pass1"], (title, draw_forest, rows, methods)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.report",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path,
                        help="folders of train.py; x_s0, x_s1 are seeds of one method x")
    parser.add_argument("--evals", default="",
                        help="files of eval.py, separated by commas; Δ refers to the first")
    parser.add_argument("--measured", default="",
                        help="files of tools.measure, separated by commas")
    parser.add_argument("--out", default="report.html", type=Path)
    parser.add_argument("--png", type=Path, help="folder for PNGs of the main figures")
    args = parser.parse_args(argv)
    folders = label_runs(list(dict.fromkeys(args.runs)))
    methods = {label: [load_run(path) for path in paths] for label, paths in folders.items()}
    evals, measured = ([Path(name) for name in names.split(",") if name]
                       for names in (args.evals, args.measured))
    for path in evals + measured:
        if not path.is_file():
            raise FileNotFoundError(f"--evals, --measured: no file {path}; eval.py and "
                                    "tools.measure write one as OUT.json")
    evals = label_runs(evals)
    compared = differences(evals)
    page = build_page(methods, evals, compared, label_runs(measured))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(f"{args.out}: {len(page) / 1e6:.1f} MB")
    if args.png:
        save_pngs(methods, forests(compared, next(iter(evals), "")), args.png)


if __name__ == "__main__":
    run_script(main)
