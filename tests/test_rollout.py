"""The sampler against the trainer, on models of 7,000 parameters."""
import itertools
import json
import math

import pytest
import torch
from conftest import HostReads, Recorded

import rollout
import toy
from data import Problem
from hf import load_hf, save_hf
from model import CausalLM, ModelConfig
from rollout import (
    PREFIX,
    Completion,
    Decoder,
    Rollout,
    generate,
    row_noise,
    sample,
)

# the smallest and the largest uniform that a generator of doubles returns
EDGES = (0.0, 1 - 2**-53)
# prompts; two begin with the id that also pads
RAGGED = [[5, 1, 2], [4], [0, 0, 3, 7, 1, 6], [0, 2], [8, 8, 8, 8]]


@pytest.fixture(autouse=True)
def many_buckets(monkeypatch):
    """Buckets so small that a few tokens leave one, as thousands do in a run."""
    monkeypatch.setattr(rollout, "COLUMNS", 4)


def tiny_model(*, vocab_size: int = 9, num_tokens: int = 0, tied: bool = True,
               std: float = 0.3) -> CausalLM:
    """Two layers of width 16, weights large enough that its distributions are far from uniform."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(
        vocab_size=vocab_size, num_tokens=num_tokens, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=std)
    return model


def draw(model, prompts=RAGGED, n=3, *, max_new_tokens=20, stop_ids=(3,), keys=None,
         **knobs) -> list[list[Completion]]:
    keys = [(0, 0, 0, i) for i in range(len(prompts))] if keys is None else keys
    return generate(model, prompts, n, max_new_tokens=max_new_tokens, stop_ids=stop_ids, keys=keys,
                    **knobs)


def rollout_of(prompt: list[int], ids: list[int], **fields) -> Rollout:
    fields = {"roles": [PREFIX] * len(ids)} | fields
    return Rollout(Problem("u", "Q", "8"), group="0", prompt_ids=prompt, completion_ids=ids,
                   finished=True, text="", **fields)


def as_rollout(prompt: list[int], completion: Completion, **fields) -> Rollout:
    return rollout_of(prompt, completion.ids, sample_logprobs=completion.logprobs, **fields)


def trainer_logprobs(model, prompt: list[int], ids: list[int],
                     temperature: float = 1.0) -> torch.Tensor:
    """log p of a completion, all alone in its batch: what the sampler has to agree with."""
    with torch.no_grad():
        inputs, targets = torch.tensor([prompt + ids[:-1]]), torch.tensor([prompt[1:] + ids])
        return model(inputs, targets, temperature=temperature)[0][0, len(prompt) - 1:]


def same(a: list[list[Completion]], b: list[list[Completion]]) -> bool:
    """Equal ids and flags, log-probs up to float noise."""
    return all(
        x.ids == y.ids and x.finished == y.finished and x.logprobs
        == pytest.approx(y.logprobs, abs=1e-4)
        for group_a, group_b in zip(a, b, strict=True) for x,
        y in zip(group_a, group_b, strict=True))


@pytest.fixture
def calls():
    """A list that collects the shape of the inputs of every forward pass of `calls.of(model)`."""
    class Calls(list):
        def of(self, model):
            model.register_forward_pre_hook(lambda _, inputs: self.append(tuple(inputs[0].shape)))
            return model
    return Calls()


# --------------------------------------------------------------------------------------------------
# the distribution that is drawn from


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_draws_from_the_density_the_trainer_scores(temperature):
    """Guards trap 2: a temperature that divides the logits on one side only. Chi-square over all
    completions of up to two tokens, a fixed seed, the 99.9 % point of 20 degrees of freedom."""
    model, n = tiny_model(vocab_size=5, std=0.1), 4000
    (completions,) = draw(model, [[2, 1]], n, max_new_tokens=2, stop_ids=(4,),
                          temperature=temperature, max_rows=n)
    cells = [(4,), *itertools.product(range(4), range(5))]
    expected = [n * trainer_logprobs(model, [2, 1], list(ids), temperature).sum().exp().item()
                for ids in cells]
    counts = {ids: 0 for ids in cells}
    for completion in completions:
        counts[tuple(completion.ids)] += 1
    assert sum(expected) == pytest.approx(n, rel=1e-5) and min(expected) > 5
    assert sum((counts[ids] - e) ** 2 / e for ids, e in zip(cells, expected)) < 45.3
    # ... and the test has the power to tell: the other temperature is refused by a wide margin
    other = [n * trainer_logprobs(model, [2, 1], list(ids), 1.7 - temperature).sum().exp().item()
             for ids in cells]
    assert sum((counts[ids] - e) ** 2 / e for ids, e in zip(cells, other)) > 200


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("tied", [True, False])
def test_returned_logprobs_are_the_trainers(tied, temperature):
    """Guards trap 8: stale caches, positions off by one after left padding or after rows were
    dropped."""
    model = tiny_model(tied=tied)
    for prompt, group in zip(RAGGED, draw(model, temperature=temperature)):
        for c in group:
            expected = trainer_logprobs(model, prompt, c.ids, temperature)
            assert len(c.logprobs) == len(c.ids)
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4, rtol=0)


def grid(n: int) -> torch.Tensor:
    """n uniforms, evenly spaced: by inverse CDF the share of a token is its probability to 1 /
    n."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("top_p,nucleus", [
    (1.0, {0, 1, 2, 3, 4}), (0.94, {0, 1, 2, 4}), (0.9, {1, 2, 4}), (0.72, {1, 2, 4}),
    (0.7, {2, 4}), (0.01, {4})])
