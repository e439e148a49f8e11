"""Generated tasks of one line of Python: the words for a calculation, and the expression that does it.

    def f(x, y):
        "Take x minus y, then multiply by 7."
        return (x - y) * 7

A model of a million parameters can learn the words and the operators; whether it writes the parentheses decides. The
calculation alone decides the split of a task, so a test task is never a training task in other words. This file reads
no data and grades nothing: `rewards/code.py` calls the function.
"""

import random
from collections.abc import Iterator

from data import code, prompts
from data.problem import Problem
from data.splits import by_hash

TASK = code.TASK
SIZES = {"train": 2000, "validation": 300, "test": 500}
STOP = ["\n"]
"""The expression is one line."""
NAMES = ("x", "y")
OPERANDS = (*NAMES, *map(str, range(2, 10)))
CALLS = 6
"""Calls of the function that decide whether a program is right."""
FIRST = {"+": ("{} plus {}", "the sum of {} and {}"), "-": ("{} minus {}",), "*": ("{} times {}",)}
THEN = {
    "+": ("add {}", "increase it by {}"),
    "-": ("subtract {}", "take away {}"),
    "*": ("multiply by {}", "multiply it by {}"),
}
"""Words for the first operation, and for each one after it."""

Calculation = tuple[tuple[str, str, str], tuple[tuple[str, str], ...]]
"""((left, operator, right), ((operator, operand), ...)): the first operation, and those on its result."""


def load(split: str, *, path: str | None = None, num_shots: int = 0, seed: int = 0) -> list[Problem]:
    """The `SIZES[split]` tasks of a split, without the exemplars. No sentence occurs twice.

    Args:
      split: `train`, `validation` or `test`.
      path: must be None, because this data set is generated.
      num_shots: exemplars in each prompt, drawn from the train split and left out of it.
      seed: decides the train split and the exemplars. Validation and test have the same tasks for every seed.

    Raises:
      ValueError: there is a path, the split is unknown, or `num_shots` is out of range.
    """
    if path is not None:
        raise ValueError(f"data_path: {path!r} given, but the programs are generated; leave it out")
    examples, shots = prompts.with_shots(split, _distinct, num_shots, seed)
    shown = "".join(f"{ask(shot['question'])}{shot['answer']}\n\n" for shot in shots)
    return [
        Problem(
            prompt=shown + ask(example["question"]),
            answer=example["answer"],
            info={
                "question": example["question"],
                "shots": shots,
                "stop": STOP,
                "form": "continue",
                "prefix": ask(example["question"]),
                "tests": {"kind": "call", "entry_point": "f", "cases": example["cases"]},
            },
        )
        for example in examples
    ]


def ask(sentence: str) -> str:
    """The task in the prompt's form. It ends without a space, since the first token of an expression has one."""
    return f'def f(x, y):\n    """{sentence}"""\n    return'


def expression(calculation: Calculation, parentheses: bool = True) -> str:
    """The calculation in Python.

    Args:
      calculation: what to do, step by step.
      parentheses: False leaves all of them out, which is wrong where a sum is multiplied.
    """
    (left, sign, right), rest = calculation
    text, sums = f"{left} {sign} {right}", sign != "*"
    for sign, operand in rest:
        text = f"({text})" if parentheses and sums and sign == "*" else text
        text, sums = f"{text} {sign} {operand}", sign != "*"
    return text


def value(calculation: Calculation, x: int, y: int) -> int:
    """The result for these arguments, step by step and not by evaluating an expression."""
    known = {"x": x, "y": y}

    def apply(left: int, sign: str, right: str) -> int:
        operand = known.get(right) if right in known else int(right)
        return left + operand if sign == "+" else left - operand if sign == "-" else left * operand

    (left, sign, right), rest = calculation
    result = apply(known[left], sign, right)
    for sign, operand in rest:
        result = apply(result, sign, operand)
    return result


def stream(split: str, rng: random.Random) -> Iterator[dict]:
    """An endless stream of examples: `question`, `solution` and `answer`, `calculation`, `cases`. They may repeat."""
    while True:
        calculation = draw(rng)
        if split_of(calculation) != split:
            continue
        answer = f" {expression(calculation)}"
        places = [[rng.randint(-9, 9), rng.randint(-9, 9)] for _ in range(CALLS)]
        cases = [{"args": place, "result": value(calculation, *place)} for place in places]
        question = sentence(calculation, rng)
        yield {"question": question, "solution": "", "answer": answer, "calculation": calculation, "cases": cases}


def draw(rng: random.Random) -> Calculation:
    """A calculation of one to three operations, the first one on a variable. Half of them need parentheses."""
    left, right = rng.choice(NAMES), rng.choice(OPERANDS)
    while right == left:
        right = rng.choice(OPERANDS)
    first = left, rng.choice("++--*"), right
    rest = [(rng.choice("+-**"), rng.choice(OPERANDS)) for _ in range(rng.choices((0, 1, 2), (1, 4, 4))[0])]
    return first, tuple(rest)


def sentence(calculation: Calculation, rng: random.Random) -> str:
    """The calculation in words, such as `Take x minus y, then multiply by 7.`"""
    (left, sign, right), rest = calculation
    parts = [f"Take {rng.choice(FIRST[sign]).format(left, right)}"]
    parts += [f"then {rng.choice(THEN[sign]).format(operand)}" for sign, operand in rest]
    return ", ".join(parts) + "."


def split_of(calculation: Calculation) -> str:
    """The split of a task, decided by its calculation and not by its words: 70 % train, 10 % validation, 20 % test.

    `x + 3` and `3 + x` are the same calculation.
    """
    (left, sign, right), rest = calculation
    if sign in "+*":
        left, right = sorted((left, right))
    key = expression(((left, sign, right), rest))
    return by_hash(key, train=70, validation=10)


def _distinct(split: str, seed: int) -> list[dict]:
    examples = {}
    for example in stream(split, random.Random(f"programs {split} {seed}")):
        examples.setdefault(example["question"], example)
        if len(examples) == SIZES[split]:
            return list(examples.values())
