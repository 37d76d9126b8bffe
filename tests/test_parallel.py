"""Several processes against one: the same run, whatever the world size. Real torchrun, real FSDP2, gloo on a CPU.

The child (this file as a script) is train.py with test_train's author for a sampler, who solves only every second query:
with two ranks all reflections are born on one of them.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401  (as a script this file has no pytest to load it)
import pytest
import torch

from model import load_hf
from parallel import balance
from rollout import FILLER, PREFIX, Rollout
from test_train import KNOBS, author, rollouts_of, run, same_numbers, start, weights_of  # noqa: F401  (start is a fixture)

SIX = KNOBS | {"prompts_per_step": 6, "max_steps": 3, "save_interval": 1, "keep_last": 9, "ref_advantage": "reward",
               "tokens_per_microbatch": 160}


def child(folder: str, out: str, knobs: str) -> None:
    patch = pytest.MonkeyPatch()
    author(patch, solved=lambda query: query % 2 == 0)
    run(Path(folder), Path(out), patch, **(SIX | json.loads(knobs)))


def launch(processes: int, folder: Path, out: Path, **knobs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__,
               str(folder), str(out), json.dumps(knobs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"})


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_and_two(start, tmp_path_factory):  # noqa: F811
    """The same three steps with one process and with two."""
    outs = {}
    for processes in (1, 2):
        outs[processes] = tmp_path_factory.mktemp("runs") / str(processes)
        done = launch(processes, start, outs[processes])
        assert done.returncode == 0, done.stderr[-3000:]
    return outs


def test_two_processes_train_what_one_trains(one_and_two):
    """Traps 12, 21; FSDP. Bugs: a denominator per rank, averaged means, queries or noise dealt twice, a rank without
    reflections that runs fewer passes and hangs the others."""
    one, two = one_and_two[1], one_and_two[2]
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith("time/"):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
        assert a["reflect/kept"] == 6 and a["rollout/pass1"] == pytest.approx(3 / 24)
    ours, theirs = weights_of(one / "step_000003"), weights_of(two / "step_000003")
    assert max((p - theirs[name]).abs().max().item() for name, p in ours.items()) < 1e-4


def test_every_rollout_of_every_rank_is_on_disk_once_in_one_order(one_and_two):
    """Bug: two ranks writing one file, or a file that depends on the number of ranks."""
    one, two = rollouts_of(one_and_two[1], 2), rollouts_of(one_and_two[2], 2)
    assert [(r["uid"], r["query"], r["completion_ids"], r["group"], r["reward"]) for r in one] == [
        (r["uid"], r["query"], r["completion_ids"], r["group"], r["reward"]) for r in two]
    assert all(r["ots_weights"] for r in two if r["is_reflection"])


def test_saved_by_two_resumed_by_one_and_the_other_way_round(start, one_and_two, tmp_path):  # noqa: F811
    """Trap 22. Bug: moments or weights that only the same number of processes can read."""
    whole = rows_of(one_and_two[1])
    for before, after in ((2, 1), (1, 2)):
        out = tmp_path / f"{before}_{after}"
        subprocess.run(["cp", "-r", str(one_and_two[before]), str(out)], check=True)
        subprocess.run(["rm", "-r", *map(str, (out / "step_000002", out / "step_000003"))], check=True)
        done = launch(after, start, out, resume=True)
        assert done.returncode == 0, done.stderr[-3000:]
        for a, b in zip(whole, rows_of(out), strict=True):
            assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-5)
            assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-4)


def test_the_exported_folder_is_whole_and_fp32(one_and_two):
    """Bug: rank 0 saves its own shards."""
    for p in load_hf(one_and_two[2] / "step_000003").parameters():
        assert p.dtype == torch.float32 and torch.isfinite(p).all() and p.abs().sum() > 0


def test_a_world_that_does_not_divide_the_queries_is_refused(start, tmp_path):  # noqa: F811
    done = launch(2, start, tmp_path / "out", prompts_per_step=5)
    assert done.returncode != 0
    assert "prompts_per_step = 5 is not divisible by the 2 processes; use a multiple" in done.stderr


def test_balance_deals_every_row_once_and_the_same_number_of_batches():
    rollouts = [Rollout(str(i), str(i), [1] * 3, [2] * n, [PREFIX] * n, True, "") for i, n in enumerate((9, 2, 7, 7, 3, 30, 1))]
    for world in (1, 2, 3, 4, 9):
        dealt = [balance(rollouts, 24, rank, world) for rank in range(world)]
        assert len({len(batches) for batches in dealt}) == 1
        rows = [i for batches in dealt for index in batches for i in index]
        assert sorted(i for i in rows if i < len(rollouts)) == list(range(len(rollouts)))
        assert set(rows) - set(range(len(rollouts))) <= {len(rollouts)}  # where the caller puts FILLER
    assert len(FILLER.prompt_ids) == len(FILLER.completion_ids) == len(FILLER.roles) == 1


if __name__ == "__main__":
    child(*sys.argv[1:])
