"""Intervals and tests for accuracies: which differences are real, and which could be chance.

- A rate gets a Wilson interval.
- A difference between two models on the same problems gets a paired bootstrap and the exact McNemar test.
- Several samples of one problem are treated as a cluster.

These are pure functions of counts and arrays, with scipy's methods where it has them. Left out: which rates to compare
(`grading.py`).
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
        successes: 0..n.
        n: trials, at least 1.

    Returns:
        [low, high].
    """
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
    result = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0), batch=500
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact McNemar test of two models on the same problems.

    It counts the problems on which the models disagree. The p-value is the chance of a split at least this uneven if
    each model were equally likely to be the right one.

    Args:
        only_first, only_second: problems that only the first, or only the second, model has right.

    Returns:
        Two-sided p-value; 1 if the models never disagree.
    """
    disagreements = only_first + only_second
    return float(binomtest(only_first, disagreements, 0.5).pvalue) if disagreements else 1.0


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Chen et al., https://arxiv.org/abs/2107.03374, equation 1.

    Args:
        num_samples: n.
        num_correct: c, the right ones among them.
        k: at most n.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(values: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Majority vote: whether the most frequent answer among a problem's samples is right.

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
