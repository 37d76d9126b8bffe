"""The policy: a decoder-only transformer with one `forward`, and Hugging Face folders in and out.

Qwen3 exactly; by configuration alone also Qwen2 / Qwen2.5 (bias on q, k, v, no q/k norm) and Llama 3 (scaled RoPE).
Parameters carry Hugging Face's names, so loading is a copy and needs no key map.

    model(inputs, targets)                    -> logprobs (B,T), entropy (B,T)    old, reference and policy: the same call
    model(inputs, positions=..., cache=...)   -> logits (B,V) of the last column  prefill and decode
    model(inputs)                             -> hidden (B,T,d)                   states of an OPSD teacher

The output head lives inside `forward`: (B,T,V) never exists (0.6 MB a token at Qwen's vocabulary), the head stays in the
root's FSDP unit, and every number after the head's product is fp32. Shapes: B rows, T tokens, N = B*T, V vocabulary,
d model width, nh / nkv query / key-value heads, hs head size, L layers, S columns of the cache.
Deliberately missing: dropout, sliding windows, mixture of experts, quantisation, other RoPE scalings.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
CACHE_BLOCK = 64  # columns the cache grows by: one copy per 64 tokens against attention over 32 unused columns on average
LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**27}  # logits alive at once in the head; a toy batch is one chunk


# ----------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class ModelConfig:
    """Hugging Face's names. `num_tokens`: ids the tokenizer can produce (0 = vocab_size); Qwen3's head has 267 rows more,
    and a row that no tokenizer can emit does not exist, neither for the sampler nor in the trainer's softmax (trap 4)."""

    model_type: str = "qwen3"
    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # on q, k, v (Qwen2); never on o
    eos_token_id: tuple[int, ...] = ()
    num_tokens: int = 0

    def __post_init__(self):
        eos = self.eos_token_id
        self.eos_token_id = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        self.num_tokens = self.num_tokens or self.vocab_size
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type = {self.model_type!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads = {self.num_key_value_heads}; use a multiple"
            )
        if not 0 < self.num_tokens <= self.vocab_size:
            raise ValueError(f"num_tokens = {self.num_tokens} must be in 1..{self.vocab_size} (vocab_size); pass len(tokenizer)")

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, hf: dict, num_tokens: int = 0) -> "ModelConfig":
        """A config.json, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it. ValueError for
        anything this file would silently compute differently."""
        model_type = hf.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ValueError(f"model_type = {model_type!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        kind = rope.get("rope_type", rope.get("type", "default"))
        bias = hf.get("attention_bias", False)
        unsupported = {
            "rope_type": kind if kind not in ("default", "llama3") else None,
            "hidden_act": hf.get("hidden_act") if hf.get("hidden_act", "silu") != "silu" else None,
            "use_sliding_window": hf.get("use_sliding_window"),
            "mlp_bias": hf.get("mlp_bias"),
            "attention_bias": bias if model_type != "qwen2" else None,
        }
        for key, value in unsupported.items():
            if value:
                raise ValueError(f"{key} = {value!r} is not supported for {model_type}; use a model without it")
        return cls(
            model_type=model_type,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=hf["num_attention_heads"],
            num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=rope if kind == "llama3" else None,
            max_position_embeddings=hf.get("max_position_embeddings", 32768),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=model_type == "qwen2",
            eos_token_id=hf.get("eos_token_id"),
            num_tokens=num_tokens,
        )

    def to_hf(self) -> dict:
        """config.json for transformers (4 and 5) and vLLM: every field explicit, since their defaults differ by family."""
        hf = asdict(self)
        del hf["num_tokens"]
        eos = self.eos_token_id
        return hf | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }


# ----------------------------------------------------------------------------------------------------------------
# output head: fp32 logits, log-probs, entropy, divergence, in chunks of tokens


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden (N,d), weight (V,d), one dtype -> logits (N,V) fp32.

    bf16 operands are multiplied with fp32 accumulation *and output*: `(h @ w.T).float()` would round the logits to 8 bits
    first, 0.06 at a logit of 20, more than the policy moves in a step (trap 11)."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # No such kernel on a CPU: upcast, a block of rows at a time, so that no second, fp32 head ever exists.
    return torch.cat([hidden.float() @ rows.float().T for rows in weight.split(8192)], dim=1)


