"""Whether two formulas are equal, exactly and in bounded time.

- Of `+ - * /` and whole powers alone: both become a quotient of polynomials over Fractions, in normal form. This is a
  proof.
- With functions, `pi`, `e` or other powers: both are computed to 300 digits at random points with positive x and y,
  where the gold is real. No value on the way may be tiny or huge, so a small term such as `exp(-500)` can not hide.
  The points follow from the two formulas, so that a verdict never changes.

What is beyond the bounds is not equal. Left out: conditions, such as x != 1 after a division by x - 1.
"""

import functools
import hashlib
import random
from fractions import Fraction

from rewards.formula import NAMES, Tree

MOST_PRODUCTS = 1000
"""Of terms, when two polynomials are multiplied."""
LARGEST_POWER = 32
MOST_BITS = 4096
"""Of the numerator and of the denominator of a coefficient."""
POINTS, TRIES = 4, 12
DIGITS = 300
NOTHING, SMALLEST, LARGEST = 1e-200, 1e-60, 1e60
"""A value below NOTHING is a zero with its rounding error. The others must lie between SMALLEST and LARGEST."""
SAME = 1e-150
"""Relative difference of equal values."""

Polynomial = dict[tuple[int, int], Fraction]
"""{(power of x, power of y): coefficient}, without zeros."""
ONE: Polynomial = {(0, 0): Fraction(1)}


class Beyond(ValueError):
    """The formula has no value there, or one beyond the bounds."""


def equal(answer: Tree, gold: Tree) -> bool:
    """Whether two formulas are the same function of x and y."""
    try:
        if _is_rational(answer) and _is_rational(gold):
            (above, below), (gold_above, gold_below) = _quotient(answer), _quotient(gold)
            return _times(above, gold_below) == _times(gold_above, below)
        return _equal_at_points(answer, gold)
    except Beyond:
        return False


def _is_rational(tree: Tree) -> bool:
    kind, *parts = tree
    if kind == "^":
        return _is_rational(parts[0]) and _whole(parts[1]) is not None
    return kind == "number" or parts[0] in ("x", "y") or (kind in "+-*/" and all(map(_is_rational, parts)))


def _whole(tree: Tree) -> int | None:
    """The whole number that an exponent is; None for any other."""
    sign, number = (-1, tree[1]) if tree[0] == "-" else (1, tree)
    return sign * int(number[1]) if number[0] == "number" and number[1].denominator == 1 else None


def _quotient(tree: Tree) -> tuple[Polynomial, Polynomial]:
    """Numerator and denominator; the second is never zero."""
    kind, *parts = tree
    if kind == "number":
        return {(0, 0): parts[0]} if parts[0] else {}, ONE
    if kind == "name":
        return {(int(parts[0] == "x"), int(parts[0] == "y")): Fraction(1)}, ONE
    above, below = _quotient(parts[0])
    if kind == "-":
        return _times(above, {(0, 0): Fraction(-1)}), below
    if kind == "^":
        power = _whole(parts[1])
        return _to_the(*((above, below) if power >= 0 else _turned(above, below)), abs(power))
    other_above, other_below = _quotient(parts[1])
    if kind == "+":
        return _plus(_times(above, other_below), _times(other_above, below)), _times(below, other_below)
    if kind == "/":
        other_above, other_below = _turned(other_above, other_below)
    return _times(above, other_above), _times(below, other_below)


def _turned(above: Polynomial, below: Polynomial) -> tuple[Polynomial, Polynomial]:
    if not above:
        raise Beyond("a division by zero")
    return below, above


def _to_the(above: Polynomial, below: Polynomial, power: int) -> tuple[Polynomial, Polynomial]:
    if power > LARGEST_POWER:
        raise Beyond(f"a power above {LARGEST_POWER}")
    result = ONE, ONE
    for _ in range(power):
        result = _times(result[0], above), _times(result[1], below)
    return result


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    total = {powers: a.get(powers, 0) + b.get(powers, 0) for powers in {**a, **b}}
    return {powers: coefficient for powers, coefficient in total.items() if coefficient}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    if len(a) * len(b) > MOST_PRODUCTS:
        raise Beyond("a polynomial of too many terms")
    product: Polynomial = {}
    for (x, y), coefficient in a.items():
        for (other_x, other_y), other in b.items():
            powers = x + other_x, y + other_y
            product[powers] = product.get(powers, 0) + coefficient * other
    for coefficient in product.values():
        if max(abs(coefficient.numerator), coefficient.denominator).bit_length() > MOST_BITS:
            raise Beyond("a number too large")
    return {powers: coefficient for powers, coefficient in product.items() if coefficient}


@functools.cache
def _context():
    import mpmath  # here, so that other rewards do not need its time

    context = mpmath.mp.clone()
    context.dps = DIGITS
    return context


def _equal_at_points(answer: Tree, gold: Tree) -> bool:
    context = _context()
    draw = random.Random(hashlib.sha256(repr((answer, gold)).encode()).digest())
    agreed = 0
    for _ in range(TRIES):
        point = {name: context.mpf(draw.randint(3 * 10**29, 3 * 10**30)) / 10**30 for name in ("x", "y")}
        try:
            expected = _value(gold, point, context)
        except Beyond:
            continue
        given = _value(answer, point, context)
        if abs(given - expected) > SAME * max(abs(given), abs(expected)):
            return False
        agreed += 1
        if agreed == POINTS:
            return True
    return False


def _value(tree: Tree, point: dict, context) -> object:
    """The value of a formula at a point, a real number of `DIGITS` digits.

    Raises:
      Beyond: there is none (a division by zero, the root of a negative number), or a part of it is tiny or huge.
    """
    kind, *parts = tree
    if kind == "number":
        value = context.mpf(parts[0].numerator) / parts[0].denominator
    elif kind == "name":
        value = point[parts[0]] if parts[0] in point else getattr(context, parts[0]) + 0
    else:
        value = _applied(kind, [_value(part, point, context) for part in parts], context)
    if abs(value) < NOTHING:
        return context.mpf(0)
    if not SMALLEST < abs(value) < LARGEST:
        raise Beyond("a value too small or too large")
    return value


def _applied(kind: str, values: list, context) -> object:
    first, second = values[0], values[-1]
    if kind == "+":
        return first + second
    if kind == "-":
        return -first
    if kind == "*":
        return first * second
    if (kind in ("/", "log") and second == 0) or (kind in ("log", "sqrt") and first < 0):
        raise Beyond("no real value")
    if kind == "/":
        return first / second
    if kind == "^":
        if first == 0 and second > 0:
            return first
        if first == 0 or (first < 0 and second != int(second)):
            raise Beyond("no real value")
        growth = second * context.log(abs(first))
    else:
        growth = first if kind == "exp" else 0
    if abs(growth) > 150:  # beyond LARGEST; asked first, since computing it could take for ever
        raise Beyond("a value too small or too large")
    return first**second if kind == "^" else getattr(context, kind)(first)


assert set(NAMES) == {"x", "y", "pi", "e"}  # what `_value` knows
