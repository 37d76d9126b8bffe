"""From rollouts to one gradient: padded batches, one denominator, on models of 7,000 parameters."""
import functools

import pytest
import torch
from test_rollout import RAGGED, as_rollout, draw, rollout_of, tiny_model, trainer_logprobs
from torch.distributed.tensor import DTensor

import memory
import metrics
import opsd
import parallel
import train
import update
from parallel import microbatches
from reflect import token_masks
from rollout import CORRECTION, DIAGNOSIS, PREFIX, Rollout
from update import collate


def test_the_docstring_example_of_collate_is_literal():
    batch = collate([rollout_of([5, 6], [7, 8, 2], loss_scale=0.5),
                     rollout_of([5], [9, 2], loss_scale=0.25)])
    assert batch.inputs.tolist() == [[5, 6, 7, 8], [5, 9, 2, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 2], [9, 2, 0, 0]]
    assert batch.completion_mask.tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.loss_scale.tolist() == [0.5, 0.25]


def test_every_field_of_a_batch_speaks_of_the_same_target():
    """Guards: masks or log-probs aligned with inputs, one column from the token they describe."""
    mask, ots = token_masks([PREFIX, DIAGNOSIS, CORRECTION, CORRECTION], diagnosis="mask",
                            train_prefix=False)
    reflection = rollout_of([5, 6], [10, 11, 12, 13], is_reflection=True, advantage=1.5, mask=mask,
                            ots=ots)
    ordinary = rollout_of([5, 6, 7, 4, 3], [20, 2], sample_logprobs=[-0.5, -0.25], advantage=-2.0,
                          old_logprobs=[-3.0, -4.0])
    batch = collate([reflection, ordinary])
    # the first column speaks of no completion token: the head is spared it
    assert batch.inputs.tolist() == [[5, 6, 10, 11, 12, 13], [5, 6, 7, 4, 3, 20]]
    assert batch.targets.tolist() == [[10, 11, 12, 13, 0], [7, 4, 3, 20, 2]]
    assert batch.completion_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert batch.mask.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert batch.ots.tolist() == [[1, 0, 1, 1, 0], [0] * 5]
    assert batch.sample_logprobs.tolist() == [[0] * 5, [0, 0, 0, -0.5, -0.25]]
    assert batch.old_logprobs.tolist() == [[0] * 5, [0, 0, 0, -3, -4]]
    assert [batch.targets[i, batch.columns_of(i)].tolist() for i in range(2)] == [
        [10, 11, 12, 13], [20, 2]]
    assert batch.advantages.tolist() == [1.5, -2.0] and batch.is_reflection.tolist() == [1, 0]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert all(x.dtype == torch.float32 for x in (batch.completion_mask, batch.mask, batch.ots,
                                                  batch.sample_logprobs, batch.advantages,
                                                  batch.is_reflection, batch.loss_scale))
    for x, y in zip(vars(batch).values(), vars(batch.to("cpu")).values(), strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x is y


def test_a_batch_masks_by_length_not_by_value():
    """Guards trap 5: a prompt that ends, or a completion that has its middle or its stop token, in
    the padding id 0."""
    batch = collate([rollout_of([5, 0], [0, 7, 0, 0]), rollout_of([0, 0, 5], [1, 2, 3, 4, 5])])
    assert batch.completion_mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert batch.targets.tolist() == [[0, 7, 0, 0, 0, 0], [5, 1, 2, 3, 4, 5]]


def test_a_rows_logprobs_do_not_depend_on_its_padding():
    """Guards trap 17: the last label of a row taken from elsewhere, attention that sees the
    padding."""
    model = tiny_model()
    rollouts = [as_rollout(p, c) for p, group in zip(RAGGED, draw(model)) for c in group]
    batch = collate(rollouts)
    with torch.no_grad():
        together, _ = model(batch.inputs, batch.targets)
    for r, row, mask in zip(rollouts, together, batch.completion_mask):
        alone = trainer_logprobs(model, r.prompt_ids, r.completion_ids)
        torch.testing.assert_close(row[mask > 0], alone, atol=1e-5, rtol=0)
    # the sampler's log-probs lie in the same columns: this difference is the parity metric of every
    # step (trap 8)
    assert ((together - batch.sample_logprobs) * batch.completion_mask).abs().max() < 1e-4


def test_the_docstring_example_of_microbatches_is_literal():
    assert microbatches([9, 3, 8, 4], 18) == [[0, 2], [3, 1]]


@pytest.mark.parametrize("budget", [1, 10, 40, 100, 10**6])
def test_microbatches_keep_the_budget_and_hold_every_row_once(budget):
    """Guards: the budget compared with the sum of lengths instead of the padded rectangle; the last
    batch forgotten."""
    g = torch.Generator().manual_seed(0)
    rollouts = [rollout_of([1] * int(a), [2] * int(b)) for a,
                b in torch.randint(1, 15, (40, 2), generator=g)]
    batches = microbatches([len(r) for r in rollouts], budget)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    for batch in batches:
        inputs = collate([rollouts[i] for i in batch]).inputs
        assert inputs.shape[0] * (inputs.shape[1] + 1) <= budget or len(batch) == 1
    assert len(batches) == {1: 40, 10**6: 1}.get(budget, len(batches))
    assert microbatches([], budget) == []


def a_step(model) -> list[Rollout]:
    """Six ordinary rollouts and three reflections of very unequal lengths, with advantages."""
    g = torch.Generator().manual_seed(1)
    rollouts = [as_rollout(p, c, advantage=float(torch.randn((), generator=g)))
                for p, group in zip(RAGGED[:3], draw(model, RAGGED[:3], 2)) for c in group]
    for n, (first, last) in ((4, (1, 3)), (11, (5, 9)), (17, (2, 4))):
        ids = torch.randint(9, (n,), generator=g).tolist()
        roles = [PREFIX] * first + [DIAGNOSIS] * (last - first) + [CORRECTION] * (n - last)
        mask, ots = token_masks(roles, diagnosis="mask", train_prefix=True)
        rollouts.append(rollout_of(RAGGED[n % 3], ids, roles=roles, is_reflection=True,
                                   advantage=1.0 - n % 2 * 2, mask=mask,
                                   ots=ots))
    return rollouts


def loss_on(model, batch, **knobs):
    """train.loss_of of one micro-batch, TAPO's by default."""
    knobs = dict(ref_model=None, method="tapo", temperature=1.0, clip_eps=0.2, weighting="ots",
                 w_min=0.01, w_max=10.0, kl_coef=0.0, log_kl=False, opsd_loss="jsd", opsd_beta=0.5,
                 opsd_clip=0.0, on_policy=True) | knobs
    return train.loss_of(batch, model=model, **knobs)


class Gradients:
    """Stands in for the optimiser: keeps what a step would have used."""

    def __init__(self, model):
        self.model, self.kept = model, {}

    def step(self):
        self.kept = {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def gradient_of_a_step(model, rollouts, budget) -> tuple[float, dict[str, torch.Tensor]]:
    """The real update of TAPO, up to its optimiser."""
    loss_fn = functools.partial(loss_on, model)
    optimizer = Gradients(model)
    sums = update.update(model, optimizer, rollouts, loss_fn, tokens_per_microbatch=budget,
                         grad_clip=1e9, device="cpu")
    return sums["train/loss"], optimizer.kept


@pytest.mark.parametrize("loss_norm", ["separate", "merged"])
@pytest.mark.parametrize("loss_agg", ["sequence", "token"])
def test_the_whole_gradient_does_not_depend_on_micro_batches_order_or_padding(loss_agg, loss_norm):
    """Guards trap 12 end to end, the real update, and trap 20: every tensor gets a gradient."""
    model = tiny_model()
    rollouts = a_step(model)
    update.set_loss_scales(rollouts, lam=1.0, loss_agg=loss_agg, loss_norm=loss_norm)
    loss, gradients = gradient_of_a_step(model, rollouts, 1)
    assert all(g.abs().max() > 0 for g in gradients.values())
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2)).tolist()
    for budget in (1, 30, 60, 10**6):
        for rows in (rollouts, [rollouts[i] for i in order]):
            other_loss, others = gradient_of_a_step(model, rows, budget)
            assert other_loss == pytest.approx(loss, abs=1e-6)
            for name, g in gradients.items():
                torch.testing.assert_close(others[name], g, atol=2e-6 * g.abs().max().item() + 1e-7,
                                           rtol=1e-4)


