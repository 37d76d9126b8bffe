"""What is saved when, what is kept, what is refused; and how a run of one process ends when it
cannot go on.

Killed runs are in test_train.py, several processes in test_parallel.py, random moments in
runs/chaos.sh.
"""
import json
import os
import shutil
import signal
import threading

import pytest
import torch
from test_train import author, run, same_numbers, start, weights_of  # noqa: F401

import checkpoint
import failing
import toy
import train
from checkpoint import checkpoints
from hf import save_hf
from model import CausalLM, ModelConfig

GRPO = {"method": "grpo", "ref_advantage": "reward", "save_interval": 1, "keep_last": 9}


@pytest.fixture
def done(start, tmp_path, monkeypatch):
    """A finished run of four steps, with a checkpoint of each."""
    author(monkeypatch)
    run(start, tmp_path / "done", monkeypatch, max_steps=4, **GRPO)
    return tmp_path / "done"


# --------------------------------------------------------------------------------------------------
# saving in the background


def test_a_checkpoint_written_in_the_background_is_that_of_its_step(
        start, done, tmp_path, monkeypatch):
    """Bug: training changes tensors that the thread has yet to write. Here it may write only when a
    later step has begun."""
    later, save, score = threading.Event(), checkpoint.save_hf, train.score

    def score_and_tell(rollouts):
        score(rollouts)
        if rollouts[0].query == 12:  # the fourth step: the third has changed the weights
            later.set()

    monkeypatch.setattr(train, "score", score_and_tell)
    monkeypatch.setattr(checkpoint, "save_hf", lambda *args,
                        **kwargs: (later.wait(), save(*args, **kwargs)))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        run(start, out, patch, max_steps=4, async_save=True, **GRPO | {"save_interval": 2})
    assert later.is_set()
    assert [folder.name for folder in checkpoints(out)] == ["step_000002", "step_000004"]
    ours, theirs = weights_of(done / "step_000002"), weights_of(out / "step_000002")
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    shutil.rmtree(out / "step_000004")
    # and so are the moments
    resumed = run(start, out, monkeypatch, max_steps=4, resume=True, **GRPO)
    whole = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert same_numbers(whole, resumed)


def test_what_fails_in_the_background_ends_the_run_before_the_next_save(
        start, tmp_path, monkeypatch):
    """Bug: an error that nobody waits for is lost, and so is every checkpoint from then on."""
    author(monkeypatch)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_hf", full)
    with pytest.raises(ValueError,
                       match=r"cannot save .*step_000006 .*No space left.*goes on from the start"):
        run(start, tmp_path / "out", monkeypatch, max_steps=12, async_save=True, **GRPO
            | {"save_interval": 6})
    assert 6 <= len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) < 12


# --------------------------------------------------------------------------------------------------
# what is kept


def test_the_best_by_held_out_pass1_is_kept_beside_the_newest(start, tmp_path, monkeypatch):
    """Bug: the only good checkpoint of a run that later collapses is deleted by keep_last."""
    author(monkeypatch)
    pass1 = iter((0.2, 0.9, 0.5, 0.9, 0.1))
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"eval/pass1": next(pass1)})
    run(start, tmp_path / "out", monkeypatch, max_steps=5, eval_interval=1,
        eval_problems=str(start / "held_out.jsonl"),
        **GRPO | {"keep_last": 1})
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == [
        "step_000002", "step_000005"]
    assert checkpoint.read_meta(tmp_path / "out/step_000002")["eval/pass1"] == 0.9


def test_what_a_kill_leaves_half_written_or_half_deleted_is_gone_after_the_next_start(
        done, start, monkeypatch):
    """Bug: every kill costs the disk space of a checkpoint; a half deleted one is taken for
    whole."""
    moved = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda folder, **_: moved.append(folder.name))
    saver = checkpoint.Saver(toy.make_tokenizer(), {"out_dir": done, "keep_last": 3})
    saver._delete_old()
    assert moved == [".step_000001"] and (done / ".step_000001").is_dir()
    assert len(checkpoints(done)) == 3
    monkeypatch.undo()
    checkpoint.Saver(toy.make_tokenizer(), {"out_dir": done, "keep_last": 3})
    assert not list(done.glob(".step_*")) and len(checkpoints(done)) == 3


# --------------------------------------------------------------------------------------------------
# what is refused: one line with value, rule and fix


def refused(start, out, monkeypatch, says, **knobs):
    with pytest.raises(ValueError, match=says) as refusal:
        run(start, out, monkeypatch, resume=True, **{"max_steps": 4} | GRPO | knobs)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", [None, 2])