def head_backward(dlogits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, dweight: torch.Tensor | None):
    """Gradient of head_logits: returns d hidden (N,d) and adds to dweight (V,d), which is fp32 over all chunks."""
    g = dlogits.to(weight.dtype)
    if dweight is not None and hidden.dtype != torch.float32 and hidden.is_cuda:
        torch.addmm(dweight, g.T, hidden, out_dtype=torch.float32, out=dweight)
    elif dweight is not None:
        dweight.addmm_(g.float().T, hidden.float())
    return g @ weight


class TokenLogprobs(torch.autograd.Function):
    """log p(target) and H[p] per token for p = softmax(hidden @ weight[:num_tokens].T / temperature), both differentiable.

    Saves two numbers a token (log-sum-exp, entropy) and recomputes the logits chunk by chunk in the backward pass:
        d log p_t / dz = onehot(t) - p          dH / dz = -p (log p + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, num_tokens, dtype):
        """hidden (N,d), weight (vocab_size,d), targets (N,), dtype of the products -> logprobs (N,), entropy (N,) fp32."""
        w = weight[:num_tokens].to(dtype)
        logprobs, entropy, lse = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
        for rows in token_chunks(len(targets), num_tokens, hidden.device):
            z = head_logits(hidden[rows].to(dtype), w).div_(temperature)  # (n,V)
            lse[rows] = z.logsumexp(-1)
            logp = z.sub_(lse[rows, None])
            logprobs[rows] = logp.gather(-1, targets[rows, None]).squeeze(-1)
            entropy[rows] = -logp.exp().mul_(logp).sum(-1)  # finite: masked rows of the head are absent, not -inf
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.num_tokens, ctx.dtype = temperature, num_tokens, dtype
        ctx.set_materialize_grads(False)  # most losses leave the entropy out: then skip its share of the work
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs, dentropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        w = weight[: ctx.num_tokens].to(ctx.dtype)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        dw = dweight[: ctx.num_tokens] if dweight is not None else None
        for rows in token_chunks(len(targets), ctx.num_tokens, hidden.device):
            h = hidden[rows].to(ctx.dtype)
            logp = head_logits(h, w).div_(ctx.temperature).sub_(lse[rows, None])  # (n,V)
            p = logp.exp()
            if dentropy is None:
                dz = p.mul_(-dlogprobs[rows, None])
            else:
                dz = logp.add_(entropy[rows, None]).mul_(-dentropy[rows, None])
                dz = (dz if dlogprobs is None else dz.sub_(dlogprobs[rows, None])).mul_(p)
            if dlogprobs is not None:
                dz.scatter_add_(1, targets[rows, None], dlogprobs[rows, None])
            dhidden[rows] = head_backward(dz.div_(ctx.temperature), h, w, dw)
        return dhidden, dweight, None, None, None, None


class HeadLogits(torch.autograd.Function):
    """head_logits with a gradient, for losses whose derivative is left to autograd."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return head_logits(hidden, weight)

    @staticmethod
    def backward(ctx, dlogits):
        hidden, weight = ctx.saved_tensors
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        return head_backward(dlogits, hidden, weight, dweight), dweight


