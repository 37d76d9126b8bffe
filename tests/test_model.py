"""model.py against transformers, against naive formulas, and against itself: decoding equals
training."""

import json
import shutil
import struct

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import advantage
import model as model_file
import parallel
from hf import load_hf, save_hf
from model import (
    CausalLM,
    KVCache,
    ModelConfig,
    TokenLogprobs,
    flops_per_token,
    num_params,
)
from rollout import prefill
from tools import plan

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32
)
# (model_type, key-value heads of 4, tied, RoPE scaling)
FAMILIES = [
    ("qwen3", 1, True, None),
    ("qwen3", 2, False, None),
    ("qwen3", 4, True, None),
    ("qwen2", 2, True, None),
    ("qwen2", 1, False, None),
    ("llama", 2, False, None),
    ("llama", 4, True, LLAMA3),
    ("llama", 1, False, LLAMA3),
]


def tiny(model_type="qwen3", kv_heads=2, tied=True, rope_scaling=None, **changes) -> ModelConfig:
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                 num_attention_heads=4)
    rest = dict(head_dim=16, rope_theta=1e4, max_position_embeddings=256, eos_token_id=3)
    return ModelConfig(
        model_type,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_scaling=rope_scaling,
        **(sizes | rest | changes),
    )


def random_model(config=None, seed=0) -> CausalLM:
    """Weights large enough, norms and biases uneven enough, that a wrong one shows in the fifth
    digit."""
    torch.manual_seed(seed)
    model = CausalLM(config or tiny())
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3 if p.dim()
                              == 1 else 0.1)
    return model


def hf_model(config: ModelConfig, seed=0):
    """A random transformers model of the same configuration, from transformers' own classes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config.to_hf()
    model_type = fields.pop("model_type")
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields),
                                          attn_implementation="eager")
    for name, p in hf.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3 if p.dim() == 1
                              else 0.1)
    return hf.eval()


def logits_of(model, ids):
    return model(ids) @ model.head_weight.T


def ids_of(*shape, vocab=97, seed=1):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# the same function as transformers, the same files


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_logits_equal_transformers_and_the_round_trip_is_exact(family, tmp_path):
    """Guards: RoPE pairing and scaling, q/k norm, bias, GQA order, tying; a config.json that
    transformers misreads."""
    from transformers import AutoModelForCausalLM

    config, ids = tiny(*family), ids_of(2, 60)  # 60 > 32, the original context of the scaled RoPE
    hf = hf_model(config)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours = load_hf(tmp_path / "theirs")
    assert ours.config == config
    with torch.no_grad():
        expected = hf(ids).logits
        torch.testing.assert_close(logits_of(ours, ids), expected, atol=1e-5, rtol=1e-5)

        save_hf(ours, None, tmp_path / "ours", max_shard_bytes=50_000)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert torch.equal(again(ids).logits, expected)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "theirs")
    for file in (tmp_path / "ours").glob("model-*.safetensors"):
        assert safe_open(file, "pt").metadata() == {"format": "pt"}


def bytes_of(folder):
    """{tensor name: (dtype, its bytes)} over all shards."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for name, t in load_file(file).items():
            assert name not in tensors
            tensors[name] = t.dtype, t.flatten().view(torch.uint8).numpy().tobytes()
    return tensors


