"""Derivatives, for `symbolic.py`: sums of two terms, with the rule for each kind of term in its docstring.

`DERIVATIVES` at the end lists the forms of each level. Left out: writing formulas (`symbolic_algebra.py`).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

from data.symbolic_algebra import Form, Made, factor, join, nonzero, polynomial, power, times

DERIVATIVE = "What is the derivative of {} with respect to x?"


@dataclass(frozen=True)
class Term:
    """A function of x and its derivative, as text."""

    text: str
    derivative: str
    inner: str = ""
    """The step before: a rule with its parts."""


def _monomial(rng: random.Random) -> Term:
    """(a x^n)' = a n x^(n-1)"""
    a, n = factor(rng), rng.randint(2, 9)
    return Term(times(a, power("x", n)), times(a * n, power("x", n - 1)))


def _sine(rng: random.Random) -> Term:
    """(a sin(b x))' = a b cos(b x)"""
    a, b = factor(rng), rng.randint(2, 9)
    return Term(f"{a}*sin({b}*x)", f"{a * b}*cos({b}*x)")


def _cosine(rng: random.Random) -> Term:
    """(a cos(b x))' = -a b sin(b x)"""
    a, b = factor(rng), rng.randint(2, 9)
    return Term(f"{a}*cos({b}*x)", f"{-a * b}*sin({b}*x)")


def _exponential(rng: random.Random) -> Term:
    """(a exp(b x))' = a b exp(b x)"""
    a, b = factor(rng), rng.randint(2, 9)
    return Term(f"{a}*exp({b}*x)", f"{a * b}*exp({b}*x)")


def _power_of_linear(rng: random.Random) -> Term:
    """((a x + b)^n)' = n a (a x + b)^(n-1)"""
    a, b, n = rng.randint(2, 9), nonzero(rng, 9), rng.randint(3, 6)
    inner = polynomial(a, b)
    return Term(f"({inner})^{n}", f"{n * a}*({inner})^{n - 1}", f"The derivative of {inner} is {a}.")


def _logarithm(rng: random.Random) -> Term:
    """(c log(a x + b))' = c a / (a x + b)"""
    c, a, b = factor(rng), rng.randint(2, 9), rng.randint(1, 9)
    inner = polynomial(a, b)
    return Term(f"{c}*log({inner})", f"{c * a}/({inner})", f"The derivative of {inner} is {a}.")


def _root(rng: random.Random) -> Term:
    """(2 c sqrt(a x + b))' = c a / sqrt(a x + b)"""
    c, a, b = factor(rng), rng.randint(2, 9), rng.randint(1, 9)
    while gcd(a, b) > 1:  # the root of a factor could stand outside: the same function in other words
        b = rng.randint(1, 9)
    inner = polynomial(a, b)
    return Term(f"{2 * c}*sqrt({inner})", f"{c * a}/sqrt({inner})", f"The derivative of {inner} is {a}.")


def _power_times(kind: str) -> Callable[[random.Random], Term]:
    """(a x^n f(b x))' = a n x^(n-1) f(b x) + a b x^n f'(b x)"""

    def make(rng: random.Random) -> Term:
        a, n, b = factor(rng), rng.randint(2, 6), rng.randint(2, 9)
        p, f = f"{a}*x^{n}", f"{kind}({b}*x)"
        p_slope, slope = times(a * n, power("x", n - 1)), f"{b}*{'cos' if kind == 'sin' else kind}({b}*x)"
        inner = f"The derivative of {p} is {p_slope}, and that of {f} is {slope}."
        return Term(f"{p}*{f}", join(f"{p_slope}*{f}", times(a * b, f"x^{n}*{slope.split('*', 1)[1]}")), inner)

    return make


def _quotient(rng: random.Random) -> Term:
    """((a x + b)/(c x + d))' = (a d - b c)/(c x + d)^2"""
    a, c = rng.randint(1, 9), rng.randint(1, 9)
    b, d = nonzero(rng, 9), rng.randint(1, 9)
    while a * d == b * c or gcd(a, b, c, d) > 1:  # a constant, or the same function in other words
        b = nonzero(rng, 9)
    above, below = polynomial(a, b), polynomial(c, d)
    inner = f"The derivative of {above} is {a}, and that of {below} is {c}."
    return Term(f"({above})/({below})", f"{a * d - b * c}/({below})^2", inner)


def _of_quadratic(kind: str) -> Callable[[random.Random], Term]:
    """(c f(a x^2 + b))' = 2 a c x f'(a x^2 + b)"""

    def make(rng: random.Random) -> Term:
        c, a, b = factor(rng), rng.randint(2, 9), rng.randint(1, 9)
        inner, twice = polynomial(a, 0, b), f"{2 * a * c}*x"
        slope = {"sin": f"{twice}*cos({inner})", "exp": f"{twice}*exp({inner})", "log": f"{twice}/({inner})"}[kind]
        return Term(f"{c}*{kind}({inner})", slope, f"The derivative of {inner} is {2 * a}*x.")

    return make


def _exponential_times_sine(rng: random.Random) -> Term:
    """(exp(a x) sin(b x))' = a exp(a x) sin(b x) + b exp(a x) cos(b x)"""
    a, b = factor(rng), rng.randint(2, 9)
    e = f"exp({a}*x)"
    inner = f"The derivative of {e} is {a}*{e}, and that of sin({b}*x) is {b}*cos({b}*x)."
    return Term(f"{e}*sin({b}*x)", f"{a}*{e}*sin({b}*x) + {b}*{e}*cos({b}*x)", inner)


SIMPLE = (_monomial, _sine, _cosine, _exponential)
CHAIN = (_power_of_linear, _logarithm, _root, _power_times("sin"), _power_times("exp"))
HARD = (_quotient, _of_quadratic("sin"), _of_quadratic("exp"), _of_quadratic("log"), _exponential_times_sine)


def _derivative_of_trinomial(rng: random.Random) -> Made:
    """(a x^n + b x + c)' = a n x^(n-1) + b"""
    a, n, b, c = factor(rng), rng.randint(2, 9), nonzero(rng, 9), nonzero(rng, 9)
    text = join(times(a, power("x", n)), times(b, "x"), str(c))
    answer = join(times(a * n, power("x", n - 1)), str(b))
    return Made(f"derivative {a} {n} {b} {c}", DERIVATIVE, text, (f"{a}*{n} = {a * n}",), answer)


def _derivative_of_sum(first: Sequence, second: Sequence) -> Form:
    """A term of one of the first kinds plus one of another of the second kinds."""

    def make(rng: random.Random) -> Made:
        kind = rng.choice(first)
        terms = [kind(rng), rng.choice([other for other in second if other is not kind])(rng)]
        rng.shuffle(terms)
        steps = [term.inner for term in terms if term.inner]
        steps += [f"The derivative of {term.text} is {term.derivative}." for term in terms]
        whole = join(*(term.text for term in terms))
        key = " + ".join(sorted(term.text for term in terms))
        return Made(f"derivative {key}", DERIVATIVE, whole, tuple(steps), join(*(term.derivative for term in terms)))

    return make


DERIVATIVES: dict[int, tuple[Form, ...]] = {
    0: (_derivative_of_trinomial,),
    1: (_derivative_of_sum(SIMPLE, SIMPLE),),
    2: (_derivative_of_sum(CHAIN, SIMPLE),),
    3: (_derivative_of_sum(HARD, [*SIMPLE, *CHAIN]),),
}
