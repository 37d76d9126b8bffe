"""The configurator's contract, one test a line. Each guards a hole that lets a run start with a
wrong value."""
import ast
import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import coldstart
import configurator
import eval as evaluation
import train
from configurator import configure, diff_configs, print_config, run_script, save_config
from tools import measure

ROOT = Path(__file__).resolve().parents[1]


def knobs(**extra):
    """The globals of a script with one knob of each kind."""
    return {
        "__annotations__": {"clip": float | None, "name": str | None, "sizes": tuple[int, ...]},
        "__file__": "/nowhere/train.py", "lam": 1.0, "max_steps": 10, "resume": False,
        "out_dir": "out", "sizes": (1, 2), "clip": None, "name": None, "free": None, "_private": 3,
        "os": os, "Path": Path, "main": lambda: None, "LIMIT": 7, "cache": {}, **extra}


def file(tmp_path, text, name="diff.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("script, bad", [
    ("train", "clip_eps=-0.1 lam=-1 learning_rate=-0.001 grad_clip=0 save_interval=-3 seed=-1 "
              "warmup_steps=-3 weighting='ours' "
              "max_synthesis_tokens=-4 opsd_beta=1.5 w_max=0 temperature=nan dtype='fp8' "
              "samples_per_prompt=1"),
    ("coldstart", "epochs=0 n_sft=-1 stop_at_pass1=1.2 synthesis='llm' beta2=1.5 grad_clip=-1"),
    ("eval", "samples=0 filter_low=-1 device='tpu' max_rows=-1"),
    ("tools.measure", "continuations=0 w_min=-1")])
def test_a_value_outside_its_knobs_range_is_refused_in_one_line(script, bad):
    """Bug: grad_clip = 0 is accepted, and nothing ever moves."""
    module = importlib.import_module(script)
    for argument in bad.split():
        key, value = argument.split("=")
        value = float("nan") if value == "nan" else ast.literal_eval(value)
        with pytest.raises(ValueError,
                           match=rf"^{key} = .* must be (one of|at least|above|between) [^\n]*$"):
            configure(vars(module) | {key: type(getattr(module, key))(value)}, [])


def test_w_min_above_w_max_is_refused():
    with pytest.raises(ValueError, match="w_min = 5.0 exceeds w_max = 1.0"):
        train.check_config(
            SimpleNamespace(**configure(dict(vars(train)), ["--w_min=5", "--w_max=1"])))


def test_every_config_file_is_within_the_ranges_of_its_script():
    scripts = {"coldstart": coldstart, "sft": coldstart, "eval": evaluation, "filter": evaluation,
               "measure": measure}
    for path in sorted((ROOT / "config").glob("*.py")):
        script = next((scripts[part] for part in path.stem.split("_") if part in scripts), train)
        configure(dict(vars(script)), [str(path)])


def test_every_trap_that_a_comment_cites_is_in_the_list():
    listed = re.findall(r"^(\d+)\. \*\*", (ROOT / "docs/traps.md").read_text(encoding="utf-8"),
                        flags=re.M)
    cited = {number for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"))
             for number in re.findall(r"\btraps? (\d+)", path.read_text(encoding="utf-8"))}
    assert listed == [str(i) for i in range(1, 24)] and cited <= set(listed) and len(cited) > 20


def test_help_shows_the_rule_beside_the_reason(capsys):
    with pytest.raises(SystemExit):
        configure(dict(vars(train)), ["--help"])
    assert re.search(r"--lam=1.0 +\(at least 0\) Eq. 6\n", capsys.readouterr().out)


def test_only_lower_case_public_plain_globals_are_knobs():
    assert list(configure(knobs(), [])) == ["lam", "max_steps", "resume", "out_dir", "sizes",
                                            "clip", "name", "free"]


def test_the_globals_are_updated_in_place_and_the_flat_dict_returned():
    script = knobs()
    config = configure(script, ["--lam=0.5", "--max_steps=3"])
    assert (script["lam"], script["max_steps"]) == (0.5, 3) == (config["lam"], config["max_steps"])
    assert config["out_dir"] == "out" and script["_private"] == 3


def test_a_bad_argument_changes_nothing():
    script = knobs()
    with pytest.raises(ValueError):
        configure(script, ["--lam=0.5", "--max_steps=x"])
    assert script["lam"] == 1.0