def test_a_bf16_checkpoint_survives_fp32_masters_bit_for_bit(tmp_path):
    """Guards: a cast on the way in or out; sampling copies saved instead of masters."""
    theirs = hf_model(tiny()).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    save_hf(ours.to(torch.bfloat16), None, tmp_path / "ours")
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "theirs")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_hf(tmp_path / "ours",
                   dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_saved_folder_carries_eos_plain_sampling_tokenizer_and_nothing_stale(tmp_path):
    """Guards: transformers' default top-k 50, a lost chat template, a left-over index that wins
    over a new file."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>",
                                        eos_token="<eos>")
    tokenizer.chat_template = "{{ messages }}"
    model = random_model(tiny(eos_token_id=[3, 1]))
    save_hf(random_model(seed=5), tokenizer, tmp_path, max_shard_bytes=20_000)
    save_hf(model, tokenizer, tmp_path, generation_config={"max_new_tokens": 7})
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert all(torch.equal(a, b) for a, b in zip(load_hf(tmp_path).parameters(), model.parameters(),
                                                 strict=True))
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.temperature, generation.top_p, generation.top_k) == (1.0, 1.0, 0)
    assert (generation.eos_token_id, generation.pad_token_id, generation.max_new_tokens) == (
        [3, 1], 0, 7)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages }}"


def test_a_given_state_dict_is_saved_without_the_tied_head(tmp_path):
    """Guards: a gathered FSDP state names the tied tensor twice, and the second would be written as
    an untied head."""
    model = random_model()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    save_hf(CausalLM(model.config), None, tmp_path, state_dict=state)
    assert "lm_head.weight" not in bytes_of(tmp_path)
    assert torch.equal(load_hf(tmp_path).model.norm.weight, model.model.norm.weight)


def test_loading_reads_eos_of_both_configs_and_no_sampling_default(tmp_path):
    """Guards trap 3 (a repetition penalty hidden in a checkpoint) and a stop set without
    generation_config's ids."""
    save_hf(random_model(), None, tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [3, 9], ' '"repetition_penalty": 2.0, "top_k": 20}')
    model = load_hf(tmp_path)
    assert model.config.eos_token_id == (3, 9)
    assert model.config == tiny(eos_token_id=(3, 9))


def test_a_tied_checkpoint_that_also_holds_its_head_loads(tmp_path):
    """Guards: Qwen3-0.6B on the hub ships lm_head.weight although it is tied."""
    save_hf(random_model(), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(list(load_hf(tmp_path).parameters())) == len(tensors) - 1


def test_loaded_tensors_do_not_map_the_file(tmp_path):
    """Guards: a checkpoint overwritten in place would change a running model that still maps it."""
    model = random_model()
    save_hf(model, None, tmp_path)
    loaded = load_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        f.write(b"\xff" * (file.stat().st_size // 2))
    assert all(torch.equal(a, b) for a,
               b in zip(loaded.parameters(), model.parameters(), strict=True))


QWEN3 = {  # hidden, intermediate, layers, heads, tied: parameters
    (1024, 3072, 28, 16, True): 596_049_920,
    (2048, 6144, 28, 16, True): 1_720_574_976,
    (2560, 9728, 36, 32, True): 4_022_468_096,
    (4096, 12288, 36, 32, False): 8_190_735_360,
}


@pytest.mark.parametrize("shape", QWEN3, ids=str)
def test_parameter_counts_of_the_published_sizes(shape):
    """Guards: a tied head counted twice, a forgotten q/k norm."""
    d, ff, layers, heads, tied = shape
    config = ModelConfig(
        hidden_size=d,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
    )
    assert num_params(config) == QWEN3[shape]


def test_flops_count_what_is_multiplied():
    """Guards: MFU that counts an embedding look-up as a product, or forgets attention."""
    tied, untied = tiny(tied=True), tiny(tied=False)
    assert flops_per_token(tied, 0) == flops_per_token(untied, 0) == 6 * num_params(tied)
    assert flops_per_token(tied, 10) - flops_per_token(tied, 0) == 12 * 3 * 4 * 16 * 10


# --------------------------------------------------------------------------------------------------
# log-probs and entropy


def naive(hidden, weight, targets, temperature, num_tokens):
    logp = F.log_softmax(hidden @ weight[:num_tokens].T / temperature, dim=-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


# 3 of the 31 rows of the head at once, 13, all
@pytest.mark.parametrize("per_chunk", [30, 130, 10**4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("use", ["logprobs", "entropy", "both"])
def test_chunked_logprobs_and_entropy_equal_the_naive_ones(
        per_chunk, temperature, use, monkeypatch):
    """Guards trap 14: a chunk boundary, a temperature or a sign lost in the hand-written backward
    pass."""
    monkeypatch.setitem(model_file.LOGITS_PER_CHUNK, "cpu", per_chunk)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(10, 8, generator=g), torch.randn(37, 8, generator=g)
    targets, coefficients = ids_of(10, vocab=31), torch.randn(2, 10, generator=g)
    coefficients = coefficients * torch.tensor({"logprobs": [1, 0], "entropy": [0, 1],
                                                "both": [1, 1]}[use])[:, None]
    results = []
    for f in (lambda h, w: TokenLogprobs.apply(h, w, targets, temperature, 31),
              lambda h, w: naive(h, w, targets, temperature, 31)):  # fmt: skip
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = f(h, w)
        sum((c * o).sum() for c, o in zip(coefficients, out, strict=True) if c.any()).backward()
        results.append([*out, h.grad, w.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)
    assert not results[0][-1][31:].any(), "rows of the head that do not exist got a gradient"


def test_logprobs_and_entropy_gradients_match_finite_differences():
    """Guards trap 14 independently of autograd: the derivative formulas, in fp64."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=g, dtype=torch.float64, requires_grad=True)
    targets = ids_of(5, vocab=7)

    def f(h, w):
        logp = F.log_softmax(h @ w.T / 0.7, -1)
        return logp.gather(-1, targets[:, None]).sum() + 3 * (logp.exp() * logp).sum()

    # TokenLogprobs itself is fp32: compare it with central differences of an fp64 formula
    lp, entropy = TokenLogprobs.apply(hidden.float(), weight.float(), targets, 0.7, 7)
    (lp.sum() - 3 * entropy.sum()).backward()
    for tensor in (hidden, weight):
        for i in range(tensor.numel()):
            step = torch.zeros_like(tensor).flatten()
            step[i] = 1e-5
            step = step.view_as(tensor)
            with torch.no_grad():
                up, down = (f(*[t + s * step if t is tensor else t for t in (hidden, weight)])
                            for s in (1, -1))
            assert abs(((up - down) / 2e-5).item() - tensor.grad.flatten()[i].item()) < 2e-5


def test_targets_of_the_last_columns_alone_get_the_numbers_and_gradients_of_those_columns():
    model, ids = random_model(), ids_of(2, 9)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    both = [[x[:, -3:] for x in model(inputs, targets)], model(inputs, targets[:, -3:])]
    gradients = [torch.autograd.grad(x[0].sum(), list(model.parameters())) for x in both]
    for a, b in zip([*both[0], *gradients[0]], [*both[1], *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_temperature_divides_the_logits():
    """Guards trap 2: a trainer that scores softmax(logits) while the sampler drew from
    softmax(logits / T)."""
    model, ids = random_model(), ids_of(2, 9)
    with torch.no_grad():
        logprobs, entropy = model(ids[:, :-1], ids[:, 1:], temperature=0.5)
        logp = F.log_softmax(logits_of(model, ids[:, :-1]) / 0.5, -1)
    torch.testing.assert_close(logprobs, logp.gather(-1, ids[:, 1:, None])[..., 0], atol=1e-5,
                               rtol=1e-5)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_the_gradient_of_the_naive_loss(tied, checkpointing):
    """Guards trap 20: a detached head, half of a tied gradient, activation checkpointing that drops
    some."""
    ids, grads = ids_of(3, 12), []
    for chunked in (True, False):
        model = random_model(tiny(tied=tied))
        model.checkpoint_activations = checkpointing and chunked
        if chunked:
            logprobs, entropy = model(ids[:, :-1], ids[:, 1:])
        else:
            logp = F.log_softmax(logits_of(model, ids[:, :-1]), -1)
            logprobs, entropy = logp.gather(-1, ids[:, 1:, None])[..., 0], -(
                logp.exp() * logp).sum(-1)
        (logprobs.square().mean() + entropy.mean()).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_follows_a_rows_end_changes_nothing_before_it():
    """Guards trap 16: a mask that is not causal; padding that leaks into a row through attention or
    gradients."""
    model, ids = random_model(), ids_of(2, 12)
    other = ids.clone()
    other[:, 7:] = ids_of(2, 5, seed=9)
    results = []
    for x in (ids, other):
        model.zero_grad()
        logprobs, _ = model(x[:, :-1], x[:, 1:])
        logprobs[:, :6].sum().backward()
        results.append([logprobs[:, :6].detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# bf16


def test_bf16_head_keeps_fp32_logits_and_one_tied_tensor():
    """Guards trap 11: logits rounded to bf16 (errors of 0.06 at 20), and an upcast that unties or
    copies the head."""
    model = random_model(tiny(hidden_size=64)).to(torch.bfloat16)
    ids = ids_of(4, 16)
    with torch.no_grad():
        logits = model(ids[:, :-1]).float() @ model.head_weight.float().T
        assert logits.abs().max() > 2  # else bf16's step would be too fine to tell
        expected = F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        rounded = F.log_softmax(logits.bfloat16().float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        logprobs, entropy = model(ids[:, :-1], ids[:, 1:])
        decoded = prefill(model, ids[:, :-1].tolist())[1]
    assert logprobs.dtype == entropy.dtype == decoded.dtype == torch.float32
    assert (logprobs - expected).abs().max() < 1e-5 < 1e-3 < (rounded - expected).abs().max()
    torch.testing.assert_close(decoded, logits[:, -1], atol=1e-5, rtol=1e-5)
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    assert len(names) == len({p.data_ptr() for p in model.parameters()})
    assert model.head_weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_bf16_weights_get_a_gradient_summed_in_fp32(monkeypatch):
    """Guards: a gradient of the head added up in bf16 over the chunks, where small terms vanish."""
    monkeypatch.setitem(model_file.LOGITS_PER_CHUNK, "cpu", 16)  # one row of the head a chunk
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(500, 8, generator=g).bfloat16(), torch.randn(
        16, 8, generator=g).bfloat16()
    targets = ids_of(500, vocab=16)
    w = weight.clone().requires_grad_()
    TokenLogprobs.apply(hidden, w, targets, 1.0, 16)[0].sum().backward()
    exact = weight.float().requires_grad_()
    naive(hidden.float(), exact, targets, 1.0, 16)[0].sum().backward()
    # one rounding of the sum: 2^-9 and less
    assert (w.grad.float() - exact.grad).norm() < 3e-3 * exact.grad.norm()


def test_the_mixed_precision_of_one_process_computes_in_bf16_and_trains_fp32_masters():
    """Guards: FSDP's casts reaching into the head or RoPE; training, prefill and decoding must run
    in bf16 and agree."""
    model, ids = random_model(), ids_of(3, 12)
    exact = model(ids[:, :-1], ids[:, 1:])[0].detach()
    parallel.shard(model, "cpu", dtype="bfloat16", replicas=1, offload=False)
    with parallel.Unsharded(model, dtype="bfloat16", device="cpu") as sampler, torch.no_grad():
        cache, _ = prefill(sampler, ids[:, :8].tolist())
        assert cache.memory[0].dtype == torch.bfloat16
        cache = room(cache, 3, 9)
        logits = sampler(ids[:, 8:9], positions=torch.full((3, 1), 8), cache=cache)
    logprobs, entropy = model(ids[:, :-1], ids[:, 1:])
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.dtype == torch.float32 and logits.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(parallel.whole(p.grad).any() for p in model.parameters())
    assert 1e-5 < (logprobs - exact).abs().mean() < 0.05
    sampled = F.log_softmax(logits, -1).gather(-1, ids[:, 9:10])[:, 0]
    assert (sampled - logprobs[:, 8]).abs().max() < 0.1


# --------------------------------------------------------------------------------------------------
# decoding


def room(cache, rows, columns, which=None):
    """A cache of rows x columns that begins with rows `which` of another one."""
    config = tiny(num_hidden_layers=len(cache.layers), kv_heads=cache.sizes[0],
                  head_dim=cache.sizes[1])
    larger = KVCache(config, rows, columns, cache.memory[0].dtype)
    which = torch.arange(cache.shape[0]) if which is None else which
    larger.write(torch.arange(len(which)), cache, which)
    return larger


@pytest.mark.parametrize("family", FAMILIES[:4] + FAMILIES[-1:], ids=str)
@torch.no_grad()
def test_prefill_and_decode_equal_the_training_forward(family):
    """Guards trap 8: positions or masks of rows of unlike length, a cache that changes its shape,
    rows mixed up by it, a NaN in memory that nobody wrote."""
    model = random_model(tiny(*family)).eval()
    rows = [row[:n].tolist() for row, n in zip(ids_of(4, 9), (2, 9, 1, 5), strict=True)]
    continuations = ids_of(8, 7, seed=2)
    texts = [rows[i // 2] + continuations[i].tolist() for i in range(8)]
    # each row alone, no padding
    expected = [logits_of(model, torch.tensor([text]))[0] for text in texts]
    cache, logits = prefill(model, rows)
    for i in range(4):
        torch.testing.assert_close(logits[i],
                                   expected[2 * i][len(rows[i]) - 1], atol=1e-5, rtol=1e-5)
    larger = KVCache(model.config, 10, 20)
    larger.reshape(torch.tensor([], dtype=torch.long), 9, 12)
    larger.write(torch.arange(8), cache, torch.arange(4).repeat_interleave(2))
    live, lengths = list(range(8)), torch.tensor([len(rows[i // 2]) for i in range(8)])
    shapes = {0: (9, 12), 2: (9, 16), 4: (5, 16), 6: (6, 20)}
    for t in range(7):
        if t == 4:
            live = [1, 2, 4, 7]
            larger.reshape(torch.tensor(live), *shapes[t])
        elif t in shapes:
            larger.reshape(torch.arange(len(live)), *shapes[t])
        R, n = larger.shape[0], len(live)
        # rows nobody lives in
        step, positions = torch.full((R, 1), 96), torch.zeros(R, 1, dtype=torch.long)
        step[:n], positions[:n, 0] = continuations[live, t : t + 1], lengths[live] + t
        logits = model(step, positions=positions, cache=larger)
        assert logits.shape == (R, 97) and logits.isfinite().all()
        for b, i in enumerate(live):
            torch.testing.assert_close(logits[b], expected[i][lengths[i] + t], atol=1e-5, rtol=1e-5)
    assert all(t.is_contiguous() and t.data_ptr() == m.data_ptr()
               for t, m in zip(larger.layers, larger.memory, strict=True))
    # of one storage torch.compile would copy a layer to write a token
    assert len({m.untyped_storage().data_ptr() for m in larger.memory}) == len(larger.memory)


def test_padding_of_a_prompt_is_never_read():
    """Guards trap 5: padding found by token value, or attended to; columns behind a row's last
    token that are."""
    model, results = random_model(), []
    for garbage in (0.0, 50.0):
        with torch.no_grad():
            cache, first = prefill(model, [[1, 2, 3], [4, 5, 6, 7, 8, 9]])
            cache = room(cache, 2, 12)
            for layer in cache.layers:
                layer[:, 0, :, 3:], layer[:, 1, :, 6:] = garbage, garbage
            second = model(torch.tensor([[7], [3]]), positions=torch.tensor([[3], [6]]),
                           cache=cache)
        results.append(torch.stack([first, second]))
    assert torch.equal(*results)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_what_plain_ones_do(tmp_path):
    """Guards: a cache column or a number of rows that is compiled in as a constant, a gradient that
    differs."""
    save_hf(random_model(), None, tmp_path)
    results = []
    for model in (load_hf(tmp_path), load_hf(tmp_path, compile=True)):
        for rows in (3, 4):  # a second shape makes the compiled code general
            ids = ids_of(rows, 9 + rows)
            logprobs, entropy = model(ids[:, :-1], ids[:, 1:])
            (logprobs.sum() + entropy.sum()).backward()
        decoded = []
        with torch.no_grad():
            cache, _ = prefill(model, ids[:, :5].tolist())
            cache = room(cache, 4, 12)
            for t in range(5, 9):
                decoded.append(model(ids[:, t : t + 1], positions=torch.full((4, 1), t),
                                     cache=cache))
            cache.reshape(torch.tensor([3, 1]), 2, 20)
            decoded.append(model(ids[:2, 9:10], positions=torch.full((2, 1), 9), cache=cache))
        results.append([logprobs.detach(), *decoded, *(p.grad for p in model.parameters())])
    assert all(block._compiled_call_impl for block in model.model.layers)
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_ragged_micro_batches_are_compiled_once(dtype):
    """Guards: a compilation, which takes a minute, for every new width of a micro-batch. A single
    row is the one exception: torch takes a size of 1 for a constant."""
    torch._dynamo.reset()
    counters.clear()
    model, graphs = random_model(), []
    parallel.shard(model, "cpu", dtype=dtype, replicas=1, offload=False)
    model.compile_blocks()
    for rows, width in ((3, 7), (4, 11), (2, 9), (5, 30), (8, 3), (1, 12), (1, 33), (6, 6)):
        ids = ids_of(rows, width)
        model(ids, ids)[0].sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 5 + [2] * 3


# --------------------------------------------------------------------------------------------------
# vocabulary, teacher


def test_rows_beyond_the_tokenizer_exist_neither_for_trainer_nor_sampler():
    """Guards trap 4: ids no tokenizer can decode, sampled or given probability in the trainer's
    softmax alone."""
    full, model = random_model(), random_model(tiny(num_tokens=90))
    ids = ids_of(2, 8, vocab=90)
    with torch.no_grad():
        logits = prefill(model, ids[:, :-1].tolist())[1]
        assert model.head_weight.shape == (90, 48) and logits.shape == (2, 90)
        logprobs, entropy = model(ids[:, :-1], ids[:, 1:])
        logp = F.log_softmax(logits, -1)
        torch.testing.assert_close(logp.gather(-1, ids[:, -1:])[:, 0], logprobs[:, -1],
                                   atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(-(logp.exp() * logp).sum(-1), entropy[:, -1], atol=1e-5,
                                   rtol=1e-5)
        whole, _ = full(ids[:, :-1], ids[:, 1:])
    assert (logprobs - whole).min() > 1e-3  # the mass of the missing rows moves to the others
    assert num_params(model) == num_params(full)  # masked, not cut: checkpoints keep their shape


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_teacher_divergence_equals_the_naive_one_and_trains_the_student_alone(
        own_head, temperature, monkeypatch):
    """Guards: a gradient through the teacher (also where it shares the student's head), a chunk
    boundary, a temperature that only one of the two is divided by."""
    monkeypatch.setitem(model_file.LOGITS_PER_CHUNK, "cpu", 3 * 90)
    student, teacher = random_model(tiny(num_tokens=90)), random_model(tiny(num_tokens=90), seed=3)
    ids, grads, values = ids_of(2, 8, vocab=90), [], []
    hidden = teacher(ids[:, :-1])  # on purpose with a graph: it must be cut
    weight = student.head_weight if own_head else teacher.head_weight
    for chunked in (True, False):
        student.zero_grad()
        if chunked:
            logprobs, entropy, divergence = student(
                ids[:, :-1], ids[:, 1:], temperature=temperature, teacher=(hidden, weight, 0.3, 0.5)
            )
            plain = student(ids[:, :-1], ids[:, 1:], temperature=temperature)
            assert torch.equal(logprobs, plain[0]) and torch.equal(entropy, plain[1])
            assert not any(t._is_view() for t in (logprobs, entropy,
                                                  divergence)), "FSDP loses its hook on a view"
        else:
            w = (student if own_head else teacher).head_weight.detach()
            divergence = advantage.generalised_jsd(
                logits_of(student, ids[:, :-1]).flatten(0, 1) / temperature,
                (hidden.detach() @ w.T).flatten(0, 1) / temperature,
                0.3,
                0.5,
            ).view(2, 7)
        divergence.sum().backward()
        values.append(divergence.detach())
        grads.append([p.grad.clone() for p in student.parameters()])
    assert divergence.dtype == torch.float32 and values[0].min() > 0
    torch.testing.assert_close(*values, atol=1e-6, rtol=1e-5)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


# --------------------------------------------------------------------------------------------------
# loading errors: one line that names value, rule and fix


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop_shard(folder):
    (folder / "model.safetensors").unlink()
    save_hf(random_model(), None, folder, max_shard_bytes=50_000)
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
BREAKAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError,
                  ["has no config.json"]),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ValueError,
                      ["config.json", "not valid JSON"]),
    "no size": (lambda f: edit_config(f, hidden_size="absent"), ValueError, ["lacks hidden_size"]),
    "unknown family": (lambda f: edit_config(f, model_type="mamba"), ValueError,
                       ["'mamba'", "qwen3, qwen2, llama"]),
    "yarn": (lambda f: edit_config(f, rope_scaling={"rope_type": "yarn"}), ValueError,
             ["rope_type = 'yarn'"]),
    "half of llama3": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        ValueError,
        ["lacks low_freq_factor, high_freq_factor, original_max_position_embeddings"],
    ),
    "sliding window": (lambda f: edit_config(f, use_sliding_window=True), ValueError,
                       ["use_sliding_window = True"]),
    "gelu": (lambda f: edit_config(f, hidden_act="gelu"), ValueError, ["hidden_act = 'gelu'"]),
    "bias on o": (lambda f: edit_config(f, attention_bias=True), ValueError,
                  ["attention_bias = True", "qwen3"]),
    "heads": (lambda f: edit_config(f, num_key_value_heads=3), ValueError,
              ["4 is not divisible", "= 3"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError,
                   ["lacks model.safetensors"]),
    "missing shard": (drop_shard, FileNotFoundError, ["lacks model-00002-of-"]),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-1000]),
        ValueError,
        ["model.safetensors is truncated or corrupt"],
    ),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 5) + b"hello"),
        ValueError,
        ["model.safetensors is truncated or corrupt"],
    ),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), ValueError,
                       ["lacks 1 tensors", NORM]),
    "unexpected": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))), ValueError,
        ["unexpected tensor extra"]
    ),
    "misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update({DOWN: t[DOWN].T.contiguous()})),
        ValueError,
        [DOWN, "(80, 48)", "(48, 80)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_folder_is_named_in_one_line(name, tmp_path):
    """Guards: tracebacks out of third-party code, and models that load with random or wrong
    parts."""
    breakage, error, parts = BREAKAGES[name]
    save_hf(random_model(), None, tmp_path)
    load_hf(tmp_path)
    breakage(tmp_path)
    with pytest.raises(error) as caught:
        load_hf(tmp_path)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_folder_and_an_unreachable_hub_say_what_to_pass(tmp_path, monkeypatch):
    """Guards: a typo in a path that becomes a long network error; the hub's many-line text."""
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for name, part in [(str(tmp_path / "nowhere"), "does not exist"),
                       ("org/model", "did not serve it (OSError)")]:
        with pytest.raises(FileNotFoundError, match="pass") as caught:
            load_hf(name)
        assert part in str(caught.value) and name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_with_weights_and_tokenizer_only(tmp_path, monkeypatch):
    """Guards: Llama's second copy of the weights (*.pth) or ONNX exports on the wire."""
    import fnmatch

    import huggingface_hub

    save_hf(random_model(), None, tmp_path)
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert num_params(load_hf("Qwen/Qwen3-0.6B")) == num_params(tiny())
    assert asked["name"] == "Qwen/Qwen3-0.6B"

    def wanted(file):
        return any(fnmatch.fnmatch(file, pattern) for pattern in asked["patterns"])

    assert all(map(wanted, ["model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt",
                            "chat_template.jinja"]))
    assert not any(map(wanted, ["original/consolidated.00.pth", "pytorch_model.bin",
                                "onnx/model.onnx"]))


def test_more_tokens_than_rows_are_refused():
    """Guards: a tokenizer that does not belong to the model, met later as an index error on the
    device."""
    with pytest.raises(ValueError,
                       match=r"tokenizer has 98 tokens.* 97 rows; take .* out .*or add rows"):
        tiny(num_tokens=98)


@pytest.mark.parametrize("eos, ids", [("2", (2,)), ([2, "0"], (2, 0)), (0, (0,)), (None, ()),
                                      ("</s>", "is no token id")])
def test_stop_ids_are_numbers_however_a_config_writes_them(eos, ids):
    """Guards: a stop id '2' that no sampled token equals."""
    if isinstance(ids, str):
        with pytest.raises(ValueError, match=ids):
            tiny(eos_token_id=eos)
    else:
        assert tiny(eos_token_id=eos).eos_token_id == ids


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    model = random_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2] = bad
    save_hf(model, None, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight .* holds NaN or inf"):
        load_hf(tmp_path)


def test_folders_that_are_no_whole_weights_say_what_they_are(tmp_path):
    """Guards: a LoRA adapter, GGUF or quantised folder that ends in an error about a missing or
    strange tensor."""
    def refused(words, folder=tmp_path):
        for load in (load_hf, lambda path: plan.read_model_config(str(path))):
            with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
                load(folder)
            assert "\n" not in str(e.value)

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused("holds GGUF files; only safetensors")
    save_hf(random_model(), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("quantised .gptq.; training needs the original")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("is a LoRA adapter; merge it")
    with pytest.raises(ValueError, match="is a file; only safetensors"):
        load_hf(tmp_path / "model.gguf")


def test_quantised_tensors_are_refused(tmp_path):
    model = random_model()
    tensors = {name: t.to(torch.int8) if name.endswith("up_proj.weight") else t for name,
               t in model.state_dict().items()}
    save_hf(model, None, tmp_path, state_dict=tensors)
    with pytest.raises(ValueError, match="is torch.int8: quantised; use the original weights"):
        load_hf(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_positions_in_the_thousands_are_those_of_transformers(model_type):
    """Guards: positions rounded to bf16, which cannot count beyond 256, in training, prefill or
    decoding."""
    from transformers import AutoConfig, AutoModelForCausalLM
    model = random_model(tiny(model_type, max_position_embeddings=8192, num_hidden_layers=1))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_hf())).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    model.eval()
    ids = torch.randint(97, (1, 3001), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # of the last two columns
        logits = theirs(ids).logits[:, -2:].float()
        training = model(ids)[:, -2:] @ model.head_weight.T
        cache, prefilled = prefill(model, ids[:, :-1].tolist())
        larger = KVCache(model.config, 1, 3008)
        larger.write(torch.tensor([0]), cache, torch.tensor([0]))
        decoded = model(ids[:, -1:], positions=torch.tensor([[3000]]), cache=larger)
    torch.testing.assert_close(training, logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.stack([prefilled, decoded], dim=1), logits, atol=2e-5,
                               rtol=1e-4)
