"""Rollouts: batched sampling with a KV cache.

`generate` is the whole sampler. Each distinct prompt is prefilled once and its KV cache copied to n
rows; each decoding step adds one token to every row; ended rows are removed and waiting rows take
their place (continuous batching). `generate` sees token ids, never problems. Training uses the
sampled ids themselves (traps 1, 5): no text is re-tokenised on the way to the loss.

Sampling noise is counter-based (trap 7): row (seed, stream, step, query, sample) has its own stream
of uniforms, one per position, so its sample does not depend on the other rows of the batch, on the
batch size, or on the rank.

Deliberately missing: top-k, min-p, repetition penalties, beam search. Truncated sampling (top-p) is
for evaluation only: the trainer scores the full softmax, so rollouts are drawn from it (trap 2).
"""
import time
from collections import deque
from dataclasses import dataclass, field
from operator import gt

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Problem
from memory import COLUMNS, KEEP_SHARE, PREFILL_TOKENS, bucket, rows_that_fit, total_memory
from model import KVCache
from parallel import microbatches

# token roles; PREFIX: the policy's own response, hence every token of an ordinary rollout
PREFIX, DIAGNOSIS, CORRECTION = 0, 1, 2
ROLLOUT, REFLECTION, EVALUATION, PAIRING = 0, 1, 2, 3  # noise streams, second counter of every key
LEAVE_EVERY = 8        # decoding steps between checks for ended rows (each check is a host sync)
LEAVE_SHARE = 1 / 8    # ended rows are removed once they make up this share of the live rows
BLOCK = 256            # tokens in a block of the vocabulary, see inverse_cdf
CUDA_GRAPHS = True     # replay a decoding step as one launch; False: hundreds of kernel launches


@dataclass
class Completion:
    """One sampled row. `ids` ends with the stop token iff `finished`; `logprobs` has one entry per
    id, under the distribution the id was sampled from (temperature and top-p applied)."""
    ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class Rollout:
    """One completion with its metadata: the unit of data up to `update.collate`.

    Per-token flags: `mask` 1 = the token contributes gradient, `ots` 1 = Eq. 7 weights the token.
    All lists except the two prompts have one entry per completion id.
    """
    problem: Problem
    group: str                  # advantage group: the query, or the query + "_reflected" (§3.4)
    prompt_ids: list[int]       # prompt used in TRAINING: the plain question, also for reflections
    completion_ids: list[int]   # ends with the stop token iff finished
    roles: list[int]
    finished: bool
    text: str                   # decoded completion_ids, for grading and logs only
    query: int = 0              # query number in the run: a problem drawn twice is two queries
    is_reflection: bool = False
    faithful: bool | None = None  # reflections: every newly written statement holds; None: has none
    sample_logprobs: list[float] | None = None  # None for reflections: sampled from another prompt
    reward: float = 0.0
    grade: str = ""             # reward.Grade.status, or 'truncated'
    answer: str | None = None   # what the grader extracted
    advantage: float = 0.0
    mask: list[float] = field(default_factory=list)  # default: all ones
    ots: list[float] = field(default_factory=list)   # default: all zeros
    loss_scale: float = 0.0     # weight of each trained token in the step's loss (Eq. 2, 6)
    old_logprobs: list[float] | None = None          # set if a step has several updates
    teacher_prompt_ids: list[int] | None = None      # OPSD: the teacher's prompt
    logprobs: list[float] | None = None     # reflections, for logs: policy log-probs at the update
    ots_weights: list[float] | None = None  # likewise: weights by `weighting`, also where ots = 0

    def __post_init__(self):
        self.mask = self.mask or [1.0] * len(self.completion_ids)
        self.ots = self.ots or [0.0] * len(self.completion_ids)

    def to_row(self, step: int, tokenizer) -> dict:
        """The fields saved to disk, as one JSON line."""
        hidden = {"problem", "ots", "old_logprobs", "teacher_prompt_ids"}
        row = {name: value for name, value in vars(self).items() if name not in hidden}
        return {"step": step, "uid": self.problem.uid, "question": self.problem.question,
                "gold": self.problem.answer, "prompt": tokenizer.decode(self.prompt_ids)} | row

    def __len__(self) -> int:
        """Tokens of the longest row in the update: under OPSD that is the teacher's."""
        return len(self.teacher_prompt_ids or self.prompt_ids) + len(self.completion_ids)


