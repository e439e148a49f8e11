"""Intervals and tests for accuracies: which differences are real, and which could be chance.

These are pure functions of counts and arrays, with scipy's methods where it has them. Left out: which rates to compare
(`grading.py`).
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap

from rewards.gsm8k import one_number

RESAMPLES = 9999


def wilson(successes: int, n: int) -> list[float]:
    """The Wilson score interval [low, high] of a rate at 95 %, for 0..n successes in n >= 1 trials."""
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def mean_interval(per_problem: Sequence[float] | np.ndarray, lowest: float, highest: float) -> list[float]:
    """The bootstrap interval (percentile, 95 %) of a mean over problems. Whole problems are resampled.

    If all values are equal, the bootstrap interval has no width, and the rule of three takes its place. A kind of
    problem that makes up a share of 1 - 0.05^(1/n) of all problems is missing among n of them with a chance of 5 %. So
    an unseen share of this size could have the lowest or the highest value.

    Args:
        per_problem: n numbers, one per problem: a paired difference, or a rate over the samples of the problem.
        lowest, highest: the bounds of such a number.

    Returns:
        [low, high]; deterministic.
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if (values == values[0]).all():
        unseen = 1 - 0.05 ** (1 / len(values))
        return [float((1 - unseen) * values[0] + unseen * bound) for bound in (lowest, highest)]
    asked = {"n_resamples": RESAMPLES, "method": "percentile", "batch": 500}
    interval = bootstrap((values,), np.mean, rng=np.random.default_rng(0), **asked).confidence_interval
    return [float(interval.low), float(interval.high)]


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact McNemar test of two models on the same problems.

    Args:
        only_first, only_second: problems that only the first, or only the second, model has right.

    Returns:
        The two-sided p-value: the chance of a split at least this uneven if each model were equally likely to be the
        right one. It is 1 if the models never disagree.
    """
    disagreements = only_first + only_second
    return float(binomtest(only_first, disagreements, 0.5).pvalue) if disagreements else 1.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Here n are the samples, at least k, and c the right ones among them (https://arxiv.org/abs/2107.03374, equation 1).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(values: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Majority vote: the share of the most frequent answers among a problem's samples that is right.

    Args:
        values: what was read from each sample; None does not vote. Numbers count as equal if their values are
            (`1,080` and `1080`, but not `3,4` and `34`).
        correct: whether each is right.
    """
    keys = [_number(value) for value in values]
    votes = Counter(key for key in keys if key is not None)
    right = {key for key, is_right in zip(keys, correct, strict=True) if is_right}
    if not votes:
        return 0.0
    winners = [key for key, count in votes.items() if count == max(votes.values())]
    return sum(winner in right for winner in winners) / len(winners)


def _number(value: str | None) -> float | str | None:
    """The value of a text that is a number, else the text."""
    number = None if value is None else one_number(value.rstrip(","))
    return value if number is None else number
