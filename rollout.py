"""Rollouts: sampling completions with a KV cache, and packing them into training batches.

`generate` is the whole sampler: every distinct prompt is prefilled once and its cache copied to K rows, rows decode in
lockstep, those that have ended give way to those that wait. It knows token ids, never maths problems. Training consumes
the very ids that were sampled here (traps 1, 5): nothing is decoded and encoded again on the way to the loss.

Noise is a function of counters (trap 7): row (seed, stream, step, query, sample) owns a stream of uniforms, one per
position, so a row's sample does not depend on its batch mates, on the batch size, or on the process that draws it.

Deliberately missing: top-k, min-p, repetition penalties, beam search. Truncated sampling (top-p) is for evaluation
only: the trainer scores the full softmax, so rollouts must be drawn from it (trap 2).
"""
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from model import KVCache
from plan import rows_now

PREFIX, DIAGNOSIS, CORRECTION = 0, 1, 2       # role of a token in a reflection; tokens of ordinary rollouts are all PREFIX
ROLLOUT, REFLECTION, EVALUATION, PAIRING = 0, 1, 2, 3  # noise streams, the second counter of every key
DROP_EVERY = 8                                # tokens between two looks at which rows have ended (each makes the host wait)
DROP_SHARE = 1 / 8                            # they are dropped when so many have: that copies the whole cache
CUDA_GRAPHS = True                            # a decoding step is one launch; False: hundreds


@dataclass
class Completion:
    """What `generate` returns for one row. `ids` ends with the stop token iff `finished`; `logprobs` has one entry per id,
    under the very distribution the id was drawn from (temperature and top-p included)."""
    ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class Rollout:
    """One completion with all that is known about it: the unit of data until `collate`, one JSON line on disk."""
    uid: str                                  # of its problem
    group: str                                # advantage group: its query's, or that + "_reflected" (§3.4); never parsed
    prompt_ids: list[int]                     # the prompt it is TRAINED under: the plain question, for reflections too
    completion_ids: list[int]                 # ends with the stop token iff finished
    roles: list[int]                          # one per completion id
    finished: bool
    text: str                                 # derived from completion_ids, for grading and logs only
    query: int = 0                            # counts queries over the whole run: a problem met twice is two queries
    is_reflection: bool = False
    sample_logprobs: list[float] | None = None  # None for reflections: those were sampled under another prompt
    reward: float = 0.0
    grade: str = ""                           # reward.Grade.status
    answer: str | None = None                 # what the grader extracted
    advantage: float = 0.0
    logprobs: list[float] | None = None       # reflections only, for the logs: log-probs under the policy at the update ...
    ots_weights: list[float] | None = None    # ... and the Eq. 7 weight of every token, whether or not it was used


# Stands in where a process has nothing left to do but must keep step with the others: one token that counts nowhere.
FILLER = Rollout("", "", [0], [0], [PREFIX], finished=True, text="", is_reflection=True)