@pytest.mark.parametrize("typo", ["max_step", "maxsteps", "max-steps"])
def test_an_unknown_key_on_the_command_line_names_the_nearest(typo):
    with pytest.raises(ValueError, match=rf"^--{typo}: no such knob; did you mean 'max_steps'\?$"):
        configure(knobs(), [f"--{typo}=3"])


def test_an_unknown_key_in_a_file_names_the_file_and_the_nearest(tmp_path):
    path = file(tmp_path, "max_step = 3\n")
    with pytest.raises(ValueError) as error:
        configure(knobs(), [path])
    assert str(error.value) == f"{path}: max_step: no such knob; did you mean 'max_steps'?"


def test_a_key_that_resembles_none_gets_no_wrong_hint():
    with pytest.raises(ValueError, match="^--batch_size: no such knob; --help lists them$"):
        configure(knobs(), ["--batch_size=3"])


@pytest.mark.parametrize("text, value", [("true", True), ("False", False), ("FALSE", False)])
def test_a_bool_may_be_written_as_elsewhere(text, value):
    assert configure(knobs(), [f"--resume={text}"])["resume"] is value


def test_a_knob_in_capitals_in_a_file_is_refused_and_not_ignored(tmp_path):
    with pytest.raises(ValueError, match="LAM: no such knob; did you mean 'lam'"):
        configure(knobs(), [file(tmp_path, "LAM = 0.1\n")])


def test_private_names_do_not_become_reachable():
    with pytest.raises(ValueError, match="no such knob"):
        configure(knobs(), ["--_private=4"])


def test_an_int_is_accepted_for_a_float_and_becomes_one(tmp_path):
    for arguments in (["--lam=1"], [file(tmp_path, "lam = 1\n")]):
        value = configure(knobs(), arguments)["lam"]
        assert value == 1.0 and type(value) is float


@pytest.mark.parametrize("text", ["1.0", "1e3", "True", "'3'", "three", "None", "", "1,"])
def test_nothing_but_an_int_is_accepted_for_an_int(text, tmp_path):
    with pytest.raises(ValueError, match=r"--max_steps: expected int \(default 10\), got"):
        configure(knobs(), [f"--max_steps={text}"])
    if text not in ("", "three"):
        with pytest.raises(ValueError, match=r"max_steps: expected int \(default 10\), got"):
            configure(knobs(), [file(tmp_path, f"max_steps = {text}\n")])


def test_a_bool_is_not_a_number():
    with pytest.raises(ValueError, match=r"--lam: expected float \(default 1\.0\), got True"):
        configure(knobs(), ["--lam=True"])


def test_the_annotation_decides_where_the_default_is_of_another_type():
    result = configure(knobs(lam=1, __annotations__={"lam": float, "max_steps": int},
                             max_steps=None), ["--lam=2"])
    assert type(result["lam"]) is float
    assert configure(knobs(lam=None, __annotations__={"lam": float}), ["--lam=None"])["lam"] is None


def test_the_type_error_has_the_promised_words():
    with pytest.raises(ValueError) as error:
        configure(knobs(), ["--lam=one"])
    assert str(error.value) == "--lam: expected float (default 1.0), got 'one'"


def test_the_value_is_split_at_the_first_equals_sign():
    assert configure(knobs(), ["--out_dir=a=b=c"])["out_dir"] == "a=b=c"


@pytest.mark.parametrize("text,value", [("True", True), ("False", False)])
def test_bools_take_true_and_false(text, value):
    assert configure(knobs(), [f"--resume={text}"])["resume"] is value


@pytest.mark.parametrize("text", ["1", "0", "yes", "", "None", "[True]"])
def test_bools_take_nothing_else(text):
    with pytest.raises(ValueError, match=r"--resume: expected bool \(default False\)"):
        configure(knobs(), [f"--resume={text}"])


@pytest.mark.parametrize("text", ["12", "None", "True", "1.5", "'quoted'", "", " a ", "(1, 2)"])
def test_a_string_knob_takes_its_value_verbatim(text):
    assert configure(knobs(), [f"--out_dir={text}"])["out_dir"] == text


@pytest.mark.parametrize("text,value", [("3,4,5", (3, 4, 5)), ("(3,)", (3,)), ("()", ()),
                                        ("[3, 4]", (3, 4))])
def test_tuples_are_allowed(text, value):
    assert configure(knobs(), [f"--sizes={text}"])["sizes"] == value


def test_a_number_is_not_a_tuple():
    with pytest.raises(ValueError, match=r"--sizes: expected tuple \(default \(1, 2\)\), got 3"):
        configure(knobs(), ["--sizes=3"])