def test_top_p_draws_from_the_smallest_nucleus_renormalised(top_p, nucleus):
    """Guards: the token that crosses top_p left out or one too many kept; ranks not scattered back;
    and a log-prob of the full softmax reported for a truncated draw."""
    p, n = [0.05, 0.2, 0.21, 0.04, 0.5], 20000
    expected = [x * (i in nucleus) / sum(p[j] for j in nucleus) for i, x in enumerate(p)]
    tokens, logprobs = sample(torch.tensor(p).log().expand(n, -1), grid(n), 1.0, top_p)
    assert (torch.bincount(tokens, minlength=5) / n).tolist() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(logprobs.exp(), torch.tensor(expected)[tokens], atol=1e-6, rtol=0)


def test_each_row_has_its_own_nucleus():
    """Guards: ranks of one row scattered into another."""
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]]).log()
    for u in grid(50):
        assert sample(logits, u.expand(2), 1.0, 0.8)[0].tolist() == [0, 2]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("u", EDGES)
def test_a_token_of_probability_zero_is_never_drawn(u, top_p):
    """Guards: searchsorted from the left at u = 0, and u * total rounding up to the total at the
    other edge."""
    logits = torch.full((200, 12), -math.inf)
    logits[:, 2:9] = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = -math.inf
    tokens, logprobs = sample(logits, torch.full((200,), u, dtype=torch.float64), 1.0, top_p)
    assert logits.gather(1, tokens[:, None]).isfinite().all() and logprobs.isfinite().all()
    if top_p == 1:
        assert (tokens == (2 if u == 0 else 8)).all()


def test_the_tail_of_a_large_vocabulary_can_be_drawn():
    """Guards: a CDF in fp32, where adding 1e-10 to 0.9999999 changes nothing and rare tokens do not
    exist."""
    logits = torch.full((1, 1001), math.log(1e-10))
    logits[0, 0] = 0.0
    u = 1 - 1e-7 * grid(3000)
    assert len(sample(logits.expand(3000, -1), u, 1.0, 1.0)[0].unique()) > 900


def test_logprobs_of_a_large_vocabulary_are_exact():
    """torch.log_softmax adds 150k small terms to a large one in fp32 on a CPU, and loses some of
    them."""
    logits = torch.full((1, 151_669), -22.0) + torch.rand(
        1, 151_669, generator=torch.Generator().manual_seed(0))
    logits[0, 5] = 0.0
    token, logprob = sample(logits, torch.tensor([0.0], dtype=torch.float64), 1.0, 1.0)
    assert logprob.item() == pytest.approx(logits.double().log_softmax(-1)[0, token].item(),
                                           abs=1e-6)
    assert logits[0, 5] == 0.0  # the caller's logits are left alone


