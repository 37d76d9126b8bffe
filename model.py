"""The policy: a decoder-only transformer with one `forward`.

Qwen3 exactly; by configuration alone also Qwen2 / Qwen2.5 (bias on q, k, v, no q/k norm) and Llama
3 (scaled RoPE). Parameters carry Hugging Face's names, so loading is a copy and needs no key map.
One `forward`, three uses:

    model(inputs, targets)            -> logprobs (B,T), entropy (B,T)   policy, old and reference
    model(inputs, cache=..., last=..) -> logits (B,V)                    prefill and decode
    model(inputs)                     -> hidden (B,T,d)                  states of an OPSD teacher

`forward` includes the output head: logits (B,T,V) are never materialised (0.6 MB per token at
Qwen's vocabulary), the head stays in FSDP's root unit, and logits and all that follows are fp32.
Shapes: B rows, T tokens, N = B*T, V vocabulary, d width, nh / nkv query / key-value heads, hs head
size, L layers, R rows and C columns of the cache. Deliberately missing: dropout, sliding windows,
mixture of experts, quantisation, other RoPE scalings.
"""
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from advantage import generalised_jsd

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "llama": "LlamaForCausalLM"}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# logits the head materialises at once; a toy batch is one chunk
LOGITS_PER_CHUNK = {"cpu": 2**24, "cuda": 2**27}


# --------------------------------------------------------------------------------------------------
# configuration


