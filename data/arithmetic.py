"""Generated word problems in the form of GSM8K: a question, a solution step by step, and a number as the answer.

A problem has one or two steps, and every operand and result is a whole number from 2 to 50. A model of a million
parameters can work through the steps, but can hardly guess the result of two. The numbers alone decide the split of a
problem, so a test problem is never a training problem in other words. This file reads no data and grades nothing.
"""

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass

from data import prompts
from data.problem import Problem
from data.splits import by_hash

SIZES = {"train": 4000, "validation": 500, "test": 1000}
LARGEST = 50
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# fmt: off
NAMES = (
    "Ada", "Alan", "Bob", "Cara", "Dan", "Emma", "Finn", "Grace", "Hugo", "Ivy", "Jack", "Kate",
    "Leo", "Mia", "Nora", "Omar", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will",
)
THINGS = (
    "apples", "balls", "beads", "books", "cards", "coins", "cookies", "cups", "eggs", "flowers", "hats", "keys",
    "lemons", "marbles", "nuts", "pears", "pencils", "pens", "plums", "rocks", "shells", "stamps", "sweets", "toys",
)
# fmt: on


@dataclass(frozen=True)
class Form:
    """One wording of a problem. `{a} {b} {c}` are the operands, `{x} {y}` the results of the first and second step."""

    operators: str
    """One or two of `+ - * /`, applied from left to right: `*-` is `x = a * b`, then `y = x - c`."""
    question: str
    solution: str


# fmt: off
FORMS = (
    Form("+", "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
         "{name} now has {a} + {b} = {x} {things}."),
    Form("+", "There are {a} {things} in a box and {b} {things} in a bag. How many {things} are there in all?",
         "In all there are {a} + {b} = {x} {things}."),
    Form("-", "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
         "There are {a} - {b} = {x} {things} left."),
    Form("-", "{name} has {a} {things}. {other} has {b} fewer. How many {things} does {other} have?",
         "{other} has {a} - {b} = {x} {things}."),
    Form("*", "{name} buys {a} boxes with {b} {things} in each. How many {things} does {name} buy?",
         "{name} buys {a} * {b} = {x} {things}."),
    Form("*", "One shelf holds {a} {things}. How many {things} do {b} shelves hold?",
         "The shelves hold {a} * {b} = {x} {things}."),
    Form("/", "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
         "Each friend gets {a} / {b} = {x} {things}."),
    Form("/", "{name} packs {a} {things} into bags of {b}. How many bags does {name} need?",
         "{name} needs {a} / {b} = {x} bags."),
    Form("++", "{name} finds {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many {things} is that?",
         "By Tuesday {name} has {a} + {b} = {x} {things}.\nBy Friday {name} has {x} + {c} = {y} {things}."),
    Form("++", "{name} has {a} {things}, {other} has {b} and {third} has {c}. How many {things} do all three have?",
         "{name} and {other} have {a} + {b} = {x} {things}.\nWith {third} they have {x} + {c} = {y} {things}."),
    Form("+-", "{name} has {a} {things} and buys {b} more. Then {name} gives {other} {c}. How many {things} are left?",
         "After buying there are {a} + {b} = {x} {things}.\nAfter giving there are {x} - {c} = {y} {things}."),
    Form("+-", "{name} bakes {a} pies and {other} bakes {b}. They sell {c} of the pies. How many pies do they keep?",
         "They bake {a} + {b} = {x} pies.\nThey keep {x} - {c} = {y} pies."),
    Form("-+", "{name} had {a} {things}, lost {b} and then found {c}. How many {things} does {name} have now?",
         "After losing there are {a} - {b} = {x} {things}.\nNow {name} has {x} + {c} = {y} {things}."),
    Form("-+", "A bus carries {a} people. {b} get off and {c} get on. How many people are on the bus now?",
         "After the stop {a} - {b} = {x} people remain.\nNow there are {x} + {c} = {y} people."),
    Form("--", "{name} has {a} {things}. {name} gives {b} to {other} and {c} to {third}. How many {things} are left?",
         "After {other} there are {a} - {b} = {x} {things}.\nAfter {third} there are {x} - {c} = {y} {things}."),
    Form("--", "A book has {a} pages. {name} reads {b} pages on Monday and {c} on Tuesday. How many pages are left?",
         "After Monday {a} - {b} = {x} pages are left.\nAfter Tuesday {x} - {c} = {y} pages are left."),
    Form("*+", "{name} has {a} bags of {b} {things} and {c} more {things}. How many {things} does {name} have in all?",
         "The bags hold {a} * {b} = {x} {things}.\nIn all there are {x} + {c} = {y} {things}."),
    Form("*+", "{name} buys {a} {things} for {b} dollars each and a bag for {c} dollars. How many dollars is that?",
         "The {things} cost {a} * {b} = {x} dollars.\nIn all {name} spends {x} + {c} = {y} dollars."),
    Form("*-", "{name} buys {a} packs of {b} {things} and gives {other} {c}. How many {things} are left?",
         "The packs hold {a} * {b} = {x} {things}.\nThen {x} - {c} = {y} {things} are left."),
    Form("*-", "{name} works {a} hours for {b} dollars an hour and spends {c} dollars. How many dollars are left?",
         "{name} earns {a} * {b} = {x} dollars.\nThen {x} - {c} = {y} dollars are left."),
    Form("+/", "{name} has {a} {things} and {other} has {b}. {c} friends share them. How many does each get?",
         "Together they have {a} + {b} = {x} {things}.\nEach friend gets {x} / {c} = {y} {things}."),
    Form("+*", "Each day {name} makes {a} {things} and {other} makes {b}. How many {things} do they make in {c} days?",
         "In a day they make {a} + {b} = {x} {things}.\nIn {c} days they make {x} * {c} = {y} {things}."),
    Form("-/", "{name} has {a} {things}, keeps {b} and puts the rest in {c} equal piles. How many are in a pile?",
         "There are {a} - {b} = {x} {things} to pile.\nA pile has {x} / {c} = {y} {things}."),
    Form("/+", "{name} puts {a} {things} into {b} equal bags, then {c} more into one. How many are in it?",
         "First a bag holds {a} / {b} = {x} {things}.\nWith more it holds {x} + {c} = {y} {things}."),
)
# fmt: on


