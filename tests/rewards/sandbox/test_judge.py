"""Verdicts on programs, in a real box: right and wrong ones, and those that hang, crash, flood or leave early."""

import sys
from types import SimpleNamespace

import pytest

from rewards import sandbox
from rewards.sandbox.client import Box, Child, Ended
from rewards.sandbox.judge import judge, wall_of
from tests.fakes.sealing import only_here

pytestmark = only_here
SUM = {"kind": "stdin", "cases": [{"input": "1 2", "output": "3"}, {"input": "5 -5", "output": "0\n"}]}
SQUARE = {"kind": "call", "entry_point": "f", "cases": [{"args": [2], "result": 4}, {"args": [3], "result": 9}]}


@pytest.fixture(scope="module")
def box():
    with Box() as started:
        yield started


def facts(verdict) -> tuple:
    return verdict.compiled, verdict.ran, verdict.passed, verdict.correct, verdict.reason


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", (True, True, 1.0, True, "")),
        ("print(3)", (True, True, 0.5, False, "wrong")),
        ("import sys\nprint(3)\nsys.exit(0)", (True, True, 0.5, False, "wrong")),
        ("print(3)\n1 / 0", (True, False, 0.0, False, "raised")),
        ("print(3)\nexit(1)", (True, False, 0.0, False, "raised")),
        ("def", (False, False, 0.0, False, "does not compile")),
        ("\ud800", (False, False, 0.0, False, "does not compile")),
        ("import os\nos.abort()", (True, False, 0.0, False, "killed")),
        ("while True: print('3' * 10000)", (True, False, 0.0, False, "printed too much")),
        ("if input() == '1 2': print(3)\nelse:\n    while True: pass", (True, False, 0.5, False, "too slow")),
        ("import time\ntime.sleep(60)", (True, False, 0.0, False, "too slow")),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
         (True, False, 0.0, False, "too slow")),
    ],
)  # fmt: skip
def test_a_script_on_its_inputs(box, program, expected):
    assert facts(judge(box, program, SUM, 0.5)) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x): return x * x", (True, True, 1.0, True, "")),
        ("class Solution:\n    def f(self, x): return x * x", (True, True, 1.0, True, "")),
        ("def f(x): return 4", (True, True, 0.5, False, "wrong")),
        ("def f(x): return 4 if x == 2 else 1 / 0", (True, True, 0.5, False, "wrong")),
        ("def f(x):\n    while x > 2: pass\n    return 4", (True, True, 0.5, False, "too slow")),
        ("import time\ndef f(x): time.sleep(60 * (x - 2)); return 4", (True, True, 0.5, False, "too slow")),
        ("def f(x):\n    if x > 2: exit()\n    return 4", (True, True, 0.5, False, "wrong")),
        ("import os\ndef f(x):\n    if x > 2: os._exit(0)\n    return 4", (True, True, 0.5, False, "wrong")),
        ("def g(x): return x * x", (True, True, 0.0, False, "wrong")),
        ("1 / 0", (True, False, 0.0, False, "raised")),
        ("def f(x:", (False, False, 0.0, False, "does not compile")),
        ("while True: pass", (True, False, 0.0, False, "too slow")),
    ],
)
def test_a_function_and_its_calls(box, program, expected):
    assert facts(judge(box, program, SQUARE, 0.5)) == expected


CHECK = """
def check(candidate):
    assert True, "says nothing about the program"
    assert candidate([3, 1, 2]) == [1, 2, 3]
    xs = [2, 1]
    for n in range(3):
        assert candidate(list(range(n))) == list(range(n))
    try:
        candidate(None)
        assert False
    except TypeError:
        pass
check(order)
"""


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def order(xs): return sorted(xs)", 3),
        ("def order(xs): return xs if xs != [3, 1, 2] else None", 1),  # None is not sorted, and None raises nothing
        ("def order(xs): return [1, 2, 3]", 1),
        ("def order(xs): raise TypeError", 1),
        ("def order(xs): raise SystemExit", 0),
        ("class E(TypeError): pass\ndef order(xs): raise E", 1),
    ],
)
def test_each_statement_that_asserts_something_of_the_program_is_one_test(box, program, passed):
    verdict = judge(box, program, {"kind": "asserts", "code": CHECK, "names": ["order"], "setup": ""}, 1.0)
    assert (verdict.passed, verdict.correct) == (passed / 3, passed == 3)