def test_temperature_zero_is_greedy_and_every_sample_the_same():
    """Guards: a division by zero, and an argmax of something else than the trainer's
    distribution."""
    model = tiny_model()
    for prompt, group in zip(RAGGED, draw(model, temperature=0.0)):
        assert all(c == group[0] for c in group) and group[0].logprobs == [0.0] * len(group[0].ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + group[0].ids[:-1]])) @ model.head_weight.T
        assert group[0].ids == logits[0, len(prompt) - 1:].argmax(-1).tolist()


# --------------------------------------------------------------------------------------------------
# noise


def test_a_rows_noise_is_a_function_of_its_counters():
    """Guards trap 7: state shared between rows; a longer cap that changes the first tokens;
    counters that commute."""
    keys = list(itertools.product((0, 1), (0, 1, 2), (0, 1), (0, 5), (0, 1)))
    noise = {key: row_noise(key, 6) for key in keys}
    assert all((row_noise(key, 6) == x).all() and (row_noise(key, 40)[:6] == x).all() for key,
               x in noise.items())
    assert len({x.tobytes() for x in noise.values()}) == len(keys)
    assert len({u for x in noise.values() for u in x}) == 6 * len(keys)
    many = row_noise((0,), 10000)
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.02


def test_streams_are_told_apart():
    assert len({rollout.ROLLOUT, rollout.REFLECTION, rollout.EVALUATION, rollout.PAIRING}) == 4


def test_a_sample_does_not_depend_on_who_shares_its_batch():
    """Guards trap 7: noise drawn per batch; left padding that leaks into attention or positions;
    rows returned out of order, or to another prompt; a prompt that begins with the padding id."""
    model = tiny_model()
    together = draw(model)
    assert len({tuple(c.ids) for group in together for c in group}) > 10
    assert same(together, [draw(model, [p], keys=[(0, 0, 0, i)])[0] for i, p in enumerate(RAGGED)])
    order = [3, 0, 4, 2, 1]
    shuffled = draw(model, [RAGGED[i] for i in order], keys=[(0, 0, 0, i) for i in order])
    assert same(shuffled, [together[i] for i in order])


@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_max_rows_changes_nothing_but_the_width(max_rows, calls):
    """Guards: a prompt with more samples than max_rows whose second part starts again at sample 0,
    or is lost."""
    model = tiny_model()
    expected = draw(model, n=5, max_new_tokens=8, max_rows=256)
    assert same(draw(calls.of(model), n=5, max_new_tokens=8, max_rows=max_rows), expected)
    assert max(rows for rows, _ in calls) <= max_rows
    assert all(len({tuple(c.ids) for c in group}) > 2 for group in expected)


def test_more_samples_leave_the_first_ones_as_they_were():
    model = tiny_model()
    six = draw(model, n=6)
    assert same(draw(model, n=1), [group[:1] for group in six])
    assert same(draw(model, n=4), [group[:4] for group in six])


def test_other_counters_give_other_samples():
    """Guards: a counter left out of the key, so that two steps or two ranks sample the same."""
    model, keys = tiny_model(), [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0),
                                 (0, 0, 0, 1)]
    groups = draw(model, [[5, 1, 2]] * 5, n=4, keys=keys, max_new_tokens=12, stop_ids=())
    assert len({tuple(c.ids) for group in groups for c in group}) == 20


# --------------------------------------------------------------------------------------------------
# where a completion ends


@pytest.mark.parametrize("stop_ids", [(3,), (3, 7), (0,), (0, 5, 8)])
def test_a_completion_ends_with_its_first_stop_token_and_nothing_follows(stop_ids):
    """Guards trap 5: the stop token cut off or followed by what was decoded after it; only the
    first of several stop ids known; a stop id 0 taken for padding; `finished` set by something else
    than a stop token."""
    groups = draw(tiny_model(), n=16, max_new_tokens=12, stop_ids=stop_ids)
    completions = [c for group in groups for c in group]
    for c in completions:
        assert len(c.ids) == len(c.logprobs) and 1 <= len(c.ids) <= 12
        assert not set(c.ids[:-1]) & set(stop_ids)
        assert c.finished == (c.ids[-1] in stop_ids) and (c.finished or len(c.ids) == 12)
        assert all(0 <= i < 9 for i in c.ids) and all(lp < 0 for lp in c.logprobs)
    assert {c.finished for c in completions} == {True, False} or len(stop_ids) == 3
    assert {c.ids[-1] for c in completions if c.finished} == set(stop_ids)


