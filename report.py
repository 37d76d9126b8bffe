"""Run folders in, one self-contained HTML page out: what a run did, read in the order a researcher asks.

    python report.py out/toy/tapo out/toy/grpo --evals=tapo.json,grpo.json --out=report.html --png=assets

Scores first, then the six curves of Fig. 3, the life of the constructed trajectories (how many, how right, how far
from the policy, role by role), where the time went, and twenty trajectories token by token. Folders whose names
differ only in a trailing `_s<digits>` are seeds of one method: one mean line and a band of one standard deviation.

Deliberately missing: scripts, fonts and requests of any kind (the page forbids them to itself by a content policy),
and any recomputation: every number was logged by train.py or eval.py; the one thing added is the paired difference.
"""

import argparse
import datetime
import json
import math
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

FIGURE_3 = {  # metric key: title; the panels and their order are those of the paper's Fig. 3
    "train/ots_weight": "OTS weight, mean",
    "train/loss": "Policy-gradient loss",
    "rollout/pass1": "Training accuracy",
    "train/grad_norm": "Gradient norm",
    "rollout/length": "Response length, tokens",
    "train/kl_ref": "KL to the reference",
}
REFLECTION = {
    "reflect/eligible": "Eligible queries (Eq. 3)",
    "reflect/candidates": "Candidate pairs",
    "reflect/parsed": "Answers that parsed",
    "reflect/kept": "Constructions kept",
    "reflect/correct": "Constructions that are right",
    "reflect/verbatim": "Prefix kept verbatim",
    "reflect/mixed_groups": "Groups with both rewards",
    "reflect/length": "Construction length, tokens",
}
PHASES = ["generate", "reflect", "grade", "update"]
ROLES = ["prefix", "diagnosis", "correction"]  # index = the role id in a rollout file
N_TRAJECTORIES = 20
MAX_SIBLING_TOKENS = 1500  # a construction is always shown whole, the rollouts beside it are cut here

# Okabe and Ito's colours, safe for colour-blind readers; lightened for the dark page. m0.. are the methods, in order.
LIGHT = {"m0": "#0072b2", "m1": "#d55e00", "m2": "#009e73", "m3": "#b0508c", "m4": "#a87900", "m5": "#3a9bd5",
         "m6": "#6b6b6b", "prefix": "#c77700", "diagnosis": "#a3418a", "correction": "#0a6fb0", "first": "#555555"}  # fmt: skip
DARK = {"m0": "#5cb3ec", "m1": "#ff8f4d", "m2": "#35c79c", "m3": "#e08fc2", "m4": "#e3b32c", "m5": "#9ad4fb",
        "m6": "#a8a8a8", "prefix": "#e9a13b", "diagnosis": "#e08fc2", "correction": "#62b5ec", "first": "#b5b5b5"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# reading


class Run(NamedTuple):
    folder: Path
    method: str  # the folder's name without its seed
    config: dict
    rows: list[dict]  # one metrics row a step, steps ascending


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a jsonl file. A last line torn by a kill is dropped; any other bad line is an error."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not JSON ({error.msg}); only the last line may be torn") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line.strip()[:40]!r}")
        objects.append(value)
    return objects


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def method_of(name: str) -> str:
    """'tapo_s3' -> 'tapo': the label that seeds of one method share."""
    return re.sub(r"_s\d+$", "", name)


def labels(paths: list[Path]) -> list[str]:
    """A short name for each path: its stem, with the parent in front wherever stems alone would collide."""
    stems = [p.stem if p.suffix == ".json" else p.name for p in paths]
    return [f"{p.resolve().parent.name}/{s}" if stems.count(s) > 1 else s for p, s in zip(paths, stems, strict=True)]


def load_runs(folders: list[str]) -> list[Run]:
    paths, runs = [Path(f) for f in dict.fromkeys(str(Path(f)) for f in folders)], []
    for path, label in zip(paths, labels(paths), strict=True):
        missing = [f for f in ("config.json", "metrics.jsonl") if not (path / f).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} is not a run folder: no {' and no '.join(missing)} in it")
        by_step = {}  # after a resume a step can be there twice: the later row counts
        for row in read_jsonl(path / "metrics.jsonl"):
            if not isinstance(row.get("step"), int):
                raise ValueError(f"{path / 'metrics.jsonl'}: a row without an integer 'step': {str(row)[:60]}")
            by_step[row["step"]] = row
        runs.append(Run(path, method_of(label), read_json(path / "config.json"), [by_step[s] for s in sorted(by_step)]))
    return runs


def number(value) -> float:
    """A logged value as a float: plain, or {'value': ..}; anything else is nan ('not logged')."""
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else math.nan


