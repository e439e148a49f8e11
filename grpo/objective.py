"""The objective of a token, put together: what is learned from the reward, and what the reference holds against it.

    per_token_loss = correction * surrogate + kl_coef * KL

Its parts are handed in as functions, of `losses.py`, `corrections.py` and `kl.py`, which a run picks by name. Left out:
the weights with which tokens are added up (`weighting.py`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor


class Objective(NamedTuple):
    """What the update adds up, and what it logs."""

    per_token_loss: Tensor
    """[B,T], minimised; exactly 0 where the mask is False, whatever stands there."""
    clipped: Tensor
    """[B,T] bool, of the surrogate."""
    kl: Tensor | None
    """[B,T] in nats, without `kl_coef`; None without a reference."""


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
    correction_cap: float,
    kl: Callable[[Tensor, Tensor], Tensor],
    kl_coef: float,
) -> Objective:
    """c_t surrogate_t + kl_coef KL_t: GRPO with its KL in the loss, https://arxiv.org/abs/2402.03300 eq. 3.

    The correction multiplies the surrogate alone: the KL is of the policy, whoever drew the tokens.

    Args:
        logprobs: [B,T], with gradient; these and the next three in nats, 0 where there is no token.
        old_logprobs: [B,T], of the policy at the time of the rollout.
        sampling_logprobs: [B,T], as the sampler saw them.
        ref_logprobs: [B,T], of the frozen reference; None: there is none, no penalty.
        advantages: [B] or [B,T]. mask: [B,T] bool, True = learned from.
        loss: of `losses.py`.
        constants: {name: value} of the loss's keyword arguments.
        correction: of `corrections.py`.
        correction_cap: its cap.
        kl: of `kl.py`.
        kl_coef: weight of the KL, per nat.

    Returns:
        unreduced values, to be weighted and summed.
    """
    surrogate, clipped = loss(logprobs, old_logprobs, advantages, mask, **constants)
    corrected = correction(old_logprobs, sampling_logprobs, cap=correction_cap) * surrogate
    if ref_logprobs is None:
        return Objective(corrected, clipped, None)
    penalty = kl(logprobs.where(mask, 0), ref_logprobs.where(mask, 0))  # not times a weight of 0: it may be infinite
    return Objective(corrected + kl_coef * penalty, clipped, penalty)
