"""Reward functions in the form of TRL: `(prompts, completions, **columns) -> list`, used as they are.

The form is that of https://huggingface.co/docs/trl/main/en/grpo_trainer#using-a-custom-reward-function. A function has
it if one of its arguments is called `completions`. Differences from TRL:

- It is called with lists of one, so that a call that fails costs one sample. One that compares a batch learns nothing.
- `completion_ids` and `log_metric` are given only if they are named, and `trainer_state` and the like never.
- Where all rewards of a sample return None, the sample is invalid. There it would count as 0.
"""

import inspect
from collections.abc import Callable
from functools import update_wrapper

from data.problem import Problem
from data.prompts import turns_of

DOES_NOT_APPLY = object()
"""What a reward returns for a sample that it has nothing to say about: the sum of the others is the sample's reward."""


def is_trl(function: Callable) -> bool:
    """Whether a function has the form of TRL."""
    try:
        return "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of something that is not written in Python
        return False


def adapted(function: Callable) -> Callable:
    """The same function in the form of this package.

    It gets the whole completion, its reasoning included. Under `chat` prompt and completion are lists of turns, and
    texts otherwise. `answer` and the entries of `Problem.info` are its columns. None means `DOES_NOT_APPLY`.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def reward(completion: str, problem: Problem, *, whole: str, chat: bool, tokens=None, log_metric=None):
        prompt, said = problem.prompt, whole
        if chat:
            prompt, said = turns_of(problem), [{"role": "assistant", "content": whole}]
        known = {**problem.info, "answer": problem.answer, "prompts": prompt, "completions": said}
        given = {name: [value] for name, value in known.items() if takes_all or name in parameters}
        if tokens is not None:
            given["completion_ids"] = [tokens]
        if log_metric is not None:
            given["log_metric"] = log_metric
        values = list(function(**given))
        if len(values) != 1:
            raise ValueError(f"returned {len(values)} values for 1 completion")
        return DOES_NOT_APPLY if values[0] is None else values[0]

    signature = inspect.signature(reward)
    theirs = {"tokens": "completion_ids", "log_metric": "log_metric"}
    asked = [p for p in signature.parameters.values() if p.name not in theirs or theirs[p.name] in parameters]
    update_wrapper(reward, function)
    reward.__signature__ = signature.replace(parameters=asked)
    return reward