@pytest.mark.parametrize("text,value", [("None", None), ("3", 3), ("(1, 2)", (1, 2)),
                                        ("a b", "a b"), ("a=b", "a=b")])
def test_an_unannotated_none_accepts_any_literal_or_string(text, value):
    assert configure(knobs(), [f"--free={text}"])["free"] == value


@pytest.mark.parametrize("text,value", [("None", None), ("3", 3.0), ("0.5", 0.5)])
def test_an_annotated_none_takes_its_annotation(text, value):
    result = configure(knobs(), [f"--clip={text}"])["clip"]
    assert result == value and type(result) is type(value)


def test_an_annotated_none_refuses_other_types():
    with pytest.raises(ValueError,
                       match=r"--clip: expected float \| None \(default None\), got 'big'"):
        configure(knobs(), ["--clip=big"])


def test_an_optional_string_is_verbatim_but_for_none():
    assert configure(knobs(), ["--name=12"])["name"] == "12"
    assert configure(knobs(name="x"), ["--name=None"])["name"] is None


def test_annotations_given_as_text_are_understood():
    script = knobs(__annotations__={"clip": "float | None"})
    assert configure(script, ["--clip=2"])["clip"] == 2.0


def test_annotations_without_a_value_and_odd_ones_do_not_disturb():
    assert configure(knobs(__annotations__={"lam": "float", "later": int}),
                     ["--lam=2"])["lam"] == 2.0


def test_files_apply_in_order_and_the_command_line_wins_wherever_it_stands(tmp_path):
    first, second = file(tmp_path, "lam = 2.0\nmax_steps = 5\n", "a.py"), file(
        tmp_path, "lam = 3.0\n", "b.py")
    config = configure(knobs(), ["--max_steps=7", first, second])
    assert (config["lam"], config["max_steps"]) == (3.0, 7)
    assert configure(knobs(), [second, first])["lam"] == 2.0


def test_a_file_may_compute_import_and_keep_private_names(tmp_path):
    text = ("import math\nimport os.path\nfrom math import pi\n_half = 0.5\ndef f(x):\n    return "
            "x\n"
            "lam = f(math.sqrt(4) * _half)\n")
    assert configure(knobs(), [file(tmp_path, text)])["lam"] == 1.0


def test_a_value_of_the_wrong_kind_for_a_known_knob_in_a_file_is_refused(tmp_path):
    for value in ("{}", "lambda: 1", "'1.0'"):
        with pytest.raises(ValueError,
                           match=r"diff\.py: lam: expected float \(default 1\.0\), got"):
            configure(knobs(), [file(tmp_path, f"lam = {value}\n")])


def test_a_relative_file_is_found_in_the_current_folder_first_then_beside_the_script(
        tmp_path, monkeypatch):
    here, script_dir = tmp_path / "here", tmp_path / "script"
    (here / "config").mkdir(parents=True)
    (script_dir / "config").mkdir(parents=True)
    script = knobs(__file__=str(script_dir / "train.py"))
    file(script_dir / "config", "lam = 2.0\n", "a.py")
    monkeypatch.chdir(here)
    assert configure(dict(script), ["config/a.py"])["lam"] == 2.0
    file(here / "config", "lam = 3.0\n", "a.py")
    assert configure(dict(script), ["config/a.py"])["lam"] == 3.0


def test_a_missing_file_lists_the_places_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        configure(knobs(), ["config/none_such.py"])
    assert all(f"{folder}/config/none_such.py" in str(error.value) for folder in (tmp_path, ROOT))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text,expected",
                         [("lam = 1.0\n\nmax_steps = 1 // 0\n", ":3: ZeroDivisionError"),
                          ("lam = 1.0\nmax_steps = (\n", ":2: SyntaxError"),
                          ("def f():\n    return x\nlam = f()\n",
                           ":2: NameError")])
def test_a_file_that_raises_is_reported_with_its_line(tmp_path, text, expected):
    path = file(tmp_path, text)
    with pytest.raises(ValueError) as error:
        configure(knobs(), [path])
    assert str(error.value).startswith(path + expected)


@pytest.mark.parametrize("argument", ["--resume", "-lam=1", "--lam"])
def test_an_argument_without_a_value_says_how_to_write_it(argument):
    with pytest.raises(ValueError, match="write --(resume=True|lam=value)"):
        configure(knobs(), [argument])


