"""What a run will cost, from config.json and the knobs alone, before anything is loaded.

    python train.py config/aime.py --plan=True

Every number follows from model.py: parameters are counted on the meta device, activations are what a block leaves for its
backward pass, the sampler's share is its cache. tests/test_plan.py holds each formula against measured bytes. Responses
are taken at their cap, so a plan is an upper bound; it is memory of tensors: USABLE leaves the rest of a GPU to the CUDA
context, NCCL and fragmentation. Deliberately missing: time, which depends on the machine.
"""
import json
import os
import re
from pathlib import Path

import torch

from model import CACHE_BLOCK, LOGITS_PER_CHUNK, CausalLM, ModelConfig, flops_per_token

GIB = 2**30
USABLE = 0.92             # of a GPU's memory
SYNTHESIS_WORDS = 600     # tokens of the synthesis prompt beside its question and the two responses (reflect.TEMPLATES: 530)
ASSUMED_PROMPT = 1024     # tokens of the longest prompt, where there is no problem file to look at


def read_model_config(init_from: str) -> ModelConfig:
    """ModelConfig of a Hugging Face folder, or of a hub id, of which config.json alone is fetched. One-line errors."""
    path = Path(init_from).expanduser() / "config.json"
    if not path.is_file():
        if path.parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", init_from):
            raise FileNotFoundError(f"no config.json at {path.parent}; for a plan any folder or hub id of the same architecture "
                                    "will do, e.g. --init_from=Qwen/Qwen3-8B")
        from huggingface_hub import hf_hub_download
        try:
            path = Path(hf_hub_download(init_from, "config.json"))
        except Exception as e:  # no network, no such repository: the hub's own text runs over many lines
            raise FileNotFoundError(f"the hub did not serve config.json of {init_from!r} ({type(e).__name__}); put that one "
                                    "file into a folder and pass --init_from=FOLDER") from None
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not valid JSON (line {e.lineno}: {e.msg}); copy it again") from None


def activation_bytes(config: ModelConfig, *, dtype: str, sharded: bool, device: str) -> tuple[int, int, int]:
    """Bytes per token saved for the backward pass: (by one block, as a block's input, by embedding + final norm + head).

    Unsharded bf16 is autocast: the residual stream and RMSNorm stay fp32, and every Linear casts its input for itself.
    Sharded bf16 is FSDP's mixed precision: everything is bf16. A CPU has no fused RMSNorm and keeps x and x / rms in fp32.
    """
    d, ff, hs = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv, heads = config.num_attention_heads * hs, config.num_key_value_heads * hs, config.num_attention_heads
    autocast = dtype == "bfloat16" and not sharded
    c = 2 if dtype == "bfloat16" else 4          # a product's operands and result
    r = 4 if autocast else c                     # the residual stream, and what RMSNorm reads
    qkv_inputs, mlp_inputs = (3, 2) if autocast else (1, 1)

    def norm(size, rows):
        return size * (r if device == "cuda" else 8) + 4 * rows  # its input (on a CPU also normalised), 1 / rms per row

    block = norm(d, 1) + qkv_inputs * d * c                     # input_layernorm; what q_proj, k_proj, v_proj read
    if config.qk_norm:
        block += norm(q, heads) + norm(kv, config.num_key_value_heads)
    block += (3 * q + 2 * kv) * c + 4 * heads                   # rotated q and k, v, result as (nh,T) and as (T,nh), log-sum-exp
    block += norm(d, 1) + mlp_inputs * d * c + 4 * ff * c       # MLP: gate, silu(gate), up, their product
    return block, d * r, norm(d, 1) + d * r + 24       # 24: ids, targets (int64), log-sum-exp, entropy


