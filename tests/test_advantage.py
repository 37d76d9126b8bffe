"""Every equation against a reference of a few lines, written from the paper on ragged lists: values
and gradients."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from advantage import (
    WEIGHTINGS,
    advantages,
    distillation_loss,
    generalised_jsd,
    kl_to_ref,
    loss_scales,
    nll_loss,
    ots_weights,
    policy_loss,
)
from reflect import token_masks
from rollout import CORRECTION, DIAGNOSIS, PREFIX

GARBAGE = (math.inf, -math.inf, math.nan, 1e4, -1e4)


def masks_of(roles, is_reflection, diagnosis="mask", train_prefix=True):
    """The two token masks of every row as tensors (B, T), as collate lays them out; those of
    ordinary rows: 1 and 0."""
    rows = [token_masks(row, diagnosis=diagnosis, train_prefix=train_prefix) if ref else
            ([1.0] * len(row), [0.0] * len(row))
            for row, ref in zip(roles.tolist(), is_reflection.tolist(), strict=True)]
    return torch.tensor([mask for mask, _ in rows]), torch.tensor([weighed for _, weighed in rows])


def train_mask(completion_mask, roles, is_reflection, *, diagnosis, train_prefix):
    return completion_mask * masks_of(roles, is_reflection, diagnosis, train_prefix)[0]


def token_weights(logprobs, entropy, roles, is_reflection, *, diagnosis="mask", weighting="ots",
                  **clip):
    """The w_t of Eq. 8, as train.loss_of puts it together."""
    weighed = masks_of(roles, is_reflection, diagnosis)[1]
    return torch.where(weighed > 0, WEIGHTINGS[weighting](logprobs, entropy, **clip), 1.0)


def ragged_step(seed: int = 0, vocabulary: int = 5) -> SimpleNamespace:
    """Seven rows of a step as tensors, fp64: ordinary rollouts, reflections with all roles, and a
    reflection (the last) that is nothing but diagnosis. Columns outside [start, end) are prompt and
    padding."""
    g = torch.Generator().manual_seed(seed)
    start, end = [1, 0, 2, 1, 0, 1, 2], [5, 7, 4, 7, 7, 6, 4]
    # reflection -> the columns of its diagnosis
    split = {3: (3, 5), 4: (2, 4), 5: (2, 3), 6: (2, 4)}
    roles = torch.full((7, 7), PREFIX)
    for b, (first, last) in split.items():
        roles[b, first:last] = DIAGNOSIS
        roles[b, last:end[b]] = CORRECTION
    roles[6, 2:4] = DIAGNOSIS
    columns, first, behind = torch.arange(7), torch.tensor([start]).T, torch.tensor([end]).T
    s = SimpleNamespace(
        start=start, end=end, roles=roles, is_reflection=torch.tensor([0.0, 0, 0, 1, 1, 1, 1]),
        completion_mask=((columns >= first) & (columns < behind)).float(),
        advantages=torch.tensor([1.3, -0.7, -0.7, 1.0, -1.0, 0.4, 1.0], dtype=torch.float64),
        logits=2 * torch.randn(7, 7, vocabulary, generator=g, dtype=torch.float64),
        targets=torch.randint(vocabulary, (7, 7), generator=g))
    s.logprobs, s.entropy = logprobs_and_entropy(s.logits, s.targets)
    s.old = s.logprobs + 0.3 * torch.randn(7, 7, generator=g, dtype=torch.float64)
    return s


def logprobs_and_entropy(logits, targets):
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def step_loss(s, logprobs, entropy, *, old=None, rows=None, diagnosis="mask", train_prefix=True,
              weighting="ots", lam=1.0, loss_agg="sequence", loss_norm="separate", clip_eps=0.2):
    """The loss as train.py puts it together, of some rows of the step. Denominators are always the
    whole step's."""
    mask = train_mask(s.completion_mask, s.roles, s.is_reflection,
                      diagnosis=diagnosis, train_prefix=train_prefix)
    scale = loss_scales(mask.sum(1), s.is_reflection, lam=lam, loss_agg=loss_agg,
                        loss_norm=loss_norm)
    rows = torch.arange(len(mask)) if rows is None else torch.tensor(rows)
    old = s.old if old is None else old
    logprobs, entropy, old, mask, roles, advantages, is_reflection, scale = (
        x[rows] for x in (logprobs, entropy, old, mask, s.roles, s.advantages[:, None],
                          s.is_reflection, scale))
    weights = token_weights(logprobs, entropy, roles, is_reflection, diagnosis=diagnosis,
                            weighting=weighting)
    return policy_loss(logprobs, old, advantages, mask, weights, scale, clip_eps)


def trained_columns(s, diagnosis="mask", train_prefix=True) -> list[list[int]]:
    """Per row the columns in the loss, by the words of the specification."""
    def left_out(b, t):
        role = int(s.roles[b, t]) if s.is_reflection[b] else None
        return role == DIAGNOSIS and diagnosis == "mask" or role == PREFIX and not train_prefix
    return [[t for t in range(s.start[b], s.end[b])
             if not left_out(b, t)] for b in range(len(s.start))]


