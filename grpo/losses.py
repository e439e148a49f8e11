"""Policy losses: one value per token, to be minimised. The only place where signs change.

Every function takes the same four tensors, and its constants by the names of their options. It returns unreduced [B,T]
values. Denominators are in `weighting.py`, the KL penalty in `kl.py`, the correction for a sampler that differs from
the learner in `corrections.py`. Left out: clamps that remove gradients without a word. Where `mask` is False the loss
is exactly 0 with exactly zero gradient, whatever stands there (NaN, inf): inputs are replaced before any arithmetic.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """What every loss returns."""

    per_token_loss: Tensor
    """[B,T], minimised; 0 where masked out."""
    clipped: Tensor
    """[B,T] bool: where a bound removed the gradient or, in cispo, changed the ratio."""


def grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_max: float = math.inf,
) -> Surrogate:
    """Clipped surrogate of PPO, per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(lp - lp_old).

    https://arxiv.org/abs/1707.06347 eq. 7; in GRPO https://arxiv.org/abs/2402.03300 eq. 3; with clip_high > clip_low
    ("clip higher") DAPO, https://arxiv.org/abs/2503.14476. For A < 0 the loss is at most -ratio_max A: the dual clip
    of https://arxiv.org/abs/1912.09729 eq. 5, and the two-sided delta of https://arxiv.org/abs/2505.07291.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        clip_low, clip_high: half-widths of the interval around ratio 1; clip_low >= 1 means no lower bound.
        ratio_max: largest ratio where A < 0, above 1; inf: none.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    return _pessimistic(logprobs - old_logprobs, advantages, clip_low, clip_high, ratio_max)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """Clipped surrogate with one ratio per sequence: -min(s A, clip(s) A), s_i = exp(mean_t (lp_t - lp_old_t)).

    GSPO, https://arxiv.org/abs/2507.18071 eq. 5 to 7. The value is repeated on every kept token of the row and the
    gradient flows through s, so each token gets 1 / length of it: with `weighting.sequence_mean` the objective is the
    paper's; with `token_mean` rows count by their length. A mean moves far less than the ratio of one token: the paper
    clips at 3e-4 and 4e-4.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        clip_low, clip_high: half-widths of the interval around ratio 1; clip_low >= 1 means no lower bound.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    return _pessimistic(_row_mean(logprobs - old_logprobs, mask), advantages, clip_low, clip_high)


def gspo_token(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """GSPO with advantages per token: -min(s_it A, clip(s_it) A), s_it = sg[s_i] exp(lp_t - sg[lp_t]).

    https://arxiv.org/abs/2507.18071 eq. 13 and 14. Its value is that of `gspo`, and so is its gradient for a row with
    one advantage under `weighting.sequence_mean`. Where advantages differ in a row, each token follows its own.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        clip_low, clip_high: half-widths of the interval around ratio 1; clip_low >= 1 means no lower bound.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    log_ratio = _row_mean(logprobs - old_logprobs, mask).detach() + (logprobs - logprobs.detach())
    return _pessimistic(log_ratio, advantages, clip_low, clip_high)


def gmpo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """Geometric mean of ratios that are clipped one by one: -A exp(mean_t clip(lp_t - lp_old_t)), repeated in a row.

    GMPO, https://arxiv.org/abs/2507.20673. As in `grpo`, a ratio is bounded from above where A >= 0, from below where
    A < 0. The paper's bounds exp(-0.4) and exp(0.4) are clip_low 0.3297, clip_high 0.4918. Without bounds it is `gspo`.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        clip_low, clip_high: half-widths of the interval around ratio 1; clip_low >= 1 means no lower bound.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    log_ratio = logprobs - old_logprobs
    bounded = _bound(log_ratio, advantages, clip_low, clip_high)
    value = -_row_mean(bounded, mask).exp() * advantages
    return Surrogate(value, (bounded != log_ratio) & (advantages != 0))


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Surrogate:
    """A soft gate in place of the clip: -(4 / tau) sigmoid(tau (r - 1)) A, with tau_pos for A >= 0, else tau_neg.

    SAPO, https://arxiv.org/abs/2511.20347. The gradient's weight 4 q (1 - q) r, with q the sigmoid, is 1 at r = 1 and
    fades on both sides. The value there is -2 A / tau, so loss curves do not compare with others.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        tau_pos, tau_neg: > 0; how fast the gate closes. Towards 0 it is the unclipped surrogate.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    beyond = (logprobs - old_logprobs).clamp(max=80.0).expm1()  # the gate is shut long before float32 overflows, at 88
    good, bad = (4 / tau * torch.sigmoid(tau * beyond) for tau in (tau_pos, tau_neg))
    return Surrogate(-torch.where(advantages >= 0, good, bad) * advantages, torch.zeros_like(mask))


