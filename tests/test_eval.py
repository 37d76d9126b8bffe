"""Statistics against brute force, and eval.py end to end on a tiny model or with scripted
completions."""
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import toy
from configurator import configure
from data import Problem, load_problems, save_problems
from hf import save_hf
from model import CausalLM, ModelConfig
from rollout import Completion

# --- statistics

def test_pass_at_k_equals_the_average_over_all_subsets():
    for n, c, k in ((6, 2, 3), (5, 0, 2), (5, 5, 5), (7, 1, 1), (7, 6, 2), (4, 3, 4)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(np.mean([max(s) for s in subsets]))


def test_pass_at_k_beyond_the_samples_is_refused():
    for k in (0, 6):
        with pytest.raises(ValueError,
                           match=rf"pass@{k} cannot be estimated from 5 samples.*raise samples or "
                                 rf"lower k"):
            evaluation.pass_at_k(5, 3, k)


def test_the_bootstrap_matches_all_possible_resamples():
    values, weights = np.array([0.0, 0.2, 0.5, 1.0, 0.9]), np.array([1.0, 2.0, 1.0, 2.0, 1.0])
    every = [list(i) for i in itertools.product(range(5), repeat=5)]
    for w in (None, weights):
        exact = np.percentile([values[i].sum() / (np.ones(5) if w is None else w)[i].sum()
                               for i in every], (2.5, 97.5))
        assert evaluation.bootstrap_interval(values, w, draws=20_000) == pytest.approx(
            tuple(exact), abs=0.015)
    assert evaluation.bootstrap_interval(values) == evaluation.bootstrap_interval(values)
    assert evaluation.bootstrap_interval([1, 1, 1]) == (1, 1)
    # resamples without weight are left out, not NaN
    low, high = evaluation.bootstrap_interval([1, 0, 0], [2, 0, 0])
    assert low == high == 0.5


def test_dsr_and_err_count_only_problems_of_mixed_outcome():
    #            mixed                       all right, all wrong: both left out
    correct = [[1, 1, 1, 0, 0, 0], [1] * 6, [0] * 6]
    reflects = [[0, 1, 1, 1, 1, 0], [1] * 6, [1] * 6]
    result = evaluation.dsr_err(correct, reflects)
    assert result["mixed_problems"] == 1
    assert result["DSR"] == pytest.approx(1 / 3)  # of three right responses one never reflects
    assert result["ERR"] == pytest.approx(2 / 4)  # of four that reflect, two end right
    nothing = evaluation.dsr_err([[1, 1], [0, 0]], [[1, 1], [0, 1]])
    assert nothing["DSR"] is None and nothing["ERR"] is None and nothing["ERR_interval"] is None
    silent = evaluation.dsr_err([[1, 0]], [[0, 0]])
    assert silent["DSR"] == 1 and silent["ERR"] is None


def row(grade, reflects=False, tokens=10):
    return {"grade": grade, "reflects": reflects, "tokens": tokens}


def test_a_summary_keeps_every_way_to_fail_apart_and_scores_per_level():
    rows = {"a": [row("correct"), row("correct", True), row("wrong"), row("truncated")],
            "b": [row("no_answer"), row("timeout"), row("error"), row("unparsable", tokens=50)]}
    s = evaluation.summarise(rows, {"a": "easy", "b": "hard"}, (1, 2))
    assert s["pass@k"]["1"]["value"] == pytest.approx(0.25)
    assert s["pass@k"]["2"]["value"] == pytest.approx(5 / 12)
    assert s["pass@k"]["1"]["low"] <= 0.25 <= s["pass@k"]["1"]["high"]
    assert (s["truncated"], s["no_answer"], s["unparsable"], s["timeout"]) == (
        1 / 8, 1 / 8, 1 / 8, 2 / 8)
    assert s["length"] == 15 and s["reflect_rate"] == 1 / 8 and s["DSR"] == 0.5 and s["ERR"] == 1
    assert s["levels"]["easy"]["pass@k"]["1"]["value"] == 0.5
    assert s["levels"]["hard"]["pass@k"]["1"]["value"] == 0
    assert s["levels"]["easy"]["truncated"] == 0.25 and s["levels"]["hard"]["problems"] == 1
    assert s["per_problem"][0] == {"uid": "a", "level": "easy", "n": 4, "c": 2, "truncated": 1}
    assert evaluation.summarise(rows, {"a": "", "b": ""}, (1,))["levels"] == {}


# --- the script

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random toy-sized checkpoint."""
    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    config = ModelConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=8,
                         max_position_embeddings=64,
                         eos_token_id=tokenizer.eos_token_id)
    path = tmp_path_factory.mktemp("model")
    save_hf(CausalLM(config), tokenizer, path)
    save_problems(toy.make_problems("findx", "test", 20), path / "findx_test.jsonl")
    return str(path)


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """run(**knobs) runs the script with these knobs and returns OUT.json."""
    defaults = {"init_from": folder, "problems": f"{folder}/findx_test.jsonl", "n_problems": 6,
                "instruction": "", "samples": 4, "max_rows": 8, "temperatures": (1.0,),
                "top_ps": (1.0,), "max_new_tokens": 12,
                "device": "cpu", "out": str(tmp_path / "e")}

    def call(**knobs):
        for key, value in (defaults | knobs).items():
            assert hasattr(evaluation, key)
            monkeypatch.setattr(evaluation, key, value)
        evaluation.main()
        return json.loads(Path(evaluation.out + ".json").read_text())
    return call


def script(monkeypatch, answers):
    """Replace the sampler: answers maps a prompt's text to the list of its completions' texts
    (cycled)."""
    tokenizer, calls = toy.make_tokenizer(), []

    def generate(model, prompts, n, *, keys, **knobs):
        calls.append({"n": n, "keys": keys, "prompts": len(prompts)} | knobs)
        groups = []
        for prompt in prompts:
            question = tokenizer.decode(prompt).replace("<|user|>", "").replace("<|assistant|>", "")
            texts = itertools.islice(itertools.cycle(answers[question]), n)
            groups.append([Completion(tokenizer(t.removesuffix("...")).input_ids
                                      + ([] if t.endswith("...") else [0]), [],
                                      not t.endswith("...")) for t in texts])
        return groups
    monkeypatch.setattr(evaluation, "generate", generate)
    return calls


def write_problems(path, answers=("1", "2", "3"), levels=("", "", "")):
    pairs = enumerate(zip(answers, levels, strict=True))
    save_problems([Problem(f"p{i}", f"{i}+0=?", answer, level) for i, (answer, level) in pairs],
                  path)
    return str(path)


RIGHT, WRONG = r"Answer: \boxed{1}", r"Answer: \boxed{9}"


def test_a_checkpoint_that_cannot_be_had_is_one_line_with_a_way_out(run, tmp_path):
    for name in ("org/model", tmp_path / "nowhere"):  # the suite runs without a network
        with pytest.raises(ValueError, match=f"no tokenizer at {name}: .*pass its folder") as e:
            run(init_from=str(name))
        assert "\n" not in str(e.value)


def test_a_run_on_a_real_model_samples_grades_and_saves_everything(run, tmp_path, capsys):
    result = run(temperatures=(1.0, 0.6), top_ps=(1.0, 0.9), pass_k=(1, 4))
    assert [(s["temperature"], s["top_p"], s["set"]) for s in result["settings"]] == [
        (1.0, 1.0, "findx_test"), (0.6, 0.9, "findx_test")]
    assert all(len(s["per_problem"]) == 6 and s["per_problem"][0]["n"] == 4
               for s in result["settings"])
    assert result["config"]["samples"] == 4 and result["settings"][0]["max_new_tokens"] == 12
    rows = [json.loads(line)
            for line in (tmp_path / "e.samples.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 2 * 6 * 4 and len({evaluation.sample_key(r) for r in rows}) == 48
    assert {"text", "grade", "answer", "tokens", "uid", "sample"} <= set(rows[0])
    assert "pass@1" in capsys.readouterr().out


def test_truncated_responses_are_wrong_even_when_their_box_is_right(run, tmp_path, monkeypatch):
    script(monkeypatch, {"0+0=?": [RIGHT, RIGHT + "...", WRONG, "1"], "1+0=?": [RIGHT],
                         "2+0=?": [WRONG]})
    path = write_problems(tmp_path / "set.jsonl", answers=("1", "1", "1"), levels=("a", "a", "b"))
    s = run(n_problems=0, problems=path, pass_k=(1, 2))["settings"][0]
    assert {p["uid"]: p["c"] for p in s["per_problem"]} == {"p0": 1, "p1": 4, "p2": 0}
    assert s["pass@k"]["1"]["value"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert s["pass@k"]["2"]["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert s["truncated"] == 1 / 12 and s["no_answer"] == 1 / 12 and s["set"] == "set"
    assert s["levels"]["a"]["pass@k"]["1"]["value"] == 0.625


def test_a_killed_run_continues_to_the_same_result(run, tmp_path, monkeypatch):
    knobs = {"temperatures": (1.0, 0.6), "top_ps": (1.0, 0.9), "max_rows": 2}
    whole = run(**knobs, out=str(tmp_path / "whole"))
    genuine, calls = evaluation.generate, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args, **kwargs)
    monkeypatch.setattr(evaluation, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(**knobs)
    with open(tmp_path / "e.samples.jsonl", "a") as file:
        file.write('{"uid": "torn by the ki')
    monkeypatch.setattr(evaluation, "generate", genuine)
    continued = run(**knobs)
    assert continued["settings"] == whole["settings"]
    lines = [(tmp_path / f"{name}.samples.jsonl").read_text().splitlines()
             for name in ("e", "whole")]
    assert lines[0] == lines[1]  # same noise, same samples, in the same order; nothing twice
    monkeypatch.setattr(evaluation, "generate", None)  # a third run has nothing left to sample
    assert run(**knobs)["settings"] == whole["settings"]


def test_stored_samples_are_used_only_where_they_answer_the_same_problem(
        run, tmp_path, monkeypatch):
    calls = script(monkeypatch, {f"{i}+0=?": [RIGHT] for i in range(3)})
    path, knobs = tmp_path / "set.jsonl", {"n_problems": 0, "max_rows": 1}
    run(problems=write_problems(path), **knobs)
    assert len(calls) == 3
    run(problems=write_problems(path, answers=("1", "5", "3")), **knobs)
    assert len(calls) == 4  # one gold answer changed
    assert run(problems=str(path), **knobs, samples=2)["settings"][0]["per_problem"][0]["n"] == 2
    assert len(calls) == 4  # fewer samples: a part of the stored ones
    run(problems=str(path), **knobs, samples=6)
    assert len(calls) == 7
    with pytest.raises(ValueError,
                       match=r"made otherwise \(seed: 0 -> 1\); choose another --out, or "
                             r"--resume=False"):
        run(problems=str(path), **knobs, seed=1)
    run(problems=str(path), **knobs, seed=1, resume=False)
    assert len(calls) == 10


def test_samples_of_another_checkpoint_are_refused(run, folder, tmp_path):
    run()
    other, torn = tmp_path / "other", Path(folder) / "model.safetensors"
    other.mkdir()
    for file in Path(folder).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    run(init_from=str(other))  # a copy is the same model
    content = bytearray(torn.read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="made otherwise .weights: "):
        run(init_from=str(other))


def test_noise_depends_on_the_problem_and_not_on_its_company(run, tmp_path, monkeypatch):
    calls = script(monkeypatch, {f"{i}+0=?": [RIGHT] for i in range(3)})
    knobs = {"problems": write_problems(tmp_path / "set.jsonl")}
    run(**knobs, n_problems=0)
    save_problems([Problem("p2", "2+0=?", "3")], tmp_path / "last.jsonl")
    run(problems=str(tmp_path / "last.jsonl"), resume=False, temperatures=(0.6,), top_ps=(0.9,))
    keys = [key for call in calls for key in call["keys"]]
    assert len(set(keys[:3])) == 3 and keys[3:] == [keys[2]]
    assert (calls[-1]["temperature"], calls[-1]["top_p"], calls[-1]["max_new_tokens"]) == (
        0.6, 0.9, 12)


@pytest.mark.parametrize("knobs, words", [
    ({"init_from": ""}, "init_from is not set"),
    ({"problems": ""}, "problems is not set"),
    ({"pass_k": (1, 5)}, r"every k must be in 1..samples = 4"),
    ({"pass_k": (0,)}, r"every k must be in 1..samples = 4"),
    ({"pass_k": ()}, r"every k must be in 1..samples = 4"),
    ({"top_ps": (1.0, 0.9)}, "form pairs"),
    ({"judge_url": "http://x"}, "set both or neither"),
    ({"filter_out": "x", "filter_low": 0.9, "filter_high": 0.1}, "0 <= low <= high <= 1"),
    ({"max_rows": -1}, "max_rows = -1 must be at least 0"),
    ({"device": "tpu"}, "device = 'tpu' must be one of 'auto', 'cpu', 'cuda'"),
    ({"dtype": "float16"}, "dtype = 'float16' must be one of"),
    ({"max_new_tokens": 60}, r"problem '.*': a prompt of .* do not fit the model's context of 64"),
    ({"instruction": "\nThink!"}, "has no token for"),
])
def test_bad_knobs_end_with_one_line_before_anything_is_sampled(run, monkeypatch, knobs, words):
    monkeypatch.setattr(evaluation, "generate", None)
    with pytest.raises(ValueError, match=words) as e:
        run(**knobs)
    assert "\n" not in str(e.value)


def test_problem_files_that_collide_are_refused(run, tmp_path):
    (tmp_path / "b").mkdir()
    one = write_problems(tmp_path / "one.jsonl")
    for other, words in ((write_problems(tmp_path / "two.jsonl"), "uid 'p0' is in one and in two"),
                         (write_problems(tmp_path / "b" / "one.jsonl"),
                          "two problem files are called one")):
        with pytest.raises(ValueError, match=words):
            run(problems=f"{one},{other}")


def test_several_problem_files_are_scored_apart(run, tmp_path, monkeypatch):
    script(monkeypatch, {"0+0=?": [RIGHT], "1+0=?": [WRONG], "7-6=?": [RIGHT, WRONG]})
    save_problems([Problem("q", "7-6=?", "1")], tmp_path / "two.jsonl")
    one = write_problems(tmp_path / "one.jsonl", ("1", "1"), ("", ""))
    s = run(problems=f"{one},{tmp_path}/two.jsonl", n_problems=0)["settings"]
    assert [(x["set"], len(x["per_problem"]), x["pass@k"]["1"]["value"]) for x in s] == [
        ("one", 2, 0.5), ("two", 1, 0.5)]


def test_the_difficulty_filter_keeps_the_bounds_and_writes_accuracies(
        run, tmp_path, monkeypatch, capsys):
    shares = {0: 0, 1: 1, 2: 4, 3: 7, 4: 8}  # right ones of 8
    script(monkeypatch, {f"{i}+0=?": [RIGHT] * c + [WRONG] * (8 - c) for i, c in shares.items()})
    path = write_problems(tmp_path / "set.jsonl", ["1"] * 5, ["L"] * 5)
    run(n_problems=0, problems=path, samples=8, filter_out=str(tmp_path / "kept.jsonl"))
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [(r["uid"], r["accuracy"]) for r in kept] == [("p1", 0.125), ("p2", 0.5), ("p3", 0.875)]
    assert [p.uid for p in load_problems(tmp_path / "kept.jsonl")] == ["p1", "p2", "p3"]
    assert kept[0]["level"] == "L"
    assert "3 of 5 problems; 1 were too hard, 1 too easy" in capsys.readouterr().out
    with pytest.raises(ValueError,
                       match="no problem's accuracy is within.*the mean is 0.50; take harder"):
        run(n_problems=0, problems=path, samples=8, filter_out=str(tmp_path / "k.jsonl"),
            filter_low=0.6,
            filter_high=0.7)


def test_an_untrained_model_filters_to_a_line_that_says_so_and_its_samples_stay(run, tmp_path):
    with pytest.raises(ValueError,
                       match="this run cannot learn: .* the mean is 0.00; take a stronger model or "
                             "easier") as e:
        run(filter_out=str(tmp_path / "kept.jsonl"))
    assert "\n" not in str(e.value) and not (tmp_path / "kept.jsonl").exists()
    assert json.loads((tmp_path / "e.json").read_text())["settings"][0]["pass@k"]["1"]["value"] == 0
    assert len((tmp_path / "e.samples.jsonl").read_text().splitlines()) == 1 + 6 * 4


# --- judge

class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible stub: `replies` by a word of the response; fails by `death` after
    `limit` requests."""
    seen, replies, limit, death = [], {}, 10 ** 9, None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.seen.append((self.path, self.headers["Authorization"], body))
        if len(Judge.seen) > Judge.limit:
            return Judge.death(self)
        said = body["messages"][0]["content"].split("# Response")[1]
        text = next(reply for word, reply in Judge.replies.items() if word in said)
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def error(self):
        self.send_error(500)

    def cut_off(self):
        self.send_response(200)
        self.send_header("Content-Length", "99")
        self.end_headers()
        self.wfile.write(b'{"choices": [')

    def no_chat(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"error": "overloaded"}')

    def log_message(self, *args):
        pass


@pytest.fixture
def judge(monkeypatch):
    Judge.seen, Judge.limit = [], 10 ** 9
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "k3y")
    yield {"judge_url": f"http://127.0.0.1:{server.server_port}/v1/", "judge_model": "m"}
    server.shutdown()
    server.server_close()


