"""tools.plan against measured bytes: a formula that drifts from model.py or rollout.py by more than
a few per cent fails here."""
import importlib
import json
import re
import shlex
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memory
import model as model_file
import parallel
import rollout
from configurator import configure
from model import CausalLM, ModelConfig, num_params
from tools import plan

ROOT = Path(__file__).resolve().parents[2]
# The numbers of Qwen's own config.json files that a plan needs.
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960}
QWEN_8B = QWEN | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                  "num_attention_heads": 32}
QWEN_06B = QWEN | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True}
SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SHAPES = {
    "gqa, tied": SMALL, "no gqa, untied": SMALL |
    dict(num_key_value_heads=4, hidden_size=96, head_dim=32, tie_word_embeddings=False),
    "qwen2, wide groups": SMALL | dict(model_type="qwen2", num_attention_heads=8,
                                       num_key_value_heads=1), "large vocabulary": SMALL |
    dict(vocab_size=4096, num_hidden_layers=2)}
B, T = 2, 128


def small_plan(config, dtype="float32", **other):
    sizes = dict(max_rows=8, longest_prompt=8, max_new_tokens=8, tokens_per_microbatch=B * T,
                 dtype=dtype, device="cpu")
    return plan.memory_plan(config, **sizes | other)


def wrapped(config, dtype):
    """A model as train.py wraps it for one process."""
    return parallel.shard(CausalLM(config), "cpu", dtype=dtype, replicas=1, offload=False)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, and the most there ever were: a CPU's max_memory_allocated."""

    def __init__(self, *tensors):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()
        for tensor in tensors:
            self.count(tensor)

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            weakref.finalize(storage, self.forget, key, size)
        self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


# --------------------------------------------------------------------------------------------------
# part by part


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_gradients_and_moments_are_exact(shape):
    model = CausalLM(ModelConfig(**SHAPES[shape]))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, ids)[0].sum().backward()
    optimizer.step()
    p = small_plan(model.config)
    assert p["weights"] == p["reference"] == sum(w.nbytes for w in model.parameters())
    assert p["gradients"] == sum(w.grad.nbytes for w in model.parameters())
    assert p["moments"] == sum(x.nbytes for state in optimizer.state.values()
                               for x in state.values())
    assert small_plan(model.config, reference_model=False)["reference"] == 0


def kept_for_backward(model):
    """Bytes of unique storages that a forward pass saves; left out: parameters, and RoPE's two
    tables, which all rows share."""
    parameters = {w.untyped_storage()._cdata for w in model.parameters()}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and tensor.shape[:2] != (1, 1):
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(B, T, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, ids.clone())
    return sum(sizes.values())


