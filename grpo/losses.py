"""Policy losses: one value per token, to be minimised. The only place where signs change.

Every function has the same signature and returns unreduced [B,T] values; denominators are in `weighting.py`, the KL
penalty in `kl.py`, the correction for a sampler that differs from the learner in `corrections.py`. Left out: dual-clip
and clamps of the log-ratio, which remove gradients without a word. Where `mask` is False the loss is exactly 0 with
exactly zero gradient, whatever stands there (NaN, inf): the inputs are replaced before any arithmetic.
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
    """[B,T] bool: where clipping removed the gradient (grpo, gspo) or changed the ratio (cispo)."""


def grpo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """Clipped surrogate of PPO, per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(lp - lp_old).

    https://arxiv.org/abs/1707.06347 eq. 7; in GRPO https://arxiv.org/abs/2402.03300 eq. 3; with clip_high > clip_low
    ("clip higher") DAPO, https://arxiv.org/abs/2503.14476.

    Args:
        logprobs: [B,T], with gradient. old_logprobs: [B,T], without.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        clip_low, clip_high: half-widths of the interval around ratio 1; clip_low >= 1 means no lower bound.
    """
    logprobs, old_logprobs, advantages = _keep(mask, logprobs, old_logprobs, advantages)
    return _pessimistic(logprobs - old_logprobs, advantages, clip_low, clip_high)


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
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = (logprobs - old_logprobs).sum(-1, keepdim=True) / length
    return _pessimistic(log_ratio, advantages, clip_low, clip_high)


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


def _keep(mask: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The inputs as [B,T], with 0 where mask is False; `where` gives zero gradient there even for NaN and inf."""
    return [torch.where(mask, x if x.dim() == mask.dim() else x[:, None], 0) for x in inputs]


def _pessimistic(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """-min(r A, clip(r) A), written as -min(r, 1 + clip_high) A for A >= 0 and -max(r, 1 - clip_low) A for A < 0.

    Args:
        log_ratio: [B,T] or [B,1]. advantages: [B,T], 0 where masked out.

    Bounding before `exp` gives the same value and gradient, without the 0 * inf of a ratio that overflows on the side
    that is clipped anyway. On the other side (A < 0, ratio too large) nothing bounds it: the loss is inf, not NaN, and
    the gradient is not finite, for the update to see.
    """
    lower = math.log(1 - clip_low) if clip_low < 1 else -math.inf
    upper = math.log(1 + clip_high)
    bounded = torch.where(advantages >= 0, log_ratio.clamp(max=upper), log_ratio.clamp(min=lower))
    return Surrogate(-bounded.exp() * advantages, (bounded != log_ratio) & (advantages != 0))


LOSSES = {"grpo": grpo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}

# The tests check every entry of the table for what all losses share. They check the names in these sets for more.
CLIPPING = frozenset({"grpo", "gspo", "cispo"})
"""They bound the ratio by clip_low and clip_high; `clipped` says where a bound acts."""
PESSIMISTIC = frozenset({"grpo", "gspo"})
"""They take the worse of clipped and unclipped, as PPO does. The gradient is 0 exactly where `clipped` is True.
For A < 0 nothing bounds the ratio from above: loss and gradient may be inf."""
