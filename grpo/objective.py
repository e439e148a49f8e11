"""The objective of a token, put together: what is learned from the reward, and what the reference holds against it.

    per_token_loss = correction * surrogate + kl_coef * KL

The KL may stand in the reward instead: then A_t - kl_coef * KL_t takes the place of A, and the second term is 0.

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
    if penalty is not None and kl_in == "loss":
        per_token_loss = per_token_loss + kl_coef * penalty
    return Objective(per_token_loss, clipped, penalty, factor)


def _per_token(advantages: Tensor) -> Tensor:
    """[B] or [B,T] -> [B,1] or [B,T]."""
    return advantages if advantages.dim() == 2 else advantages[:, None]