class FusedRMSNorm(torch.autograd.Function):
    """Stands in for a GPU's kernel, which saves its input and 1 / rms."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, torch.ones(x.shape[:-1]), weight)
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype) * weight


def fused_rms_norm(x, shape, weight, eps):
    return FusedRMSNorm.apply(x, weight.detach(), eps)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_saves(shape, dtype, device, monkeypatch):
    config = ModelConfig(**SHAPES[shape])
    model = CausalLM(config).to(getattr(torch, dtype))  # as inside a unit of FSDP
    if device == "cuda":
        monkeypatch.setattr(F, "rms_norm", fused_rms_norm)
    for checkpointing in (False, True):
        model.checkpoint_activations = checkpointing
        measured = kept_for_backward(model)
        p = small_plan(config, dtype, checkpoint_activations=checkpointing, device=device)
        assert p["activations"] == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_cache_is_exact(dtype, monkeypatch):
    caches = []
    monkeypatch.setattr(rollout, "KVCache", lambda *a,
                        **k: caches.append(model_file.KVCache(*a, **k)) or caches[-1])
    config = ModelConfig(**SMALL)
    rollout.generate(CausalLM(config).to(getattr(torch, dtype)), [[1] * 30, [2] * 50], 4,
                     max_new_tokens=16, stop_ids=(-1,), keys=[(0,), (1,)])
    measured = sum(memory.nbytes for memory in caches[0].memory)
    p = small_plan(config, dtype, longest_prompt=50, max_new_tokens=16, samples_per_prompt=4)
    assert p["rollouts: KV cache"] == measured == plan.cache_bytes(config, 8, 96, dtype)


# --------------------------------------------------------------------------------------------------
# the peaks


@pytest.mark.parametrize("shape,dtype,checkpointing,chunk", [
    ("gqa, tied", "float32", False, 2**24), ("gqa, tied", "bfloat16", True, 2**24),
    ("no gqa, untied", "bfloat16", False, 2**24), ("qwen2, wide groups", "float32", True, 2**24),
    ("large vocabulary", "float32", False, 2**24), ("large vocabulary", "bfloat16", False, 2**16),
    ("large vocabulary", "float32", True, 2**16)])
def test_an_update_peaks_where_planned(shape, dtype, checkpointing, chunk, monkeypatch):
    monkeypatch.setitem(model_file.LOGITS_PER_CHUNK, "cpu", chunk)
    config = ModelConfig(**SHAPES[shape])
    model = wrapped(config, dtype)
    reference = CausalLM(config).to(getattr(torch, dtype)).requires_grad_(False)
    model.checkpoint_activations = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with LiveBytes(*model.parameters(), *reference.parameters()) as live:
        # the moments exist from the second step on, the gradients from the second micro-batch on
        for width in (2, T, T):
            ids = torch.zeros(B, width, dtype=torch.long)
            logprobs, _ = model(ids, ids)
            with torch.no_grad():
                ref_logprobs, _ = reference(ids, ids)
            (logprobs - ref_logprobs).sum().backward()
            if width == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    p = small_plan(config, dtype, checkpoint_activations=checkpointing)
    assert p["persistent"] + p["update"] == pytest.approx(live.peak, rel=0.08)


def test_an_update_of_few_tokens_peaks_in_the_reduction_of_the_roots_gradient():
    config = ModelConfig(**SHAPES["large vocabulary"])
    model, ids = wrapped(config, "bfloat16"), torch.zeros(1, 4, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with LiveBytes(*model.parameters()) as live:
        for step in range(3):
            model(ids, ids)[0].sum().backward()
            if step == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    p = small_plan(config, "bfloat16", tokens_per_microbatch=4, longest_prompt=2, max_new_tokens=2,
                   reference_model=False)
    assert p["persistent"] + p["update"] == pytest.approx(live.peak, rel=0.04)


@pytest.mark.parametrize("dtype,chunk", [("float32", 2**18), ("bfloat16", 2**24)])
def test_a_full_divergence_peaks_where_planned(dtype, chunk, monkeypatch):
    """OPSD's head holds ten tensors of a chunk's logits, not three."""
    monkeypatch.setitem(model_file.LOGITS_PER_CHUNK, "cpu", chunk)
    config = ModelConfig(**SHAPES["large vocabulary"])
    model = wrapped(config, dtype)
    reference = CausalLM(config).to(getattr(torch, dtype)).requires_grad_(False)
    ids = torch.zeros(B, T, dtype=torch.long)
    with LiveBytes(*model.parameters(), *reference.parameters()) as live:
        for _ in range(2):
            with torch.no_grad():
                hidden = reference(ids)
            divergence = model(ids, ids,
                               teacher=(hidden, reference.head_weight.detach(), 0.5, 0.0))[2]
            divergence.sum().backward()
    p = small_plan(config, dtype, full_divergence=True)
    assert p["persistent"] - p["moments"] + p["update"] == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("rows,n,prompt,new,dtype",
                         [(8, 1, 150, 8, "float32"), (8, 1, 150, 8, "bfloat16"),
                          (16, 4, 20, 50, "float32"), (16, 4, 20, 50, "bfloat16")])
def test_sampling_peaks_where_planned(rows, n, prompt, new, dtype):
    """Eight long prompts peak in their prefill, sixteen rows of short ones while decoding."""
    config = ModelConfig(**SMALL)
    model = wrapped(config, dtype)
    with parallel.Unsharded(model, dtype=dtype, device="cpu") as sampler, \
            LiveBytes(*{*sampler.parameters(), *model.parameters()}) as live:
        rollout.generate(sampler, [[1 + i] * prompt for i in range(rows // n)], n,
                         max_new_tokens=new, stop_ids=(-1,), keys=[(i,) for i in range(rows // n)])
    p = small_plan(config, dtype, max_rows=rows, samples_per_prompt=n, longest_prompt=prompt,
                   max_new_tokens=new, reference_model=False)
    assert p["weights"] + p["sampling"] == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("prompt,new", [(50, 70), (20, 120)])
def test_rows_that_wait_do_not_raise_the_peak(prompt, new, monkeypatch):
    """Guards: two caches at once where newcomers join, columns kept that no row uses any more."""
    monkeypatch.setattr(rollout, "COLUMNS", 8), monkeypatch.setattr(plan, "COLUMNS", 8)
    config = ModelConfig(**SMALL)
    model = CausalLM(config)
    with LiveBytes(*model.parameters()) as live:
        groups = rollout.generate(model, [[1] * prompt] * 16, 4, max_new_tokens=new,
                                  stop_ids=tuple(range(2, 6)), max_rows=16,
                                  keys=[(i,) for i in range(16)])
    assert len({len(c.ids) for group in groups for c in group}) > 10
    p = small_plan(config, "float32", max_rows=16, samples_per_prompt=4, longest_prompt=prompt,
                   max_new_tokens=new)
    assert live.peak < 1.1 * (p["weights"] + p["sampling"])


@pytest.mark.parametrize("rows,n,prompt,new,dtype",
                         [(8, 1, 150, 8, "float32"), (16, 4, 20, 50, "float32"),
                          (16, 4, 20, 50, "bfloat16")])
def test_an_evaluation_peaks_where_planned(rows, n, prompt, new, dtype):
    """Its weights are in `dtype`, without masters, and it samples with top-p."""
    config = ModelConfig(**SMALL)
    model = CausalLM(config).to(getattr(torch, dtype))
    with LiveBytes(*model.parameters()) as live:
        rollout.generate(model, [[1 + i] * prompt for i in range(rows // n)], n, max_new_tokens=new,
                         stop_ids=(-1,), top_p=0.9, keys=[(i,) for i in range(rows // n)])
    assert live.peak == pytest.approx(rel=0.1, expected=plan.eval_bytes(
        config, dtype, "cpu", max_rows=rows, samples_per_prompt=n, longest_prompt=prompt,
        max_new_tokens=new))


def test_shards_divide_by_the_processes_and_gathered_weights_do_not():
    config = ModelConfig.from_hf(QWEN_8B)
    one, eight = (small_plan(config, "float32", world_size=n, device="cuda") for n in (1, 8))
    for part in ("weights", "moments", "reference", "gradients"):
        assert eight[part] == pytest.approx(one[part] / 8, rel=1e-3)
    # the whole model, on every GPU
    assert eight["unsharded"] > 4 * num_params(config) > 8 * eight["weights"] - 100
    assert small_plan(config, world_size=8, offload=True)["persistent"] < 10_000
    # HSDP: each replica holds the whole model, and is still wrapped
    replica = small_plan(config, "bfloat16", world_size=2, replicas=2, device="cuda")
    alone = small_plan(config, "bfloat16", world_size=1, device="cuda")
    assert replica["weights"] == alone["weights"]
    assert alone["compute copies"] == 2 * num_params(config) > 2 * replica["compute copies"]
    # one process in fp32 is not
    assert one["unsharded"] == one["compute copies"] == 0


def test_reflections_are_planned_with_two_responses_in_their_prompt():
    config = ModelConfig.from_hf(QWEN_06B)
    p = small_plan(config, "bfloat16", longest_prompt=100, max_new_tokens=1000, reflections=4,
                   max_synthesis_tokens=500)
    columns = memory.bucket(100 + 2 * 1000 + plan.SYNTHESIS_TOKENS + 500, memory.COLUMNS)
    assert p["reflections: KV cache"] == plan.cache_bytes(config, 4, columns, "bfloat16") > p[
        "rollouts: KV cache"]
    assert "reflections" not in small_plan(config)


# --------------------------------------------------------------------------------------------------
# from config.json alone


def knobs_of(script, *argv):
    """The resolved config of a script, its module left as it is."""
    return configure(dict(vars(importlib.import_module(script))), list(argv))


def table_of(*argv, gpus=8, gpu_gb=80, script="train"):
    return plan.TABLES[script](knobs_of(script, *argv), gpus, gpu_gb)


def folder(tmp_path, facts):
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return f"--init_from={tmp_path}"


@pytest.mark.parametrize("facts,count", [(QWEN_8B, "8,190,735,360"), (QWEN_06B, "596,049,920")])
def test_one_config_json_is_enough_for_the_table(facts, count, tmp_path):
    table = table_of("config/aime.py", folder(tmp_path, facts))
    assert f"{count} parameters" in table and "8 x 80 GiB" in table
    assert "256 rollouts, <= 128 reflections" in table


def test_of_a_hub_id_only_config_json_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    fetched = []
    folder(tmp_path, QWEN_06B)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo,
                        file: fetched.append((repo, file)) or str(tmp_path / "config.json"))
    assert num_params(plan.read_model_config("Qwen/Qwen3-0.6B")) == 596_049_920
    assert fetched == [("Qwen/Qwen3-0.6B", "config.json")]


@pytest.mark.parametrize("init_from", ("nobody/has-this-model", "out/not_there/yet", "."))
def test_without_a_config_the_error_is_one_line_with_a_way_out(init_from, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="--init_from=") as error:
        plan.read_model_config(init_from)
    assert "\n" not in str(error.value) and init_from in str(error.value)


def test_the_longest_question_bounds_the_prompt(tmp_path):
    lines = [{"uid": "a", "question": "x" * 10, "answer": 1},
             {"uid": "b", "problem": "y" * 1000, "answer": 2}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    table = table_of("config/aime.py", folder(tmp_path, QWEN_8B), f"--problems={tmp_path}/p.jsonl",
                     "--instruction=" + "z" * 100)
    assert f"{(1000 + 100) // 2 + 32} + 8,192 tokens per row" in table and "assumed" not in table


def test_an_opsd_teacher_reads_two_responses(tmp_path):
    """Bug: the longest row is thought to be a prompt and one response; the teacher's holds a right
    one besides."""
    argv = ["config/aime.py", folder(tmp_path, QWEN_06B), "--tokens_per_microbatch=1"]
    grpo, opsd = (float(re.search(r"activations ([\d.]+)", table_of(*argv, f"--method={m}"))[1])
                  for m in ("grpo", "opsd"))
    rows = 1024 + 2 * 8192 + plan.SYNTHESIS_TOKENS, 1024 + 8192
    assert opsd / grpo == pytest.approx(rows[0] / rows[1], rel=0.01)


def test_the_command_reads_the_scripts_own_arguments_and_loads_nothing(tmp_path, capsys):
    argv = [folder(tmp_path, QWEN_06B), "--gpus=2", "--gpu_gb=24"]
    for script, config in (("train.py", "config/aime.py"), ("eval.py", "config/eval_aime.py"),
                           ("coldstart.py", "config/coldstart_aime.py")):
        plan.main([script, config, *argv])
        assert "596,049,920 parameters" in (out := capsys.readouterr().out) and "x 24 GiB" in out
    plan.main(["coldstart.py", argv[0], "--examples=none.jsonl", "--gpu_gb=24"])
    assert "32 examples\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--gpus=two: expected a number"):
        plan.main(["train.py", "--gpus=two"])
    with pytest.raises(ValueError, match="no such knob"):
        plan.main(["train.py", "--plan=True"])
    with pytest.raises(SystemExit):
        plan.main(["report.py"])


# --------------------------------------------------------------------------------------------------
# what does not fit, and the shipped configs


@pytest.mark.parametrize("gigabytes", (48, 80))
def test_a_plan_with_max_rows_0_fills_what_is_left_and_no_more(gigabytes, tmp_path):
    argv = ["config/aime.py", folder(tmp_path, QWEN_8B), "--max_rows=0"]
    table = table_of(*argv, gpu_gb=gigabytes)
    rows = [int(re.search(rf"(\d+) {name} at once", table)[1])
            for name in ("rollouts", "reflections")]
    assert 1 <= rows[1] < rows[0] < 32 and "WARNING" not in table
    many = table_of(*argv, f"--max_rows={2 * rows[0]}", gpu_gb=gigabytes)
    assert "do not fit" in many
    assert "32 rollouts at once" in table_of(*argv, gpu_gb=141)  # no more than a process samples


def test_rows_are_counted_in_their_bucket():
    config = ModelConfig(**SMALL)
    of = [memory.memory_of(config, rows, 1024, 8, 4) for rows in (32, 33, 36)]
    assert of[0] < of[1] == of[2]


def test_max_rows_0_is_counted_as_a_run_counts_it(monkeypatch):
    """The same rows in memory.rows_that_fit, with so many bytes free, as in the plan."""
    model = CausalLM(ModelConfig(**SMALL))
    for free in (0, 10**6, 10**7, 10**12):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert memory.rows_that_fit(model, 20, 50) == plan.most_rows(
            model.config, free, 20, 50, 4)


@pytest.mark.parametrize("shape", [QWEN_06B, QWEN_8B, SMALL], ids=["0.6B", "8B", "small"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype,world_size", [("float32", 1), ("bfloat16", 1), ("bfloat16", 8)])
@pytest.mark.parametrize("other", [{}, {"checkpoint_activations": True}, {"full_divergence": True}],
                         ids=["plain", "checkpointed", "opsd"])
def test_micro_batches_that_fit_fill_what_is_free(shape, device, dtype, world_size, other):
    """tokens_per_microbatch = 0, against the formulas that the tests above hold to measured bytes:
    never more than what is free, and twice as many would want most of it."""
    config = ModelConfig.from_hf(shape) if "model_type" in shape else ModelConfig(**shape)
    found = set()
    for gigabytes in (16, 24, 48, 80, 141):
        def needed(tokens, free=gigabytes * 2**30):
            p = plan.memory_plan(config, max_rows=1, longest_prompt=1, max_new_tokens=1,
                                 tokens_per_microbatch=tokens, dtype=dtype, device=device,
                                 world_size=world_size, limit=2 * free, **other)
            return p["update"] - p["gradients"]
        free = gigabytes * 2**30
        tokens = memory.most_tokens(
            config, free, dtype=dtype, world_size=world_size, device=device, **other)
        found.add(tokens)
        if tokens > 256:
            assert needed(tokens) <= free
        if tokens < memory.MOST_TOKENS[device]:
            assert needed(2 * tokens) > 0.75 * free
    if shape is QWEN_06B and device == "cuda" and not other:
        assert len(found) > 1


@pytest.mark.parametrize("argv,machine", [
    (("--checkpoint_activations=False", "--max_rows=64"), {}),
    (("--max_rows=16",), {"gpus": 4}),
    (("--method=grpo", "--max_rows=256"), {}), (("--max_rows=8",), {"gpu_gb": 48}),
    ((), {"gpus": 8, "gpu_gb": 24}), (("--max_rows=256",), {"gpus": 8, "gpu_gb": 40})])
def test_following_the_warning_makes_it_fit(argv, machine, tmp_path):
    argv = ["config/aime.py", folder(tmp_path, QWEN_8B), *argv]
    warning = re.search("WARNING: .* do not fit.*; set (.*)", table_of(*argv, **machine))
    assert "WARNING" not in table_of(*argv, *warning[1].split(), **machine)
    assert "max_new_tokens" not in warning[1] or "--offload=True" in warning[1]  # the last resort


def test_a_machine_that_is_too_small_is_told_so(tmp_path):
    argv = folder(tmp_path, QWEN_8B)
    assert "no knob is enough" in table_of("config/aime.py", argv, gpus=1)
    few = table_of("config/eval_aime.py", argv, gpu_gb=8, script="eval")
    assert "use a larger GPU" in few


@pytest.mark.parametrize("path,facts,gpus,gpu_gb", [
    ("config/aime.py", QWEN_8B, 8, 80), ("config/qwen3_0p6b_gsm8k.py", QWEN_06B, 1, 24)])
@pytest.mark.parametrize("method", ("tapo", "grpo", "opsd"))
def test_the_shipped_configs_fit_the_machine_they_name(path, facts, gpus, gpu_gb, method, tmp_path):
    table = table_of(path, folder(tmp_path, facts), f"--method={method}", gpus=gpus, gpu_gb=gpu_gb)
    assert "WARNING" not in table
    if method == "tapo":  # and say what they will need
        peak = float(re.search(r"peak +([\d.]+)", table)[1])
        said = (ROOT / path).read_text()
        assert f"{peak:.0f} of {gpu_gb} GiB" in said or f"peak {peak:.1f} GiB" in said, peak


@pytest.mark.parametrize("path", ("config/eval_aime.py", "config/filter_deepscaler.py"))
def test_the_shipped_evaluations_fit_one_gpu_and_say_how(path, tmp_path):
    """Bug: rows that ran out of memory at their full length, hours into an evaluation."""
    argv = [path, folder(tmp_path, QWEN_8B)]
    table = table_of(*argv, script="eval")
    assert "WARNING" not in table and "1 x 80 GiB" in table
    peak = float(re.search(r"peak ([\d.]+)", table)[1])
    assert f"peak {peak:.0f} of 73.6" in (ROOT / path).read_text()
    fix = re.search("WARNING: .*; set (.*)", table_of(*argv, "--max_rows=99", script="eval"))[1]
    assert "WARNING" not in table_of(*argv, fix, script="eval")


@pytest.mark.parametrize("name,facts,gpus,gpu_gb", [
    ("aime", QWEN_8B, 8, 80), ("qwen3_0p6b_gsm8k", QWEN_06B, 1, 24)])
def test_the_shipped_cold_starts_fit_the_machine_they_name(name, facts, gpus, gpu_gb, tmp_path):
    argv = [f"config/coldstart_{name}.py", folder(tmp_path, facts)]
    assert "WARNING" not in table_of(*argv, gpus=gpus, gpu_gb=gpu_gb, script="coldstart")
    assert "do not fit" in table_of(*argv, gpus=gpus, gpu_gb=8, script="coldstart")


def test_the_paper_run_has_the_papers_numbers():
    """§4.1 and §3.2; a slip here would be called a reproduction."""
    aime, cold = knobs_of("train", "config/aime.py"), knobs_of(
        "coldstart", "config/coldstart_aime.py")
    paper = {"samples_per_prompt": 8, "prompts_per_step": 32, "max_steps": 500,
             "learning_rate": 1e-6, "n_pos": 2, "n_neg": 4, "m_max": 4, "w_min": 0.01,
             "w_max": 10.0, "lam": 1.0, "kl_coef": 0.0, "method": "tapo"}
    assert {key: aime[key] for key in paper} == paper
    paper = {"n_sft": 30000, "n_ift": 15000, "epochs": 3, "learning_rate": 5e-6, "warmup_steps": 50}
    assert {key: cold[key] for key in paper} == paper
    contests = knobs_of("eval", "config/eval_aime.py")
    paper = {"temperatures": (0.6,), "top_ps": (0.9,), "samples": 5 * 16, "pass_k": (1, 2, 3, 4, 5)}
    assert {key: contests[key] for key in paper} == paper
    assert [Path(path).stem for path in contests["problems"].split(",")] == [
        "aime24", "aime25", "hmmt_feb25"]
    middling = knobs_of("eval", "config/filter_deepscaler.py")
    assert (middling["filter_low"], middling["filter_high"], middling["samples"]) == (
        1 / 8, 7 / 8, aime["samples_per_prompt"])


# --------------------------------------------------------------------------------------------------
# every config and every command


def configs_of(script: str) -> list[str]:
    """The config files that this script's header line or name belongs to."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "config").glob("*.py"))
            if script_of(path.stem) == script]