def test_every_logprob_of_a_step_is_at_the_temperature_that_was_sampled_at():
    """Guards trap 2 (trl PR 3029): old, reference or teacher log-probs at temperature 1."""
    model, (completions,) = tiny_model(), draw(tiny_model(), RAGGED[:1], n=2, temperature=0.7)
    rollouts = [as_rollout(RAGGED[0], c, teacher_prompt_ids=RAGGED[0]) for c in completions]
    update.set_old_logprobs(model, rollouts, temperature=0.7, tokens_per_microbatch=100,
                            device="cpu")
    for r in rollouts:
        expected = trainer_logprobs(model, r.prompt_ids, r.completion_ids, 0.7)
        torch.testing.assert_close(torch.tensor(r.old_logprobs), expected, atol=1e-5, rtol=1e-5)
    batch = collate(rollouts)
    _, sums = loss_on(model, batch, ref_model=model, log_kl=True, temperature=0.7)
    assert sums["train/kl_ref"] == 0 < sums["train/kl_ref#"]
    logprobs, _, teacher = opsd.student_and_teacher(model, model, batch, temperature=0.7,
                                                    loss="sampled", beta=0.5, clip=0.0)
    own = batch.completion_mask > 0
    torch.testing.assert_close(teacher[own], logprobs.detach()[own], atol=1e-6, rtol=0)


