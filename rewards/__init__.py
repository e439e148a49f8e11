"""Reward functions `(completion: str, problem: Problem) -> float`, one file per task. Imports neither torch nor grpo.

The name `gsm8k.format` means the function `format` of `rewards/gsm8k.py`. A new reward is a new public function in such
a file, or in any other file: `my/task.py:format`. It may have the form of TRL (`trl.py`). It may raise, hang or print,
because `rewards/runner.py` calls it in another process. A function that is private, imported, takes other arguments or
does not return a number is a helper and no reward.

A reward may ask for more by naming an argument of `TOLD`: `short(completion, problem, *, length, cap)`. Every other
argument needs a default.
"""

import ast
import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

TOLD = ("tokens", "length", "cap", "finished", "whole", "chat", "log_metric")
"""What a reward may ask for by the name of an argument:

- tokens: list of int, the sampled token ids, with the one that ended the completion;
- length: int, their number;
- cap: int, the most tokens that there may be (`max_new_tokens`);
- finished: bool, whether the completion ended by itself, with EOS or a stop string;
- whole: str, the completion with its reasoning, which `completion` lacks under the option `reasoning_end`;
- chat: bool, whether the prompt went through a chat template;
- log_metric: function (name, number), which reports a number beside the reward. Its mean over the samples of a step is
  the metric `reward_metrics/NAME` of a run. Evaluations leave it out.
"""
OF_TEXT = ("whole", "chat", "log_metric")
"""Those that are known of any text, however it was made."""
NOT_REWARDS = {"__init__", "equality", "formula", "runner", "score_gym", "trl", "verify_math", "worker"}
NUMBERS = {"float", "int", "bool", "None", "Optional", "Union", "Any", "SupportsFloat", "Real", "Number", "np", "numpy"}
NUMBERS |= {"typing", "numbers", "float32", "float64", "Decimal", "decimal", "Fraction", "fractions", "Literal"}
"""Words of an annotation that may be a number's."""


def load(name: str) -> Callable:
    """The reward function called `file.function`, or `path/file.py:function` for a file outside of this package.

    Raises:
      ValueError: there is no such file or function (the known ones are listed), it is a helper, or the file cannot be
        imported.
    """
    from rewards.trl import adapted, is_trl  # here: another `data` than ours is for grpo/__init__.py to name

    module, path, function = _place(name)
    reward = getattr(module, function, None)
    if not callable(reward) or isinstance(reward, type) or function.startswith("_"):
        known = _known(name)
        known_names = ", ".join(known) or "its rewards: it has none"
        raise ValueError(f"rewards: {name!r} is not one of {known_names}{_hint(name, known)}")
    trl = is_trl(reward) and not inspect.iscoroutinefunction(reward)
    reason = "" if trl else _why_a_helper(reward)
    if function in _imported(path):
        reason = f"{name.rpartition(':')[0] or f'rewards/{path.name}'} only imports it"
    if reason:
        raise ValueError(
            f"rewards: {name!r} is a helper, not a reward ({reason}): a reward is a function (completion, "
            f"problem) -> float, such as {', '.join(_known())}"
        )
    return adapted(reward) if trl else reward


def label(name: str) -> str:
    """What a reward is called in metrics and transcripts: `file.function`, wherever the file is."""
    place, _, function = name.rpartition(":")
    return f"{Path(place).stem}.{function}" if place else name


def module_of(name: str) -> str:
    """The name, in `sys.modules`, of the module that has this reward."""
    return _place(name)[0].__name__


def after_reasoning(completion: str, end: str | None) -> str:
    """What stands behind the last `end`, such as `</think>`; all of it if there is none."""
    return completion.rpartition(end)[2] if end else completion


def asks_for(reward: Callable) -> tuple[str, ...]:
    """The names of `TOLD` that a reward asks for beside completion and problem."""
    try:
        parameters = list(inspect.signature(reward).parameters.values())[2:]
    except (TypeError, ValueError):  # of something that is not written in Python
        return ()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.name in TOLD and p.kind in named)


