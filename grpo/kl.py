"""Estimators of KL(policy || reference) from the log-probabilities of the sampled tokens, one value per token.

Names, formulas and values: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html, with
d = logprobs - ref_logprobs. A good value is not a good gradient. In the loss, on-policy, differentiating the sampled
value gives in expectation (https://arxiv.org/abs/2506.09477, and by enumeration in the tests):

                value       gradient as a loss
    k1          unbiased    0: no penalty at all
    k2          biased      that of the exact KL(policy || reference)
    k3          unbiased    that of KL(reference || policy): another direction, close while the two are close
    k1_plus     unbiased    as k2
    k3_plus     unbiased    as k2
    k3_ratio    unbiased    as k2, and on samples of an older policy too

Every function takes the same three tensors. Left out: clamps.
"""

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """k1 = d. Unbiased, high variance, either sign; as a loss its expected gradient is 0, so it is for logging only.

    Schulman, http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: [B,T], with gradient. ref_logprobs: [B,T], without. old_logprobs: not used.

    Returns:
        [B,T].
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """k2 = d^2 / 2. Biased value, but on-policy its gradient is that of the exact KL(policy || reference).

    Schulman, http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: [B,T], with gradient. ref_logprobs: [B,T], without. old_logprobs: not used.

    Returns:
        [B,T], >= 0.
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """k3 = exp(-d) - 1 + d. Unbiased and never negative; the penalty of GRPO. Its gradient is that of the reversed KL.

    Schulman, http://joschu.net/blog/kl-approx.html; GRPO, https://arxiv.org/abs/2402.03300 eq. 4. `expm1` keeps the
    digits that exp(-d) - 1 loses for small d; where it overflows (d < -88 in float32) the value is inf, not clamped.

    Args:
        logprobs: [B,T], with gradient. ref_logprobs: [B,T], without. old_logprobs: not used.

    Returns:
        [B,T], >= 0 up to rounding.
    """
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


def k1_plus(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """The value of k1 with the gradient of k2: sg[k1] + k2 - sg[k2]. verl's `k1+`.

    https://arxiv.org/abs/2506.09477.

    Args:
        logprobs: [B,T], with gradient. ref_logprobs: [B,T], without. old_logprobs: not used.

    Returns:
        [B,T].
    """
    return _straight_through(k1(logprobs, ref_logprobs), k2(logprobs, ref_logprobs))


def k3_plus(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """The value of k3 with the gradient of k2: sg[k3] + k2 - sg[k2]. verl's `k3+`.

    https://arxiv.org/abs/2506.09477.

    Args:
        logprobs: [B,T], with gradient. ref_logprobs: [B,T], without. old_logprobs: not used.

    Returns:
        [B,T], >= 0 up to rounding.
    """
    return _straight_through(k3(logprobs, ref_logprobs), k2(logprobs, ref_logprobs))


def k3_ratio(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """r k3, r = exp(logprobs - old_logprobs): unbiased in value and gradient though an older policy drew the tokens.

    DeepSeek-V3.2, https://arxiv.org/abs/2512.02556 eq. 7. Its gradient is r d: token by token r times that of k2.

    Args:
        logprobs: [B,T], with gradient. ref_logprobs: [B,T], without.
        old_logprobs: [B,T], without, of the policy that drew the tokens; None: the present one, so r = 1.

    Returns:
        [B,T], >= 0 up to rounding.
    """
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    return (logprobs - old_logprobs).exp() * k3(logprobs, ref_logprobs)


def _straight_through(value: Tensor, other: Tensor) -> Tensor:
    """The value of one with the gradient of the other."""
    return value.detach() + (other - other.detach())


KL = {"k1": k1, "k2": k2, "k3": k3, "k1_plus": k1_plus, "k3_plus": k3_plus, "k3_ratio": k3_ratio}