def token_chunks(n: int, num_tokens: int, device: torch.device) -> list[slice]:
    """Slices over n tokens such that one slice's logits are at most LOGITS_PER_CHUNK elements."""
    step = max(1, LOGITS_PER_CHUNK.get(device.type, 2**24) // num_tokens)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def teacher_divergence(hidden, weight, teacher, temperature, dtype) -> torch.Tensor:
    """OPSD: divergence (N,) fp32 between student and teacher over the whole vocabulary (advantage.generalised_jsd), both at
    the sampling temperature. hidden (N,d), weight (V,d); teacher = (hidden (N,d), head_weight (V,d), beta, clip)."""
    from advantage import generalised_jsd

    # CRITICAL: the teacher is a target, not a student.
    teacher_hidden, teacher_weight = (t.detach().to(dtype) for t in teacher[:2])
    beta, clip = teacher[2:]
    weight = weight.to(dtype)
    teacher_weight = teacher_weight[: len(weight)]

    def divergence(h, t):  # (n,d), (n,d') -> (n,)
        with torch.no_grad():
            teacher_logits = head_logits(t, teacher_weight) / temperature
        return generalised_jsd(HeadLogits.apply(h, weight) / temperature, teacher_logits, beta, clip)

    return torch.cat(
        [
            checkpoint(divergence, hidden[rows].to(dtype), teacher_hidden[rows], use_reentrant=False)
            for rows in token_chunks(len(hidden), len(weight), hidden.device)
        ]
    )


# ----------------------------------------------------------------------------------------------------------------
# key-value cache


def roll_rows(x: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Row b of x (B,T,...) moved left by shifts[b], around the end: [[_,_,7,8]] by [2] -> [[7,8,_,_]]."""
    B, T = x.shape[:2]
    columns = (torch.arange(T, device=x.device) + shifts[:, None]) % T  # (B,T)
    return x[torch.arange(B, device=x.device)[:, None], columns]


class KVCache:
    """Keys and values of left-padded rows; all rows write the same column, row b is valid from column starts[b] on.

        prompts  [_ _ 5 6]  starts [2, 0]      after one decoded token   [_ _ 5 6 9 . .]   length 5, S 7
                 [1 2 3 4]                                               [1 2 3 4 8 . .]

    One contiguous tensor per layer and kind, grown by whole blocks of columns and read whole under a mask: slices of a larger
    tensor are not contiguous, and batched products over those are 1.5-3x slower."""

    def __init__(self, config: ModelConfig, starts, capacity: int, dtype=torch.float32, device="cpu"):
        self.starts = torch.as_tensor(starts, dtype=torch.long, device=device)  # (B,)
        self.length = 0  # columns written
        shape = len(self.starts), config.num_key_value_heads, 0, config.head_dim
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.reserve(capacity)

    def reserve(self, columns: int):
        """Grow to at least `columns` columns, in whole blocks."""
        missing = -(-columns // CACHE_BLOCK) * CACHE_BLOCK - self.k[0].size(2)
        if missing > 0:  # zeros, since 0 * NaN is NaN: memory that is masked must still be finite
            self.k = [F.pad(k, (0, 0, 0, missing)) for k in self.k]
            self.v = [F.pad(v, (0, 0, 0, missing)) for v in self.v]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """k, v (B,nkv,T,hs) into columns [length, length + T)."""
        columns = slice(self.length, self.length + k.size(2))
        if self.length == 0:  # a prompt came right-padded (see CausalLM.forward): back to left-padded
            k, v = (roll_rows(t.transpose(1, 2), -self.starts).transpose(1, 2) for t in (k, v))
        self.k[layer][:, :, columns] = k
        self.v[layer][:, :, columns] = v

    def mask(self, T: int) -> torch.Tensor:
        """(B,1,T or groups*T,S): 0 where a new token may look, -inf elsewhere; rows as GQA folds them (Attention.forward)."""
        device, S = self.starts.device, self.k[0].size(2)
        key, query = torch.arange(S, device=device), torch.arange(self.length, self.length + T, device=device)
        seen = (key >= self.starts[:, None, None]) & (key <= query[:, None])  # (B,T,S)
        mask = torch.zeros(seen.shape, dtype=self.k[0].dtype, device=device).masked_fill_(~seen, -torch.inf)[:, None]
        return mask if T == 1 else mask.repeat(1, 1, self.groups, 1)

    def expand(self, n: int) -> "KVCache":
        """Each row n times, in place; rows of one prompt stay neighbours."""
        self.starts = self.starts.repeat_interleave(n)
        self.k = [k.repeat_interleave(n, dim=0) for k in self.k]
        self.v = [v.repeat_interleave(n, dim=0) for v in self.v]
        return self

    def keep(self, rows: torch.Tensor) -> "KVCache":
        """Only these rows (index tensor), in place: finished ones cost nothing."""
        self.starts = self.starts[rows]
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]
        return self


# ----------------------------------------------------------------------------------------------------------------
# the transformer


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # computed in fp32 inside; the weight follows x because the fused kernel wants one dtype (under autocast they differ)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B,T) -> cos, sin (B,1,T,hs/2). Recomputed from the configuration at every forward: 64 numbers, against a
    buffer that `.to(bfloat16)` would silently round and that loading on the meta device would leave there."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents  # (hs/2,)
    if config.rope_scaling:  # Llama 3: long wavelengths are slowed by `factor`, short ones kept, those between blended
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freqs / (2 * torch.pi)  # full turns within the original context
        kept = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        freqs = torch.lerp(freqs / s["factor"], freqs, kept.clamp(0, 1))
    angles = positions[:, None, :, None].float() * freqs  # fp32: bf16 cannot count positions beyond 256
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B,heads,T,hs): Hugging Face's layout, which pairs dimension i with i + hs/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d, hs, self.layer = config.hidden_size, config.head_dim, layer
        self.nh, self.nkv, self.hs = config.num_attention_heads, config.num_key_value_heads, hs
        self.q_proj = nn.Linear(d, self.nh * hs, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, self.nkv * hs, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, self.nkv * hs, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.nh * hs, d, bias=False)
        self.q_norm = RMSNorm(hs, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hs, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache=None):
        """x (B,T,d). Without a mask causal over the T tokens themselves; with one, over the cache's S columns."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.nh, self.hs)).transpose(1, 2)  # (B,nh,T,hs)
        k = self.k_norm(self.k_proj(x).view(B, T, self.nkv, self.hs)).transpose(1, 2)  # (B,nkv,T,hs)
        v = self.v_proj(x).view(B, T, self.nkv, self.hs).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache.write(self.layer, k, v)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.nh != self.nkv)
        else:  # decoding: the query heads of a group become rows over their one key head, so that keys are read once
            q = q.reshape(B, self.nkv, -1, self.hs)  # (B,nkv,groups*T,hs)
            y = F.scaled_dot_product_attention(q, cache.k[self.layer], cache.v[self.layer], attn_mask=mask)
            y = y.view(B, self.nh, T, self.hs)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.nh * self.hs))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, ff = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, ff, bias=False)
        self.up_proj = nn.Linear(d, ff, bias=False)
        self.down_proj = nn.Linear(ff, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute each block in the backward pass: 1/3 more work, memory of one block
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:  # tied: there is no second tensor, here or on disk
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # what adds to the residual stream is scaled by its 2L additions (GPT-2)
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if residual else 0.02)

    @property
    def output_weight(self) -> torch.Tensor:
        """(vocab_size, d), the parameter itself."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def head_weight(self) -> torch.Tensor:
        """(num_tokens, d): a view of the rows that exist."""
        return self.output_weight[: self.config.num_tokens]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrices are multiplied in: autocast's dtype, else that of the weights as they are now (fp32 masters, or bf16
        in a sampling copy and inside an FSDP unit with mixed precision). The dtype to give a KVCache."""
        device = self.output_weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.output_weight.dtype

    def forward(self, inputs, targets=None, *, positions=None, cache=None, temperature=1.0, teacher=None):
        """inputs, targets (B,T) ids, right-padded; see the file's docstring for the three uses. Log-probs and entropy are of
        softmax(logits / temperature), the distribution that was sampled (trap 2); the logits of decoding are not divided.
        With `cache`, inputs and positions are left-padded; the first call holds the whole prompt.
        teacher = (hidden (B,T,d), head_weight (V,d), beta, clip) adds a third result: divergence (B,T) fp32."""
        B, T = inputs.shape
        dtype = self.compute_dtype
        if positions is None:
            positions = torch.arange(T, device=inputs.device)[None]  # (1,T): right-padded rows start at column 0
        mask = None
        if cache is not None:
            cache.reserve(cache.length + T)
            if cache.length:
                mask = cache.mask(T)
            else:  # Right-padded, a prompt runs the very path of training: causal, no (B,T,S) mask, no fully masked row.
                inputs, positions = roll_rows(inputs, cache.starts), roll_rows(positions, cache.starts)
        cos, sin = rope(positions, self.config, dtype)
        x = self.model.embed_tokens(inputs)  # (B,T,d)
        for layer in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)

        if cache is not None:
            last = T - 1 - (cache.starts if mask is None else 0 * cache.starts)  # (B,)
            cache.length += T
            x = self.model.norm(x[torch.arange(B, device=x.device), last])  # (B,d): only this column needs the head
            with torch.autocast(x.device.type, enabled=False):
                return head_logits(x.to(dtype), self.head_weight.to(dtype))
        x = self.model.norm(x)
        if targets is None:
            return x
        x = x.view(B * T, -1)
        with torch.autocast(x.device.type, enabled=False):
            out = TokenLogprobs.apply(
                x, self.output_weight, targets.reshape(-1), temperature, self.config.num_tokens, dtype
            )
            if teacher is not None:
                flat = teacher[0].reshape(B * T, -1), *teacher[1:]
                out += (teacher_divergence(x, self.head_weight, flat, temperature, dtype),)
        return tuple(t.view(B, T) for t in out)