@dataclass
class ModelConfig:
    """Hugging Face's names, and `num_tokens`: number of ids of the tokenizer (0 = vocab_size).
    Qwen3's head has 267 more rows, which neither the sampler nor the trainer's softmax includes
    (trap 4)."""

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
    rope_scaling: dict | None = None  # None or Llama 3's
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # on q, k, v, never on o; follows from model_type
    eos_token_id: tuple[int, ...] = ()  # int, list or None accepted
    num_tokens: int = 0

    def __post_init__(self):
        eos = self.eos_token_id
        eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        if not all(str(i).isdecimal() for i in eos):
            raise ValueError(f"eos_token_id = {self.eos_token_id!r} is no token id; write numbers, "
                             "such as 2 or [2, 0]")
        self.eos_token_id = tuple(map(int, eos))  # "2" is 2
        self.num_tokens = self.num_tokens or self.vocab_size
        self.attention_bias = self.model_type == "qwen2"
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type = {self.model_type!r} is not supported; use "
                             f"{', '.join(ARCHITECTURES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads = {self.num_key_value_heads}; use a multiple"
            )
        if self.num_tokens > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.num_tokens} tokens, the embedding (vocab_size) "
                f"{self.vocab_size} rows; take the added tokens out of the tokenizer's files, or "
                "add rows: model.resize_token_embeddings(len(tokenizer)) in transformers, then "
                "save both")

    @property
    def qk_norm(self) -> bool:
        """RMSNorm over each head of q and k before RoPE."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, hf: dict, num_tokens: int = 0) -> "ModelConfig":
        """From the config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).
        ValueError for every option that this file would silently compute differently."""
        model_type = hf.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ValueError(f"model_type = {model_type!r} is not supported; use "
                             f"{', '.join(ARCHITECTURES)}")
        if hf.get("quantization_config"):
            method = hf["quantization_config"].get("quant_method", "some method")
            raise ValueError(f"the weights are quantised ({method}); training needs the original "
                             "fp32, bf16 or fp16 ones")
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        kind = rope.get("rope_type") or rope.get("type") or "default"
        needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads"]
        absent = [key for key in needed if key not in hf]
        if kind == "llama3":
            absent += [key for key in LLAMA3_ROPE if key not in rope]
        if absent:
            raise ValueError(f"config.json lacks {', '.join(absent)}; use the config.json that "
                             "came with the weights")
        unsupported = {
            "rope_type": kind if kind not in ("default", "llama3") else None,
            "hidden_act": hf.get("hidden_act") if hf.get("hidden_act", "silu") != "silu" else None,
            "use_sliding_window": hf.get("use_sliding_window"),
            "mlp_bias": hf.get("mlp_bias"),
            "attention_bias": hf.get("attention_bias") if model_type != "qwen2" else None,
        }
        for key, value in unsupported.items():
            if value:
                raise ValueError(f"{key} = {value!r} is not supported for {model_type}; use a "
                                 "model without it")
        optional = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
                    "tie_word_embeddings": False}
        return cls(
            model_type=model_type,
            **{key: hf[key] for key in needed},
            **{key: hf.get(key, default) for key, default in optional.items()},
            num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            rope_theta=float(theta),
            rope_scaling=rope | {"rope_type": kind} if kind == "llama3" else None,
            eos_token_id=hf.get("eos_token_id"),
            num_tokens=num_tokens,
        )

    def to_hf(self) -> dict:
        """config.json for transformers (4 and 5) and vLLM; every field is written, as defaults
        differ by model family."""
        hf, eos = asdict(self), self.eos_token_id
        # model_type implies Qwen2's bias; Hugging Face's attention_bias would also cover o_proj
        del hf["num_tokens"], hf["attention_bias"]
        return hf | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }


# --------------------------------------------------------------------------------------------------
# output head: fp32 logits, log-probs, entropy and divergence, in chunks that never hold all logits


def head_logits(hidden: torch.Tensor, weight: torch.Tensor,
                temperature: float = 1.0) -> torch.Tensor:
    """hidden (N,d), weight (V,d), both in the compute dtype -> logits / temperature (N,V) fp32.

    bf16 operands are multiplied with fp32 accumulation *and output*: `(h @ w.T).float()` would
    first round a logit of 20 by up to 0.06, more than the policy moves in a step (trap 11). bf16
    operands are kept because FSDP mixed precision and the sampler have the weight in bf16, and fp32
    matmuls would run at a twelfth of the speed."""
    if weight.dtype == torch.float32:
        logits = hidden.float() @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:  # no such kernel on a CPU: cast blocks of rows, never the whole head, to fp32
        logits = torch.cat([hidden.float() @ rows.float().T for rows in weight.split(8192)], 1)
    return logits if temperature == 1.0 else logits.div_(temperature)


def head_backward(dlogits, hidden, weight, dhidden, dweight) -> None:
    """Backward of head_logits at temperature 1: accumulate the gradients from dlogits (N,V)
    into dhidden (N,d) and dweight (V,d), both fp32."""
    g = dlogits.to(weight.dtype)
    if g.is_cuda and g.dtype != torch.float32:
        torch.addmm(dhidden, g, weight, out_dtype=torch.float32, out=dhidden)
        torch.addmm(dweight, g.T, hidden, out_dtype=torch.float32, out=dweight)
    else:
        dhidden += g @ weight  # bf16 matmul on a CPU: no fp32 copy of the head here either
        dweight.addmm_(dlogits.T, hidden.float())


def chunks_of(size: int, by: int, device: torch.device) -> list[slice]:
    """Slices of range(size) with at most LOGITS_PER_CHUNK logits each: over tokens with `by`
    logits per token, or over the vocabulary with `by` tokens."""
    step = max(1, LOGITS_PER_CHUNK.get(device.type, 2**24) // by)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


class TokenLogprobs(torch.autograd.Function):
    """log p(target) and H[p] per token, p = softmax(hidden @ weight[:num_tokens].T / temperature);
    both differentiable.

    Chunks split the vocabulary and span all tokens: each row of the head is read once, and its
    gradient written once. The log-sum-exp l_c and entropy H_c of each chunk's softmax are merged
    into l and H of the full softmax:
        l = logsumexp_c l_c     H = sum_c s_c (H_c - log s_c),  s_c = exp(l_c - l), mass of chunk c
    Saves l and H per token, and recomputes logits chunk by chunk in the backward pass:
        d log p(t) / dz = onehot(t) - p          dH / dz = -p (log p + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, num_tokens):
        """hidden (B,T,d), weight (vocab_size,d), targets (B,T) -> logprobs, entropy (B,T) fp32."""
        h, y, w = hidden.flatten(0, -2), targets.reshape(-1, 1), weight[:num_tokens]  # (N,d), (N,1)
        chosen, lses, entropies = torch.zeros_like(y, dtype=torch.float32), [], []
        for part in chunks_of(num_tokens, len(y), h.device):
            z = head_logits(h, w[part], temperature)  # (N,v)
            at, inside = target_within(part, y)
            chosen = torch.where(inside, z.gather(-1, at), chosen)
            lses.append(z.logsumexp(-1, keepdim=True))
            logp = z.sub_(lses[-1])
            # no 0 * inf: rows beyond num_tokens are cut off, not set to -inf
            entropies.append(-logp.exp().mul_(logp).sum(-1, keepdim=True))
        lses, entropies = torch.cat(lses, 1), torch.cat(entropies, 1)  # (N,parts)
        lse = lses.logsumexp(-1, keepdim=True)
        entropy = ((lses - lse).exp() * (entropies + lse - lses)).sum(-1, keepdim=True)
        ctx.save_for_backward(hidden, weight, y, lse, entropy)
        ctx.temperature, ctx.num_tokens = temperature, num_tokens
        # dentropy is None if the loss does not use the entropy: backward then skips its terms
        ctx.set_materialize_grads(False)
        # clone: FSDP warns about views
        return (chosen - lse).view(targets.shape).clone(), entropy.view(targets.shape).clone()

    @staticmethod
    def backward(ctx, dlogprobs, dentropy):
        """d logprobs, d entropy (B,T), either may be None -> d hidden (B,T,d), d weight
        (vocab_size,d) fp32."""
        hidden, weight, y, lse, entropy = ctx.saved_tensors
        h, w = hidden.flatten(0, -2), weight[: ctx.num_tokens]
        # (N,1)
        dlogprobs = torch.zeros_like(lse) if dlogprobs is None else dlogprobs.reshape(-1, 1)
        dh, dw = (torch.zeros_like(x, dtype=torch.float32) for x in (h, weight))
        for part in chunks_of(ctx.num_tokens, len(y), h.device):
            logp = head_logits(h, w[part], ctx.temperature).sub_(lse)  # (N,v)
            p, scale = logp.exp(), -dlogprobs
            if dentropy is not None:
                scale = logp.add_(entropy).mul_(-dentropy.reshape(-1, 1)).add_(scale)  # (N,v)
            at, inside = target_within(part, y)
            dz = p.mul_(scale).scatter_add_(1, at, dlogprobs * inside)
            head_backward(dz.div_(ctx.temperature), h, w[part], dh, dw[part])
        return dh.to(hidden.dtype).view(hidden.shape), dw, None, None, None


