"""Throughput and peak memory as ratios to baselines (transformers, TRL, naive code), interleaved
(A B A B) in one run.

    python -m tools.bench                                # the default set; writes bench.json
    python -m tools.bench --what=rollout --compile=True      # against transformers' generate
    python -m tools.bench --what=step                        # against TRL, if `pip install trl` ran
    python -m tools.bench --what=tapo --init_from=out/toy/coldstart/final  # a TAPO over a GRPO step
    python -m tools.bench --what=rollout,update --size=qwen3_0p6b --dtype=bfloat16 --rows=256  # GPU
    python -m tools.bench --what=nano,profile --size=qwen3_0p6b --dtype=bfloat16 --rows=256

Values are medians; a ratio is the median over rounds of the ratio within a round, since machines
are noisy. Tokens after a row's stop token do not count. `limit` is a roofline bound from the
machine's matrix-product and copy throughput, measured in the same run.
"""
import functools
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import failing
import jsonl
import reward
import rollout
import toy
from configurator import at_least, configure, one_of
from data import Problem, encode_prompts, render_prompt
from hf import save_hf
from model import CausalLM, ModelConfig, TokenLogprobs, attend_cache, flops_per_token
from parallel import Unsharded, pick_device, shard
from rollout import PREFIX, ROLLOUT, Decoder, Rollout, generate, sample_rollouts
from tools.plan import cache_bytes, memory_plan
from train import loss_of
from update import set_advantages, set_loss_scales, update

# comma-separated benchmarks; for a GPU also nano, evaluation, phases, attention, profile
what = "limits,rollout,step,tapo,update,logprobs,scale,memory,grading"
size = "tiny"                  # model shape, a key of SIZES
dtype: one_of("float32", "bfloat16") = "float32"
device: one_of("auto", "cpu", "cuda") = "auto"
threads: at_least(1) = 1       # CPU threads
rows: at_least(8) = 64         # decoding batch size: 8 samples of each of rows / 8 prompts
prompt_length: at_least(1) = 32
max_new_tokens: at_least(1) = 128
repeats: at_least(1) = 5       # measured rounds, after one warm-up round
tokens_per_microbatch: at_least(0) = 0  # of updates; 0 = 16384 on a GPU, 4096 on a CPU
compile = False                # apply torch.compile to the policy's blocks
init_from = "out/toy/coldstart/final"  # checkpoint for what=tapo; runs/toy.sh creates it
out = "bench.json"

SIZES = {  # hidden, layers, heads, key-value heads, head size, feed-forward, vocabulary, tied
    "tiny": (192, 4, 6, 2, 32, 512, 128, True), "small": (1024, 4, 16, 8, 128, 3072, 8192, True),
    "smollm2_135m": (576, 30, 9, 3, 64, 1536, 49152, True),
    "qwen3_0p6b": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "qwen3_1p7b": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "qwen3_8b": (4096, 36, 32, 8, 128, 12288, 151936, False)}
RESULTS: list[dict] = []
RECORD = {"results": RESULTS}  # content of the JSON file


def report(name: str, value: float, unit: str, **more) -> None:
    """Print one result as a table row and add it to the JSON file, rewritten after each result."""
    RESULTS.append({"name": name, "value": value, "unit": unit} | more)
    Path(out).write_text(json.dumps(RECORD, indent=1))
    extra = " ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in more.items())
    print(f"{name:<52}{value:>12,.4g} {unit:<12}{extra}", flush=True)


def seconds(f) -> float:
    """Wall time of one call in seconds, including queued GPU work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(**fs) -> dict[str, list[float]]:
    """Call the functions in turn for `repeats` rounds -> the values that each returned (a rate or a
    time). An extra warm-up round is dropped."""
    rounds = [{name: f() for name, f in fs.items()} for _ in range(repeats + 1)][1:]
    return {name: [r[name] for r in rounds] for name in fs}


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def model_of(name: str, **changes) -> CausalLM:
    """A randomly initialised fp32 model on `device`, unwrapped."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings")
    torch.manual_seed(0)
    with torch.device(device):
        model = CausalLM(ModelConfig(**dict(zip(keys, SIZES[name], strict=True)) |
                                     {"eos_token_id": 2} | changes))
    if compile:
        model.compile_blocks()
    return model


