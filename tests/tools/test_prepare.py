"""Public data sets as problem files: layouts, duplicates, overlap, what cannot be read."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import Problem, load_problems
from tools import prepare

GOOD = {"uid": "a", "question": "1+1=?", "answer": "2"}


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n",
                    encoding="utf-8")
    return path


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, argv)])
    prepare.main()


def test_gsm8k_keeps_its_worked_solutions_if_asked(tmp_path, monkeypatch, capsys):
    rows = [{"question": "How many?",
             "answer": "She has 3+4=<<3+4=7>>7 boxes.\n7*200 = $<<7*200=1400>>1,400\n#### 1,400"}]
    source = write(tmp_path / "train.jsonl", *rows)
    for extra in ([], ["--solutions=True"]):
        run(monkeypatch, "gsm8k_train", f"--from={source}", f"--out={tmp_path}/p.jsonl", *extra)
        row = json.loads((tmp_path / "p.jsonl").read_text())
        assert row.pop("solution", None) == (
            "She has 3+4=7 boxes.\n7*200 = $1,400\nThe answer is \\boxed{1400}." if extra else None)
        assert row["answer"] == "1400"
    with pytest.raises(ValueError,
                       match="gsm8k has no worked solutions here; use it with gsm8k_train"):
        run(monkeypatch, "gsm8k", f"--from={source}", "--solutions=True")


STATEMENT = ("A farmer keeps {} hens and {} ducks in seven small wooden houses by the river. Every "
             "morning she takes " "three eggs. How many eggs are left over after one whole week, "
             "if nobody else eats any of them?")
BOILERPLATE = " The answer is m/n where m and n are relatively prime positive integers. Find m + n."


def test_rows_of_every_known_layout_become_problems():
    rows = [{"problem": "p", "answer": 12, "problem_idx": 1},
            {"question": "g", "answer": "2+1=3\n#### 1,003"},
            {"id": "own", "problem": "i", "answer": " 5 ", "level": 2, "solution": "s"},
            {"uid": "u", "question": "n", "answer": "1"},
            {"id": 60, "problem": "h", "answer": "033"},
            {"uid": "two", "problem": "v", "answer": "1"},
            {"uid": "two", "problem": "w", "answer": "1"}]
    problems, dropped = prepare.normalise_rows(rows, "set")
    assert problems == [Problem("set-00001", "p", "12"), Problem("set-00002", "g", "1003"),
                        Problem("own", "i", "5", "2"), Problem("u", "n", "1"),
                        Problem("set-00005", "h", "033"), Problem("set-00006", "v", "1"),
                        Problem("set-00007", "w", "1")]
    assert not any(dropped.values())


def test_copies_merge_if_they_agree_and_all_go_if_they_do_not():
    rows = [{"problem": "Same  one?", "answer": "\\frac{1}{2}"},
            {"problem": "same one?", "answer": "$\\frac{1}{2}$"},
            {"problem": "torn?", "answer": "4"}, {"problem": "Torn?", "answer": "5"},
            {"problem": "torn?", "answer": "4"}, {"problem": "", "answer": "5"},
            {"problem": "x", "answer": None}, {"problem": "y", "answer": "\\frac{"}]
    problems, dropped = prepare.normalise_rows(rows, "s")
    assert [p.uid for p in problems] == ["s-00001"]
    assert dropped == {"no question": 1, "no answer": 1, "unparsable answer": 1, "duplicate": 1,
                       "copies disagree": 3}


def test_overlap_finds_reworded_copies_and_ignores_common_phrases():
    coin = ("A fair coin is tossed nine times in a row. Let p be the chance that no two heads ever "
            "stand next to each " "other while at least one tail comes up early." + BOILERPLATE)
    evaluation = [Problem("e1", STATEMENT.format(3, 4), "1"), Problem("e2", coin, "1"),
                  Problem("e3", "What is $2^{10}$?", "1")]
    train = [Problem("copy", STATEMENT.format(3, 4).replace(" ", "  ").upper(), "1"),
             Problem("edit", STATEMENT.format(8, 9), "1"),
             Problem("inside", STATEMENT.format(3, 4) +
                     "".join(f" Then add {i}." for i in range(30)), "1"),
             Problem("phrase", "In a triangle with sides 13, 14 and 15 the inscribed circle "
                     "touches one side at P. " "The ratio of areas is in lowest terms." +
                     BOILERPLATE, "1"), Problem("short", "What is 2^10 ?", "1"),
             Problem("other", "What is 2^11?", "1")]
    assert prepare.overlapping(train, evaluation) == {"copy", "edit", "inside", "short"}


def test_the_command_writes_a_clean_file_and_says_what_it_dropped(tmp_path, monkeypatch, capsys):
    write(tmp_path / "aime24.jsonl",
          {"uid": "e", "question": STATEMENT.format(3, 4), "answer": "1"})
    source = tmp_path / "raw.json"
    source.write_text(
        json.dumps([{"problem": "1+1?", "answer": "2"}, {"problem": "1+1?", "answer": "2"},
                    {"problem": STATEMENT.format(1, 1), "answer": "9"}]))
    run(monkeypatch, "deepscaler", f"--from={source}", f"--out={tmp_path}/deepscaler.jsonl")
    assert load_problems(tmp_path / "deepscaler.jsonl") == [
        Problem("deepscaler-00001", "1+1?", "2")]
    said = capsys.readouterr().out
    for words in ("3 rows -> 1 problems", "1 duplicate, 1 in aime24.jsonl", "licence: MIT"):
        assert words in said
    run(monkeypatch, "deepscaler", f"--from={source}", f"--out={tmp_path}/elsewhere/d.jsonl")
    assert "overlap was not tested" in capsys.readouterr().out
    run(monkeypatch, "deepscaler", f"--from={source}", f"--out={tmp_path}/elsewhere/d.jsonl",
        f"--eval_files={tmp_path}/aime24.jsonl")
    assert "1 in aime24.jsonl" in capsys.readouterr().out
    # an evaluation set keeps all
    run(monkeypatch, "aime24", f"--from={source}", f"--out={tmp_path}/aime24.jsonl")
    assert len(load_problems(tmp_path / "aime24.jsonl")) == 2


def test_parquet_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    parquet.write_table(pyarrow.Table.from_pylist([{"problem": "p", "answer": 4}]),
                        tmp_path / "p.parquet")
    assert prepare.read_rows(tmp_path / "p.parquet") == [{"problem": "p", "answer": 4}]
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="not a readable parquet"):
        prepare.read_rows(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow_is_one_line_and_nothing_else_needs_it(tmp_path):
    write(tmp_path / "p.jsonl", GOOD)
    (tmp_path / "p.parquet").touch()
    # an import of it would fail
    script = ("import sys; sys.modules |= {'pyarrow': None, 'pyarrow.parquet': None}; "
              "import configurator, tools.prepare; configurator.run_script(tools.prepare.main)")

    def prepared(name):
        return subprocess.run([sys.executable, "-c", script, "aime24", f"--from={tmp_path / name}",
                               f"--out={tmp_path}/o.jsonl"], cwd=Path(prepare.__file__).parents[1],
                              capture_output=True, text=True)
    assert prepared("p.jsonl").returncode == 0 and load_problems(tmp_path / "o.jsonl") == [
        Problem("a", "1+1=?", "2")]
    refused = prepared("p.parquet")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "p.parquet needs pyarrow; `pip install pyarrow`, or pass a .jsonl copy" in refused.stderr


@pytest.mark.parametrize("name, content, words", [
    ("p.csv", "a,b", "expected .jsonl, .json or .parquet"), ("p.json", "[{", "not valid json"),
    ("p.jsonl", "{}\n{", "p.jsonl:2: not valid JSON"), ("p.json", '{"a": 1}', "list of objects")])
def test_a_source_that_cannot_be_read_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        prepare.read_rows(tmp_path / name)


def test_unknown_sets_unreachable_hubs_and_useless_files_are_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown data set 'aime'; known: .*aime24"):
        run(monkeypatch, "aime")
    with pytest.raises(FileNotFoundError):
        run(monkeypatch, "aime24", f"--from={tmp_path}/none.json", f"--out={tmp_path}/o.jsonl")
    (tmp_path / "empty.json").write_text('[{"text": "x"}]')
    with pytest.raises(ValueError, match="usable problem; keys of the first: text"):
        run(monkeypatch, "aime24", f"--from={tmp_path}/empty.json", f"--out={tmp_path}/o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("name or service not known")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"cannot download .*pass --from=PATH") as e:
        run(monkeypatch, "math500", f"--out={tmp_path}/o.jsonl")
    assert "\n" not in str(e.value)