def judged_run(run, tmp_path, monkeypatch, **knobs):
    """Two mixed problems whose responses reflect, and one that is always right and not worth asking
    about."""
    wait = "Try 1: 0+0=9, Wait, {} is 1, not 9. "
    script(monkeypatch, {"0+0=?": [wait.format(7) + RIGHT, wait.format(8) + RIGHT, wait.format(7)
                                   + WRONG, RIGHT],
                         "1+0=?": [wait.format(6) + RIGHT, WRONG],
                         "2+0=?": [wait.format(7) + RIGHT]})
    path = write_problems(tmp_path / "set.jsonl", ("1", "1", "1"))
    return run(n_problems=0, problems=path, **knobs)["settings"][0]


def test_a_judge_decides_which_reflections_are_real(run, tmp_path, monkeypatch, judge):
    Judge.replies = {"Wait, 7": "First LOCATED: no DIAGNOSED: no?\nBut {no}.\nLOCATED: yes "
                                "DIAGNOSED: yes",
                     "Wait, 8": "**LOCATED:** Yes, **DIAGNOSED:** no", "Wait, 6": "no idea"}
    s = judged_run(run, tmp_path, monkeypatch, **judge)
    assert s["ERR"] == pytest.approx(4 / 5) and s["to_judge"] == 5
    # 7 right, 8 undiagnosed, 7 ends wrong; 6: none
    assert s["judged"] == 3 and s["ERR_judge"] == pytest.approx(1 / 3)
    path, key, body = Judge.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer k3y" and body["model"] == "m"
    assert len(Judge.seen) == 5
    assert judged_run(run, tmp_path, monkeypatch, **judge)["ERR_judge"] == s["ERR_judge"]
    assert len(Judge.seen) == 5  # verdicts are read back