def model_size(run: Run) -> int:
    """Number of parameters, from the headers of the newest checkpoint's safetensors (or of `init_from`); 0: unknown."""
    for folder in [*sorted(run.folder.glob("step_*"), reverse=True), Path(str(run.config.get("init_from") or "?"))]:
        total = 0
        for shard in folder.glob("*.safetensors"):
            with open(shard, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        if total:
            return total
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# curves


class Line(NamedTuple):
    label: str
    colour: str  # a name in LIGHT and DARK
    steps: np.ndarray  # (N,)
    values: np.ndarray  # (S, N): one row a seed, nan where not logged


def line_of(runs: list[Run], key: str, label: str, colour: str) -> Line:
    logged = [{row["step"]: number(row.get(key)) for row in run.rows} for run in runs]
    steps = sorted({s for run in logged for s, value in run.items() if math.isfinite(value)})
    values = [[run.get(s, math.nan) for s in steps] for run in logged]
    return Line(label, colour, np.array(steps), np.array(values).reshape(len(runs), len(steps)))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of each row of (S, N), over the finite values in reach: no lag, no invented edges."""
    def sums(row):
        return np.convolve(np.pad(row, window // 2), np.ones(window), "valid")

    finite = np.isfinite(values)
    counts = np.apply_along_axis(sums, 1, finite.astype(float))
    return np.where(counts > 0, np.apply_along_axis(sums, 1, np.where(finite, values, 0.0)), np.nan) / np.maximum(counts, 1)


def shape_of(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """raw (N,), mean (N,), spread (N,): the mean over seeds, the same smoothed, and the seeds' standard deviation."""
    n = len(line.steps)
    smoothed = smooth(line.values, 1 if n < 20 else min(n // 15, 30) // 2 * 2 + 1)
    seeds = np.isfinite(smoothed).sum(0)
    spread = np.where(seeds > 1, np.nanstd(smoothed, 0) * np.sqrt(seeds / np.maximum(seeds - 1, 1)), 0.0)
    return np.nanmean(line.values, 0), np.nanmean(smoothed, 0), spread


def ticks(low: float, high: float, n: int) -> list[float]:
    """At most n + 1 round numbers within [low, high]."""
    rough = (high - low) / n
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(m for m in (1, 2, 5, 10) if m * size >= rough * 0.999)
    return [k * size for k in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def show(x: float, digits: int = 3) -> str:
    """0.0312 -> '0.0312', 61234.5 -> '61,235', -1 -> a real minus sign, nan -> an en dash."""
    if not math.isfinite(x):
        return "–"
    text = f"{x:,.0f}" if abs(x) >= 10**digits else f"{x:.{digits}g}"
    return text.replace("-", "−")


def panel(title: str, lines: list[Line], note: str = "") -> str:
    """One small chart: smoothed lines over faint raw ones, their last values as the legend, hover for each step."""
    head = f'<h3 title="{escape(note)}">{escape(title)}</h3>'
    drawn = [line for line in lines if len(line.steps)]
    if not drawn:
        missing = f'<p class="missing">not logged<br><code>{escape(note)}</code></p>'
        return f'<figure class="panel">{head}{missing}</figure>'
    shapes = {line.label: shape_of(line) for line in drawn}
    width, height, left, top, bottom = 380, 190, 42, 6, 22
    x0, x1 = min(line.steps[0] for line in drawn), max(line.steps[-1] for line in drawn)
    inner = np.concatenate([np.r_[m - s, m + s] for _, m, s in shapes.values()])
    raws = np.concatenate([raw for raw, _, _ in shapes.values()])
    low, high = min(inner.min(), np.quantile(raws, 0.01)), max(inner.max(), np.quantile(raws, 0.99))  # spikes may leave
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    if low < 0 <= min(raws.min(), inner.min()):
        low = 0.0  # no axis below zero for what cannot be negative

    def at(step, value):  # (N,), (N,) -> "x,y x,y .."
        x = left + (np.asarray(step) - x0) / max(x1 - x0, 1) * (width - left - 8)
        y = top + (high - np.asarray(value)) / (high - low) * (height - top - bottom)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    grid, marks, hover, legend = [], [], [], []
    for value in ticks(low, high, 4):
        y = at([x0], [value]).split(",")[1]
        grid.append(f'<path d="M{left},{y}H{width - 8}"/><text x="{left - 7}" y="{y}" dy=".35em">{show(value)}</text>')
    for value in ticks(x0, max(x1, x0 + 1), 5):
        if value == int(value) and value <= x1:
            x = at([value], [low]).split(",")[0]
            grid.append(f'<text class="x" x="{x}" y="{height - 5}">{show(value, 5)}</text>')
    for line in drawn:
        raw, mean, spread = shapes[line.label]
        parts = [f'<g style="--c:var(--{line.colour})">']
        if spread.any():
            outline = at(np.r_[line.steps, line.steps[::-1]], np.r_[mean + spread, (mean - spread)[::-1]])
            parts.append(f'<polygon points="{outline}"/>')
        if not np.array_equal(raw, mean):
            parts.append(f'<polyline class="raw" points="{at(line.steps, raw)}"/>')
        parts.append(f'<polyline points="{at(line.steps, mean)}"/>')
        if len(line.steps) < 20:
            dots = (p.split(",") for p in at(line.steps, mean).split())
            parts += [f'<circle cx="{x}" cy="{y}" r="2.6"/>' for x, y in dots]
        marks.append("".join(parts) + "</g>")
    every = np.unique(np.concatenate([line.steps for line in drawn]))
    every = every[np.unique(np.linspace(0, len(every) - 1, 120).round().astype(int))]
    edges = np.r_[x0, (every[1:] + every[:-1]) / 2, x1]
    for step, a, b in zip(every, edges, edges[1:], strict=False):
        said = [f"step {step}"]
        for line in drawn:
            (i,) = np.nonzero(line.steps == step)
            said += [f"{line.label} {show(shapes[line.label][0][k])}" for k in i]
        xa, xb = (float(at([e], [low]).split(",")[0]) for e in (a, b))
        area = f'x="{xa - 1:.1f}" y="{top}" width="{xb - xa + 2:.1f}" height="{height - top - bottom}"'
        hover.append(f"<rect {area}><title>{escape(chr(10).join(said))}</title></rect>")
    for line in lines:
        last = shapes[line.label][1][-1] if line.label in shapes else math.nan
        legend.append(f'<li style="--c:var(--{line.colour})">{escape(line.label)} <b>{show(last)}</b></li>')
    peak = f'<text class="peak" x="{width - 10}" y="{top + 10}">peak {show(raws.max())} ↑</text>' * int(raws.max() > high)
    spoken = escape(f"{title}, last values: " + ", ".join(f"{k} {show(v[1][-1])}" for k, v in shapes.items()))
    return (
        f'<figure class="panel">{head}<ul class="legend">{"".join(legend)}</ul>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{spoken}"><g class="grid">{"".join(grid)}</g>'
        f'<svg class="marks" y="{top}" width="{width}" height="{height - top - bottom}" '
        f'viewBox="0 {top} {width} {height - top - bottom}">{"".join(marks)}</svg>'
        f'{peak}<g class="hover">{"".join(hover)}</g></svg></figure>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# sections


def table(head: list[str], rows: list[list[str]], caption: str) -> str:
    """Cells are HTML already. The first column is the row's heading; the table scrolls inside its own box."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{c}</td>" for c in row[1:])}</tr>' for row in rows)
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(re.sub("<.*?>", "", caption))}">'
    return f"{box}<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def key_of(colour: str, label: str) -> str:
    return f'<span class="key" style="--c:var(--{colour})">{escape(label)}</span>'


def runs_section(methods: dict[str, list[Run]], colours: dict[str, str]) -> str:
    def span(key, runs):  # mean of the first and of the last tenth of the steps
        line = line_of(runs, key, "", "")
        n = max(1, len(line.steps) // 10)
        return (np.nanmean(line.values[:, :n]), np.nanmean(line.values[:, -n:])) if len(line.steps) else (math.nan,) * 2

    rows = []
    for label, runs in methods.items():
        size = max(model_size(run) for run in runs)
        power = max((p for p in (0, 3, 6, 9) if size >= 10**p), default=0)
        date = max((run.folder / "metrics.jsonl").stat().st_mtime for run in runs)
        steps = sorted({run.rows[-1]["step"] if run.rows else 0 for run in runs})
        first, last = (100 * v for v in span("rollout/pass1", runs))
        rows.append([
            key_of(colours[label], label), str(len(runs)), "–".join(f"{s:,}" for s in (steps[0], steps[-1])[: len(steps)]),
            f"{show(size / 10**power)} {'kMB'[power // 3 - 1] if power else ''}".strip() if size else "–",
            f"{first:.1f} → <b>{last:.1f}</b>" if math.isfinite(last) else "not logged",
            show(np.mean(span("time/step", runs))), f"{datetime.datetime.fromtimestamp(date, datetime.UTC):%Y-%m-%d}",
        ])  # fmt: skip
    out = table(["Method", "Seeds", "Last step", "Parameters", "Training accuracy, %", "s / step", "Date"], rows,
                "The runs. Accuracy: mean of the first and of the last tenth of the steps.")  # fmt: skip

    def value(label, key):
        found = dict.fromkeys(json.dumps(run.config[key]) if key in run.config else "–" for run in methods[label])
        return "<code>" + escape(", ".join(found)) + "</code>"

    keys = list(dict.fromkeys(k for runs in methods.values() for run in runs for k in run.config))
    rows = {key: [f"<code>{escape(key)}</code>"] + [value(label, key) for label in methods] for key in keys}
    differ = [row for key, row in rows.items() if len(set(row[1:])) > 1 and key != "out_dir"]
    head = ["Setting", *(key_of(colours[label], label) for label in methods)]
    if len(methods) > 1:
        out += table(head, differ, "Settings that differ.") if differ else "<p>The methods' settings do not differ.</p>"
    full = table(head, list(rows.values()), "Every setting, seeds joined by commas.")
    return out + f"<details><summary>All {len(rows)} settings</summary>{full}</details>"


def evals_section(paths: list[Path]) -> str:
    """One table per sampling setting. Rows of one label's seeds are preceded by their mean and standard deviation."""
    tables = {}
    for path, label in zip(paths, labels(paths), strict=True):
        for s in read_json(path).get("settings", []):
            setting = tuple(s.get(k) for k in ("temperature", "top_p", "samples", "max_new_tokens"))
            tables.setdefault(setting, {}).setdefault(method_of(label), []).append((label, s))
    out = []
    for (temperature, top_p, samples, cap), by_method in tables.items():
        every = [s for group in by_method.values() for _, s in group]
        ks = sorted({int(k) for s in every for k in s.get("pass@k", {})})
        rates = ["truncated", "no_answer", "reflect_rate", "DSR", "ERR"]
        bounds = [100 * number(s.get("pass@k", {}).get("1", {}).get(e)) for s in every for e in ("low", "high")]
        low, high = np.nanmin([*bounds, 100]), np.nanmax([*bounds, 0])

        def pass_at(s, k):
            p = s.get("pass@k", {}).get(str(k), {})
            p = p if isinstance(p, dict) else {"value": p}
            return [100 * number(p.get(e)) for e in ("value", "low", "high")]

        def whisker(value, a, b, low=low, scale=110 / max(high - low, 1e-9)):
            if not math.isfinite(a + value + b):
                return ""
            a, v, b = ((e - low) * scale + 5 for e in (a, value, b))
            return (f'<svg class="whisker" viewBox="0 0 120 14" aria-hidden="true"><path d="M{a:.1f},7H{b:.1f}"/>'
                    f'<circle cx="{v:.1f}" cy="7" r="3.5"/></svg>')  # fmt: skip

        accuracy = {  # problem -> share right, over the seeds: what the paired difference is taken of
            label: {p["uid"]: np.mean([q["c"] / q["n"] for _, s in group for q in s.get("per_problem", []) if q["uid"] == p["uid"]])
                    for p in group[0][1].get("per_problem", [])}
            for label, group in by_method.items()}  # fmt: skip
        baseline = next(iter(by_method))

        def paired(label, accuracy=accuracy, baseline=baseline):
            shared = [u for u in accuracy[label] if u in accuracy[baseline]]
            if label == baseline or len(shared) < 2:
                return "–"
            d = 100 * np.array([accuracy[label][u] - accuracy[baseline][u] for u in shared])
            return f"{d.mean():+.1f} <small>± {1.96 * d.std(ddof=1) / math.sqrt(len(d)):.1f}</small>".replace("-", "−")

        rows = []
        for label, group in by_method.items():
            if len(group) > 1:
                columns = [[pass_at(s, k)[0] for _, s in group] for k in ks] + [
                    [100 * number(s.get(r)) for _, s in group] for r in rates]  # fmt: skip
                cells = [f"<b>{show(np.mean(c))}</b> <small>± {np.std(c, ddof=1):.1f}</small>" for c in columns]
                name = f"{escape(label)} <small>mean of {len(group)} ± sd</small>"
                rows.append([name, whisker(*[np.mean(columns[0])] * 3) if ks else "", *cells[: len(ks)], paired(label),
                             *cells[len(ks) :]])  # fmt: skip
            for name, s in group:
                cells = [f"<b>{v:.1f}</b> <small>{a:.1f} – {b:.1f}</small>" for v, a, b in (pass_at(s, k) for k in ks)]
                shares = [show(100 * number(s.get(r))) for r in rates]
                single = len(group) == 1
                name = escape(name) if single else f'<span class="seed">{escape(name)}</span>'
                rows.append([name, whisker(*pass_at(s, 1)), *cells, paired(label) if single else "", *shares])
        n = max(len(s.get("per_problem", [])) for s in every)
        caption = (f"Temperature {temperature}, top-p {top_p}, {samples} samples of at most {cap} tokens for each of "
                   f"{n:,} problems. All in %; intervals at 95 %.")  # fmt: skip
        head = ["Model", f"<small>{show(low)} – {show(high)}</small>", *(f"Pass@{k}" for k in ks),
                f"Δ Pass@1 <small>to {escape(baseline)}</small>", "Truncated", "No answer", "Reflects", "DSR", "ERR"]  # fmt: skip
        out.append(table(head, rows, caption))
    note = ("Δ is paired per problem, its interval over problems (the spread between training seeds is not in it). "
            "DSR: share of right answers reached without reflecting. ERR: of answers that reflect, the share that end right.")  # fmt: skip
    return "".join(out) + f'<p class="note">{note}</p>' if out else '<p class="missing">no evaluations given (--evals)</p>'


def figure_lines(methods: dict[str, list[Run]], colours: dict[str, str], key: str) -> list[Line]:
    return [line_of(runs, key, label, colours[label]) for label, runs in methods.items()]


def reflects(run: Run) -> bool:
    return any(number(row.get(f"reflect/{k}")) > 0 for row in run.rows for k in ("kept", "parsed"))


def role_lines(runs: list[Run], what: str) -> list[Line]:
    lines = [line_of(runs, f"reflect/{what}_{role}", role, role) for role in ROLES]
    first = line_of(runs, f"reflect/{what}_first_diagnosis", "first diagnosis token", "first")
    return lines + [first] * bool(len(first.steps))


def reflection_section(methods: dict[str, list[Run]], colours: dict[str, str]) -> str:
    methods = {label: runs for label, runs in methods.items() if any(map(reflects, runs))}
    panels = [panel(title, figure_lines(methods, colours, key), key) for key, title in REFLECTION.items()]
    for label, runs in methods.items():
        of = f" · {label}" if len(methods) > 1 else ""
        reasons = sorted({k for run in runs for row in run.rows for k in row if k.startswith("reflect/dropped_")})
        lines = [line_of(runs, k, k.removeprefix("reflect/dropped_"), f"m{6 - i % 7}") for i, k in enumerate(reasons)]
        panels.append(panel("Dropped, by reason" + of, lines, "reflect/dropped_<reason>"))
        panels.append(panel("Log-prob by role" + of, role_lines(runs, "logprob"), "reflect/logprob_<role>"))
        panels.append(panel("OTS weight by role (Eq. 7)" + of, role_lines(runs, "ots"), "reflect/ots_<role>"))
    if not methods:
        return '<p class="missing">not logged: none of these runs constructs trajectories</p>'
    return f'<div class="panels">{"".join(panels)}</div>'


def time_section(methods: dict[str, list[Run]], colours: dict[str, str]) -> str:
    rows, longest = [], 0.0
    for label, runs in methods.items():
        mean = {k: np.mean(v) if (v := line_of(runs, f"time/{k}", "", "").values).size else math.nan
                for k in ["step", *PHASES, "tokens_per_second"]}  # fmt: skip
        known = [0.0 if math.isnan(mean[p]) else mean[p] for p in PHASES]
        step = mean["step"] if math.isfinite(mean["step"]) else sum(known)
        longest = max(longest, step)
        rows.append((label, mean, [*known, max(0.0, step - sum(known))], step))
    if not longest:
        return '<p class="missing">not logged<br><code>time/*</code></p>'
    body = []
    for label, mean, parts, step in rows:
        x, bar = 0.0, []
        for i, (name, seconds) in enumerate(zip([*PHASES, "other"], parts, strict=True)):
            w = 300 * seconds / longest
            bar.append(f'<rect class="p{i}" x="{x:.1f}" width="{max(w - 1.5, 0):.1f}" height="16" rx="2"><title>'
                       f"{name}: {show(seconds)} s, {100 * seconds / (step or 1):.0f} %</title></rect>")  # fmt: skip
            x += w
        shown = [show(mean[p]) for p in PHASES] + [show(parts[-1]), f"<b>{show(step)}</b>", show(mean["tokens_per_second"])]
        svg = f'<svg class="bar" viewBox="0 0 300 16" aria-hidden="true">{"".join(bar)}</svg>'
        body.append([key_of(colours[label], label), svg, *shown])
    head = [f'<span class="phase p{i}">{name}</span>' for i, name in enumerate([*PHASES, "other"])]
    return table(["Method", "", *head, "step", "tokens / s"], body, "Seconds per step, mean over the run.")


# ---------------------------------------------------------------------------------------------------------------------
# trajectories


def pick_trajectories(folder: Path, n: int, reflections: bool) -> list[tuple[dict, list[dict]]]:
    """(rollout, the ordinary rollouts of its problem and step), n of them: the training is cut into n stretches and the
    first in each stretch is taken, then the second .. : spread evenly, never chosen by quality."""
    files, found = sorted(folder.glob("rollouts/step_*.jsonl")), []
    for stretch in np.array_split(np.array(files, dtype=object), max(1, min(n, len(files)))):
        for file in stretch:
            rollouts = read_jsonl(file)
            ordinary = [r for r in rollouts if not r.get("is_reflection")]
            chosen = [r for r in rollouts if r.get("is_reflection")] if reflections else ordinary
            if chosen:
                found.append([(r, [o for o in ordinary if o.get("uid") == r.get("uid")]) for r in chosen[:n]])
                break
    picked = [group[i] for i in range(n) for group in found if i < len(group)][:n]
    return sorted(picked, key=lambda pair: pair[0].get("step", 0))


def pieces(tokenizer, ids: list[int]) -> list[tuple[int, int, str]]:
    """[(start, end, text)]: one token each, except that tokens holding only a part of a UTF-8 character (the byte-level
    pieces that decode to U+FFFD on their own) are joined with their neighbours: at most four bytes, so four tokens."""
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text or end == len(ids) or end - start == 4:
            out.append((start, end, text))
            start = end
    return out


def tokens_html(rollout: dict, roles: list[str], tokenizer, limit: int = 0) -> str:
    """Each token a <span> whose hover tells id, log-prob and OTS weight, inside one <span class=role> per stretch."""
    ids = rollout.get("completion_ids") or []
    if tokenizer is None:
        return escape(str(rollout.get("text", "")))
    logprobs = rollout.get("logprobs") or rollout.get("sample_logprobs") or []
    weights = rollout.get("ots_weights") or []
    html, role = [], ""
    for start, end, text in pieces(tokenizer, ids[: limit or None]):
        if roles[start] != role:
            html.append(("</span>" if role else "") + f'<span class="{roles[start]}">')
            role = roles[start]
        said, w = [], math.inf
        for i in range(start, end):
            said.append(f"id {ids[i]}")
            if i < len(logprobs):
                said[-1] += f" · log p {number(logprobs[i]):.3f}"
            if i < len(weights):
                said[-1] += f" · OTS {number(weights[i]):.3f}"
                w = min(w, number(weights[i]))
        mark = ' class="w1"' if w < 0.1 else ' class="w2"' if w < 0.5 else ""
        text = escape(text).replace("\n", "<i>↵</i>\n")
        html.append(f'<span{mark} title="{escape(chr(10).join(said))}">{text}</span>')
    left = len(ids) - limit if limit else 0
    return "".join(html) + "</span>" * bool(role) + (f'<i> … {left:,} more tokens</i>' if left > 0 else "")


def facts(rollout: dict) -> str:
    right = number(rollout.get("reward")) > 0
    verdict = f'<span class="{"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</span>'
    answer, grade = rollout.get("answer"), rollout.get("grade") or "no answer"
    said = f"answer <b>{escape(str(answer))}</b>" if answer is not None else escape(str(grade).replace("_", " "))
    advantage = f"{number(rollout.get('advantage')):+.2f}".replace("-", "−").replace("+nan", "–")
    return f"{verdict} {said} · reward {show(number(rollout.get('reward')))} · advantage {advantage}"


def card(rollout: dict, siblings: list[dict], tokenizer) -> str:
    def column(title, r, roles, count, limit=0, kind=""):
        box = f'<div class="tokens" tabindex="0" role="region" aria-label="{title}">{tokens_html(r, roles, tokenizer, limit)}</div>'
        return f'<section class="{kind}"><h4>{title}</h4><p>{facts(r)}<br>{count}</p>{box}</section>'

    ids = rollout.get("completion_ids") or []
    columns = []
    if rollout.get("is_reflection"):
        roles = [ROLES[k] if k in range(3) else "ordinary" for k in rollout.get("roles") or [0] * len(ids)]
        roles += ["ordinary"] * (len(ids) - len(roles))

        def shared(other):  # length of the common prefix, in tokens
            pairs = zip(ids, other.get("completion_ids") or [], strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(other.get("completion_ids") or [])))

        kept = roles.count("prefix")
        wrong = max((r for r in siblings if number(r.get("reward")) <= 0), key=shared, default=None)
        right = next((r for r in siblings if number(r.get("reward")) > 0), None)
        if wrong:
            n, source = len(wrong["completion_ids"]), 0 < kept <= shared(wrong)
            title = "The wrong rollout it starts from" if source else "A wrong rollout of the group"
            marked = ["prefix"] * (kept if source else 0) + ["ordinary"] * n
            columns.append(column(title, wrong, marked, f"{n:,} tokens", MAX_SIBLING_TOKENS))
        count = " · ".join(f"{roles.count(r):,} {r}" for r in ROLES)
        columns.append(column("Constructed trajectory", rollout, roles, count, kind="construction"))
        if right:
            n = len(right["completion_ids"])
            columns.append(column("A right rollout of the group", right, ["ordinary"] * n, f"{n:,} tokens", MAX_SIBLING_TOKENS))
    else:
        columns.append(column("Ordinary rollout", rollout, ["ordinary"] * len(ids), f"{len(ids):,} tokens"))
    return (
        f'<article class="card"><h3>Step {escape(str(rollout.get("step", "?")))} <small>{escape(str(rollout.get("uid", "")))}'
        f'</small></h3><p class="question">{escape(str(rollout.get("question", rollout.get("prompt", ""))))}</p>'
        f'<p class="gold">gold answer <b>{escape(str(rollout.get("gold", "–")))}</b></p>'
        f'<div class="columns">{"".join(columns)}</div></article>'
    )


def trajectories_section(runs: list[Run]) -> str:
    """From the last run that constructs trajectories, or, if none does, ordinary rollouts of the last that has any."""
    for constructed in (True, False):
        for run in reversed(runs):
            picked = pick_trajectories(run.folder, N_TRAJECTORIES, constructed) if reflects(run) >= constructed else []
            if picked:
                tokenizer = None
                if (run.folder / "tokenizer").is_dir():
                    from transformers import AutoTokenizer  # seconds to import, so only where there is text to show

                    tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer", local_files_only=True)
                what = "constructed trajectories" if constructed else "ordinary rollouts (no run here constructs any)"
                plain = "" if tokenizer else " No tokenizer in the run folder: text without tokens."
                legend = "".join(f'<li><span class="{role}">{text}</span></li>' for role, text in {
                    "prefix": "preserved prefix", "diagnosis": "diagnosis", "correction": "correction", "ordinary": "ordinary"}.items())  # fmt: skip
                legend += '<li><span class="w2">weight &lt; 0.5</span></li><li><span class="w1">weight &lt; 0.1</span></li>'
                intro = (f"{len(picked)} {what} of <b>{escape(run.folder.name)}</b>, spread evenly over its logged steps and "
                         f"not chosen by quality. Hover over a token for its id, log-prob and OTS weight.{plain}")  # fmt: skip
                cards = "".join(card(rollout, siblings, tokenizer) for rollout, siblings in picked)
                return f'<p class="note">{intro}</p><ul class="roles">{legend}</ul>{cards}'
    return '<p class="missing">not logged: no rollouts/step_*.jsonl</p>'


# ---------------------------------------------------------------------------------------------------------------------
# the page


def build_page(runs: list[Run], evals: list[Path]) -> str:
    methods = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    colours = {label: f"m{i % 7}" for i, label in enumerate(methods)}
    grid = '<div class="panels">{}</div>'
    figure_3 = [panel(title, figure_lines(methods, colours, key), key) for key, title in FIGURE_3.items()]
    held_out = sorted({k for run in runs for row in run.rows for k in row if k.startswith("eval/")})
    held_out = [panel("Held-out " + k[5:], figure_lines(methods, colours, k), k) for k in held_out]
    reading = ('<p class="note">Bold: centred moving average. Faint: raw. Band: one standard deviation over seeds. '
               "The number beside each name is the last smoothed value; hover for single steps.</p>")  # fmt: skip
    sections = {
        "Runs": runs_section(methods, colours),
        "Evaluation": evals_section(evals) + (grid.format("".join(held_out)) if held_out else ""),
        "Training dynamics": reading + grid.format("".join(figure_3)),
        "Reflections": reflection_section(methods, colours),
        "Time": time_section(methods, colours),
        "Trajectories": trajectories_section(runs),
    }
    anchors = {name: name.split()[-1].lower() for name in sections}
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items())
    body = "".join(f'<section id="{anchors[name]}"><h2>{name}</h2>{html}</section>' for name, html in sections.items())
    title = escape(" · ".join(methods))
    variables = [";".join(f"--{name}:{value}" for name, value in theme.items()) for theme in (LIGHT, DARK)]
    style = f":root{{{variables[0]}}}@media (prefers-color-scheme:dark){{:root{{{variables[1]}}}}}" + STYLE
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>' + title + " · training report</title>"
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{style}</style></head><body><header><p>Training report</p><h1>{title}</h1><nav>{nav}</nav></header>"
        f"<main>{body}</main></body></html>\n"
    )


def save_pngs(runs: list[Run], folder: Path) -> None:
    """dynamics.png and, where there are reflections, reflection.png: the main figures for a README."""
    from matplotlib.figure import Figure

    methods = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    colours = {label: f"m{i % 7}" for i, label in enumerate(methods)}
    plots = {"dynamics": [(title, figure_lines(methods, colours, key)) for key, title in FIGURE_3.items()]}
    constructing = {label: group for label, group in methods.items() if any(map(reflects, group))}
    if constructing:
        keys = ("reflect/parsed", "reflect/correct", "reflect/mixed_groups", "reflect/verbatim")
        plots["reflection"] = [(REFLECTION[key], figure_lines(constructing, colours, key)) for key in keys]
        group = list(constructing.values())[-1]
        plots["reflection"] += [("Log-prob by role", role_lines(group, "logprob")), ("OTS weight by role", role_lines(group, "ots"))]
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        figure = Figure(figsize=(12, 5.6), layout="constrained")
        for axes, (title, lines) in zip(figure.subplots(2, 3).flat, plot, strict=True):
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3, linewidth=0.6)
            for line in lines:
                if len(line.steps):
                    raw, mean, spread = shape_of(line)
                    axes.plot(line.steps, raw, color=LIGHT[line.colour], alpha=0.25, linewidth=0.8)
                    axes.plot(line.steps, mean, color=LIGHT[line.colour], linewidth=1.9, label=line.label)
                    axes.fill_between(line.steps, mean - spread, mean + spread, color=LIGHT[line.colour], alpha=0.16, linewidth=0)
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
            else:
                axes.text(0.5, 0.5, "not logged", ha="center", transform=axes.transAxes, color="gray")
        figure.savefig(folder / f"{name}.png", dpi=150)


STYLE = """
:root{--page:#faf9f7;--card:#fff;--ink:#1c1b1a;--soft:#5f5c58;--rule:#e3dfd9;--grid:#edeae5;--tint:14%;
--right:#00704f;--wrong:#b3400a;--p0:#0b4f6c;--p1:#2a86a8;--p2:#72b7cf;--p3:#b06a00;--p4:#c9c4bc}
@media (prefers-color-scheme:dark){:root{--page:#131416;--card:#1b1d20;--ink:#eceae6;--soft:#a5a29c;--rule:#303338;
--grid:#282b2f;--tint:24%;--right:#45cfa4;--wrong:#ff9a63;--p0:#8fd0ea;--p1:#4fa3c4;--p2:#2b6d88;--p3:#e0a040;--p4:#55585d}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
header,main{max-width:1240px;margin:auto;padding:0 20px}header{padding-top:44px}
header p{margin:0;color:var(--soft);font-size:14px}h1{font-size:clamp(26px,4vw,38px);line-height:1.15;letter-spacing:-.02em;margin:2px 0 18px;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;padding-bottom:14px;border-bottom:1px solid var(--rule);font-size:15px}
nav a{color:var(--ink);text-decoration:none;border-bottom:2px solid transparent}nav a:hover,nav a:focus{border-color:var(--m0)}
main>section{padding-top:40px}h2{font-size:23px;letter-spacing:-.01em;margin:0 0 12px}h3,h4{margin:0;line-height:1.3}
small{font-size:.82em;color:var(--soft);font-weight:400}code{font:13px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.note{max-width:78ch;margin:0 0 16px;color:var(--soft);font-size:14.5px}.missing{color:var(--soft)}
.scroll{overflow-x:auto;margin:0 0 20px}table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:0 0 8px}th,td{text-align:left;padding:8px 18px 8px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{font-weight:500;color:var(--soft);font-size:13.5px;vertical-align:bottom}tbody th{font-weight:600}.seed{padding-left:16px;font-weight:400;color:var(--soft)}
.key::before,.legend li::before,.phase::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:7px}
.p0{--c:var(--p0)}.p1{--c:var(--p1)}.p2{--c:var(--p2)}.p3{--c:var(--p3)}.p4{--c:var(--p4)}
details{margin-bottom:8px}summary{cursor:pointer;color:var(--soft);font-size:14.5px;margin-bottom:12px}details td{white-space:normal;overflow-wrap:anywhere}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,345px),1fr));gap:16px}
.panel{margin:0;padding:14px 14px 8px;background:var(--card);border:1px solid var(--rule);border-radius:10px;min-width:0}
.panel h3{font-size:15px}.panel .missing{text-align:center;margin:56px 0;font-size:14px}
.legend,.roles{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:3px 0 6px;padding:0;font-size:13px;color:var(--soft)}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}.legend li::before{height:3px;width:14px;vertical-align:middle;border-radius:2px}
.panel svg{display:block;width:100%;height:auto}.marks{overflow:hidden}
.grid path{stroke:var(--grid);stroke-width:1}.grid text,.peak{fill:var(--soft);font-size:11px;text-anchor:end;font-variant-numeric:tabular-nums}.grid .x{text-anchor:middle}
.marks polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.marks .raw{stroke-width:1;opacity:.32}
.marks polygon{fill:var(--c);opacity:.17}.marks circle{fill:var(--c)}.hover rect{fill:var(--ink);fill-opacity:0}.hover rect:hover{fill-opacity:.09}
.whisker{width:120px;height:14px;display:block}.whisker path{stroke:var(--soft);stroke-width:2}.whisker circle{fill:var(--m0)}
.bar{width:300px;height:16px;display:block}.bar rect{fill:var(--c)}
.roles{gap:8px 16px;margin-bottom:18px;font-size:14px}
.prefix,.diagnosis,.correction{--c:var(--prefix);background:color-mix(in srgb,var(--c) var(--tint),transparent);box-shadow:inset 0 -2px var(--c);color:var(--ink);padding:1px 0;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.diagnosis{--c:var(--diagnosis)}.correction{--c:var(--correction)}.roles span{padding:2px 7px}
.ordinary{color:var(--ink)}.roles .ordinary{border:1px solid var(--rule)}
.w1,.w2{outline:1.5px dashed var(--soft);outline-offset:-1px}.w1{outline:2px solid var(--ink)}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:18px;margin-bottom:16px}
.card>h3{font-size:15px}.card h3 small{margin-left:6px;overflow-wrap:anywhere}.question{white-space:pre-wrap;overflow-wrap:anywhere;margin:8px 0 2px;max-width:90ch}
.gold{margin:0 0 12px;font-size:14px;color:var(--soft);overflow-wrap:anywhere}.gold b{color:var(--ink)}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:14px}.columns section{min-width:0}
.columns h4{font-size:14px}.columns p{margin:2px 0 8px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}.columns p b{color:var(--ink)}
.right{color:var(--right);font-weight:600}.wrong{color:var(--wrong);font-weight:600}
.tokens{font:14px/1.85 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;max-height:26em;overflow-y:auto;padding:8px 12px;background:var(--page);border:1px solid var(--rule);border-radius:7px}
.construction .tokens{border-color:var(--soft)}.tokens i{color:var(--soft);font-style:normal;opacity:.55}.tokens span>span:hover{background:var(--ink);color:var(--page)}
:focus-visible{outline:2px solid var(--m0);outline-offset:2px}
@media (max-width:600px){header,main{padding:0 16px}header{padding-top:24px}.card{padding:14px}}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders written by train.py; tapo_s0 tapo_s1 .. are seeds of one method")
    parser.add_argument("--evals", default="", help="comma-separated files written by eval.py")
    parser.add_argument("--out", default="report.html")
    parser.add_argument("--png", help="also write the main figures as PNG files into this folder")
    args = parser.parse_args(argv)
    runs = load_runs(args.runs)
    page = build_page(runs, [Path(f) for f in args.evals.split(",") if f])
    Path(args.out).write_text(page, encoding="utf-8")
    print(f"{args.out}: {len(runs)} runs, {len(page) / 1e6:.1f} MB")
    if args.png:
        save_pngs(runs, Path(args.png))


if __name__ == "__main__":
    from configurator import run_script

    run_script(main)
