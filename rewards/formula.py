"""A small grammar of formulas: text -> tree, and what form a tree has. No text is ever evaluated.

Read are numbers, `x`, `y`, `pi`, `e`, `+ - * / ^` (also `**`), brackets and the functions of `FUNCTIONS`. A product may
leave out its sign (`2x`, `3(x + 1)`), but not behind a division: `1/2x` is read in two ways, so it is no formula here.
Length, depth, digits and number of nodes are bounded. A tree is a tuple (kind, *children): ("number", Fraction),
("name", "x"), ("+", a, b), ("*", a, b), ("/", a, b), ("^", a, b), ("-", a), ("sin", a). Left out: whether two formulas
are equal (`equality.py`).
"""

import re
from collections import Counter
from fractions import Fraction

FUNCTIONS = {"sin": "sin", "cos": "cos", "tan": "tan", "exp": "exp", "log": "log", "ln": "log", "sqrt": "sqrt"}
"""How it is written, and its kind. `log` is the natural logarithm."""
NAMES = ("x", "y", "pi", "e")
LONGEST = 300
"""Characters of a formula."""
DEEPEST = 40
"""Brackets, signs and powers inside of each other."""
MOST_DIGITS = 20
"""Of one number."""
TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|([A-Za-z]+)|(\*\*|[-+*/^()]))")
LETTERS = re.compile(rf"(?:{'|'.join(sorted([*FUNCTIONS, *NAMES], key=len, reverse=True))})")

Tree = tuple


class NoFormula(ValueError):
    """The text is not of the grammar, or beyond its bounds."""


def parse(text: str) -> Tree:
    """The tree of a formula.

    Raises:
      NoFormula: the text is none.
    """
    if len(text) > LONGEST:
        raise NoFormula(f"longer than {LONGEST} characters")
    parser = _Parser(_tokens(text.replace("\N{MINUS SIGN}", "-").strip()))
    tree = parser.sum(0)
    if parser.next is not None:
        raise NoFormula(f"{parser.next!r} is left over")
    return tree


def _tokens(text: str) -> list[Fraction | str]:
    found: list[Fraction | str] = []
    place = 0
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            raise NoFormula(f"{text[place]!r} is no part of a formula")
        number, letters, sign = match.groups()
        place = match.end()
        if number:
            if len(number) > MOST_DIGITS:
                raise NoFormula(f"a number of more than {MOST_DIGITS} digits")
            found.append(Fraction(number))
        elif letters:  # `xy` is x times y, and `xsin` is x times a sine
            if "".join(LETTERS.findall(letters)) != letters:
                raise NoFormula(f"{letters!r} is no known name")
            found += LETTERS.findall(letters)
        else:
            found.append("^" if sign == "**" else sign)
    return found


class _Parser:
    """Recursive descent over the tokens, from the weakest operator to the strongest. `depth` bounds the recursion."""

    def __init__(self, tokens: list[Fraction | str]):
        self.tokens = [*tokens, None]
        self.place = 0

    @property
    def next(self) -> Fraction | str | None:
        return self.tokens[self.place]

    def take(self) -> Fraction | str | None:
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self, depth: int) -> Tree:
        tree = self.product(depth)
        while self.next in ("+", "-"):
            plus = self.take() == "+"
            term = self.product(depth)
            tree = ("+", tree, term if plus else ("-", term))
        return tree

    def product(self, depth: int) -> Tree:
        tree, divided = self.signed(depth), False
        while True:
            if self.next in ("*", "/"):
                sign = self.take()
                tree, divided = (sign, tree, self.signed(depth)), sign == "/"
            elif self.begins_a_factor():
                if divided:
                    raise NoFormula("a product without its sign behind a division can be read in two ways")
                tree = ("*", tree, self.power(depth))
            else:
                return tree

    def begins_a_factor(self) -> bool:
        """Whether what comes next goes on with a product whose sign is left out. A number does not: `x 2` is no 2x."""
        return self.next == "(" or self.next in FUNCTIONS or self.next in NAMES

    def signed(self, depth: int) -> Tree:
        if depth > DEEPEST:
            raise NoFormula(f"deeper than {DEEPEST}")
        if self.next == "-":
            self.take()
            return ("-", self.signed(depth + 1))
        if self.next == "+":
            self.take()
            return self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Tree:
        base = self.atom(depth)
        if self.next != "^":
            return base
        self.take()
        return ("^", base, self.signed(depth + 1))  # to the right first: 2^3^2 is 2^9, and -x^2 is -(x^2)

    def atom(self, depth: int) -> Tree:
        token = self.take()
        if isinstance(token, Fraction):
            return ("number", token)
        if token in NAMES:
            return ("name", token)
        if token in FUNCTIONS:
            if self.next != "(":
                raise NoFormula(f"{token} needs brackets")
            return (FUNCTIONS[token], self.atom(depth))
        if token != "(":
            raise NoFormula("a number, a name or a bracket is missing" if token is None else f"{token!r} out of place")
        tree = self.sum(depth + 1)
        if self.take() != ")":
            raise NoFormula("a bracket is not closed")
        return tree


def size(tree: Tree) -> int:
    """How long a formula is: its numbers, names and functions. Signs count nothing, and 3/4 is one number."""
    if is_value(tree) or tree[0] == "name":
        return 1
    return (tree[0] in FUNCTIONS.values()) + sum(size(part) for part in tree[1:])


def is_value(tree: Tree) -> bool:
    """Whether a formula is a number as one writes a result: `-7`, `0.25` or `3/4`, but not `6/8`, `8/2` or `2 + 2`."""
    if tree[0] == "-":
        return tree[1][0] != "-" and is_value(tree[1])
    if tree[0] == "/":
        above, below = (part[1] if part[0] == "number" else None for part in _sign_out(tree)[1:])
        whole = all(part is not None and part.denominator == 1 for part in (above, below))
        return whole and below > 1 and Fraction(above, below).denominator == below
    return tree[0] == "number"


def _sign_out(tree: Tree) -> Tree:
    """`(-3)/4` and, as it is parsed, `-3/4`, without the sign of what is divided."""
    return (tree[0], tree[1][1], tree[2]) if tree[1][0] == "-" else tree


def is_expanded(tree: Tree) -> bool:
    """Whether a formula is a sum of different monomials: no brackets are left, like terms are put together."""
    monomials = [_monomial(term) for term in _terms(tree)]
    return None not in monomials and max(Counter(monomials).values()) == 1


def _terms(tree: Tree) -> list[Tree]:
    if tree[0] == "+":
        return [term for part in tree[1:] for term in _terms(part)]
    return [tree]


def _monomial(term: Tree) -> tuple | None:
    """Its names with their powers, such as (("x", 2), ("y", 1)); None if it is no number times powers of names."""
    if term[0] == "-":
        term = term[1]
    factors, powers, above, below = [term], {}, [], []
    while factors:
        part = factors.pop()
        if part[0] == "*":
            factors += part[1:]
        elif is_value(part):
            above.append(part)
        elif part[0] == "/" and part[2][0] == "number":
            factors.append(part[1])
            below.append(part[2])
        else:
            name, power = part[1:] if part[0] == "^" else (part, ("number", Fraction(1)))
            if name[0] != "name" or power[0] != "number" or name[1] in powers:
                return None
            powers[name[1]] = power[1]
    if max(len(above), len(below)) > 1:
        return None
    coefficient = [("/", *(above or [("number", Fraction(1))]), *below)] if below else above
    return tuple(sorted(powers.items())) if all(map(is_value, coefficient)) else None