def test_asserts_without_a_function_check_and_with_setup(box):
    tests = {"kind": "asserts", "names": ["f", "g"], "setup": "import math\ndef helper(x): return x"}
    tests["code"] = "assert f(1) == math.floor(1.5)\nassert helper(g(2)) == 4\ny = g(3)\nassert y == 6"
    assert judge(box, "def f(x): return x\ndef g(x): return 2 * x", tests, 1.0).correct
    verdict = judge(box, "def f(x): return x\ndef g(x): return 4", tests, 1.0)
    assert (verdict.passed, verdict.correct) == (1.0, False)  # the last statement is part of no test, and raised


PYTEST = """
import pytest
from solution import half

def test_even():
    assert half(4) == 2
    assert half(0) == 0

def test_odd():
    with pytest.raises(ValueError):
        half(3)
    assert half(2) == 1
"""


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def half(x):\n    if x % 2: raise ValueError\n    return x // 2", 2),
        ("def half(x): return x // 2", 1),
        ("def half(x): return 2", 0),
        ("def half(x): raise ValueError", 0),
        ("def half(x): exit()", 0),
        ("import sys\nsys.modules['pytest'] = sys.modules['solution']\ndef half(x): return True", 0),
    ],
)
def test_functions_of_pytest_are_called_and_each_is_one_test(box, program, passed):
    verdict = judge(box, program, {"kind": "asserts", "code": PYTEST, "names": ["half"], "setup": ""}, 1.0)
    assert (verdict.passed, verdict.correct) == (passed / 2, passed == 2)


