"""wandb and tensorboard: the rows of metrics.jsonl, in the same run after a resume, and no import
of either unless asked for."""
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from test_train import run, start  # noqa: F401

import metrics
import reflect


def stub(monkeypatch, name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for wandb; what it was asked and told."""
    asked, told = [], []

    def init(**knobs):
        asked.append(knobs)
        return SimpleNamespace(log=lambda row, step: told.append({"step": step} | row))

    stub(monkeypatch, "wandb", init=init)
    return SimpleNamespace(asked=asked, told=told)


@pytest.fixture
def writers(monkeypatch):
    """Stands in for tensorboard: {folder: {step: {name: value}}}, and what is cut off when a folder
    is opened again."""
    folders = {}

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            self.steps = folders[log_dir] = {s: row for s, row in folders.get(log_dir, {}).items()
                                             if s < purge_step}

        def add_scalar(self, name, value, step):
            assert name not in self.steps.setdefault(step, {})  # tensorboard would show both
            self.steps[step][name] = value

        def flush(self):
            pass

    stub(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return folders


def killed_and_resumed(source, out, monkeypatch, **knobs):
    """Three steps with a kill behind the third, whose checkpoint is that of the second; then all
    four. The rows of metrics.jsonl after each of the two."""
    def dies(step, *more):
        if step == 3:
            raise RuntimeError("killed")
        return metrics.console_line(step, *more)

    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="killed"):
        m.setattr("train.console_line", dies)
        run(source, out, m, max_steps=4, method="grpo", **knobs)
    first = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return first, run(source, out, monkeypatch, max_steps=4, method="grpo", resume=True, **knobs)


def test_wandb_gets_the_rows_of_the_log_and_a_resumed_run_is_the_same_run(
        start, tmp_path, monkeypatch, wandb):
    """Bug: every resume makes a new run, so that a curve ends up in pieces."""
    first, second = killed_and_resumed(start, tmp_path / "out", monkeypatch, log_to="wandb")
    assert wandb.told == first + second[2:]
    assert [row["step"] for row in wandb.told] == [1, 2, 3, 3, 4]
    one, two = wandb.asked
    assert one["id"] == two["id"] and one["resume"] == two["resume"] == "allow"
    assert one["config"]["max_steps"] == 4
    assert one["project"] == "tapo" and one["name"] == str(tmp_path / "out")
    assert one["dir"] == str(tmp_path / "out")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    metrics.open_log("wandb", {"out_dir": str(tmp_path / "other")}, 0)
    assert wandb.asked[2]["id"] != one["id"] and wandb.asked[2]["project"] == "mine"


def test_tensorboard_gets_every_step_of_the_log_once(start, tmp_path, monkeypatch, writers):
    """Bug: the steps between the last checkpoint and a kill appear twice."""
    first, second = killed_and_resumed(start, tmp_path / "out", monkeypatch, log_to="tensorboard")
    assert len(first) == 3 and len(second) == 4
    assert writers == {
        str(tmp_path / "out" / "tensorboard"): {row.pop("step"): row for row in second}}


def test_the_warning_of_lost_constructions_gives_the_reason_of_most():
    def said(lost_steps=3, **counts):
        m = {f"reflect/dropped_{name}": 0.0 for name in reflect.DROP_REASONS} | {
            "rollout/truncated": 0, "rollout/zero_variance_groups": 0, "train/skipped": 0,
            "reflect/candidates": 8.0} | {f"reflect/{key}": n for key, n in counts.items()}
        found = metrics.warnings_of(m, method="tapo", max_new_tokens=9, dry_steps=0,
                                    lost_steps=lost_steps)
        return " ".join(found)

    assert "are too_long; raise max_new_tokens" in said(dropped_too_long=7, dropped_unparsable=1)
    assert "`keep` leaves most out" in said(dropped_unparsable=1)  # seven were built
    assert said(candidates=0.0) == "" == said(lost_steps=2, dropped_too_long=8)


def test_neither_is_imported_unless_asked_for(start, tmp_path, monkeypatch):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it would fail
    run(start, tmp_path / "out", monkeypatch, max_steps=1, method="grpo")
    for kind in ("wandb", "tensorboard"):
        said = f"^log_to = '{kind}' .*`pip install {kind}`.*leave log_to out"
        with pytest.raises(ValueError, match=said) as error:
            run(start, tmp_path / kind, monkeypatch, max_steps=1, method="grpo", log_to=kind)
        assert "\n" not in str(error.value) and not (tmp_path / kind).exists()
    with pytest.raises(ValueError,
                       match="log_to = 'mlflow' must be one of '', 'wandb', 'tensorboard'"):
        run(start, tmp_path / "x", monkeypatch, log_to="mlflow")


def test_a_wandb_without_login_says_how_to_go_offline(tmp_path, monkeypatch):
    def init(**knobs):
        raise RuntimeError("No API key configured.")

    stub(monkeypatch, "wandb", init=init)
    with pytest.raises(ValueError,
                       match="log_to = 'wandb': No API key configured. Log in, or set "
                             "WANDB_MODE=offline"):
        metrics.open_log("wandb", {"out_dir": str(tmp_path)}, 0)
