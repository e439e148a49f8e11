"""The child that holds the expected values. It asks the program's process for answers, and it alone says a verdict.

What comes from the program is plain data. After an answer that makes no sense, or none at all, the remaining tests
fail. The code of the tests is the data's own and is trusted; it runs under the same seal. Left out: the program.
"""

import ast
import builtins
import importlib
import io
import json
import random
import sys
import traceback
import types
import unittest
from collections.abc import Callable, Sequence
from typing import Any

from rewards.sandbox import wire
from rewards.sandbox.equal import equal_values
from rewards.sandbox.program import LINK, OUT, read_task
from rewards.sandbox.shown import apart, short, shown

SCORE = "__score__"
"""The name under which the tests' code finds what counts a passed test."""
NOT_RAISED = (StopIteration, StopAsyncIteration, UnicodeError)
"""Exceptions of the program that become a RuntimeError. Those of Unicode want five arguments."""
UNASKED = object()
"""The last answer of a program that was not asked."""


class Lost(BaseException):
    """The program's process is gone, or answers nonsense."""


class Solution:
    """The program in the other process.

    Attributes:
      ready: it was defined.
      lost: it is gone, or has answered nonsense.
      last: its last answer: a value, or the exception that it raised.
    """

    def __init__(self) -> None:
        """Wait until it is defined."""
        self.lost = False
        self.last: Any = UNASKED
        try:
            self.ready = wire.receive(LINK) == {"ready": True}
        except Exception:
            self.ready = False
        self.lost = not self.ready

    def call(self, name: str, args: Sequence, kwargs: dict) -> Any:
        """The value of one of its functions. Raises what that raised if it is built in, and `Lost` from its end on."""
        if self.lost:
            raise Lost
        call = {"name": name, "args": [wire.encode(arg) for arg in args]}
        call["kwargs"] = {key: wire.encode(value) for key, value in kwargs.items()}
        try:
            wire.send(LINK, call)
            answer = wire.receive(LINK)
            if "raised" not in answer:
                value = wire.decode(answer["value"])
                changed = [wire.decode(arg) for arg in answer.get("args", [])]
        except Exception as nonsense:
            self.lost = True
            raise Lost from nonsense
        if "raised" in answer:
            self.last = _built_in(answer["raised"])(str(answer.get("message", "")))
            raise self.last
        self.last = value
        if value is None:
            for mine, theirs in zip(args, changed, strict=False):
                _replace(mine, theirs)
        return value

    def function(self, name: str) -> Callable:
        """What the tests call in its place."""

        def proxy(*args, **kwargs):
            return self.call(name, args, kwargs)

        proxy.__name__ = proxy.__qualname__ = name
        return proxy


def main() -> None:
    """Read the tests, and say what became of each.

    That is {"passed": one bool for each test, "whole", "ready", "failed": the first that failed and how, in words}.
    """
    task = json.loads(read_task())
    random.seed(task["seed"])
    solution, tests = Solution(), task["tests"]
    try:
        run = run_calls if tests["kind"] == "call" else run_asserts
        passed, whole, failed = run(tests, solution)
    except Lost:
        passed, whole, failed = [], False, ""
    whole = whole and not solution.lost
    wire.send(OUT, {"passed": passed, "whole": whole, "ready": solution.ready, "failed": failed})


def run_calls(tests: dict, solution: Solution) -> tuple[list[bool], bool, str]:
    """Make calls. Returns as `run_asserts`."""
    passed, failed = [], ""
    for case in tests["cases"]:
        solution.last = UNASKED
        passed.append(_returns(solution, tests["entry_point"], case))
        if not passed[-1] and not failed:
            got = apart(solution.last, case["result"]) if _has_value(solution) else _trouble(solution, None)
            failed = f"test {len(passed)}, {_call(tests['entry_point'], len(passed) - 1)}: {got}"
    return passed, all(passed), failed


def _call(name: str, number: int) -> str:
    """A call as it was made, in words. It is read again, since the program may have changed its arguments."""
    case = json.loads(read_task())["tests"]["cases"][number]
    given = [*map(repr, case["args"]), *(f"{key}={value!r}" for key, value in case.get("kwargs", {}).items())]
    return short(f"{name}({', '.join(given)})")


def _has_value(solution: Solution) -> bool:
    return not solution.lost and solution.last is not UNASKED and not isinstance(solution.last, Exception)


def _trouble(solution: Solution, error: BaseException | None) -> str:
    """Why a test failed, in words. `error`: what ended it, which may be of the test's own making."""
    if solution.lost:
        return "no answer"
    if isinstance(solution.last, Exception):
        return f"raised {shown(solution.last)}"
    if _has_value(solution) and isinstance(error, AssertionError):
        return f"got {shown(solution.last)}"
    return "the call failed" if error is None else f"the test raised {shown(error)}"


def _returns(solution: Solution, name: str, case: dict) -> bool:
    """Whether a call gives the expected result."""
    try:
        return equal_values(solution.call(name, case["args"], case.get("kwargs", {})), case["result"])
    except (Lost, Exception):
        return False


