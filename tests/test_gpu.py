"""What only a GPU can show; skipped without one. runs/gpu.sh begins with it."""
import shutil

import pytest
import torch
from test_rollout import RAGGED, draw, same, tiny_model, trainer_logprobs
from test_train import around_micro_batches, author, run, start  # noqa: F401

import parallel
import rollout
import train
from model import head_backward, head_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
# rows join, rows end, the cache grows
KNOBS = {"n": 8, "max_new_tokens": 40, "stop_ids": (3, 7), "max_rows": 12}


@pytest.mark.parametrize("top_p,vocab_size,dtype,compiled", [
    (1.0, 9, torch.float32, False), (0.9, 9, torch.float32, False),
    (0.9, 6000, torch.float32, False), (1.0, 9, torch.bfloat16, False),
    (1.0, 9, torch.float32, True)])
def test_a_recorded_step_draws_what_single_kernels_draw(
        top_p, vocab_size, dtype, compiled, monkeypatch):
    """Guards: a CUDA graph that reads or writes memory which is no longer the sampler's."""
    model, replays = tiny_model(vocab_size=vocab_size).to("cuda", dtype), []
    if compiled:
        model.compile_blocks()
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay",
                        lambda graph: replays.append(1) or replay(graph))
    recorded = draw(model, **KNOBS, top_p=top_p)
    assert len(replays) > 20
    monkeypatch.setattr(rollout, "CUDA_GRAPHS", False)
    assert same(draw(model, **KNOBS, top_p=top_p), recorded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sampler_is_the_trainer(dtype):
    """Guards traps 8 and 11 on the kernels of a GPU: fused attention under a mask, a head with fp32
    output."""
    model = tiny_model().cuda()
    parallel.shard(model, "cuda", dtype=dtype, replicas=1, offload=False)
    with parallel.Unsharded(model, dtype=dtype, device="cuda") as sampler:
        groups = draw(sampler, **KNOBS)
    torch.set_default_device("cuda")  # of the tensors that trainer_logprobs makes
    try:
        gaps = [(torch.tensor(c.logprobs, device="cpu")
                 - trainer_logprobs(model, prompt, c.ids).cpu()).abs()
                for prompt, group in zip(RAGGED, groups, strict=True) for c in group]
    finally:
        torch.set_default_device(None)
    assert torch.cat(gaps).mean() < (0.02 if dtype == "bfloat16" else 1e-5)


def test_no_token_waits_for_the_device(monkeypatch):
    """The host may look at the device between the steps, never in one; as single kernels, since
    recording would fail anyway."""
    def strict(step, device, pool):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return lambda: strict(step, device, pool)

    model = tiny_model().cuda()
    expected = draw(model, **KNOBS)
    monkeypatch.setattr(rollout, "capture", strict)
    assert same(draw(model, **KNOBS), expected)


@pytest.mark.parametrize("knobs", [{}, {"dtype": "bfloat16", "kl_coef": 0.1}, {"method": "opsd"},
                                   {"updates_per_step": 2}])
def test_no_micro_batch_waits_for_the_device(knobs, start, tmp_path, monkeypatch):
    """From the first micro-batch to the clipping of the gradient."""
    seen = []

    def leave(batches):
        torch.cuda.set_sync_debug_mode("default")
        seen.append(batches)

    author(monkeypatch)
    around_micro_batches(monkeypatch, lambda: torch.cuda.set_sync_debug_mode("error"), leave)
    try:
        run(start, tmp_path / "out", monkeypatch, max_steps=2, device="cuda", **knobs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen and min(seen) > 1


def test_fsdp_samples_trains_saves_and_resumes(start, tmp_path, monkeypatch, device="cuda"):
    """A world of one in bf16: wrap, gather, captured steps that outlive an update, a checkpoint.
    Resumed after the second step, the third is that of the uninterrupted run."""
    def by_length(rollouts):
        for r in rollouts:
            r.reward, r.grade = float(len(r.completion_ids) % 2), "correct"

    captures, capture = [], rollout.capture
    monkeypatch.setattr(rollout, "capture", lambda *args: captures.append(1) or capture(*args))
    monkeypatch.setattr(train, "score", by_length)
    knobs = {"method": "grpo", "device": device, "dtype": "bfloat16", "save_interval": 1,
             "keep_last": 3, "learning_rate": 1e-2}
    rows = []
    for resume in (False, True):
        rows.append(run(start, tmp_path / "out", monkeypatch, **knobs, resume=resume))
        shutil.rmtree(tmp_path / "out/step_000003")
    # 54 tokens in steps of one shape, or a few; three steps and their resume
    assert [len(r) for r in rows] == [3, 3] and 0 < len(captures) < 30
    for key in ("train/loss", "train/grad_norm", "rollout/length", "train/kl_ref"):
        assert rows[1][2][key] == pytest.approx(rows[0][2][key], rel=1e-2, abs=1e-4), key
    assert rows[0][2]["train/kl_ref"] > 1e-3 and max(r["train/parity_mean"] for r in rows[0]) < 0.05


def test_products_of_the_head_are_fp32():
    """Guards trap 11: bf16 operands, fp32 sums and results, in both passes."""
    hidden, weight = torch.randn(64, 128, device="cuda").bfloat16(), torch.randn(
        1000, 128, device="cuda").bfloat16()
    exact = hidden.double() @ weight.double().T
    torch.testing.assert_close(head_logits(hidden, weight).double(), exact, atol=1e-3, rtol=1e-5)
    g, dhidden = torch.randn(64, 1000, device="cuda").bfloat16().float(), torch.ones(
        64, 128, device="cuda")
    dweight = torch.ones(1000, 128, device="cuda")
    head_backward(g, hidden, weight, dhidden, dweight)
    torch.testing.assert_close(dhidden.double(), 1 + g.double() @ weight.double(),
                               atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(dweight.double(), 1 + g.double().T @ hidden.double(), atol=1e-3,
                               rtol=1e-5)
