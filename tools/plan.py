"""What a run will cost, from config.json and the knobs alone, before anything is loaded.

    python train.py config/aime.py --plan=True                          # for the GPUs that config/aime.py names
    python train.py config/aime.py --plan=True --plan_gpus=2 --plan_gpu_gb=24 --init_from=FOLDER    # one config.json is enough
    python eval.py config/eval_aime.py --plan=True --plan_gpu_gb=80 --init_from=FOLDER              # coldstart.py likewise

Every number follows from model.py: parameters are counted on the meta device, activations are what a block leaves for its
backward pass, sampling is its cache. tests/test_plan.py holds the formulas against measured bytes. Responses are taken at
their cap, so this is an upper bound; it counts tensors, and USABLE leaves the rest of a GPU to the CUDA context, NCCL and
fragmentation. Deliberately missing: time, which depends on the machine; RoPE's tables, some kilobytes; fp32 attention on a GPU
where no fused kernel exists.
"""
import json
import os
import re
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from data import load_problems
from model import CACHE_BLOCK, LOGITS_PER_CHUNK, CausalLM, ModelConfig, check_folder, flops_per_token, num_params

GIB = 2**30
USABLE = 0.92             # of a GPU's memory
SYNTHESIS_WORDS = 600     # tokens of a synthesis prompt beside its question and the two responses (reflect.TEMPLATES: 530)
MOST_ROWS = 4096          # that max_rows = 0 lets decode at once: more gain nothing
ASSUMED_PROMPT = 1024     # tokens of the longest prompt where there is no problem file yet; DeepScaleR's is about that


def read_model_config(init_from: str) -> ModelConfig:
    """ModelConfig of a Hugging Face folder, or of a hub id, of which config.json alone is fetched. One-line errors."""
    path = Path(init_from) / "config.json"
    if path.parent.is_dir():
        check_folder(path.parent)
    if not path.is_file():
        if path.parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", init_from):
            raise FileNotFoundError(f"no config.json at {path.parent}; pass a Hugging Face folder or a hub id (--plan=True needs "
                                    "only the same architecture, e.g. --init_from=Qwen/Qwen3-8B)")
        from huggingface_hub import hf_hub_download
        try:
            path = Path(hf_hub_download(init_from, "config.json"))
        except Exception as e:  # no network, no such repository: the hub's own text runs over many lines
            raise FileNotFoundError(f"{init_from!r} is no folder here and the hub did not serve its config.json "
                                    f"({type(e).__name__}); download the model where there is a network and pass "
                                    "--init_from=FOLDER (config.json alone is enough for --plan=True)") from None
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not valid JSON (line {e.lineno}: {e.msg}); copy it again") from None


def activation_bytes(config: ModelConfig, *, dtype: str, sharded: bool, device: str) -> tuple[int, int, int]:
    """Bytes per token kept for the backward pass: (inside one block, as a block's input, by embedding + final norm + head).

    Unsharded bf16 is autocast: the residual stream and RMSNorm stay fp32, and every Linear casts its input for itself.
    Sharded bf16 is FSDP's mixed precision: all of it is bf16. A CPU's RMSNorm is not fused: it keeps x and x / rms in fp32.
    """
    d, ff, heads, kv_heads = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
    q, kv, autocast = heads * config.head_dim, kv_heads * config.head_dim, dtype == "bfloat16" and not sharded
    c = 2 if dtype == "bfloat16" else 4          # operands and results of products
    r = 4 if autocast else c                     # the residual stream, and what RMSNorm reads
    qkv_inputs, mlp_inputs = (3, 2) if autocast else (1, 1)

    def norm(size, rows):
        return size * (r if device == "cuda" else 8) + 4 * rows  # its input, 1 / rms of each row

    block = norm(d, 1) + qkv_inputs * d * c                      # input_layernorm; what q_proj, k_proj, v_proj read
    block += norm(q, heads) + norm(kv, kv_heads) if config.qk_norm else 0
    block += (2 * q + 2 * kv) * c + 4 * heads + q * c            # attention: rotated q, k, v, result, log-sum-exp; o_proj's input
    block += norm(d, 1) + mlp_inputs * d * c + 4 * ff * c        # MLP: gate, silu(gate), up, their product
    return block, d * r, norm(d, 1) + d * r + 24                 # 24: ids and targets (int64), log-sum-exp, entropy


