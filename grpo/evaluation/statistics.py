"""Intervals and tests for accuracies: how much of a difference is there, and how much could be chance.

Rates get Wilson intervals, differences between two models on the same problems a paired bootstrap and the exact McNemar
test, samples of one problem are a cluster. Pure functions of counts and arrays; scipy where it has the method.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap

RESAMPLES = 9999


def wilson(successes: int, n: int) -> list[float]:
    """The Wilson score interval of a rate at 95 %.

    Args:
        successes: 0..n. n: trials, at least 1.

    Returns:
        [low, high].
    """
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def mean_interval(per_problem: Sequence[float] | np.ndarray, lowest: float, highest: float) -> list[float]:
    """The bootstrap interval (percentile, 95 %) of a mean over problems; problems are drawn again, with all of theirs.

    Problems that are all alike say nothing by being drawn again. Then the rule of three: with a chance of 95 % one of n
    problems belongs to a share of 1 - 0.05^(1/n) of all, so unseen ones of such a share may lie at either bound.

    Args:
        per_problem: n numbers, one per problem: a paired difference, or a rate over the samples of the problem.
        lowest, highest: what such a number could be.

    Returns:
        [low, high]; the same for the same numbers.
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if (values == values[0]).all():
        unseen = 1 - 0.05 ** (1 / len(values))
        return [float((1 - unseen) * values[0] + unseen * bound) for bound in (lowest, highest)]
    result = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0), batch=500
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact McNemar test: the p-value of as uneven a split among the problems on which two models disagree.

    Args:
        only_first, only_second: problems that only one of the two has right.

    Returns:
        Two-sided p-value; 1 without disagreement.
    """
    disagreements = only_first + only_second
    return float(binomtest(only_first, disagreements, 0.5).pvalue) if disagreements else 1.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Chen et al., https://arxiv.org/abs/2107.03374, equation 1.

    Args:
        num_samples: n. num_correct: c of them. k: at most n.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(values: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer of a problem's samples is right; of several equally frequent, the share that is.

    Args:
        values: what was read from each sample; None does not vote. Numbers count as equal if their values are
        (`1,080` and `1080`, but not `3,4` and `34`).
        correct: whether each is right.
    """
    votes = Counter(key for value in values if (key := _number(value)) is not None)
    if not votes:
        return 0.0
    right = {_number(value) for value, is_right in zip(values, correct, strict=True) if is_right}
    most = max(votes.values())
    winners = [key for key, count in votes.items() if count == most]
    return sum(winner in right for winner in winners) / len(winners)


def _number(value: str | None) -> float | str | None:
    if value is None:
        return None
    try:
        return float(re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", value).rstrip(",").replace("$", ""))
    except ValueError:
        return value
