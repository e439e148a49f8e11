"""The scorers of Reasoning Gym. Loaded in the sandbox alone (`gym.py`), since several of them execute the answer.

Left out: what an answer may contain, and what a score is worth.
"""

import ast
import contextlib
import copy

import reasoning_gym
from reasoning_gym.factory import DATASETS

from rewards.gym import ALLOWED

_made: dict[str, object] = {}


def warm() -> None:
    """Make every task once, while its files can be opened, and let the scorers that need sympy load all of it."""
    for name in DATASETS:
        with contextlib.suppress(Exception):  # `composite` has no task without options
            _made[name] = reasoning_gym.create_dataset(name, seed=0, size=1)
        if name in ALLOWED:
            entry = _made[name][0]
            _made[name].score_answer(entry["answer"], entry)


def score(task: str, options: dict, entry: str, answer: str) -> float:
    """What the scorer of a task gives to an answer."""
    dataset = copy.copy(_made[task])
    dataset.config = DATASETS[task][1](**options, seed=0, size=1)
    return float(dataset.score_answer(answer, ast.literal_eval(entry)))