def test_a_kl_term_is_added_to_the_loss():
    """Guards trap 18: a penalty of the wrong sign in the loss, which rewards drifting away."""
    model, reference = tiny_model(), tiny_model(std=0.5)
    rollouts = [as_rollout(p, c, advantage=1.0) for p, group in zip(RAGGED, draw(model))
                for c in group]
    update.set_loss_scales(rollouts, lam=1.0, loss_agg="token", loss_norm="merged")
    batch = collate(rollouts)
    plain, penalised = (loss_on(model, batch, ref_model=reference, log_kl=True, kl_coef=kl_coef)
                        for kl_coef in (0.0, 2.0))
    kl = penalised[1]["train/kl_ref"] / penalised[1]["train/kl_ref#"]
    assert (penalised[0] - plain[0]).item() == pytest.approx(2 * kl.item(), rel=1e-5) and kl > 0.01


def test_weights_act_only_where_ots_is_1():
    """Guards: ordinary rollouts, or a masked diagnosis, weighted too."""
    model = tiny_model()
    rollouts = a_step(model)
    update.set_loss_scales(rollouts, lam=1.0, loss_agg="sequence", loss_norm="merged")
    batch = collate([r for r in rollouts if not r.is_reflection])
    losses = {name: loss_on(model, batch, weighting=name)[0].item() for name in train.WEIGHTINGS}
    assert len(set(losses.values())) == 1
    batch = collate(rollouts)
    assert loss_on(model, batch)[0] != loss_on(model, batch, weighting="none")[0]
    batch.ots.zero_()
    assert loss_on(model, batch)[0] == loss_on(model, batch, weighting="none")[0]


def test_loss_scales_count_trained_tokens_alone():
    """Guards traps 12, 13: a denominator that counts masked tokens, as a diagnosis has."""
    rollouts = [rollout_of([1], [4, 5, 6], mask=[1.0, 0.0, 0.0]),
                rollout_of([1], [4, 5], mask=[1.0, 1.0]), rollout_of([1], [4], mask=[0.0])]
    for loss_agg, expected in (("token", [1 / 3, 1 / 3, 0]), ("sequence", [1 / 2, 1 / 4, 0])):
        update.set_loss_scales(rollouts, lam=1.0, loss_agg=loss_agg, loss_norm="separate")
        assert [r.loss_scale for r in rollouts] == pytest.approx(expected)