def reference_loss(s, logprobs, weights, columns, *, lam, loss_agg, loss_norm,
                   clip_eps=0.2) -> float:
    """Eq. 2, 6, 8 in plain floats, no masks: loops over responses and their trained tokens."""
    total, count = [0.0, 0.0], [0, 0]
    for b, tokens in enumerate(columns):
        A, ref = float(s.advantages[b]), int(s.is_reflection[b])
        values = []
        for t in tokens:
            rho = math.exp(float(logprobs[b, t]) - float(s.old[b, t]))
            values.append(
                float(weights[b, t]) * min(rho * A, min(max(rho, 1 - clip_eps), 1 + clip_eps) * A))
        if tokens:
            total[ref] += sum(values) / len(tokens) if loss_agg == "sequence" else sum(values)
            count[ref] += 1 if loss_agg == "sequence" else len(tokens)
    if loss_norm == "merged":
        count = [sum(count)] * 2
    return -(total[0] / count[0] + lam * total[1] / count[1])


def reference_weights(s, diagnosis="mask", weighting="ots") -> torch.Tensor:
    """Eq. 7 on constructed trajectories, 1 elsewhere, in plain floats."""
    w = torch.ones(7, 7, dtype=torch.float64)
    for b, t in itertools.product(range(7), range(7)):
        weighed = diagnosis == "ots" or s.roles[b, t] != DIAGNOSIS
        if s.is_reflection[b] and weighed and weighting == "ots":
            w[b, t] = min(max(math.exp(float(s.logprobs[b, t]) + float(s.entropy[b, t])), 0.01),
                          10.0)
    return w


