"""The rewards of symbolic manipulation: answer lines, forms, attacks, and every gold of the generated problems."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data.problem import Problem
from data.prompts import worked_answer
from rewards import symbolic

IS = "#### The final answer is"


def grade(completion, gold, task=None):
    problem = Problem("", gold, {"task": task} if task else {})
    return symbolic.format(completion, problem), symbolic.correctness(completion, problem)


LINES = [
    (f"{IS} 2*x + 3", (0.5, 1.0)),
    (f"so\n{IS} 3 + 2x.", (0.5, 1.0)),
    (f"{IS} $2*x + 3$", (0.5, 1.0)),
    (f"{IS} 2*x + 3 \t\r", (0.5, 1.0)),
    ("#### 2*x + 3", (0.0, 1.0)),
    ("####2*x + 3", (0.0, 1.0)),
    (f"{IS} 2*x", (0.5, 0.0)),
    (f"{IS} 2*x\n{IS} 2*x + 3", (0.0, 1.0)),
    (f"{IS} 2*x + 3\n{IS} 2*x", (0.0, 0.0)),
    (f" {IS} 2*x + 3", (0.0, 0.0)),
    (f"so {IS} 2*x + 3", (0.0, 0.0)),
    (f"{IS} 2*x + 3 or so", (0.0, 0.0)),
    (f"{IS} 2*x + 3, 2*x + 3", (0.5, 0.0)),
    (f"{IS} 2*x, 2*x + 3", (0.5, 0.0)),
    (f"{IS} x = 2*x + 3", (0.5, 1.0)),
    (f"{IS} y = 2*x + 3", (0.0, 0.0)),
    (f"{IS}", (0.0, 0.0)),
    (f"{IS} the same as the question", (0.0, 0.0)),
    ("2*x + 3", (0.0, 0.0)),
    ("", (0.0, 0.0)),
]


@pytest.mark.parametrize(("completion", "marks"), LINES)
def test_answer_lines(completion, marks):
    assert grade(completion, "2*x + 3", "derivative") == marks


TASKS = [
    ("expand", "x^2 + 3*x + 2", "2 + 3x + x^2", 1.0),
    ("expand", "x^2 + 3*x + 2", "(x + 1)*(x + 2)", 0.0),
    ("expand", "x^2 + 3*x + 2", "x^2 + x + 2*x + 2", 0.0),
    ("expand", "x^2 + 3*x + 2", "x*(x + 3) + 2", 0.0),
    ("expand", "x^2 + 3*x + 2", "x^2 + 3*x", 0.0),
    ("simplify", "x + 1", "1 + x", 1.0),
    ("simplify", "x + 1", "(x^2 - 1)/(x - 1)", 0.0),
    ("simplify", "x + 1", "x + 2 - 1", 0.0),
    ("simplify", "8*exp(7*x)", "exp(7*x)*8", 1.0),
    ("simplify", "8*exp(7*x)", "8*exp(3*x)*exp(4*x)", 0.0),
    ("simplify", "8*exp(7*x)", "8*exp(3*x + 4*x)", 0.0),
    ("solve", "4", "x = 4", 1.0),
    ("solve", "4", "4.0", 1.0),
    ("solve", "4", "8/2", 0.0),
    ("solve", "4", "4, 4", 0.0),
    ("solve", "4", "4 or 5", 0.0),
    ("solve", "4", "4*x/x", 0.0),
    ("solve", "4", "3*x + 4 = 16", 0.0),
    ("solve", "-10/11", "x = -10/11", 1.0),
    ("solve", "-10/11", "10/-11", 0.0),
    ("solve", "-5/4, 5", "5, -5/4", 1.0),
    ("solve", "-5/4, 5", "x = 5 or x = -1.25", 1.0),
    ("solve", "-5/4, 5", "5 and -5/4.", 1.0),
    ("solve", "-5/4, 5", "5", 0.0),
    ("solve", "-5/4, 5", "5, 5", 0.0),
    ("solve", "-5/4, 5", "5, -5/4, 1", 0.0),
    ("solve", "-5/4, 5", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11", 0.0),
    ("derivative", "10*x*sin(5*x) + 25*x^2*cos(5*x)", "5x(2sin(5x) + 5x*cos(5x))", 1.0),
    ("derivative", "69/(5*x + 4)^2", "69*(5x + 4)^-2", 1.0),
    ("derivative", "6*x", "3*2*x^(2-1)", 1.0),
    ("derivative", "6", "3*2", 0.0),
    ("derivative", "6*x", "6*x + exp(-500)", 0.0),
    (None, "391", "17*23", 0.0),
    (None, "391", "391", 1.0),
]


@pytest.mark.parametrize(("task", "gold", "said", "right"), TASKS)
def test_what_each_task_asks_for(task, gold, said, right):
    assert grade(f"{IS} {said}", gold, task)[1] == right


@pytest.mark.parametrize(
    ("said", "right"),
    [("2*x + 3", 1.0), (" 2*x+3", 1.0), ("3 + 2*x", 0.0), ("2x + 3", 0.0), ("2*x + 3.", 0.0), ("2*x", 0.0), ("", 0.0)],
)
def test_the_strict_form_wants_the_text_of_the_data(said, right):
    assert symbolic.same_text(f"so\n{IS} {said}", Problem("", "2*x + 3", {"task": "derivative"})) == right
    assert symbolic.same_text(f"{IS} 2*x +", Problem("", "2*x +", {})) == 0.0  # no formula


@pytest.mark.parametrize(
    ("text", "right"),
    [("so it is 2*x + 3.", 1.0), ("f = 2*x + 3", 1.0), ("first: x\nThe derivative is: 2*x + 3", 1.0), ("2*x + 3", 1.0)]
    + [(f"{IS} 2*x + 3", 1.0), ("#### 2*x + 3", 1.0), ("2*x + 3\nI think", 0.0), ("", 0.0), ("x = 2*x", 0.0)],
)
def test_the_last_line_is_read_however_it_is_marked(text, right):
    assert symbolic.last_line(text, Problem("", "2*x + 3", {"task": "derivative"})) == right


PATHS = [
    f"{task}:level={level},size=60" for task in ("derivative", "expand", "solve", "simplify") for level in range(4)
]


@pytest.mark.parametrize("path", PATHS)
def test_every_gold_is_right_and_no_question_is_its_own_answer(path):
    for problem in data.load("symbolic", "train", path=path):
        text = " " + worked_answer({**problem.info, "answer": problem.answer})
        assert (symbolic.format(text, problem), symbolic.correctness(text, problem)) == (0.5, 1.0)
        assert symbolic.last_line(text, problem) == 1.0
        again = problem.info["expression"]
        for said in (again, f"({again})", again.partition(" = ")[0], f"1*({again})", f"x*({again})/x"):
            assert symbolic.correctness(f"{IS} {said}", problem) == 0.0, (problem.info["question"], said)


@pytest.mark.parametrize("path", PATHS)
def test_no_gold_is_right_for_another_problem(path):
    problems = data.load("symbolic", "train", path=path)[:12]
    for problem in problems:
        for other in problems:
            right = symbolic.correctness(f"{IS} {other.answer}", problem)
            assert right == float(other.answer == problem.answer), (other.answer, problem.answer)


MEGABYTE = 10**6
LONG = ["1" * MEGABYTE, f"{IS} " + "1" * MEGABYTE, f"{IS} " + "(" * MEGABYTE, f"{IS} x" + ", x" * (MEGABYTE // 3)]
LONG += [
    f"{IS} x" + " or" * (MEGABYTE // 3),
    "####\n" * (MEGABYTE // 5),
    f"{IS} " * 30_000,
    f"{IS} x" + " " * MEGABYTE + "y",
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:30])
def test_a_megabyte_is_graded_in_linear_time(text):
    # Quadratic time on a million characters is hours, so that a failure shows as a test that does not end.
    problem = Problem("", "7", {"task": "solve"})
    assert (symbolic.correctness(text, problem), symbolic.last_line(text, problem)) == (0.0, 0.0)
    symbolic.format(text, problem)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=80), gold=st.text(max_size=20), task=st.sampled_from(["solve", "expand", "simplify", None])
)
def test_any_text_and_gold_is_graded(text, gold, task):
    format, correctness = grade(f"{IS} {text}", gold, task)
    assert format in (0.0, 0.5) and correctness in (0.0, 1.0)


def test_nothing_in_a_text_is_executed(tmp_path):
    for text in ("open('owned', 'w')", "__import__('os').system('touch owned')", "exec(chr(120))", "x.__class__"):
        assert grade(f"{IS} {text}", "x") == (0.0, 0.0)
    assert not list(tmp_path.iterdir())