def row_noise(key: tuple[int, ...], n: int) -> np.ndarray:
    """n uniforms in [0, 1) that depend on the counters in `key` alone (Philox, a counter-based generator)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(n)


def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverse CDF. logits (B, V) fp32, uniforms (B,) fp64 -> tokens (B,), logprobs (B,) fp32.

    The log-prob is that of the distribution drawn from: softmax(logits / temperature), renormalised over the nucleus if
    top_p < 1. temperature 0 is greedy, with log-prob 0. Inverse CDF needs one uniform per row whatever V is, and no sync.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(logits.shape[0])
    logprobs = logits / temperature
    logprobs -= logprobs.logsumexp(-1, keepdim=True)    # not log_softmax, whose sum on a CPU drops the tail: 1e-4 off at V = 150k
    if top_p < 1:
        ranked, index = logprobs.exp().sort(dim=-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p   # mass before a token already reaches top_p: not in the nucleus
        outside = torch.zeros_like(outside).scatter(-1, index, outside)
        logprobs = torch.log_softmax(logprobs.masked_fill(outside, float("-inf")), dim=-1)
    cdf = logprobs.exp().double().cumsum(-1)            # fp64: in fp32 the tail of a 150k vocabulary would be rounded away
    # right=True finds the first entry ABOVE the threshold, so a token of probability 0 is never drawn
    tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).clamp_(max=cdf.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


@torch.no_grad()  # not inference_mode: its tensors could not be reused by the FSDP forward that follows
def generate(
    model,
    prompts: list[list[int]],
    n: int,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    keys: list[tuple[int, ...]],
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_rows: int = 256,
    progress: str = "",
) -> list[list[Completion]]:
    """Sample n completions for every prompt -> one list of n Completions per prompt, in order.

    keys holds one counter tuple per prompt, e.g. (seed, ROLLOUT, step, query); the sample's index is appended here.
    At most max_rows rows decode at once (0: as many as free memory holds); rows that wait take the place of those that
    have ended. `progress` labels a bar with tokens/s, shown on a terminal only; "" shows none.
    Raises ValueError for an empty prompt, a prompt that leaves no room in the context, or bad sampling knobs.
    """
    if not 0 < top_p <= 1 or temperature < 0:
        raise ValueError(f"top_p = {top_p}, temperature = {temperature}: top_p must be in (0, 1], temperature at least 0")
    limit = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens + max_new_tokens = {max_new_tokens} does not fit the context of {limit}; "
                "lower max_new_tokens or drop the problem")
    # Prompts of like length decode together (less padding).
    waiting = deque((i, j) for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])) for j in range(n))
    completions = [[None] * n for _ in prompts]
    device, width = model.head_weight.device, max_new_tokens + 1        # one column more: see draw
    # What is known of a row lies in its slot, from its prefill until it is dropped; row b of the cache has slot[b].
    max_rows = max_rows or rows_now(model, len(waiting), n, max(map(len, prompts), default=0), max_new_tokens)
    free, owner = list(range(min(max_rows, len(waiting)))), {}
    tokens = torch.zeros(len(free), width, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(free), width, device=device)
    uniforms = torch.zeros(len(free), width, dtype=torch.float64, device=device)
    drawn = torch.zeros(len(free), dtype=torch.int64, device=device)    # how many tokens it has
    ended = torch.zeros(len(free), dtype=torch.bool, device=device)
    is_stop = torch.isin(torch.arange(model.config.vocab_size, device=device), torch.tensor(stop_ids, device=device))  # (V,)
    slot, cache = drawn[:0], None

    def draw(logits: torch.Tensor, slot: torch.Tensor) -> None:
        """The next token of the rows in these slots. A row that has ended draws on until it is dropped, into the column
        behind its last token: there it counts nowhere."""
        at = slot, drawn[slot]
        token, logprobs[at] = sample(logits, uniforms[at], temperature, top_p)
        tokens[at] = token
        drawn[slot] += ~ended[slot]
        ended[slot] |= is_stop[token] | (drawn[slot] == max_new_tokens)

    def step() -> None:
        """One more token for every row: on the device alone, without a number of the host's that changes from step to step."""
        last = tokens[slot, drawn[slot] - 1]
        draw(model(last[:, None], cache=cache), slot)

    training = model.training
    model.eval()
    bar = tqdm(total=len(waiting), desc=progress, unit=" rows", leave=False, disable=None if progress else True)
    start, total = time.perf_counter(), 0
    while waiting or owner:
        if waiting and free:    # rows that wait take the place of rows that were dropped
            joining = [free.pop() for _ in range(min(len(free), len(waiting)))]
            owner |= {s: waiting.popleft() for s in joining}
            noise = np.stack([row_noise((*keys[i], j), width) for i, j in (owner[s] for s in joining)])
            distinct = list(dict.fromkeys(owner[s][0] for s in joining))
            new, logits = prefill(model, [prompts[i] for i in distinct], head=cache and cache.head)
            rows = torch.tensor([distinct.index(owner[s][0]) for s in joining], device=device)
            new.keep(rows)
            cache = new if cache is None else cache.append(new)
            joining = torch.tensor(joining, device=device)
            uniforms[joining], drawn[joining], ended[joining] = torch.from_numpy(noise).to(device), 0, False
            draw(logits[rows], joining)
            slot = torch.cat([slot, joining])
            del new, logits     # else the first cache would live on beside the next
        missing = max_new_tokens - torch.where(ended[slot], max_new_tokens, drawn[slot]).min()  # of the youngest row
        steps = min(DROP_EVERY, int(missing))
        cache.claim(steps)
        for _ in range(steps):
            if cache.again:
                cache.again()
            else:
                cache.again = record(step, device)
        # Dropping copies the cache, so a few rows that have ended are carried along.
        live = ~ended[slot]
        if live.sum() > len(slot) * (1 - DROP_SHARE):
            continue
        gone, slot = slot[~live], slot[live]
        for s, end, ids, lps in zip(*(x.tolist() for x in (gone, drawn[gone], tokens[gone], logprobs[gone])), strict=True):
            i, j = owner.pop(s)
            completions[i][j] = Completion(ids[:end], lps[:end], finished=ids[end - 1] in stop_ids)
            free.append(s)
            total += end
        cache = cache.keep(live.nonzero()[:, 0]) if owner else None
        bar.set_postfix_str(f"{total / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
        bar.update(len(gone))
    bar.close()
    model.train(training)
    return completions


def record(step, device: torch.device):
    """Take a step, and return what takes it again. On a GPU that is a CUDA graph: a step is hundreds of small kernels, and
    to launch them one by one takes longer than to run them. A graph reads and writes the very memory that step() did, so it
    ends with the first change of cache or rows and another is recorded; two at once would share cuBLAS's workspace."""
    step()  # also makes ready what may not be made while recording: plans, workspaces, compiled code
    if device.type != "cuda" or not CUDA_GRAPHS:
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, a checkpoint's writer, may go on meanwhile
        step()  # recorded, not run
    return graph.replay


def prefill(model, prompts: list[list[int]], head: torch.Tensor | None = None) -> tuple[KVCache, torch.Tensor]:
    """Keys and values of D prompts and the logits (D, V) of what follows each. head: that of an earlier cache."""
    device = model.head_weight.device
    width = max(map(len, prompts))
    # Left-padded, so that all rows write the same cache column; the padding is masked by its length, never by token value.
    inputs = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)          # (D, P)
    cache = KVCache(model.config, [width - len(p) for p in prompts], model.compute_dtype, device, head)
    return cache, model(inputs, cache=cache)