def dppo_tv(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, tv_max: float = 0.2
) -> Surrogate:
    """-r A, without gradient once a probability has moved too far the way A pushes it: |p - p_old| > tv_max.

    DPPO with total variation, https://arxiv.org/abs/2602.04879. The trust region is in the probability and not in the
    ratio: a rare token may grow a hundredfold. p_old is the old policy's, as in the ratio; the paper's is the sampler's
    (`ratio_to: sampler`).

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        tv_max: largest move of a probability, in 0 to 1. At 1 it is plain importance sampling.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    moved = logprobs.detach().exp() - old_logprobs.exp()
    return _inside(logprobs - old_logprobs, advantages, moved * advantages.sign() > tv_max)


def dppo_kl(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, binary_kl_max: float = 0.05
) -> Surrogate:
    """As `dppo_tv`, with the distance p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p)) > binary_kl_max.

    DPPO with the KL of "this token or another", https://arxiv.org/abs/2602.04879.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        binary_kl_max: largest KL of a token that is left or taken, in nats. At inf it is plain importance sampling.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    log_ratio = logprobs - old_logprobs
    other, old_other = (-torch.expm1(lp).clamp(max=0) for lp in (logprobs.detach(), old_logprobs))  # 1 - p
    of_others = torch.xlogy(old_other, old_other) - torch.xlogy(old_other, other)  # with 0 log 0 = 0
    distance = of_others - old_logprobs.exp() * log_ratio.detach()
    onwards = log_ratio.detach() * advantages > 0
    return _inside(log_ratio, advantages, onwards & (distance > binary_kl_max))


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """REINFORCE with a clipped, detached importance weight: -sg[clip(r, 1 - clip_low, 1 + clip_high)] A lp.

    CISPO of MiniMax-M1, https://arxiv.org/abs/2506.13585. No token loses its gradient: clipping bounds the
    weight, it does not remove the token. The paper sets no lower bound: clip_low >= 1.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        clip_low, clip_high: half-widths of the interval around ratio 1.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    ratio = (logprobs - old_logprobs).detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return Surrogate(-weight * advantages * logprobs, weight != ratio)


def reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """Plain policy gradient: -A lp. No ratio, so `old_logprobs`, `clip_low` and `clip_high` are not used.

    Williams, 1992, https://doi.org/10.1007/BF00992696. Right only while the policy is the one that sampled.

    Args:
        logprobs: [B,T], with gradient. advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
    """
    logprobs, advantages = _keep(mask, logprobs, advantages)
    return Surrogate(-advantages * logprobs, torch.zeros_like(mask))


def dro(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, dro_beta: float = 0.1
) -> Surrogate:
    """Policy gradient tied to the old policy: -A lp + dro_beta / 2 (lp - lp_old)^2, right for old samples too.

    DRO, https://arxiv.org/abs/2405.19107; Kimi k1.5, https://arxiv.org/abs/2501.12599. The gradient is that of
    `reinforce` with the advantage A - dro_beta log r. The second term is `kl.k2` against the old policy.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        dro_beta: strength of the tie, in units of the advantage per nat. At 0 it is `reinforce`.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    tie = dro_beta / 2 * (logprobs - old_logprobs).square()
    return Surrogate(tie - advantages * logprobs, torch.zeros_like(mask))


def _keep(mask: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The inputs as [B,T], with 0 where mask is False; `where` gives zero gradient there even for NaN and inf."""
    return [torch.where(mask, x if x.dim() == mask.dim() else x[:, None], 0) for x in inputs]


def _row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B,T], 0 where masked out -> [B,1]: the mean over the kept tokens of a row."""
    return values.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _bound(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, ratio_max: float = math.inf
) -> Tensor:
    """Log-ratios bounded on the side where clipping makes the surrogate worse: above for A >= 0, below for A < 0."""
    lower = math.log(1 - clip_low) if clip_low < 1 else -math.inf
    above, below = log_ratio.clamp(max=math.log(1 + clip_high)), log_ratio.clamp(lower, math.log(ratio_max))
    return torch.where(advantages >= 0, above, below)


def _pessimistic(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, ratio_max: float = math.inf
) -> Surrogate:
    """-min(r A, clip(r) A), written as -min(r, 1 + clip_high) A for A >= 0 and -max(r, 1 - clip_low) A for A < 0.

    Args:
        log_ratio: [B,T] or [B,1]. advantages: [B,T], 0 where masked out.

    Bounding before `exp` gives the same value and gradient, without the 0 * inf of a ratio that overflows on the side
    that is clipped anyway. On the other side (A < 0, ratio too large) only `ratio_max` bounds it. Without that the loss
    is inf, not NaN, and the gradient is not finite, for the update to see.
    """
    bounded = _bound(log_ratio, advantages, clip_low, clip_high, ratio_max)
    return Surrogate(-bounded.exp() * advantages, (bounded != log_ratio) & (advantages != 0))


def _inside(log_ratio: Tensor, advantages: Tensor, outside: Tensor) -> Surrogate:
    """-r A; 0 without gradient where `outside`, which is also left out before `exp`, so that nothing is 0 * inf."""
    kept = (advantages != 0) & ~outside
    return Surrogate(-torch.where(kept, log_ratio, 0).exp() * torch.where(kept, advantages, 0), outside)


LOSSES = {
    "grpo": grpo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "reinforce": reinforce,
    "dro": dro,
}

# The tests check every entry of the table for what all losses share. They check the names in these sets for more.
CLIPPING = frozenset({"grpo", "gspo", "gspo_token", "gmpo", "cispo"})
"""They bound the ratio by clip_low and clip_high; `clipped` says where a bound acts."""
PESSIMISTIC = frozenset({"grpo", "gspo", "gspo_token", "gmpo"})
"""They take the worse of clipped and unclipped, as PPO does. In a row of one token the gradient is 0 exactly where
`clipped` is True. For A < 0 nothing but ratio_max bounds the ratio from above: loss and gradient may be inf."""
TRUST_REGION = frozenset({"dppo_tv", "dppo_kl"})
"""The gradient is 0 exactly where `clipped` is True. Inside of the region nothing bounds the ratio."""
TIED = frozenset({"dro"})
"""They pull towards the old policy where the advantage is 0, too."""