def finite_differences(f, x: torch.Tensor, h: float = 1e-6) -> torch.Tensor:
    """df/dx by central differences, x fp64."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += h
        down.view(-1)[i] -= h
        gradient.view(-1)[i] = (f(up) - f(down)) / (2 * h)
    return gradient


# --------------------------------------------------------------------------------------------------
# advantages


def eq_1(rewards: list[float], among: list[float], ddof: int = 0) -> list[float]:
    mean = sum(among) / len(among)
    std = math.sqrt(sum((r - mean) ** 2 for r in among) / (len(among) - ddof))
    return [(r - mean) / (std + 1e-6) for r in rewards]


def three_queries():
    """Ordinary groups of four with 1, 2 and 3 right, and 3, 2 and 2 constructions; rewards not only
    0 and 1."""
    rewards = {7: [1, 0, 0, 0, 1, 0, 0.5], 8: [0, 1, 1, 0, 0, 1], 9: [1, 1, 0.25, 1, 1, 0]}
    queries = [q for q, r in rewards.items() for _ in r]
    is_reflection = [i >= 4 for r in rewards.values() for i in range(len(r))]
    groups = [f"{q}_reflected" if ref else str(q) for q, ref in zip(queries, is_reflection)]
    return rewards, torch.tensor([x for r in rewards.values()
                                  for x in r]), queries, groups, is_reflection


@pytest.mark.parametrize("std,ddof", [("population", 0), ("sample", 1)])
def test_each_group_is_normalised_alone_by_eq_1(std, ddof):
    """Guards: one mean over the batch; the unbiased std where Eq. 1 divides by K; ordinary and
    constructed mixed."""
    rewards, flat, queries, groups, is_reflection = three_queries()
    expected = [a for r in rewards.values() for part in (r[:4], r[4:])
                for a in eq_1(part, part, ddof)]
    result = advantages(flat, queries, groups, is_reflection, std=std)
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_docstring_example_of_advantages_is_literal():
    groups = ["a"] * 4 + ["a_reflected"] * 2
    result = advantages(torch.tensor([1.0, 0, 0, 0, 1, 0]), [7] * 6, groups, [False] * 4
                        + [True] * 2)
    assert [round(a, 2) for a in result.tolist()] == [1.73, -0.58, -0.58, -0.58, 1.0, -1.0]
    assert result.dtype == torch.float32


def test_the_order_of_rollouts_does_not_matter():
    """Guards: groups taken as consecutive blocks of K."""
    _, flat, queries, groups, is_reflection = three_queries()
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = advantages(flat[order],
                          *([x[i] for i in order] for x in (queries, groups, is_reflection)))
    assert torch.equal(shuffled, advantages(flat, queries, groups, is_reflection)[order])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("ref_advantage", ["group", "orig", "joint"])
def test_equal_rewards_give_exactly_zero(reward, ref_advantage):
    """Guards trap 15: the mean of three 0.1 is not 0.1, and the rounding error divided by eps is an
    advantage."""
    rewards, groups = torch.full((6,), reward, dtype=torch.float64), ["a"] * 3 + ["a_reflected"] * 3
    result = advantages(rewards, [0] * 6, groups, [False] * 3
                        + [True] * 3, ref_advantage=ref_advantage)
    assert result.tolist() == [0.0] * 6


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.5])
def test_a_construction_that_is_alone_gets_its_reward(reward):
    """Guards: (r - r) / eps = 0 for |G_ref| = 1, which would drop every lonely construction
    (§3.4)."""
    result = advantages(torch.tensor([1.0, 0, reward]), [0] * 3, ["a", "a", "a_reflected"],
                        [False, False, True])
    assert result[2].item() == reward


def test_an_ordinary_rollout_that_is_alone_teaches_nothing():
    """Guards: NaN from the std of one sample, and the |G_ref| = 1 rule reaching ordinary
    rollouts."""
    assert advantages(torch.tensor([1.0]), [0], ["a"], [False], std="sample").tolist() == [0.0]


@pytest.mark.parametrize("std,ddof", [("population", 0), ("sample", 1)])
@pytest.mark.parametrize("ref_advantage", ["group", "reward", "orig", "joint"])
def test_ref_advantage_says_what_a_construction_is_compared_with(ref_advantage, std, ddof):
    """Guards: a mode that reads another query's rollouts, or changes ordinary groups, or ignores
    `std`."""
    rewards, flat, queries, groups, is_reflection = three_queries()
    expected = []
    for r in rewards.values():
        among = {"group": r[4:], "orig": r[:4], "joint": r}.get(ref_advantage)
        expected += eq_1(r[:4], r[:4], ddof) + (r[4:] if ref_advantage == "reward"
                                                else eq_1(r[4:], among, ddof))
    result = advantages(flat, queries, groups, is_reflection, ref_advantage=ref_advantage, std=std)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32),
                               atol=1e-6, rtol=0)


@pytest.mark.parametrize("ref_advantage", ["orig", "joint"])
def test_a_lone_construction_is_still_compared_with_its_query(ref_advantage):
    """Guards: the |G_ref| = 1 rule of 'group' reaching modes that have something to compare
    with."""
    result = advantages(torch.tensor([1.0, 0, 0, 1]), [0] * 4, ["a"] * 3 + ["a_reflected"],
                        [False] * 3 + [True],
                        ref_advantage=ref_advantage)
    among = [1, 0, 0] if ref_advantage == "orig" else [1, 0, 0, 1]
    assert result[3].item() == pytest.approx(eq_1([1], among)[0], abs=1e-6)


@pytest.mark.parametrize("ref_advantage", ["group", "reward", "orig", "joint"])
def test_a_mixed_group_is_normalised_together(ref_advantage):
    """decoupled = False ('w/o DAE'). Guards: constructions born into the rollouts' group but
    treated apart."""
    rewards, is_reflection = [1.0, 0, 0, 0, 1, 1], [False] * 4 + [True] * 2
    result = advantages(torch.tensor(rewards), [3] * 6, ["3"] * 6, is_reflection,
                        ref_advantage=ref_advantage)
    torch.testing.assert_close(result, torch.tensor(eq_1(rewards, rewards)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ref_advantage", ["group", "orig", "joint"])
def test_two_queries_never_share_a_mean_even_under_one_group_name(ref_advantage):
    """Guards: a problem met twice in a step whose group is named by uid, two policies' worth of
    samples in one mean."""
    rewards = [1.0, 0, 0, 1, 0, 1, 1, 0]
    queries, is_reflection = [1, 1, 1, 1, 2, 2, 2, 2], [False, False, True, True] * 2
    groups = ["a", "a", "a_reflected", "a_reflected"] * 2

    def of(rows: slice):
        return advantages(torch.tensor(rewards[rows]), queries[rows], groups[rows],
                          is_reflection[rows],
                          ref_advantage=ref_advantage)
    assert torch.equal(of(slice(0, 8)), torch.cat([of(slice(0, 4)), of(slice(4, 8))]))
    lopsided = advantages(torch.tensor([1.0, 0, 1, 1]), [1, 1, 2, 2], ["a"] * 4, [False] * 4)
    assert lopsided.tolist()[2:] == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------
# masks and weights


@pytest.mark.parametrize("diagnosis,train_prefix,expected", [
    ("mask", True, [1, 1, 0, 0, 1, 1]), ("mask", False, [0, 0, 0, 0, 1, 1]), ("ots", True, [1] * 6),
    ("train", True, [1] * 6), ("train", False, [0, 0, 1, 1, 1, 1])])
def test_train_mask_leaves_out_the_roles_its_flags_name(diagnosis, train_prefix, expected):
    roles = torch.tensor([[PREFIX, PREFIX, DIAGNOSIS, DIAGNOSIS, CORRECTION, CORRECTION]])
    mask = train_mask(torch.ones(1, 6), roles, torch.ones(1), diagnosis=diagnosis,
                      train_prefix=train_prefix)
    assert mask.tolist() == [expected] and mask.dtype == torch.float32


def test_train_mask_never_touches_ordinary_rollouts_nor_adds_padding():
    """Guards: train_prefix = False masking ordinary rollouts, whose tokens are all of role
    PREFIX."""
    completion_mask = torch.tensor([[0.0, 1, 1, 0], [0, 1, 1, 0]])
    roles = torch.tensor([[PREFIX] * 4, [DIAGNOSIS] * 4])
    for diagnosis, train_prefix in itertools.product(("mask", "ots", "train"), (True, False)):
        flags = dict(diagnosis=diagnosis, train_prefix=train_prefix)
        assert torch.equal(train_mask(completion_mask, roles, torch.zeros(2), **flags),
                           completion_mask)
        assert (train_mask(completion_mask, roles, torch.ones(2), **flags) <= completion_mask).all()


def test_without_ots_every_token_has_weight_1_whatever_the_clip():
    logp = torch.tensor([[-0.1, -5.0]])
    assert WEIGHTINGS["none"](logp, logp, 0.1, 0.5).tolist() == [[1.0, 1.0]]


def test_luffy_weights_give_the_gradient_of_its_shaped_probability():
    """arXiv 2504.14945: the gradient is that of p / (p + 0.1). Bug: a gradient through the weight
    itself."""
    logp = torch.tensor([[-0.01, -1.0, -2.3, -9.0]], dtype=torch.float64, requires_grad=True)
    (shaped,) = torch.autograd.grad((logp.exp() / (logp.exp() + 0.1)).sum(), logp)
    w = WEIGHTINGS["luffy"](logp, torch.zeros_like(logp), 0.01, 10.0)
    ratio = (logp - logp.detach()).exp()  # 1, as in policy_loss at a step's first update
    (ours,) = torch.autograd.grad((w * ratio).sum(), logp)
    torch.testing.assert_close(ours, shaped)
    assert not w.requires_grad


def test_ots_weights_are_eq_7_with_both_clamps():
    s = ragged_step()
    extremes = torch.tensor([[-0.1, -0.1, -5.0, -50.0, -0.01, -math.inf],
                             [0.1, 1.0, 0.1, 0.0, 9.0, 1.0]])
    logprobs, entropy = torch.cat([torch.stack([s.logprobs.flatten(), s.entropy.flatten()]),
                                   extremes], dim=1)
    expected = [min(max(math.exp(lp + h), 0.01), 10.0) for lp,
                h in zip(logprobs.tolist(), entropy.tolist())]
    assert ots_weights(logprobs, entropy).tolist() == pytest.approx(expected, rel=1e-12)
    # docstring, clamps
    assert [round(w, 2) for w in expected[-6:]] == [1.0, 2.46, 0.01, 0.01, 10.0, 0.01]
    narrow = ots_weights(logprobs, entropy, 0.5, 2.0)
    assert narrow.min() == 0.5 and narrow.max() == 2.0


def test_the_log_of_an_ots_weight_is_zero_in_expectation():
    """Guards the sign of the entropy: sum_y p(y) (log p(y) + H) = 0 for every softmax, so weights
    sit near 1."""
    p = torch.softmax(3 * torch.randn(20, 9, dtype=torch.float64,
                                      generator=torch.Generator().manual_seed(0)), -1)
    entropy = -(p * p.log()).sum(-1, keepdim=True).expand(-1, 9)
    log_w = ots_weights(p.log(), entropy, w_min=1e-12, w_max=1e12).log()
    assert (p * log_w).sum(-1).abs().max() < 1e-12


def test_token_weights_carry_no_gradient():
    """Guards: a policy that raises its entropy because the weight, not the log-prob, is
    differentiated."""
    s = ragged_step()
    logprobs, entropy = s.logprobs.requires_grad_(), s.entropy.requires_grad_()
    assert not ots_weights(logprobs, entropy).requires_grad
    assert not token_weights(logprobs, entropy, s.roles, s.is_reflection,
                             diagnosis="ots").requires_grad


@pytest.mark.parametrize("weighting", ["ots", "none"])
@pytest.mark.parametrize("diagnosis", ["mask", "ots", "train"])
def test_token_weights_are_eq_7_on_constructed_trajectories_alone(diagnosis, weighting):
    """Guards: ordinary rollouts weighed; the diagnosis not following its own flag; knobs that do
    not arrive."""
    s = ragged_step()
    weights = token_weights(s.logprobs, s.entropy, s.roles, s.is_reflection, diagnosis=diagnosis,
                            weighting=weighting)
    torch.testing.assert_close(weights, reference_weights(s, diagnosis, weighting), rtol=1e-12,
                               atol=0)
    narrow = token_weights(s.logprobs, s.entropy, s.roles, s.is_reflection, diagnosis="ots",
                           w_min=0.9, w_max=1.1)
    assert narrow.min() == 0.9 and narrow.max() == 1.1


# --------------------------------------------------------------------------------------------------
# the policy loss


@pytest.mark.parametrize("diagnosis,weighting,train_prefix,lam", [
    ("mask", "ots", True, 1.0), ("mask", "ots", False, 0.5), ("ots", "ots", True, 2.0),
    ("train", "none", True, 1.0)])
@pytest.mark.parametrize("loss_norm", ["separate", "merged"])
@pytest.mark.parametrize("loss_agg", ["sequence", "token"])
def test_loss_and_gradient_match_eq_2_6_8(loss_agg, loss_norm, diagnosis, weighting, train_prefix,
                                          lam):
    """Guards trap 14, and 13: a denominator that counts other tokens than the numerator (prompt,
    diagnosis)."""
    s = ragged_step()
    columns, weights = trained_columns(s, diagnosis, train_prefix), reference_weights(
        s, diagnosis, weighting)

    def reference(logprobs):
        return reference_loss(s, logprobs, weights, columns, lam=lam, loss_agg=loss_agg,
                              loss_norm=loss_norm)

    logprobs, entropy = s.logprobs.clone().requires_grad_(), s.entropy.clone().requires_grad_()
    loss, _ = step_loss(s, logprobs, entropy, diagnosis=diagnosis, train_prefix=train_prefix,
                        weighting=weighting, lam=lam, loss_agg=loss_agg,
                        loss_norm=loss_norm)
    loss.backward()
    assert loss.item() == pytest.approx(reference(s.logprobs), abs=1e-6)
    torch.testing.assert_close(logprobs.grad, finite_differences(reference, s.logprobs), atol=1e-6,
                               rtol=0)
    assert entropy.grad is None  # the only way to it is through the weights


def test_grpo_alone_is_eq_2():
    """No reflections in the step: L_ref must be absent, not NaN, whatever lam is."""
    s = ragged_step()
    s.is_reflection = torch.zeros(7)
    terms = []
    for b, tokens in enumerate(trained_columns(s)):
        A, rho = float(s.advantages[b]), [math.exp(float(s.logprobs[b, t] - s.old[b, t]))
                                          for t in tokens]
        terms.append(sum(min(r * A, min(max(r, 0.8), 1.2) * A) for r in rho) / len(tokens))
    loss, _ = step_loss(s, s.logprobs, s.entropy, lam=5.0)
    assert loss.item() == pytest.approx(-sum(terms) / len(terms), abs=1e-6)


@pytest.mark.parametrize("weighting", ["ots", "none"])
@pytest.mark.parametrize("diagnosis", ["mask", "ots", "train"])
def test_a_masked_diagnosis_token_has_exactly_zero_gradient_in_every_logit(diagnosis, weighting):
    """The user's requirement: masked diagnosis tokens reach no logit, not even by 1e-12; everything
    else does."""
    s = ragged_step()
    logits = s.logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, s.targets)
    loss, _ = step_loss(s, logprobs, entropy, old=logprobs.detach(), diagnosis=diagnosis,
                        weighting=weighting)
    loss.backward()
    of_diagnosis = (s.roles == DIAGNOSIS) & (s.completion_mask > 0)
    of_others = (s.completion_mask > 0) & ~of_diagnosis
    assert of_diagnosis.sum() == 7
    if diagnosis == "mask":
        assert (logits.grad[of_diagnosis] == 0).all()
    else:
        assert (logits.grad[of_diagnosis] != 0).all()
    assert (logits.grad[of_others] != 0).all()
    assert (logits.grad[s.completion_mask == 0] == 0).all()  # prompt and padding


def test_a_left_out_prefix_has_exactly_zero_gradient_in_every_logit():
    s = ragged_step()
    logits = s.logits.clone().requires_grad_()
    step_loss(s, *logprobs_and_entropy(logits, s.targets), train_prefix=False)[0].backward()
    prefix = (s.roles == PREFIX) & (s.is_reflection[:, None] > 0) & (s.completion_mask > 0)
    assert prefix.sum() > 3 and (logits.grad[prefix] == 0).all()
    # ordinary rollouts have the same role, and learn
    assert (logits.grad[:3][s.completion_mask[:3] > 0] != 0).any()


def one_token(rho: float, A: float, clip_eps: float = 0.2):
    """-> loss, its gradient with respect to log rho, how many tokens were clipped."""
    logprobs = torch.tensor([[math.log(rho)]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, dtype=torch.float64)
    loss, stats = policy_loss(logprobs, 0 * ones, A * ones, ones, ones, torch.ones(1), clip_eps)
    loss.backward()
    return loss.item(), logprobs.grad.item(), int(stats["clipped"])


@pytest.mark.parametrize("rho,A,surrogate,cut", [
    (1.5, 2, 1.2 * 2, True), (0.5, 2, 0.5 * 2, False), (0.5, -2, 0.8 * -2, True),
    (1.5, -2, 1.5 * -2, False), (1.1, 2, 1.1 * 2, False), (0.9, -2, 0.9 * -2, False),
    (1.5, 0, 0, False)])
def test_clipping_is_one_sided(rho, A, surrogate, cut):
    """Guards: max for min; a clamp without the min, which freezes tokens that went the wrong way; a
    clip fraction that counts every ratio outside the band, though no gradient was cut."""
    loss, gradient, clipped = one_token(rho, A)
    assert loss == pytest.approx(-surrogate, abs=1e-12)
    # d rho A / d log rho = rho A
    assert gradient == pytest.approx(0 if cut else -surrogate, abs=1e-12)
    assert clipped == cut


def test_the_docstring_example_of_policy_loss_is_literal():
    logprobs = torch.tensor([[math.log(0.6)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, stats = policy_loss(logprobs, torch.tensor([[math.log(0.5)]]), one, one, one,
                              torch.tensor([3.0]), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-1.1 * 3) and logprobs.grad.item() == 0
    assert stats["clipped"] == 1 and stats["ratio_max"].item() == pytest.approx(1.2)


def test_statistics_count_trained_tokens_only():
    """Guards: a clip fraction or a ratio that masked tokens inflate."""
    s = ragged_step()
    s.old[:, :] = s.logprobs - 3.0  # rho = 20 everywhere, so a token is clipped iff A > 0
    stats = step_loss(s, s.logprobs, s.entropy)[1]
    assert stats["clipped"] == sum(len(c) for b, c in enumerate(trained_columns(s))
                                   if s.advantages[b] > 0)
    s.old[s.completion_mask > 0] = s.logprobs[s.completion_mask > 0]
    stats = step_loss(s, s.logprobs, s.entropy)[1]
    assert stats["clipped"] == 0 and stats["ratio_max"] == 1


def test_on_policy_the_gradient_is_the_advantage_and_nothing_is_clipped():
    """Guards trap 9: with old = new.detach() the ratio is exactly 1, yet the gradient is that of A
    log p."""
    s = ragged_step()
    logprobs = s.logprobs.clone().requires_grad_()
    loss, stats = step_loss(s, logprobs, s.entropy, old=logprobs.detach(), weighting="none")
    loss.backward()
    for b, columns in enumerate(trained_columns(s)):
        for t in columns:
            # three ordinary rollouts, and three reflections with a trained token
            expected = -float(s.advantages[b]) / 3 / len(columns)
            assert logprobs.grad[b, t].item() == pytest.approx(expected, abs=1e-7)
    assert stats["clipped"] == 0 and stats["ratio_max"] == 1


def test_an_advantage_may_differ_from_token_to_token():
    """OPSD's sampled form. Guards: (B, T) advantages broadcast over the wrong axis."""
    A = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]])
    ones, logprobs = torch.ones(2, 3), torch.zeros(2, 3, requires_grad=True)
    policy_loss(logprobs, 0 * ones, A, ones, ones, torch.tensor([1.0, 10.0]), 0.2)[0].backward()
    assert torch.equal(logprobs.grad, -A * torch.tensor([[1.0], [10.0]]))


