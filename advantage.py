"""The paper's equations, except Eq. 3, as pure tensor functions: advantages (Eq. 1, 4, 5), OTS
weights (Eq. 7), the policy loss (Eq. 2, 6, 8); also the KL estimate and OPSD's divergence (arXiv
2601.18734).

Shapes: N rollouts of a step, B rows of a micro-batch, T tokens, V vocabulary. Masks are float
multipliers of fixed shape, without a host sync: no boolean indexing, no `.item()`.

Every loss is a SUM over tokens, each scaled by `loss_scales`: one denominator is counted over the
whole step before the first backward, so the gradient does not depend on how rows are split into
micro-batches (trap 12).

Where the paper is ambiguous, the function's docstring names the flag and the choice. No KL term by
default (§3).
"""
import math

import torch

EPS = 1e-6  # Eq. 1; negligible beside the smallest non-zero std of 0/1 rewards


# --------------------------------------------------------------------------------------------------
# advantages


def normalise(rewards: torch.Tensor, among: torch.Tensor, std: str = "population") -> torch.Tensor:
    """Eq. 1: (r - mean) / (std + eps) of `rewards` (M,), mean and std taken over `among` (n,).

    std = 'population' divides by n (Eq. 1), 'sample' by n - 1 (the common toolchain). A group whose
    rewards are all equal gives exactly 0: no rounding noise is divided by a tiny std (trap 15).
    """
    if len(among) < 2 or bool((among == among[0]).all()):
        return torch.zeros_like(rewards)
    return (rewards - among.mean()) / (among.std(correction=1 if std == "sample" else 0) + EPS)


def advantages(rewards: torch.Tensor, queries: list[int], groups: list[str],
               is_reflection: list[bool], *, ref_advantage: str = "group",
               std: str = "population") -> torch.Tensor:
    """Decoupled advantage estimation: Eq. 1 on every group, Eq. 4, 5 on reflections. (N,) -> (N,).

    A group is all rollouts with the same query and the same name in `groups`: "a" for ordinary
    rollouts, "a_reflected" for constructions (§3.4); with `decoupled = False` constructions are
    named "a" too, and both kinds are normalised together.

        rewards 1 0 0 0 | 1 0    queries 7 7 7 7 | 7 7    groups a a a a | a_reflected a_reflected
        gives   1.73 -0.58 -0.58 -0.58 | 1 -1

    ref_advantage: the baseline of constructions; advantages of ordinary groups do not depend on it.
        'group'   mean and std of the query's constructions (Eq. 5); a single one gets A = r. Note:
                  two correct ones get A = 0 while a single one gets A = 1, the paper's rule.
        'reward'  none: A = r for every construction.
        'orig'    mean and std of the query's ordinary rollouts: reflects the query's difficulty.
        'joint'   mean and std of the query's rollouts and constructions together (§4.5, Table 4).
    """
    rewards = rewards.double()
    result = torch.zeros_like(rewards)
    members, ordinary, everyone = {}, {}, {}  # indices by (query, group); by query
    for i, (query, group) in enumerate(zip(queries, groups, strict=True)):
        members.setdefault((query, group), []).append(i)
        everyone.setdefault(query, []).append(i)
        if not is_reflection[i]:
            ordinary.setdefault(query, []).append(i)
    for (query, _), index in members.items():
        r = rewards[index]
        if not all(is_reflection[i] for i in index):  # ordinary, or mixed (decoupled = False)
            result[index] = normalise(r, r, std)
        elif ref_advantage == "reward" or (ref_advantage == "group" and len(index) == 1):
            result[index] = r                         # |G_ref| = 1 has no spread (§3.4)
        elif ref_advantage == "group":
            result[index] = normalise(r, r, std)
        elif ref_advantage == "orig":
            result[index] = normalise(r, rewards[ordinary.get(query, [])], std)
        else:
            result[index] = normalise(r, rewards[everyone[query]], std)
    return result.float()


# --------------------------------------------------------------------------------------------------
# weights


def ots_weights(logprobs: torch.Tensor, entropy: torch.Tensor, w_min: float = 0.01,
                w_max: float = 10.0) -> torch.Tensor:
    """Eq. 7: w_t = clamp(exp(log p(y_t) + H_t), w_min, w_max). (B,T) x2 -> (B,T), no gradient.

    For a token sampled from the policy E[log p + H] = 0, so its weight is near 1; a forced,
    unlikely token gets much less than 1. A token with log p > -H is AMPLIFIED, up to w_max. w uses
    the current policy, which at a step's first update equals the old policy; the paper does not
    say which of the two it uses at later updates.

        log p -0.1 -0.1 -5.0,  H 0.1 1.0 0.1  ->  w 1.00 2.46 0.01
    """
    # CRITICAL: detached. A gradient through the weights would train the policy to raise entropy.
    s = (logprobs + entropy).detach()
    # Clamp before exp: at a masked position s may have any value, and inf * 0 is NaN (trap 16).
    return s.nan_to_num(0.0).clamp(-30.0, 30.0).exp().clamp(w_min, w_max)


def luffy_weights(logprobs: torch.Tensor, entropy: torch.Tensor, w_min: float = 0.01,
                  w_max: float = 10.0, gamma: float = 0.1) -> torch.Tensor:
    """Policy shaping of LUFFY (arXiv 2504.14945): w = g p / (p + g)^2.

    LUFFY's surrogate for off-policy tokens is f(p) = p / (p + g), with gradient f'(p) p grad log p.
    w is largest, 1/4, at p = g, and as small at p = 1 as at p = 0.01: confident tokens, which Eq. 7
    weights most, are down-weighted. w_min and w_max belong to Eq. 7 and are unused. (B,T) ->
    (B,T), no gradient.

        p 1 0.1 0.001  ->  w 0.08 0.25 0.01
    """
    p = logprobs.detach().exp()
    return gamma * p / (p + gamma) ** 2