def run_asserts(tests: dict, solution: Solution) -> tuple[list[bool], bool, str]:
    """Execute asserts.

    Each statement that asserts something about the program is one test, at the top of the code or of a function
    `check`. The others run as they are. A function `test_...` that does so is called, and is one test as a whole.

    Returns:
        Whether each test passed, whether all did and nothing else raised, and the first that failed, in words.
    """
    names = set(tests["names"])
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    score: dict[int, bool] = {}
    count, failed = 0, ""

    def note(test: int, good: bool) -> None:
        nonlocal failed
        good = good and not solution.lost
        score[test] = score.get(test, True) and good
        if not good and not failed:
            failed = f"test {test + 1}, {_failure(tests['code'], solution, sys.exception())}"
        solution.last = UNASKED

    try:
        exec(compile(tests["setup"], "<setup>", "exec", dont_inherit=True), space)
        tree = ast.parse(tests["code"])
        count = _count_apart(tree, names)
        proxies = {name: solution.function(name) for name in names}
        space |= proxies
        sys.modules["solution"] = types.SimpleNamespace(**proxies)  # for tests that import from it
        sys.modules.setdefault("pytest", types.SimpleNamespace(raises=unittest.TestCase().assertRaises))
        space[SCORE] = note
        exec(compile(tree, "<tests>", "exec", dont_inherit=True), space)
        done = True
    except (Lost, Exception, SystemExit) as error:
        done, failed = False, failed or _failure(tests["code"], solution, error)
    done = done and not solution.lost
    passed = [score.get(test, False) for test in range(count)] or [done]
    return passed, done and all(passed), failed


def _failure(code: str, solution: Solution, error: BaseException | None) -> str:
    """The statement of the tests that raised an error, and how, in words."""
    trace = traceback.walk_tb(error.__traceback__ if error else None)
    lines = [line for frame, line in trace if frame.f_code.co_filename == "<tests>"]
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    around = [node for node in nodes if lines and node.lineno <= lines[-1] <= (node.end_lineno or 0)]
    if not around:
        return _trouble(solution, error)
    statement = min(around, key=lambda node: (node.end_lineno or 0) - node.lineno)

    def source(node: ast.AST) -> str:
        return short(ast.get_source_segment(code, node) or "")

    match statement:
        case ast.Assert(ast.Compare(left, [ast.Eq()], [right])):  # both sides are short, so neither hides the other
            words = f"assert {source(left)} == {source(right)}"
        case _:
            words = source(statement)
    return f"{words}: {_trouble(solution, error)}"


def _count_apart(tree: ast.Module, names: set[str]) -> int:
    """Put a `try` around each statement that is one test. Returns how many there are."""
    count = 0

    def framed(statement: ast.stmt) -> ast.stmt:
        nonlocal count
        score = f"except Exception: {SCORE}({count}, False)\nelse: {SCORE}({count}, True)"
        frame = ast.parse(f"try: pass\n{score}").body[0]
        frame.body, count = [statement], count + 1
        return frame

    def apart(body: list[ast.stmt], known: set[str]) -> list[ast.stmt]:
        changed = []
        for statement in body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "check":
                statement.body = apart(statement.body, known | {arg.arg for arg in statement.args.args})
            elif not isinstance(statement, ast.FunctionDef | ast.ClassDef) and _is_test(statement, known):
                statement = framed(statement)
            changed.append(statement)
        return changed

    tree.body = apart(tree.body, names)
    for statement in list(tree.body):
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test") and _is_test(statement, names):
            tree.body.append(framed(ast.parse(f"{statement.name}()").body[0]))
    ast.fix_missing_locations(tree)
    return count


def _is_test(statement: ast.stmt, names: set[str]) -> bool:
    nodes = list(ast.walk(statement))
    return any(isinstance(node, ast.Assert) for node in nodes) and any(
        isinstance(node, ast.Name) and node.id in names for node in nodes
    )


def _built_in(name: object) -> type[Exception]:
    """The exception of that name, if it is an ordinary one of Python's own; else RuntimeError.

    StopIteration is none: it would end `map` in `all(map(f, xs))` before anything was looked at.
    """
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    good = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_RAISED)
    return kind if good else RuntimeError


def _replace(mine: Any, theirs: Any) -> None:
    """Make an argument what the program has made of its copy."""
    if type(mine) is type(theirs) and isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif type(mine) is type(theirs) and isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)


def accepts(code: str, given: str, expected: str, printed: str) -> bool:
    """Whether the data's own program, called with three files as `data/code.py` says, prints 1.

    The files are texts in memory, as there are no others behind the seal. `run_trusted` calls this in a process of its
    own, where nothing of the judged program is.
    """
    files = {"input.txt": given, "correct_output.txt": expected, "solution_output.txt": printed}

    def opened(name: Any, mode: str = "r", *_, **__) -> io.StringIO | io.BytesIO:
        text = files[str(name)]
        return io.BytesIO(text.encode()) if "b" in mode else io.StringIO(text)

    builtins.open = io.open = opened
    sys.argv, sys.stdout = ["checker.py", *files], io.StringIO()
    try:
        exec(compile(code, "<checker>", "exec", dont_inherit=True), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code:
            return False
    return sys.stdout.getvalue().strip() == "1"


def function() -> None:
    """Call a trusted function on texts that are not: {"value": what it returns} or {"raised": its error, in words}."""
    task = json.loads(read_task())
    module, _, name = task["function"].partition(":")
    try:
        if module not in sys.modules:
            importlib.import_module(module)
        answer = {"value": getattr(sys.modules[module], name)(*task["args"])}
        wire.send(OUT, answer)
    except Exception as error:
        wire.send(OUT, {"raised": f"{type(error).__name__}: {error}"[:500]})