def load(split: str, *, path: str | None = None, num_shots: int = 0, seed: int = 0) -> list[Problem]:
    """The `SIZES[split]` problems of a split, without the exemplars. No question occurs twice.

    Args:
      split: `train`, `validation` or `test`.
      path: must be None, because this data set is generated.
      num_shots: exemplars in each prompt, drawn from the train split and left out of it.
      seed: decides the train split and the exemplars. Validation and test have the same problems for every seed.

    Raises:
      ValueError: there is a path, the split is unknown, or `num_shots` is out of range.
    """
    if path is not None:
        raise ValueError(f"data_path: {path!r} given, but the arithmetic problems are generated; leave it out")
    return prompts.completed(*prompts.with_shots(split, _distinct, num_shots, seed))


def stream(split: str, rng: random.Random) -> Iterator[dict]:
    """An endless stream of examples: dicts with `question`, `solution` and `answer`. Questions may repeat."""
    while True:
        form = rng.choice(FORMS)
        numbers = _draw_numbers(form.operators, rng)
        while not _in_range(numbers) or split_of(form.operators, numbers) != split:
            numbers = _draw_numbers(form.operators, rng)
        name, other, third = rng.sample(NAMES, 3)
        words = {"name": name, "other": other, "third": third, "things": rng.choice(THINGS), **numbers}
        yield {
            "question": form.question.format(**words),
            "solution": form.solution.format(**words),
            "answer": str(numbers["xy"[len(form.operators) - 1]]),
        }


def split_of(operators: str, numbers: dict[str, int]) -> str:
    """The split of a problem, decided by its numbers and not by its words: 80 % train, 5 % validation, 15 % test.

    `12 + 7` and `7 + 12` are the same problem, and so are `3 * 4 - 5` and `4 * 3 - 5`.
    """
    first, second = numbers["a"], numbers["b"]
    if operators[0] in "+*":
        first, second = sorted((first, second))
    key = f"{first} {operators[0]} {second} {operators[1:]} {numbers.get('c', '')}"
    return by_hash(key, train=80, validation=5)


def _distinct(split: str, seed: int) -> list[dict]:
    examples = {}
    for example in stream(split, random.Random(f"arithmetic {split} {seed}")):
        examples.setdefault(example["question"], example)
        if len(examples) == SIZES[split]:
            return list(examples.values())


def _draw_numbers(operators: str, rng: random.Random) -> dict[str, int]:
    """Draw operands and results; some may be out of range. The divisor is drawn first, so divisions are exact."""
    first, *rest = operators
    b = rng.randint(2, 9) if first in "*/" else rng.randint(2, LARGEST)
    if first == "/":
        a = b * rng.randint(2, 12)
    elif first == "*":
        a = rng.randint(2, 12)
    else:
        a = rng.randint(2, LARGEST)
    numbers = {"a": a, "b": b, "x": APPLY[first](a, b)}
    if rest:
        c = rng.randint(2, 9) if rest[0] in "*/" else rng.randint(2, LARGEST)
        if rest[0] == "/":  # the first step adds or subtracts: lower a until the division is exact
            numbers["a"] -= numbers["x"] % c
            numbers["x"] -= numbers["x"] % c
        numbers |= {"c": c, "y": APPLY[rest[0]](numbers["x"], c)}
    return numbers


def _in_range(numbers: dict[str, int]) -> bool:
    return all(2 <= number <= LARGEST for number in numbers.values())
