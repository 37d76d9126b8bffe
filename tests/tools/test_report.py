"""The report page: self-contained, everything escaped, no run too bare or too torn to be shown."""
import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools import report

EVIL = '<script>alert("x")</script> & <b>bold</b>'


def save_tokenizer(folder) -> PreTrainedTokenizerFast:
    """A byte-level BPE that never saw 'é' or '≈': those come out as two and three partial pieces.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(
        add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [f"Try {i}: {i}*7=42, 42-21=21 low. Wait, {i} is too low. ok. Answer: "
             for i in range(20)]
    core.train_from_iterator(texts * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def findx(rng) -> tuple[str, int, list, list, list]:
    """One problem: question, x, and [(text, role)] of a wrong solution, a reflection on it and a
    right solution."""
    a, x, guess = int(rng.integers(2, 10)), int(rng.integers(3, 15)), int(rng.integers(2, 15))
    guess += guess == x
    b, side = int(rng.integers(1, 2 * a)), "low" if guess < x else "high"
    first = f"Try {guess}: {guess}*{a}={guess * a}, {guess * a}-{b}={guess * a - b} {side}.\n"
    doubt = f"Wait, {guess} is too {side}, as {guess * a - b} ≠ {x * a - b}.\n"
    retry = f"Try {x}: {x}*{a}={x * a}, {x * a}-{b}={x * a - b} ok.\nAnswer: \\boxed{{{x}}}"
    wrong = [(first + f"Answer: \\boxed{{{guess}}}", 0)]
    return f"{a}*x-{b}={x * a - b}", x, wrong, [(first, 0), (doubt, 1), (retry, 2)], [(retry, 0)]


def make_run(folder, *, reflections: bool, steps=60, seed=0, reward_gain=0.3, hostile=False):
    """A run folder as train.py leaves it, its numbers made up but of realistic size and noise."""
    rng = np.random.default_rng(seed)
    (folder / "rollouts").mkdir(parents=True)
    tokenizer = save_tokenizer(folder / "tokenizer")
    config = dict(method="tapo" if reflections else "grpo", out_dir=str(folder), seed=seed,
                  max_steps=steps, lam=1.0, learning_rate=6e-4, prompts_per_step=32,
                  samples_per_prompt=8, problems="data/findx.jsonl", diagnosis="mask",
                  ref_advantage="reward" if reflections else "group")
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(1, steps + 1):
        lines.append(json.dumps(make_metrics(rng, step, step / steps, reflections, reward_gain)) +
                     "\n")
        if step % 2 == 0 or step == 1:
            rollouts = [r for q in (0, 1)
                        for r in make_rollouts(rng, tokenizer, step, q, reflections, hostile)]
            (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in rollouts))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def make_metrics(rng, step, t, reflections, reward_gain) -> dict:
    def noise(scale):
        return float(rng.normal(0, scale))

    row = {
        "step": step, "rollout/pass1": 0.34 + reward_gain * t**0.6 + noise(0.03), "train/loss": 0.01
        + noise(0.02), "train/grad_norm": 0.9 - 0.3 * t + abs(noise(0.12)), "rollout/length": 31 +
        14 * t + noise(1.2), "train/kl_ref": 0.08 * t + abs(noise(0.004)), "train/lr": 6e-4,
        "train/entropy": 0.5 - 0.2 * t, "time/step": 0.66, "time/generate": 0.27 + noise(0.01),
        "time/grade": 0.01, "time/reflect": 0.0, "time/update": 0.3 + noise(0.01),
        "time/tokens_per_second": 32000 + noise(900)}
    if reflections:
        row |= {
            "train/ots_weight": 0.985 + noise(0.006), "time/reflect": 0.09, "time/step": 0.76,
            "reflect/eligible": round(14 + noise(2)), "reflect/candidates": round(39 + noise(4)),
            "reflect/parsed": min(1, 0.84 + 0.1 * t + noise(0.02)),
            "reflect/kept": round(31 + noise(3)), "reflect/verbatim": 0.96 + noise(0.01),
            "reflect/mixed_groups": abs(noise(0.04)), "reflect/correct": 0.97 + noise(0.01),
            "reflect/length": 47 + noise(1), "reflect/dropped_unparsable": round(abs(4 + noise(1))),
            "reflect/dropped_special_token": 0,
            "reflect/dropped_no_divergence": round(abs(2 + noise(0.6))),
            "reflect/logprob_prefix": -0.42 + noise(0.03), "reflect/logprob_diagnosis": -1.6 +
            0.7 * t + noise(0.1), "reflect/logprob_correction": -0.25 + noise(0.02),
            "reflect/ots_prefix": 1.01 + noise(0.01), "reflect/ots_diagnosis": 0.55 + 0.2 * t +
            noise(0.03), "reflect/ots_correction": 1.02 + noise(0.01),
            "reflect/ots_first_diagnosis": 0.06 + 0.1 * t + abs(noise(0.01))}
    if step % 10 == 0:
        row |= {"eval/pass1": 0.36 + reward_gain * t**0.6 + noise(0.01), "eval/length": 30 + 14 * t}
    return row


def make_rollouts(rng, tokenizer, step, query, reflections, hostile) -> list[dict]:
    """A wrong rollout, a right one and, with reflections, the construction that corrects the first.
    """
    question, x, wrong, fixed, right = findx(rng)
    if hostile:
        question, wrong = EVIL, [(EVIL + " café ≈ 3", 0)]
        fixed = [(EVIL + " café", 0), (" ≈ Wait", 1), (" no.", 2)]
    out = []
    for parts, reward, is_reflection in [(wrong, 0.0, False),
                                         (right, 1.0, False)] + [(fixed, 1.0, True)] * reflections:
        ids, roles = [], []
        for text, role in parts:
            new = tokenizer.encode(text)
            ids, roles = ids + new, roles + [role] * len(new)
        ids, roles = ids + [tokenizer.eos_token_id], roles + [roles[-1]]
        weights = [float(np.clip(rng.lognormal(0, 0.12), 0.01, 10)) for _ in ids]
        if 1 in roles:
            weights[roles.index(1)] = 0.06
            weights[roles.index(1) + 1] = 0.3
        logprobs = [-abs(float(rng.normal(0, 0.4))) for _ in ids]
        text = "".join(text for text, _ in parts)
        out.append(dict(
            uid=f"findx-{step}-{query}", group=f"{step}-{query}" + "_reflected" * is_reflection,
            query=query, step=step, prompt_ids=[1, 2], completion_ids=ids, roles=roles,
            finished=True, text=text, is_reflection=is_reflection, sample_logprobs=None
            if is_reflection else logprobs, logprobs=logprobs if is_reflection else None,
            ots_weights=weights if is_reflection else None, reward=reward, grade="correct" if reward
            else "wrong", advantage=1.0 if reward else -0.58, answer=text.split("{")[-1][:-1]
            if "{" in text else None, prompt=question, question=question, gold=str(x)))
    return out


def make_eval(path, rate, seed=0, n=120, samples=16):
    """What eval.py writes: two sampling settings, n problems of different difficulty."""
    rng = np.random.default_rng(seed)
    easy = np.random.default_rng(7).normal(0, 0.25, n)
    c = [int(rng.binomial(samples, float(np.clip(rate + e, 0, 1)))) for e in easy]
    settings = []
    for temperature, top_p, lift in ((1.0, 1.0, 0.0), (0.6, 0.9, 0.06)):
        passes = {}
        for k in (1, 5):
            miss = [np.prod([max(samples - ci - j, 0) / (samples - j) for j in range(k)])
                    for ci in c]
            value = min(1.0, lift + 1 - float(np.mean(miss)))
            passes[str(k)] = {"value": value, "low": value - 0.03, "high": min(1.0, value + 0.03)}
        settings.append({
            "set": "findx", "temperature": temperature, "top_p": top_p, "samples": samples,
            "max_new_tokens": 54, "pass@k": passes, "truncated": 0.021, "no_answer": 0.004,
            "reflect_rate": 0.6, "DSR": 0.351, "ERR": 0.487 if rate > 0.5 else None,
            "per_problem": [{"uid": f"p{i}", "level": "1", "n": samples, "c": ci, "truncated": 0}
                            for i, ci in enumerate(c)]})
    path.write_text(json.dumps({"config": {}, "model": "m", "settings": settings}))
    return path


def make_measured(path, shift=0.0):
    """What tools.measure writes on a toy world, cut to a kind of token and an estimator or two."""
    sizes = dict(logprob=-0.125 + shift, entropy=0.25, kl=None, ots=1.0, tokens=100)
    gradient = dict(right=0.07, wrong=0.05, constructed=0.01, cosine=-0.2, wrong_advantage=-0.6,
                    constructed_advantage=0.04)
    recovery = dict(responses=40, with_an_error=10, unasked_reflects=0.3,
                    unasked_right_if_reflects=0.4, unasked_right=0.2, forced_right=0.35)
    micro = dict(candidates=20, kept=10, right=9, localised=8, groups=4, mixed_groups=1)
    content = {"shift": {"ordinary, right": sizes, "micro, <diagnosis>": sizes |
                         {"logprob": -2.0 + shift, "kl": 1.5}},
               "gradient": {"decoupled, Eq. 5": gradient},
               "constructions": {"micro": micro, "full": micro}, "recovery": recovery}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two TAPO seeds and one GRPO run with their evaluations and measurements, and the page made
    from them."""
    folder = tmp_path_factory.mktemp("world")
    runs = [make_run(folder / "tapo_s0", reflections=True),
            make_run(folder / "tapo_s1", reflections=True, seed=1),
            make_run(folder / "grpo", reflections=False, seed=2, reward_gain=0.2)]
    rates = {"grpo_s0": 0.6, "grpo_s1": 0.61, "tapo_s0": 0.66, "tapo_s1": 0.67, "start": 0.4}
    evals = [make_eval(folder / f"{name}.json", rate, seed)
             for seed, (name, rate) in enumerate(rates.items())]
    (folder / "measured").mkdir()
    measured = [make_measured(folder / "measured" / f"{name}.json", shift)
                for name, shift in (("tapo_s0", 0.0), ("tapo_s1", 0.25), ("a<b", 0.5))]
    report.main([*map(str, runs), "--evals=" + ",".join(map(str, evals)), "--measured=" +
                 ",".join(map(str, measured)), f"--out={folder / 'page.html'}",
                 f"--png={folder / 'png'}"])
    return folder


