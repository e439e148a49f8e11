"""The curriculum: pools by pass rate, draws in proportion to their weights, and pass rates from groups."""

from collections import Counter

import pytest
import torch

from grpo.metrics import Sums
from grpo.prompts.curriculum import count, draw_by_pass_rate, needed, pools, shares

RATES = {0: 0.0, 1: 0.25, 2: 0.26, 3: 0.75, 4: 0.76, 5: 1.0, 9: 0.5}
WEIGHTS = (0.2, 1.0, 0.5)


def draw(step: int, refill: int = 0, *, rates=RATES, problems: int = 8, weights=WEIGHTS, N: int = 3, seed: int = 0):
    return draw_by_pass_rate(rates, problems, weights, N, seed, step, refill)


def test_a_problem_is_hard_easy_or_in_between_by_its_last_pass_rate():
    assert pools(RATES, 8).tolist() == [0, 0, 1, 1, 2, 2, 1, 1]
    sums = Sums()
    count(RATES, 8, sums)
    assert sums.reduce() == {"rollout/hard_problems": 0.25, "rollout/easy_problems": 0.25}


def test_draws_are_in_proportion_to_the_weights_of_the_pools():
    """The first draw of a step: weights 0.2 0.2 1 1 0.5 0.5 1 1 of 5.4. The bound is five standard errors."""
    steps = 4000
    first = Counter(draw(step)[0] for step in range(1, steps + 1))
    for problem, weight in enumerate([0.2, 0.2, 1, 1, 0.5, 0.5, 1, 1]):
        share = weight / 5.4
        assert first[problem] / steps == pytest.approx(share, abs=5 * (share * (1 - share) / steps) ** 0.5)


def test_draws_are_a_function_of_seed_step_and_pass_rates():
    assert draw(1) == draw(1, rates=dict(reversed(RATES.items())))
    seen = {tuple(draw(step, seed=seed, problems=50, N=8)) for seed in (0, 1) for step in (1, 2, 3)}
    assert len(seen) == 6
    assert draw(1, problems=50, N=8) != draw(1, problems=50, N=8, rates=dict.fromkeys(range(25), 0.0))


def test_a_step_and_its_refills_draw_every_problem_once_and_those_of_weight_0_last():
    for step in range(1, 20):
        stream = [problem for refill in range(4) for problem in draw(step, refill, weights=(0.0, 1.0, 0.1))]
        assert sorted(stream[:8]) == list(range(8)) and set(stream[6:8]) == {0, 1}
        assert stream[8:] == stream[:4]
    assert len({tuple(draw(step, 2, weights=(0.0, 1.0, 0.1))[:2]) for step in range(1, 20)}) == 2  # in any order


def test_a_pass_rate_is_the_share_of_the_rewards_that_count():
    values = torch.tensor([[1.0, 0.5, 1 - 1e-7, 0.0], [torch.nan, 1.0, torch.nan, 0.0], [torch.nan] * 4])
    assert shares(values, 1.0, [4, 2, 7]) == {2: 0.5, 4: 0.5}
    assert list(shares(values, 1.0, [4, 2, 7])) == [2, 4]
    assert shares(values, 0.5, [0, 1, 2]) == {0: 0.75, 1: 0.5}
    assert shares(values[:0], 1.0, []) == {}


def test_what_is_right_is_what_an_evaluation_calls_right():
    class Options:
        eval_correct, eval_threshold = "gsm8k.format", None

    assert needed(Options) == 0.5
    Options.eval_threshold = 0.0
    assert needed(Options) == 0.0
