"""All equations of the paper as pure tensor functions: advantages (Eq. 1, 4, 5), OTS weights (Eq. 7), the policy loss
(Eq. 2, 6, 8), and beside them the KL estimate and the OPSD divergence (arXiv 2601.18734).

Alphabet: N rollouts of a step, B rows of a micro-batch, T tokens, V vocabulary. Masks are float multipliers of fixed
shape and nothing here waits for the device: no boolean indexing, no `.item()`.

Every loss is a SUM over tokens, each scaled by `loss_scales`: the one denominator is counted over the whole step
before the first backward, so the gradient does not depend on how rows are cut into micro-batches (trap 12).

Where the paper leaves a choice, the flag and the choice are named at the function. No KL term by default (§3).
"""
import math

import torch

from rollout import DIAGNOSIS, PREFIX

EPS = 1e-6  # Eq. 1; far below the smallest non-zero std of 0/1 rewards, so it never shows


# ---------------------------------------------------------------------------------------------------------------------
# advantages


def normalise(rewards: torch.Tensor, among: torch.Tensor, std: str = "population") -> torch.Tensor:
    """Eq. 1: (r - mean) / (std + eps) of `rewards` (M,), with mean and std taken over `among` (n,).

    std = 'population' divides by n (Eq. 1), 'sample' by n - 1 (the common toolchain). A group whose rewards are all
    equal gives exactly 0: no rounding noise is divided by a tiny std (trap 15).
    """
    if len(among) < 2 or bool((among == among[0]).all()):
        return torch.zeros_like(rewards)
    return (rewards - among.mean()) / (among.std(correction=1 if std == "sample" else 0) + EPS)


def advantages(
    rewards: torch.Tensor,
    queries: list[int],
    groups: list[str],
    is_reflection: list[bool],
    *,
    ref_advantage: str = "group",
    std: str = "population",
) -> torch.Tensor:
    """Decoupled advantage estimation: Eq. 1 on every group, Eq. 4, 5 on the reflection groups. (N,) -> (N,) fp32.

    A group is what shares a query and a name in `groups`: "a" for the ordinary rollouts of a query, "a_reflected" for
    its constructions (§3.4); with `decoupled = False` those were born into "a" and the two are normalised together.

        rewards 1 0 0 0 | 1 0    queries 7 7 7 7 | 7 7    groups a a a a | a_reflected a_reflected
        gives   1.73 -0.58 -0.58 -0.58 | 1 -1

    ref_advantage says what a construction's reward is compared with; ordinary groups never change:
        'group'   the other constructions of its query (Eq. 5); a construction that is alone gets A = r. Mind that two
                  right ones give A = 0 while a single right one gives A = 1: that is the paper's rule.
        'reward'  nothing: A = r for every construction.
        'orig'    mean and std of the ordinary rollouts of its query: it then sees how hard the query is.
        'joint'   mean and std of ordinary rollouts and constructions together (the reading of §4.5, Table 4).
    """
    if ref_advantage not in ("group", "reward", "orig", "joint"):
        raise ValueError(f"ref_advantage = {ref_advantage!r} is unknown; use 'group', 'reward', 'orig' or 'joint'")
    rewards = rewards.double()
    result = torch.zeros_like(rewards)
    members, ordinary, everyone = {}, {}, {}  # (query, group) -> indices; query -> those of its ordinary rollouts; of all
    for i, (query, group) in enumerate(zip(queries, groups, strict=True)):
        members.setdefault((query, group), []).append(i)
        everyone.setdefault(query, []).append(i)
        if not is_reflection[i]:
            ordinary.setdefault(query, []).append(i)
    for index in members.values():
        r = rewards[index]
        if not all(is_reflection[i] for i in index):      # an ordinary group, or a mixed one (decoupled = False)
            result[index] = normalise(r, r, std)
        elif ref_advantage == "reward" or (ref_advantage == "group" and len(index) == 1):
            result[index] = r                             # |G_ref| = 1 has no spread to divide by (§3.4)
        elif ref_advantage == "group":
            result[index] = normalise(r, r, std)
        else:
            query = queries[index[0]]
            among = ordinary.get(query, []) if ref_advantage == "orig" else everyone[query]
            result[index] = normalise(r, rewards[among], std)
    return result.float()