@pytest.fixture(scope="module")
def page(world):
    return (world / "page.html").read_text()


def page_of(folder, *runs, **options) -> str:
    options = [f"--{key}={value}" for key, value in options.items()]
    report.main([*map(str, runs), *options, f"--out={folder / 'page.html'}"])
    return (folder / "page.html").read_text()


def section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}">.*?(?=<section id=|</main>)', page, re.S)[0]


def test_page_asks_nothing_from_anyone(page):
    assert not re.search(r"https?:|//\w|<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bon\w+=",
                         page)
    assert set(re.findall(r'href="(.)', page)) == {"#"}
    assert "default-src 'none'" in page


def test_six_panels_of_figure_3_show_every_run(page):
    figure = section(page, "training-dynamics")
    assert re.findall(r"<h3[^>]*>(.*?)</h3>", figure) == list(report.FIGURE_3.values())
    assert figure.count("<svg viewBox") == 6
    # a band for the two seeds of tapo in each, none for the single grpo run
    assert figure.count("<polygon") == 6
    assert "step 7\nTAPO 0." in figure    # hover


def test_seeds_are_one_mean_line_with_their_standard_deviation(tmp_path):
    for seed, value in enumerate((1.0, 3.0)):
        folder = make_run(tmp_path / f"x_s{seed}", reflections=False, steps=3)
        rows = [{"step": step, "k": value * step} for step in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (label, paths), = report.label_runs([tmp_path / "x_s0", tmp_path / "x_s1"]).items()
    line = report.make_line([report.load_run(path) for path in paths], "k", label)
    assert label == "x"
    assert line.mean.tolist() == [2, 4, 6]
    assert np.allclose(line.spread, np.sqrt(2) * np.array([1, 2, 3]))


def test_smoothing_neither_lags_nor_bends_at_the_edges_nor_spreads_gaps():
    assert np.allclose(report.smooth(np.full(9, 5.0), 3), 5)
    assert np.allclose(report.smooth(np.arange(9.0), 3)[1:-1], np.arange(1, 8))
    assert np.allclose(report.smooth(np.array([1, np.nan, 3, np.nan, np.nan, np.nan]), 3)[:4],
                       [1, 2, 3, 3])
    assert np.isnan(report.smooth(np.array([1, np.nan, np.nan]), 3)[2])


def test_a_run_without_reflections_says_not_logged_and_shows_ordinary_rollouts(world, tmp_path):
    page = page_of(tmp_path, world / "grpo")
    assert "not logged" in section(page, "reflections")
    assert "train/ots_weight" in re.search(r'not logged<br><code>(.*?)</code>',
                                           section(page, "training-dynamics"))[1]
    assert section(page, "trajectories").count("<article") == report.N_TRAJECTORIES
    assert "Ordinary rollout" in page and "no evaluation files" in page
    assert "Measurements" not in page and '<figure class="panel forest"' not in page


def test_a_run_whose_constructions_all_fail_still_shows_why(tmp_path):
    run = make_run(tmp_path / "tapo", reflections=False, steps=4)
    rows = [{"step": s, "reflect/candidates": 9, "reflect/kept": 0, "reflect/dropped_too_long": 9}
            for s in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path, run)
    assert "too long <b>9</b>" in section(page, "reflections") and "Ordinary rollout" in section(
        page, "trajectories")


def test_an_empty_run_makes_a_page_without_a_single_number(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    page = page_of(tmp_path, tmp_path / "empty", png=tmp_path / "png")
    assert page.count("not logged") == 6 + 1 + 1 + 1  # Fig. 3, reflections, time, trajectories
    assert (tmp_path / "png" / "dynamics.png").is_file()


def test_twenty_trajectories_in_every_role_spread_over_training(page):
    # the first run that constructs any
    assert " of <b>tapo_s0</b>, spread evenly" in section(page, "trajectories")
    cards = section(page, "trajectories").split("<article")[1:]
    assert len(cards) == report.N_TRAJECTORIES
    steps = [int(re.search(r"Step (\d+)", card)[1]) for card in cards]
    assert steps == sorted(steps) and steps[0] <= 4 and steps[-1] >= 56 and len(set(steps)) == 20
    for card in cards:
        assert all(f'<span class="{role}">' in card
                   for role in ("prefix", "diagnosis", "correction", "ordinary"))
        assert "The wrong rollout it starts from" in card
        assert "A correct rollout of the group" in card
        assert re.search(r"id \d+ · log-prob -?\d\.\d+ · OTS 0\.060 · no gradient", card)
        assert "reward 1 · advantage +1" in card and "reward 0 · advantage −0.58" in card
        assert "gold answer" in card
    for role in ("prefix", "diagnosis", "correction"):
        assert f".{role}{{--c:var(--{role})}}" in page and f"--{role}:#" in page


def test_a_wrong_rollout_is_called_the_source_only_if_no_other_has_the_prefix():
    construction = report.ROLLOUT | {"is_reflection": True, "completion_ids": [1, 2, 3],
                                     "roles": [0, 1, 2]}
    siblings = [report.ROLLOUT | {"completion_ids": [1, n], "reward": 0.0} for n in (7, 8)]
    assert "The wrong rollout it starts from" in report.card(construction, siblings[:1], None, "")
    assert "A wrong rollout with this prefix" in report.card(construction, siblings, None, "")
    assert "A wrong rollout of the group" in report.card(
        construction | {"roles": [2, 2, 2]}, siblings, None, "")


def test_what_models_and_users_write_is_escaped_everywhere(tmp_path):
    run = make_run(tmp_path / "a<b>&_s0", reflections=True, steps=4, hostile=True)
    config = json.loads((run / "config.json").read_text()) | {"note": EVIL}
    (run / "config.json").write_text(json.dumps(config))
    page = page_of(tmp_path, run, evals=make_eval(tmp_path / "<i>.json", 0.5))
    for piece in ("<script", "<b>bold", "a<b>&", "<i>.json"):
        assert piece not in page
    assert "&lt;script&gt;" in section(page, "trajectories") and "a&lt;b&gt;&amp;" in page


def test_partial_utf8_tokens_are_joined_and_no_text_is_lost(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    text = "café ≈ 3 \U0001f914 ok"
    ids = tokenizer.encode(text)
    found = report.pieces(tokenizer, ids)
    assert "".join(piece for _, _, piece in found) == text
    assert max(end - start for start, end, _ in found) == 4
    assert [start for start, _, _ in found[1:]] == [end for _, end, _ in found[:-1]]
    # never completes a character: joined four at most
    lone = report.pieces(tokenizer, tokenizer.encode("é")[:1] * 6)
    assert [end - start for start, end, _ in lone] == [4, 2]


def test_without_a_tokenizer_the_text_is_still_shown(tmp_path):
    run = make_run(tmp_path / "tapo", reflections=True, steps=2)
    for file in (run / "tokenizer").iterdir():
        file.unlink()
    (run / "tokenizer").rmdir()
    assert "Wait, " in page_of(tmp_path, run) and "No tokenizer" in page_of(tmp_path, run)


def test_evaluations_show_seeds_as_mean_and_sd_with_a_paired_difference(page):
    tables = re.findall(r"<table>.*?</table>", section(page, "evaluation"), re.S)
    assert ("findx, temperature 0.6, top-p 0.9: 16 samples of at most 54 tokens for each of "
            "120 problems") in page
    assert len(tables) == 2 and "Δ Pass@1 <small>vs GRPO</small>" in tables[0]
    grpo, tapo, start = re.findall(r'<tr><th scope="row">.*?</tr>', tables[0])
    assert "<small>2 runs</small>" in tapo
    assert re.search(r"<b>\d\d\.\d</b> <small>± \d\.\d</small>", tapo)
    assert re.search(r"<b>\d\d\.\d</b> <small>\d\d\.\d–\d\d\.\d</small>", start)
    assert re.search(r'<td><span title="seeds in common: 2, p = [\d.]+">\+\d\.\d '
                     r'<small>[+−]\d+\.\d to \+\d+\.\d<', tapo)
    assert '<span title="no seed in common">–</span>' in start and '<span title="">–</span>' in grpo


def pass1(path) -> float:
    return np.mean(
        [p["c"] / p["n"] for p in json.loads(path.read_text())["settings"][0]["per_problem"]])


def test_seeds_are_paired_by_their_number_whatever_else_either_has(tmp_path):
    path = {name: make_eval(tmp_path / f"{name}.json", rate, n=20) for name, rate in (
        ("a_s0", 0.1), ("a_s1", 0.2), ("a_s2", 0.5), ("a_s3", 0.6), ("b_s3", 0.8), ("b_s1", 0.6),
        ("b_s7", 0.9), ("c_s9", 0.3))}
    compared = report.differences(report.label_runs(list(path.values())))
    d = compared["b"]["findx", 1.0, 1.0, 54]
    assert d["seeds"] == ["_s3", "_s1"]
    assert np.allclose(d["by_seed"],
                       [pass1(path["b_s3"]) - pass1(path["a_s3"]), pass1(path["b_s1"]) -
                        pass1(path["a_s1"])])
    assert compared["c"] == {"why": "no seed in common"} and "a" not in compared


def test_a_baseline_without_a_number_stands_for_every_seed(tmp_path):
    paths = [make_eval(tmp_path / f"{name}.json", rate, n=20)
             for name, rate in (("start", 0.3), ("b_s0", 0.5), ("b_s1", 0.7))]
    d = report.differences(report.label_runs(paths))["b"]["findx", 1.0, 1.0, 54]
    assert np.allclose(d["by_seed"], [pass1(path) - pass1(paths[0]) for path in paths[1:]])
    assert report.differences(report.label_runs(paths[::-1]))["start"] == {
        "why": "no seed in common"}


def test_cold_starts_are_seeds_of_one_row_and_never_paired_with_training(tmp_path):
    names = ("grpo_s0", "grpo_s1", "coldstart_c0", "coldstart_c1", "tapo_s0")
    evals = report.label_runs([make_eval(tmp_path / f"{name}.json", 0.5, seed, n=20)
                               for seed, name in enumerate(names)])
    compared = report.differences(evals)
    assert list(evals) == ["grpo", "coldstart", "tapo"] and len(evals["coldstart"]) == 2
    assert compared["coldstart"] == {"why": "no seed in common"}
    assert [[label for label, _ in rows] for _, rows in report.forests(compared, "grpo")] == [
        ["tapo"]]
    html = report.evals_section(evals, compared, {})
    # in the tables, not in the figure
    assert html.count("cold start") == html.count("cold start</span> <small>2 runs") == 2


def comparison(*by_seed, low, high):
    """One finding of eval.compare_runs, as far as the report looks at it."""
    return dict(seeds=[f"_s{i}" for i in range(len(by_seed))], by_seed=list(by_seed),
                difference=sum(by_seed) / len(by_seed), low=low, high=high, p=0.5)


def test_the_forest_reaches_every_seed_and_interval_but_not_the_useless_one_of_two_seeds():
    two, three = comparison(0.01, 0.03, low=-0.9, high=0.9), comparison(
        0.01, 0.02, 0.12, low=-0.08, high=0.18)
    one = comparison(0.02, low=-0.05, high=0.25)
    assert np.allclose(report.forest_reach([("a", two)]), (-0.15, 3.15))
    assert np.allclose(report.forest_reach([("a", two), ("b", three)]), (-9.3, 19.3))
    assert np.allclose(report.forest_reach([("a", one)]), (-6.5, 26.5))


def test_one_seed_has_an_interval_over_problems(tmp_path):
    evals = report.label_runs([make_eval(tmp_path / f"{name}.json", rate, n=60) for name, rate in (
        ("a_s0", 0.4), ("a_s1", 0.4), ("b_s1", 0.6))])
    d = report.differences(evals)["b"]["findx", 1.0, 1.0, 54]
    assert len(d["by_seed"]) == 1 and d["low"] < d["difference"] < d["high"]
    assert report.evals_section(evals, report.differences(evals),
                                {}).count('title="seeds in common: 1, p = ') == 3


def test_measurements_are_three_tables_a_name_for_each_method(page):
    html = section(page, "measurements")
    tables = re.findall(r"<table>.*?</table>", html, re.S)
    assert page.index('id="reflections"') < page.index('id="measurements"') < page.index(
        'id="time"')
    assert len(tables) == 3 and html.count(
        '<p class="note">') == 3 and "micro, &lt;diagnosis&gt;" in tables[0]
    shift, gradient, errors = ([re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
                                for row in re.findall("<tr>(.*?)</tr>", table)[1:]]
                               for table in tables)
    assert [re.sub("<.*?>", "", row[0]) for row in shift] == [
        "TAPO (A = r, merged loss mean)", "", "a&lt;b", ""]
    # mean and sd over seeds
    assert [row[2] for row in shift] == ["0.00 ± 0.18", "−1.88 ± 0.18", "0.38", "−1.50"]
    assert [row[4] for row in shift] == ["−", "1.50 ± 0.00", "−", "1.50"]
    assert gradient[0][1:4] == ["decoupled, Eq. 5", "70.0 ± 0.0",
                                "50.0 ± 0.0"] and "norm of correct, 10⁻³" in tables[1]
    assert errors[1][1:] == ["1", "25.0", "30.0", "40.0", "20.0", "35.0", "50.0", "90.0", "80.0",
                             "25.0"]


def test_measurements_outside_a_toy_world_lack_the_errors_and_other_files_are_refused(tmp_path):
    path = make_measured(tmp_path / "big_s0.json")
    path.write_text(
        json.dumps({key: v for key, v in json.loads(path.read_text()).items()
                    if key != "recovery"}))
    assert report.measured_section({"big": [path]}, {}).count("<table>") == 2
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"big_s0\.json is not a result of tools\.measure$"):
        report.measured_section({"big": [path]}, {})


def test_evaluations_without_scores_or_on_other_problems_say_why_there_is_no_difference(
        world, tmp_path):
    bare = tmp_path / "bare.json"
    bare.write_text('{"settings": [{"temperature": 1.0}]}')
    fewer = make_eval(tmp_path / "fewer.json", 0.4, n=100)
    page = page_of(tmp_path, world / "grpo", evals=f"{fewer},{world / 'start.json'},{bare}")
    assert re.search(r'<span title="[^"]*same problems[^"]*">–</span>', page)
    assert re.search(r'<span title="[^"]*bare\.json is not a result[^"]*">–</span>', page)


def test_model_size_comes_from_the_newest_checkpoint(tmp_path):
    torch, save_file = pytest.importorskip("torch"), pytest.importorskip(
        "safetensors.torch").save_file
    run = make_run(tmp_path / "grpo", reflections=False, steps=2)
    assert report.model_size(report.load_run(run)) == 0
    for step, n in ((1, 5), (2, 250)):
        (run / f"step_{step:06d}").mkdir()
        weights = {"a": torch.zeros(n, 4), "b": torch.zeros(3)}
        save_file(weights, run / f"step_{step:06d}" / "model.safetensors", metadata={"x": "y"})
    assert report.model_size(report.load_run(run)) == 1003
    assert "<td>1 k</td>" in page_of(tmp_path, run)


def test_main_figures_are_written_as_png(world):
    assert {p.name for p in (world / "png").iterdir()} == {
        "dynamics.png", "reflection.png", "forest.png", "headline.png"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (world / "png").iterdir())


def test_torn_last_line_is_tolerated_and_a_repeated_step_counts_once(tmp_path):
    run = make_run(tmp_path / "grpo", reflections=False, steps=5)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/loss": 9.0}\n{"step": 6, "train/lo')
    rows = report.load_run(run).rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[-1]["train/loss"] == 9.0
    page_of(tmp_path, run)


@pytest.mark.parametrize("spoil, message", [
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n'),
     r"metrics\.jsonl:2: not valid JSON"),
    (lambda run: (run / "metrics.jsonl").write_text('[1]\n{"step": 3}\n'),
     r"metrics\.jsonl:1: expected a JSON object"),
    (lambda run: (run / "metrics.jsonl").write_text('{"loss": 1}\n'),
     r"a row without an integer 'step'"),
    (lambda run: (run / "metrics.jsonl").unlink(),
     r"grpo is not a run folder: no metrics\.jsonl in it$"),
    (lambda run: [(run / name).unlink() for name in ("config.json", "metrics.jsonl")],
     r"no config\.json and no metri"),
    (lambda run: (run / "config.json").write_text("{"), r"config\.json: not valid JSON"),])
def test_bad_run_folders_are_one_line_errors(tmp_path, spoil, message):
    run = make_run(tmp_path / "grpo", reflections=False, steps=2)
    spoil(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        report.main([str(run)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--evals", "--measured"])
def test_a_missing_evaluation_or_measurement_is_named(world, option):
    with pytest.raises(FileNotFoundError, match=r"--evals, --measured: no file .*nowhere\.json"):
        report.main([str(world / "grpo"), f"{option}={world / 'nowhere.json'}"])


def test_values_that_are_not_numbers_leave_a_gap_and_a_lone_spike_does_not_flatten_the_panel(
        tmp_path):
    run = make_run(tmp_path / "grpo", reflections=False, steps=2)
    losses = [float("nan"), None, "x", 0.5]
    rows = [{"step": s, "train/grad_norm": 1 + s % 2 / 10, "train/loss": losses[s % 4]}
            for s in range(1, 61)]
    rows[30]["train/grad_norm"] = 1e6
    rows[40]["train/grad_norm"] = float("inf")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path, run)
    assert "peak 1,000,000 ↑" in page
    assert not re.search(r"\bnan\b|\binf\b", page.split("</style>")[1])