def test_a_checkpoint_of_another_format_is_not_resumed(start, done, monkeypatch, version):
    meta = json.loads((done / "step_000004/meta.json").read_text())
    (done / "step_000004/meta.json").write_text(json.dumps(meta | {"format": version}))
    refused(start, done, monkeypatch,
            rf"step_000004 has checkpoint format {version}, this code reads 1; resume with the "
            rf"version")


@pytest.mark.parametrize("lost", ["optimizer", "optimizer/.metadata", "optimizer/__0_0.distcp"])
def test_a_checkpoint_without_its_moments_is_not_resumed(start, done, monkeypatch, lost):
    """Bug: a resumed run that starts AdamW afresh without a word."""
    (shutil.rmtree if lost == "optimizer" else os.remove)(done / "step_000004" / lost)
    refused(start, done, monkeypatch,
            r"cannot read AdamW's moments in .*step_000004/optimizer .*copy the whole checkpoint "
            r"again")


def test_moments_of_another_model_are_not_resumed(start, done, monkeypatch):
    model = CausalLM(ModelConfig(vocab_size=60, hidden_size=16, intermediate_size=32,
                                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                 head_dim=16, max_position_embeddings=256, eos_token_id=0))
    save_hf(model, toy.make_tokenizer(), done / "step_000004")
    change_config(done, log_kl=False)  # no reference model that would not fit either
    refused(start, done, monkeypatch, r"cannot read AdamW's moments in .*step_000004/optimizer",
            log_kl=False)


def test_a_checkpoint_of_another_model_than_init_from_is_not_resumed(
        start, done, tmp_path, monkeypatch):
    """Bug: init_from was overwritten by another model; KL against that one is reported as KL
    against the start."""
    shutil.copytree(start, tmp_path / "start")
    model = CausalLM(ModelConfig(vocab_size=60, hidden_size=32, intermediate_size=64,
                                 num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                                 head_dim=16, max_position_embeddings=256,
                                 eos_token_id=0))
    save_hf(model, toy.make_tokenizer(), tmp_path / "start/model")
    change_config(done, init_from=str(tmp_path / "start/model"),
                  problems=str(tmp_path / "start/train.jsonl"))
    refused(tmp_path / "start", done, monkeypatch,
            r"step_000004 is not a checkpoint of the model in init_from = .*start/model: "
            r"num_hidden_layers: 3 -> 2")


def test_a_run_of_another_init_from_is_not_resumed(start, done, tmp_path, monkeypatch):
    shutil.copytree(start / "model", tmp_path / "other")
    refused(start, done, monkeypatch,
            r"config has changed since .*: init_from: '.*model' -> '.*other'",
            init_from=str(tmp_path / "other"))


def change_config(done, **knobs):
    """As if the run had been started so."""
    meta = json.loads((done / "step_000004/meta.json").read_text())
    (done / "step_000004/meta.json").write_text(
        json.dumps(meta | {"config": meta["config"] | knobs}))


# --------------------------------------------------------------------------------------------------
# how a run ends


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_ends_the_step_saves_and_the_resumed_run_is_the_same(
        start, done, tmp_path, monkeypatch, capsys, number):
    author(monkeypatch)
    score = train.score

    def preempted(rollouts):
        if rollouts[0].query == 4:  # in the second step
            os.kill(os.getpid(), number)
        score(rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(train, "score", preempted)
        with pytest.raises(SystemExit) as stop:
            run(start, tmp_path / "out", patch, max_steps=4, **GRPO | {"save_interval": 0})
    assert stop.value.code == 128 + number
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["step_000002"]
    said = f"{number.name}: stopped after step 2 of 4; --resume=True goes on from"
    assert said in capsys.readouterr().out
    resumed = run(start, tmp_path / "out", monkeypatch, max_steps=4, resume=True, **GRPO
                  | {"save_interval": 0})
    assert same_numbers([json.loads(line)
                         for line in (done / "metrics.jsonl").read_text().splitlines()], resumed)


def test_a_save_before_the_first_update_leaves_adamw_at_step_0(start, tmp_path, monkeypatch):
    """Bug: to save moments that do not exist yet torch makes a step with gradient 0, and counts it:
    the next update is a quarter smaller than without the save."""
    author(monkeypatch)
    clip = torch.nn.utils.clip_grad_norm_
    for name, knobs in (("saved", {"save_interval": 1}), ("not", {"save_interval": 0})):
        norms = [torch.tensor(float("nan"))]
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, norms=norms: norms.pop()
                          if norms else clip(*a))
            rows = run(start, tmp_path / name, patch, max_steps=2, **GRPO | knobs)
        assert [row["train/skipped"] for row in rows] == [1, 0]
    saved, other = (weights_of(tmp_path / name / "step_000002") for name in ("saved", "not"))
    assert all(torch.equal(saved[key], other[key]) for key in saved)