def completion_text(tokenizer, completion: Completion) -> str:
    """What the completion says, without its stop token: for the grader, the synthesis prompt and the logs, never the loss."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------------------------------
# from rollouts to training batches


@dataclass
class Batch:
    """One micro-batch: rows right-padded and shifted once, here. Every (B, T) tensor is aligned with `targets`:
    column t speaks of the token targets[:, t], predicted from inputs[:, :t + 1]."""
    inputs: torch.Tensor           # (B, T) int64
    targets: torch.Tensor          # (B, T) int64
    completion_mask: torch.Tensor  # (B, T) fp32, 1 on completion tokens (the stop token included), 0 on prompt and padding
    roles: torch.Tensor            # (B, T) int64, PREFIX on prompt and padding
    sample_logprobs: torch.Tensor  # (B, T) fp32, 0 where unknown
    advantages: torch.Tensor       # (B,) fp32
    is_reflection: torch.Tensor    # (B,) fp32, 1 for constructed trajectories
    loss_scale: torch.Tensor       # (B,) fp32, what one token of the row counts in the step's loss (advantage.loss_scales)

    def to(self, device) -> "Batch":
        """The same batch on another device, copied without waiting."""
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in self.__dict__.items()})


def collate(rollouts: list[Rollout], loss_scale: list[float]) -> Batch:
    """Rollouts of any lengths -> one right-padded Batch.

    prompt [5, 6], completion [7, 8, 2] next to prompt [5], completion [9, 2]:
        inputs           5 6 7 8      targets          6 7 8 2      completion_mask  0 1 1 1
                         5 9 0 0                       9 2 0 0                       1 1 0 0
    Masks come from lengths: a completion that contains the padding id in its middle is handled (trap 5).
    """
    width = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts) - 1
    inputs, targets, roles = (torch.zeros(len(rollouts), width, dtype=torch.int64) for _ in range(3))
    mask, sample_logprobs = (torch.zeros(len(rollouts), width) for _ in range(2))
    for b, r in enumerate(rollouts):
        ids = torch.tensor(r.prompt_ids + r.completion_ids)
        end = len(ids) - 1
        completion = slice(len(r.prompt_ids) - 1, end)
        inputs[b, :end], targets[b, :end] = ids[:-1], ids[1:]
        mask[b, completion] = 1.0
        roles[b, completion] = torch.tensor(r.roles)
        if r.sample_logprobs is not None:
            sample_logprobs[b, completion] = torch.tensor(r.sample_logprobs)
    return Batch(inputs, targets, mask, roles, sample_logprobs,
                 torch.tensor([r.advantage for r in rollouts], dtype=torch.float32),
                 torch.tensor([float(r.is_reflection) for r in rollouts]),
                 torch.tensor(loss_scale, dtype=torch.float32))


def microbatches(rollouts: list[Rollout], tokens_per_microbatch: int) -> list[list[int]]:
    """Indices of rollouts, sorted by length and cut so that no padded micro-batch exceeds the budget (rows x longest row).

    lengths [9, 3, 8, 4] and a budget of 18 give [[0, 2], [3, 1]]. A row longer than the budget is alone in its batch.
    """
    length = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    batches: list[list[int]] = []
    for i in sorted(range(len(rollouts)), key=lambda i: (-length[i], i)):
        # batches[-1][0] is the batch's longest row: the padded width of all of it
        if batches and (len(batches[-1]) + 1) * length[batches[-1][0]] <= tokens_per_microbatch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
