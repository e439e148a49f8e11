"""The generated problems of symbolic manipulation: right, varied, the same every time, and never in two splits."""

import random

import mpmath
import pytest
import sympy

from data import load, prompts, symbolic
from data.symbolic import FORMS
from rewards.formula import parse
from tests.rewards.test_equality import to_sympy

PATHS = [f"{task}:level={level}" for task in FORMS for level in range(4)]
X = sympy.Symbol("x", positive=True)
PINNED = [
    ("Simplify 20*x + 20 - 17*x + 14 for positive x.", "3*x + 34"),
    ("Simplify x + 20 + 12*x - 2 for positive x.", "13*x + 18"),
]


def drawn(path, split="train", size=40):
    return load("symbolic", split, path=f"{path},size={size}")


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_derivatives_as_sympy_computes_them(level):
    for problem in drawn(f"derivative:level={level}", size=60):
        slope = sympy.diff(to_sympy(parse(problem.info["expression"])), X)
        gap = (slope - to_sympy(parse(problem.answer))).evalf(50, subs={X: sympy.Rational(7, 5)})
        assert abs(gap) < 1e-30, problem.info["question"]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_expansions_as_sympy_computes_them(level):
    for problem in drawn(f"expand:level={level}"):
        assert to_sympy(parse(problem.answer)) == sympy.expand(to_sympy(parse(problem.info["expression"])))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_equations_as_sympy_solves_them(level):
    x = sympy.Symbol("x")
    for problem in drawn(f"solve:level={level}"):
        left, right = (to_sympy(parse(side)).subs(X, x) for side in problem.info["expression"].split(" = "))
        assert sympy.solveset(left - right, x) == {sympy.Rational(root) for root in problem.answer.split(", ")}


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_simplifications_are_equal_and_shorter(level):
    for problem in drawn(f"simplify:level={level}"):
        question, answer = to_sympy(parse(problem.info["expression"])), to_sympy(parse(problem.answer))
        assert abs((question - answer).evalf(50, subs={X: sympy.Rational(7, 5)})) < 1e-30
        assert len(problem.answer) < len(problem.info["expression"])


with mpmath.workdps(60):
    AT = {"x": mpmath.sqrt(mpmath.pi), "y": mpmath.sqrt(mpmath.e)}
AT |= {name: getattr(mpmath, name) for name in ("sin", "cos", "exp", "log", "sqrt")}


def fingerprint(text):
    """The value of a formula at a point, the same for all ways of writing it."""
    with mpmath.workdps(60):
        return mpmath.nstr(eval(text.replace("^", "**"), AT), 40)


@pytest.mark.parametrize("path", [path for path in PATHS if path.startswith(("derivative", "expand"))])
def test_no_function_is_in_two_splits(path):
    """Not with its terms or factors in another order either."""
    seen = {split: {fingerprint(p.info["expression"]) for p in load("symbolic", split, path=f"{path},size=900")}
            for split in ("train", "validation", "test")}  # fmt: skip
    assert min(map(len, seen.values())) > 190
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("level", [0, 1])
def test_no_sum_is_in_two_splits_with_its_terms_in_another_order(level):
    def sums(split):
        texts = [p.info["expression"] for p in load("symbolic", split, path=f"simplify:level={level},size=1000")]
        return {tuple(sorted(text.replace(" - ", " + -").split(" + "))) for text in texts}

    assert not sums("train") & sums("test")


@pytest.mark.parametrize("path", PATHS)
def test_the_form_and_its_numbers_decide_the_split(path):
    task, level = path.split(":level=")
    rng, keys = random.Random(1), {}
    for _ in range(400):
        made = rng.choice(FORMS[task][int(level)])(rng)
        keys.setdefault(made.key, []).append(symbolic.split_of(made.key))
    shares = [splits[0] for splits in keys.values()]
    assert 0.7 < shares.count("train") / len(shares) < 0.9 and shares.count("test") > 20
    questions = {split: {p.info["question"] for p in drawn(path, split, 200)} for split in ("train", "test")}
    assert not questions["train"] & questions["test"]


@pytest.mark.parametrize("path", PATHS)
def test_every_choice_suffices_for_the_test_split(path):
    problems = drawn(path, "test", 1)
    assert len({problem.info["question"] for problem in problems}) == len(problems) == symbolic.SIZES["test"]


def test_the_splits_have_their_sizes():
    for split, size in symbolic.SIZES.items():
        problems = load("symbolic", split)
        assert len({problem.info["question"] for problem in problems}) == len(problems) == size
    assert {problem.info["task"] for problem in problems} == set(FORMS)
    assert len(load("symbolic", "train", path="derivative:level=3,size=70")) == 70


def test_every_form_is_drawn():
    problems = load("symbolic", "train", path="derivative+expand+solve+simplify:level=0-3,size=2000")
    assert {(p.info["task"], p.info["level"]) for p in problems} == {(task, n) for task in FORMS for n in range(4)}
    written = " ".join(problem.info["expression"] for problem in problems)
    for piece in ("sin(", "cos(", "exp(", "log(", "sqrt(", ")/(", "^2*sin(", "*y", " = 0", ")^3", "^2 + 3)"):
        assert piece in written, piece


def test_test_is_the_same_for_every_seed_and_train_follows_it():
    for split, same in (("validation", True), ("test", True), ("train", False)):
        first, other = (load("symbolic", split, path="solve:size=50", seed=seed) for seed in (0, 7))
        assert (first == other) is same
        assert load("symbolic", split, path="solve:size=50", seed=7) == other


def test_the_prompt_shows_exemplars_of_train_that_are_not_asked():
    asked = load("symbolic", "train", path="expand:size=100", num_shots=3)
    shots = asked[0].info["shots"]
    assert len(asked) == 97 and len(shots) == 3
    assert not {shot["question"] for shot in shots} & {problem.info["question"] for problem in asked}
    for problem in (*asked[:5], *load("symbolic", "test", path="expand:size=100", num_shots=3)[:5]):
        assert problem.prompt == prompts.completion_prompt(problem.info["question"], shots)
        assert problem.info["stop"] == prompts.STOP


def test_first_problems_are_pinned():
    """What results are reported on: a change here makes old results incomparable."""
    assert [(p.info["question"], p.answer) for p in load("symbolic", "test")[:2]] == PINNED


@pytest.mark.parametrize(
    ("path", "message"),
    [("integral", "data_path: 'integral' is not one of derivative, expand, solve, simplify")]
    + [("derivative:level=4", "data_path: level=4 must be a whole number from 0 to 3")]
    + [("derivative:level=3-1", "data_path: level=3-1 ends before it begins")]
    + [("derivative:levels=1", "data_path: 'levels' in 'derivative:levels=1' is not one of level, size")]
    + [("derivative:level=1,level=2", "data_path: 'level' stands twice")]
    + [("derivative:level", "data_path: 'derivative:level' is not one of")]
    + [("derivative:level=1,2", "data_path: '2' in 'derivative:level=1,2' is not of the form key=value")]
    + [("simplify:level=2,size=999999", "data_path: simplify, level 2 to 2 has about .* size=999999 is too many")],
)
def test_a_wrong_path_is_one_sentence(path, message):
    with pytest.raises(ValueError, match=message):
        load("symbolic", "train", path=path)
