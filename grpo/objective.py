"""The objective of a token, put together: what is learned from the reward, and what the reference holds against it.

    per_token_loss = correction * surrogate + kl_coef * KL

The KL may stand in the reward instead: then A_t - kl_coef * KL_t takes the place of A, and the second term is 0.
The policy gradient may be that of the tokens with the highest entropy alone, and coefficients may follow a target.

Its parts are handed in as functions, of `losses.py`, `corrections.py` and `kl.py`, which a run picks by name. Left out:
the weights with which tokens are added up (`weighting.py`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NATS_PER_BIN, NUM_BINS = 2**-13, 2**17
"""Entropies are compared in bins of about 1e-4 nats, up to 16: more than that of any vocabulary."""


class Objective(NamedTuple):
    """What the update adds up, and what it logs."""

    per_token_loss: Tensor
    """[B,T], minimised; exactly 0 where the mask is False, whatever stands there."""
    clipped: Tensor
    """[B,T] bool, of the surrogate."""
    kl: Tensor | None
    """[B,T] in nats, without `kl_coef`; None without a reference."""
    factor: Tensor
    """[B,T], of the correction, without gradient."""


def objective(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss: Callable,
    constants: Mapping[str, float],
    correction: Callable,
    bounds: Mapping[str, float],
    kl: Callable[[Tensor, Tensor, Tensor], Tensor],
    kl_coef: float,
    kl_in: str = "loss",
    surrogate_mask: Tensor | None = None,
) -> Objective:
    """c_t surrogate_t + kl_coef KL_t: GRPO with its KL in the loss, https://arxiv.org/abs/2402.03300 eq. 3.

    The correction multiplies the surrogate alone: the KL is of the policy, whoever drew the tokens. In the reward, the
    KL is that of the old policy, without gradient, and a token pays for itself alone. With k1 the gradient on-policy is
    that of k2 in the loss, https://arxiv.org/abs/2510.01555.

    Args:
        logprobs: [B,T], with gradient; these and the next three in nats, 0 where there is no token.
        old_logprobs: [B,T], of the policy at the time of the rollout.
        sampling_logprobs: [B,T], as the sampler saw them.
        ref_logprobs: [B,T], of the frozen reference; None: there is none, no penalty.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        loss: of `losses.py`.
        constants: {name: value} of the loss's keyword arguments.
        correction: of `corrections.py`.
        bounds: {name: value} of the correction's keyword arguments.
        kl: of `kl.py`.
        kl_coef: weight of the KL, per nat.
        kl_in: `loss` or `reward`.
        surrogate_mask: [B,T] bool, False on tokens without a surrogate; they pay for their KL. None: all have one.

    Returns:
        unreduced values, to be weighted and summed.
    """
    factor = correction(logprobs, old_logprobs, sampling_logprobs, advantages, mask, **bounds)
    penalty = None
    if ref_logprobs is not None:
        of = logprobs if kl_in == "loss" else old_logprobs.detach()
        # Not times a weight of 0: where the mask is False it may be infinite.
        penalty = kl(of.where(mask, 0), ref_logprobs.where(mask, 0), old_logprobs.where(mask, 0))
    if penalty is not None and kl_in == "reward":
        advantages = _per_token(advantages) - kl_coef * penalty
    surrogate, clipped = loss(logprobs, old_logprobs, advantages, mask, **constants)
    per_token_loss = factor * surrogate
    if surrogate_mask is not None:
        per_token_loss = per_token_loss.where(surrogate_mask, 0)
    if penalty is not None and kl_in == "loss":
        per_token_loss = per_token_loss + kl_coef * penalty
    return Objective(per_token_loss, clipped, penalty, factor)


def _per_token(advantages: Tensor) -> Tensor:
    """[B] or [B,T] -> [B,1] or [B,T]."""
    return advantages if advantages.dim() == 2 else advantages[:, None]


def highest_entropy(
    entropy: Tensor, mask: Tensor, share: float, *, sum_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """The tokens with the highest entropy, a share of all of them: the forks of a text.

    https://arxiv.org/abs/2506.01939, which keeps 0.2 and divides by all tokens. The threshold is exact over all rows of
    all ranks: counts in narrow bins are summed. Tokens in the bin of the threshold are all kept, so the share may be a
    little larger. Without bins, rounding would decide between siblings whose prefixes, and so entropies, are equal.

    Args:
        entropy: [B,T] in nats.
        mask: [B,T] bool, True = learned from.
        share: of the tokens of all ranks, above 0 and at most 1.
        sum_over_ranks: adds up a tensor over all ranks.

    Returns:
        [B,T] bool, False where `mask` is.
    """
    bins = (entropy / NATS_PER_BIN).round().long().clamp(0, NUM_BINS - 1)
    counts = sum_over_ranks(torch.bincount(bins[mask], minlength=NUM_BINS))
    from_here = counts.flip(0).cumsum(0).flip(0)
    threshold = (from_here >= share * counts.sum()).sum() - 1  # the highest bin from which on there are enough
    return mask & (bins >= threshold)


def next_kl_coef(kl_coef: float, kl: float, *, kl_target: float, sequences: int, kl_horizon: int) -> float:
    """kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) sequences / horizon): towards a KL that is the target.

    D. Ziegler et al., https://arxiv.org/abs/1909.08593 section 2.2, whose factor is 0.1 for each batch. Sequences and a
    horizon in its place are those of TRL and verl.

    Args:
        kl_coef: of the step. kl: its mean in nats per token, from the estimator that is used.
        kl_target: in nats per token. sequences: of a step. kl_horizon: in sequences.

    Returns:
        the coefficient of the next step.
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * sequences / kl_horizon)


def next_entropy_coef(entropy_coef: float, entropy: float, *, entropy_target: float, entropy_step: float) -> float:
    """entropy_coef + step where the entropy is below the target, else - step; within 0 and 1.

    Skywork-OR1, https://arxiv.org/abs/2505.22312; the bounds are those of TRL.

    Args:
        entropy_coef: of the step. entropy: its mean in nats per token.
        entropy_target: in nats per token. entropy_step: how far the coefficient moves.

    Returns:
        the coefficient of the next step. It is applied if the entropy is not above the target.
    """
    return min(max(entropy_coef + (entropy_step if entropy < entropy_target else -entropy_step), 0.0), 1.0)
