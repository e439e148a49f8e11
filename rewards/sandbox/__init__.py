"""A sandbox for programs that a model has written: Linux only, without any library. `docs/sandbox.md` says what holds.

`box()` gives a box that has been tried, `judge(box, program, tests, seconds)` a verdict, and `run_trusted` calls our
own functions on texts that are not to be trusted. Left out: files, processes and networks, which no program gets.
"""

import atexit
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewards.sandbox.client import Box, Child
from rewards.sandbox.judge import Verdict, judge, verdict_of, wall_of
from rewards.sandbox.proof import described, proven

__all__ = ["Answer", "Box", "Verdict", "box", "described", "judge", "run_trusted"]

_boxes: dict[tuple[str, ...], Box] = {}


@dataclass(frozen=True)
class Answer:
    """The value of a call, as JSON has it, or why there is none."""

    value: Any = None
    failure: str = ""


def box(preload: Sequence[str] = ()) -> Box:
    """This process's box with these modules in it, started and tried at the first call.

    Raises:
      ValueError: the machine can not seal a program, in one sentence.
    """
    key = tuple(preload)
    if key not in _boxes:
        _boxes[key] = proven(preload)
        atexit.register(_boxes[key].close)
    return _boxes[key]


def run_trusted(function: str, args: Sequence, cpu_seconds: float, preload: Sequence[str] = ()) -> Answer:
    """Call our own function on texts of a model, sealed, each time in a new process. A hang ends at its limit.

    A text that the function executes (`eval`, `sympify`) can do no harm, but it can give itself any value.

    Args:
      function: `module:function`. Its module must be among those loaded.
      args: JSON values.
      cpu_seconds: CPU seconds that the call may take.
      preload: modules that the box imports before it is sealed; afterwards no import finds a file. An entry
        `module:function` is also called, so that the module loads what it would load later.

    Raises:
      ValueError: the machine can not seal a program.
    """
    task = json.dumps({"function": function, "args": list(args)}).encode()
    (ended,) = box(preload).run([Child("function", task, cpu_seconds, wall_of(cpu_seconds))])
    answer = verdict_of(ended.told)
    if answer is None:
        slow = ended.late or ended.seconds >= cpu_seconds or ended.status == -signal.SIGXCPU
        return Answer(failure="too slow" if slow else f"ended with status {ended.status}")
    return Answer(answer["value"]) if "value" in answer else Answer(failure=answer["raised"])
