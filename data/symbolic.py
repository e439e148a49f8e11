"""Generated problems of symbolic manipulation: derivatives, products to expand, equations, formulas to simplify.

`data_path` says which: `derivative:level=2`, `expand+solve:level=1-3,size=500`. Without it there are all four tasks at
level 1. Level 0 is for small models. A problem has a solution in one to three lines, and the answer line of GSM8K with
a formula in place of the number. A hash of the numbers and the form of a problem decides its split, so a test problem
is never a training problem with its terms in another order. This file reads no data. Left out: grading
(`rewards/symbolic.py`), and the problems themselves (`symbolic_calculus.py`, `symbolic_algebra.py`).
"""

import random
from collections.abc import Sequence

from data import prompts
from data.options import span, split_path, whole
from data.problem import Problem, Task
from data.splits import by_hash
from data.symbolic_algebra import ALGEBRA
from data.symbolic_calculus import DERIVATIVES

TASK = Task(
    rewards=("symbolic.format", "symbolic.correctness"),
    correct="symbolic.correctness",
    format="symbolic.format",
    graders=("symbolic.correctness", "symbolic.last_line", "symbolic.same_text"),
    lenient="symbolic.last_line",
)
FORMS = {"derivative": DERIVATIVES, **ALGEBRA}
"""{task: {level: forms}}; each form is drawn equally often."""
SIZES = {"train": 2000, "validation": 200, "test": 500}
LEVELS = (0, 3)
IN_VAIN = 1000
"""Draws in a row that give nothing new, after which there is taken to be nothing new."""


def load(split: str, *, path: str | None = None, num_shots: int = 0, seed: int = 0) -> list[Problem]:
    """The problems of a split, without the exemplars. No question occurs twice.

    `info` has `task` (one of `FORMS`), `level` and `expression` (the formula that is asked about).

    Args:
      split: `train`, `validation` or `test`.
      path: `TASK+TASK:level=1-3,size=2000`. The size is that of the train split.
      num_shots: exemplars in each prompt, drawn from the train split and left out of it.
      seed: decides the train split and the exemplars. Validation and test have the same problems for every seed.

    Raises:
      ValueError: an option is unknown or out of range, or there are fewer problems than asked for.
    """
    names, options = split_path(path or "+".join(FORMS), ("level", "size"))
    tasks = names.split("+")
    for task in tasks:
        if task not in FORMS:
            raise ValueError(f"data_path: {task!r} is not one of {', '.join(FORMS)}; such as derivative:level=2")
    levels = span(options.get("level", "1"), "level", *LEVELS)
    size = whole(options.get("size", str(SIZES["train"])), "size", 1, 10**6)
    sizes = SIZES | {"train": size}

    def draw(part: str, seed: int) -> list[dict]:
        return _distinct(part, tasks, levels, sizes[part], seed)

    return prompts.completed(*prompts.with_shots(split, draw, num_shots, seed))


def split_of(key: str) -> str:
    """The split of a problem, decided by its form and its numbers: 80 % train, 5 % validation, 15 % test."""
    return by_hash(key, train=80, validation=5)


def _distinct(split: str, tasks: Sequence[str], levels: Sequence[int], size: int, seed: int) -> list[dict]:
    """`size` examples with different keys: dicts with question, solution, answer, task, level and expression."""
    rng = random.Random(f"symbolic {split} {seed}")
    examples: dict[str, dict] = {}
    in_vain = 0
    while len(examples) < size:
        task, level = rng.choice(tasks), rng.choice(levels)
        made = rng.choice(FORMS[task][level])(rng)
        in_vain += 1
        if made.key not in examples and split_of(made.key) == split:
            in_vain = 0
            question = made.question.format(made.expression)
            told = {"question": question, "solution": "\n".join(made.steps), "answer": made.answer}
            examples[made.key] = {**told, "task": task, "level": level, "expression": made.expression}
        if in_vain == IN_VAIN:
            asked = f"{'+'.join(tasks)}, level {levels[0]} to {levels[-1]}"
            raise ValueError(f"data_path: {asked} has about {len(examples)} {split} problems; size={size} is too many")
    return list(examples.values())
