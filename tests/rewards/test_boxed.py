r"""Rewards of answers in `\boxed{}`: the form, what counts as an answer, hostile texts, and every gold of MATH-500."""

import os
import signal
from itertools import pairwise

import pytest

import data
from data.problem import Problem
from rewards import boxed, sandbox
from tests.fakes.sealing import only_here

linux = only_here
real = pytest.mark.skipif("GRPO_TEST_DATA" not in os.environ, reason="GRPO_TEST_DATA names no folder of real data")


def problem(gold, question="What is it?"):
    return Problem("", gold, {"question": question})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{4}", 0.5),
        (r"so $x = \boxed{\frac{1}{2}}$.", 0.5),
        (r"\[\boxed{4}\]", 0.5),
        (r"\boxed{4}\)" + " \n", 0.5),
    ]
    + [("\\boxed{4}.\n\\end{align*}", 0.5), (r"\boxed{4} apples", 0.0), (r"\boxed{4} \boxed{4}", 0.0), ("4", 0.0)]
    + [
        (r"\boxed{}", 0.0),
        (r"\boxed{4", 0.0),
        (r"\boxed{1} \boxed{4", 0.0),
        ("\\boxed{4}\nProblem: 2", 0.0),
        ("", 0.0),
    ],
)
def test_format_is_one_box_at_the_end(text, value):
    assert boxed.format(text, problem("4")) == value


NUMBERS = ["4", "-4", "+4", "4.5", ".5", "10,080", r"10,\!080", r"\frac{3}{4}", r"-\frac34", r"\dfrac{33}{100}", "3/4"]
NUMBERS += [r"1\frac{4}{5}", r"137 \frac{1}{2}", r"\$18.90", "$5$", r"50\%", "50%", r"90^\circ", r"90^{\circ}", "x=5"]
NUMBERS += [r"x = -\frac{1}{2}", r"15\mbox{ cm}^2", r"5.4 \text{ cents}", r"6.72 \times 10^{-5}", r"3 \cdot 10^5", "0"]
FORMULAS = [
    r"17 \cdot 23",
    "17*23",
    "2^{10}",
    "10!",
    "1+2",
    "8/2",
    r"\frac{8}{2}",
    r"\frac{6}{8}",
    "4/1",
    r"\sqrt{16}",
    "x",
]
FORMULAS += [
    "",
    "1, 2",
    "(1,2)",
    r"\binom{5}{2}",
    r"12 \times 10^5",
    "1 2",
    r"2 \frac{1}{2} + 1",
    "3,4",
    r"\frac{1}{2}\pi",
]
FORMULAS += ["x=y=5", "5=x", "2x", "1e5", "--4", r"\text{five}", "3 = 4", r"\frac{0}{2}", r"1\cdot2"]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_with_what_stands_around_it(text):
    assert boxed.is_number(text)


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_no_number(text):
    assert not boxed.is_number(text)


AGAIN = [
    ("391", r"17 \cdot 23", "Compute $17 \\cdot 23$.", False),
    ("391", "391", "Compute $17 \\cdot 23$.", True),
    ("391", "392", "Compute $17 \\cdot 23$.", True),
    ("3\\sqrt{13}", r"\sqrt{117}", "Simplify $\\sqrt{117}$.", False),
    ("3\\sqrt{13}", r"\sqrt {117}", "Simplify $\\sqrt{117}$.", False),
    ("3\\sqrt{13}", r"3 \sqrt{13}", "Which is larger, $3\\sqrt{13}$ or 10?", True),
    ("3\\sqrt{13}", r"\sqrt{117}", "How far is it?", True),
    ("x^2+2x+1", "(x+1)^2", "Expand $(x+1)^2$.", False),
    ("\\frac{1}{2}", "1/2", "Is it 1/2 or 1/3?", True),
    ("\\text{(C)}", "C", "(A) 1 (B) 2 (C) 3", True),
    ("2000", r"2 \times 10^3", "Write $2 \\times 10^3$ in full.", False),
    ("2000", r"2 \times 10^3", "How many?", True),
    ("4", "9" * 400, "How many?", False),
]


@pytest.mark.parametrize(("gold", "answer", "question", "accepted"), AGAIN)
def test_the_question_is_no_answer_to_itself(gold, answer, question, accepted):
    assert boxed._is_an_answer(answer, problem(gold, question)) is accepted


