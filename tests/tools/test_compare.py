"""Paired statistics against brute force; the comparison by problem and by seed."""
import itertools
import json
import math

import numpy as np
import pytest

from eval import bootstrap_interval
from tools import compare


def test_sign_flips_match_all_patterns_and_their_sampled_version_agrees():
    rng = np.random.default_rng(0)
    for d in (rng.normal(0.3, 1, 9), np.array([0.1, 0.2, 0.3, 0, 0, -0.1]), np.full(5, 0.125),
              rng.normal(0.5, 1, 16)):
        patterns = np.array(list(itertools.product((1, -1), repeat=len(d))))
        exact = np.mean(abs(patterns @ d) >= abs(d.sum()) - 1e-12)
        assert compare.sign_flip_p(d) == pytest.approx(exact)
        assert compare.sign_flip_p(-d) == pytest.approx(exact)
    assert compare.sign_flip_p(np.full(5, 0.1)) == 2 / 32
    assert compare.sign_flip_p([0, 0, 0]) == 1
    many = np.repeat(0.5, 20) * ([1] * 15 + [-1] * 5)  # 15 against 5: twice the binomial tail
    tail = 2 * sum(math.comb(20, i) for i in range(6)) / 2 ** 20
    assert compare.sign_flip_p(many) == pytest.approx(tail, abs=0.005)
    assert 0 < compare.sign_flip_p(np.ones(100)) < 1e-4  # never 0


def test_intervals_over_seeds_are_students():
    low, high = compare.t_interval([1, 2, 3])
    assert (low + high) / 2 == pytest.approx(2)
    assert high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    for df, t in ((1, 12.706), (15, 2.131), (16, 2.120), (20, 2.086), (30, 2.042), (120, 1.980)):
        values = np.tile([-1.0, 1.0], df + 1)[:df + 1]
        low, high = compare.t_interval(values)
        assert (high - low) / 2 / (values.std(ddof=1) / math.sqrt(df + 1)) == pytest.approx(
            t, abs=2e-3)


def result(path, counts, n=8, **setting):
    per_problem = [{"uid": f"p{i}", "level": "", "n": n, "c": c, "truncated": 0}
                   for i, c in enumerate(counts)]
    setting = {"set": "s", "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9,
               "per_problem": per_problem} | setting
    path.write_text(json.dumps({"settings": [setting]}))
    return path


def test_two_results_are_compared_problem_by_problem(tmp_path):
    a = [0, 1, 2, 3, 4, 5, 6, 7, 8, 2]
    b = [1, 2, 3, 4, 5, 6, 7, 8, 8, 1]
    (d,) = compare.compare_runs([[result(tmp_path / "a", a)],
                                 [result(tmp_path / "b", list(reversed(b)))]])
    assert d["baseline_pass@1"] == pytest.approx(38 / 80)
    assert d["other_pass@1"] == pytest.approx(45 / 80)
    paired = (np.array(b)[::-1] - np.array(a)) / 8
    assert d["difference"] == pytest.approx(paired.mean()) and d["p"] == compare.sign_flip_p(paired)
    assert (d["low"], d["high"]) == bootstrap_interval(paired)
    (d,) = compare.compare_runs([[result(tmp_path / "a", a)], [result(tmp_path / "b", b)]])
    assert d["low"] > 0 and d["p"] < 0.05  # the same totals, but paired: each problem gained one


def test_problems_are_paired_by_uid_and_not_by_place(tmp_path):
    a = result(tmp_path / "a", [0, 8, 4])
    content = json.loads(a.read_text())
    content["settings"][0]["per_problem"].reverse()
    (tmp_path / "b").write_text(json.dumps(content))
    for pair in ([[a], [tmp_path / "b"]], [[tmp_path / "b"], [a]]):
        (d,) = compare.compare_runs(pair)
        assert d["difference"] == d["low"] == d["high"] == 0 and d["p"] == 1


def test_groups_of_seeds_are_paired_seed_by_seed(tmp_path):
    base = [result(tmp_path / f"a{s}", [s, s, 1 + s]) for s in range(3)]
    other = [result(tmp_path / f"b{s}", [s + 1 - 3 * (s == 2), s + 2, 2 + s + 2 * (s == 2)])
             for s in range(3)]
    third = [result(tmp_path / f"c{s}", [s, s, 1 + s]) for s in range(3)]
    d, same = compare.compare_runs([base, other, third])
    assert d["by_seed"] == pytest.approx([4 / 24, 4 / 24, 3 / 24]) and d[
        "difference"] == pytest.approx(11 / 72)
    assert (d["low"], d["high"]) == pytest.approx(compare.t_interval([4 / 24, 4 / 24, 3 / 24]))
    # over seeds, as the interval
    assert d["p"] == compare.sign_flip_p([4 / 24, 4 / 24, 3 / 24]) == 2 / 8
    assert same["difference"] == 0 and same["baseline"] == "+".join(map(str, base))


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = result(tmp_path / "a", [1, 2]), result(tmp_path / "b", [1, 2, 3])
    with pytest.raises(ValueError, match=r"b \(3 problems\) and .*a \(2\) were not measured on the "
                       r"same problems"):
        compare.compare_runs([[a], [b]])
    with pytest.raises(ValueError, match="two or more"):
        compare.compare_runs([[a]])
    with pytest.raises(ValueError, match="equally many seeds"):
        compare.compare_runs([[a], [a, a]])
    with pytest.raises(ValueError, match="share no problem set"):
        compare.compare_runs([[a], [result(tmp_path / "c", [1, 2], max_new_tokens=10)]])
    with pytest.raises(FileNotFoundError, match="no result at"):
        compare.compare_runs([[a], [tmp_path / "none"]])
    for content in ("{}", "[1]", "not json"):
        (tmp_path / "d").write_text(content)
        with pytest.raises(ValueError, match="is not a result of eval.py"):
            compare.compare_runs([[a], [tmp_path / "d"]])


def test_the_command_prints_and_saves(tmp_path, monkeypatch, capsys):
    results = [str(result(tmp_path / name, counts))
               for name, counts in (("a", [1, 2]), ("b", [2, 3]))]
    monkeypatch.setattr("sys.argv", ["compare", *results, f"--out={tmp_path / 'c.json'}"])
    compare.main()
    printed = capsys.readouterr().out.splitlines()
    assert "+12.5" in printed[-1] and len({len(line) for line in printed[1:]}) == 1  # aligned
    assert json.loads((tmp_path / "c.json").read_text())[0]["difference"] == 0.125


def test_scores_are_those_of_each_result_by_itself(tmp_path, monkeypatch, capsys):
    for name, value in (("a", 0.25), ("b", 0.5)):
        score = {"pass@k": {"1": {"value": value, "low": value - 0.1, "high": value + 0.1}}}
        result(tmp_path / f"{name}.json", [1, 2], **score)
    results = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    monkeypatch.setattr("sys.argv", ["compare", "--scores", *results])
    compare.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert "s T 1 top-p 1" in head
    assert sorted(rows) == ["a          25.0 [15.0, 35.0]", "b          50.0 [40.0, 60.0]"]
    other = result(tmp_path / "c.json", [1], temperature=0.6, **score)
    with pytest.raises(ValueError, match="c.json has other problem sets or settings than .*a.json"):
        compare.score_table([tmp_path / "a.json", other])
