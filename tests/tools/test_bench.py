"""tools.bench runs and counts what it says. Nothing here is timed: a figure depends on the machine,
its arithmetic does not."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from tools import bench


@pytest.fixture
def small(monkeypatch):
    """A few tokens of the smallest model."""
    knobs = {"rows": 32, "prompt_length": 4, "max_new_tokens": 16, "repeats": 1, "device": "cpu",
             "RESULTS": []}
    for name, value in knobs.items():
        monkeypatch.setattr(bench, name, value)
    return bench.RESULTS


def test_useful_tokens_alone_are_counted_for_both(small, monkeypatch):
    """Guards: padding behind a stop that counts as tokens, for the peer or for us."""
    # a run takes one second
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(bench.Counting, "decode", bench.Decoder.decode)  # looks at no clock
    bench.bench_rollout({"flops": 1e9, "bytes": 1e9})
    fixed, ragged = bench.RESULTS
    assert fixed["value"] == fixed["transformers"] == 32 * 16
    assert 32 < ragged["value"] < 32 * 16 and 32 < ragged["transformers"] < 32 * 16


def test_rows_end_at_caps_of_their_own(small):
    """Guards: a published workload that is not the one that was run."""
    assert sum(bench.nano_vllm_workload(256, 1024)[1]) == 133_966
    prompts, caps = bench.nano_vllm_workload(12, 110)
    groups = bench.generate(
        bench.model_of("tiny"), [[i % 128 for i in prompt] for prompt in prompts], 1, stop_ids=(),
        keys=[(i,) for i in range(12)], max_new_tokens=110, max_rows=5,
        decoder=bench.Counting(caps))
    assert [len(completion.ids) for [completion] in groups] == caps


def test_every_measurement_for_a_gpu_runs_on_a_cpu(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "what", "nano,evaluation,phases,profile")
    monkeypatch.setattr(bench, "out", str(tmp_path / "bench.json"))
    bench.main()
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert len(results) == 5 and all(r["value"] > 0 for r in results)
    assert all(0 < r["captures"] < 20 for r in results if "captures" in r)


def test_every_figure_is_written_with_the_machine_it_was_measured_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "what", "limits,update,grading")
    monkeypatch.setattr(bench, "out", str(tmp_path / "bench.json"))
    bench.main()
    written = json.loads((tmp_path / "bench.json").read_text())
    names = [r["name"].split(":")[0].split(" ")[0] for r in written["results"]]
    assert names == ["limit", "limit", "update", "grading", "grading", "grading"]
    assert written["torch"] == torch.__version__ and written["config"]["rows"] == 32
    assert all(r["value"] > 0 for r in written["results"])


def growth() -> int:
    before = bench.peak_memory()
    torch.ones(2**28)  # 1 GiB
    return bench.peak_memory() - before


def test_the_peak_of_a_child_is_its_own(small):
    """Bug: ru_maxrss survives fork and exec, so that after a large measurement a small one seemed
    to need next to nothing."""
    assert bench.in_child(growth) > 2**29  # of a process that nothing grew before
    torch.ones(2**28)
    assert bench.in_child(bench.peak_memory) < bench.peak_memory() - 2**28


def test_an_unknown_measurement_is_refused(small, monkeypatch):
    monkeypatch.setattr(bench, "what", "rollouts")
    with pytest.raises(ValueError, match="what = 'rollouts' is unknown; use limits, rollout"):
        bench.main()