# --------------------------------------------------------------------------------------------------
# denominators


def cuts(n: int, seed: int = 0) -> list[list[list[int]]]:
    """Ways to cut n rows into micro-batches: of 1, 2, n, and shuffled and ragged."""
    rows = list(range(n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[[i] for i in rows], [rows[i:i + 2] for i in range(0, n, 2)], [rows],
            [order[:1], order[1:5], order[5:]]]


@pytest.mark.parametrize("loss_norm", ["separate", "merged"])
@pytest.mark.parametrize("loss_agg", ["sequence", "token"])
def test_the_gradient_does_not_depend_on_the_micro_batches(loss_agg, loss_norm):
    """Guards trap 12: a mean over each micro-batch's own tokens or rows."""
    s = ragged_step()
    results = []
    for batches in cuts(7):
        logprobs = s.logprobs.clone().requires_grad_()
        losses = [step_loss(s, logprobs, s.entropy, rows=rows, loss_agg=loss_agg,
                            loss_norm=loss_norm)[0]
                  for rows in batches]
        sum(losses).backward()
        results.append((sum(losses).item(), logprobs.grad))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-12)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss_agg,loss_norm,expected", [
    ("sequence", "separate", [1 / 6, 0, 1 / 10, 1 / 4, 0, 1 / 8]),
    ("token", "separate", [1 / 8, 0, 1 / 8, 1 / 6, 0, 1 / 6]),
    ("sequence", "merged", [1 / 12, 0, 1 / 20, 1 / 8, 0, 1 / 16]),
    ("token", "merged", [1 / 14, 0, 1 / 14, 1 / 14, 0, 1 / 14])])
