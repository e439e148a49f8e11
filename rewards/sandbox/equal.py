"""When an answer equals what is expected: texts that a program printed, and values that a function returned.

Left out: answers of which several are right, which need a checker of the data (`checker.accepts`).
"""

import math
import re
from decimal import Decimal, DecimalException
from typing import Any

NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]{1,9})?")
"""Possessive: nothing is tried twice, so a long row of digits takes linear time."""
CLOSE = 1e-6


def equal_texts(printed: bytes, expected: str) -> bool:
    """Whether the lines are equal, without spaces at the ends. Two words are equal too if both are the same number.

    The rule of LiveCodeBench, https://github.com/LiveCodeBench/LiveCodeBench. Order counts, and nothing may be missing
    or added.
    """
    try:
        mine, theirs = printed.decode().strip().split("\n"), expected.strip().split("\n")
    except UnicodeDecodeError:
        return False
    return len(mine) == len(theirs) and all(map(_equal_lines, mine, theirs))


def _equal_lines(mine: str, theirs: str) -> bool:
    if mine.strip() == theirs.strip():
        return True
    words, others = mine.split(), theirs.split()
    return len(words) == len(others) and all(map(_equal_words, words, others))


def _equal_words(mine: str, theirs: str) -> bool:
    if mine == theirs:
        return True
    if not (NUMBER.fullmatch(mine) and NUMBER.fullmatch(theirs)):
        return False
    try:
        return Decimal(mine) == Decimal(theirs)
    except DecimalException:
        return False


def equal_values(mine: Any, expected: Any) -> bool:
    """Whether two plain values are equal. A tuple equals a list, True is no 1, floats may differ by 1e-6.

    Args:
        mine: what came from the program, through `wire`.
        expected: from JSON. Where it is a whole number, no difference is allowed.
    """
    if isinstance(mine, list | tuple) and isinstance(expected, list | tuple):
        return len(mine) == len(expected) and all(map(equal_values, mine, expected))
    if isinstance(mine, dict) and isinstance(expected, dict):
        return mine.keys() == expected.keys() and all(equal_values(mine[key], expected[key]) for key in expected)
    if isinstance(mine, bool) or isinstance(expected, bool):
        return mine is expected
    if isinstance(mine, int | float) and isinstance(expected, float):
        try:
            return math.isclose(mine, expected, rel_tol=CLOSE, abs_tol=CLOSE)
        except OverflowError:
            return False
    return bool(mine == expected)
