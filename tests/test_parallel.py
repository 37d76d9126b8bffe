"""Several processes against one: the same run, whatever the world size. Real FSDP2, gloo on a CPU.

Most ranks come from ranks.py; where torchrun's own behaviour matters it is the real one, which runs
this file as a script. Every rank runs train.py with config/toy.py at small sizes, and with
test_train's author for a sampler, who solves few queries: reflections land unevenly on the ranks,
and on some not at all.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest  # noqa: F401  (as a script this file has no pytest to load it)
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors import safe_open
from test_train import author, rollouts_of, same_numbers, start, weights_of  # noqa: F401
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import failing
import memory
import parallel
import train
import update
from configurator import configure
from hf import load_hf
from parallel import balance

TOY = {"prompts_per_step": 12, "samples_per_prompt": 3, "n_pos": 1, "n_neg": 1, "m_max": 2,
       "max_new_tokens": 60, "max_synthesis_tokens": 130, "max_steps": 5, "learning_rate": 1e-3,
       "tokens_per_microbatch": 320, "eval_interval": 2,
       "save_interval": 1, "keep_last": 9, "ref_advantage": "reward", "device": "cpu"}


def solved(query: int) -> bool:
    """In even steps the queries of rank 0 of 2, and none of rank 1 of 3; in odd ones more, as
    unevenly."""
    return query % 12 in ((0, 2, 6) if query // 12 % 2 == 0 else (0, 3, 4, 9))


# What goes wrong on rank 1 in the third step.
def _raise():
    raise RuntimeError("planted on rank 1")


FAULTS = {"raise": _raise, "value": lambda: train.configure(vars(train) | {"method": "ppo"}, []),
          "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
          "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
          "hang": lambda: time.sleep(1000)}


def child(argv: list[str], fault: str = "") -> None:
    patch = pytest.MonkeyPatch()
    author(patch, solved)
    problems_for_step, policy_loss = train.problems_for_step, train.policy_loss

    def faulty_step(problems, seed, step, n):
        if step == 2 and os.environ.get("RANK") == "1" and fault in FAULTS:
            FAULTS[fault]()
        patch.setattr(train, "policy_loss", nan_loss if fault == "nan" and step in (1, 3, 4)
                      else policy_loss)
        return problems_for_step(problems, seed, step, n)

    def nan_loss(*args):
        loss, stats = policy_loss(*args)
        return loss * (float("nan") if os.environ.get("RANK", "1") == "1" else 1.0), stats

    patch.setattr(train, "problems_for_step", faulty_step)
    if fault == "nan":
        patch.setattr(failing, "MAX_BAD_STEPS", 2)
    if fault == "unscored":  # the real sampler, and rewards for whatever it writes
        patch.undo()
        patch.setattr(train, "score", by_length)
    if fault == "little memory":  # of rank 1
        patch.setattr(memory, "free_memory",
                      lambda _: 10**12 if os.environ["RANK"] == "0" else 0)
    configure(vars(train), argv)
    failing.run(train.main)


def by_length(rollouts) -> None:
    for r in rollouts:
        r.reward, r.grade = float(len(r.completion_ids) % 2), "correct"


def arguments(folder: Path, out: Path, **knobs) -> list[str]:
    knobs = TOY | {"init_from": folder / "model", "problems": folder / "train.jsonl",
                   "eval_problems": folder / "held_out.jsonl",
                   "out_dir": out} | knobs
    return [str(train.__file__).replace("train.py", "config/toy.py"),
            *(f"--{key}={value}" for key, value in knobs.items())]


def fail_on(world: int, folder: Path, out: Path, fault: str = "", **knobs) -> list[tuple[int, str]]:
    return run_ranks(world, child, arguments(folder, out, **knobs), fault)


def train_on(world: int, folder: Path, out: Path, fault: str = "", **knobs) -> None:
    done = fail_on(world, folder, out, fault, **knobs)
    assert [status for status, _ in done] == [0] * world, "\n".join(text for _, text in done)


def torchrun(folder: Path, out: Path, fault: str = "", *,
             options=("--standalone", "--nproc_per_node=2"), **knobs):
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__,
               json.dumps(arguments(folder, out, **knobs)), fault]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Every metric of every step within float noise, the losses within 1e-5, the last weights
    within 1e-4."""
    for a, b in zip(rows_of(ours), rows_of(theirs), strict=True):
        assert a.keys() == b.keys()
        assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-5)
        for key in a:
            if not key.startswith("time/"):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (a["step"], key)
    for name, p in weights_of(ours / "step_000005").items():
        assert (p - weights_of(theirs / "step_000005")[name]).abs().max() < 1e-4, name


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """The same five steps with one process, with two and with three."""
    outs = {world: tmp_path_factory.mktemp("runs") / str(world) for world in (1, 2, 3)}
    for world, out in outs.items():
        train_on(world, start, out)
    return outs