def test_a_row_without_trained_tokens_counts_nowhere(loss_agg, loss_norm, expected):
    """Guards: empty rows counted as rollouts that could learn, in the one denominator that counts
    rollouts and tokens."""
    lengths, ref = torch.tensor([3, 0, 5, 2, 0, 4]), torch.tensor([0.0, 0, 0, 1, 1, 1])
    scale = loss_scales(lengths, ref, lam=1.0, loss_agg=loss_agg, loss_norm=loss_norm)
    assert scale.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss_agg,loss_norm,expected", [
    ("sequence", "separate", [1 / (2 * 3), 1 / (2 * 5), 2 / (1 * 4)]),
    ("token", "separate", [1 / 8, 1 / 8, 2 / 4]),
    ("sequence", "merged", [1 / (3 * 3), 1 / (3 * 5), 2 / (3 * 4)]),
    ("token", "merged", [1 / 12, 1 / 12, 2 / 12])])
def test_loss_scales_in_numbers(loss_agg, loss_norm, expected):
    """Two rollouts of 3 and 5 tokens, one reflection of 4, lam = 2. Guards: lam on the wrong part,
    or lost."""
    lengths, ref = torch.tensor([3, 5, 4]), torch.tensor([0.0, 0, 1])
    scale = loss_scales(lengths, ref, lam=2.0, loss_agg=loss_agg, loss_norm=loss_norm)
    torch.testing.assert_close(scale, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss_norm", ["separate", "merged"])
@pytest.mark.parametrize("loss_agg", ["sequence", "token"])
def test_nothing_to_learn_from_gives_zero_not_nan(loss_agg, loss_norm):
    """Guards trap 13: 0 / 0 when a part is absent, fully masked, or the whole step is."""
    for is_reflection, masked in itertools.product(([0.0, 0.0], [1.0, 1.0], [0.0, 1.0]),
                                                   ([0, 1], [1])):
        mask = torch.ones(2, 3)
        mask[masked] = 0
        ref, lengths = torch.tensor(is_reflection), mask.sum(1)
        scale = loss_scales(lengths, ref, lam=1.0, loss_agg=loss_agg, loss_norm=loss_norm)
        logprobs = torch.zeros(2, 3, requires_grad=True)
        loss, _ = policy_loss(logprobs, torch.zeros(2, 3), torch.ones(2, 1), mask, torch.ones(2, 3),
                              scale, 0.2)
        loss.backward()
        assert scale.isfinite().all() and (logprobs.grad[masked] == 0).all()
        assert loss.item() == pytest.approx(0 if masked == [0, 1] else -1, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# masked garbage


def loss_of_every_kind(kind: str, x: dict, mask: torch.Tensor, reflection: torch.Tensor):
    """x: logprobs, other (old or reference log-probs, per-token advantage, divergence) and entropy,
    each (B, T)."""
    scale, roles = torch.tensor([0.5, 0.25]), torch.full(mask.shape, CORRECTION)
    weights = token_weights(x["logprobs"], x["entropy"], roles, reflection, diagnosis="mask")
    if kind == "policy_loss":
        return policy_loss(x["logprobs"], x["other"], torch.ones(2, 1), mask, weights,
                           scale, 0.2)[0]
    if kind == "advantage per token":
        return policy_loss(x["logprobs"], x["logprobs"].detach(), x["other"], mask, weights, scale,
                           0.2)[0]
    if kind == "nll_loss":
        return nll_loss(x["logprobs"], mask, scale)
    if kind == "kl_to_ref":
        return (scale[:, None] * kl_to_ref(x["logprobs"], x["other"], mask)).sum()
    return distillation_loss(x["logprobs"], mask, scale)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", ["policy_loss", "advantage per token", "nll_loss", "kl_to_ref",
                                  "distillation_loss"])
