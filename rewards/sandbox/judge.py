"""From a program and its tests to a verdict.

The expected values are never in a process that runs the program. CPU time decides; the wall time only stops a program
that sleeps, so verdicts do not change with the load of the machine. Left out: which numbers a reward makes of a
verdict (`rewards/code.py`).
"""

import hashlib
import json
import signal
import time
from dataclasses import dataclass

from rewards.sandbox.box import FAILED, LONGER, MOST_WALLS
from rewards.sandbox.client import Box, Child, Ended
from rewards.sandbox.equal import equal_texts
from rewards.sandbox.shown import LOOKED_AT, apart, shown

NOTHING = {"passed": [], "whole": False, "ready": False, "failed": ""}
"""What a checker that was ended before its verdict has said."""
KINDS = ("stdin", "call", "asserts")


@dataclass(frozen=True)
class Verdict:
    """What a program is worth.

    Attributes:
      compiled: it is Python.
      ran: each time it ran, it ended with exit code 0; or it could be called.
      passed: the share of the tests that it passed, 0..1.
      correct: it passed all tests, and nothing else went wrong.
      reason: why it is not correct, in a word; empty if it is.
      failed: the first test that it fails, in words for people, if that is known. It quotes the program.
    """

    compiled: bool = False
    ran: bool = False
    passed: float = 0.0
    correct: bool = False
    reason: str = ""
    failed: str = ""


def judge(box: Box, program: str, tests: dict, seconds: float) -> Verdict:
    """Run a program on its tests.

    Args:
      box: where.
      program: Python source.
      tests: `{"kind": "stdin", "cases": [{"input", "output"}], "checker"?}`, `{"kind": "call", "entry_point", "cases":
        [{"args", "kwargs"?, "result"}]}` or `{"kind": "asserts", "code", "names", "setup"}`.
      seconds: CPU seconds for all tests together, and as many for a checker of the data.

    Raises:
      ValueError: the tests are of none of these shapes.
      client.Dead: no box can be started.
    """
    if tests.get("kind") not in KINDS:
        raise ValueError(f"tests: the kind is {tests.get('kind')!r}: must be one of {', '.join(KINDS)}")
    source = program.encode("utf-8", "surrogatepass")
    if tests["kind"] == "stdin":
        return _on_inputs(box, source, tests, seconds)
    return _on_calls(box, source, tests, seconds)


def _on_inputs(box: Box, source: bytes, tests: dict, seconds: float) -> Verdict:
    """One process for each input. After the first that takes too long, the rest counts as failed."""
    cases, checker = tests["cases"], Checker(box, tests.get("checker"), seconds)
    compiled, ran, passed, reason, failed = False, True, 0, "", ""
    left, began = seconds, time.monotonic()
    end, last = began + wall_of(seconds), began + MOST_WALLS * wall_of(seconds)
    for number, case in enumerate(cases, start=1):
        wall = max(1.0, end - time.monotonic())
        (ended,) = box.run([Child("script", source, left, wall, case["input"].encode("utf-8", "surrogatepass"))])
        left -= ended.seconds
        compiled = compiled or ended.told == b"compiled"
        trouble = trouble_of(ended, left)
        ran = ran and not trouble
        asked = time.monotonic()
        if not trouble and checker.accepts(case, ended.printed):
            passed += 1
        else:
            reason = reason or trouble or "wrong"
            said = "" if trouble else _printed(ended, case, tests)
            failed = failed or f"test {number}, input {shown(case['input'])}{said}"
        end, last = (moment + time.monotonic() - asked for moment in (end, last))  # the checker's time is its own
        if trouble == "too slow" or not compiled or time.monotonic() > last or checker.left <= 0:
            break
    correct = passed == len(cases) > 0
    reason = "" if correct else reason or "too slow"
    return Verdict(compiled, ran and compiled, passed / max(1, len(cases)), correct, reason, failed)


def _printed(ended: Ended, case: dict, tests: dict) -> str:
    """What was printed and what was expected, in words."""
    printed = ended.printed[:LOOKED_AT].decode(errors="replace").strip()
    if "checker" in tests:
        return f": the checker did not print 1 for {shown(printed)}"
    return ": " + apart(printed, case["output"].strip()[:LOOKED_AT])


class Checker:
    """Says whether an output is right: by a program of the data, or by its being equal to the expected one.

    Attributes:
      left: CPU seconds that the program has for all outputs that are still to come.
    """

    def __init__(self, box: Box, code: str | None, seconds: float):
        self.box, self.code, self.left = box, code, seconds

    def accepts(self, case: dict, printed: bytes) -> bool:
        """Whether this is right for a case. Where the data's program fails or is too slow, it is not."""
        if self.code is None:
            return equal_texts(printed, case["output"])
        args = [self.code, case["input"], case["output"], printed.decode(errors="replace")]
        task = json.dumps({"function": "rewards.sandbox.checker:accepts", "args": args}).encode()
        (ended,) = self.box.run([Child("function", task, self.left, wall_of(self.left))])
        self.left = 0.0 if ended.late else self.left - ended.seconds
        return verdict_of(ended.told) == {"value": True}


def _on_calls(box: Box, source: bytes, tests: dict, seconds: float) -> Verdict:
    """One process for the program, and one for the tests that calls it."""
    text = json.dumps(tests)
    seed = int.from_bytes(hashlib.sha256(text.encode() + source).digest()[:8], "big")  # the program lacks the tests
    task = json.dumps({"tests": tests, "seed": seed}).encode()
    wall = wall_of(seconds)
    children = [Child("solution", source, seconds, wall), Child("checker", task, seconds, wall + LONGER)]
    solution, checker = box.run(children)
    verdict = verdict_of(checker.told) or NOTHING
    trouble = trouble_of(solution, seconds - solution.seconds)
    if solution.status == -9 and not solution.late and solution.seconds < seconds:
        trouble = ""  # it was ended because the checker had
    passed = sum(verdict["passed"]) / max(1, len(verdict["passed"]))
    correct = verdict["whole"] and bool(verdict["passed"]) and trouble != "too slow"
    reason = "" if correct else trouble or "wrong"
    return Verdict(solution.told == b"compiled", verdict["ready"], passed, correct, reason, verdict["failed"])


def wall_of(seconds: float) -> float:
    """The wall seconds of a program that may use so many CPU seconds."""
    return 2 * seconds + 1


def verdict_of(told: bytes) -> dict | None:
    """What a checker said, if it came to say anything."""
    try:
        return json.loads(told[4:])
    except ValueError:
        return None


def trouble_of(ended: Ended, left: float) -> str:
    """What went wrong with a process, in a word; empty: nothing. `left`: CPU seconds that it had to spare."""
    if ended.status == FAILED and not ended.told:
        return "not started"
    if ended.late or left <= 0 or ended.status == -signal.SIGXCPU:
        return "too slow"
    if ended.flooded:
        return "printed too much"
    if ended.told != b"compiled":
        return "does not compile"
    return "raised" if ended.status > 0 else "killed" if ended.status else ""
