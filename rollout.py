"""Rollouts: batched sampling with a KV cache.

`generate` is the whole sampler. Every distinct prompt is prefilled once and its cache copied to its
n rows; rows decode in lockstep; rows that have ended leave and waiting rows join (continuous
batching). It knows token ids, never problems. Training consumes the very ids that were sampled here
(traps 1, 5): nothing is decoded and encoded again on the way to the loss.

Noise is a function of counters (trap 7): row (seed, stream, step, query, sample) owns a stream of
uniforms, one per position, so a row's sample depends neither on the other rows of its batch, nor on
the batch size, nor on the process that draws it.

Deliberately missing: top-k, min-p, repetition penalties, beam search. Truncated sampling (top-p) is
for evaluation only: the trainer scores the full softmax, so rollouts are drawn from it (trap 2).
"""
import os
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from data import Problem
from model import KVCache

PREFIX, DIAGNOSIS, CORRECTION = 0, 1, 2  # roles of tokens; those of ordinary rollouts are PREFIX
ROLLOUT, REFLECTION, EVALUATION, PAIRING = 0, 1, 2, 3  # noise streams, second counter of every key
LEAVE_EVERY = 8        # decoded tokens between two checks for ended rows (each is a host sync)
LEAVE_SHARE = 1 / 8    # ended rows leave once they are so many of all: leaving copies the cache
CUDA_GRAPHS = True     # a decoding step is one launch; False: hundreds
MEMORY_SHARE = 0.8     # of free memory, that max_rows = 0 fills with rows ...
MOST_ROWS = 4096       # ... up to so many: more gain nothing


@dataclass
class Completion:
    """One sampled row. `ids` ends with the stop token iff `finished`; `logprobs` has one entry per
    id, of the very distribution the id was drawn from (temperature and top-p included)."""
    ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class Rollout:
    """One completion and all that is known about it: the unit of data up to `update.collate`.

    What a token is for is decided once, here: `mask` 1 = it carries gradient, `ots` 1 = Eq. 7
    weighs it. Every list without another length has one entry per completion id.
    """
    problem: Problem
    group: str                  # advantage group: its query's, or that + "_reflected" (§3.4)
    prompt_ids: list[int]       # prompt it is TRAINED under: for reflections the plain question too
    completion_ids: list[int]   # ends with the stop token iff finished
    roles: list[int]
    finished: bool
    text: str                   # decoded completion_ids, for grading and logs only
    query: int = 0              # counts queries of the run: a problem met twice is two queries
    is_reflection: bool = False
    faithful: bool | None = None  # of a reflection: its new equations all hold; None: it has none
    sample_logprobs: list[float] | None = None  # None: a reflection, sampled under another prompt
    reward: float = 0.0
    grade: str = ""             # reward.Grade.status
    answer: str | None = None   # what the grader extracted
    advantage: float = 0.0
    mask: list[float] = field(default_factory=list)  # default: all ones
    ots: list[float] = field(default_factory=list)   # default: all zeros
    loss_scale: float = 0.0     # share of one trained token in the step's loss (Eq. 2, 6)
    old_logprobs: list[float] | None = None          # where a step has several updates
    teacher_prompt_ids: list[int] | None = None      # OPSD: the prompt its teacher reads it under
    logprobs: list[float] | None = None     # of reflections, for the logs: policy at the update ...
    ots_weights: list[float] | None = None  # ... and Eq. 7's weight, whether or not it was used

    def __post_init__(self):
        self.mask = self.mask or [1.0] * len(self.completion_ids)
        self.ots = self.ots or [0.0] * len(self.completion_ids)

    def to_row(self, step: int, tokenizer) -> dict:
        """What is kept of it on disk, one JSON line."""
        hidden = {"problem", "ots", "old_logprobs", "teacher_prompt_ids"}
        row = {name: value for name, value in vars(self).items() if name not in hidden}
        return {"step": step, "uid": self.problem.uid, "question": self.problem.question,
                "gold": self.problem.answer, "prompt": tokenizer.decode(self.prompt_ids)} | row

    def __len__(self) -> int:
        """Tokens of the longest row the update makes of it."""
        return len(self.teacher_prompt_ids or self.prompt_ids) + len(self.completion_ids)