def count_parameters(config: ModelConfig) -> tuple[int, int, int, int]:
    """Numbers in the model, in one block, in the matrices of all blocks; and how many tensors. On the meta device."""
    with torch.device("meta"):
        model = CausalLM(replace(config, num_hidden_layers=1))  # all blocks are alike
    L, block = config.num_hidden_layers, list(model.model["layers"].parameters())
    size, matrices = sum(w.numel() for w in block), sum(w.numel() for w in block if w.dim() == 2)
    return num_params(model) + (L - 1) * size, size, L * matrices, len(list(model.parameters())) + (L - 1) * len(block)


def cache_bytes(config: ModelConfig, rows: int, columns: int, dtype: str) -> int:
    """Keys and values of `rows` rows; columns come in whole blocks."""
    columns = -(-columns // CACHE_BLOCK) * CACHE_BLOCK
    per_column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return rows * columns * per_column * (2 if dtype == "bfloat16" else 4)


def sampling_bytes(config: ModelConfig, rows: int, samples_per_prompt: int, prompt: int, new: int, *, dtype: str, autocast: bool,
                   device: str) -> dict[str, int]:
    """Bytes of `rows` rows that decode together, beside the weights: {'KV cache', 'prefill', 'peak'}. Lengths in tokens."""
    c, V = 2 if dtype == "bfloat16" else 4, config.num_tokens
    _, of_input, _ = activation_bytes(config, dtype=dtype, sharded=not autocast, device=device)
    cache, prompts = cache_bytes(config, rows, prompt + new - 1, dtype), -(-rows // samples_per_prompt)
    # beside it: the head that decoding_head casts; growing copies one layer's keys, sampling holds logits, log-probs, their exp
    # and its sum in fp64
    head = V * config.hidden_size * (4 if device == "cpu" and c == 2 else 2 * autocast)
    decode = cache + head + max(cache // (2 * config.num_hidden_layers), rows * V * 24,
                                2 * config.vocab_size * config.hidden_size * autocast * (device == "cpu"))
    # rows that join later are few at a time: their prefill beside a full cache is left to the reserve
    prefill = cache_bytes(config, prompts, prompt, dtype) + prompts * prompt * (3 * config.intermediate_size * c + 4 * of_input)
    return {"KV cache": cache, "prefill": prefill, "peak": max(prefill, decode)}


def rows_that_fit(room: float, most: int, bytes_of) -> int:
    """max_rows = 0: how many of `most` rows `room` bytes hold, at least one; bytes_of(rows) grows with the rows."""
    return max(1, bisect_right(range(1, min(most, MOST_ROWS) + 1), room, key=bytes_of))


def rows_now(model: CausalLM, most: int, samples_per_prompt: int, prompt: int, new: int) -> int:
    """max_rows = 0 in a running process: the rows that the memory it may still take holds, USABLE of it."""
    device, dtype = model.head_weight.device, model.compute_dtype
    if device.type == "cuda":  # what the driver has left, and what torch holds without using it
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    autocast = torch.is_autocast_enabled(device.type)
    room = USABLE * free - dtype.itemsize * num_params(model) * autocast  # autocast's copies of the weights may be yet to come
    return rows_that_fit(room, most, lambda rows: sampling_bytes(
        model.config, rows, samples_per_prompt, prompt, new, dtype=str(dtype).removeprefix("torch."), autocast=autocast,
        device=device.type)["peak"])


def memory_plan(config: ModelConfig, *, max_rows: int, longest_prompt: int, max_new_tokens: int, tokens_per_microbatch: int,
                dtype: str, samples_per_prompt: int = 1, reflections: int = 0, max_synthesis_tokens: int = 0,
                rollouts: int = 0, limit: float = 0, world_size: int = 1, offload: bool = False, reference_model: bool = True,
                full_divergence: bool = False, teacher: bool = False, checkpoint_activations: bool = False,
                device: str = "cuda") -> dict[str, int]:
    """Bytes on one GPU by part, with their sums 'persistent', 'update', 'sampling' and 'peak'; the rows that decode at once.

    peak = persistent + max(update, sampling): gradients and activations are gone when sampling begins. Lengths in tokens.
    dtype: of products; masters, gradients and AdamW's moments are fp32. world_size: processes that share one copy of the
    model (FSDP2). reflections: a process writes at most so many a step. max_rows 0: each phase takes the rows that `limit`
    bytes hold, of the step's `rollouts` and reflections. full_divergence: OPSD over the whole vocabulary. teacher: OPSD's
    reads a response below a right one.
    """
    total, block, matrices, tensors = count_parameters(config)
    L, V, root = config.num_hidden_layers, config.num_tokens, total - config.num_hidden_layers * block
    head = config.vocab_size * config.hidden_size
    c, sharded = 2 if dtype == "bfloat16" else 4, world_size > 1
    autocast = c == 2 and not sharded
    share = 0 if offload else 4 * -(-total // world_size)                    # fp32, one number a parameter
    parts = {"weights": share, "moments": 2 * share + 4 * tensors, "reference": share * reference_model}
    persistent = sum(parts.values())

    # The update. A row longer than tokens_per_microbatch is a micro-batch of its own.
    longest = longest_prompt + max_new_tokens + teacher * (max_new_tokens + SYNTHESIS_WORDS)
    tokens = max(tokens_per_microbatch, min(longest, config.max_position_embeddings))
    in_block, of_input, of_ends = activation_bytes(config, dtype=dtype, sharded=sharded, device=device)
    mlp = config.intermediate_size * c
    forward = tokens * (3 * mlp + 4 * of_input)                # temporaries of a block without gradient (the reference), ...
    backward = tokens * (2 * mlp + of_input - of_ends)         # ... and of the last one's backward; the head's states are freed
    chunk = min(tokens * V, max(LOGITS_PER_CHUNK[device], V if full_divergence else tokens))
    logits = 40 if full_divergence else (8 if c == 4 else 10) if chunk == tokens * V else 16 if device == "cpu" and c == 2 else 12
    pending = c * head if sharded else 4 * head * config.tie_word_embeddings  # the head's gradient waits for the embedding's
    parts |= {
        "gradients": share,
        "compute copies": c * ((1 + reference_model) * root + 2 * block) if sharded else 2 * matrices * autocast,
        "activations": tokens * (of_ends + L * (of_input if checkpoint_activations else in_block)),
        "head": logits * chunk + (8 if full_divergence else 4) * head + 2 * head * autocast + tokens * of_input,
        "block": max(forward * reference_model, backward + pending + tokens * in_block * checkpoint_activations
                     + (c + 4) * block * sharded),
        "reduction": (c + 4) * root * sharded}                 # of the root's gradient, last, when the activations are gone
    update = parts["gradients"] + parts["compute copies"] + max(
        parts["activations"] + max(parts["head"], parts["block"]), parts["reduction"])
    parts["temporaries"] = update - sum(parts[name] for name in ("gradients", "compute copies", "activations"))

    # Sampling: rollouts, then reflections, whose prompts hold two whole responses; prompts are prefilled once.
    parts["unsharded"] = c * (total + root * reference_model) if sharded else parts["compute copies"]
    # Held-out problems may be more than a step's rollouts: up to max_rows of them decode at once, too.
    jobs = {"rollouts": (max_rows or rollouts or MOST_ROWS, samples_per_prompt, longest_prompt, max_new_tokens)}
    if reflections:
        new = max_synthesis_tokens or 2 * max_new_tokens
        prompt = min(longest_prompt + 2 * max_new_tokens + SYNTHESIS_WORDS, config.max_position_embeddings - new)
        jobs["reflections"] = reflections, 1, prompt, new      # what does not fit the context is dropped

    def need(rows: int, *shape: int) -> dict[str, int]:
        return sampling_bytes(config, rows, *shape, dtype=dtype, autocast=autocast, device=device)

    room = limit - persistent - parts["unsharded"]
    for name, (most, *shape) in jobs.items():
        rows = min(most, max_rows or rows_that_fit(room, most, lambda rows, shape=shape: need(rows, *shape)["peak"]))
        needed = need(rows, *shape)
        parts |= {f"{name} at once": rows, f"{name}: KV cache": needed["KV cache"], f"{name}: prefill": needed["prefill"],
                  name: needed["peak"]}
    sampling = parts["unsharded"] + max(parts[name] for name in jobs)
    return parts | {"persistent": persistent, "update": update, "sampling": sampling, "peak": persistent + max(update, sampling)}


def what_fits(limit: float, sizes: dict) -> dict | None:
    """Knobs to turn until memory_plan(**sizes) needs at most `limit` bytes, cheapest first; None if no knob is enough."""
    turned: dict = {}
    while (plan := memory_plan(**sizes | turned))["peak"] > limit:
        now, room = sizes | turned, limit - plan["persistent"]
        row = now["longest_prompt"] + now["max_new_tokens"]
        if plan["update"] > room and not now["checkpoint_activations"]:
            turned["checkpoint_activations"] = True
        elif plan["update"] > room and now["tokens_per_microbatch"] > row:
            turned["tokens_per_microbatch"] = max(now["tokens_per_microbatch"] // 2, row)
        elif plan["update"] <= room and now["max_rows"] > 1:
            turned["max_rows"] = now["max_rows"] // 2
        elif now["max_new_tokens"] > 256:
            turned["max_new_tokens"] = now["max_new_tokens"] // 2
        else:
            return None
    return turned


def longest_question(path: str, instruction: str) -> int:
    """Tokens of a problem file's longest prompt, from above: mathematics has two characters a token or more. 0: no file."""
    if not Path(path).is_file():
        return 0
    problems = load_problems(path, check_answers=False)
    return (max(len(p.question) for p in problems) + len(instruction)) // 2 + 32


def machine(config: dict) -> tuple[str, int, float]:
    """(device, processes, bytes of memory of each): for plan = True what plan_gpus and plan_gpu_gb say, else what is here."""
    asked, gb = (config["plan"] and config[key] for key in ("plan_gpus", "plan_gpu_gb"))
    cuda = torch.cuda.is_available() and config["device"] != "cpu"
    processes = asked or int(os.environ.get("WORLD_SIZE", 0)) or (torch.cuda.device_count() if cuda and config["plan"] else 1)
    if gb:
        return "cuda", processes, gb * GIB
    if cuda:
        return "cuda", processes, torch.cuda.get_device_properties(0).total_memory
    if asked:
        raise ValueError(f"plan_gpus = {asked}, but there is no GPU here to measure; add --plan_gpu_gb=80 or so")
    return "cpu", processes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes


SHARED_KNOBS = ("max_rows", "max_new_tokens", "tokens_per_microbatch", "dtype", "samples_per_prompt", "max_synthesis_tokens",
                "checkpoint_activations", "offload")  # of train.py and coldstart.py, which memory_plan knows by the same name


def plan_table(config: dict) -> str:
    """The plan of a run as text, from train.py's resolved knobs. Its last lines warn where memory is exceeded, with the
    knobs to turn."""
    c, model = SimpleNamespace(**config), read_model_config(config["init_from"])
    device, processes, memory = machine(config)
    prompt, head = headline(c, model, processes, memory, device)
    rollouts = c.prompts_per_step * c.samples_per_prompt
    reflections = c.prompts_per_step * c.m_max if c.method in ("tapo", "sft") and c.prefix_mode != "copy" else 0
    sizes = {key: config[key] for key in SHARED_KNOBS} | {
        "config": model, "longest_prompt": prompt, "device": device, "rollouts": -(-rollouts // processes),
        "reflections": -(-reflections // processes), "limit": USABLE * memory,
        "reference_model": bool(c.log_kl or c.kl_coef or (c.method == "opsd" and c.opsd_teacher == "initial")),
        "teacher": c.method == "opsd", "full_divergence": c.method == "opsd" and c.opsd_loss == "jsd",
        "world_size": processes // c.replicas}

    rows, row = rollouts + reflections, prompt + c.max_new_tokens
    batches = -(-rows // (max(1, c.tokens_per_microbatch // row) * processes))
    sampled = rollouts * c.max_new_tokens + reflections * (c.max_synthesis_tokens or 2 * c.max_new_tokens)
    passes = c.updates_per_step * (3 + c.checkpoint_activations + sizes["reference_model"]) + (c.updates_per_step > 1)
    flops = flops_per_token(model, row) / 3 * (rows * row * passes + sampled) / processes  # a third: one forward pass
    return "\n".join([
        *head,
        f"one step    {c.prompts_per_step} prompts x {c.samples_per_prompt} = {rollouts} rollouts, <= {reflections} reflections",
        f"            {sampled:,} tokens sampled, {rows * row:,} trained on",
        f"            on each process {batches} micro-batches, {flops / 1e15:.3g} PFLOP",
        *memory_lines(sizes, memory)])


def coldstart_table(config: dict) -> str:
    """The plan of coldstart.py on its own rollouts (§3.2), from its knobs. While it samples, AdamW's moments do not exist yet,
    but a second copy of the weights does, which is less."""
    c, model = SimpleNamespace(**config), read_model_config(config["init_from"])
    device, processes, memory = machine(config)
    prompt, head = headline(c, model, processes, memory, device)
    sizes = {key: config[key] for key in SHARED_KNOBS} | {
        "config": model, "longest_prompt": prompt, "device": device, "reference_model": False, "limit": USABLE * memory,
        "rollouts": -(-c.queries_per_round // processes) * c.samples_per_prompt,
        "reflections": -(-c.queries_per_round // processes), "world_size": processes // c.replicas}
    return "\n".join([
        *head, f"one round   {c.queries_per_round} prompts x {c.samples_per_prompt} rollouts, a construction each at most",
        *memory_lines(sizes, memory)])


def eval_table(config: dict) -> str:
    """The plan of eval.py, from its knobs: weights in `dtype` and the rows that decode at once, on one device."""
    c, model = SimpleNamespace(**config), read_model_config(config["init_from"])
    device, _, memory = machine(config | {"plan_gpus": 0})
    prompt, head = headline(c, model, 1, memory, device)
    limit = USABLE * memory

    def peak(rows: int) -> int:
        return eval_bytes(model, c.dtype, device, max_rows=rows, samples_per_prompt=c.samples, longest_prompt=prompt,
                          max_new_tokens=c.max_new_tokens)

    rows = c.max_rows or rows_that_fit(limit, MOST_ROWS, peak)
    text = [*head, f"memory      {rows} rows at once, peak {peak(rows) / GIB:.2f} GiB of {limit / GIB:.2f} "
                   f"({USABLE:.0%} of {memory / GIB:.0f}); without rows {peak(0) / GIB:.2f}"]
    if peak(rows) > limit:
        rows = rows_that_fit(limit, rows, peak)
        text.append("WARNING: that does not fit; " + (f"set --max_rows={rows}" if peak(rows) <= limit else "use a larger GPU"))
    return "\n".join(text)


def eval_bytes(config: ModelConfig, dtype: str, device: str, *, max_rows: int, samples_per_prompt: int, longest_prompt: int,
               max_new_tokens: int) -> int:
    """Bytes of the weights in `dtype` and of the rows that decode at once."""
    rows = sampling_bytes(config, max_rows, samples_per_prompt, longest_prompt, max_new_tokens, dtype=dtype, autocast=False,
                          device=device)
    return count_parameters(config)[0] * getattr(torch, dtype).itemsize + rows["peak"]


def headline(c: SimpleNamespace, model: ModelConfig, processes: int, memory: float, device: str) -> tuple[int, list[str]]:
    """Tokens of the longest prompt, and the lines that every plan begins with."""
    found = max(longest_question(path, c.instruction) for path in c.problems.split(","))
    prompt = found or ASSUMED_PROMPT
    return prompt, [f"model       {c.init_from}, {count_parameters(model)[0]:,} parameters, products in {c.dtype}",
                    f"machine     {processes} x {memory / GIB:.0f} GiB ({device})",
                    f"at most     {prompt:,} + {c.max_new_tokens:,} tokens a row{'' if found else ' (prompt length assumed)'}"]


def memory_lines(sizes: dict, memory: float) -> list[str]:
    """What a process keeps and what each phase needs beside it; where that is too much, the knobs to turn."""
    p = memory_plan(**sizes)

    def line(total: str, **shown: str) -> str:
        terms = " + ".join(f"{name.replace('_', ' ')} {p[key] / GIB:.2f}" for name, key in shown.items() if p[key])
        return f"  {total:<10} {p[total] / GIB:7.2f}  {terms}"

    largest = max((name for name in ("rollouts", "reflections") if name in p), key=p.get)
    text = [
        "memory of a process, GiB",
        line("persistent", weights="weights", AdamW="moments", reference="reference"),
        line("update", gradients="gradients", copies="compute copies", activations="activations",
             temporaries="temporaries"),
        line("sampling", whole_model="unsharded", **{largest: largest}),
        *(f"                      {p[f'{name} at once']} {name} at once: KV cache {p[f'{name}: KV cache'] / GIB:.2f}, "
          f"prefill {p[f'{name}: prefill'] / GIB:.2f}" for name in ("rollouts", "reflections") if name in p),
        f"  {'peak':<10} {p['peak'] / GIB:7.2f}  of {USABLE * memory / GIB:.2f} ({USABLE:.0%} of {memory / GIB:.0f})"]
    if p["peak"] > USABLE * memory:
        turned = what_fits(USABLE * memory, sizes)
        fix = ("set " + " ".join(f"--{key}={value}" for key, value in turned.items()) if turned else
               "no knob is enough, use more or larger GPUs")
        text.append(f"WARNING: {p['peak'] / GIB:.1f} GiB do not fit into {USABLE * memory / GIB:.1f}; {fix}")
    if sizes["device"] == "cuda" and sizes["dtype"] == "float32":
        text.append("WARNING: dtype = 'float32' on a GPU may find no fused attention, whose (T,T) scores are not counted here; "
                    "set --dtype=bfloat16")
    return text
