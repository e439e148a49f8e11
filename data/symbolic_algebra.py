"""Products to expand, equations to solve and formulas to simplify, for `symbolic.py`, and how formulas are written.

A form is a function that draws numbers and writes question, steps and answer. Every formula is in the grammar of
`rewards/formula.py`, and every answer is right by construction. `ALGEBRA` at the end lists the forms of each task and
level. Left out: derivatives (`symbolic_calculus.py`), splits and prompts.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

EXPAND = "Expand {} and put like terms together."
SOLVE = "Solve {} for x."
SIMPLIFY = "Simplify {} for positive x."


@dataclass(frozen=True)
class Made:
    """A problem."""

    key: str
    """Form and numbers, the same for all orders of writing the problem."""
    question: str
    """With `{}` for the expression."""
    expression: str
    steps: tuple[str, ...]
    answer: str


Form = Callable[[random.Random], Made]

# Writing


def times(number: int, text: str) -> str:
    """`3*x`, `x`, `-x`, `0`; without a text the number."""
    if number == 0 or not text:
        return str(number)
    return {1: text, -1: f"-{text}"}.get(number, f"{number}*{text}")


def power(base: str, exponent: int) -> str:
    """`x^3`, `x`; nothing for the power 0, which `times` leaves out."""
    return "" if exponent == 0 else base if exponent == 1 else f"{base}^{exponent}"


def join(*terms: str) -> str:
    """Terms with their signs between them; zeros are left out."""
    first, *rest = [term for term in terms if term != "0"] or ["0"]
    return first + "".join(f" - {term[1:]}" if term[0] == "-" else f" + {term}" for term in rest)


def polynomial(*coefficients: int) -> str:
    """Coefficients from the highest power to the lowest: (1, 0, -2) is `x^2 - 2`."""
    highest = len(coefficients) - 1
    return join(*(times(number, power("x", highest - place)) for place, number in enumerate(coefficients)))


def _multiplied(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """The coefficients of a product of two polynomials."""
    product = [0] * (len(a) + len(b) - 1)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            product[i + j] += left * right
    return product


def nonzero(rng: random.Random, largest: int) -> int:
    """From -largest to largest."""
    return rng.choice((-1, 1)) * rng.randint(1, largest)


def factor(rng: random.Random) -> int:
    """Of two or more, so that it is written out."""
    return rng.choice((-1, 1)) * rng.randint(2, 9)


# Products to expand


def _expand(*factors: Sequence[int], key: str, names: str = "x") -> Made:
    product = [1]
    for each in factors:
        product = _multiplied(product, each)
    write = _homogeneous if names == "xy" else polynomial
    if factors.count(factors[0]) == len(factors) > 1:
        text = f"({write(*factors[0])})^{len(factors)}"
    else:
        text = "*".join(str(f[0]) if len(f) == 1 else f"({write(*f)})" for f in factors)
    terms = [write(*[0] * i, n, *[0] * (len(product) - 1 - i)) for i, n in enumerate(product) if n]
    return Made(f"expand {key}", EXPAND, text, (f"The terms are {', '.join(terms)}.",), write(*product))


def _homogeneous(*coefficients: int) -> str:
    """(1, 3, 2) is `x^2 + 3*x*y + 2*y^2`."""
    highest = len(coefficients) - 1
    names = ["*".join(filter(None, (power("x", highest - i), power("y", i)))) for i in range(highest + 1)]
    return join(*(times(number, name) for number, name in zip(coefficients, names, strict=True)))


def _number_times_linear(rng: random.Random) -> Made:
    a, b, c = factor(rng), rng.randint(1, 15), nonzero(rng, 15)
    step = f"{a}*{b} = {a * b}, {a}*{c} = {a * c}"
    inner = polynomial(b, c)
    return Made(f"expand {a * b} {a * c}", EXPAND, f"{a}*({inner})", (step,), polynomial(a * b, a * c))


def _number_times_polynomial(rng: random.Random) -> Made:
    a, inner = factor(rng), [rng.randint(1, 9), nonzero(rng, 9), nonzero(rng, 9)]
    return _expand([a], inner, key=f"{[a * number for number in inner]}")


def _two_linear(names: str) -> Form:
    def make(rng: random.Random) -> Made:
        factors = [[rng.randint(1, 9), nonzero(rng, 9)] for _ in range(2)]
        return _expand(*factors, key=f"{names} {_multiplied(*factors)}", names=names)

    return make


def _linear_times_quadratic(rng: random.Random) -> Made:
    linear, quadratic = [rng.randint(1, 5), nonzero(rng, 5)], [1, nonzero(rng, 9), nonzero(rng, 9)]
    return _expand(linear, quadratic, key=f"{_multiplied(linear, quadratic)}")


def _cube(rng: random.Random) -> Made:
    linear = [rng.randint(1, 5), nonzero(rng, 9)]
    return _expand(linear, linear, linear, key=f"{_multiplied(linear, _multiplied(linear, linear))}")


# Equations


def _equation_of_one_step(rng: random.Random) -> Made:
    """a x = c or x + b = c, with a whole solution."""
    x = rng.randint(-30, 30)
    if rng.random() < 0.5:
        a = rng.randint(2, 12)
        return Made(f"solve {a} {a * x}", SOLVE, f"{a}*x = {a * x}", (f"x = {a * x}/{a}",), str(x))
    b = nonzero(rng, 30)
    step = f"x = {join(str(x + b), str(-b))}"
    return Made(f"solve 1 {b} {x + b}", SOLVE, f"{polynomial(1, b)} = {x + b}", (step,), str(x))


def _linear_equation(rng: random.Random) -> Made:
    """a x + b = c, with a whole solution."""
    a, b, x = rng.randint(2, 12), nonzero(rng, 20), rng.randint(-12, 12)
    c = a * x + b
    return Made(f"solve {a} {b} {c}", SOLVE, f"{polynomial(a, b)} = {c}", (f"{a}*x = {c - b}",), str(x))


def _equation_of_two_sides(rng: random.Random) -> Made:
    """a x + b = c x + d, with a fraction as the solution."""
    a, c = rng.sample(range(1, 13), 2)
    b, d = nonzero(rng, 20), nonzero(rng, 20)
    sides = sorted([(a, b), (c, d)])
    steps = (f"{times(a - c, 'x')} = {d - b}",)
    text = f"{polynomial(a, b)} = {polynomial(c, d)}"
    return Made(f"solve {sides}", SOLVE, text, steps, str(Fraction(d - b, a - c)))


def _quadratic_equation(rng: random.Random) -> Made:
    """k (q x - p) (x - r) = 0, multiplied out."""
    k, q, p, r = rng.randint(1, 3), rng.randint(1, 4), rng.randint(-12, 12), rng.randint(-12, 12)
    factors = [q, -p], [1, -r]
    coefficients = [k * number for number in _multiplied(*factors)]
    roots = sorted({Fraction(p, q), Fraction(r)})
    steps = "*".join(filter(None, (str(k) if k > 1 else "", *(f"({polynomial(*f)})" for f in factors))))
    text = f"{polynomial(*coefficients)} = 0"
    return Made(f"solve {coefficients}", SOLVE, text, (f"{steps} = 0",), ", ".join(map(str, roots)))


# Formulas to simplify


def _made(key: object, text: str, step: str, answer: str) -> Made:
    return Made(f"simplify {key}", SIMPLIFY, text, (step,), answer)


def _two_like_terms(rng: random.Random) -> Made:
    a, b = rng.randint(1, 60), nonzero(rng, 60)
    while a + b == 0:
        b = nonzero(rng, 60)
    step = f"{join(str(a), str(b))} = {a + b}"
    return _made(("two", *sorted((a, b))), join(times(a, "x"), times(b, "x")), step, times(a + b, "x"))


def _like_terms(rng: random.Random) -> Made:
    a, b, c, d = rng.randint(1, 20), nonzero(rng, 20), nonzero(rng, 20), nonzero(rng, 20)
    while a + b == 0 or c + d == 0:
        b, d = nonzero(rng, 20), nonzero(rng, 20)
    text = join(times(a, "x"), str(c), times(b, "x"), str(d))
    step = f"The terms with x give {times(a + b, 'x')}, the numbers {c + d}."
    return _made(("terms", sorted((a, b)), sorted((c, d))), text, step, polynomial(a + b, c + d))


def _cancel(rng: random.Random) -> Made:
    a, b, k = nonzero(rng, 15), nonzero(rng, 15), rng.randint(1, 5)
    above, below = [k * number for number in _multiplied([1, a], [1, b])], [1, a]
    step = f"{polynomial(*above)} = ({polynomial(k, k * b)})*({polynomial(*below)})"
    text = f"({polynomial(*above)})/({polynomial(*below)})"
    return _made(("cancel", a, b, k), text, step, polynomial(k, k * b))


def _powers(rng: random.Random) -> Made:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    m, n, k = rng.randint(3, 9), rng.randint(3, 9), rng.randint(2, 5)
    step = f"The numbers give {a * b}, the powers {m} + {n} - {k} = {m + n - k}."
    key = ("powers", sorted([(a, m), (b, n)]), k)
    return _made(key, f"{a}*x^{m}*{b}*x^{n}/x^{k}", step, f"{a * b}*x^{m + n - k}")


def _logarithms(rng: random.Random) -> Made:
    a, b, n = rng.randint(2, 12), rng.randint(1, 12), rng.randint(2, 9)
    text = join(f"{a}*log(x^{n})", f"{times(b, 'log(x)')}")
    return _made(("log", a, b, n), text, f"log(x^{n}) = {n}*log(x)", f"{a * n + b}*log(x)")


def _exponentials(rng: random.Random) -> Made:
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 12)
    answer = f"{c}*exp({a + b}*x)"
    return _made(("exp", *sorted((a, b)), c), f"{c}*exp({a}*x)*exp({b}*x)", f"{a}*x + {b}*x = {a + b}*x", answer)


def _pythagoras(rng: random.Random) -> Made:
    a, b, c = rng.randint(2, 20), rng.randint(2, 9), rng.randint(1, 20)
    text = f"{a}*sin({b}*x)^2 + {a}*cos({b}*x)^2 + {times(c, 'x')}"
    return _made(("squares", a, b, c), text, f"sin({b}*x)^2 + cos({b}*x)^2 = 1", polynomial(c, a))


def _roots(rng: random.Random) -> Made:
    a, b, n = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 4)
    text = f"{b}*sqrt({a * a}*x^{2 * n})"
    return _made(("root", a, b, n), text, f"sqrt({a * a}*x^{2 * n}) = {a}*x^{n}", f"{a * b}*x^{n}")


ALGEBRA: dict[str, dict[int, tuple[Form, ...]]] = {
    "expand": {
        0: (_number_times_linear,),
        1: (_number_times_polynomial,),
        2: (_two_linear("x"), _two_linear("xy")),
        3: (_linear_times_quadratic, _cube),
    },
    "solve": {
        0: (_equation_of_one_step,),
        1: (_linear_equation,),
        2: (_equation_of_two_sides,),
        3: (_quadratic_equation,),
    },
    "simplify": {
        0: (_two_like_terms,),
        1: (_like_terms,),
        2: (_cancel, _powers),
        3: (_logarithms, _exponentials, _pythagoras, _roots),
    },
}
"""{task: {level: forms}}; each form is drawn equally often."""