def target_within(part: slice, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y (N,1) -> the target's column within this part of the vocabulary (arbitrary if the target
    lies outside), and whether the target lies inside."""
    inside = (y >= part.start) & (y < part.stop)
    return (y - part.start).clamp(0, part.stop - part.start - 1), inside


class LogitsFunction(torch.autograd.Function):
    """f(logits (n,V), rows) -> (n,) over chunks of tokens; autograd differentiates f. Each chunk is
    recomputed in the backward pass; unlike with torch.utils.checkpoint, the head's gradient
    accumulates in one fp32 tensor."""

    @staticmethod
    def forward(ctx, hidden, weight, f, temperature, num_tokens):
        """hidden (B,T,d), weight (vocab_size,d) -> (B,T) fp32"""
        h, w = hidden.flatten(0, -2), weight[:num_tokens]
        ctx.save_for_backward(hidden, weight)
        ctx.f, ctx.temperature, ctx.num_tokens = f, temperature, num_tokens
        chunks = chunks_of(len(h), num_tokens, h.device)
        out = [f(head_logits(h[rows], w, temperature), rows) for rows in chunks]
        return torch.cat(out).view(hidden.shape[:-1]).clone()

    @staticmethod
    def backward(ctx, dout):
        """d out (B,T) -> d hidden (B,T,d), d weight (vocab_size,d) fp32."""
        hidden, weight = ctx.saved_tensors
        h, w, dout = hidden.flatten(0, -2), weight[: ctx.num_tokens], dout.flatten()
        dh, dw = (torch.zeros_like(x, dtype=torch.float32) for x in (h, weight))
        for rows in chunks_of(len(h), ctx.num_tokens, h.device):
            z = head_logits(h[rows], w, ctx.temperature).requires_grad_()  # (n,V)
            with torch.enable_grad():
                (dz,) = torch.autograd.grad(ctx.f(z, rows), z, dout[rows])
            head_backward(dz / ctx.temperature, h[rows], w, dh[rows], dw[: ctx.num_tokens])
        return dh.to(hidden.dtype).view(hidden.shape), dw, None, None, None


def teacher_divergence(hidden, weight, teacher, temperature: float, num_tokens: int):
    """OPSD: divergence (B,T) fp32 of student and teacher over the whole vocabulary, both at the
    sampling temperature.

    hidden (B,T,d), weight (vocab_size,d); teacher = (hidden (B,T,d), head_weight (V,d), beta,
    clip)."""
    teacher_hidden, teacher_weight, beta, clip = teacher
    # CRITICAL: the teacher is a target: no gradient through its states or its head.
    t = teacher_hidden.detach().flatten(0, -2)
    w = teacher_weight.detach()[:num_tokens]

    def divergence(logits, rows):
        """(n,V) -> (n,)"""
        return generalised_jsd(logits, head_logits(t[rows], w, temperature), beta, clip)

    return LogitsFunction.apply(hidden, weight, divergence, temperature, num_tokens)


# --------------------------------------------------------------------------------------------------
# key-value cache


class KVCache:
    """Keys and values of R rows by C columns: a contiguous tensor (2,R,nkv,C,hs) per layer.

        prompts  [1 2 3 4]     and after one token   [1 2 3 4 9 .]    lengths 5, C 6
                 [5 6 _ _]                           [5 6 8 _ . .]            3

    Column t holds a row's t-th token. Columns after the last token are finite and masked, by the
    positions of the new tokens. Attention reads whole tensors, as matmuls over slices of larger
    ones are 1.5-3x slower. Tensors of every shape start at the same address, so a CUDA graph of one
    shape (rollout.capture) can be replayed whenever the cache has that shape again.
    """

    def __init__(self, config: ModelConfig, rows: int, columns: int, dtype=torch.float32,
                 device="cpu"):
        """Memory for rows * columns, or any shape of fewer cells."""
        self.sizes = config.num_key_value_heads, config.head_dim
        numbers = 2 * rows * columns * config.num_key_value_heads * config.head_dim
        # zeros: masked columns must still be finite, 0 * NaN is NaN. Not one tensor for all layers:
        # in compiled blocks a write would copy it
        self.memory = [torch.zeros(numbers, dtype=dtype, device=device)
                       for _ in range(config.num_hidden_layers)]
        self.bytes = sum(memory.nbytes for memory in self.memory)
        self.view(rows, columns)

    def view(self, R: int, C: int) -> None:
        """Lay the memory out as R rows by C columns, whatever it holds."""
        (nkv, hs), self.shape = self.sizes, (R, C)
        self.layers = [memory[:2 * R * nkv * C * hs].view(2, R, nkv, C, hs)
                       for memory in self.memory]

    def reshape(self, rows: torch.Tensor, R: int, C: int) -> None:
        """Change the shape to R rows by C columns in the same memory; `rows` (index) come first."""
        old, columns = self.layers, min(C, self.shape[1])
        self.view(R, C)
        for before, layer in zip(old, self.layers, strict=True):
            # a copy first, as both lie in the same memory
            layer[:, :len(rows), :, :columns] = before[:, rows, :, :columns]

    def write(self, rows: torch.Tensor, other: "KVCache", which: torch.Tensor) -> None:
        """Copy rows `which` of another cache, all its columns, into `rows` of this one."""
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer[:, rows, :, :other.shape[1]] = new[:, which]

    def index(self, positions: torch.Tensor) -> torch.Tensor:
        """positions (R,T) of new tokens -> (R*nkv*T,): their indices in the view (R*nkv*C,hs)."""
        (R, C), nkv = self.shape, self.sizes[0]
        heads = torch.arange(R * nkv, device=positions.device).view(R, nkv, 1)
        return (heads * C + positions[:, None]).flatten()

    def mask(self, positions: torch.Tensor) -> torch.Tensor:
        """positions (R,1) -> (R,1,1,C): 0 where the row's new token may attend, else -inf."""
        hidden = torch.arange(self.shape[1], device=positions.device) > positions[:, None, None]
        return torch.where(hidden, -torch.inf, 0).to(self.memory[0].dtype)