# --------------------------------------------------------------------------------------------------
# any number of processes trains the same


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_train_what_one_trains(runs, world):
    """Traps 12, 21; FSDP. Bugs: a denominator per rank, averaged means, queries or noise dealt
    twice, a rank without reflections that runs fewer passes and hangs the others."""
    assert_same_run(runs[1], runs[world])
    kept = [row["reflect/kept"] for row in rows_of(runs[world])]
    assert kept == [6, 8, 6, 8, 6] and all(row["train/grad_norm"] > 0
                                           for row in rows_of(runs[world]))
    assert "eval/pass1" in rows_of(runs[world])[1]


def test_every_rollout_of_every_rank_is_on_disk_once_in_one_order(runs):
    """Bug: two ranks writing one file, or a file that depends on the number of ranks."""
    for step in range(1, 6):
        one, two, three = ([(r["uid"], r["query"], r["completion_ids"], r["group"], r["reward"],
                             r["advantage"])
                            for r in rollouts_of(runs[world], step)] for world in (1, 2, 3))
        assert one == two == three and len(one) == 36 + len([r for r in one if "reflected" in r[3]])
    assert all(r["ots_weights"] for r in rollouts_of(runs[3], 2) if r["is_reflection"])


@pytest.mark.parametrize("before, after", [(2, 1), (2, 3), (1, 2)])
def test_saved_by_some_resumed_by_others(start, runs, tmp_path, before, after):
    """Trap 22. Bug: moments or weights that only the same number of processes can read."""
    assert_same_run(runs[1], resumed(start, runs[before], tmp_path / "out", after))


def test_resumed_by_as_many_it_is_the_uninterrupted_run_bit_for_bit(start, runs, tmp_path):
    """Trap 22, FSDP. Bug: moments or masters rounded, or in another order, on their way through a
    checkpoint."""
    out = resumed(start, runs[2], tmp_path / "out", 2, async_save=True)
    assert same_numbers(rows_of(runs[2]), rows_of(out))
    assert rollouts_of(runs[2], 5) == rollouts_of(out, 5)
    ours, theirs = weights_of(runs[2] / "step_000005"), weights_of(out / "step_000005")
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def resumed(folder: Path, run: Path, out: Path, world: int, **knobs) -> Path:
    """A copy of the run that has lost all after step 2, continued."""
    shutil.copytree(run, out)
    for step in (3, 4, 5):
        shutil.rmtree(out / f"step_{step:06d}")
    train_on(world, folder, out, resume=True, **knobs)
    return out


@pytest.mark.parametrize("replicas,grid", [(1, {"shard": 8}), (2, {"replicate": 2, "shard": 4})])
def test_replicas_are_the_outer_dimension_of_the_grid(replicas, grid, start, monkeypatch):
    """Bug: 8 GPUs in two nodes that shard across the nodes."""
    made = []
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda device, shape, mesh_dim_names:
                        made.append(dict(zip(mesh_dim_names, shape, strict=True))))
    monkeypatch.setattr(parallel, "fully_shard", lambda module, **_: module)
    parallel.shard(load_hf(start / "model"), "cpu", dtype="float32", replicas=replicas,
                   offload=False)
    monkeypatch.undo()
    assert made == [grid]