def test_masked_garbage_changes_neither_loss_nor_gradient_by_a_bit(kind, garbage):
    """Guards trap 16: 0 * inf = NaN, in the forward pass and through a `where` that comes after
    exp."""
    g = torch.Generator().manual_seed(0)
    mask, reflection = torch.tensor([[1.0, 1, 0, 1, 0], [0, 1, 1, 0, 0]]), torch.tensor([0.0, 1.0])
    clean = {k: torch.randn(2, 5, generator=g) for k in ("logprobs", "other", "entropy")}
    results = []
    for spoiled in ([], ["logprobs"], ["other"], ["entropy"], ["logprobs", "other", "entropy"]):
        x = {k: torch.where(mask > 0, v, garbage) if k in spoiled else v.clone() for k,
             v in clean.items()}
        x["logprobs"].requires_grad_()
        loss = loss_of_every_kind(kind, x, mask, reflection)
        loss.backward()
        results.append((loss.detach(), x["logprobs"].grad))
    assert results[0][0].isfinite() and results[0][1].abs().sum() > 0
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
        assert (gradient[mask == 0] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_token_weights_stay_finite_on_garbage_and_equal_elsewhere(garbage):
    mask = torch.tensor([[1.0, 1, 0, 1, 0], [0, 1, 1, 0, 0]])
    clean, entropy = torch.randn(2, 5,
                                 generator=torch.Generator().manual_seed(0)) - 1, torch.ones(2, 5)
    roles, ref = torch.full((2, 5), CORRECTION), torch.ones(2)
    expected = token_weights(clean, entropy, roles, ref)
    for spoil_logprobs, spoil_entropy in ((True, False), (False, True), (True, True)):
        weights = token_weights(torch.where(mask > 0, clean, garbage) if spoil_logprobs else clean,
                                torch.where(mask > 0, entropy, garbage) if spoil_entropy
                                else entropy, roles, ref)
        assert weights.isfinite().all() and torch.equal(weights * mask, expected * mask)


# --------------------------------------------------------------------------------------------------
# maximum likelihood, KL, distillation


def test_maximum_likelihood_is_the_mean_negative_log_prob_of_the_constructions():
    """`method = 'sft'`. Guards: the sign; ordinary rollouts imitated; a denominator that counts
    them."""
    s = ragged_step()
    mask = s.completion_mask * s.is_reflection[:, None]
    scale = loss_scales(mask.sum(1), s.is_reflection, lam=1.0, loss_agg="token",
                        loss_norm="separate")
    logprobs = s.logprobs.clone().requires_grad_()
    loss = nll_loss(logprobs, mask, scale)
    loss.backward()
    tokens = [(b, t) for b in range(3, 7) for t in range(s.start[b], s.end[b])]
    assert loss.item() == pytest.approx(-sum(float(s.logprobs[b, t]) for b,
                                             t in tokens) / len(tokens), abs=1e-6)
    assert logprobs.grad.sum().item() == pytest.approx(-1, abs=1e-6)
    assert (logprobs.grad[:3] == 0).all()


def two_policies(seed: int = 0, n: int = 6, V: int = 7):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, V, generator=g, dtype=torch.float64) for _ in range(2))