def grpo_update(model, optimizer, rollouts: list[Rollout], tokens_per_microbatch: int) -> None:
    """One GRPO update as in train.py, without the reference model's forward pass for the KL."""
    set_loss_scales(rollouts, lam=1.0, loss_agg="sequence", loss_norm="separate")
    loss_fn = functools.partial(
        loss_of, model=model, ref_model=None, method="grpo", temperature=1.0, clip_eps=0.2,
        weighting="ots", w_min=0.01, w_max=10.0, kl_coef=0.0, log_kl=False, opsd_loss="jsd",
        opsd_beta=0.5, opsd_clip=0.0, on_policy=True)
    update(model, optimizer, rollouts, loss_fn, grad_clip=1.0, device=device,
           tokens_per_microbatch=tokens_per_microbatch)


def trainer_of(model: CausalLM) -> tuple[CausalLM, torch.optim.Optimizer, Unsharded]:
    """Wrap a model as train.py does -> model, optimizer, sampler."""
    shard(model, device, dtype=dtype, replicas=1, offload=False)
    return (model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
            Unsharded(model, dtype=dtype, device=device))


# --------------------------------------------------------------------------------------------------


def limits() -> dict[str, float]:
    """Measure this machine's copy bandwidth (bytes/s, read + write) and matrix products (flop/s).
    """
    big, n = (2**30, 8192) if device == "cuda" else (2**26, 1024)
    source = torch.ones(big, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    times = in_turn(copy=lambda: seconds(lambda: target.copy_(source)),
                    gemm=lambda: seconds(lambda: a @ a))
    found = {"bytes": 2 * big / min(times["copy"]), "flops": 2 * n**3 / min(times["gemm"])}
    report("limit: copy bandwidth", found["bytes"] / 1e9, "GB/s")
    report(f"limit: matmul, {dtype}", found["flops"] / 1e9, "Gflop/s")
    return found


def decoding_limit(model, rows: int, context: int, limit: dict[str, float]) -> float:
    """Roofline bound in tokens/s: a decoding step reads every weight and the KV cache once, and
    multiplies every weight with each row."""
    weights = flops_per_token(model.config, 0) / 6  # parameters in matrix products
    step_bytes = weights * getattr(torch, dtype).itemsize + cache_bytes(model.config, rows, context,
        dtype)
    return rows / max(flops_per_token(model.config, context) / 3 * rows / limit["flops"],
                      step_bytes / limit["bytes"])


class Counting(Decoder):
    """Decoder that times each graph capture; `caps` sets max_new_tokens per prompt."""

    def __init__(self, caps: list[int] | None = None):
        super().__init__()
        self.captures, self.caps = [], caps

    def decode(self) -> None:
        known, start = len(self.captured), time.perf_counter()
        super().decode()
        if len(self.captured) > known:
            self.captures.append(time.perf_counter() - start)

    def counts(self) -> dict[str, float]:
        return {"captures": len(self.captures), "capture_seconds": sum(self.captures)}

    def join(self, names, prompts, noise) -> None:
        super().join(names, prompts, noise)
        if self.caps:
            rows = list(self.live)[-len(names):]  # the new ones
            self.end[rows] = torch.tensor([self.caps[i] for i, _ in names], device=self.device)


def rate_of(model, prompts: list[list[int]], n: int, stop_ids, decoder=None, temperature=1.0,
            max_new=None, max_rows=None) -> float:
    """Throughput of one `generate` call: tokens/s, up to each row's stop token."""
    start = time.perf_counter()
    groups = generate(model, prompts, n, max_new_tokens=max_new or max_new_tokens, decoder=decoder,
                      stop_ids=stop_ids, keys=[(0, 0, 0, i) for i in range(len(prompts))],
                      max_rows=max_rows or rows, temperature=temperature)
    return sum(len(c.ids) for group in groups for c in group) / (time.perf_counter() - start)


def nano_vllm_workload(n: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Workload of nano-vllm's bench.py (GeeeekExplorer/nano-vllm) -> prompts, new tokens of each:
    uniform in 100..longest, same seed. There n = 256, longest = 1,024: 133,966 new tokens."""
    draw = random.Random(0).randint
    prompts = [[draw(0, 10000) for _ in range(draw(100, longest))] for _ in range(n)]
    return prompts, [draw(100, longest) for _ in range(n)]


def bench_nano(_: dict) -> None:
    """nano-vllm's workload, random weights, T 0.6: completion lengths are fixed in advance and
    differ between rows."""
    model = model_of(size).to(getattr(torch, dtype))
    n, longest = (256, 1024) if device == "cuda" else (16, 120)
    prompts, caps = nano_vllm_workload(n, longest)
    prompts = [[i % model.config.vocab_size for i in prompt] for prompt in prompts]
    decoder = Counting(caps)
    rates = in_turn(ours=lambda: rate_of(model, prompts, 1, (), decoder, temperature=0.6,
                                         max_new=longest))["ours"]
    report(f"nano-vllm's workload, {size} {dtype}, {sum(caps):,} tokens", statistics.median(rates),
           "tokens/s", **decoder.counts())


def bench_evaluation(_: dict) -> None:
    """As config/words_eval.py: 27,900 samples, 16 per prompt; one token in 77 is a stop token."""
    model = model_of(size, model_type="llama").to(getattr(torch, dtype))
    V, n = model.config.vocab_size, 27_900 // 16 if device == "cuda" else 4
    prompts = torch.randint(4, V, (n, prompt_length)).tolist()
    stop_ids, decoder = tuple(range(2, 2 + V // 77)), Counting()
    rate = rate_of(model, prompts, 16, stop_ids, decoder)
    elapsed = seconds(lambda: rate_of(model, prompts, 16, stop_ids, decoder))
    report(f"evaluation, {16 * n:,} samples, {size} {dtype}", elapsed, "s", tokens_per_second=rate,
           **decoder.counts())


def bench_phases(_: dict) -> None:
    """Seconds per phase of a GRPO step on rows / 8 prompts; one token in 64 is a stop token."""
    (model, optimizer, unsharded), tokenizer = trainer_of(model_of(size)), toy.make_tokenizer()
    problems = toy.make_problems("findx", "train", rows // 8)
    stop_ids, decoder = tuple(range(2, 2 + model.config.vocab_size // 64)), Counting()
    steps = [step_of(model, optimizer, tokenizer, problems, stop_ids=stop_ids, max_rows=rows,
                     tokens_per_microbatch=microbatch(), max_new_tokens=max_new_tokens,
                     unsharded=unsharded, decoder=decoder) for _ in range(repeats + 1)][1:]
    parts = {name: statistics.median(s[name] for s in steps) for name in
             ("generate", "grade", "update")}
    report(f"GRPO step {size} {dtype} {rows} rows, ragged" + ", compiled" * compile,
           statistics.median(s["all"] for s in steps), "s", **parts,
           **decoder.counts())


def bench_attention(_: dict) -> None:
    """Decode-step attention of one layer, ragged lengths, with each attention kernel of torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _, _, nh, nkv, hs, *_ = SIZES[size]
    R, C, kind = rows, prompt_length + max_new_tokens, getattr(torch, dtype)
    q = torch.randn(R, nh, 1, hs, device=device, dtype=kind)
    keys, values = torch.randn(2, R, nkv, C, hs, device=device, dtype=kind)
    hidden = torch.arange(C, device=device) > torch.randint(C // 2, C, (R, 1), device=device)
    mask = torch.zeros(R, C, device=device, dtype=kind).masked_fill_(hidden, -torch.inf)
    mask = mask[:, None, None]
    folded = q.reshape(R, nkv, -1, hs)

    def by(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)

    kernels = {"model.attend_cache": lambda: attend_cache(q, keys, values, mask)}
    kernels |= {name.lower(): functools.partial(by, getattr(SDPBackend, name))
                for name in ("MATH", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")}
    compiled = torch.compile(F.scaled_dot_product_attention)
    kernels["compiled"] = lambda: compiled(folded, keys, values, attn_mask=mask)
    useful = 2 * nkv * hs * keys.element_size() * float((~hidden).sum())
    many = 100 if device == "cuda" else 3
    for name, kernel in kernels.items():
        try:
            kernel()
        except RuntimeError as e:
            print(f"attention by {name}: {str(e).splitlines()[0]}")
            continue
        took = min(seconds(lambda f=kernel: [f() for _ in range(many)]) for _ in range(3)) / many
        report(f"attention {size} {dtype} {R} x {C} by {name}", 1e6 * took, "us",
               useful_gb_per_second=useful / took / 1e9)


def bench_profile(_: dict) -> None:
    """Profile a decoding step and a micro-batch: number of kernel launches, slowest kernels."""
    from torch.profiler import ProfilerActivity, profile

    model, optimizer, unsharded = trainer_of(model_of(size))
    batch = update_rows(model.config.vocab_size, max(1, microbatch() // (prompt_length + 64)), 64)
    prompts = torch.randint(4, model.config.vocab_size, (rows // 8, prompt_length)).tolist()
    decoder = Decoder()

    def decode(new: int) -> None:
        with unsharded as sampler:
            rate_of(sampler, prompts, 8, (), decoder, max_new=new)

    def update_once() -> None:
        grpo_update(model, optimizer, batch, 10**9)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    launches = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
                "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    for name, run, per in (("decoded token", lambda: decode(33), 32),
                           ("micro-batch", update_once, 1)):
        run()
        with profile(activities=activities) as prof:
            run()
        events = prof.key_averages()
        count = sum(e.count for e in events if e.key in launches or
                    (device == "cpu" and e.key.startswith("aten::")))
        report(f"launches per {name}, {size} {dtype}", count / per, "launches" if device == "cuda"
               else "operations")
        by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        print(events.table(sort_by=by, row_limit=25, max_name_column_width=70))


def bench_rollout(limit: dict[str, float]) -> None:
    """Sampling throughput against transformers' generate on the same weights and prompts: fixed
    lengths, and ragged lengths (one token in 64 is a stop token; random weights sample all tokens
    with similar probability)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = model_of(size).to(getattr(torch, dtype))
    with torch.device(device):
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_hf()),
            dtype=getattr(torch, dtype)).eval()
    peer.load_state_dict(model.state_dict(), strict=not model.config.tie_word_embeddings)
    V = model.config.vocab_size
    prompts = torch.randint(4, V, (rows // 8, prompt_length),
                            generator=torch.Generator().manual_seed(0))
    inputs = prompts.repeat_interleave(8, dim=0).to(device)
    decoder = Counting()

    def ours(stop_ids) -> float:
        return rate_of(model, prompts.tolist(), 8, stop_ids=stop_ids, decoder=decoder)

    def kernel_by_kernel(stop_ids) -> float:
        rollout.CUDA_GRAPHS = False
        try:
            return ours(stop_ids)
        finally:
            rollout.CUDA_GRAPHS = True

    @torch.no_grad()
    def theirs(stop_ids) -> float:
        start = time.perf_counter()
        ids = peer.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, pad_token_id=0,
            eos_token_id=list(stop_ids) or None)[:, prompt_length:].cpu()
        elapsed = time.perf_counter() - start
        is_stop = torch.isin(ids, torch.tensor(stop_ids, dtype=torch.long))
        return float(torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1,
                                 ids.shape[1]).sum()) / elapsed

    best = decoding_limit(model, rows, prompt_length + max_new_tokens // 2, limit)
    for lengths, stop_ids in (("fixed", ()), ("ragged", tuple(range(2, 2 + V // 64)))):
        samplers = {"ours": ours, "transformers": theirs} | ({"without_graphs": kernel_by_kernel}
            if device == "cuda" else {})
        decoder.captures = []
        rates = in_turn(**{name: functools.partial(f, stop_ids) for name, f in samplers.items()})
        median = {name: statistics.median(values) for name, values in rates.items()}
        value = median.pop("ours")
        report(f"rollout {size} {dtype} {rows} rows, {lengths}" + ", compiled" * compile, value,
               "tokens/s", **median, ratio=ratio(rates["ours"], rates["transformers"]),
               **decoder.counts(),
               **({"limit": best, "share": value / best} if lengths == "fixed" else {}))


def step_of(model, optimizer, tokenizer, problems: list[Problem], *, tokens_per_microbatch: int,
            unsharded: Unsharded, **sampling) -> dict:
    """One GRPO step through the core's functions -> seconds per phase, and its 'rollouts'.

    Rewards are replaced by coin flips: a randomly initialised model is never right, and with only
    wrong answers all advantages would be 0.
    """
    encode_prompts(tokenizer, problems, "")
    clock = [time.perf_counter()]
    with unsharded as sampler:
        rollouts = sample_rollouts(sampler, tokenizer, list(enumerate(problems)), 8,
                                   key=(0, ROLLOUT, 0), **sampling)
    clock.append(time.perf_counter())
    reward.score(rollouts)
    clock.append(time.perf_counter())
    coin = np.random.default_rng(0)
    for r in rollouts:
        r.reward = float(coin.random() < 0.5)
    set_advantages(rollouts, ref_advantage="reward")
    grpo_update(model, optimizer, rollouts, tokens_per_microbatch)
    clock.append(time.perf_counter())
    generated, graded, updated = (b - a for a, b in zip(clock, clock[1:], strict=False))
    return {"generate": generated, "grade": graded, "update": updated, "all": clock[-1] - clock[0],
            "rollouts": rollouts}


def bench_step(limit: dict[str, float]) -> None:
    """A GRPO step of 8 prompts x 8 completions against TRL's trainer on the same weights: fixed
    lengths, and ragged lengths (EOS has probability 1 / vocabulary). limit: approximate seconds of
    the step's matrix products alone."""
    tokenizer = toy.make_tokenizer()
    problems = [Problem(f"p{i}", f"{i} + {i} = ?", str(2 * i)) for i in range(10, 18)]
    for lengths, stop_ids in (("fixed", ()), ("ragged", (tokenizer.eos_token_id,))):
        model = model_of(size, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        with tempfile.TemporaryDirectory() as folder:
            save_hf(model, tokenizer, folder)
            trainer, phases = trainer_of(model), []

            def ours(stop_ids=stop_ids, trainer=trainer, phases=phases) -> float:
                model, optimizer, unsharded = trainer
                phases.append(step_of(model, optimizer, tokenizer, problems, unsharded=unsharded,
                                      stop_ids=stop_ids, max_rows=rows, tokens_per_microbatch=4096,
                                      max_new_tokens=max_new_tokens))
                return phases[-1]["all"]

            try:
                theirs = trl_step(folder, tokenizer,
                                  [render_prompt(tokenizer, p.question, "") for p in problems],
                                  not stop_ids)
            except ImportError as e:
                print(f"TRL is not measured ({e}); pip install trl==1.16.0")
                theirs = None
            times = in_turn(ours=ours, **({"theirs": theirs} if theirs else {}))
        parts = {name: statistics.median(p[name] for p in phases[1:])
                 for name in ("generate", "grade", "update")}
        peer = {"trl": statistics.median(times["theirs"]),
                "ratio": ratio(times["theirs"], times["ours"])} if theirs else {}
        sizes = [(len(r.prompt_ids), len(r.completion_ids)) for r in phases[-1]["rollouts"]]
        # sampling costs one more forward per completion token, 1/3 of forward + backward
        flops = sum(flops_per_token(model.config, p + n) * (p + n * 4 / 3) for p, n in sizes)
        report(f"GRPO step {size} {dtype} 8 x 8 x {max_new_tokens}, {lengths}",
               statistics.median(times["ours"]), "s", **peer, **parts, limit=flops / limit["flops"])


def trl_step(folder: str, tokenizer, prompts: list[list[int]], fixed: bool):
    """Return a function that runs two steps of TRL's GRPOTrainer -> seconds of the second step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter() - self.start)

    def coin(completions, **_):
        return np.random.default_rng(0).integers(0, 2, len(completions)).astype(float).tolist()

    def run() -> float:
        arguments = GRPOConfig(
            output_dir=folder + "/trl", max_steps=2, per_device_train_batch_size=64,
            num_generations=8, beta=0.0, learning_rate=1e-6, max_completion_length=max_new_tokens,
            temperature=1.0, top_k=0, top_p=1.0, report_to="none", save_strategy="no",
            use_cpu=device == "cpu", bf16=dtype == "bfloat16", gradient_checkpointing=False,
            disable_tqdm=True, generation_kwargs={"min_new_tokens": max_new_tokens} if fixed
            else {})
        trainer = GRPOTrainer(
            model=folder, reward_funcs=coin, args=arguments, processing_class=tokenizer,
            callbacks=[Clock()],
            train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(prompt)}
            for prompt in prompts] * 4))
        trainer.train()
        return Clock.times[-1]

    return run


def bench_tapo(_: dict) -> None:
    """Seconds per step on config/toy.py, TAPO against GRPO, from the cold-start checkpoint in
    init_from."""
    if not Path(init_from).is_dir():
        print(f"tapo is not measured: init_from = {init_from} is not a folder; bash runs/toy.sh "
              "creates it")
        return

    def run(*configs: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "train.py", "config/toy.py", *configs,
                                   f"--init_from={init_from}", "--max_steps=8", "--eval_problems=",
                                   f"--out_dir={folder}/run", f"--threads={threads}",
                                   f"--device={device}"], stdout=subprocess.DEVNULL)
            if done.returncode:
                raise ValueError("train.py failed; its message stands above")
            metrics = jsonl.read(f"{folder}/run/metrics.jsonl")
        times = {k: statistics.median(m[k] for m in metrics[1:]) for k in metrics[0]
                 if k.startswith("time/")}
        phases.setdefault(configs[0], []).append(times)
        return times["time/step"]

    phases: dict[str, list] = {}
    times = in_turn(tapo=lambda: run("config/tapo.py"), grpo=lambda: run("config/grpo.py"))
    parts = {k.removeprefix("time/"): statistics.median(p[k] for p in phases["config/tapo.py"])
             for k in ("time/generate", "time/reflect", "time/update")}
    report("TAPO step on config/toy.py", statistics.median(times["tapo"]), "s",
           grpo=statistics.median(times["grpo"]), ratio=ratio(times["tapo"], times["grpo"]),
           **parts)


def bench_update(limit: dict[str, float]) -> None:
    """Throughput and MFU of a forward + backward over `rows` ragged rows of prompt + completion.
    MFU: flops of real tokens (6 N + attention) over the machine's measured matrix products."""
    model, optimizer, _ = trainer_of(model_of(size))
    batch = update_rows(model.config.vocab_size, rows, max_new_tokens)
    lengths = [len(r) for r in batch]
    times = in_turn(ours=lambda: seconds(
        lambda: grpo_update(model, optimizer, batch, microbatch())))["ours"]
    flops = sum(flops_per_token(model.config, n) * n for n in lengths)
    median = statistics.median(times)
    report(f"update {size} {dtype} {rows} rows, ragged" + ", compiled" * compile,
           sum(lengths) / median, "tokens/s", seconds=median, mfu=flops / median / limit["flops"])


def microbatch() -> int:
    return tokens_per_microbatch or (16384 if device == "cuda" else 4096)


def update_rows(vocabulary: int, n: int, longest: int) -> list[Rollout]:
    """n rollouts of random ids, completions of longest / 8 .. longest tokens, advantages +-1."""
    rng, batch = np.random.default_rng(0), []
    for i in range(n):
        length = prompt_length + int(rng.integers(longest // 8, longest + 1))
        ids = rng.integers(4, vocabulary, length).tolist()
        prompt, completion = ids[:prompt_length], ids[prompt_length:]
        batch.append(Rollout(None, str(i // 8), prompt, completion, [PREFIX] * len(completion),
                             True, "", query=i // 8, sample_logprobs=[-1.0] * len(completion),
                             advantage=1.0 if i % 2 else -1.0))
    return batch


def peak_memory() -> int:
    """Peak memory of this process in bytes: GPU memory with device = 'cuda', else host RSS (Linux).
    Not getrusage's ru_maxrss, which a child inherits: a peak below the parent's would be missed."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def head_in_child(naive: bool) -> tuple[float, float]:
    """(seconds, peak GiB above the start) of log-probs + entropy with gradients, V 151,936, d
    1,024, T 2,048, in this process."""
    torch.set_num_threads(threads)
    V, d, T = 151936, 1024, 2048
    base = peak_memory()
    hidden = torch.randn(1, T, d, device=device, requires_grad=True)
    weight = (torch.randn(V, d, device=device) * 0.02).requires_grad_()
    targets = torch.randint(0, V, (1, T), device=device)

    def run():
        if naive:
            logp = (hidden @ weight.T).log_softmax(-1)
            logprobs, entropy = logp.gather(-1, targets[..., None])[...,
                0], -(logp.exp() * logp).sum(-1)
        else:
            logprobs, entropy = TokenLogprobs.apply(hidden, weight, targets, 1.0, V, torch.float32)
        (logprobs.sum() + 0.01 * entropy.sum()).backward()

    elapsed = seconds(run)
    return elapsed, (peak_memory() - base) / 2**30


def in_child(f, *args):
    """Run f(*args) in a fresh process, so that peak memory is that of f alone."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=configure_child,
            initargs=(device, dtype, threads)) as pool:
        return pool.apply(f, args)


def configure_child(*knobs) -> None:
    global device, dtype, threads
    device, dtype, threads = knobs


def bench_logprobs(limit: dict[str, float]) -> None:
    """TokenLogprobs (fused output head) against a naive log_softmax, fp32, one call each in a fresh
    process. limit: seconds of the three necessary matrix products."""
    ours, peak = in_child(head_in_child, False)
    theirs, naive_peak = in_child(head_in_child, True)
    report("log-probs + entropy, V 151,936, d 1,024, T 2,048", ours, "s", naive=theirs,
           ratio=theirs / ours,
           **({"limit": 3 * 2 * 151936 * 1024 * 2048 / limit["flops"]} if dtype == "float32"
              else {}))
    report("log-probs + entropy: peak memory", peak, "GiB", naive=naive_peak)


def bench_scale(limit: dict[str, float]) -> None:
    """Sampling throughput over batch size, completion and prompt length: tokens/s, one run each."""
    model = model_of(size).to(getattr(torch, dtype))

    def rate(rows: int, prompt: int, new: int) -> float:
        prompts = torch.randint(4, model.config.vocab_size, (rows // 8, prompt)).tolist()
        keys = [(0, 0, 0, i) for i in range(len(prompts))]
        elapsed = seconds(lambda: generate(model, prompts, 8, max_new_tokens=new, stop_ids=(),
                                           keys=keys, max_rows=rows))
        return rows * new / elapsed

    rate(8, 32, 16)
    for n, prompt, new in [(8, 32, 64), (32, 32, 64), (128, 32, 64), (512, 32, 64), (64, 32, 256),
                           (64, 32, 1024), (64, 32, 2048), (64, 256, 64), (64, 1024, 64)]:
        value = rate(n, prompt, new)
        report(f"scale {size} {dtype}: {n} rows, prompt {prompt}, completion {new}", value,
               "tokens/s", share=value / decoding_limit(model, n, prompt + new // 2, limit))


def step_in_child() -> tuple[float, float]:
    """Peak GiB above the start of two steps of `small`, 16 rows at once: (measured, planned)."""
    torch.set_num_threads(threads)
    base = peak_memory()
    tokenizer, model = toy.make_tokenizer(), model_of("small")
    problems = [Problem(f"p{i}", f"{i} + {i} = ?", str(2 * i)) for i in range(10, 12)]
    longest = max(len(render_prompt(tokenizer, p.question, "")) for p in problems)
    sizes = {"max_rows": 16, "max_new_tokens": 64, "tokens_per_microbatch": 16 * (longest + 64)}
    _, optimizer, unsharded = trainer_of(model)
    for _ in range(2):
        step_of(model, optimizer, tokenizer, problems, stop_ids=(), unsharded=unsharded, **sizes)
    measured = (peak_memory() - base) / 2**30
    predicted = memory_plan(model.config, **sizes, samples_per_prompt=8, longest_prompt=longest,
                            dtype=dtype, reference_model=False, device=device)
    return measured, predicted["peak"] / 2**30


def bench_memory(_: dict) -> None:
    """Peak memory of a small run against tools.plan's prediction, in a fresh process."""
    measured, predicted = in_child(step_in_child)
    report(f"peak memory of two steps, small {dtype}", measured, "GiB", plan=predicted,
           ratio=measured / predicted)


def bench_grading(_: dict) -> None:
    """Grading throughput in answers/s by kind of answer, in one batched call as in training."""
    kinds = {"integers, right and wrong": [(f"The answer is \\boxed{{{i}}}.", str(i + i % 2))
                                           for i in range(1000)],
             "fractions, as text": [(f"so \\boxed{{\\frac{{{i}}}{{7}}}}", f"\\dfrac{{{i}}}{{7}}")
                                    for i in range(1000)],
             "surds, as text": [(f"so \\boxed{{{i}\\sqrt{{3}}}}", f"{i}\\sqrt3")
                                for i in range(1000)]}
    for kind, pairs in kinds.items():
        texts, golds = ([x for x, _ in pairs] * 20, [y for _, y in pairs] * 20)
        times = in_turn(ours=lambda texts=texts,
                        golds=golds: seconds(lambda: reward.grade_many(texts, golds)))["ours"]
        report(f"grading: {kind}", len(texts) / statistics.median(times), "answers/s")


def main() -> None:
    """Run the benchmarks listed in `what`; print the table, write the JSON."""
    global device
    config = configure(globals())
    device = pick_device(device)
    torch.set_num_threads(threads)
    machine = f"CPU, {threads} of {os.cpu_count()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{machine}; torch {torch.__version__}; {config}")
    RECORD.update(machine=machine, torch=torch.__version__, config=config, results=RESULTS)
    benches = {"rollout": bench_rollout, "step": bench_step, "tapo": bench_tapo,
               "update": bench_update, "logprobs": bench_logprobs, "scale": bench_scale,
               "memory": bench_memory, "grading": bench_grading, "nano": bench_nano,
               "evaluation": bench_evaluation, "phases": bench_phases,
               "attention": bench_attention, "profile": bench_profile}
    names = what.split(",")
    for name in names:
        if name not in {"limits", *benches}:
            raise ValueError(f"what = {name!r} is unknown; use {', '.join(['limits', *benches])}")
    of_machine = {"rollout", "step", "update", "logprobs", "scale"}
    limit = limits() if {"limits", *of_machine} & set(names) else {}
    for name in names:
        if name != "limits":
            benches[name](limit)


if __name__ == "__main__":
    failing.run(main)