# --------------------------------------------------------------------------------------------------
# the transformer


def rope(positions: torch.Tensor, config: ModelConfig,
         dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B,T) -> cos, signed sin (B,1,T,hs) in `dtype`, see `rotate`. The hs/2 frequencies
    are recomputed at every forward: cheap, and a buffer would be rounded by `.to(bfloat16)` and
    left behind on the meta device by load_hf."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    freqs = 1.0 / config.rope_theta ** (even / config.head_dim)  # (hs/2,)
    # Llama 3: low frequencies divided by `factor`, high ones kept, interpolated in between
    if config.rope_scaling:
        factor, low, high, original_context = (config.rope_scaling[key] for key in LLAMA3_ROPE)
        # full turns within the context of pre-training
        turns = original_context * freqs / (2 * torch.pi)
        freqs = torch.lerp(freqs / factor, freqs, ((turns - low) / (high - low)).clamp(0, 1))
    angles = positions[:, None, :, None].float() * freqs  # fp32: bf16 cannot count beyond 256
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to x (B,heads,T,hs): [a, b] -> [a cos - b sin, b cos + a sin], as Hugging Face's
    layout pairs dimension i with i + hs/2."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend_cache(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                 mask: torch.Tensor) -> torch.Tensor:
    """One query per row over its KV cache: q (R,nh,1,hs), keys, values (R,nkv,C,hs), mask (R,1,1,C)
    -> (R,nh,1,hs). The query heads that share a key head are folded into the query dimension, so
    keys are read once, not repeated."""
    folded = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])  # (R,nkv,groups,hs)
    if q.is_cuda:  # fused
        y = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    else:  # on a CPU 2x to 4x faster than the fused kernel, which is made for many queries
        scores = (folded * q.shape[-1]**-0.5) @ keys.transpose(2, 3) + mask
        y = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype) @ values
    return y.reshape(q.shape)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.hidden_size
        self.nh, self.nkv = config.num_attention_heads, config.num_key_value_heads
        self.hs, self.gqa = config.head_dim, self.nh != self.nkv
        self.q_proj = nn.Linear(d, self.nh * self.hs, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, self.nkv * self.hs, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, self.nkv * self.hs, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.nh * self.hs, d, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.hs, config.rms_norm_eps) if config.qk_norm else nn.Identity()
            for _ in range(2))

    def forward(self, x, cos, sin, mask=None, cache=None):
        """x (B,T,d) -> (B,T,d). Without a mask: causal attention over the T tokens; with a mask:
        one token over the cache. cache: this layer's keys and values (2,B,nkv,C,hs), and
        KVCache.index of the new tokens.
        """
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.nh, self.hs)).transpose(1, 2)  # (B,nh,T,hs)
        # (B,nkv,T,hs)
        k = self.k_norm(self.k_proj(x).view(B, T, self.nkv, self.hs)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.nkv, self.hs).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            (keys, values), index = cache
            keys.view(-1, self.hs).index_copy_(0, index, k.reshape(-1, self.hs))
            values.view(-1, self.hs).index_copy_(0, index, v.reshape(-1, self.hs))
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.gqa)
        else:
            y = attend_cache(q, keys, values, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.nh * self.hs))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        """(B,T,d) -> (B,T,d)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer; the unit of FSDP and of activation checkpointing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None):
        """(B,T,d) -> (B,T,d)"""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """The policy, the reference and the teacher. checkpoint_activations (set by the scripts): save
    only the blocks' inputs and recompute each block in the backward pass, a third more compute.
    compiled: see compile_blocks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = self.compiled = False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        # tied embeddings: no separate head tensor, neither here nor on disk
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # GPT-2: scale residual projections by 1 / sqrt(2L)
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                additions = 2 * config.num_hidden_layers if residual else 1
                nn.init.normal_(p, std=0.02 / additions**0.5)

    @property
    def output_weight(self) -> torch.Tensor:
        """(vocab_size, d): the parameter itself."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    @property
    def head_weight(self) -> torch.Tensor:
        """(num_tokens, d): a view of the rows of the tokenizer's ids."""
        return self.output_weight[: self.config.num_tokens]

    def compile_blocks(self) -> None:
        """torch.compile each block, on its first forward (about a minute); blocks of one shape
        share the compiled code."""
        self.compiled = True
        for block in self.model.layers:
            block.compile(dynamic=True)

    def forward(self, inputs, targets=None, *, positions=None, cache=None, last=None,
                temperature=1.0, teacher=None):
        """inputs, targets (B,T) ids; the three uses are in the file's docstring.

        Rows are right-padded; outputs at padding are finite and must be masked by the caller.
        Training: log-probs and entropy are of softmax(logits / temperature), the sampling
        distribution (trap 2); `teacher` (see teacher_divergence) adds a divergence (B,T). With a
        cache: prefill fills its first columns and returns logits at `last` (B,); a decoding step
        has T = 1, at `positions` (B,1); logits are not divided by the temperature.
        """
        (B, T), mask, index = inputs.shape, None, None
        if positions is None:
            positions = torch.arange(T, device=inputs.device)[None]  # (1,T)
        if cache is not None:  # once for all layers
            index = cache.index(positions.expand(B, T))
            mask = cache.mask(positions) if last is None else None
        x = self.model.embed_tokens(inputs)  # (B,T,d)
        cos, sin = rope(positions, self.config, x.dtype)

        for i, layer in enumerate(self.model.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache and (cache.layers[i], index))

        if cache is not None:
            x = x[:, -1] if last is None else x[torch.arange(B, device=x.device), last]  # (B,d)
            return head_logits(self.model.norm(x), self.head_weight)                   # (B,V)
        x = self.model.norm(x)
        if targets is None:
            return x
        # targets may cover only the last columns: the head skips the others
        x = x[:, T - targets.shape[1] :]
        weight, softmax = self.output_weight, (temperature, self.config.num_tokens)
        logprobs, entropy = TokenLogprobs.apply(x, weight, targets, *softmax)
        if teacher is None:
            return logprobs, entropy
        return logprobs, entropy, teacher_divergence(x, weight, teacher, *softmax)


def num_params(model: CausalLM | ModelConfig) -> int:
    """Number of parameters, a tied head counted once; a ModelConfig's without allocating any."""
    if isinstance(model, ModelConfig):
        return count_parameters(model)[0]
    return sum(p.numel() for p in model.parameters())


def count_parameters(config: ModelConfig) -> tuple[int, int, int]:
    """Number of parameters of the model and of one block; and number of tensors. On the meta
    device."""
    with torch.device("meta"):
        model = CausalLM(replace(config, num_hidden_layers=1))  # all blocks are alike
    L, block = config.num_hidden_layers, list(model.model["layers"].parameters())
    size = sum(w.numel() for w in block)
    tensors = len(list(model.parameters())) + (L - 1) * len(block)
    return num_params(model) + (L - 1) * size, size, tensors


def flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of forward + backward per token of a row of `context` tokens: 6 per matmul weight (an
    untied embedding is a lookup) + 12 L nh hs context for attention, without a discount for
    causality, as in published MFU figures (PaLM, appendix B). Forward alone is a third."""
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    heads = config.num_hidden_layers * config.num_attention_heads
    return 6 * (num_params(config) - looked_up) + 12 * heads * config.head_dim * context