def test_a_grid_of_replicas_and_shards_trains_the_same(start, runs, tmp_path):
    """HSDP, 2 x 2. Bug: gradients averaged within a node only, or a checkpoint that counts its
    replicas twice."""
    train_on(4, start, tmp_path / "out", replicas=2)
    assert_same_run(runs[1], tmp_path / "out")


def test_micro_batches_of_any_size_train_the_same_on_two_processes(start, runs, tmp_path):
    """Trap 12, FSDP: one micro-batch for everything, so that rank 1 has none but the filler. Bug: a
    mean per micro-batch or per rank."""
    train_on(2, start, tmp_path / "out", tokens_per_microbatch=10**6)
    assert_same_run(runs[1], tmp_path / "out")


def test_ranks_with_different_memory_agree_on_the_micro_batch(start, runs, tmp_path):
    """Trap 21. Bug: as many micro-batches as each rank's own memory asks for, and a hang."""
    done = fail_on(2, start, tmp_path / "out", "little memory", tokens_per_microbatch=0)
    assert [status for status, _ in done] == [0, 0], "\n".join(text for _, text in done)
    assert "micro-batches of 256 tokens" in done[0][1]
    assert_same_run(runs[1], tmp_path / "out")


@pytest.mark.parametrize("world,dtype", [(1, "float32"), (1, "bfloat16"), (2, "float32")])
def test_offload_trains_the_same(start, tmp_path, world, dtype):
    """On a CPU there is nowhere to offload to. Bug: memory pinned for a GPU that is not there."""
    knobs = {"max_steps": 1, "eval_interval": 0, "dtype": dtype}
    for offload in (False, True):
        train_on(world, start, tmp_path / str(offload), **knobs, offload=offload)
    before, after = (weights_of(tmp_path / str(offload) / "step_000001")
                     for offload in (False, True))
    for name, p in before.items():
        torch.testing.assert_close(after[name], p, atol=1e-6, rtol=1e-5)


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes_in_bf16_either(
        start, tmp_path):
    """Bug: another mixed precision for one process than for several."""
    for world in (1, 2):
        train_on(world, start, tmp_path / str(world), "unscored", method="grpo", max_steps=1,
                 max_new_tokens=24, eval_problems="", dtype="bfloat16")
    drawn = [[r["completion_ids"] for r in rollouts_of(tmp_path / world)] for world in ("1", "2")]
    assert drawn[0] == drawn[1]