def test_a_stop_token_in_the_last_column_counts_as_finished():
    """Guards: `finished` read off the length."""
    model = tiny_model()
    long = [c for group in draw(model, n=16) for c in group if c.finished and len(c.ids) > 3]
    cap = len(long[0].ids)
    again = [c for group in draw(model, n=16, max_new_tokens=cap) for c in group]
    assert any(c.finished and len(c.ids) == cap for c in again)
    assert all(c.finished == (c.ids[-1] == 3) for c in again)


def test_max_new_tokens_cuts_and_is_no_reason_to_stop():
    model = tiny_model()
    whole = draw(model, max_new_tokens=30, stop_ids=())
    assert all(len(c.ids) == 30 and not c.finished for group in whole for c in group)
    for cap in (1, 2, 9):
        cut = draw(model, max_new_tokens=cap, stop_ids=())
        expected = [[Completion(c.ids[:cap], c.logprobs[:cap], False)
                     for c in group] for group in whole]
        assert same(cut, expected)


def test_the_padding_id_in_the_middle_is_a_token_like_any_other():
    """Guards trap 5: padding found by value. Completions keep an id 0 inside, and its log-prob is
    the trainer's."""
    model = tiny_model()
    inside = [(p, c) for p, group in zip(RAGGED, draw(model, n=8)) for c in group
              if 0 in c.ids[:-2]]
    assert len(inside) > 5
    for prompt, c in inside:
        torch.testing.assert_close(torch.tensor(c.logprobs), trainer_logprobs(model, prompt, c.ids),
                                   atol=1e-4, rtol=0)


@pytest.mark.parametrize("drop_every,drop_share", [(1, 0), (3, 0.5), (10**9, 1)])
def test_dropping_finished_rows_changes_nothing(drop_every, drop_share, monkeypatch):
    """Guards: cache, lengths, noise or output rows that lose their alignment when rows leave the
    batch."""
    model = tiny_model()
    expected = draw(model, n=8, max_new_tokens=30, stop_ids=(3, 7))
    monkeypatch.setattr(rollout, "LEAVE_EVERY", drop_every)
    monkeypatch.setattr(rollout, "LEAVE_SHARE", drop_share)
    assert same(draw(model, n=8, max_new_tokens=30, stop_ids=(3, 7)), expected)


def test_rows_that_wait_take_the_place_of_those_that_ended(monkeypatch, calls):
    """Guards: a batch that shrinks to its longest row while others wait; a newcomer whose prompt is
    longer or shorter than what the others have written, put at other positions or columns than its
    own; columns that grow with every newcomer."""
    monkeypatch.setattr(rollout, "LEAVE_EVERY", 1)
    monkeypatch.setattr(rollout, "LEAVE_SHARE", 0)
    monkeypatch.setattr(rollout, "COLUMNS", 4)
    prompts = [*RAGGED, [1, 2, 4] * 10, [6] * 17]
    model, widths = tiny_model(), []
    expected = draw(model, prompts, n=4, max_new_tokens=30, stop_ids=(3, 7))
    lengths = [len(c.ids) for group in expected for c in group]
    assert min(lengths) < 5 and max(lengths) > 15
    model.register_forward_hook(lambda _, args, kwargs,
                                out: widths.append(kwargs["cache"].shape[1]), with_kwargs=True)
    assert same(draw(calls.of(model), prompts, n=4, max_new_tokens=30, stop_ids=(3, 7), max_rows=6),
                expected)
    last_prefill = max(i for i, (_, tokens) in enumerate(calls) if tokens > 1)
    decoded = [rows for rows, tokens in calls[:last_prefill] if tokens == 1]
    assert set(decoded) == {6} and len(decoded) > 20
    assert max(widths) <= rollout.bucket(30 + 30 + 1, 4) < sum(lengths) / 6 + 30


@pytest.mark.parametrize("max_rows", (2, 3, 5))
def test_a_row_at_its_cap_needs_no_room_for_the_tokens_that_younger_rows_draw(max_rows):
    """Bug: columns for the tokens of a block of steps beyond a row's cap, more than the memory has,
    where rows that joined later decode on."""
    model, prompts = tiny_model(), [[1, 2]] * 3 + [[1, 2, 4] * 6] * 2
    knobs = {"n": 4, "max_new_tokens": 21, "stop_ids": (3, 7)}  # 18 + 21 + 1 columns: a bucket
    assert same(draw(model, prompts, **knobs, max_rows=max_rows), draw(model, prompts, **knobs))


