"""Reward functions `(completion: str, problem: Problem) -> float`, one file per task. Imports neither torch nor grpo.

The name `gsm8k.format` means the function `format` of `rewards/gsm8k.py`. A new reward is a new public function in such
a file. It may raise, hang or print, because `rewards/runner.py` calls it in another process.
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

NOT_REWARDS = {"__init__", "runner", "worker"}


def load(name: str) -> Callable:
    """The reward function called `file.function`.

    Raises:
      ValueError: there is no such file or function (the message lists the known ones), or importing the file fails.
    """
    file, _, function = name.partition(".")
    if file in (path.stem for path in _files()):
        try:
            module = importlib.import_module(f"rewards.{file}")
        except Exception as error:  # importing a user's file may raise anything
            message = f"rewards: {name!r}: rewards/{file}.py cannot be imported ({type(error).__name__}: {error})"
            raise ValueError(message) from error
        reward = getattr(module, function, None)
        if callable(reward) and not isinstance(reward, type) and not function.startswith("_"):
            return reward
    raise ValueError(f"rewards: {name!r} is not one of {', '.join(_known())}")


def _known() -> list[str]:
    """The names of all public functions in all reward files. The files are parsed, not run."""
    names = []
    for file in _files():
        try:
            body = ast.parse(file.read_bytes()).body
        except SyntaxError:
            continue  # loading a function of this file shows the full error
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
        names += [f"{file.stem}.{function}" for function in functions if not function.startswith("_")]
    return names


def _files() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_REWARDS)
