"""Advantages: how much better a completion was than its siblings, from rewards alone.

Each function maps the rewards of a group to its advantages. What it needs beside, it asks for by name: `lengths`, the
option of a constant, or `sum_over_ranks` for statistics of a whole step, which do not depend on the number of ranks.

Left out: filters. A sample whose reward failed (`valid` False) has advantage 0 and no part in the baseline.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STD_EPS = 1e-4
"""Added to the standard deviation, in units of reward."""


def _alone(tensor: Tensor) -> Tensor:
    """The sum over the ranks, where there is one rank."""
    return tensor


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


def opo(rewards: Tensor, valid: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
    """Baseline of least variance where the gradient grows with the length: A_i = r_i - sum_j l_j r_j / sum_j l_j.

    OPO, https://arxiv.org/abs/2505.23585. Like the mean, this baseline contains the sample itself.

    Args:
        rewards: [..,G]; finite where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.
        lengths: [..,G], tokens of each completion; None = all equal, which makes it `dr_grpo`.

    Returns:
        [..,G]; exactly 0 where not valid, and in a group with one valid sample or whose valid rewards are all equal.
    """
    return _deviations(rewards, valid, lengths)[0]


def max_rl(
    rewards: Tensor, valid: Tensor | None = None, *, sum_over_ranks: Callable[[Tensor], Tensor] = _alone
) -> Tensor:
    """Maximum likelihood of success: A_i = r_i / mean(r) - 1, and -1 in a group without a success. Rewards are 0 or 1.

    MaxRL, https://arxiv.org/abs/2602.02710. In expectation it climbs sum_{k=1..G} (1 - (1 - p)^k) / k, the expansion of
    log p to the order G. Published code gives a failed group 0, which makes the order G - 1.

    Args:
        rewards: [..,G]; 0 or 1 where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.
        sum_over_ranks: adds up a tensor over all ranks, so that all of them refuse together.

    Returns:
        [..,G]; exactly 0 where not valid and in a group of successes.

    Raises:
        ValueError: a valid reward is neither 0 nor 1.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    if sum_over_ranks((valid & (rewards != 0) & (rewards != 1)).sum()) > 0:
        raise ValueError("advantage is 'max_rl': every reward must be 0 or 1; use one reward of weight 1, or rloo")
    kept = torch.where(valid, rewards, 0)
    mean = kept.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(valid, kept / mean.where(mean > 0, 1) - 1, 0)