# ---------------------------------------------------------------------------------------------------------------------
# masks and weights


def train_mask(
    completion_mask: torch.Tensor, roles: torch.Tensor, is_reflection: torch.Tensor, *, diagnosis: str, train_prefix: bool
) -> torch.Tensor:
    """Which tokens are in the loss: (B, T), (B, T), (B,) -> (B, T) fp32 of 0 and 1. Also what the denominator counts.

    diagnosis = 'mask' keeps the inserted diagnosis out of the gradient; 'ots' and 'train' let it in.
    train_prefix = False also keeps out the learner's own wrong reasoning that a reflection preserves.

        roles 0 0 1 1 2 2 of a reflection, diagnosis = 'mask'  ->  1 1 0 0 1 1
    """
    left_out = torch.zeros_like(completion_mask)
    if diagnosis == "mask":
        left_out = left_out + (roles == DIAGNOSIS)
    if not train_prefix:
        left_out = left_out + (roles == PREFIX)
    return completion_mask * (1.0 - is_reflection[:, None] * left_out)


def ots_weights(logprobs: torch.Tensor, entropy: torch.Tensor, w_min: float = 0.01, w_max: float = 10.0) -> torch.Tensor:
    """Eq. 7: w_t = clamp(exp(log p(y_t) + H_t), w_min, w_max). (B, T), (B, T) -> (B, T), no gradient.

    A token the policy samples itself has E[log p + H] = 0, so its weight sits near 1; a forced, unlikely token gets
    much less than 1. Note the other side: the clamp lets a token with log p > -H be AMPLIFIED up to w_max.

        log p -0.1 -0.1 -5.0,  H 0.1 1.0 0.1  ->  w 1.00 2.46 0.01
    """
    # CRITICAL: detached. Weights scale the gradient; a gradient through them would train the policy to raise entropy.
    s = (logprobs + entropy).detach()
    # Clamped before exp: in a masked position s may be anything, and inf * 0 would be NaN (trap 16).
    return s.nan_to_num(0.0).clamp(-30.0, 30.0).exp().clamp(w_min, w_max)


