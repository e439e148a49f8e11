"""The grammar of formulas: what is read, what is refused, and what form a formula has. No text is executed."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import formula
from rewards.formula import NoFormula, is_expanded, is_value, parse, size

X, Y = ("name", "x"), ("name", "y")


def number(value):
    return ("number", Fraction(value))


TREES = {
    "x": X,
    " 12 ": number(12),
    ".5": number("1/2"),
    "x + y - 1": ("+", ("+", X, Y), ("-", number(1))),
    "x - y*2": ("+", X, ("-", ("*", Y, number(2)))),
    "x/y/2": ("/", ("/", X, Y), number(2)),
    "-x^2": ("-", ("^", X, number(2))),
    "2^-1": ("^", number(2), ("-", number(1))),
    "2^3^2": ("^", number(2), ("^", number(3), number(2))),
    "x**2": ("^", X, number(2)),
    "2x": ("*", number(2), X),
    "2xy": ("*", ("*", number(2), X), Y),
    "2x^2": ("*", number(2), ("^", X, number(2))),
    "3(x + 1)": ("*", number(3), ("+", X, number(1))),
    "(x)(y)": ("*", X, Y),
    "xsin(x)": ("*", X, ("sin", X)),
    "ln(x)": ("log", X),
    "sin(x)^2": ("^", ("sin", X), number(2)),
    "exp(x)": ("exp", X),
    "e^x": ("^", ("name", "e"), X),
    "+-+x": ("-", X),
    "x\N{MINUS SIGN}1": ("+", X, ("-", number(1))),
    "1/2*x": ("*", ("/", number(1), number(2)), X),
}


@pytest.mark.parametrize(("text", "tree"), TREES.items())
def test_a_formula_is_read_as_one_writes_it(text, tree):
    assert parse(text) == tree


NO_FORMULAS = [
    "",
    " ",
    "+",
    "x +",
    "(x",
    "x)",
    "()",
    "x 2",
    "2 3",
    "1.2.3",
    "1e3",
    "1,000",
    "z",
    "sin",
    "sin x",
    "sinx",
]
NO_FORMULAS += [
    "x = 2",
    "x == 2",
    "x ! 2",
    "x^",
    "^2",
    "* x",
    "x * / y",
    "1/2x",
    "1/2(x)",
    "x/y sin(x)",
    "f(x)",
    "\u0663",
]
NO_FORMULAS += ["__import__('os').system('touch owned')", "x.__class__", "lambda: 0", "[x]", "{x}", "x if x else y"]
NO_FORMULAS += ["\\frac{1}{2}", "$x$", "x\x00", "x\ny z", "9" * 21, "x + " * 100 + "x", "(" * 100, "-" * 100 + "x"]
NO_FORMULAS += ["(" * 60 + "x" + ")" * 60, "sin(" * 60 + "x" + ")" * 60, "x" + "^x" * 60]


@pytest.mark.parametrize("text", NO_FORMULAS)
def test_what_is_no_formula_is_refused_and_never_executed(text, tmp_path):
    with pytest.raises(NoFormula):
        parse(text)
    assert not list(tmp_path.iterdir())


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("xye0123456789.+-*/^() sincoexplgt"), max_size=60))
def test_any_text_is_a_formula_or_is_refused(text):
    try:
        tree = parse(text)
    except NoFormula:
        return
    assert size(tree) >= 1 and isinstance(is_expanded(tree), bool) and isinstance(is_value(tree), bool)


def test_the_longest_formula_does_not_exhaust_the_stack():
    for text in ("x+" * 149 + "x", "x*" * 149 + "x", "2" + "x" * 298, "x/" * 149 + "x"):
        tree = parse(text)
        assert size(tree) >= 150
        is_expanded(tree)
    depth = formula.DEEPEST
    assert size(parse("(" * depth + "x" + ")" * depth)) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", True), ("-4", True), ("0.25", True), ("3/4", True), ("-3/4", True), ("-(3/4)", True), ("(-3)/4", True)]
    + [("6/8", False), ("8/2", False), ("4/1", False), ("1/0", False), ("0/4", False), ("2 + 2", False)]
    + [("2*2", False), ("2^2", False), ("sqrt(4)", False), ("x", False), ("--4", False), ("3/-4", False)]
    + [("0.5/2", False), ("x/4", False), ("pi", False), ("--3/4", False)],
)
def test_a_value_is_a_number_as_a_result_is_written(text, value):
    assert is_value(parse(text)) is value


@pytest.mark.parametrize(
    ("text", "expanded"),
    [("x^2 + 2*x + 1", True), ("1 + 2x + x^2", True), ("-x", True), ("7", True), ("x/2 + 3*x^2/4", True)]
    + [("x*y*2 + y^2", True), ("(x + 1)", True), ("x + (2*x^2 - 1)", True), ("-(x^2) + 1", True)]
    + [("(x + 1)^2", False), ("x*(x + 2) + 1", False), ("x^2 + x + x + 1", False), ("x*x + 2*x + 1", False)]
    + [("2*3*x", False), ("x^2 + 2*x + 3 - 2", False), ("sin(x)", False), ("1/x", False), ("-(x + 1)", False)]
    + [("x^(1 + 1)", False), ("2^2*x", False), ("x*y + y*x", False)]
    + [("2*x/2", False), ("x/2/3", False), ("4*x/6", False), ("1/2*x", True), ("x*3/4", True)],
)
def test_expanded_is_a_sum_of_different_monomials(text, expanded):
    assert is_expanded(parse(text)) is expanded


@pytest.mark.parametrize(
    ("text", "length"),
    [("x", 1), ("-3/4", 1), ("3/4*x", 2), ("x/2", 2), ("x - 1", 2), ("2*(x + 1)", 3), ("log(x)", 2), ("x^2", 2)]
    + [("2*x + 3*x", 4), ("exp(2*x)", 3)],
)
def test_the_length_counts_numbers_names_and_functions(text, length):
    assert size(parse(text)) == length
