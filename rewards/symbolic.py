"""The rewards of symbolic manipulation (`data/symbolic.py`): is the answer line of the right form, and right?

The right form is `#### The final answer is FORMULA`, as in GSM8K. Formulas are read by `formula.py` and compared by
`equality.py`, both bounded. What is asked decides what else must hold (`info["task"]`), so that the question itself, or
half of the work, earns nothing:

- `derivative`: nothing. A derivative that is not simplified is right.
- `expand`: a sum of different monomials.
- `simplify`: not longer than the gold answer (numbers, names and functions are counted).
- `solve`: all solutions, each a number (`4`, `x = 4`, `3/4`), with commas or `or` between them, in any order.
- Without a task: a number if the gold answer is one.

Left out: LaTeX (`boxed.py`).
"""

import re

from data.problem import Problem
from rewards.equality import equal
from rewards.formula import NoFormula, Tree, is_expanded, is_value, parse, size

WORDS = "The final answer is "
ANSWER_LINE = re.compile(rf"#### {WORDS}(.+)")
BETWEEN = re.compile(r",|;|\bor\b|\band\b")
MOST_SOLUTIONS = 8


def format(completion: str, problem: Problem) -> float:
    """0.5 if exactly one line reads `#### The final answer is FORMULA`, else 0. Spaces are ignored at its end."""
    lines = [match[1] for line in completion.split("\n") if (match := ANSWER_LINE.fullmatch(line.rstrip(" \t\r")))]
    return 0.5 if len(lines) == 1 and _trees(lines[0]) else 0.0


format.full_value = 0.5


def correctness(completion: str, problem: Problem) -> float:
    """1.0 if the last line that starts with `####` is equal to the gold answer and in the form asked for, else 0."""
    return _grade(_answer(completion), problem)


def last_line(completion: str, problem: Problem) -> float:
    """1.0 if what stands last in the last line, behind `is`, `:` or `=`, is right, else 0.

    This is the lenient form of `correctness`, in which the marker does not matter.
    """
    lines = [line.strip() for line in completion.split("\n") if line.strip()]
    if not lines:
        return 0.0
    pieces = re.split(r"####|\bis\b|:|=", lines[-1])
    return max(_grade(lines[-1], problem), _grade(pieces[-1], problem))


def same_text(completion: str, problem: Problem) -> float:
    """1.0 if `correctness` pays and the answer is written as in the data, spaces apart.

    This is the strict form of `correctness`: `3 + 2*x` is not `2*x + 3`.
    """
    same = _answer(completion).replace(" ", "") == problem.answer.replace(" ", "")
    return correctness(completion, problem) if same else 0.0


def _answer(completion: str) -> str:
    """What stands on the last line that starts with `####`; empty without one."""
    lines = [line for line in completion.split("\n") if line.startswith("####")]
    return lines[-1].removeprefix("####").strip().removeprefix(WORDS.strip()).strip() if lines else ""


def _grade(text: str, problem: Problem) -> float:
    answers, golds = _trees(text), _trees(problem.answer)
    if not answers or not golds or len(answers) != len(golds):
        return 0.0
    task = problem.info.get("task")
    if not all(_has_the_form(answer, gold, task) for answer, gold in zip(answers, golds, strict=True)):
        return 0.0
    for gold in golds:  # each takes the answer that is equal to it
        matched = next((place for place, answer in enumerate(answers) if equal(answer, gold)), None)
        if matched is None:
            return 0.0
        del answers[matched]
    return 1.0


def _has_the_form(answer: Tree, gold: Tree, task: str | None) -> bool:
    if task == "expand":
        return is_expanded(answer)
    if task == "simplify":
        return size(answer) <= size(gold)
    return is_value(answer) or not is_value(gold)


def _trees(text: str) -> list[Tree]:
    """The formulas of an answer, which are several for an equation of several solutions; empty if one is none."""
    text = text.strip().removesuffix(".").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    pieces = BETWEEN.split(text, maxsplit=MOST_SOLUTIONS)
    try:
        return [parse(re.sub(r"^\s*x\s*=(?!=)", "", piece)) for piece in pieces]
    except NoFormula:
        return []