def num_params(model: CausalLM | ModelConfig) -> int:
    """Parameters, a tied head counted once; of a configuration without allocating any."""
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = CausalLM(model)
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Floating-point operations of forward + backward for one token of a row of `context` tokens: 6 per weight that is
    multiplied (an untied embedding is looked up, not multiplied) + 12 L nh hs context for attention. Causality is not
    discounted, the convention of the published MFU figures; forward alone is a third."""
    weights = num_params(config) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    return 6 * weights + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context


# ----------------------------------------------------------------------------------------------------------------
# Hugging Face folders


def _resolve(folder_or_hub_id: str | Path) -> Path:
    """A folder as it is; anything that looks like owner/name from the hub."""
    path = Path(folder_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder_or_hub_id)):
        raise FileNotFoundError(f"model folder {str(folder_or_hub_id)!r} does not exist; pass a folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(folder_or_hub_id), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
        )
    except Exception as e:  # no network, no such repository, no permission: the hub's own text runs over many lines
        raise FileNotFoundError(
            f"{str(folder_or_hub_id)!r} is no folder here and the hub did not serve it ({type(e).__name__}); "
            "download the model elsewhere and pass its folder"
        ) from None


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not valid JSON (line {e.lineno}: {e.msg}); copy it again") from None


def load_hf(folder_or_hub_id, *, dtype=torch.float32, device="cpu", num_tokens: int = 0) -> CausalLM:
    """A Hugging Face folder (or hub id), single or sharded safetensors, as a CausalLM in `dtype` on `device`.

    The model is made on the meta device and each tensor is read into it in turn: peak host memory is one model. Of
    generation_config.json only the end-of-sequence ids are read: no penalty or top-k hides in a checkpoint (trap 3).
    num_tokens: see ModelConfig. Errors: FileNotFoundError for files, ValueError for contents, one line each."""
    folder = _resolve(folder_or_hub_id)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; pass a folder in Hugging Face's layout")
    config = ModelConfig.from_hf(_read_json(folder / "config.json"), num_tokens)
    if (folder / "generation_config.json").is_file():
        eos = _read_json(folder / "generation_config.json").get("eos_token_id")
        eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
        config.eos_token_id = tuple(dict.fromkeys([*config.eos_token_id, *eos]))

    index = folder / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}; copy the folder again (only safetensors weights are read)")

    with torch.device("meta"):
        model = CausalLM(config)
    missing = {name: p.shape for name, p in model.named_parameters()}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    if name == "lm_head.weight" and config.tie_word_embeddings or name.endswith("rotary_emb.inv_freq"):
                        continue  # copies that some checkpoints carry: Qwen3-0.6B's tied head, old Llamas' RoPE buffer
                    if name not in missing:
                        raise ValueError(f"{folder / file} holds the unexpected tensor {name}; config.json must describe it")
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if shape != tuple(missing[name]):
                        raise ValueError(
                            f"{name} in {folder / file} has shape {shape}, config.json implies {tuple(missing[name])}; "
                            "use the config.json that belongs to these weights"
                        )
                    module, _, attribute = name.rpartition(".")
                    # copy: a tensor that still maps the file would change with it
                    tensor = tensors.get_tensor(name).to(dtype, copy=True)
                    setattr(model.get_submodule(module), attribute, nn.Parameter(tensor))
                    del missing[name]
        except SafetensorError as e:
            raise ValueError(f"{folder / file} is truncated or corrupt ({e}); copy it again") from None
    if missing:
        some = ", ".join(list(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{folder} lacks {len(missing)} tensors ({some}); copy all of its safetensors files")
    return model


def save_hf(
    model: CausalLM,
    tokenizer,
    folder,
    *,
    generation_config: dict | None = None,
    max_shard_bytes: int = 5 * 10**9,
    state_dict: dict | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a plain Hugging Face folder that transformers and vLLM load; the caller makes it atomic.

    tokenizer: saved with its chat template, None to leave out. state_dict: given where the model's own tensors are shards
    (FSDP). dtype: of the saved weights, None as they are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)

    shards, room = [], 0
    for name, t in tensors.items():
        size = t.numel() * (dtype or t.dtype).itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map, total = {}, 0
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard = {n: tensors[n].detach().to("cpu", dtype or tensors[n].dtype).contiguous() for n in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.numel() * t.itemsize for t in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    config = model.config.to_hf()
    saved = dtype or next(iter(tensors.values())).dtype
    config["torch_dtype"] = str(saved).removeprefix("torch.")
    if tokenizer is not None:
        config |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Plain sampling spelled out: transformers' default would be top-k 50.
    plain = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
    generation = plain | ids | (generation_config or {})
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
