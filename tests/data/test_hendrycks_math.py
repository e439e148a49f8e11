"""Files of competition mathematics: rows, choices of level and subject, exemplars, and the real MATH-500."""

import json
import os
from pathlib import Path

import pytest

from data import load

ROWS = [
    {"problem": f"What is {n}+{n}?", "solution": f"It is $\\boxed{{{2 * n}}}.$", "level": f"Level {1 + n % 5}",
     "type": ("Algebra", "Counting & Probability")[n % 2]}
    for n in range(40)
]  # fmt: skip
NEW = {"problem": "What is 1+2?", "solution": "\\boxed{3}", "answer": "3.0", "level": 2, "subject": "Geometry"}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "test.jsonl").write_text(json.dumps(NEW))
    return tmp_path


def test_a_row_is_a_problem(place):
    (problem,) = load("hendrycks_math", "test", path=place)
    assert problem.prompt == "Problem: What is 1+2?\nPut the final answer into \\boxed{}.\nSolution:"
    assert problem.answer == "3.0"
    assert problem.info == {
        "question": "What is 1+2?", "solution": "\\boxed{3}", "level": 2, "subject": "Geometry", "shots": [],
        "stop": ["\n\nProblem:"],
    }  # fmt: skip


def test_without_an_answer_the_gold_is_in_the_box(place):
    problems = [*load("hendrycks_math", "train", path=place), *load("hendrycks_math", "validation", path=place)]
    assert len(problems) == 40
    for problem in problems:
        n = int(problem.info["question"].split("+")[1].rstrip("?"))
        assert problem.answer == str(2 * n)
        assert problem.info["level"] == 1 + n % 5 and problem.info["subject"] == ROWS[n]["type"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [("level=2", lambda n: n % 5 == 1), ("level=2-4", lambda n: n % 5 in (1, 2, 3))]
    + [("subject=algebra", lambda n: n % 2 == 0), ("subject=counting_&_probability", lambda n: n % 2 == 1)]
    + [("subject=Algebra+counting and probability,level=5", lambda n: n % 5 == 4)],
)
def test_levels_and_subjects_are_chosen(place, options, kept):
    found = [p for split in ("train", "validation") for p in load("hendrycks_math", split, path=f"{place}:{options}")]
    assert sorted(int(p.answer) // 2 for p in found) == [n for n in range(40) if kept(n)]


def test_exemplars_come_from_train_and_are_not_asked(place):
    asked = load("hendrycks_math", "train", path=place, num_shots=2)
    shots = asked[0].info["shots"]
    assert len(asked) == len(load("hendrycks_math", "train", path=place)) - 2
    assert not {shot["question"] for shot in shots} & {problem.info["question"] for problem in asked}
    (problem,) = load("hendrycks_math", "test", path=place, num_shots=2)
    first = (
        f"Problem: {shots[0]['question']}\nPut the final answer into \\boxed{{}}.\nSolution: {shots[0]['solution']}\n\n"
    )
    assert problem.prompt.startswith(first + "Problem: ") and problem.info["shots"] == shots
    assert problem.prompt.count("Problem: ") == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "data_path: data 'hendrycks_math' needs a file"),
        ("{}:level=6", "level=6 must be a whole number from 1 to 5"),
    ]
    + [("{}:subject=art", "subject 'art' is not one of Algebra, Counting & Probability")]
    + [("{}:size=3", "'size' in .* is not one of level, subject"), ("{}/none", "none.* cannot be read")],
)
def test_a_wrong_path_is_one_sentence(place, path, message):
    with pytest.raises(ValueError, match=message):
        load("hendrycks_math", "train", path=path and path.format(place))


@pytest.mark.parametrize(
    ("row", "message"),
    [({"problem": "x"}, "line 1: 'solution' must be a string, not None; its fields are 'problem'")]
    + [({"problem": "x", "solution": "\\boxed{3"}, "line 1: there is no 'answer', and no closed")]
    + [({"problem": "x", "solution": "3", "answer": 3}, "line 1: there is no 'answer'")],
)
def test_a_row_of_another_form_is_named(tmp_path, row, message):
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        load("hendrycks_math", "test", path=tmp_path)


@pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="GRPO_TEST_DATA names no folder of real data")
def test_the_real_file_has_500_problems_of_all_levels_and_subjects():
    place = Path(os.environ["GRPO_TEST_DATA"]) / "math500"
    problems = load("hendrycks_math", "test", path=place)
    assert len(problems) == 500 and {p.info["level"] for p in problems} == {1, 2, 3, 4, 5}
    hard = load("hendrycks_math", "test", path=f"{place}:level=4-5,subject=Number Theory+geometry")
    assert 20 < len(hard) < 103 and {p.info["subject"] for p in hard} == {"Number Theory", "Geometry"}
    with pytest.raises(ValueError, match=r"train\.jsonl cannot be read .*the directory holds LICENSE, test\.jsonl"):
        load("hendrycks_math", "train", path=place)
