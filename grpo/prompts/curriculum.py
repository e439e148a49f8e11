"""Curriculum by pass rate: problems that the policy sometimes solves are drawn more often than the others.

The pass rate of a problem is the share of the completions of its last group that were right. It puts the problem into
one of three pools. What a step draws is a function of (seed, step, pass rates before the step), the same on all ranks.
There are no epochs. Left out: groups before the last one, since the policy has changed, and fading of old pass rates.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from grpo import distributed
from grpo.config import Config
from grpo.metrics import Sums
from rewards import full_value

HARD, EASY = 0.25, 0.75
"""Pass rates up to the first are hard, those above the second easy."""


def pools(pass_rates: Mapping[int, float], num_problems: int) -> np.ndarray:
    """[num_problems] int: 0 for hard problems, 1 for those in between or not drawn yet, 2 for easy ones.

    Args:
        pass_rates: {index of a problem: its pass rate}. Others are left out: the training set was larger before.
        num_problems: size of the training set.
    """
    found = np.ones(num_problems, dtype=int)
    for problem, rate in pass_rates.items():
        if problem < num_problems:
            found[problem] = int(rate > HARD) + int(rate > EASY)
    return found


def draw_by_pass_rate(
    pass_rates: Mapping[int, float],
    num_problems: int,
    weights: Sequence[float],
    prompts_per_step: int,
    seed: int,
    step: int,
    refill: int = 0,
) -> list[int]:
    """Choose the problems of a step or a refill, each next one with a probability in proportion to its weight.

    The pools and their weights are those of prime-rl's difficulty pools,
    https://github.com/PrimeIntellect-ai/prime-rl. All problems of a step and its refills are one draw without
    replacement: in the order of E / weight with E exponential (Efraimidis and Spirakis 2006,
    https://doi.org/10.1016/j.ipl.2005.11.003). So no problem is drawn twice in a step before all were drawn. Those of
    weight 0 come last.

    Args:
        pass_rates: {index of a problem: its pass rate}, before the step.
        num_problems: size of the training set.
        weights: of a problem in each of the three `pools`; not all 0.
        prompts_per_step: N.
        seed: seed of the run.
        step: counted from 1.
        refill: counted from 1; 0: the step's own prompts.

    Returns:
        N indices into the training set, in the order of the prompts of the step.
    """
    weight = np.asarray(weights, dtype=float)[pools(pass_rates, num_problems)]
    draws = np.random.default_rng([seed, step, 0, 2]).exponential(size=num_problems)  # no other draw has such a seed
    waits = np.divide(draws, weight, out=np.full(num_problems, np.inf), where=weight > 0)
    order = np.lexsort((draws, waits))
    places = np.arange(refill * prompts_per_step, (refill + 1) * prompts_per_step)
    return order[places % num_problems].tolist()


def needed(config: Config) -> float:
    """The value of the reward `eval_correct` from which a completion is right, as in an evaluation."""
    return full_value(config.eval_correct) if config.eval_threshold is None else config.eval_threshold


def shares(values: Tensor, needed: float, numbers: Sequence[int]) -> dict[int, float]:
    """The pass rate of each group of a step, on all ranks. A collective call.

    Args:
        values: [n,G] what `eval_correct` gave to this rank's groups; one that is not finite does not count.
        needed: a value that is right; a rounding error is no lack.
        numbers: n, of the groups in the step.

    Returns:
        {number: pass rate}, without groups in which nothing counts.
    """
    counts = values.isfinite()
    rates = ((values >= needed - 1e-6) & counts).sum(1).double() / counts.sum(1)
    here = [pair for pair in zip(numbers, rates.tolist(), strict=True) if not math.isnan(pair[1])]
    return dict(sorted(pair for rank in distributed.gather_objects(here) for pair in rank))


def count(pass_rates: Mapping[int, float], num_problems: int, sums: Sums) -> None:
    """Add the shares of hard and easy problems in the training set to a step's metrics."""
    found = pools(pass_rates, num_problems)
    sums.add("rollout/hard_problems", (found == 0).mean(), 1)
    sums.add("rollout/easy_problems", (found == 2).mean(), 1)
