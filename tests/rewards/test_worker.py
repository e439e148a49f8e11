"""`worker.grade`: whatever a reward does short of ending its process becomes a value or a reason."""

import math
import signal
import sys
from fractions import Fraction

import numpy as np
import pytest

from data.problem import Problem
from rewards import worker
from rewards.worker import grade

PROBLEM = Problem("", "18", {})


@pytest.mark.parametrize(
    ("returned", "value"),
    [(0.5, 0.5), (2, 2.0), (True, 1.0), (False, 0.0), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (np.bool_(True), 1.0)]
    + [(np.array(0.25), 0.25), (Fraction(1, 4), 0.25), (-0.0, 0.0)],
)
def test_a_number_of_any_kind_is_a_float(returned, value):
    reply = grade(lambda completion, problem: returned, "", PROBLEM)
    assert reply == (value, "", "")
    assert type(reply[0]) is float


@pytest.mark.parametrize(
    ("returned", "reason"),
    [(None, "returned_none"), ("1.0", "not_a_number"), (b"1", "not_a_number"), ([1.0], "not_a_number")]
    + [(1j, "not_a_number"), (object(), "not_a_number"), (np.zeros(2), "not_a_number"), (10**400, "not_a_number")]
    + [(math.nan, "not_finite"), (math.inf, "not_finite"), (np.float32("-inf"), "not_finite")],
    ids=lambda given: type(given).__name__,
)
def test_c35_no_finite_number_is_no_value(returned, reason):
    value, given, message = grade(lambda completion, problem: returned, "", PROBLEM)
    assert (value, given) == (None, reason)
    assert message.startswith("returned")


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize("error", [ZeroDivisionError("0"), SystemExit(1), KeyboardInterrupt(), Unprintable()], ids=repr)
def test_c35_what_raises_is_named_with_its_line(error):
    def reward(completion, problem):
        raise error

    value, reason, message = grade(reward, "", PROBLEM)
    assert (value, reason) == (None, "raised")
    assert type(error).__name__ in message
    assert f"{__file__}, line {reward.__code__.co_firstlineno + 1}" in message


def test_c35_endless_recursion_is_one_failed_call():
    def reward(completion, problem):
        return reward(completion, problem)

    depth = sys.getrecursionlimit()
    value, reason, message = grade(reward, "", PROBLEM)
    assert (value, reason, depth) == (None, "raised", sys.getrecursionlimit())
    assert "RecursionError" in message and len(message) < 1000


def test_the_reward_gets_the_text_and_the_problem_as_they_are():
    assert grade(lambda completion, problem: completion == " a\r\n" and problem is PROBLEM, " a\r\n", PROBLEM)[0] == 1.0


def test_the_alarm_is_set_during_a_call_only():
    def reward(completion, problem):
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL  # whatever an earlier reward left there
        return signal.getitimer(signal.ITIMER_REAL)[0]

    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        value, _, message = worker._call_within(50.0, reward, "", PROBLEM)
        assert message == "" and 0.0 < value <= 50.0
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize(
    ("name", "number"),
    [("", 1), ("a b", 1), ("\ud800", 1), (None, 1), ("a" * 65, 1), ("a", "x"), ("a", None), ("a", 1j)],
)
def test_what_can_not_be_reported_is_an_error_of_the_reward(name, number):
    reported = {}
    with pytest.raises(ValueError, match="log_metric: "):
        worker._report(reported, name, number)
    worker._report(reported, "a", 10**400)
    assert reported == {}