def test_prompts_are_prefilled_once_and_finished_rows_cost_no_more_than_a_bucket(
        monkeypatch, calls):
    """Guards: K prefills of one prompt, rows decoded on to the cap, a last forward pass whose
    logits nobody reads."""
    monkeypatch.setattr(rollout, "LEAVE_EVERY", 1)
    monkeypatch.setattr(rollout, "LEAVE_SHARE", 0)
    groups = draw(calls.of(tiny_model()), n=4, max_new_tokens=50, stop_ids=(3, 7))
    lengths = [len(c.ids) for group in groups for c in group]
    assert calls[0] == (5, 6) and len(calls) == max(lengths) < 50
    decoded = [sum(n > t for n in lengths) for t in range(1, max(lengths))]
    # some rows end at once, with the token of the prefill, and leave one token later
    assert decoded[0] < 20
    assert [rows for rows, _ in calls[1:]] == [20, *map(rollout.bucket, decoded[1:])]
    calls.clear()
    draw(calls.of(tiny_model()), n=2, max_new_tokens=7, stop_ids=())
    assert len(calls) == 7


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_logprobs_of_the_sampler_are_the_trainers_where_rows_join(dtype):
    """Guards trap 8."""
    model = tiny_model().to(dtype)
    for prompt, group in zip(RAGGED, draw(model, max_rows=4), strict=True):  # 15 rows
        for completion in group:
            gap = (torch.tensor(completion.logprobs) - trainer_logprobs(
                model, prompt, completion.ids)).abs()
            assert gap.mean() < (1e-5 if dtype == torch.float32 else 0.05)


def test_the_host_looks_at_the_device_twice_in_eight_tokens():
    """Bug: a finish flag, or a token, read at every step: on a GPU the decoding loop then waits for
    every kernel."""
    def reads(max_new_tokens):
        with HostReads() as seen:
            # no row ends before its cap
            draw(tiny_model(), n=4, max_new_tokens=max_new_tokens, stop_ids=(99,))
        return len(seen.found)

    # two reads a look: how many tokens are missing, which rows have ended
    assert 0 < reads(56) - reads(8) <= 2 * 2 * 48 / 8


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("knobs", ({}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0},
                                   {"max_rows": 6}), ids=str)
def test_a_step_can_be_recorded_once_and_replayed(knobs, dtype, monkeypatch):
    """CUDA graphs, on a CPU. Guards: a column, a position or a row count of the host's that a
    replayed step would see as it was; a value that the host asks for; a recording of memory, rows
    or knobs that are others now; the weights of the step before."""
    monkeypatch.setattr(rollout, "COLUMNS", 16)
    prompts, knobs = [*RAGGED, [1, 2, 4] * 7], {"n": 4, "max_new_tokens": 40,
                                                "stop_ids": (3, 7)} | knobs
    graphs, replayed = [], []

    def capture(step, device, pool):
        graphs.append(Recorded())
        with graphs[-1]:
            step()
        return lambda replay=graphs[-1].replay: replayed.append(1) or replay()

    model, plain, decoder = tiny_model().to(dtype), tiny_model().to(dtype), Decoder()
    for call in range(6):
        more = knobs | ({"temperature": 1.3} if call >= 4 else {})
        expected = draw(plain, prompts, **more)
        before = len(graphs)
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "capture", capture)
            assert draw(model, prompts, decoder=decoder, **more) == expected
        assert len(graphs) == len(decoder.captured), "captured twice"
        if call % 2:
            assert len(graphs) == before, "these shapes were seen"
            with torch.no_grad():  # in place, as an optimiser does
                for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                    p.add_(0.01), q.add_(0.01)
    assert len(graphs) >= 6 and len(replayed) > 60