def sample_rollouts(model, tokenizer, queries: list[tuple[int, Problem]], n: int, *,
                    key: tuple[int, ...], **sampling) -> list[Rollout]:
    """Alg. 1 lines 1-6: n responses to each query, not yet scored.

    queries [(query, Problem)], prompts encoded; key: counters (seed, stream, step), the query is
    appended; sampling: see `generate`.
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
    """The completion without its stop token: for grader, prompts and logs, never the loss."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def row_noise(key: tuple[int, ...], n: int) -> np.ndarray:
    """n uniforms in [0, 1), a function of the counters in `key` alone (Philox)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(n)


def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float,
           top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverse CDF. logits (B,V) fp32, uniforms (B,) fp64 -> tokens, logprobs.

    The log-prob is that of the distribution drawn from: softmax(logits / temperature), renormalised
    over the nucleus if top_p < 1. temperature 0 is greedy, with log-prob 0. One uniform per row
    whatever V is, and no host sync.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(logits.shape[0])
    logprobs = logits / temperature
    # not log_softmax, whose sum on a CPU drops the tail: 1e-4 off at V = 150k
    logprobs -= logprobs.logsumexp(-1, keepdim=True)
    if top_p < 1:
        ranked, index = logprobs.exp().sort(dim=-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p  # the mass before a token reaches top_p
        outside = torch.zeros_like(outside).scatter(-1, index, outside)
        logprobs = torch.log_softmax(logprobs.masked_fill(outside, float("-inf")), dim=-1)
    cdf = logprobs.exp().double().cumsum(-1)  # fp32 would round away the tail of a 150k vocabulary
    # right=True finds the first entry ABOVE the threshold: a token of probability 0 is never drawn
    tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)
    tokens = tokens.clamp_(max=cdf.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


# --------------------------------------------------------------------------------------------------
# continuous batching


@torch.no_grad()  # not inference_mode: its tensors could not be reused by FSDP's next forward
def generate(model, prompts: list[list[int]], n: int, *, keys: list[tuple[int, ...]],
             max_new_tokens: int, stop_ids: tuple[int, ...], temperature: float = 1.0,
             top_p: float = 1.0, max_rows: int = 256, progress: str = "") -> list[list[Completion]]:
    """Sample n completions for every prompt -> one list of n Completions per prompt, in order.

    keys: one counter tuple per prompt, e.g. (seed, ROLLOUT, step, query); the sample's index is
    appended. At most max_rows rows decode at once (0: as many as free memory holds). `progress`
    labels a bar with tokens/s, shown on a terminal only; "" shows none.
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
    if not max_rows:
        max_rows = rows_that_fit(model, max(map(len, prompts), default=1), max_new_tokens)
    decoder = Decoder(model, min(max_rows, len(waiting)), max_new_tokens=max_new_tokens,
                      stop_ids=stop_ids, temperature=temperature, top_p=top_p)
    completions = [[None] * n for _ in prompts]
    free, owner = list(range(len(decoder.tokens))), {}  # slots; slot -> (prompt, sample)

    training = model.training
    model.eval()
    bar = tqdm(total=len(waiting), desc=progress, unit=" rows", leave=False,
               disable=None if progress else True)
    start, n_tokens = time.perf_counter(), 0
    while waiting or owner:
        if waiting and free:
            slots = [free.pop() for _ in range(min(len(free), len(waiting)))]
            owner |= {slot: waiting.popleft() for slot in slots}
            noise = [row_noise((*keys[i], j), max_new_tokens + 1)
                     for i, j in map(owner.get, slots)]
            decoder.join(slots, [prompts[owner[slot][0]] for slot in slots], np.stack(noise))
        decoder.decode()
        for slot, ids, logprobs in decoder.leave():
            i, j = owner.pop(slot)
            completions[i][j] = Completion(ids, logprobs, finished=ids[-1] in stop_ids)
            free.append(slot)
            n_tokens += len(ids)
            bar.update()
        bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - start):,.0f} tokens/s", False)
    bar.close()
    model.train(training)
    return completions


