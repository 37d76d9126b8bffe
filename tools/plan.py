"""Memory and flops of a run, from config.json and the knobs alone, before any weights are loaded.

    python -m tools.plan train.py config/aime.py --gpus=8 --gpu_gb=80
    python -m tools.plan train.py config/aime.py --gpus=2 --gpu_gb=24 --init_from=FOLDER
    python -m tools.plan coldstart.py config/coldstart_aime.py --gpus=8 --gpu_gb=80
    python -m tools.plan eval.py config/eval_aime.py --gpu_gb=80 --init_from=FOLDER

The script comes first; all arguments except --gpus and --gpu_gb are the script's. Without these two
the plan is for the local machine. Only config.json of the model is read.

The formulas follow model.py: parameters counted on the meta device, activations saved for the
backward pass, the sampler's KV cache. tests/tools/test_plan.py checks them against measured bytes.
Responses are assumed to reach max_new_tokens, so the plan is an upper bound. It counts tensors
only; USABLE leaves the rest of a GPU to the CUDA context, NCCL and fragmentation.
Deliberately missing: time, which depends on the machine; RoPE's tables, some kilobytes; fp32
attention on a GPU where no fused kernel exists.
"""
import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import configure, run_script
from data import load_problems
from hf import check_folder
from memory import (
    COLUMNS,
    KEEP_SHARE,
    MOST_ROWS,
    PREFILL_TOKENS,
    activation_bytes,
    bucket,
    most_rows,
    most_tokens,
    update_bytes,
)
from model import ModelConfig, count_parameters, flops_per_token
from rollout import BLOCK

GIB = 2**30
USABLE = 0.92             # share of a GPU's memory that a plan may fill
SYNTHESIS_TOKENS = 600     # tokens of a synthesis prompt's fixed text (TEMPLATES: 530)
ASSUMED_PROMPT = 1024     # longest prompt in tokens if there is no problem file; about DeepScaleR's


def read_model_config(init_from: str) -> ModelConfig:
    """ModelConfig of a Hugging Face folder or hub id; only config.json is downloaded. One-line
    errors."""
    path = Path(init_from) / "config.json"
    if path.parent.is_dir():
        check_folder(path.parent)
    if not path.is_file():
        if path.parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", init_from):
            raise FileNotFoundError(
                f"no config.json at {path.parent}; pass a Hugging Face folder or a hub id (a plan "
                "needs only the same architecture, e.g. --init_from=Qwen/Qwen3-8B)")
        from huggingface_hub import hf_hub_download
        try:
            path = Path(hf_hub_download(init_from, "config.json"))
        # no network, no such repository: the hub's own message has many lines
        except Exception as e:
            raise FileNotFoundError(
                f"{init_from!r} is no folder here and the hub did not serve its config.json "
                f"({type(e).__name__}); download the model where there is a network and pass "
                "--init_from=FOLDER (config.json alone is enough)") from None
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{path} is not valid JSON (line {e.lineno}: {e.msg}); copy it again") from None


def cache_bytes(config: ModelConfig, rows: int, columns: int, dtype: str) -> int:
    """Bytes of the KV cache of `rows` rows of `columns` tokens."""
    per_column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return rows * columns * per_column * (2 if dtype == "bfloat16" else 4)


