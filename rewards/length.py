"""Penalties for how a completion is written: too long, never ended, or repeating itself. Each lies between -1 and 0.

They judge the sampled tokens and not the answer, so they are summed with a reward that does. Left out: penalties that
depend on whether the answer is right, and those that compare a completion with the others of its group.
"""

from collections.abc import Sequence

from data.problem import Problem


def soft_overlong(completion: str, problem: Problem, *, length: int, cap: int, cache: int = 128) -> float:
    """0 up to `cap - cache` tokens, then falling linearly to -1 at `cap`.

    DAPO, https://arxiv.org/abs/2503.14476 eq. 13. Where the cap is below the cache, the cache is the whole cap.
    """
    cache = min(cache, cap)
    return min(0.0, max(-1.0, (cap - cache - length) / cache))


soft_overlong.full_value = 0.0


def stop_properly(completion: str, problem: Problem, *, finished: bool) -> float:
    """-1 if the completion was cut at the cap, 0 if it ended by itself, with EOS or a stop string.

    ProRL, https://arxiv.org/abs/2505.24864, scales the whole reward of such a completion down. A sum can not do that.
    """
    return 0.0 if finished else -1.0


stop_properly.full_value = 0.0


def repetition(completion: str, problem: Problem, *, tokens: Sequence[int], n: int = 3) -> float:
    """Minus the share of n-grams of tokens that were there before: 0 if all are different, towards -1 for a loop.

    The penalty of https://arxiv.org/abs/2502.03373 and TRL, which take words in place of tokens.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


repetition.full_value = 0.0
