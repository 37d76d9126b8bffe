"""Memory estimates: the number of decoding rows for `max_rows = 0` and the micro-batch size for
`tokens_per_microbatch = 0`.

Formulas count the bytes of model.py's and rollout.py's tensors; tests/tools/test_plan.py compares
them with measured bytes, and tools/plan.py prints a run's needs from the same formulas.
"""
import os
import re
from bisect import bisect_right
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from model import LOGITS_PER_CHUNK, ModelConfig, count_parameters

MEMORY_SHARE = 0.8      # share of free memory to fill
MOST_ROWS = 4096        # limit for max_rows = 0; more rows gain nothing
MOST_TOKENS = {"cpu": 2**12, "cuda": 2**15}  # limit for tokens_per_microbatch = 0
KEEP_SHARE = 1 / 8      # share of all memory: larger decoders and samplers are freed after use
COLUMNS = 32            # smallest bucket of KV-cache columns
PREFILL_TOKENS = 2**14  # padded tokens of one prefill forward


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate."""
    if device.type == "cuda":  # free in the driver, and cached by torch's allocator but unused
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    return host_memory("MemAvailable")


def host_memory(name: str) -> int:
    """This process's share of host memory in bytes. name: the entry of Linux's /proc/meminfo, whose
    MemAvailable includes reclaimable page cache; elsewhere (macOS) all physical memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = 1024 * int(re.search(rf"{name}:\s+(\d+) kB", meminfo.read_text())[1])
    else:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def total_memory(device: torch.device) -> int:
    """Total bytes of the device; on a CPU this process's share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return host_memory("MemTotal")


# --------------------------------------------------------------------------------------------------
# rows


def bucket(n: int, least: int = 1) -> int:
    """Round n up to a bucket: a multiple of `least`; above 16 * least at most n / 8 is added.
    Rows 1 2 .. 16 18 20 .. 32 36 ..; columns 32 64 .. 512 576 640 .. 1024 1152 .."""
    step = max(least, 1 << max(0, (n - 1).bit_length() - 4))
    return -(-n // step) * step


def memory_of(config, rows: int, prompt: int, new: int, size: int) -> float:
    """Estimated bytes to sample `rows` rows of `prompt` + `new` tokens; size: bytes per element."""
    L = config.num_hidden_layers  # reshape copies one layer at a time
    column = 2 * L * config.num_key_value_heads * config.head_dim * size
    cache = (1 + 1 / L) * bucket(prompt + new, COLUMNS) * column
    decoding = cache + 24 * config.num_tokens  # logits, p, fp64 sums of p
    prefilling = column + (3 * config.intermediate_size + 8 * config.hidden_size) * size
    return bucket(rows) * decoding + max(prompt, min(rows * prompt, PREFILL_TOKENS)) * prefilling


def rows_that_fit(model, prompt: int, new: int, held: int = 0) -> int:
    """max_rows = 0: number of rows that fit in MEMORY_SHARE of free memory, at least 1.

    prompt, new: tokens per row. held: bytes that the decoder already has for these rows.
    """
    head = model.head_weight
    return most_rows(model.config, free_memory(head.device) + held, prompt, new, head.itemsize)


def most_rows(config, free: float, prompt: int, new: int, size: int) -> int:
    """Largest number of rows, 1 to MOST_ROWS, that fits in MEMORY_SHARE of `free` bytes."""
    fit = bisect_right(range(1, MOST_ROWS + 1), MEMORY_SHARE * free,
                       key=lambda rows: memory_of(config, rows, prompt, new, size))
    return max(1, fit)


# --------------------------------------------------------------------------------------------------
# micro-batches


def tokens_that_fit(model, optimizer, *, device: str, **how) -> int:
    """tokens_per_microbatch = 0: the largest micro-batch that fits on this rank. how: arguments of
    `update_bytes`. Call before the first update: memory is set aside for gradients, for AdamW's two
    moments unless they were loaded, and for what a decoder may keep."""
    here = [p for p in model.parameters() if p.device.type == device]  # none with offload
    numbers = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in here)
    free = free_memory(torch.device(device)) - (4 if optimizer.state else 12) * numbers
    free -= int(KEEP_SHARE * total_memory(torch.device(device)))
    return most_tokens(model.config, free, device=device,
                       checkpoint_activations=model.checkpoint_activations, **how)


def most_tokens(config: ModelConfig, free: float, *, device: str, **how) -> int:
    """Largest micro-batch in padded tokens, a power of two from 256 to MOST_TOKENS, that fits in
    MEMORY_SHARE of `free` bytes. A power of two, so that a run resumed with about the same free
    memory gets the same size."""
    tokens = MOST_TOKENS[device]
    while tokens > 256 and \
            update_bytes(config, tokens, device=device, **how)["peak"] > MEMORY_SHARE * free:
        tokens //= 2
    return tokens


def update_bytes(config: ModelConfig, tokens: int, *, dtype: str, world_size: int, device: str,
                 reference_model: bool = True, full_divergence: bool = False,
                 checkpoint_activations: bool = False) -> dict[str, int]:
    """Bytes of a micro-batch of `tokens` padded tokens, besides weights, gradients and moments: by
    part, and at the 'peak'. tests/tools/test_plan.py compares them with measured bytes.

    reference_model: include its forward without gradient. full_divergence: OPSD over the whole
    vocabulary.
    """
    total, block, _ = count_parameters(config)
    L, V, c = config.num_hidden_layers, config.num_tokens, 2 if dtype == "bfloat16" else 4
    root, head = total - L * block, config.vocab_size * config.hidden_size
    wrapped = world_size > 1 or c == 2  # by FSDP, see parallel.shard
    # of a block or the root: its gradient, cast to fp32 and reduced to a shard
    reducing = max(c + 4, 4 + 4 / world_size) * wrapped
    in_block, of_input, of_ends = activation_bytes(config, dtype=dtype, device=device)
    mlp = config.intermediate_size * c
    # temporaries of one block: forward without gradient (the reference), ...
    forward = tokens * (3 * mlp + 4 * of_input)
    # ... and backward of the last block, after the head's activations are freed
    backward = tokens * (2 * mlp + of_input - of_ends)
    # the head's gradient is held until the embedding's is computed
    backward += c * head if wrapped else 4 * head * config.tie_word_embeddings
    backward += tokens * in_block * checkpoint_activations + reducing * block
    chunk = min(tokens * V, max(LOGITS_PER_CHUNK[device], V if full_divergence else tokens))
    if full_divergence:  # bytes per logit: ten fp32 tensors
        logit = 40
    elif chunk == tokens * V:
        logit = 8 if c == 4 else 10
    else:
        logit = 16 if device == "cpu" and c == 2 else 12
    # a world of one keeps all weights gathered, see parallel.shard
    gathered = (1 + reference_model) * root + 2 * block if world_size > 1 else total
    parts = {
        "compute copies": c * gathered * wrapped,
        "activations": tokens * (of_ends + L * (of_input if checkpoint_activations else in_block)),
        "head": logit * chunk + (8 if full_divergence else 4) * head + tokens * of_input,
        "block": max(forward * reference_model, backward),
        # FSDP's reduction of the root's gradient comes last, after the activations are freed
        "reduction": reducing * root}
    passing = parts["activations"] + max(parts["head"], parts["block"])
    return parts | {"peak": parts["compute copies"] + max(passing, parts["reduction"])}


def activation_bytes(config: ModelConfig, *, dtype: str, device: str) -> tuple[int, int, int]:
    """Bytes per token saved for the backward pass: (inside one block, as a block's input, by
    embedding + final norm + head). RMSNorm on a CPU is not fused: it saves x and x / rms in fp32.
    """
    d, ff = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, kv = heads * config.head_dim, kv_heads * config.head_dim
    c = 2 if dtype == "bfloat16" else 4

    def norm(size, rows):
        return size * (c if device == "cuda" else 8) + 4 * rows  # its input, 1 / rms of each row

    block = norm(d, 1) + d * c  # input_layernorm; the input of q_proj, k_proj and v_proj
    block += norm(q, heads) + norm(kv, kv_heads) if config.qk_norm else 0
    # attention: rotated q and k, v, o_proj's input, log-sum-exp
    block += (2 * q + 2 * kv) * c + 4 * heads
    # MLP: gate, silu(gate), up, their product
    block += norm(d, 1) + d * c + 4 * ff * c
    # 24: ids and targets (int64), log-sum-exp, entropy
    return block, d * c, norm(d, 1) + d * c + 24