@torch.no_grad()
def test_whatever_moves_memory_ends_a_recorded_step():
    """Guards: a CUDA graph replayed on memory that is no longer the cache's, or on weights that are
    not the model's."""
    model, decoder = tiny_model(), Decoder()
    draw(model, decoder=decoder)
    captured, memory = dict(decoder.captured), [t.data_ptr() for t in decoder.cache.memory]
    draw(model, RAGGED[:2], n=2, decoder=decoder)                 # fits
    assert captured.items() <= decoder.captured.items()
    assert [memory.data_ptr() for memory in decoder.cache.memory] == memory
    draw(model, n=20, decoder=decoder)                            # does not
    assert not set(captured) & set(decoder.captured)
    assert decoder.cache.bytes > 4 * 8 * 15 * 64
    draw(model, n=20, max_new_tokens=2, decoder=decoder)
    kept = set(decoder.captured)
    other = tiny_model()
    draw(other, n=1, max_new_tokens=2, stop_ids=(), decoder=decoder)
    assert kept and not kept & set(decoder.captured)
    assert same(draw(other.double().float(), decoder=decoder), draw(tiny_model()))
    for p in other.parameters():
        # whoever still reads the other model draws nonsense
        p.fill_(float("nan"))
    assert same(draw(model, decoder=decoder), draw(model))


@pytest.mark.parametrize("moved", ["all", "one"])
@torch.no_grad()
def test_a_recorded_step_never_reads_weights_that_moved(moved, monkeypatch):
    """Bug: a step captured on other weights is replayed, where stop ids and shapes are the same."""
    def capture(step, device, pool):
        with Recorded() as graph:
            step()
        return graph.replay

    model, decoder = tiny_model(), Decoder()
    monkeypatch.setattr(rollout, "capture", capture)
    draw(model, decoder=decoder)
    other = model
    if moved == "all":
        other = tiny_model()
        for p in other.parameters():
            p.add_(torch.randn_like(p))
    else:
        down = model.model.layers[1].mlp.down_proj
        down.weight = torch.nn.Parameter(3 * down.weight)
    assert same(draw(other, decoder=decoder), draw(other))


def test_a_querys_samples_do_not_depend_on_the_other_queries_of_its_rank():
    """Guards trap 7: noise keyed by a query's place in the batch."""
    model, tokenizer = tiny_model(), toy.make_tokenizer()
    queries = [(number, Problem(str(number), "Q", "8", prompt_ids=RAGGED[i]))
               for i, number in enumerate((3, 7))]

    def ids(some):
        return [r.completion_ids for r in rollout.sample_rollouts(
            model, tokenizer, some, 4, key=(0, 0, 0), max_new_tokens=12, stop_ids=(3,))]

    assert ids(queries[1:]) == ids(queries)[4:]


def test_a_decoder_that_is_used_again_ends_rows_at_the_new_stop_ids():
    model, decoder = tiny_model(), Decoder()
    draw(model, n=8, stop_ids=(3, 7), decoder=decoder)
    assert same(draw(model, n=8, stop_ids=(5,), decoder=decoder), draw(model, n=8, stop_ids=(5,)))


def test_a_row_that_left_writes_nowhere_when_the_columns_shrink(monkeypatch):
    """Bug: the length of a long row that has ended, kept where rows are fewer than their bucket: in
    a narrower cache its column lies in another row, or beyond the last."""
    monkeypatch.setattr(rollout, "LEAVE_EVERY", 1)
    monkeypatch.setattr(rollout, "LEAVE_SHARE", 0)

    class LongOnesEnd(Decoder):
        def join(self, names, prompts, noise):
            super().join(names, prompts, noise)
            self.end[list(self.live)] = torch.tensor([2 if len(p) > 2 else 12 for p in prompts])

    # 19 rows in a bucket of 20, then 17 in one of 18
    model, short, knobs = tiny_model(), [[1, 2]] * 17, {"n": 1, "max_new_tokens": 12,
                                                        "stop_ids": ()}
    both = draw(model, [*short, *[[1, 2, 4] * 6] * 2], decoder=LongOnesEnd(), **knobs)
    assert [len(group[0].ids) for group in both] == [12] * 17 + [2] * 2
    assert same(both[:17], draw(model, short, **knobs))