def test_weights_are_cast_once_for_all_micro_batches_and_anew_for_the_next_update():
    """One process in bf16. Bug: a cast in every forward and backward pass; the weights of the step
    before (trap 10)."""
    model, rollouts, plain = tiny_model(), a_step(tiny_model()), tiny_model().bfloat16()
    parallel.shard(model, "cpu", dtype="bfloat16", replicas=1, offload=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update.set_loss_scales(rollouts, lam=1.0, loss_agg="sequence", loss_norm="merged")
    gathered, before = [], []

    def loss_fn(batch):
        gathered.append([p.data_ptr() for p in model.parameters() if not isinstance(p, DTensor)])
        logprobs = model(batch.inputs, batch.targets)[0]
        with torch.no_grad():
            assert torch.equal(logprobs, plain(batch.inputs, batch.targets)[0])
        return -(logprobs * batch.mask * batch.loss_scale[:, None]).sum(), {}

    for _ in range(2):
        gathered.clear()
        for p, master in zip(plain.parameters(), model.parameters(), strict=True):
            p.data.copy_(parallel.whole(master))
        assert not before or not torch.equal(before[0], plain.head_weight)
        before.append(plain.head_weight.clone())
        update.update(model, optimizer, rollouts, loss_fn, tokens_per_microbatch=30, grad_clip=1e9,
                      device="cpu")
        assert not gathered[0] and len(gathered) > 2
        assert len(gathered[1]) == len(list(model.parameters()))
        assert all(addresses == gathered[1] for addresses in gathered[1:])


def test_several_processes_shard_again_after_every_micro_batch(monkeypatch):
    """Bug: every block stays gathered, more than a GPU has at 8B."""
    model, rollouts, gathered = tiny_model(), a_step(tiny_model()), []
    parallel.shard(model, "cpu", dtype="bfloat16", replicas=1, offload=False)
    monkeypatch.setattr(update, "world_size", lambda: 2)

    def loss_fn(batch):
        gathered.append(sum(not isinstance(p, DTensor) for p in model.parameters()))
        return -(model(batch.inputs, batch.targets)[0] * batch.mask).sum(), {}

    update.update(model, torch.optim.SGD(model.parameters(), lr=1.0), rollouts, loss_fn,
                  tokens_per_microbatch=30, grad_clip=1e9, device="cpu")
    assert len(gathered) > 2 and not any(gathered)


def test_gaps_of_both_signs_do_not_cancel():
    """Guards trap 8: an alarm that stays silent because sampler and trainer differ both ways."""
    batch = collate([rollout_of([1], [4, 5], sample_logprobs=[-1.0, -1.0])])
    zeros = torch.zeros(1, 2)
    sums = metrics.train_sums(batch, zeros, zeros, torch.tensor([[-0.5, -1.5]]), zeros)
    assert sums["train/parity_mean"] == 1 and sums["train/parity_max"] == 0.5


def test_what_is_yet_to_come_is_left_free_for_it(monkeypatch):
    """tokens_per_microbatch = 0: before the first step gradients and AdamW's two moments do not
    exist yet; where they were loaded the moments do. Guards: running out of memory in step 1."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**9)
    monkeypatch.setattr(memory, "total_memory", lambda _: 8 * 10**6)
    monkeypatch.setattr(memory, "most_tokens", lambda config, free, **how: free)
    n, found = sum(p.numel() for p in model.parameters()), []
    for _ in range(2):
        found.append(memory.tokens_that_fit(model, optimizer, device="cpu", dtype="float32",
                                            world_size=1))
        model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
        optimizer.step()
    assert found == [10**9 - 12 * n - 10**6, 10**9 - 4 * n - 10**6]


def test_a_filler_takes_part_and_counts_nowhere():
    """What a rank with nothing left to do runs to keep step. Guards: a missing gradient (FSDP
    waits), or one not 0."""
    model = tiny_model()
    (rows,) = update.microbatches_of([], 100)
    assert len(rows) == 1 and rows[0].mask == [0.0]
    loss, gradients = gradient_of_a_step(model, [], 100)
    assert loss == 0 and len(gradients) == len(list(model.parameters()))
    assert all((g == 0).all() for g in gradients.values())
