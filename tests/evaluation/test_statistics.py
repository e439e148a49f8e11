"""Intervals and tests against scipy, known values, enumeration and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap

from grpo.evaluation import statistics
from grpo.evaluation.statistics import majority, mcnemar, mean_interval, pass_at_k, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: four decimals.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),  # 2 * 1/2
        (0, 5, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (4, 4, 1.0),
        (3, 4, 1.0),  # 2 * 64/128
    ],
)
def test_mcnemar_by_hand(only_first, only_second, p_value):
    assert mcnemar(only_first, only_second) == pytest.approx(p_value, rel=1e-12)
    assert mcnemar(only_second, only_first) == mcnemar(only_first, only_second)


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (4, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, correct):
    samples = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_of_many_samples_is_finite():
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "correct", "expected"),
    [
        (["18"], [True], 1.0),
        (["7"], [False], 0.0),
        (["18", "18", "7"], [True, True, False], 1.0),
        (["7", "18", "7"], [False, True, False], 0.0),
        (["18", "7"], [True, False], 0.5),
        (["18", "7", "9"], [True, False, False], 1 / 3),
        (["18", "7", "18", "7", "9"], [True, False, True, False, False], 0.5),
        ([None, None, "18"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        (["7", "7", "1,080", "$1080", "1080.0"], [False, False, True, True, True], 1.0),
        (["18.", "18", "7", "7", "8"], [True, True, False, False, False], 0.5),
        (["1.2.3", "1.2.3", "18"], [False, False, True], 0.0),
        ([",", ",", "18"], [False, False, True], 0.0),
    ],
)
def test_majority(values, correct, expected):
    assert majority(values, correct) == pytest.approx(expected, abs=1e-15)


def test_c67_a_pair_does_not_vote_for_the_number_without_its_comma():
    """The kind is that of tests/rewards/test_gsm8k.py: `3,4` is not 34, while `1,080` is 1080 and `18,` is 18."""
    assert majority(["3,4", "34", "5", "5"], [False, True, False, False]) == 0.0
    assert majority(["1,080", "1080", "3", "18", "$18,"], [True, True, False, False, False]) == 0.5


def test_values_that_are_all_alike_have_the_interval_of_the_rule_of_three():
    assert mean_interval([0.0] * 100, 0, 1) == pytest.approx([0.0, 0.0295], abs=5e-5)  # 3 / n, nearly
    assert mean_interval([1.0] * 100, 0, 1) == pytest.approx([1 - 0.0295, 1.0], abs=5e-5)
    assert mean_interval([0.0] * 100, -1, 1) == pytest.approx([-0.0295, 0.0295], abs=5e-5)
    assert mean_interval([0.25], 0, 1) == pytest.approx([0.0125, 0.9625])
    unseen = 1 - 0.05 ** (1 / 20)
    assert (1 - unseen) ** 20 == pytest.approx(0.05)  # a share that 20 problems miss in 5 of 100 cases
    assert mean_interval([0.5] * 20, 0, 1)[1] == pytest.approx(0.5 + unseen / 2)


def test_mean_interval_is_the_percentile_bootstrap():
    values = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 60, p=[0.1, 0.6, 0.3])
    theirs = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(7)).confidence_interval
    assert mean_interval(values, -1, 1) == pytest.approx([theirs.low, theirs.high], abs=1 / 60)
    assert mean_interval(values, -1, 1) == mean_interval(list(values), -1, 1)  # the same every time
    # Half of 100 values are 1: the resampled mean is binomial, its quantiles known.
    quantiles = binom.ppf([0.025, 0.975], 100, 0.5) / 100
    assert mean_interval([1.0] * 50 + [0.0] * 50, 0, 1) == pytest.approx(quantiles, abs=0.011)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
def test_mean_interval_holds_the_mean_and_mirrors(quarters):
    values = np.array(quarters) / 4
    low, high = mean_interval(values, -1, 1)
    assert low <= values.mean() <= high
    assert len(set(quarters)) == 1 or values.min() <= low <= high <= values.max()
    mirrored = mean_interval(-values, -1, 1)
    assert mirrored == pytest.approx([-high, -low], abs=1e-12)


def test_an_interval_over_problems_is_honest_where_one_over_samples_is_not(monkeypatch):
    """Eight samples of a problem that are always alike say no more than one does."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    random = np.random.default_rng(3)
    clustered = pooled = 0
    for _ in range(300):
        rates = (random.random(60) < 0.4).astype(float)
        low, high = mean_interval(rates, 0, 1)
        clustered += low <= 0.4 <= high
        low, high = wilson(int(8 * rates.sum()), 8 * 60)
        pooled += low <= 0.4 <= high
    assert clustered / 300 > 0.9
    assert pooled / 300 < 0.7