def test_a_call_that_was_interrupted_leaves_nothing_behind(monkeypatch):
    """Bug: rows of the interrupted call that decode on beyond the columns of the next."""
    model, decoder, knobs = tiny_model(), Decoder(), {"n": 1, "stop_ids": ()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder, "leave", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        draw(model, [[1, 2, 4]] * 18, max_new_tokens=40, decoder=decoder, **knobs)
    again = draw(model, [[1, 2, 4]] * 17, max_new_tokens=20, decoder=decoder, **knobs)
    assert same(again, draw(model, [[1, 2, 4]] * 17, max_new_tokens=20, **knobs))


def test_two_workloads_in_turn_keep_their_memory():
    """Bug: many short rows and few long ones, as a step's rollouts and syntheses, that take turns
    to reallocate the cache and to drop each other's captured steps."""
    model, decoder, allocated = tiny_model(), Decoder(), []
    for _ in range(3):
        for prompts, new in ([[1, 2]] * 16, 4), ([[1, 2, 4] * 10] * 2, 20):
            draw(model, prompts, n=1, max_new_tokens=new, decoder=decoder)
            allocated.append(decoder.cache.memory[0])  # kept, so that no address is used twice
    assert len({memory.data_ptr() for memory in allocated}) == 2


def test_a_decoder_gives_large_memory_back(monkeypatch):
    """Guards: a cache of most of the GPU that stays while the update needs it."""
    decoder = Decoder()
    draw(tiny_model(), decoder=decoder)
    assert decoder.cache
    monkeypatch.setattr(rollout, "KEEP_SHARE", 0)
    draw(tiny_model(), decoder=decoder)
    assert not decoder.cache and not decoder.captured


def test_buckets_are_few_and_hold_what_they_are_for():
    assert all(n <= rollout.bucket(n) <= 1.125 * n
               and n <= rollout.bucket(n, 64) <= max(n + 63, 1.125 * n)
               for n in range(1, 5000))
    assert len({rollout.bucket(n, 64) for n in range(1, 9000)}) < 50
    assert rollout.bucket(64, 64) == 64
    assert all(rollout.bucket(rollout.bucket(n)) == rollout.bucket(n) for n in range(1, 5000))


def test_two_levels_draw_what_one_level_draws(monkeypatch):
    """A large vocabulary, the same uniforms: at the seams of blocks rounding may move one token.
    Guards: a block taken for its neighbour, a token of the padding, a threshold that is not that of
    the block."""
    n, V = 20_000, 5000
    logits = 3 * torch.randn(1, V, generator=torch.Generator().manual_seed(0)).expand(n, -1)
    logits = logits + torch.zeros(n, 1)
    two, logprobs = sample(logits, grid(n), 1.0, 1.0)
    monkeypatch.setattr(rollout, "BLOCK", V)
    one, expected = sample(logits, grid(n), 1.0, 1.0)
    assert (one != two).sum() <= 1 and len(two.unique()) > 500
    assert torch.equal(logprobs[one == two], expected[one == two])


def test_a_token_lies_in_its_block_where_the_sum_of_the_block_is_not_its_cumulative_sum():
    """87 tokens of e^-38.2 count in one and vanish in the other. Bug: a token of another block, or
    of probability 0."""
    logits = torch.full((1, 20 * rollout.BLOCK), -torch.inf)
    logits[0, 512], logits[0, 513:600] = 0.0, -38.2
    token, _ = sample(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0, 1.0)
    assert token.item() == 512


def test_sampling_builds_no_graph():
    """Guards: a graph over every decoded token that fills the memory."""
    model, during = tiny_model(), set()
    model.register_forward_pre_hook(lambda *_: during.add(torch.is_grad_enabled()))
    assert draw(model) and during == {False} and torch.is_grad_enabled()


def test_no_prompts_or_a_progress_bar_are_no_special_case():
    """A step without candidates synthesises nothing; a bar must not change what is sampled."""
    model = tiny_model()
    assert draw(model, []) == []
    assert same(draw(model, progress="step 1"), draw(model))


@pytest.mark.parametrize("knobs,message", [
    (dict(top_p=0.0), "top_p must be in"), (dict(top_p=1.1), "top_p must be in"),
    (dict(temperature=-0.5), "temperature = -0.5"),
    (dict(prompts=[[1], []]), "a prompt of 0 tokens"),
    (dict(prompts=[[1], [1] * 45]), "a prompt of 45 tokens"),
    (dict(max_new_tokens=64), "the context of 64")])
def test_bad_input_is_refused_with_one_line(knobs, message):
    """Guards: positions beyond the context, where the model silently talks nonsense."""
    with pytest.raises(ValueError, match=message) as error:
        draw(tiny_model(), **knobs)
    assert "\n" not in str(error.value)
    assert draw(tiny_model(), [[1] * 44], 1)  # 44 + 20 fit exactly


# --------------------------------------------------------------------------------------------------
# the model that is sampled from


def test_a_checkpoints_generation_config_changes_nothing(tmp_path):
    """Guards trap 3: repetition penalty, top-k or a temperature that ride along in the folder."""
    model = tiny_model()
    save_hf(model, None, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({
        "do_sample": False, "repetition_penalty": 5.0, "top_k": 1, "top_p": 0.1,
        "temperature": 0.1}))
    assert same(draw(load_hf(tmp_path)), draw(model))


@pytest.mark.parametrize("tied", [True, False])
def test_head_rows_without_a_token_exist_neither_for_the_sampler_nor_for_the_trainer(tied):
    """Guards trap 4: Qwen3's 267 spare rows, here with huge logits of either sign, drawn or part of
    a softmax."""
    model, plain = tiny_model(vocab_size=14, num_tokens=9, tied=tied), tiny_model(tied=tied)
    plain.load_state_dict({name: p[:9] if len(p) == 14 else p for name,
                           p in model.state_dict().items()})
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output_weight[9:] = 1e3 * torch.tensor([1.0, -1, 1, -1, 1])[:, None] * direction
    groups = draw(model, n=8)
    assert max(i for group in groups for c in group for i in c.ids) == 8
    assert same(groups, draw(plain, n=8))
    ids = groups[0][0].ids
    assert torch.equal(trainer_logprobs(model, RAGGED[0], ids),
                       trainer_logprobs(plain, RAGGED[0], ids))
    assert sum(trainer_logprobs(model, [5], [v]).exp().item() for v in range(9)) == pytest.approx(
        1, abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_sampler_has_the_new_weights_after_an_optimiser_step(tied):
    """Guards trap 10: a head or a cache that outlives the update; a tied embedding whose two uses
    part."""
    model = tiny_model(tied=tied)
    before = draw(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([[5, 1, 2]]), torch.tensor([[1, 2, 6]]))[0].sum().neg().backward()
    optimizer.step()
    after = draw(model)
    assert not same(after, before)
    for prompt, group in zip(RAGGED, after):
        for c in group:
            expected = trainer_logprobs(model, prompt, c.ids)
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------
# what is kept


def test_text_leaves_out_the_stop_token_and_nothing_else():
    """Guards: an unfinished completion that loses its last token; special tokens that the grader
    never sees."""
    tokenizer = toy.make_tokenizer()
    ids = tokenizer("Try 6: <analysis>", add_special_tokens=False)["input_ids"]
    stop = tokenizer.eos_token_id
    assert rollout.completion_text(tokenizer,
                                   Completion([*ids, stop], [], True)) == "Try 6: <analysis>"
    assert rollout.completion_text(tokenizer, Completion(ids, [], False)) == "Try 6: <analysis>"
    inside = [ids[0], tokenizer.pad_token_id, ids[1]]
    assert rollout.completion_text(tokenizer,
                                   Completion(inside, [], False)) == f"Try {tokenizer.pad_token}6"


def test_a_rollout_is_one_json_line():
    tokenizer = toy.make_tokenizer()
    r = rollout_of([5, 6], [7, 2], sample_logprobs=[-0.1, -0.2], reward=1.0, answer="8")
    hidden = ("problem", "ots", "old_logprobs", "teacher_prompt_ids")
    row = json.loads(json.dumps(r.to_row(3, tokenizer)))
    assert (row["step"], row["uid"], row["question"], row["gold"], row["prompt"]) == (
        3, "u", "Q", "8", tokenizer.decode([5, 6]))
    assert row["completion_ids"] == [7, 2] and row["mask"] == [1, 1]
    assert row["sample_logprobs"] == [-0.1, -0.2]
    read = {name: row[name] for name in vars(r) if name not in hidden}
    assert Rollout(r.problem, **read) == r  # nothing that is kept changes on its way