def test_help_prints_every_knob_its_default_and_its_comment(tmp_path, capsys):
    script = file(tmp_path, "lam: float = 1.0  # weight of the reflection loss\n", "train.py")
    with pytest.raises(SystemExit) as stop:
        configure(knobs(__file__=script), ["--lam=2", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--out_dir='out'" in out
    assert "--lam=1.0" in out and "weight of the reflection loss" in out
    assert "_private" not in out


def test_help_finds_a_comment_above_its_knob_and_gives_it_to_no_other(tmp_path, capsys):
    """Bug: a comment too long for the knob's line is shown at the knob before it, or not at all."""
    script = file(tmp_path, "# --- the loss ---\nlam: float = 1.0\n# of AdamW\nmax_steps = 10\n",
                  "train.py")
    with pytest.raises(SystemExit):
        configure(knobs(__file__=script), ["--help"])
    out = capsys.readouterr().out
    assert re.search(r"^--lam=1.0 *$", out, re.M)
    assert re.search(r"^--max_steps=10 +of AdamW$", out, re.M)


def test_an_imported_script_does_not_read_the_arguments_of_its_importer(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "-q", "tests"])
    assert configure(knobs(__name__="train"))["lam"] == 1.0


def test_a_started_script_reads_its_arguments_and_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lam=2"])
    assert configure(knobs(__name__="__main__"))["lam"] == 2.0
    monkeypatch.setattr(sys, "argv", ["train.py", "--lam=two"])
    with pytest.raises(SystemExit) as stop:
        configure(knobs(__name__="__main__"))
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: --lam: expected float (default 1.0), got 'two'\n"


def test_a_real_script_is_configured_end_to_end(tmp_path):
    """Real globals, real annotations (which Python 3.14 keeps elsewhere), another folder."""
    script = file(tmp_path, f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import configure
lam: float = 1.0
clip: float | None = None
config = configure(globals())
print(lam, clip, config)
""", "s.py")
    run = [sys.executable, script]
    good = subprocess.run([*run, "--lam=2", "--clip=3"], capture_output=True, text=True, cwd="/")
    assert good.stdout == "2.0 3.0 {'lam': 2.0, 'clip': 3.0}\n", good.stderr
    bad = subprocess.run([*run, "--clip=x"], capture_output=True, text=True, cwd="/")
    assert (bad.returncode,
            bad.stderr) == (1, "error: --clip: expected float | None (default None), got 'x'\n")


def test_what_differs_from_the_defaults_is_printed(capsys):
    config = configure(knobs(lam=1.0, max_steps=3, seed=0), ["--lam=2", "--max_steps=4"])
    print_config(config, "out/run")
    assert capsys.readouterr().out.splitlines() == [
        f"2 of {len(config)} knobs differ from their defaults; all of them: out/run",
        "  lam       = 2.0  (1.0)", "  max_steps = 4  (3)"]


def test_the_config_is_saved_with_tuples_as_lists(tmp_path):
    save_config({"lam": 1.0, "sizes": (1, 2), "clip": None}, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {
        "lam": 1.0, "sizes": [1, 2], "clip": None}
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_a_saved_config_does_not_differ_from_itself():
    config = {"sizes": (1, (2, 3)), "lam": 1.0}
    assert diff_configs(json.loads(json.dumps(config)), config) == []


def test_differences_are_listed_as_old_and_new():
    assert diff_configs({"lam": 1.0, "gone": 1, "n": None},
                        {"lam": 2.0, "n": "x", "new": (1,)}) == [
        "lam: 1.0 -> 2.0", "n: None -> 'x'", "new: (not set) -> (1,)", "gone: 1 -> (not set)"]


@pytest.mark.parametrize("problem",
                         [ValueError("lam = 3\nis too much"), FileNotFoundError("no file"),
                          OSError(errno.ENOSPC, "No space left on device")])
def test_what_the_user_can_repair_becomes_one_line_and_exit_code_1(problem, capsys):
    def main():
        raise problem
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("problem", [RuntimeError("bug"), KeyError("k"),
                                     PermissionError(errno.EACCES, "denied")])
def test_every_other_exception_keeps_its_traceback(problem):
    def main():
        raise problem
    with pytest.raises(type(problem)):
        run_script(main)


def test_an_interrupt_exits_with_130():
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 130


def test_run_script_returns_what_main_returns():
    assert run_script(lambda: 5) == 5 and configurator.run_script is run_script
