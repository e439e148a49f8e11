"""Rewards of programs: the code of a completion is run on the problem's tests, in a sandbox.

`problem.info` holds `tests` (see `sandbox/judge.py`) and, if they differ from the defaults here, `form`, `prefix` and
`seconds`. A program that hangs, crashes or floods earns 0; that never makes a sample invalid. One execution serves all
rewards of a completion. `passed` pays for each test, which a constant function can earn: give it a small weight beside
`correctness`. Left out: languages other than Python.
"""

import hashlib
import json
import re
from collections import OrderedDict

from data.code import MOST_SECONDS
from data.problem import Problem
from rewards import sandbox
from rewards.sandbox import Verdict

SECONDS = 4.0
"""CPU seconds that a program may take for all tests, where the problem does not say."""
LEAST_SECONDS = 250.0
"""A call may take so long. The sandbox ends programs much earlier: this is for a machine that is very busy."""
KEPT = 1024
"""Verdicts that are kept. The rewards of a batch come one after the other."""
FENCE = re.compile(r"[ \t]*+```++[ \t]*+(\w*+)[^\n`]*+")
"""Possessive: nothing is tried twice, so the time is linear in the length of a line."""
LANGUAGES = ("python", "python3", "py")

_verdicts: OrderedDict[bytes, Verdict] = OrderedDict()


def extracts(completion: str, problem: Problem) -> float:
    """0.1 if there is a program in the completion, else 0."""
    return 0.1 if program_of(completion, problem) else 0.0


def compiles(completion: str, problem: Problem) -> float:
    """0.1 if the program is Python, else 0."""
    return 0.1 if verdict_of(completion, problem).compiled else 0.0


def runs(completion: str, problem: Problem) -> float:
    """0.1 if the program ends by itself and without an error on every input, or can be called, else 0.

    A program chooses its own exit code, so this says little about it.
    """
    return 0.1 if verdict_of(completion, problem).ran else 0.0


def passed(completion: str, problem: Problem) -> float:
    """The share of the tests that the program passes, 0 to 1."""
    return verdict_of(completion, problem).passed


def correctness(completion: str, problem: Problem) -> float:
    """1.0 if the program passes all tests, else 0."""
    return 1.0 if verdict_of(completion, problem).correct else 0.0


extracts.full_value = compiles.full_value = runs.full_value = 0.1


def prepare() -> dict[str, str]:
    """Start the sandbox of this process and try it out. Raises ValueError where it can not seal a program."""
    return {"sandbox": sandbox.described(sandbox.box())}


def verdict_of(completion: str, problem: Problem) -> Verdict:
    """The verdict on the program in a completion. A program that was just run on the same tests is not run again.

    Raises:
      ValueError: the problem has no tests, or asks for more time than there is.
    """
    tests, seconds = problem.info.get("tests"), problem.info.get("seconds", SECONDS)
    if not isinstance(tests, dict):
        raise ValueError(f"info['tests'] is {tests!r}: must be a dict with kind, as data/code.py makes them")
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"info['seconds'] is {seconds!r}: must be > 0 and <= {MOST_SECONDS}")
    program = program_of(completion, problem)
    if not program:
        return Verdict(reason="no code")
    key = hashlib.sha256(json.dumps([program, seconds, tests]).encode()).digest()
    if key not in _verdicts:
        _verdicts[key] = sandbox.judge(sandbox.box(), program, tests, seconds)
        if len(_verdicts) > KEPT:
            _verdicts.popitem(last=False)
    return _verdicts[key]


def program_of(completion: str, problem: Problem) -> str:
    """The program of a completion; empty: there is none.

    The form `continue` takes the completion as the rest of `info["prefix"]`. The form `block`, the default, takes the
    last block in a fence of Python. A fence that is not closed counts up to the end.
    """
    if problem.info.get("form", "block") == "continue":
        return problem.info["prefix"] + completion if completion.strip() else ""
    program: list[str] = []
    inside, language = False, ""
    for line in completion.split("\n"):
        fence = FENCE.fullmatch(line.rstrip("\r"))
        if inside and fence and not fence[1]:
            inside = False
        elif fence and not inside:
            inside, language = True, fence[1].lower()
            program = [] if language in LANGUAGES else program
        elif inside and language in LANGUAGES:
            program.append(line)
    text = "\n".join(program)
    return text if text.strip() else ""
