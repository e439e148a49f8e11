"""Advantages: how much better a completion was than its siblings, from rewards alone.

Each function maps the rewards of a group to the advantages of that group; groups never see one another, so the result
depends neither on the batch nor on the ranks. Nothing is filtered here: a sample whose reward failed (`valid` False)
stays in its place with advantage 0 and takes no part in the baseline. Left out: whitening over the batch, which would
couple the groups.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STD_EPS = 1e-4
"""Added to the standard deviation, in units of reward."""


def grpo(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Group-normalised advantage: A_i = (r_i - mean(r)) / (std(r) + 1e-4), std unbiased (ddof 1).

    DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2; the paper leaves ddof and eps open.

    Args:
        rewards: [..,G]; finite where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.

    Returns:
        [..,G]; exactly 0 where not valid, and in a group with one valid sample or whose valid rewards are all equal.
    """
    deviation, valid = _deviations(rewards, valid)
    freedom = valid.sum(-1, keepdim=True) - 1
    squares = deviation.double().square()  # in float32 those of rewards above 1e19 are infinite
    std = (squares.sum(-1, keepdim=True) / freedom.clamp(min=1)).sqrt()
    return deviation / (std.to(deviation.dtype) + STD_EPS)


def dr_grpo(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Centred advantage: A_i = r_i - mean(r); no division, so easy and hard prompts are not weighted up.

    Dr. GRPO, https://arxiv.org/abs/2503.20783; its other half is `weighting.constant_length`.

    Args:
        rewards: [..,G]; finite where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.

    Returns:
        [..,G]; exactly 0 where not valid, and in a group with one valid sample or whose valid rewards are all equal.
    """
    return _deviations(rewards, valid)[0]


def rloo(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Leave-one-out advantage: A_i = r_i - mean of the others = n / (n - 1) * (r_i - mean(r)), n = valid samples.

    REINFORCE leave-one-out, https://arxiv.org/abs/2402.14740: the baseline does not contain the sample itself, so it
    is independent of it and the gradient is unbiased.

    Args:
        rewards: [..,G]; finite where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.

    Returns:
        [..,G]; exactly 0 where not valid, and in a group with one valid sample or whose valid rewards are all equal.
    """
    deviation, valid = _deviations(rewards, valid)
    n = valid.sum(-1, keepdim=True).to(deviation.dtype)
    return deviation * (n / (n - 1).clamp(min=1))


def weighted_sum(reward_terms: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """The reward that is optimised: r = sum_k w_k r_k, term by term, so that equal samples get bitwise equal rewards.

    Args:
        reward_terms: [K,..]; weights: K numbers.

    Returns:
        [..], NaN where a term is NaN.
    """
    assert len(reward_terms) == len(weights) > 0, (reward_terms.shape, len(weights))
    total = reward_terms[0] * weights[0]
    for term, weight in zip(reward_terms[1:], weights[1:], strict=True):
        total = total + term * weight
    return total


def combine(
    reward_terms: Tensor,
    weights: Sequence[float] | Tensor,
    advantage: Callable[[Tensor, Tensor | None], Tensor],
    how: str,
    valid: Tensor | None = None,
) -> Tensor:
    """Advantages from several reward terms.

    `rewards`: A(sum_k w_k r_k), the usual. `advantages`: sum_k w_k A(r_k), each term normalised within its group first,
    so that a term of small variance is not drowned (GDPO, https://arxiv.org/abs/2601.05242, without its whitening over
    the batch). The two are equal for `dr_grpo` and `rloo`, which are linear.

    Args:
        reward_terms: [K,N,G]; weights: K numbers; valid: [N,G] bool; None = all valid.
        advantage: an entry of `ADVANTAGES`.
        how: `rewards` or `advantages`.

    Returns:
        [N,G]; exactly 0 where not valid.
    """
    if how == "rewards":
        return advantage(weighted_sum(reward_terms, weights), valid)
    return weighted_sum(torch.stack([advantage(term, valid) for term in reward_terms]), weights)


def _deviations(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """r - mean(r) over valid samples, [..,G], exactly 0 in flat groups and where not valid; and `valid`, never None.

    A flat group is found by equality: the mean of eight times 0.1 is not 0.1 in floating point, and dividing that
    residue by a standard deviation of the same size would make advantages of order 1 out of nothing.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    kept = torch.where(valid, rewards, 0)
    mean = kept.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    highest = torch.where(valid, rewards, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(valid, rewards, torch.inf).amin(-1, keepdim=True)
    return torch.where(valid & (highest > lowest), kept - mean, 0), valid


ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}

# The tests check every entry of the table for what all advantages share. They check the names in this set for more.
MEAN_BASELINE = frozenset({"grpo", "dr_grpo", "rloo"})
"""A group adds up to 0, and adding a number to all of its rewards changes nothing."""