def test_the_sampler_has_the_weights_of_every_step_and_of_a_resume(start, tmp_path):
    """Trap 10 under FSDP, with the real sampler and steps large enough to see. Bug: gathered
    weights that outlive the update."""
    knobs = {"method": "grpo", "max_steps": 3, "learning_rate": 0.02, "warmup_steps": 0,
             "max_new_tokens": 24, "temperature": 0.7,
             "eval_problems": ""}
    for world in (1, 2):
        out = tmp_path / str(world)
        train_on(world, start, out, "unscored", **knobs)
    shutil.copytree(tmp_path / "2", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/step_000003")
    train_on(2, start, tmp_path / "again", "unscored", **knobs, resume=True)
    for rows in (rows_of(tmp_path / "2"), rows_of(tmp_path / "again")):
        assert rows[-1]["train/kl_ref"] > 0.01
        assert max(row["train/parity_max"] for row in rows) < 1e-4
    assert same_numbers(rows_of(tmp_path / "2"), rows_of(tmp_path / "again"))
    drawn = [[r["completion_ids"] for r in rollouts_of(tmp_path / world)] for world in ("1", "2")]
    # trap 7: the same (seed, step, query, sample) draws the same, whoever draws it
    assert drawn[0] == drawn[1]


def head_under_fsdp(folder: str, report: str) -> None:
    parallel.start("cpu", 1.0)
    rank = parallel.rank()
    model = load_hf(folder, wrap=lambda model: parallel.shard(
        model, "cpu", dtype="bfloat16", replicas=1, offload=False))
    inputs = torch.arange(5 + rank, 45 + rank).view(2, 20)
    targets = inputs.roll(-1, 1)
    logprobs, _ = model(inputs, targets)
    logprobs.sum().backward()
    grads = [parallel.whole(p.grad) for p in model.parameters()]
    rounded = [(g == g.bfloat16().float()).float().mean().item() for g in grads if g.dim() == 2]
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        hidden = model(inputs)                                                    # (B,T,d) bf16
    # (V,d), as a unit gathers it
    weight = parallel.whole(model.output_weight).bfloat16().float()
    exact = torch.log_softmax(hidden.float() @ weight.T, -1).gather(-1, targets[..., None])[..., 0]
    if rank == 0:
        Path(report).write_text(json.dumps({
            "gap": float((logprobs.detach() - exact.detach()).abs().max()),
            "grads": [str(g.dtype) for g in grads], "hidden": str(hidden.dtype),
            "rounded": sum(rounded) / len(rounded),
            "heads": [name for name in names if "lm_head" in name or "embed" in name]}))
    dist.barrier()
    dist.destroy_process_group()


def test_head_and_softmax_are_fp32_and_the_head_stays_tied_under_fsdp(start, runs, tmp_path):
    """Trap 11 under FSDP's mixed precision. Bug: bf16 logits (off by 1e-2), a gradient reduced in
    bf16, a head of its own."""
    done = run_ranks(2, head_under_fsdp, str(start / "model"), str(tmp_path / "report.json"))
    assert all(status == 0 for status, _ in done), done
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["hidden"] == "torch.bfloat16" and report["gap"] < 1e-5
    # reduced in bf16 every one would be rounded
    assert set(report["grads"]) == {"torch.float32"} and report["rounded"] < 0.6
    assert report["heads"] == ["model.embed_tokens.weight"]
    with safe_open(runs[2] / "step_000005/model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]


def sample_under_fsdp(folder: str, dtype: str) -> None:
    parallel.start("cpu", 5)
    rank = parallel.rank()
    model = load_hf(folder, wrap=lambda model: parallel.shard(
        model, "cpu", dtype=dtype, replicas=1, offload=False))
    inputs = torch.arange(5 + rank, 45 + rank).view(2, 20)
    unsharded, addresses = parallel.Unsharded(model, dtype=dtype, device="cpu"), set()
    for _ in range(2):
        with torch.no_grad():
            expected = model(inputs, inputs)[0]
            with unsharded as sampler:
                for _ in range(2 + 3 * rank):  # each rank as many as it likes
                    assert torch.equal(sampler(inputs, inputs)[0], expected)
                assert not any(isinstance(module, FSDPModule) for module in sampler.modules())
                assert {p.dtype for p in sampler.parameters()} == {getattr(torch, dtype)}
                assert not any(block._compiled_call_impl for block in sampler.model.layers)
                addresses.add(tuple(p.data_ptr() for p in sampler.parameters()))
            for p in model.parameters():  # sharded again, and the next sampler has the new weights
                assert isinstance(p, DTensor)
                p.add_(0.1 * torch.ones_like(p))
    assert len(addresses) == 1
    model.compile_blocks()
    with parallel.Unsharded(model, dtype=dtype, device="cpu") as sampler:
        assert all(block._compiled_call_impl for block in sampler.model.layers)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sampler_under_fsdp_is_a_plain_model_of_the_gathered_weights(start, dtype):
    """Guards: FSDP's hooks at every token, weights of the step before (trap 10), memory that moves
    under a captured step, a compiled model that samples uncompiled."""
    done = run_ranks(2, sample_under_fsdp, str(start / "model"), dtype)
    assert [status for status, _ in done] == [0, 0], "\n".join(text for _, text in done)


@torch.no_grad()
def test_the_sampler_of_one_process_in_bf16_follows_the_weights(start, monkeypatch):
    """Guards trap 10: a sampler that keeps the first step's weights; a large one that stays in
    memory while the update needs it."""
    model = load_hf(start / "model", wrap=lambda model: parallel.shard(
        model, "cpu", dtype="bfloat16", replicas=1, offload=False))
    for share in (1 / 8, 0):
        monkeypatch.setattr(parallel, "KEEP_SHARE", share)
        unsharded = parallel.Unsharded(model, dtype="bfloat16", device="cpu")
        for _ in range(2):
            with unsharded as sampler:
                for p, master in zip(sampler.parameters(), model.parameters(), strict=True):
                    assert torch.equal(p, parallel.whole(master).bfloat16())
            assert all(p.is_meta == (share == 0) for p in sampler.parameters())
            for p in model.parameters():
                p.add_(torch.ones_like(p))


def test_one_process_in_fp32_samples_from_the_model_itself(start):
    model = load_hf(start / "model", wrap=lambda model: parallel.shard(
        model, "cpu", dtype="float32", replicas=1, offload=False))
    assert not isinstance(model, FSDPModule)
    with parallel.Unsharded(model, dtype="float32", device="cpu") as sampler:
        assert sampler is model


def test_the_exported_folder_is_whole_and_fp32(runs):
    """Bug: rank 0 saves its own shards."""
    for p in load_hf(runs[3] / "step_000005").parameters():
        assert p.dtype == torch.float32 and torch.isfinite(p).all() and p.abs().sum() > 0


def test_a_batch_without_a_useful_token_changes_nothing(start, tmp_path):
    """Traps 13, 21. SFT imitates constructions alone, and here no group has any. Bug: 0 / 0, or a
    rank that runs no pass."""
    train_on(2, start, tmp_path / "out", "unscored", method="sft", n_pos=3, samples_per_prompt=4,
             max_new_tokens=8,
             max_steps=1)
    row = rows_of(tmp_path / "out")[0]
    for name in ("loss", "grad_norm", "trained_tokens", "skipped"):
        assert row["train/" + name] == 0.0
    before, after = weights_of(start / "model"), weights_of(tmp_path / "out/step_000001")
    assert all(torch.equal(p, after[name]) for name, p in before.items())


def test_balance_deals_every_row_once_and_the_same_number_of_batches(monkeypatch):
    """Trap 21. Guards: ranks with different numbers of forward passes hang under FSDP; rows lost in
    the remainder."""
    lengths = [n + 3 for n in (9, 2, 7, 7, 3, 30, 1)]
    for world in (1, 2, 3, 4, 5, 9):
        monkeypatch.setattr(parallel, "world_size", lambda world=world: world)
        dealt = []
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            dealt.append(balance(lengths, 24))
        assert len({len(batches) for batches in dealt}) == 1
        rows = [i for batches in dealt for batch in batches for i in batch]
        assert sorted(i for i in rows if i < len(lengths)) == list(range(len(lengths)))
        # where the caller puts a filler
        assert set(rows) - set(range(len(lengths))) <= {len(lengths)}
    (filler,), = update.microbatches_of([], 24)[:1]
    assert len(filler.prompt_ids) == len(filler.completion_ids) == len(filler.roles) == 1


# --------------------------------------------------------------------------------------------------
# failing well


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all_and_ends_the_run_in_the_end(
        start, tmp_path):
    """Bug: NaN in weights or moments; ranks that disagree on what to skip; a night of skipped
    updates."""
    done = fail_on(2, start, tmp_path / "out", "nan")
    assert [status for status, _ in done if status != -signal.SIGTERM] == [1]
    assert "error: loss or gradient was not finite in 2 steps in a row" in done[0][1]
    assert f"the last good checkpoint is {tmp_path / 'out/step_000004'}" in done[0][1]
    assert done[0][1].count("WARNING: the update was skipped: loss nan") == 3
    assert [row["train/skipped"] for row in rows_of(tmp_path / "out")] == [0, 1, 0, 1, 1]
    first, second, third = (weights_of(tmp_path / f"out/step_00000{step}") for step in (1, 2, 3))
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    assert all(torch.isfinite(p).all() for p in third.values()) and any(
        not torch.equal(p, second[name]) for name, p in third.items())


def test_sigterm_on_one_rank_ends_all_after_the_step_with_a_checkpoint(start, runs, tmp_path):
    """Preemption. Bugs: the other rank goes on and hangs; the step is lost; status 0, and a script
    goes on to its next phase."""
    done = fail_on(2, start, tmp_path / "out", "sigterm", save_interval=0, async_save=True)
    assert [status for status, _ in done] == [143, 143]
    said = "SIGTERM: stopped after step 3 of 5; --resume=True goes on from "
    assert said + str(tmp_path / "out/step_000003") in done[0][1]
    train_on(2, start, tmp_path / "out", save_interval=0, resume=True)
    assert same_numbers(rows_of(runs[2]), rows_of(tmp_path / "out"))


def test_a_rank_that_hangs_ends_the_job_and_the_message_names_the_knob(start, tmp_path):
    done = fail_on(2, start, tmp_path / "out", "hang", timeout_minutes=0.05)
    last = done[0][1].splitlines()[-1]
    assert done[0][0] == 1 and last.startswith("rank 0 lost another process")
    assert "raise timeout_minutes" in last
    assert "Traceback" not in done[0][1]


@pytest.mark.parametrize("fault, said", [("raise", "RuntimeError: planted on rank 1"),
                                         ("value", "error: method = 'ppo'"),
                                         ("kill", "")])
def test_a_rank_that_fails_ends_the_others_silently(start, tmp_path, fault, said):
    """Bug: the others wait for the time-out, or bury its message under their own tracebacks of lost
    connections."""
    began = time.time()
    done = fail_on(2, start, tmp_path / "out", fault)
    assert time.time() - began < 30 and done[1][0] == (-signal.SIGKILL if fault == "kill" else 1)
    assert said in done[1][1] and ("Traceback" in done[1][1]) == (fault == "raise")
    # torchrun's SIGTERM came first
    assert "Traceback" not in done[0][1] and "lost another process" not in done[0][1]


def test_under_torchrun_the_first_thing_said_is_what_the_failing_rank_says(start, tmp_path):
    """Bug: a screen of gloo's lost connections above the one traceback that matters."""
    began = time.time()
    run = torchrun(start, tmp_path / "out", "raise")
    said = [line for line in run.communicate(timeout=120)[1].splitlines() if line.strip()]
    assert run.returncode == 1 and time.time() - began < 60
    own = said.index("RuntimeError: planted on rank 1")
    assert said[own - 20 if own > 20 else 0:own].count("rank 1:") == 1
    assert not [line for line in said if "gloo" in line.lower()]
    assert not [line for line in said[:own] if "torch.distributed.elastic" in line]


@pytest.mark.parametrize("world, knobs, says", [
    (3, {"prompts_per_step": 5},
     "prompts_per_step = 5 is not divisible by the 3 processes; use a multiple"),
    (1, {"replicas": 2}, "replicas = 2 does not divide the 1 processes"),
    (2, {"replicas": 3},
     "replicas = 3 does not divide the 2 processes; use a divisor, e.g. the number of nodes")])
def test_what_does_not_fit_the_world_is_refused_once_in_one_line(
        start, tmp_path, world, knobs, says):
    done = fail_on(world, start, tmp_path / "out", **knobs)
    lines = [line for _, text in done for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and says in lines[0] and not any("Traceback" in text for _, text in done)


def other_folder(folder: str, shared: str) -> None:
    parallel.start("cpu", 1.0)
    failing.run(lambda: parallel.check_shared(shared, first_step=40 * parallel.rank()))


def test_nodes_that_do_not_share_out_dir_are_refused():
    """Bug: one node resumes at step 40 and the other starts at 0."""
    done = run_ranks(2, other_folder, "", "out/x")
    assert ("error: out_dir = out/x holds checkpoints up to step 40 for some processes and up to 0 "
            "for others") in done[0][1]


if __name__ == "__main__":
    child(json.loads(sys.argv[1]), *sys.argv[2:])
