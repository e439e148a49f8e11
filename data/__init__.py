"""Data sets. `data.load(name, split)` calls the function `load` of `data/<name>.py`; a new data set is a new such file.

The file may also lie elsewhere, and then its path is the name: `my/task.py`. The function is
`load(split, *, path, num_shots, seed) -> list[Problem]`, and may ask for more options by naming them as arguments. The
file may also state a `TASK`: by what its answers are rewarded and graded. Left out: shuffling and tokenizing. Nothing
here imports torch or grpo.
"""

import importlib
import inspect
import os
import pkgutil
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType

from data import prompts
from data.options import did_you_mean
from data.outside import import_file
from data.problem import Problem, Task
from data.splits import SPLITS

NOT_DATA_SETS = {"boxes", "check", "code_formats", "code_tests", "options", "outside", "problem", "prompts", "rows"}
NOT_DATA_SETS |= {"splits", "symbolic_algebra", "symbolic_calculus"}


def load(
    name: str,
    split: str,
    *,
    path: str | os.PathLike | None = None,
    num_shots: int = 0,
    seed: int = 0,
    system_prompt: str | None = None,
    prompt_template: str | None = None,
    **options: str | None,
) -> list[Problem]:
    """The problems of one split of a data set. Their order depends only on the arguments.

    Args:
      name: a file of this package, e.g. `gsm8k`, or the path of another: `my/task.py`.
      split: `train`, `validation` or `test`.
      path: where the files of the data set are; None: its own source (the hub, or it is generated).
      num_shots: exemplars in each prompt. All splits of one seed have the same exemplars.
      seed: decides the exemplars and which problems are held out for validation.
      system_prompt, prompt_template: see `prompts.framed`; None: as the data set makes its prompts.
      options: what only some data sets ask for by name, such as `answer_column`; None: not given.

    Raises:
      ValueError: the name or split is unknown, the data cannot be read, an exemplar leaks, the split is empty, or an
        option is given that the data set does not ask for.
    """
    known = _known()
    if name not in known and not name.endswith(".py"):
        hint = did_you_mean(name, known)
        raise ValueError(f"data: {name!r} is not one of {', '.join(known)}, nor the path of a .py file{hint}")
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if not isinstance(path, str | os.PathLike | None):
        raise ValueError(f"data_path: {path!r} is no path")
    path = None if path is None else os.fspath(path)
    if not isinstance(num_shots, int) or num_shots < 0:
        raise ValueError(f"num_shots: {num_shots!r} must be a whole number >= 0")
    try:
        module = _module(name)
        if not hasattr(module, "load"):
            raise ValueError(f"data: {name} has no function load(split, *, path, num_shots, seed)")
        function = module.load
        asked = _asked(function, name, options)
        problems = function(split, path=path, num_shots=num_shots, seed=seed, **asked)
    except (ValueError, OSError):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        raise ValueError(f"data: {name!r} failed ({where}: {type(error).__name__}: {error})") from error
    if not isinstance(problems, list) or not all(map(_is_problem, problems)):
        raise ValueError(f"data: {name!r} must return a list of Problem with text prompt, text answer and dict info")
    if not problems:
        raise ValueError(f"data: {name!r} (data_path: {path}) has no {split} problems")
    if system_prompt is None and prompt_template is None:
        return problems
    return prompts.framed(problems, system_prompt, prompt_template)


def _asked(function: Callable, name: str, options: Mapping[str, str | None]) -> dict[str, str | None]:
    """The options that a data set asks for; ValueError for another one that is given."""
    known = inspect.signature(function).parameters
    for option, value in options.items():
        if value is not None and option not in known:
            raise ValueError(f"{option} is {value!r}: must be left out, since data {name!r} does not ask for it")
    return {option: value for option, value in options.items() if option in known}


def task(name: str) -> Task:
    """By what the answers to a data set are rewarded and graded: the `TASK` of its file, or that of GSM8K.

    An unknown file, or one that cannot be imported, has the second one. `load` says what is wrong with it.
    """
    try:
        return getattr(_module(name), "TASK", Task())
    except Exception:  # importing a user's file may raise anything
        return Task()


def _module(name: str) -> ModuleType:
    return import_file(name, "data") if name.endswith(".py") else importlib.import_module(f"data.{name}")


def _known() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_DATA_SETS)


def _is_problem(item: object) -> bool:
    texts = isinstance(item, Problem) and isinstance(item.prompt, str) and isinstance(item.answer, str)
    return texts and isinstance(item.info, dict)
