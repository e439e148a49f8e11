"""The problems of a step, in turn: each epoch is a random permutation of the training set.

They are a function of (seed, step), so a resumed run continues the same order without stored state. Left out:
preferring some problems to others (`curriculum.py`).
"""

import numpy as np


def draw_prompts(num_problems: int, prompts_per_step: int, seed: int, step: int, refill: int = 0) -> list[int]:
    """Choose the problems of a step, or those of a refill: prompts that are drawn in a step beside its own.

    Random permutations of the training set, one per epoch, are put end to end; each step takes the next N entries.
    Refills of a step take from a permutation of their own, in which the step's problems come last. So no problem is
    drawn twice in a step before all were drawn.

    Args:
        num_problems: size of the training set.
        prompts_per_step: N.
        seed: seed of the run.
        step: counted from 1.
        refill: counted from 1; 0: the step's own prompts.

    Returns:
        N indices into the training set, in the order of the prompts of the step.
    """
    stream = range((step - 1) * prompts_per_step, step * prompts_per_step)
    epochs = {place // num_problems for place in stream}
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(num_problems) for epoch in epochs}
    own = [int(order[place // num_problems][place % num_problems]) for place in stream]
    if refill == 0:
        return own
    others = np.random.default_rng([seed, step, 0, 1]).permutation(num_problems)  # no other draw has such a seed
    is_own = np.isin(others, own)
    others = np.concatenate([others[~is_own], others[is_own]])
    places = np.arange((refill - 1) * prompts_per_step, refill * prompts_per_step)
    return others[places % num_problems].tolist()