def script_of(name: str) -> str:
    for part, script in (("coldstart", "coldstart"), ("sft", "coldstart"), ("eval", "eval"),
                         ("filter", "eval"), ("measure", "tools.measure")):
        if part in name:
            return script
    return "train"


@pytest.mark.parametrize("script", ("train", "coldstart", "eval", "tools.measure"))
def test_every_config_resolves_with_its_script(script):
    assert configs_of(script)
    for path in configs_of(script):
        knobs_of(script, path)


def test_every_command_of_the_paper_run_is_accepted_by_its_program():
    """A knob renamed in a program and not in runs/aime.sh or a launch line would be found after the
    first phase, hours later."""
    environment = {"PATH": "/usr/bin:/bin", "DRY": "1", "GPUS": "2", "OUT": "/nonexistent/out"}
    dry = subprocess.run(["bash", "runs/aime.sh"], cwd=ROOT, env=environment, capture_output=True,
                         text=True, check=True)
    text = "".join(path.read_text() for path in sorted((ROOT / "config").glob("*.py")))
    launch = re.sub(r" \\\n# +", " ", text)
    pattern = r"(?:python -m (tools\.\w+)|(\w+)\.py)(?: (.*?))?(?:  .*)?$"
    commands = re.findall("^" + r"\+ .*?" + pattern, dry.stdout, re.M)
    commands += re.findall(r"^# +(?:\w+=\S+ )*(?:torchrun \S+ |python )?" + pattern, launch, re.M)
    seen = {tool or script for tool, script, _ in commands}
    assert {"train", "coldstart", "eval", "tools.prepare", "tools.report", "tools.plan",
            "tools.compare", "tools.measure"} <= seen and "WARNING" not in dry.stderr
    for tool, script, rest in commands:
        if (tool or script) in ("train", "coldstart", "eval", "tools.measure"):
            knobs_of(tool or script, *shlex.split(rest))