def test_a_second_ctrl_c_ends_at_once_and_torchruns_copy_of_the_first_does_not(monkeypatch, capfd):
    stop, now = failing.Stop(), [100.0]
    monkeypatch.setattr(failing.time, "monotonic", lambda: now[0])
    os.kill(os.getpid(), signal.SIGINT)
    # the terminal has sent it to torchrun as well, which passes it on
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT
    assert capfd.readouterr().err.count("Ctrl-C again ends at once") == 1
    now[0] += 3
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_died_in_its_first_step_does_not_block_its_folder(start, tmp_path, monkeypatch):
    def dies(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(train, "score", dies)
        run(start, tmp_path / "out", patch, max_steps=1, **GRPO)
    assert (tmp_path / "out/metrics.jsonl").read_text() == ""
    assert len(run(start, tmp_path / "out", monkeypatch, max_steps=1, **GRPO)) == 1


def test_problems_that_changed_between_run_and_resume_are_noticed(
        start, done, tmp_path, monkeypatch):
    """Bug: the resumed run goes on with other problems, and nobody sees it."""
    content = (start / "train.jsonl").read_text(encoding="utf-8")
    shutil.copytree(done, tmp_path / "out")
    (tmp_path / "problems.jsonl").write_text("".join(reversed(content.splitlines(keepends=True))),
                                             encoding="utf-8")
    with pytest.raises(ValueError,
                       match=r"the config has changed .*problems_mark: '\w{8}' -> '\w{8}'"):
        run(start, tmp_path / "out", monkeypatch, max_steps=4, resume=True,
            problems=str(tmp_path / "problems.jsonl"), **GRPO)


@pytest.mark.parametrize("where, knobs", [
    ("sample_rollouts", "max_rows = 256"),
    ("policy_loss",
     "tokens_per_microbatch = 512, offload = False, checkpoint_activations = False")])
def test_out_of_memory_names_the_knobs_of_its_phase_and_the_last_checkpoint(
        start, done, monkeypatch, where, knobs):
    """Bug: forty lines of allocator advice, and no word of which knob to turn."""
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
                                     "total capacity of 79 GiB")

    shutil.rmtree(done / "step_000004")
    monkeypatch.setattr(train, where, exhausted)
    refused(start, done, monkeypatch,
            rf"^CUDA out of memory. Tried to allocate 2.00 GiB; change {knobs} .* from "
            rf".*step_000003$")


def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_alone(
        start, tmp_path, monkeypatch):
    """Bug: only the loss is looked at. Here it is finite in the second step, and its gradient is
    not."""
    author(monkeypatch)
    policy_loss, set_learning_rate, now = train.policy_loss, train.set_learning_rate, {}

    def steep(logprobs, *args):
        loss, stats = policy_loss(logprobs, *args)
        # its square root is 0, with an infinite slope
        nothing = (logprobs - logprobs.detach()).sum()
        return loss + nothing.sqrt() if now["step"] == 1 else loss, stats

    monkeypatch.setattr(train, "set_learning_rate", lambda optimizer, step, **k: (
        now.update(step=step), set_learning_rate(optimizer, step, **k))[1])
    monkeypatch.setattr(train, "policy_loss", steep)
    rows = run(start, tmp_path / "out", monkeypatch, **GRPO)
    assert [row["train/skipped"] for row in rows] == [0, 1, 0] and abs(rows[1]["train/loss"]) < 1e3
    first, second, third = (weights_of(tmp_path / f"out/step_00000{step}") for step in (1, 2, 3))
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    assert all(torch.isfinite(p).all() and not torch.equal(p, second[name]) for name,
               p in third.items())


def test_a_resumed_run_that_is_already_finished_ends_at_once_and_says_so(
        start, done, monkeypatch, capsys):
    assert len(run(start, done, monkeypatch, resume=True, max_steps=4, **GRPO)) == 4
    assert "step_000004 is the last step; nothing to resume" in capsys.readouterr().out


def test_an_out_dir_that_cannot_be_made_is_one_line(start, tmp_path, monkeypatch):
    """Bug: FileExistsError with a traceback where out_dir is a file."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/under"):
        said = f"out_dir = {out}: {tmp_path}/file is no folder .*another"
        with pytest.raises(ValueError, match=said):
            run(start, out, monkeypatch, **GRPO)