def test_the_kl_estimate_is_the_kl_in_expectation_and_pulls_towards_the_reference():
    """Guards trap 18: no gradient, the wrong sign (it then pushes away), or d with its sides
    exchanged. Over the policy's own tokens E[exp(d) - d - 1] = KL(policy || ref), and its gradient
    is p - ref."""
    policy, ref = two_policies()
    policy.requires_grad_()
    logp, logq = torch.log_softmax(policy, -1), torch.log_softmax(ref, -1)
    estimate = kl_to_ref(logp, logq, torch.ones_like(logp))
    p, q = logp.detach().exp(), logq.exp()
    expected = (p * estimate).sum(-1)
    torch.testing.assert_close(expected, (p * (logp.detach() - logq)).sum(-1), atol=1e-12, rtol=0)
    expected.sum().backward()
    torch.testing.assert_close(policy.grad, p - q, atol=1e-12, rtol=0)


def test_a_token_the_policy_likes_more_than_the_reference_is_pushed_down():
    logprobs = torch.tensor([[-0.5, -2.0, -1.0]], requires_grad=True)
    kl_to_ref(logprobs, torch.tensor([[-1.5, -1.0, -1.0]]), torch.ones(1, 3)).sum().backward()
    above, below, equal = logprobs.grad[0].tolist()
    assert above > 0 > below and equal == 0


