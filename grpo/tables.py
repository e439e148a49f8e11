"""Functions that a run picks by name: the entry of a table, and the arguments that a function asks for by name.

So a new function of the algorithm is one entry of its table, and its constants are options of the same names. Left out:
the tables, which stand with their functions.
"""

from collections.abc import Callable, Container, Mapping
from functools import cache
from inspect import signature
from typing import Any, TypeVar

from grpo import options
from grpo.config import Config

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, option: str) -> T:
    """The entry of a table of known names, such as `LOSSES`, that is named by the value `name` of an option.

    Raises:
      ValueError: there is no such entry; the message gives the option, the known names and the nearest one.
    """
    if name not in table:
        hint = options.did_you_mean(name, table)
        raise ValueError(f"{option} is {name!r}: must be one of {', '.join(table)}{hint}")
    return table[name]


def constants(function: Callable, config: Config, kind: str = "loss", given: Container[str] = ()) -> dict[str, Any]:
    """The constants of a function of the algorithm, each with the value of the option of its name.

    Constants are its arguments that are keyword-only or have a default.

    Args:
      function: of `losses.py`, `advantages.py` or `corrections.py`.
      config: the run's.
      kind: the option that names the function, for the message.
      given: arguments that are no constants: the caller has them.

    Raises:
      ValueError: there is no such option. A default in the signature does not replace one: it could not be set.
    """
    parameters = signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    names = [name for name in names if name not in given]
    for name in names:
        if name not in vars(config):
            hint = options.did_you_mean(name, vars(config))
            raise ValueError(
                f"{kind} {function.__name__} has the constant {name}, but no option has that name: "
                f"add the field {name} to Config in grpo/config.py{hint}"
            )
    return {name: getattr(config, name) for name in names}


def asked(function: Callable, facts: Mapping[str, T]) -> dict[str, T]:
    """Those of `facts` that a function has as arguments, by name."""
    return {name: facts[name] for name in _arguments(function) if name in facts}


@cache
def _arguments(function: Callable) -> tuple[str, ...]:
    """The names of a function's arguments. Read once: every micro-batch asks for those of its weighting."""
    return tuple(signature(function).parameters)