def cache_bytes(config: ModelConfig, rows: int, columns: int, dtype: str) -> int:
    """Keys and values of `rows` rows; columns come in whole blocks."""
    columns = -(-columns // CACHE_BLOCK) * CACHE_BLOCK
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return rows * columns * heads * (2 if dtype == "bfloat16" else 4)


def memory_plan(config: ModelConfig, *, max_rows: int, longest_prompt: int, max_new_tokens: int, tokens_per_microbatch: int,
                dtype: str, world_size: int = 1, samples_per_prompt: int = 1, synthesis_rows: int = 0,
                max_synthesis_tokens: int = 0, reference_model: bool = True, checkpoint_activations: bool = False,
                offload: bool = False, device: str = "cuda") -> dict[str, int]:
    """Bytes on one GPU by part, and their sums 'persistent', 'update', 'sampling' and 'peak'.

    world_size: processes that one copy of the model is sharded over (FSDP2). synthesis_rows: reflections that one process
    writes at once, 0 for methods without. dtype: of products; masters, gradients and AdamW's moments are fp32.
    peak = persistent + max(update, sampling): gradients and activations are gone when sampling begins.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    params, blocks, L = list(model.parameters()), model.model["layers"], config.num_hidden_layers
    total, block = sum(p.numel() for p in params), sum(p.numel() for p in blocks[0].parameters())
    root = total - L * block                                 # embedding, final norm, head: FSDP's root unit
    c, sharded, V = 2 if dtype == "bfloat16" else 4, world_size > 1, config.num_tokens
    autocast, linear = dtype == "bfloat16" and not sharded, sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    head = config.vocab_size * config.hidden_size
    kept = 0 if offload else 4 * -(-total // world_size)     # one fp32 copy of this process's shard

    parts = {"weights": kept, "moments": 2 * kept + 4 * len(params), "reference": kept * reference_model}
    persistent = sum(parts.values())

    # the update: one micro-batch, whose longest row may exceed the budget
    tokens = max(tokens_per_microbatch, longest_prompt + max_new_tokens)
    of_block, of_input, of_ends = activation_bytes(config, dtype=dtype, sharded=sharded, device=device)
    forward = tokens * (3 * config.intermediate_size * c + 4 * of_input)               # a block's temporaries, no gradient
    backward = tokens * (2 * config.intermediate_size * c + of_input - of_ends)        # the head's states are gone by then
    chunk = min(tokens, max(1, LOGITS_PER_CHUNK.get(device, 2**24) // V))
    copies = (8 if c == 4 else 10) if chunk == tokens else 16 if device == "cpu" and c == 2 else 12  # of one chunk's logits
    dhead = 4 * head if not sharded else c * head            # its gradient waits: for the embedding's if tied, for FSDP's root
    parts |= {
        "gradients": kept,
        "compute copies": c * ((1 + reference_model) * root + 2 * block) if sharded else linear * 2 * autocast,
        "activations": tokens * (of_ends + L * (of_input if checkpoint_activations else of_block)),
        "head": copies * chunk * V + 4 * head + (2 * head if autocast else 0) + tokens * of_input,
        "block": max(forward * reference_model, backward + (tokens * of_block if checkpoint_activations else 0)
                     + dhead * (config.tie_word_embeddings or sharded) + ((c + 4) * block if sharded else 0)),
        "reduction": (c + 4) * root if sharded else 0}       # of the root's gradient, when the activations are gone
    update = parts["gradients"] + parts["compute copies"] + max(
        parts["activations"] + max(parts["head"], parts["block"]), parts["reduction"])

    # sampling: rollouts, then reflections, whose prompts hold two whole responses
    parts["unsharded"] = c * (total + root * reference_model) if sharded else parts["compute copies"]
    jobs = [(max_rows, -(-max_rows // samples_per_prompt), longest_prompt, max_new_tokens)]
    if synthesis_rows:
        prompt = longest_prompt + 2 * max_new_tokens + SYNTHESIS_WORDS
        room = max_synthesis_tokens or 2 * max_new_tokens
        prompt = min(prompt, config.max_position_embeddings - room)   # longer ones are dropped
        jobs.append((synthesis_rows, synthesis_rows, prompt, room))
    sampling = 0
    for name, (rows, prompts, prompt, new) in zip(("rollouts", "reflections"), jobs):
        cache = cache_bytes(config, rows, prompt + new - 1, dtype)
        # growing copies one layer's keys; a sampled token needs logits, log-probs, their fp64 exp and its sum; autocast the head
        decode = cache + max(cache // (2 * L), 24 * rows * V, (4 * rows * V + 2 * head) * autocast)
        prefill = cache_bytes(config, prompts, prompt, dtype) + prompts * prompt * (3 * config.intermediate_size * c + 4 * of_input)
        parts |= {f"{name}: KV cache": cache, f"{name}: prefill": prefill, name: max(decode, prefill)}
        sampling = max(sampling, parts["unsharded"] + parts[name])
    return parts | {"persistent": persistent, "update": update, "sampling": sampling, "peak": persistent + max(update, sampling)}