def token_weights(
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    roles: torch.Tensor,
    is_reflection: torch.Tensor,
    *,
    diagnosis: str = "mask",
    ots: bool = True,
    w_min: float = 0.01,
    w_max: float = 10.0,
) -> torch.Tensor:
    """The w_t of Eq. 8: OTS on constructed trajectories, 1 on ordinary rollouts. (B, T) x3, (B,) -> (B, T), no gradient.

    ots = False gives 1 everywhere outside the diagnosis; the diagnosis follows its own flag: 'ots' weighs it by Eq. 7
    (the paper's variant), 'train' by 1, 'mask' leaves it to `train_mask`. w is taken at the current policy, which at a
    step's first update is also the old one; the paper does not say which it means at later updates.
    """
    w = ots_weights(logprobs, entropy, w_min, w_max)
    inside = (roles == DIAGNOSIS).float()
    use = is_reflection[:, None] * (inside * float(diagnosis == "ots") + (1.0 - inside) * float(ots))
    return torch.where(use > 0, w, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# losses


def loss_scales(
    lengths: torch.Tensor, is_reflection: torch.Tensor, totals: torch.Tensor, *, lam: float, loss_agg: str, loss_norm: str
) -> torch.Tensor:
    """What one trained token of each rollout counts in the step's loss: (N,), (N,) -> (N,). The one denominator.

    lengths holds trained tokens per rollout; totals (4,) = rollouts and tokens of the ordinary part, then of the
    reflection part, over ALL micro-batches and processes (`loss_totals`, summed over processes).
    loss_agg   'sequence': mean over a response's tokens, then over responses (Eq. 2); 'token': mean over all tokens.
    loss_norm  'separate': L_orig + lam * L_ref, each over its own part (Eq. 6); 'merged': one mean over both parts.
    A part with nothing to learn from counts 0, it does not divide by it (trap 13).
    """
    ref = is_reflection.bool()
    n_orig, t_orig, n_ref, t_ref = totals.double()
    if loss_norm == "merged":
        n_orig = n_ref = n_orig + n_ref
        t_orig = t_ref = t_orig + t_ref
    if loss_agg == "sequence":
        scale = 1.0 / (torch.where(ref, n_ref, n_orig).clamp(min=1) * lengths.double().clamp(min=1))
    else:
        scale = 1.0 / torch.where(ref, t_ref, t_orig).clamp(min=1)
    return torch.where(ref, lam * scale, scale).float()


def loss_totals(lengths: torch.Tensor, is_reflection: torch.Tensor) -> torch.Tensor:
    """(N,), (N,) -> (4,) fp64: rollouts with a trained token and trained tokens, ordinary part first, then reflections."""
    some, ref, n = (lengths > 0).double(), is_reflection.double(), lengths.double()
    return torch.stack([(some * (1 - ref)).sum(), (n * (1 - ref)).sum(), (some * ref).sum(), (n * ref).sum()])


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    loss_scale: torch.Tensor,
    clip_eps: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 2 and Eq. 8: -sum_t scale * w_t * min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A), a scalar, and sums for the log.

    logprobs, old_logprobs, mask, weights (B, T); advantages (B, 1), or (B, T) for a per-token advantage; loss_scale (B,).
    rho_t = pi_theta / pi_theta_old on (x, y), constructed trajectories too: conditioned on the plain question.

        logprobs log .6, old log .5, A 1, eps .1:  rho 1.2 is clipped to 1.1, loss -1.1 * scale, gradient 0
    """
    # Select before exp: inf or NaN in a masked position must reach neither the loss nor, through 0 * inf, its gradient.
    log_ratio = torch.where(mask > 0, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    loss = -(loss_scale[:, None] * torch.where(mask > 0, weights * surrogate, 0.0)).sum()
    with torch.no_grad():
        # clipped = the gradient was cut, not merely the ratio outside the band
        clipped = ((ratio > 1 + clip_eps) & (advantages > 0)) | ((ratio < 1 - clip_eps) & (advantages < 0))
        stats = {"clipped": (clipped * mask).sum(), "ratio_max": (ratio * mask).max()}
    return loss, stats


def nll_loss(logprobs: torch.Tensor, mask: torch.Tensor, loss_scale: torch.Tensor) -> torch.Tensor:
    """Maximum likelihood, -sum_t scale * log p: `method = 'sft'` on constructions, and the cold start. (B, T) x2, (B,)."""
    return -(loss_scale[:, None] * torch.where(mask > 0, logprobs, 0.0)).sum()


def kl_to_ref(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's own tokens, exp(d) - d - 1 with d = ref - policy.

    (B, T) x3 -> (B, T), 0 where masked; never negative; as a loss it has the gradient of KL(reference || policy) (trap 18).
    Only logged unless kl_coef > 0.
    """
    d = torch.where(mask > 0, ref_logprobs - logprobs, 0.0)
    return torch.expm1(d) - d  # exp(d) - d - 1 in fp32 is off by 6e-8, more than the whole of it at d = 3e-4


def generalised_jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float, clip: float) -> torch.Tensor:
    """OPSD's per-token divergence over the full vocabulary: (n, V), (n, V) -> (n,). No gradient to the teacher.

    With m = (1 - beta) p_student + beta p_teacher: beta KL(p_teacher || m) + (1 - beta) KL(p_student || m); the ends are
    the plain directions, beta = 0 KL(teacher || student), beta = 1 KL(student || teacher). A token's divergence is cut
    at `clip` (0: no cut): words of style ("wait") differ most and would drown the rest.
    """
    student = torch.log_softmax(student_logits, dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach(), dim=-1)  # CRITICAL: the teacher is a target, never trained

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


def distillation_loss(divergence: torch.Tensor, mask: torch.Tensor, loss_scale: torch.Tensor) -> torch.Tensor:
    """OPSD, full-vocabulary form: the student's divergence to the teacher, summed over its own tokens. (B, T) x2, (B,)."""
    return (loss_scale[:, None] * torch.where(mask > 0, divergence, 0.0)).sum()