DIVISOR = """
import sys
from pathlib import Path

def main():
    n, d = int(open(sys.argv[1]).read()), int(Path(sys.argv[3]).read_text())
    assert open(sys.argv[2], "rb").read() == b"2"
    print(int(1 < d < n and n % d == 0))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("program", "facts_"),
    [
        ("print(2)", (1.0, True, "")),
        ("print(int(input()) // 2)", (1.0, True, "")),
        ("print(4)", (0.5, False, "wrong")),
        ("print('1\\n1')", (0.0, False, "wrong")),  # what the checker can not read is wrong
        ("", (0.0, False, "wrong")),
        ("print(2)\n1 / 0", (0.0, False, "raised")),
        ("import sys\nsys.stdout.buffer.write(b'\\xff')", (0.0, False, "wrong")),
        ("import builtins\nbuiltins.int = lambda *_: 2\nprint(5)", (0.0, False, "wrong")),
    ],
)
def test_a_checker_of_the_data_says_which_outputs_are_right(box, program, facts_):
    cases = [{"input": n, "output": "2"} for n in ("12", "14")]
    verdict = judge(box, program, {"kind": "stdin", "cases": cases, "checker": DIVISOR}, 1.0)
    assert (verdict.passed, verdict.correct, verdict.reason) == facts_


@pytest.mark.parametrize(
    "checker",
    ["print(0)", "print(11)", "", "1 / 0", "print(1)\nexit(1)", "while True: pass", "import os\nos._exit(0)",
     "print(1); open('/etc/passwd')", "print(1)\nimport socket\nsocket.socket()"],
)  # fmt: skip
def test_a_checker_that_does_not_end_with_1_accepts_nothing(box, checker):
    cases = [{"input": "", "output": "3"}] * 2
    verdict = judge(box, "print(3)", {"kind": "stdin", "cases": cases, "checker": checker}, 0.5)
    assert (verdict.ran, verdict.passed, verdict.correct) == (True, 0.0, False)


def test_arguments_come_back_only_from_a_call_that_returns_none(box):
    tests = {"kind": "asserts", "names": ["f"], "setup": "", "code": "xs = [2, 1]\nf(xs)\nassert f and xs == [1, 2]"}
    assert judge(box, "def f(xs): xs.sort()", tests, 1.0).correct
    tests["code"] = "xs = [2, 1]\nassert f(xs) == sorted(xs)"
    assert not judge(box, "def f(xs):\n    xs.clear()\n    return []", tests, 1.0).correct


def test_a_test_that_swallows_everything_does_not_hide_a_lost_program(box):
    code = "try:\n    f(1)\nexcept:\n    pass\nassert 1 or f\nassert 2 or f"
    tests = {"kind": "asserts", "names": ["f"], "setup": "", "code": code}
    verdict = judge(box, "import os\ndef f(x): os._exit(0)", tests, 1.0)
    assert (verdict.passed, verdict.correct) == (0.0, False)


def test_a_program_can_not_end_the_loop_of_a_test(box):
    tests = {"kind": "asserts", "names": ["f"], "setup": "", "code": "assert all(map(f, [1, 2]))"}
    assert not judge(box, "def f(x): raise StopIteration", tests, 1.0).correct


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("'\\x1b[2J\\n1 problems; of 1 solutions 0 fail'", r"got '\x1b[2J\n1 problems; of 1 solutions 0 fail'"),
        ("type('\\x1b[2J\\n' + 99 * 'x', (), {})()", f"got <an object of the program:  [2J {'x' * 25}..."),
        ("10 ** 9999", "got <int that can not be written>"),
        ("'x' * 10 ** 6", f"got '{'x' * 56}..."),
    ],
)
def test_what_a_program_says_is_quoted_short_and_printable_and_changes_no_verdict(box, said, shown):
    program = f"def f(x): return {said} if x == 2 else x * x"
    verdict = judge(box, program, SQUARE, 2.0)
    assert facts(verdict) == (True, True, 0.5, False, "wrong")
    assert verdict.failed == f"test 1, f(2): {shown}, expected 4"
    asserts = {"kind": "asserts", "code": "assert f(2) == 4\nassert f(3) == 9", "names": ["f"], "setup": ""}
    verdict = judge(box, program, asserts, 2.0)
    assert facts(verdict) == (True, True, 0.5, False, "wrong")
    assert verdict.failed == f"test 1, assert f(2) == 4: {shown}"
    assert judge(box, "def f(x): return x * x", asserts, 2.0).failed == ""


def test_no_test_is_no_pass_and_an_unknown_kind_is_named(box):
    assert not judge(box, "", {"kind": "stdin", "cases": []}, 1.0).correct
    assert not judge(box, "def f(): pass", {"kind": "call", "entry_point": "f", "cases": []}, 1.0).correct
    with pytest.raises(ValueError, match="the kind is 'pytest': must be one of stdin, call, asserts"):
        judge(box, "", {"kind": "pytest"}, 1.0)


def test_a_box_that_is_killed_is_started_again(box):
    before = box.process.pid
    box.process.kill()
    box.process.wait()
    assert judge(box, "print(sum(map(int, input().split())))", SUM, 1.0).correct and box.process.pid != before


def test_what_ends_the_box_twice_counts_as_killed(box, monkeypatch):
    def killed(self, *_):
        self.process.kill()
        while True:  # it may have answered before it was killed
            self._answer()

    monkeypatch.setattr(Box, "_watch", killed)
    (ended,) = box.run([Child("script", b"print(3)", 1.0, 3.0, b"")])
    assert (ended.status, ended.printed) == (-9, b"")


def test_trusted_functions_on_texts():
    assert sandbox.run_trusted("math:sqrt", [4], 1.0).value == 2.0
    assert sandbox.run_trusted("math:sqrt", ["x"], 1.0).failure.startswith("TypeError: must be real number")
    assert sandbox.run_trusted("math:factorial", [10**8], 0.5).failure == "too slow"
    assert "not permitted" in sandbox.run_trusted("builtins:eval", ["open('/etc/passwd')"], 1.0).failure
    assert sandbox.run_trusted("builtins:eval", ["__import__('os')._exit(3)"], 1.0).failure == "ended with status 3"
    assert sandbox.run_trusted("nowhere:f", [], 1.0).failure.startswith("ModuleNotFoundError")
    assert sandbox.run_trusted("rewards.gsm8k:one_number", ["1,080"], 1.0, ["rewards.gsm8k"]).value == 1080.0


def test_many_inputs_take_no_more_wall_time_than_one(monkeypatch):
    """A program that sleeps a little on each of 1,000 inputs would end the worker, and make its sample invalid."""
    passed = [0.0]
    monkeypatch.setattr(sys.modules[judge.__module__], "time", SimpleNamespace(monotonic=lambda: passed[0]))

    class Slow:
        def run(self, children):
            passed[0] += 0.9
            return [Ended(0, 0.0, False, b"3", b"compiled")]

    tests = {"kind": "stdin", "cases": [{"input": "", "output": "3"}] * 1000}
    verdict = judge(Slow(), "", tests, 1.0)
    assert passed[0] <= 3 * wall_of(1.0) + 1 and (verdict.correct, verdict.reason) == (False, "too slow")