def sample_rollouts(model, tokenizer, queries: list[tuple[int, Problem]], n: int, *,
                    key: tuple[int, ...], **sampling) -> list[Rollout]:
    """Alg. 1 lines 1-6: n responses to each query, not yet scored.

    queries: [(query, Problem)] with encoded prompts; key: counters (seed, stream, step), to which
    the query is appended; sampling: arguments of `generate`.
    """
    groups = generate(model, [problem.prompt_ids for _, problem in queries], n,
                      keys=[(*key, query) for query, _ in queries], **sampling)
    rollouts = []
    for (query, problem), completions in zip(queries, groups, strict=True):
        for c in completions:
            rollouts.append(Rollout(
                problem, group=str(query), prompt_ids=problem.prompt_ids, completion_ids=c.ids,
                roles=[PREFIX] * len(c.ids), finished=c.finished, query=query,
                text=completion_text(tokenizer, c), sample_logprobs=c.logprobs))
    return rollouts


def completion_text(tokenizer, completion: Completion) -> str:
    """Decode without the stop token: for grading, prompts and logs, never for the loss."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def row_noise(key: tuple[int, ...], n: int) -> np.ndarray:
    """n uniforms in [0, 1), a function of the counters in `key` alone (Philox)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(n)


def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float,
           top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row. logits (B,V) fp32, uniforms (B,) fp64 -> tokens, logprobs (B,).

    The log-prob is under the sampling distribution: softmax(logits / temperature), renormalised
    over the nucleus if top_p < 1. temperature 0 is greedy, with log-prob 0. One uniform per row,
    for any V, and no host sync.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(logits.shape[0])
    if temperature != 1:
        logits = logits / temperature
    # not softmax: its sum on a CPU loses the tail, an error of 1e-4 at V = 150k
    total = logits.logsumexp(-1, keepdim=True)
    p = (logits - total).exp_()
    if top_p < 1:
        ranked, index = p.sort(dim=-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p  # mass of the tokens ranked above
        p.scatter_(-1, index, ranked.masked_fill_(outside, 0))
        total = total + p.sum(-1, keepdim=True).log()
    tokens = inverse_cdf(p, uniforms[:, None])
    return tokens[:, 0], (logits.gather(-1, tokens) - total)[:, 0]


def inverse_cdf(p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Index sampled with probability p / p.sum(): p (B,V) fp32, uniforms (B,1) fp64 -> (B,1).

    The CDF is fp64: fp32 rounds away the tail of a large vocabulary. A large vocabulary is sampled
    in two levels, a block and a token within the block: p is read once, without an fp64 copy.
    """
    B, V = p.shape
    if V <= 16 * BLOCK:
        cdf = p.double().cumsum(-1)
        return first_above(cdf, uniforms * cdf[:, -1:])
    blocks = F.pad(p, (0, -V % BLOCK)).view(B, -1, BLOCK)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (B,V / BLOCK)
    target = uniforms * cdf[:, -1:]
    block = first_above(cdf, target)
    before = F.pad(cdf, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(B, device=p.device), block[:, 0]].double().cumsum(-1)
    return block * BLOCK + first_above(inside, target - before)


def first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first entry of cdf (B,n) above target (B,1) -> (B,1): never a token of
    probability 0. A target rounded up to the last entry is clamped to just below that entry."""
    below = torch.nextafter(cdf[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(cdf, torch.minimum(target, below), right=True)


# --------------------------------------------------------------------------------------------------
# continuous batching


@torch.no_grad()  # not inference_mode: FSDP's next forward could not reuse inference tensors
def generate(model, prompts: list[list[int]], n: int, *, keys: list[tuple[int, ...]],
             max_new_tokens: int, stop_ids: tuple[int, ...], temperature: float = 1.0,
             top_p: float = 1.0, max_rows: int = 256, progress: str = "",
             decoder: "Decoder | None" = None) -> list[list[Completion]]:
    """Sample n completions for every prompt -> one list of n Completions per prompt, in order.

    keys: one counter tuple per prompt, e.g. (seed, ROLLOUT, step, query); the sample index is
    appended. max_rows: most rows that decode at once (0: as many as fit in free memory). progress:
    label of a progress bar with tokens/s, shown on a terminal only; "" shows none. decoder: reuse
    the memory and CUDA graphs of an earlier call's Decoder.
    Raises ValueError for an empty prompt, a prompt that leaves no room in the context, or bad
    sampling knobs.
    """
    if not 0 < top_p <= 1 or temperature < 0:
        raise ValueError(f"top_p = {top_p}, temperature = {temperature}: top_p must be in (0, 1], "
                         "temperature at least 0")
    context = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) <= context - max_new_tokens:
            raise ValueError(f"a prompt of {len(prompt)} tokens + max_new_tokens = {max_new_tokens}"
                             f" does not fit the context of {context}; lower max_new_tokens or "
                             "drop the problem")
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
    waiting = deque((i, j) for i in by_length for j in range(n))
    longest = max(map(len, prompts), default=1)
    decoder = decoder or Decoder()
    max_rows = max_rows or rows_that_fit(model, longest, max_new_tokens,
                                         held=decoder.cache.bytes if decoder.cache else 0)
    decoder.prepare(model, min(max_rows, len(waiting)), longest, max_new_tokens,
                    stop_ids=stop_ids, temperature=temperature, top_p=top_p)
    completions = [[None] * n for _ in prompts]

    bar = tqdm(total=len(waiting), desc=progress, unit=" rows", leave=False,
               disable=None if progress else True)
    start, n_tokens = time.perf_counter(), 0
    while waiting or decoder.live:
        if joining := min(len(waiting), max_rows - len(decoder.live)):
            names = [waiting.popleft() for _ in range(joining)]
            noise = [row_noise((*keys[i], j), max_new_tokens + 1) for i, j in names]
            decoder.join(names, [prompts[i] for i, _ in names], np.stack(noise))
        decoder.decode()
        for (i, j), ids, logprobs in decoder.leave():
            completions[i][j] = Completion(ids, logprobs, finished=ids[-1] in stop_ids)
            n_tokens += len(ids)
            bar.update()
        bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - start):,.0f} tokens/s", False)
    bar.close()
    if decoder.cache.bytes > KEEP_SHARE * total_memory(decoder.device):
        decoder.release()
    return completions


class Decoder:
    """The decoding batch: KV cache and per-row state, in memory kept between calls of `generate`.

    Row b of every tensor is one sequence in progress. R and C of the cache's shape (R, C) are
    bucketed; rows move only when the shape changes. A decoding step reads lengths and positions
    from device tensors, so one CUDA graph per shape is replayed for all later steps of that shape,
    in this call of `generate` or a later one.
    """

    def __init__(self):
        self.release()

    def release(self) -> None:
        """Free the KV cache and the captured graphs."""
        self.cache, self.captured, self.made_for, self.sizes = None, {}, None, (0, 0, 0)

    def prepare(self, model, rows: int, prompt: int, new: int, *, stop_ids, temperature: float,
                top_p: float) -> None:
        """Reserve memory for `rows` rows of up to `prompt` + `new` tokens. Memory and captured
        graphs of earlier calls are kept unless they are too small or the weights have moved."""
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.live: dict[int, object] = {}  # row -> name
        head, self.device = model.head_weight, model.head_weight.device
        # width: new tokens, and a scratch column
        sizes = bucket(rows), new + 1, bucket(rows) * bucket(prompt + new, COLUMNS)
        made_for = (model.config, head.dtype, *stop_ids,
                    *(weight.data_ptr() for weight in model.parameters()))
        if made_for != self.made_for or any(map(gt, sizes, self.sizes)):
            rows, width, cells = sizes = tuple(map(max, sizes, self.sizes))
            self.release()  # before allocating: never hold two caches
            self.made_for, self.sizes = made_for, sizes
            self.cache = KVCache(model.config, cells, 1, head.dtype, self.device)
            self.tokens = torch.zeros(rows, width, dtype=torch.int64, device=self.device)
            self.logprobs = torch.zeros(rows, width, device=self.device)
            self.uniforms = self.logprobs.double()
            # of each row: prompt length; new tokens so far; their final number, a cap until known
            self.lengths = torch.ones(rows, 3, dtype=torch.int64, device=self.device)
            self.prompt, self.new, self.end = self.lengths.T
            self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=self.device)
            self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.lengths.fill_(1)

    def fit(self, rows: int, columns: int) -> None:
        """Reshape the KV cache to the buckets of `rows` and `columns`. Live rows move to the front.
        """
        R, C = bucket(rows), bucket(columns, COLUMNS)
        if R == self.cache.shape[0] and C <= self.cache.shape[1]:
            return
        index = torch.tensor([*self.live], dtype=torch.int64, device=self.device)
        self.cache.reshape(index, R, C)
        for state in (self.tokens, self.logprobs, self.uniforms, self.lengths):
            state[:len(index)] = state[index]
        self.lengths[len(index):] = 1
        self.live = dict(enumerate(self.live.values()))

    def join(self, names: list, prompts: list[list[int]], noise: np.ndarray) -> None:
        """Prefill new rows, sample their first token. noise: uniforms (n, max_new_tokens + 1)."""
        needed = self.cache.shape[1] if self.live else 0  # by live rows
        self.fit(len(self.live) + len(names), max(needed, *map(len, prompts)))
        rows = [b for b in range(self.cache.shape[0]) if b not in self.live][:len(names)]
        self.live |= zip(rows, names, strict=True)
        index, width = torch.tensor(rows, device=self.device), noise.shape[1]
        self.uniforms[index, :width] = torch.from_numpy(noise).to(self.device)
        self.lengths[index] = torch.tensor([[len(prompt), 0, width - 1] for prompt in prompts],
                                           device=self.device)
        rows_of: dict[tuple, list[int]] = {}  # distinct prompt -> its rows
        for row, prompt in zip(rows, prompts, strict=True):
            rows_of.setdefault(tuple(prompt), []).append(row)
        distinct = list(rows_of)
        for part in microbatches(list(map(len, distinct)), PREFILL_TOKENS):
            cache, logits = prefill(self.model, [distinct[i] for i in part])
            pairs = [(row, k) for k, i in enumerate(part) for row in rows_of[distinct[i]]]
            index, which = torch.tensor(pairs, device=self.device).T
            self.cache.write(index, cache, which)
            self.draw(logits[which], index)

    def draw(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Sample the next token of `rows`. An ended row keeps sampling until it is removed, into
        the scratch column after its last token."""
        new, end = self.new[rows], self.end[rows]
        at = rows, new
        token, self.logprobs[at] = sample(logits, self.uniforms[at], self.temperature, self.top_p)
        self.tokens[at] = token
        self.new[rows] = new = new + (new < end)
        stopped = (token[:, None] == self.stop_ids).any(-1)
        self.end[rows] = torch.where(stopped, new, end)

    def step(self) -> None:
        """Decode one token per row. CUDA-graph safe: no host sync, no changing Python scalar."""
        rows = torch.arange(self.cache.shape[0], device=self.device)
        newest = self.new[rows] - 1
        positions = self.prompt[rows] + newest
        logits = self.model(self.tokens[rows, newest][:, None], positions=positions[:, None],
                            cache=self.cache)
        self.draw(logits, rows)

    def decode(self) -> None:
        """Decode LEAVE_EVERY tokens per row, fewer if all rows reach their limit before that."""
        prompt, new, end = self.lengths.cpu().numpy()[list(self.live)].T
        steps = min(LEAVE_EVERY, int(max(end - new)))
        self.fit(len(self.live), int(max(prompt + np.minimum(new + steps, end))))
        key = *self.cache.shape, self.temperature, self.top_p
        for _ in range(steps):
            if key in self.captured:
                self.captured[key]()
            else:
                self.captured[key] = capture(self.step, self.device, self.pool)

    def leave(self) -> list[tuple[object, list[int], list[float]]]:
        """Remove ended rows once they are LEAVE_SHARE of live rows -> [(name, ids, logprobs)]."""
        _, new, end = self.lengths.cpu().numpy().T
        gone = [b for b in self.live if new[b] == end[b]]
        if len(gone) < max(1, LEAVE_SHARE * len(self.live)):
            return []
        at = torch.tensor(gone, device=self.device), slice(int(max(end[gone])))
        return [(self.live.pop(b), ids[:end[b]], logprobs[:end[b]]) for b, ids, logprobs in
                zip(gone, self.tokens[at].tolist(), self.logprobs[at].tolist(), strict=True)]


def capture(step, device: torch.device, pool):
    """Run step(); -> a callable that runs it again. On a GPU the callable replays a CUDA graph:
    a step's hundreds of small kernels take longer to launch than to run. The graph reads and writes
    the same memory as step(). Graphs of one pool share temporaries, which is safe: they replay one
    at a time and their results lie outside the pool."""
    step()  # eager first: workspaces and compiled code must not be created during capture
    if device.type != "cuda" or not CUDA_GRAPHS:
        return step
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as a checkpoint writer, may use the GPU meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()  # recorded, not run
    return graph.replay


def prefill(model, prompts: list) -> tuple[KVCache, torch.Tensor]:
    """KV cache of D prompts, and logits (D,V) of the next token."""
    device, width = model.head_weight.device, max(map(len, prompts))
    # Right-padded, as in training. Padding is masked by length, not by id.
    inputs = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=device)
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    cache = KVCache(model.config, len(prompts), width, model.head_weight.dtype, device)
    return cache, model(inputs, cache=cache, last=last)