class Decoder:
    """Rows that decode together: their KV cache, and their state in slots on the device.

    A row keeps its slot from `join` to `leave`; row b of the cache belongs to slot[b].
    """

    def __init__(self, model, n_slots: int, *, max_new_tokens: int, stop_ids, temperature, top_p):
        self.model, self.device = model, model.head_weight.device
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        shape = n_slots, max_new_tokens + 1  # the last column: scratch, see `draw`
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(shape, device=self.device)
        self.uniforms = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.drawn = torch.zeros(n_slots, dtype=torch.int64, device=self.device)  # tokens so far
        self.ended = torch.zeros(n_slots, dtype=torch.bool, device=self.device)
        vocabulary = torch.arange(model.config.vocab_size, device=self.device)
        self.is_stop = torch.isin(vocabulary, torch.tensor(stop_ids, device=self.device))  # (V,)
        self.slot, self.cache, self.replay = self.drawn[:0], None, None

    def join(self, slots: list[int], prompts: list[list[int]], noise: np.ndarray) -> None:
        """Prefill new rows, draw their first token, append them to the cache. noise (n, width)."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        cache, logits = prefill(self.model, distinct, head=self.cache and self.cache.head)
        number = {prompt: k for k, prompt in enumerate(distinct)}
        rows = torch.tensor([number[tuple(p)] for p in prompts], device=self.device)
        cache.keep(rows)
        self.cache = cache if self.cache is None else self.cache.append(cache)
        slots = torch.tensor(slots, device=self.device)
        self.uniforms[slots] = torch.from_numpy(noise).to(self.device)
        self.drawn[slots], self.ended[slots] = 0, False
        self.draw(logits[rows], slots)
        self.slot, self.replay = torch.cat([self.slot, slots]), None

    def draw(self, logits: torch.Tensor, slot: torch.Tensor) -> None:
        """The next token of the rows in these slots. A row that has ended draws on until it leaves,
        into the scratch column behind its last token."""
        at = slot, self.drawn[slot]
        token, self.logprobs[at] = sample(logits, self.uniforms[at], self.temperature, self.top_p)
        self.tokens[at] = token
        self.drawn[slot] += ~self.ended[slot]
        self.ended[slot] |= self.is_stop[token] | (self.drawn[slot] == self.max_new_tokens)

    def step(self) -> None:
        """Decode one token per row. CUDA-graph safe: no host sync, no scalar that changes."""
        last = self.tokens[self.slot, self.drawn[self.slot] - 1]
        self.draw(self.model(last[:, None], cache=self.cache), self.slot)

    def decode(self) -> None:
        """Decode LEAVE_EVERY tokens, fewer if the youngest row is nearer to its cap."""
        ended, drawn = self.ended[self.slot], self.drawn[self.slot]
        youngest = torch.where(ended, self.max_new_tokens, drawn).min()
        steps = min(LEAVE_EVERY, int(self.max_new_tokens - youngest))
        if self.cache.reserve(steps):  # the cache has moved
            self.replay = None
        for _ in range(steps):
            if self.replay:
                self.replay()
            else:
                self.replay = capture(self.step, self.device)

    def leave(self) -> list[tuple[int, list[int], list[float]]]:
        """Remove ended rows once they are LEAVE_SHARE of all -> [(slot, ids, logprobs)]."""
        live = ~self.ended[self.slot]
        if live.sum() > len(self.slot) * (1 - LEAVE_SHARE):
            return []
        gone, self.slot, self.replay = self.slot[~live], self.slot[live], None
        self.cache = self.cache.keep(live.nonzero()[:, 0]) if len(self.slot) else None
        rows = zip(*(x[gone].tolist() for x in (self.drawn, self.tokens, self.logprobs)),
                   strict=True)
        return [(slot, ids[:end], logprobs[:end])
                for slot, (end, ids, logprobs) in zip(gone.tolist(), rows, strict=True)]


def capture(step, device: torch.device):
    """Run a step; -> a callable that runs it again. On a GPU that replays a CUDA graph: a step is
    hundreds of small kernels, and launching them takes longer than running them. A graph reads and
    writes the memory that step() did, so it dies with a change of rows or cache; only one lives at
    a time, as two would share cuBLAS's workspace."""
    step()  # also creates what must not be created while capturing: workspaces, compiled code
    if device.type != "cuda" or not CUDA_GRAPHS:
        return step
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, a checkpoint's writer, may use the GPU meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()  # recorded, not run
    return graph.replay


def prefill(model, prompts: list, head: torch.Tensor | None = None) -> tuple[KVCache, torch.Tensor]:
    """Keys and values of D prompts, and logits (D,V) of the next token.

    head: of an earlier cache, so that it is cast once.
    """
    device, width = model.head_weight.device, max(map(len, prompts))
    # Left-padded: all rows write the same cache column. Padding is masked by length, not by id.
    inputs = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    starts = [width - len(p) for p in prompts]
    cache = KVCache(model.config, starts, model.compute_dtype, device, head)
    return cache, model(inputs, cache=cache)


def row_bytes(config, prompt: int, new: int, size: int) -> float:
    """About what one row of `prompt` + `new` tokens takes at its peak; size: bytes of a number."""
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    prefilling = prompt * (column + (3 * config.intermediate_size + 8 * config.hidden_size) * size)
    # growing copies one layer's keys; sampling holds logits, log-probs, their exp and its fp64 sum
    decoding = 1.1 * (prompt + new) * column + 24 * config.num_tokens
    return max(prefilling, decoding)


def rows_that_fit(model, prompt: int, new: int) -> int:
    """max_rows = 0: rows of `prompt` + `new` tokens in MEMORY_SHARE of free memory, at least 1."""
    device = model.head_weight.device
    if device.type == "cuda":  # what the driver has left, and what torch holds without using it
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    row = row_bytes(model.config, prompt, new, model.compute_dtype.itemsize)
    return max(1, min(MOST_ROWS, int(MEMORY_SHARE * free / row)))