def no_weights(logprobs: torch.Tensor, entropy: torch.Tensor, w_min: float = 0.01,
               w_max: float = 10.0) -> torch.Tensor:
    """'w/o OTS' (Table 4): every token has weight 1. (B,T) -> (B,T)."""
    return torch.ones_like(logprobs)


# w_t of Eq. 8, by the knob `weighting`
WEIGHTINGS = {"ots": ots_weights, "luffy": luffy_weights, "none": no_weights}


# --------------------------------------------------------------------------------------------------
# losses


def loss_scales(lengths: torch.Tensor, is_reflection: torch.Tensor, *, lam: float, loss_agg: str,
                loss_norm: str) -> torch.Tensor:
    """Weight of each trained token of a rollout in the step's loss: (N,), (N,) -> (N,).

    lengths: trained tokens per rollout, over ALL micro-batches and ranks: one denominator per step.
    loss_agg   'sequence': mean over a response's tokens, then over responses (Eq. 2);
               'token': mean over all tokens.
    loss_norm  'separate': L_orig + lam * L_ref, each over its own part (Eq. 6);
               'merged': one mean over both parts.
    A part without trained tokens contributes 0, without a division by zero (trap 13).
    """
    some, ref, n = (lengths > 0).double(), is_reflection.double(), lengths.double()
    per_token = loss_agg == "token"
    counts = n if per_token else some
    n_orig, n_ref = (counts * (1 - ref)).sum(), (counts * ref).sum()
    if loss_norm == "merged":
        n_orig = n_ref = n_orig + n_ref
    denominator = torch.where(ref > 0, n_ref, n_orig).clamp(min=1)
    scale = some / (denominator if per_token else denominator * n.clamp(min=1))
    return torch.where(ref > 0, lam * scale, scale).float()


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
                mask: torch.Tensor, weights: torch.Tensor, loss_scale: torch.Tensor,
                clip_eps: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 2, 8: -sum_t scale * w_t * min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A); sums for logs.

    logprobs, old_logprobs, mask, weights (B,T); advantages (B,1), or (B,T) for a per-token
    advantage; loss_scale (B,) -> scalar. rho_t = pi_theta / pi_theta_old on (x, y); x is the plain
    question for constructed trajectories too.

        logprobs log .6, old log .5, A 1, eps .1: rho 1.2 is clipped to 1.1, loss -1.1, gradient 0
    """
    # Mask before exp: inf or NaN at a masked position must reach neither the loss nor, as
    # 0 * inf, its gradient.
    ratio = torch.where(mask > 0, logprobs - old_logprobs, 0.0).exp()
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    loss = -(loss_scale[:, None] * torch.where(mask > 0, weights * surrogate, 0.0)).sum()
    with torch.no_grad():
        # clipped = the gradient is 0; a ratio outside the clip range is not sufficient
        cut = (((ratio > 1 + clip_eps) & (advantages > 0))
               | ((ratio < 1 - clip_eps) & (advantages < 0)))
        stats = {"clipped": (cut * mask).sum(), "ratio_max": (ratio * mask).max()}
    return loss, stats


def nll_loss(logprobs: torch.Tensor, mask: torch.Tensor, loss_scale: torch.Tensor) -> torch.Tensor:
    """Maximum likelihood, -sum_t scale * log p: cold start, `method = 'sft'`. (B,T) x2, (B,)."""
    return -(loss_scale[:, None] * torch.where(mask > 0, logprobs, 0.0)).sum()


def kl_to_ref(logprobs: torch.Tensor, ref_logprobs: torch.Tensor,
              mask: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference): exp(d) - d - 1 with d = ref - policy.

    (B,T) x3 -> (B,T), 0 where masked; valid only on tokens sampled from the policy; never negative;
    as a loss its gradient is that of KL(reference || policy) (trap 18). Only logged unless
    kl_coef > 0.
    """
    d = torch.where(mask > 0, ref_logprobs - logprobs, 0.0)
    return torch.expm1(d) - d  # exp(d) - d - 1 in fp32 has an error of 6e-8: 100 % at d = 3e-4


def generalised_jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float,
                    clip: float) -> torch.Tensor:
    """OPSD's per-token divergence over the full vocabulary: (n,V) x2 -> (n,).

    With m = (1 - beta) p_student + beta p_teacher: beta KL(p_teacher || m) + (1 - beta)
    KL(p_student || m); the end points are plain KLs, beta = 0 KL(teacher || student), beta = 1
    KL(student || teacher). A token's divergence is clipped at `clip` (0: no clipping): style tokens
    ("wait") diverge most and would dominate the loss.
    """
    student = torch.log_softmax(student_logits, dim=-1)
    # CRITICAL: the teacher is a target, never trained
    teacher = torch.log_softmax(teacher_logits.detach(), dim=-1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    if beta == 0:
        divergence = kl(teacher, student)
    elif beta == 1:
        divergence = kl(student, teacher)
    else:
        m = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
        divergence = beta * kl(teacher, m) + (1 - beta) * kl(student, m)
    return divergence.clamp(max=clip) if clip > 0 else divergence


def distillation_loss(divergence: torch.Tensor, mask: torch.Tensor,
                      loss_scale: torch.Tensor) -> torch.Tensor:
    """OPSD, full vocabulary: sum_t scale * divergence to the teacher. (B,T) x2, (B,) -> scalar."""
    return (loss_scale[:, None] * torch.where(mask > 0, divergence, 0.0)).sum()
