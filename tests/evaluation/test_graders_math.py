r"""The published graders of `\boxed{}`: their rules and their faults, case by case, and the gap to Math-Verify."""

import os
import sys

import pytest

import data
from data.problem import Problem
from grpo.evaluation.graders_math import GRADERS, LONGEST
from rewards import boxed

CASES = [  # gold, answer, right by Hendrycks, right by Minerva
    ("\\frac{1}{2}", "\\frac{1}{2}", True, True),
    ("\\frac{1}{2}", "\\frac12", True, True),
    ("\\frac{1}{2}", "\\dfrac{1}{2}", True, False),
    ("\\frac{1}{2}", "1/2", True, False),
    ("\\frac{1}{2}", "0.5", True, False),
    ("\\frac{1}{4}", "0.25", False, False),
    ("-\\frac{1}{2}", "-1/2", False, False),
    ("\\frac{1}{72}", "\\frac1{72}", True, False),
    ("2", "\\frac{4}{2}", False, False),
    ("3\\sqrt{13}", "3 \\sqrt{13}", True, True),
    ("11\\sqrt{2}", "11\\sqrt2", True, True),
    ("10080", "10,080", False, True),
    ("10,\\!080", "10080", False, True),
    ("10,\\!080", "10,080", True, True),
    ("5", "x=5", True, True),
    ("5", "xyz=5", False, True),
    ("x=5", "y=5", True, True),
    ("1=2", "3=2", True, True),
    ("5", "5\\%", True, False),
    ("5", "\\$5", True, True),
    ("90", "90^\\circ", True, True),
    ("5", "5 \\text{ cm}", True, True),
    ("5", "5\\mbox{ cm}", False, True),
    ("5", "5 \\text{ cm} \\text{ or so}", False, False),
    ("Evelyn", "\\text{Evelyn}", False, True),
    ("mid", "\\text{midpoints}", False, True),
    ("1,2", "1\\text{and}2", False, True),
    ("x+1", "1+x", False, False),
    ("(1,2)", "\\left( 1,2 \\right)", True, False),
    ("0.5", ".5", True, False),
    ("2", "2.0", False, False),
    ("\\sqrt", "\\sqrt", True, True),
    ("", "", True, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rules_and_faults_are_those_that_were_published(case):
    gold, answer, *right = case
    problem = Problem("", gold, {})
    text = f"So it is $\\boxed{{{answer}}}$."
    assert [GRADERS[name](text, problem) for name in ("hendrycks", "minerva")] == [
        (answer, verdict) for verdict in right
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", None),
        ("", None),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{\{1\}}", r"\{1\}"),
    ]
    + [(r"\boxed{\{1}", None), (r"\boxed 4$", None), (r"\fbox{4}", None), (r"\fbox{4} \boxed{5}", "5")],
)
@pytest.mark.parametrize("grader", GRADERS)
def test_the_last_box_is_read_as_published(grader, text, value):
    assert GRADERS[grader](text, Problem("", "?", {})) == (value, False)


@pytest.mark.parametrize("text", ["{", "}", r"\boxed{", "$", r"\boxed{$", r"\text{", "frac", "1,", r"\boxed{1}", "an "])
@pytest.mark.parametrize("grader", GRADERS)
def test_a_megabyte_is_graded_in_linear_time(grader, text):
    # Quadratic time on a million characters is hours, so that a failure shows as a test that does not end.
    for whole in (text * (10**6 // len(text)), "\\boxed{" + text * (10**6 // len(text)) + "}"):
        assert GRADERS[grader](whole, Problem("", "18", {}))[1] is False
    assert GRADERS[grader]("\\boxed{" + "1" * LONGEST + "}", Problem("", "1" * LONGEST, {}))[1] is True


@pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="GRPO_TEST_DATA names no folder of real data")
@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_all_agree_on_solutions_of_math_500_and_part_where_the_same_value_is_written_otherwise():
    problems = data.load("hendrycks_math", "test", path=os.path.join(os.environ["GRPO_TEST_DATA"], "math500"))
    for grader in GRADERS.values():
        assert all(grader(problem.info["solution"], problem)[1] for problem in problems)
    decimal = [p for p in problems if p.answer.isdigit()][:25]
    for problem in decimal:
        text = f"\\boxed{{{problem.answer}.0}}"
        assert [grader(text, problem)[1] for grader in GRADERS.values()] == [False, False]
        assert boxed.math_verify(text, problem) == 1.0