def files_of(names: Sequence[str]) -> list[ModuleType]:
    """The files of reward functions that were loaded, each once. A file may state three things beside its rewards.

    - `LEAST_SECONDS`: a call may take so long, even if `reward_timeout` is less. For rewards with limits of their own.
    - `prepare()`: is called once in each worker before its first call. It may refuse the machine with a ValueError, and
      it returns what the run notes in its environment.json: {name: text}.
    - `sample(problem)`: a right answer, as text in the form that the file reads, for the doctor to try.
    """
    return list(dict.fromkeys(_place(name)[0] for name in names))


def full_value(name: str) -> float:
    """What a reward gives to an answer that is wholly right: its attribute `full_value`, 1 where it has none.

    Raises:
      ValueError: what `load` raises, or the attribute is no finite number.
    """
    value = getattr(load(name), "full_value", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"rewards: full_value of {name!r} is {value!r}: must be a finite number")
    return float(value)


def _place(name: str) -> tuple[ModuleType, Path, str]:
    """The module of a reward, its file, and the name of the function."""
    place, _, function = name.rpartition(":")
    if place:
        from data.outside import import_file  # here, as above

        return import_file(place, "rewards"), Path(place).expanduser(), function
    stem, _, function = name.partition(".")
    path = next((path for path in _files() if path.stem == stem), None)
    if path is None:
        known = _known()
        raise ValueError(f"rewards: {name!r} is not one of {', '.join(known)}{_hint(name, known)}")
    try:
        return importlib.import_module(f"rewards.{stem}"), path, function
    except Exception as error:  # importing a user's file may raise anything
        message = f"rewards: {name!r}: rewards/{stem}.py cannot be imported ({type(error).__name__}: {error})"
        raise ValueError(message) from error


def _hint(name: str, known: list[str]) -> str:
    from data.options import did_you_mean  # here, as above

    return did_you_mean(name, known)


def _known(beside: str = "") -> list[str]:
    """Every reward of every file or, for a name with a path, of that file. The files are read, not run."""
    place = beside.rpartition(":")[0]
    names = []
    for file in [Path(place).expanduser()] if place else _files():
        functions = [node for node in _body(file) if isinstance(node, ast.FunctionDef)]
        before = f"{place}:" if place else f"{file.stem}."
        names += [f"{before}{node.name}" for node in functions if _looks_like_a_reward(node)]
    return names


def _looks_like_a_reward(node: ast.FunctionDef) -> bool:
    arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    if "completions" in (*arguments, *(argument.arg for argument in node.args.kwonlyargs)):  # the form of TRL
        return not node.name.startswith("_")
    required = arguments[: len(arguments) - len(node.args.defaults)]
    needed = len([name for i, name in enumerate(required) if i < 2 or name not in TOLD])
    untold = [a.arg for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if default is None]
    named = arguments[:1] == ["completion"] or arguments[1:2] == ["problem"]
    annotated = [ast.unparse(argument.annotation or ast.Name("")) for argument in node.args.args]
    takes = (needed <= 2 <= len(arguments) and (named or "Problem" in annotated)) or node.args.vararg is not None
    takes = takes and set(untold) <= set(TOLD)
    return takes and _is_number(ast.unparse(node.returns or ast.Name(""))) and not node.name.startswith("_")


def _why_a_helper(function: Callable) -> str:
    """What tells a function from a reward, in words; empty if it may be one."""
    if inspect.iscoroutinefunction(function):
        return "it is async"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of something that is not written in Python
        return ""
    try:
        signature.bind("completion", "problem", **dict.fromkeys(asks_for(function)))
    except TypeError:
        names = list(signature.parameters)
        more = f"; beside the first two it may ask for {', '.join(TOLD)}" if len(names) > 2 else ""
        return f"its arguments are {', '.join(names) or 'none'}{more}"
    if signature.return_annotation is inspect.Signature.empty:
        return ""
    returns = inspect.formatannotation(signature.return_annotation)
    return "" if _is_number(returns) else f"it returns {returns}"


def _is_number(annotation: str) -> bool:
    return set(re.findall(r"[^\W\d]\w*", annotation)) <= NUMBERS and annotation != "None"


def _imported(path: Path) -> set[str]:
    """The names that a file has from elsewhere."""
    imports = [node for node in _body(path) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _body(file: Path) -> list[ast.stmt]:
    try:
        return ast.parse(file.read_bytes()).body
    except SyntaxError:
        return []  # it has no functions yet, and who asks for one of its own gets the error in full


def _files() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_REWARDS)