def pkpo(rewards: Tensor, valid: Tensor | None = None, *, pass_k: int = 1) -> Tensor:
    """For the best of k samples: A_i = n^2 / (n - k) (s_i - mean(s)), s_i = sum of max(r_S) over S with i / C(n, k).

    S are the subsets of k samples. PKPO, https://arxiv.org/abs/2505.15201, with a baseline: subtracting the mean of s
    shrinks the expected gradient by (n - k) / n, which is made up for, so it stays unbiased. With rewards sorted,
    s_(j+1) - s_(j) = C(j-1, k-1) / C(n, k) (r_(j+1) - r_(j)). So equal rewards get equal advantages to the bit.

    Args:
        rewards: [..,G]; finite where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.
        pass_k: k >= 1; 1 is `rloo`.

    Returns:
        [..,G]; exactly 0 where not valid, and in a group with k or fewer valid samples or whose rewards are all equal.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    n, j = valid.sum(-1, keepdim=True).double(), torch.arange(1, rewards.shape[-1], device=rewards.device).double()
    ascending, order = torch.where(valid, rewards, torch.inf).sort(-1)  # those that are not valid come last
    rise = torch.where(j < n, ascending.diff(dim=-1), 0)
    share = torch.where(n > pass_k, (_log_binomial(j - 1, pass_k - 1) - _log_binomial(n, pass_k)).exp(), 0)
    sums = torch.nn.functional.pad((share * rise).cumsum(-1), (1, 0))
    deviation, _ = _deviations(torch.zeros_like(sums).scatter(-1, order, sums), valid)
    return (deviation * n.square() / (n - pass_k).clamp(min=1)).to(rewards.dtype)


def batch_std(
    rewards: Tensor, valid: Tensor | None = None, *, sum_over_ranks: Callable[[Tensor], Tensor] = _alone
) -> Tensor:
    """Group mean, spread of the step: A_i = (r_i - mean(r)) / (std of all rewards of the step + 1e-4), ddof 1.

    LitePPO, https://arxiv.org/abs/2508.08221; TRL's `scale_rewards: batch`. Samples count alike, whatever their length.

    Args:
        rewards: [..,G], those of this rank; finite where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.
        sum_over_ranks: adds up a tensor over all ranks.

    Returns:
        [..,G]; exactly 0 where not valid, and in a group with one valid sample or whose valid rewards are all equal.
    """
    deviation, valid = _deviations(rewards, valid)
    return deviation / _spread(rewards, valid, sum_over_ranks)


def reinforce_pp_baseline(
    rewards: Tensor, valid: Tensor | None = None, *, sum_over_ranks: Callable[[Tensor], Tensor] = _alone
) -> Tensor:
    """Group mean, spread of what is left: A_i = d_i / (std of all d of the step + 1e-4), d_i = r_i - mean(r), ddof 1.

    REINFORCE++-baseline, https://arxiv.org/abs/2501.03262. Samples count alike; OpenRLHF and verl count tokens.

    Args:
        rewards: [..,G], those of this rank; finite where valid, anything where not.
        valid: [..,G] bool, False where a reward failed; None = all valid.
        sum_over_ranks: adds up a tensor over all ranks.

    Returns:
        [..,G]; exactly 0 where not valid, and in a group with one valid sample or whose valid rewards are all equal.
    """
    deviation, valid = _deviations(rewards, valid)
    return whiten(deviation, valid, sum_over_ranks=sum_over_ranks)


def whiten(advantages: Tensor, valid: Tensor, *, sum_over_ranks: Callable[[Tensor], Tensor] = _alone) -> Tensor:
    """Divide by the spread of the whole step: A_i / (std of all A + 1e-4), ddof 1.

    The last part of GDPO, https://arxiv.org/abs/2601.05242. The mean of the step is not subtracted. Where groups add up
    to 0 it is 0 but for rounding, which would make a flat group learn.

    Args:
        advantages: [..,G], those of this rank; 0 where not valid. valid: [..,G] bool.
        sum_over_ranks: adds up a tensor over all ranks.

    Returns:
        [..,G]; 0 where `advantages` is.
    """
    return advantages / _spread(advantages, valid, sum_over_ranks)


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
    **asked: Any,
) -> Tensor:
    """Advantages from several reward terms.

    `rewards`: A(sum_k w_k r_k), the usual. `advantages`: sum_k w_k A(r_k), each term normalised within its group first,
    so that a term of small variance is not drowned (GDPO, https://arxiv.org/abs/2601.05242; its last part is `whiten`).
    The two are equal for `dr_grpo` and `rloo`, which are linear.

    Args:
        reward_terms: [K,N,G], -inf where a term does not apply: it adds nothing, and its own baseline is that of the
            others; weights: K numbers; valid: [N,G] bool; None = all valid.
        advantage: an entry of `ADVANTAGES`.
        how: `rewards` or `advantages`.
        asked: what `advantage` asks for by name.

    Returns:
        [N,G]; exactly 0 where not valid.
    """
    if how == "rewards":
        return advantage(weighted_sum(reward_terms.masked_fill(reward_terms.isneginf(), 0), weights), valid, **asked)
    known = ~reward_terms.isneginf() if valid is None else valid & ~reward_terms.isneginf()
    of_terms = [advantage(term, own, **asked) for term, own in zip(reward_terms, known, strict=True)]
    return weighted_sum(torch.stack(of_terms), weights)


def _deviations(rewards: Tensor, valid: Tensor | None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """r - mean(r) over valid samples, [..,G], exactly 0 in flat groups and where not valid; and `valid`, never None.

    With `lengths`, samples weigh by them in the mean. A flat group is found by equality: the mean of eight times 0.1 is
    not 0.1 in floating point, and dividing that residue by a standard deviation of the same size would make advantages
    of order 1 out of nothing.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    kept = torch.where(valid, rewards, 0)
    weights = valid.to(rewards.dtype) if lengths is None else torch.where(valid, lengths.to(rewards.dtype), 0)
    mean = (weights * kept).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1)
    highest = torch.where(valid, rewards, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(valid, rewards, torch.inf).amin(-1, keepdim=True)
    return torch.where(valid & (highest > lowest), kept - mean, 0), valid


def _spread(values: Tensor, valid: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """The standard deviation, ddof 1, of all valid values on all ranks, plus 1e-4: a scalar in their dtype.

    Two passes, because a sum of squares loses the digits of a spread that is small beside its mean.
    """
    kept = torch.where(valid, values, 0).double()
    count, total = sum_over_ranks(torch.stack([valid.sum().double(), kept.sum()]))
    squares = torch.where(valid, kept - total / count.clamp(min=1), 0).square().sum()
    std = (sum_over_ranks(squares) / (count - 1).clamp(min=1)).sqrt()
    return std.to(values.dtype) + STD_EPS


def _log_binomial(n: Tensor, k: int) -> Tensor:
    """log C(n, k) in float64; -inf for k > n."""
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)


ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "opo": opo,
    "max_rl": max_rl,
    "pkpo": pkpo,
    "batch_std": batch_std,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}

FACTS = ("valid", "lengths", "sum_over_ranks")
"""What an advantage may ask for besides options."""

# The tests check every entry for what all advantages share. They check the names in these sets for more.
MEAN_BASELINE = frozenset({"grpo", "dr_grpo", "rloo", "pkpo", "batch_std", "reinforce_pp_baseline"})
"""A group adds up to 0, and adding a number to all of its rewards changes nothing."""
OF_THE_STEP = frozenset({"batch_std", "reinforce_pp_baseline"})
"""They divide by a spread over all groups of a step. Without these a group does not see the others."""
BINARY = frozenset({"max_rl"})
"""They are for rewards of 0 and 1 and refuse others. A group of equal rewards may have an advantage."""