def sampling_bytes(config: ModelConfig, rows: int, samples_per_prompt: int, prompt: int,
                   new: int, *, dtype: str, device: str) -> dict[str, int]:
    """{'KV cache', 'prefill', 'peak'}: bytes of `rows` rows that decode together, weights not
    included. Lengths in tokens."""
    c, V = 2 if dtype == "bfloat16" else 4, config.num_tokens
    _, of_input, _ = activation_bytes(config, dtype=dtype, device=device)
    rows_at_once = bucket(rows)
    cache = cache_bytes(config, rows_at_once, bucket(prompt + new, COLUMNS), dtype)
    state = rows_at_once * (new + 1) * 20  # ids, log-probs, uniforms of new tokens
    # a bucket change copies one layer of the cache; sampling holds logits, p and its fp64 cumsum
    of_logit = 24 if V <= 16 * BLOCK else 12
    decode = max(cache // config.num_hidden_layers, rows_at_once * V * of_logit)
    prompts = min(-(-rows // samples_per_prompt), max(1, PREFILL_TOKENS // prompt))
    in_prefill = 3 * config.intermediate_size * c + 4 * of_input
    prefill = cache_bytes(config, prompts, prompt, dtype) + prompts * prompt * in_prefill
    return {"KV cache": cache, "prefill": prefill,
            "peak": cache + state + max(prefill, decode)}


def memory_plan(config: ModelConfig, *, max_rows: int, longest_prompt: int, max_new_tokens: int,
                tokens_per_microbatch: int, dtype: str, samples_per_prompt: int = 1,
                reflections: int = 0, max_synthesis_tokens: int = 0, rollouts: int = 0,
                longest_row: int = 0, limit: float = 0, world_size: int = 1, replicas: int = 1,
                offload: bool = False, reference_model: bool = True, full_divergence: bool = False,
                checkpoint_activations: bool = False, device: str = "cuda") -> dict[str, int]:
    """Bytes on one GPU by part, with the sums 'persistent', 'update', 'sampling' and 'peak'; also
    the rows that decode at once, and the tokens of a micro-batch.

    peak = persistent + max(update, sampling): gradients and activations are freed before sampling
    begins. Lengths in tokens. dtype: of matrix products; master weights, gradients and AdamW's
    moments are fp32. world_size / replicas ranks share one copy of the model (FSDP2). rollouts,
    reflections: the most that one rank samples per step. max_rows 0: as many of them at once as fit
    into `limit` bytes; tokens_per_microbatch 0: as many as fit. full_divergence: OPSD over the
    whole vocabulary. longest_row: longest row of the update, if longer than prompt + response.
    """
    total, block, tensors = count_parameters(config)
    root = total - config.num_hidden_layers * block
    c = 2 if dtype == "bfloat16" else 4
    wrapped = world_size > 1 or c == 2 or offload  # by FSDP, see parallel.shard
    share = 0 if offload else 4 * -(-total * replicas // world_size)  # fp32 values
    parts = {"weights": share, "moments": 2 * share + 4 * tensors,
             "reference": share * c // 4 * reference_model}
    persistent = sum(parts.values())
    sampler = c * total * wrapped  # parallel.Unsharded; a small one stays during the update
    kept_sampler = sampler if sampler <= KEEP_SHARE * limit else 0

    # The update. A row longer than tokens_per_microbatch is a micro-batch of its own.
    how = {"dtype": dtype, "world_size": world_size, "device": device,
           "reference_model": reference_model, "full_divergence": full_divergence,
           "checkpoint_activations": checkpoint_activations}
    tokens_per_microbatch = tokens_per_microbatch or most_tokens(
        config, (1 - KEEP_SHARE) * limit - persistent - share - kept_sampler, **how)
    longest = longest_row or longest_prompt + max_new_tokens
    tokens = max(tokens_per_microbatch, min(longest, config.max_position_embeddings))
    micro_batch = update_bytes(config, tokens, **how)
    update = share + micro_batch.pop("peak")
    parts |= {"tokens": tokens, "gradients": share} | micro_batch
    shown = ("gradients", "compute copies", "activations")
    parts["temporaries"] = update - sum(parts[name] for name in shown)

    # Sampling: rollouts, then reflections, whose prompts hold two full responses. Each distinct
    # prompt is prefilled once. FSDP keeps the root of the reference model gathered.
    parts["unsharded"] = sampler + c * root * reference_model * (world_size > 1)
    # With max_rows set, plan for max_rows rows even if a step has fewer rollouts: the evaluation
    # may have more.
    jobs = {"rollouts": (max_rows or rollouts or MOST_ROWS, samples_per_prompt, longest_prompt,
                         max_new_tokens)}
    if reflections:
        new = max_synthesis_tokens or 2 * max_new_tokens
        prompt = min(longest_prompt + 2 * max_new_tokens + SYNTHESIS_TOKENS,
                     config.max_position_embeddings - new)
        # reflections that do not fit the context are dropped
        jobs["reflections"] = reflections, 1, prompt, new

    def need(rows: int, *shape: int) -> dict[str, int]:
        return sampling_bytes(config, rows, *shape, dtype=dtype, device=device)

    room = limit - persistent - parts["unsharded"]
    for name, (most, *shape) in jobs.items():
        rows = min(most, max_rows or most_rows(config, room, *shape[1:], c))
        needed = need(rows, *shape)
        parts |= {f"{name} at once": rows, f"{name}: KV cache": needed["KV cache"],
                  f"{name}: prefill": needed["prefill"], name: needed["peak"]}
    sampling = parts["unsharded"] + max(parts[name] for name in jobs)
    # a small KV cache stays allocated during the update, with its captured graphs
    kept = max(parts[f"{name}: KV cache"] for name in jobs)
    update += kept_sampler + (kept if kept <= KEEP_SHARE * limit else 0)
    return parts | {"persistent": persistent, "update": update, "sampling": sampling,
                    "peak": persistent + max(update, sampling)}


def what_fits(limit: float, sizes: dict) -> dict | None:
    """Knob changes, cheapest first, until memory_plan(**sizes) needs at most `limit` bytes; None if
    no change is enough."""
    turned: dict = {}
    while (plan := memory_plan(**sizes | turned))["peak"] > limit:
        now, room = sizes | turned, limit - plan["persistent"]
        row = now["longest_prompt"] + now["max_new_tokens"]
        budget = now["tokens_per_microbatch"] or plan["tokens"]
        if plan["update"] > room and not now["checkpoint_activations"]:
            turned["checkpoint_activations"] = True
        elif plan["update"] > room and budget > row:
            turned["tokens_per_microbatch"] = max(budget // 2, row)
        elif plan["update"] <= room and now["max_rows"]:
            turned["max_rows"] = 0  # each phase: as many as fit
        elif now["world_size"] > 1 and not now["offload"]:
            turned["offload"] = True
        elif now["max_new_tokens"] > 256:
            for knob in ("max_new_tokens", "max_synthesis_tokens"):
                if now[knob]:
                    turned[knob] = now[knob] // 2
        else:
            return None
    return turned


def longest_question(path: str, instruction: str) -> int:
    """Upper bound on the tokens of a problem file's longest prompt, at two characters per token
    (mathematics has two or more). 0: no file."""
    if not Path(path).is_file():
        return 0
    problems = load_problems(path, check_answers=False)
    return (max(len(p.question) for p in problems) + len(instruction)) // 2 + 32


def machine(device: str, gpus: int, gpu_gb: float) -> tuple[str, int, float]:
    """(device, processes, bytes of memory per process); gpus or gpu_gb 0: the local machine's."""
    cuda = torch.cuda.is_available() and device != "cpu"
    processes = gpus or (torch.cuda.device_count() if cuda else 1)
    if gpu_gb:
        return "cuda", processes, gpu_gb * GIB
    if cuda:
        return "cuda", processes, torch.cuda.get_device_properties(0).total_memory
    if gpus:
        raise ValueError(
            f"--gpus={gpus}, but there is no GPU here to measure; add --gpu_gb=80 or so")
    return "cpu", processes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes


# knobs of train.py and coldstart.py that memory_plan takes under the same name
SHARED_KNOBS = ("max_rows", "max_new_tokens", "tokens_per_microbatch", "dtype",
                "max_synthesis_tokens", "checkpoint_activations", "offload")


def train_table(config: dict, gpus: int = 0, gpu_gb: float = 0) -> str:
    """The plan of train.py, from its resolved knobs. If memory is exceeded, the last lines warn and
    name the knobs to change."""
    c, model = SimpleNamespace(**config), read_model_config(config["init_from"])
    device, processes, memory = machine(c.device, gpus, gpu_gb)
    prompt, head = headline(c, model, processes, memory, device)
    rollouts = c.prompts_per_step * c.samples_per_prompt
    reflecting = c.method in ("tapo", "sft") and c.prefix_mode != "copy"
    reflections = c.prompts_per_step * c.m_max * reflecting
    row, opsd = prompt + c.max_new_tokens, c.method == "opsd"
    sizes = {key: config[key] for key in SHARED_KNOBS} | {
        "config": model, "longest_prompt": prompt, "device": device, "limit": USABLE * memory,
        "samples_per_prompt": c.samples_per_prompt, "rollouts": -(-rollouts // processes),
        "reflections": -(-reflections // processes),
        "reference_model": bool(c.log_kl or c.kl_coef or opsd),
        # OPSD's teacher prompt also holds a right response
        "longest_row": row + opsd * (c.max_new_tokens + SYNTHESIS_TOKENS),
        "full_divergence": opsd and c.opsd_loss == "jsd", "world_size": processes,
        "replicas": c.replicas}

    rows = rollouts + reflections
    batches = -(-rows // (max(1, memory_plan(**sizes)["tokens"] // row) * processes))
    synthesis = c.max_synthesis_tokens or 2 * c.max_new_tokens
    sampled = rollouts * c.max_new_tokens + reflections * synthesis
    passes = 3 + c.checkpoint_activations + sizes["reference_model"]  # in forward passes
    passes = c.updates_per_step * passes + (c.updates_per_step > 1)
    forward = flops_per_token(model, row) / 3
    flops = forward * (rows * row * passes + sampled) / processes
    return "\n".join([
        *head,
        f"one step    {c.prompts_per_step} prompts x {c.samples_per_prompt} = {rollouts} rollouts, "
        f"<= {reflections} reflections",
        f"            {sampled:,} tokens sampled, {rows * row:,} trained on",
        f"            per process {batches} micro-batches, {flops / 1e15:.3g} PFLOP",
        *memory_lines(sizes, memory)])


def coldstart_table(config: dict, gpus: int = 0, gpu_gb: float = 0) -> str:
    """The plan of coldstart.py, from its knobs.

    With `problems` it samples first (§3.2), before AdamW's moments exist. With `examples` only the
    evaluation decodes.
    """
    c, model = SimpleNamespace(**config), read_model_config(config["init_from"])
    device, processes, memory = machine(c.device, gpus, gpu_gb)
    prompt, head = headline(c, model, processes, memory, device)
    sizes = {key: config[key] for key in SHARED_KNOBS} | {
        "config": model, "longest_prompt": prompt, "device": device, "limit": USABLE * memory,
        "reference_model": False, "world_size": processes, "replicas": c.replicas}
    text = f"one step    {c.batch_size} examples"
    if c.problems:
        queries = -(-c.queries_per_round // processes)
        synthesis = c.max_synthesis_tokens or 2 * c.max_new_tokens
        sizes |= {"samples_per_prompt": c.samples_per_prompt, "reflections": queries,
                  "rollouts": queries * c.samples_per_prompt,
                  "longest_row": prompt + 2 * c.max_new_tokens + SYNTHESIS_TOKENS + synthesis}
        text += (f"; one round {c.queries_per_round} prompts x {c.samples_per_prompt} rollouts, "
                 "at most one construction each")
    return "\n".join([*head, text, *memory_lines(sizes, memory)])


def eval_table(config: dict, gpus: int = 0, gpu_gb: float = 0) -> str:
    """The plan of eval.py, from its knobs: weights in `dtype` and rows decoding at once, on one
    device."""
    c, model = SimpleNamespace(**config), read_model_config(config["init_from"])
    device, _, memory = machine(c.device, gpus, gpu_gb)
    prompt, head = headline(c, model, 1, memory, device)
    limit = USABLE * memory

    def peak(rows: int) -> int:
        return eval_bytes(model, c.dtype, device, max_rows=rows, samples_per_prompt=c.samples,
                          longest_prompt=prompt, max_new_tokens=c.max_new_tokens)

    size = getattr(torch, c.dtype).itemsize
    rows = c.max_rows or most_rows(model, limit - peak(0), prompt, c.max_new_tokens, size)
    text = [*head, f"memory      {rows} rows at once, peak {peak(rows) / GIB:.2f} GiB of "
                   f"{limit / GIB:.2f} ({USABLE:.0%} of {memory / GIB:.0f}); at 0 rows "
                   f"{peak(0) / GIB:.2f}"]
    if peak(rows) > limit:
        while rows > 1 and peak(rows) > limit:
            rows -= 1
        fix = f"set --max_rows={rows}" if peak(rows) <= limit else "use a larger GPU"
        text.append(f"WARNING: that does not fit; {fix}")
    return "\n".join(text)


def eval_bytes(config: ModelConfig, dtype: str, device: str, *, max_rows: int,
               samples_per_prompt: int, longest_prompt: int, max_new_tokens: int) -> int:
    """Bytes of the weights in `dtype` and of max_rows rows decoding at once."""
    rows = sampling_bytes(config, max_rows, samples_per_prompt, longest_prompt, max_new_tokens,
                          dtype=dtype, device=device)
    return count_parameters(config)[0] * getattr(torch, dtype).itemsize + rows["peak"]


def headline(c: SimpleNamespace, model: ModelConfig, processes: int, memory: float,
             device: str) -> tuple[int, list[str]]:
    """Tokens of the longest prompt, and the header lines common to all plans."""
    files = c.problems.split(",") + [getattr(c, "eval_problems", "")]
    found = max(longest_question(path, c.instruction) for path in files)
    prompt = found or ASSUMED_PROMPT
    parameters, assumed = count_parameters(model)[0], "" if found else " (prompt length assumed)"
    return prompt, [
        f"model       {c.init_from}, {parameters:,} parameters, compute in {c.dtype}",
        f"machine     {processes} x {memory / GIB:.0f} GiB ({device})",
        f"at most     {prompt:,} + {c.max_new_tokens:,} tokens per row{assumed}"]


def memory_lines(sizes: dict, memory: float) -> list[str]:
    """Lines of persistent memory and of what each phase adds; if the peak exceeds memory, a warning
    with the knobs to change."""
    p = memory_plan(**sizes)

    def line(total: str, **shown: str) -> str:
        terms = " + ".join(f"{name.replace('_', ' ')} {p[key] / GIB:.2f}"
                           for name, key in shown.items() if p[key])
        return f"  {total:<10} {p[total] / GIB:7.2f}  {terms}"

    jobs = [name for name in ("rollouts", "reflections") if name in p]
    largest, limit = max(jobs, key=p.get), USABLE * memory
    text = [
        "memory per process, GiB",
        line("persistent", weights="weights", AdamW="moments", reference="reference"),
        line("update", gradients="gradients", copies="compute copies", activations="activations",
             temporaries="temporaries"),
        line("sampling", whole_model="unsharded", **{largest: largest})]
    for name in jobs:
        cache, prefill = (p[f"{name}: {what}"] / GIB for what in ("KV cache", "prefill"))
        text.append(f"                      {p[f'{name} at once']} {name} at once: "
                    f"KV cache {cache:.2f}, prefill {prefill:.2f}")
    text.append(f"  {'peak':<10} {p['peak'] / GIB:7.2f}  of {limit / GIB:.2f} "
                f"({USABLE:.0%} of {memory / GIB:.0f})")
    if p["peak"] > limit:
        turned = what_fits(limit, sizes)
        fix = "no knob is enough, use more or larger GPUs"
        if turned:
            fix = "set " + " ".join(f"--{key}={value}" for key, value in turned.items())
        text.append(f"WARNING: {p['peak'] / GIB:.1f} GiB do not fit into {limit / GIB:.1f}; {fix}")
    if sizes["device"] == "cuda" and sizes["dtype"] == "float32":
        text.append("WARNING: dtype = 'float32' on a GPU may find no fused attention, whose (T,T) "
                    "scores are not counted here; set --dtype=bfloat16")
    return text



TABLES = {"train": train_table, "coldstart": coldstart_table, "eval": eval_table}


def main(argv: list[str] | None = None) -> None:
    """Print the plan of a script and its arguments."""
    script, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    name = Path(script).stem
    if name not in TABLES:
        print(__doc__)
        raise SystemExit(script not in ("-h", "--help"))
    machine, rest = {"gpus": 0, "gpu_gb": 0.0}, []
    for argument in argv:
        key, _, value = argument.removeprefix("--").partition("=")
        if key not in machine:
            rest.append(argument)
            continue
        try:
            machine[key] = type(machine[key])(value)
        except ValueError:
            raise ValueError(f"{argument}: expected a number, e.g. --gpus=8 --gpu_gb=80") from None
    config = configure(dict(vars(importlib.import_module(name))), rest)
    if not config["init_from"]:
        raise ValueError("init_from is not set; pass --init_from=FOLDER, its config.json is enough")
    print(TABLES[name](config, **machine))


if __name__ == "__main__":
    run_script(main)
