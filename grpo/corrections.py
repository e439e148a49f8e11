"""Importance weights for a sampler that is not quite the learner: other kernels, other precision, quantised weights.

The tokens were drawn from the sampler's distribution, the loss takes them for draws from the learner's at rollout time.
Each function returns a detached factor per token, to be multiplied into the surrogate (not into the KL penalty), built
from the ratio rho = pi_old / pi_sampler = exp(old_logprobs - sampling_logprobs). Where they agree the factor is exactly
1. All functions take the same tensors, and as constants the bounds that they use. A token or row with factor 0 stays in
the denominators. Left out: dividing factors by their mean, which would make the result depend on the cut.
"""

import torch
from torch import Tensor


def none(logprobs: Tensor, old_logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Factor 1: the mismatch is measured and logged, not corrected. No paper.

    Args:
        logprobs, old_logprobs, sampling_logprobs: [B,T]. advantages: [B] or [B,T]. mask: [B,T] bool.

    Returns:
        [B,T], ones.
    """
    return torch.ones_like(old_logprobs)


def truncate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    correction_cap: float,
) -> Tensor:
    """Truncated importance sampling (TIS): min(rho, cap).

    F. Yao, L. Liu et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025,
    https://fengyao.notion.site/off-policy-rl. Every token keeps a gradient; the variance is bounded by the cap.

    Args:
        old_logprobs, sampling_logprobs: [B,T]. mask: [B,T] bool. logprobs, advantages: not used.
        correction_cap: largest factor, >= 1.

    Returns:
        [B,T] in 0 to the cap, without gradient; 1 where masked out.
    """
    return _log_rho(old_logprobs, sampling_logprobs, mask).exp().clamp(max=correction_cap)


def mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    correction_floor: float,
    correction_cap: float,
) -> Tensor:
    """Masked importance sampling: rho where floor <= rho <= cap, else 0.

    IcePop, https://arxiv.org/abs/2510.18855, with bounds 0.5 and 5. A token that the two engines disagree on gets no
    gradient from the surrogate.

    Args:
        old_logprobs, sampling_logprobs: [B,T]. mask: [B,T] bool. logprobs, advantages: not used.
        correction_floor, correction_cap: smallest and largest ratio that is trusted, around 1.

    Returns:
        [B,T]: 0, or between the bounds; without gradient; 1 where masked out.
    """
    rho = _log_rho(old_logprobs, sampling_logprobs, mask).exp()
    return torch.where(_within(rho, correction_floor, correction_cap), rho, 0)


def truncate_row(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    correction_cap: float,
) -> Tensor:
    """Truncated importance sampling of whole rows: min(product of rho over the row, cap), repeated on its tokens.

    Without the cap it is exact; but a product over hundreds of tokens is soon near 0 or at the cap. Same source as
    `truncate`.

    Args:
        old_logprobs, sampling_logprobs: [B,T]. mask: [B,T] bool. logprobs, advantages: not used.
        correction_cap: largest factor, >= 1.

    Returns:
        [B,T] in 0 to the cap, without gradient.
    """
    log_rho = _log_rho(old_logprobs, sampling_logprobs, mask)
    return log_rho.sum(-1, keepdim=True).exp().clamp(max=correction_cap).expand_as(log_rho)


def mask_row(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    correction_floor: float,
    correction_cap: float,
) -> Tensor:
    """Rows whose geometric mean of rho lies outside the bounds get factor 0, others 1.

    The mean does not vanish or explode with the length, so its bounds are close to 1: 0.999 and 1.002 in NeMo-RL, 0.99
    and 1.01 in SkyRL. J. Liu et al., "When speed kills stability", 2025, https://richardli.xyz/rl-collapse.

    Args:
        old_logprobs, sampling_logprobs: [B,T]. mask: [B,T] bool. logprobs, advantages: not used.
        correction_floor, correction_cap: smallest and largest mean that is trusted, around 1.

    Returns:
        [B,T] of 0 and 1, without gradient.
    """
    mean = _row_mean(_log_rho(old_logprobs, sampling_logprobs, mask), mask).exp()
    return _kept(_within(mean, correction_floor, correction_cap), old_logprobs)


def veto(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    correction_floor: float,
    correction_cap: float,
) -> Tensor:
    """Rows in which any token's rho lies outside the bounds get factor 0, others 1.

    In verl, slime and SkyRL, with a floor of 1e-4: one token that the learner would hardly draw spoils the row. Same
    source as `mask_row`.

    Args:
        old_logprobs, sampling_logprobs: [B,T]. mask: [B,T] bool. logprobs, advantages: not used.
        correction_floor, correction_cap: smallest and largest ratio that is trusted; inf: no upper bound.

    Returns:
        [B,T] of 0 and 1, without gradient.
    """
    rho = _log_rho(old_logprobs, sampling_logprobs, mask).exp()
    trusted = _within(rho, correction_floor, correction_cap).all(-1, keepdim=True)
    return _kept(trusted, old_logprobs)


def opsm(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    correction_floor: float,
) -> Tensor:
    """Off-policy sequence mask: 0 where A < 0 in a row with exp(mean_t (lp - lp_sampler)) < floor, else 1.

    DeepSeek-V3.2, https://arxiv.org/abs/2512.02556 eq. 9, whose delta in nats is -log(floor). It compares with the
    present policy, so it also sees what earlier updates of the step have changed.

    Args:
        logprobs, sampling_logprobs: [B,T]. advantages: [B] or [B,T]. mask: [B,T] bool. old_logprobs: not used.
        correction_floor: smallest mean of ratios at which a bad row is still learned from.

    Returns:
        [B,T] of 0 and 1, without gradient.
    """
    far = _row_mean(_log_rho(logprobs, sampling_logprobs, mask), mask).exp() < correction_floor
    bad = (advantages if advantages.dim() == 2 else advantages[:, None]) < 0
    return _kept(~(far & bad), old_logprobs)


def _log_rho(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B,T], without gradient; 0 where masked out."""
    return torch.where(mask, logprobs - sampling_logprobs, 0).detach()


def _row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B,T], 0 where masked out -> [B,1]: the mean over the kept tokens of a row."""
    return values.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _within(ratio: Tensor, floor: float, cap: float) -> Tensor:
    """Bool in the shape of `ratio`: where it lies between the bounds, both included."""
    return (ratio >= floor) & (ratio <= cap)


def _kept(keep: Tensor, like: Tensor) -> Tensor:
    """Bool [B,1] or [B,T] -> 1 and 0, in the shape and dtype of `like`."""
    return keep.expand_as(like).to(like.dtype)


CORRECTIONS = {
    "none": none,
    "truncate": truncate,
    "mask": mask,
    "truncate_row": truncate_row,
    "mask_row": mask_row,
    "veto": veto,
    "opsm": opsm,
}