def test_the_kl_estimate_is_never_negative_and_zero_where_masked():
    """Guards: exp(d) - d - 1 in fp32, which rounds to -6e-8 near 0, where the KL of a healthy run
    lives."""
    g = torch.Generator().manual_seed(0)
    d = torch.randn(50, 1000, generator=g) * 10.0 ** torch.linspace(-9, 0.5, 50)[:, None]
    kl = kl_to_ref(-1 - d, torch.full_like(d, -1.0), torch.ones_like(d))
    assert kl.min() >= 0
    d64 = (-1.0 - (-1 - d)).double()  # the difference that fp32 sees
    exact = torch.expm1(d64) - d64
    assert ((kl - exact).abs() <= 2e-7 * (d64.abs() + exact)).all()
    mask = (torch.rand(50, 1000, generator=g) < 0.5).float()
    assert torch.equal(kl_to_ref(-1 - d, torch.full_like(d, -1.0), mask), kl * mask)


def brute_force_jsd(student, teacher, beta: float) -> list[float]:
    """The definition, with loops over rows and words."""
    def softmax(row):
        z = [math.exp(x) for x in row]
        return [x / sum(z) for x in z]

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q))

    result = []
    for s, t in zip(student.tolist(), teacher.tolist()):
        p_s, p_t = softmax(s), softmax(t)
        m = [(1 - beta) * a + beta * b for a, b in zip(p_s, p_t)]
        ends = {0: kl(p_t, p_s), 1: kl(p_s, p_t)}
        result.append(ends[beta] if beta in ends else beta * kl(p_t, m) + (1 - beta) * kl(p_s, m))
    return result


@pytest.mark.parametrize("beta", [0, 0.0, 0.1, 0.5, 0.8, 1, 1.0])
def test_the_generalised_jsd_matches_its_definition_value_and_gradient(beta):
    """Guards: the ends exchanged, beta on the wrong side of the mixture, a mean where the sum over
    words belongs."""
    student, teacher = two_policies()
    x = student.clone().requires_grad_()
    result = generalised_jsd(x, teacher, beta, 0.0)
    assert result.tolist() == pytest.approx(brute_force_jsd(student, teacher, beta), abs=1e-10)
    result.sum().backward()
    expected = finite_differences(lambda z: sum(brute_force_jsd(z, teacher, beta)), student)
    torch.testing.assert_close(x.grad, expected, atol=1e-7, rtol=0)


def test_the_generalised_jsd_is_symmetric_at_one_half_and_zero_for_equals():
    student, teacher = two_policies()
    for beta in (0.0, 0.3, 0.5):
        exchanged = generalised_jsd(teacher, student, 1 - beta, 0.0)
        torch.testing.assert_close(generalised_jsd(student, teacher, beta, 0.0), exchanged)
    for beta in (0.0, 0.3, 0.5, 1.0):
        assert generalised_jsd(student, student + 3.0, beta, 0.0).abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_gradient_reaches_the_teacher(beta):
    """Guards: a shared model that lowers the divergence by making its teacher worse."""
    student, teacher = two_policies()
    student.requires_grad_()
    teacher.requires_grad_()
    generalised_jsd(student, teacher, beta, 0.0).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_clip_cuts_a_tokens_divergence_and_its_gradient():
    """Guards: clip = 0 read as 'cut everything', or a cut of the batch's mean instead of each
    token."""
    student, teacher = two_policies()
    free = generalised_jsd(student, teacher, 0.5, 0.0)
    clip = free.median().item()
    student.requires_grad_()
    cut = generalised_jsd(student, teacher, 0.5, clip)
    assert cut.tolist() == [min(x, clip) for x in free.tolist()]
    cut.sum().backward()
    over = free > clip
    assert over.any() and (student.grad[over]
                           == 0).all() and (student.grad[~over] != 0).any(-1).all()


def test_distillation_loss_adds_up_the_students_own_tokens():
    divergence = torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    loss = distillation_loss(divergence, mask, torch.tensor([2.0, 10.0]))
    loss.backward()
    assert loss.item() == 2 * 1.5 + 10 * 4
    assert torch.equal(divergence.grad, mask * torch.tensor([[2.0], [10.0]]))