@pytest.mark.parametrize("death", (Judge.error, Judge.cut_off, Judge.no_chat))
def test_a_judge_that_dies_loses_no_sample_and_is_asked_again(
        run, tmp_path, monkeypatch, judge, capsys, death):
    Judge.replies, Judge.limit, Judge.death = {"Wait": "LOCATED: yes DIAGNOSED: yes"}, 2, death
    s = judged_run(run, tmp_path, monkeypatch, **judge)
    assert "WARNING: the judge at" in capsys.readouterr().out
    assert s["ERR"] == pytest.approx(4 / 5) and s["judged"] <= 2
    assert len((tmp_path / "e.samples.jsonl").read_text().splitlines()) == 13
    Judge.limit, before = 10 ** 9, len(Judge.seen)
    again = judged_run(run, tmp_path, monkeypatch, **judge)
    assert again["judged"] == 5 and again["ERR_judge"] == pytest.approx(4 / 5)
    assert len(Judge.seen) == before + 5 - s["judged"]


def test_an_absent_judge_is_a_warning(run, tmp_path, monkeypatch, capsys):
    s = judged_run(run, tmp_path, monkeypatch, judge_url="http://127.0.0.1:9/v1", judge_model="m")
    assert s["judged"] == 0 and s["ERR_judge"] is None and s["ERR"] == pytest.approx(4 / 5)
    assert "WARNING: the judge at" in capsys.readouterr().out


def test_tables_are_aligned_and_show_levels_and_missing_values():
    rows = {"a": [row("correct"), row("wrong")], "b": [row("truncated"), row("wrong")]}
    s = evaluation.summarise(rows, {"a": "1", "b": "2"}, (1, 2))
    s |= {"set": "s", "temperature": 0.6, "top_p": 0.9, "samples": 2}
    problems = [line.split() for line in evaluation.problems_table([s]).splitlines()]
    assert problems[1:] == [["a", "1", "s", "0.6", "0.9", "1", "2", "0"],
                            ["b", "2", "s", "0.6", "0.9", "0", "2", "1"]]
    lines = evaluation.results_table([s]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "25.0 [0.0, 50.0]" in lines[1] and lines[2].startswith("  level 1")
    assert lines[1].rstrip().endswith("-")


@pytest.mark.parametrize("name", ["eval_toy", "eval_aime", "filter_deepscaler"])
def test_the_shipped_configs_are_valid(name):
    c = SimpleNamespace(**configure(dict(vars(evaluation)), [f"config/{name}.py", "--init_from=x"]))
    evaluation.check_config(c)
