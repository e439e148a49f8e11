"""The generated programs: right, varied, the same every time, and never tested on what they trained on."""

import random
from itertools import islice

import pytest

from data import load, programs

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def problems():
    return {split: load("programs", split) for split in SPLITS}


def run(problem):
    """The function that the prompt and the answer define."""
    names = {}
    exec(problem.info["prefix"] + problem.answer, names)
    return names["f"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_its_size_and_its_answers_pass_their_cases(problems, split):
    sentences = [problem.info["question"] for problem in problems[split]]
    assert len(sentences) == len(set(sentences)) == programs.SIZES[split]
    for problem in problems[split]:
        f, cases = run(problem), problem.info["tests"]["cases"]
        assert len(cases) == programs.CALLS and all(f(*case["args"]) == case["result"] for case in cases)
        assert problem.prompt == problem.info["prefix"] and "\n" not in problem.answer


def test_no_calculation_is_in_two_splits(problems):
    def key(problem):
        expression = problem.answer.strip().split()
        return " ".join(sorted(expression[:3])) + " ".join(expression[3:]) if "-" not in expression[1] else expression

    seen = {split: {str(key(problem)) for problem in problems[split]} for split in SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]


def test_parentheses_stand_where_a_sum_is_multiplied_and_nowhere_else():
    calculation = ("x", "-", "y"), (("*", "7"), ("+", "2"), ("*", "y"))
    assert programs.expression(calculation) == "((x - y) * 7 + 2) * y"
    assert programs.expression(calculation, parentheses=False) == "x - y * 7 + 2 * y"
    assert programs.expression((("x", "*", "y"), (("*", "7"), ("-", "2")))) == "x * y * 7 - 2"
    assert programs.value(calculation, 5, 3) == ((5 - 3) * 7 + 2) * 3 == 48
    needed = [problem for problem in load("programs", "test") if "(" in problem.answer]
    assert 225 < len(needed) < 275, "half of the tasks need them"


def test_the_same_arguments_give_the_same_tasks_and_other_seeds_others(problems):
    assert load("programs", "train") == problems["train"] != load("programs", "train", seed=1)
    assert load("programs", "test", seed=1) == problems["test"]
    assert next(programs.stream("train", random.Random(0))) == next(programs.stream("train", random.Random(0)))


def test_exemplars_are_complete_programs_before_the_task(problems):
    problem = load("programs", "test", num_shots=2)[0]
    one, two, task = problem.prompt.split("\n\n")
    assert task == problems["test"][0].prompt == problem.info["prefix"]
    assert all(shot.startswith('def f(x, y):\n    """Take ') and "\n    return " in shot for shot in (one, two))
    shown = {shot["question"] for shot in problem.info["shots"]}
    assert len(shown) == 2 and not shown & {p.info["question"] for p in load("programs", "train", num_shots=2)}


def test_words_name_every_step():
    for example in islice(programs.stream("train", random.Random(1)), 200):
        (_, _, right), rest = example["calculation"]
        places = [example["question"].index(operand) for operand in (right, *(operand for _, operand in rest))]
        assert example["question"].count(",") == len(rest) and places[0] >= 0


@pytest.mark.parametrize("wrong", [{"path": "file.jsonl"}, {"num_shots": 3000}])
def test_wrong_arguments_are_one_sentence(wrong):
    with pytest.raises(ValueError, match="^(data_path|num_shots): "):
        load("programs", "train", **wrong)
