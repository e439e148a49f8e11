"""The generated word problems: right, varied, small, the same every time, and never tested on what they trained on."""

import operator
import random
import re
from itertools import islice

import pytest

from data import arithmetic, load, prompts

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATION = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SPLITS = ("train", "validation", "test")
PINNED = [
    ("Cara has 25 beads. Ada gives Cara 25 more. How many beads does Cara have now?", "50"),
    ("There are 16 plums in a box and 25 plums in a bag. How many plums are there in all?", "41"),
]


@pytest.fixture(scope="module")
def problems():
    return {split: load("arithmetic", split) for split in SPLITS}


def numbers_in(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def skeleton(solution):
    """The arithmetic of a solution without its words, with the operands of a first + or * in order."""
    (a, sign, b, _), *rest = EQUATION.findall(solution)
    first, second = sorted((int(a), int(b))) if sign in "+*" else (int(a), int(b))
    return first, sign, second, *((sign, int(c)) for _, sign, c, _ in rest)


@pytest.mark.parametrize("split, size", [("train", 4000), ("validation", 500), ("test", 1000)])
def test_split_has_its_size_and_no_question_twice(problems, split, size):
    questions = [problem.info["question"] for problem in problems[split]]
    assert len(questions) == len(set(questions)) == size


@pytest.mark.parametrize("split", SPLITS)
def test_every_equation_holds_and_the_last_one_gives_the_answer(problems, split):
    for problem in problems[split]:
        equations = EQUATION.findall(problem.info["solution"])
        assert len(equations) == problem.info["solution"].count("=") in (1, 2)
        assert all(OPERATION[sign](int(left), int(right)) == int(result) for left, sign, right, result in equations)
        assert problem.answer == equations[-1][3]


@pytest.mark.parametrize("split", SPLITS)
def test_solution_uses_the_numbers_of_the_question_and_its_own_results(problems, split):
    for problem in problems[split]:
        (a, _, b, x), *rest = EQUATION.findall(problem.info["solution"])
        used = [int(a), int(b)] + [int(c) for _, _, c, _ in rest]
        assert sorted(numbers_in(problem.info["question"])) == sorted(used)
        assert all(left == x for left, _, _, _ in rest), "the second step goes on from the first"


@pytest.mark.parametrize("split", SPLITS)
def test_all_numbers_are_from_2_to_50(problems, split):
    seen = {n for p in problems[split] for n in numbers_in(p.info["question"] + p.info["solution"])}
    assert min(seen) == 2
    assert max(seen) == 50


def test_no_arithmetic_is_in_two_splits(problems):
    """Not the same numbers in other words, nor the same addends or factors the other way round."""
    train, validation, test = ({skeleton(p.info["solution"]) for p in problems[split]} for split in SPLITS)
    assert min(len(train), len(validation), len(test)) > 100
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_split_of_ignores_the_order_of_addends_and_factors_only():
    for a, b in [(12, 7), (3, 40), (5, 6), (30, 11)]:
        assert arithmetic.split_of("+", {"a": a, "b": b}) == arithmetic.split_of("+", {"a": b, "b": a})
        assert arithmetic.split_of("*-", {"a": a, "b": b, "c": 5}) == arithmetic.split_of(
            "*-", {"a": b, "b": a, "c": 5}
        )
    both_ways = [
        arithmetic.split_of("-", {"a": a, "b": b}) == arithmetic.split_of("-", {"a": b, "b": a})
        for a in range(2, 50)
        for b in range(2, a)
    ]
    assert not all(both_ways)


def test_shares_of_the_splits():
    drawn = [arithmetic.split_of("++", {"a": a, "b": a + 1, "c": c}) for a in range(2, 102) for c in range(2, 102)]
    assert drawn.count("train") / len(drawn) == pytest.approx(0.80, abs=0.02)
    assert drawn.count("validation") / len(drawn) == pytest.approx(0.05, abs=0.01)
    assert drawn.count("test") / len(drawn) == pytest.approx(0.15, abs=0.02)


def test_surface_forms_are_many(problems):
    questions = [problem.info["question"] for problem in problems["test"]]
    bare = {re.sub(r"\d+", "N", question) for question in questions}
    for words, stand_in in ((arithmetic.NAMES, "NAME"), (arithmetic.THINGS, "THINGS")):
        pattern = re.compile(r"\b(" + "|".join(words) + r")\b")
        assert {word for question in questions for word in pattern.findall(question)} == set(words)
        bare = {pattern.sub(stand_in, question) for question in bare}
    assert len(bare) == len(arithmetic.FORMS) >= 20


def test_both_lengths_are_common(problems):
    steps = [problem.info["solution"].count("=") for problem in problems["test"]]
    assert 0.25 < steps.count(1) / len(steps) < 0.45


def test_test_and_validation_are_the_same_for_every_seed(problems):
    for split in ("validation", "test"):
        assert load("arithmetic", split, seed=7) == problems[split]


def test_train_follows_the_seed(problems):
    assert load("arithmetic", "train") == problems["train"]
    other = load("arithmetic", "train", seed=7)
    assert {p.info["question"] for p in other} != {p.info["question"] for p in problems["train"]}


def test_first_problems_are_pinned(problems):
    """The numbers that results are reported on: a change here makes old results incomparable."""
    assert [(p.info["question"], p.answer) for p in problems["test"][:2]] == PINNED


def test_prompt_is_the_completion_prompt_with_shots_from_train(problems):
    with_shots = load("arithmetic", "test", num_shots=3)
    shots = with_shots[0].info["shots"]
    trained_on = {problem.info["question"] for problem in problems["train"]}
    assert len(shots) == 3
    assert {shot["question"] for shot in shots} <= trained_on
    assert [problem.info["question"] for problem in with_shots] == [p.info["question"] for p in problems["test"]]
    for problem in with_shots[:20]:
        assert problem.prompt == prompts.completion_prompt(problem.info["question"], shots)
        assert problem.info["shots"] == shots
        assert problem.info["stop"] == ["\n\nQuestion:"]


def test_shots_are_left_out_of_train(problems):
    with_shots = load("arithmetic", "train", num_shots=3)
    shown = {shot["question"] for shot in with_shots[0].info["shots"]}
    assert len(with_shots) == len(problems["train"]) - 3
    assert not shown & {problem.info["question"] for problem in with_shots}


def test_stream_draws_from_the_asked_split_and_starts_with_the_seed():
    first, again = (list(islice(arithmetic.stream("test", random.Random(3)), 50)) for _ in range(2))
    assert first == again
    train = {skeleton(e["solution"]) for e in islice(arithmetic.stream("train", random.Random(3)), 5000)}
    assert not train & {skeleton(example["solution"]) for example in first}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "test", "path": "/some/where"}, "data_path: '/some/where'"),
        ({"split": "dev"}, "split: 'dev' is not one of train, validation, test"),
        ({"split": "test", "num_shots": -1}, "num_shots: -1"),
        ({"split": "test", "num_shots": 4001}, "num_shots: 4001"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.load(**options)