VERDICTS = [
    ("\\frac{1}{2}", "0.5", 1.0), ("\\frac{1}{2}", "1/2", 1.0), ("\\frac{1}{2}", "0.4", 0.0),
    ("3\\sqrt{13}", "\\sqrt{117}", 1.0), ("(3,4]", "(3, 4]", 1.0), ("(3,4]", "(3, 4)", 0.0),
    ("\\text{Evelyn}", "Evelyn", 1.0), ("x^2+2x+1", "1+2x+x^2", 1.0),
    ("391", "17 \\cdot 23", 0.0), ("391", "391", 1.0), ("10080", "10,\\!080", 1.0), ("5", "x=5", 1.0), ("5", "6", 0.0),
    ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}, 1 - \\sqrt{19}", 1.0), ("", "", 0.0),
]  # fmt: skip


@linux
@pytest.mark.parametrize(("gold", "answer", "right"), VERDICTS)
def test_values_are_compared_and_not_texts(gold, answer, right):
    assert boxed.math_verify(f"So it is $\\boxed{{{answer}}}$.", problem(gold)) == right


@linux
def test_without_a_closed_box_there_is_nothing():
    for text in ("4", r"\boxed{4", r"\boxed{4} or \boxed{", ""):
        assert boxed.math_verify(text, problem("4")) == 0.0


HOSTILE = ["9^{9^{9^{9}}}", "((9!)!)!", "(10^6)!", "\\binom{10^9}{5 \\cdot 10^8}", "\\sum_{n=1}^{1000000000} n^n"]
HOSTILE += ["\\sin(" * 60 + "x" + ")" * 60, "(" * 140 + "1" + ")" * 140, "{" * 100 + "1" + "}" * 100]
HOSTILE += ["\\frac{1}{" * 20 + "x" + "}" * 20, "\\int_0^1 x^{x^{x^x}} dx", "x^{" * 40 + "x" + "}" * 40]
HOSTILE += ["__import__('os').system('touch owned')", "\\text{exec}('1')", "\x00", "\\\\" * 100]


@linux
@pytest.mark.parametrize("answer", HOSTILE[:1] + HOSTILE[-4:])
def test_a_hostile_text_earns_nothing_and_harms_nobody(answer, tmp_path):
    before = signal.getitimer(signal.ITIMER_REAL)
    assert boxed.math_verify(f"\\boxed{{{answer}}}", problem("\\sqrt{2}")) == 0.0
    assert signal.getitimer(signal.ITIMER_REAL) == before and not list(tmp_path.iterdir())
    assert boxed.math_verify("\\boxed{\\sqrt{2}}", problem("\\sqrt{2}")) == 1.0


@linux
@pytest.mark.slow
@pytest.mark.parametrize("answer", HOSTILE)
def test_every_hostile_text_ends_at_its_limit(answer):
    assert boxed.math_verify(f"\\boxed{{{answer}}}", problem("\\sqrt{2}")) == 0.0


@linux
def test_the_alarm_of_the_worker_goes_on():
    """Math-Verify's own limits are alarms: called in the worker, they would end the worker's."""
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        assert boxed.math_verify(r"\boxed{4}", problem("4")) == 1.0
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@linux
def test_preparing_starts_the_sandbox_and_says_so_or_names_what_is_missing(monkeypatch):
    assert boxed.prepare()["sandbox"] == sandbox.described(sandbox.box(boxed.PRELOAD))
    monkeypatch.setattr(boxed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package math-verify: pip install 'grpo\[math\]'"):
        boxed.prepare()


@real
def test_every_gold_of_math_500_is_an_answer_and_no_number_is_missed():
    problems = data.load("hendrycks_math", "test", path=os.path.join(os.environ["GRPO_TEST_DATA"], "math500"))
    assert all(boxed._is_an_answer(problem.answer, problem) for problem in problems)
    assert sum(boxed.is_number(problem.answer) for problem in problems) == 401
    numbers = [p for p in problems if p.answer.lstrip("-").isdigit()]
    assert len(numbers) == 311 and all(boxed.is_number(p.answer) for p in numbers)
    assert sum(boxed.format(problem.info["solution"], problem) for problem in problems) / 0.5 == 345


@linux
@real
@pytest.mark.slow
def test_every_solution_of_math_500_is_right_and_the_answer_to_the_next_problem_is_not():
    problems = data.load("hendrycks_math", "test", path=os.path.join(os.environ["GRPO_TEST_DATA"], "math500"))
    for problem, other in pairwise([*problems, problems[0]]):
        assert boxed.math_verify(problem.info["solution"], problem) == 1.0, problem.answer
        assert boxed.math_verify(f"\\boxed{{{problem.answer}}}", problem) == 1.0, problem.answer
        taken = boxed.math_verify(f"\\boxed{{{other.answer}}}", problem)
        same = other.answer.removeprefix("x=") == problem.answer.removeprefix("x=")
        assert taken == float(same), (problem.answer, other.answer)
