"""The process that calls the rewards. `rewards/runner.py` starts it as `python -m rewards.worker`.

Its standard input is a socket to the runner. The protocol:

- It receives (names, timeout, search path), and answers with what was prepared and why it refuses (empty: it does not).
- For each batch (completions, problems, told, start) it sends one reply after each call, with the numbers that the call
  reported.

What a reward prints goes to standard error. The process ends when the socket closes, that is, when the runner's process
ends. Left out: timeouts and what a failure means (`rewards/runner.py`).
"""

import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from data.problem import Problem
from rewards import asks_for, files_of, load
from rewards.sandbox.layers import die_with_parent
from rewards.trl import DOES_NOT_APPLY

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to stop, the same as in `grpo/run/signals.py`; schedulers send them to every process."""

METRIC = re.compile(r"[A-Za-z0-9_./-]{1,64}")
"""Names that a reward may report numbers under; they go to files, trackers and terminals."""
Reply = tuple[float | None, str, str]
"""(value, "", "") for a good call, with -inf where the reward does not apply; (None, reason, message) for a failed one.
`RewardRunner` lists the reasons."""


def main() -> None:
    """Serve batches until the runner ends."""
    # After a signal the run still finishes its step, and needs its rewards for that. The handlers do nothing; SIG_IGN
    # would be inherited by programs that a reward starts.
    for stop in STOPS:
        signal.signal(stop, lambda *_: None)
    die_with_parent()  # with the thread that started it, even in the middle of a call
    connection = _take_standard_input()
    try:
        names, timeout, search_path = connection.recv()
        sys.path += [place for place in search_path if place not in sys.path]
        rewards = [load(name) for name in names]
        asked = [asks_for(reward) for reward in rewards]
        connection.send(_prepare(names))
        while True:
            completions, problems, told, start = connection.recv()
            for call in range(start, len(rewards) * len(completions)):
                term, sample = divmod(call, len(completions))
                known = {name: told[name][sample] for name in asked[term]}
                reported: dict[str, float] = {}
                if "log_metric" in known:
                    known["log_metric"] = partial(_report, reported)
                reply = _call_within(2 * timeout, rewards[term], completions[sample], problems[sample], known)
                connection.send((reply, reported))
    except (EOFError, ConnectionError):
        return


def _report(reported: dict[str, float], name: str, number: float) -> None:
    """Keep a number that a reward reports, if it is finite. Of two with one name in a call the second counts."""
    if not isinstance(name, str) or not METRIC.fullmatch(name):
        raise ValueError(f"log_metric: a name has letters, digits and _./-, at most 64, and is not {name!r:.80}")
    try:
        value = float(number)
    except OverflowError:
        return
    except (TypeError, ValueError) as error:
        raise ValueError(f"log_metric: {name} must be a number, not {number!r:.80}") from error
    if math.isfinite(value):
        reported[name] = value


def grade(reward: Callable, completion: str, problem: Problem, told: Mapping[str, Any] | None = None) -> Reply:
    """Call a reward once, with what it asks for beside the two. Only a crash of Python itself ends this process."""
    try:
        value = reward(completion, problem, **(told or {}))
        if value is DOES_NOT_APPLY:
            return -math.inf, "", ""
        if value is None:
            return None, "returned_none", "returned None"
        if isinstance(value, str | bytes | bytearray):  # float() would accept them
            return None, "not_a_number", f"returned a {type(value).__name__}"
    except BaseException as error:  # SystemExit too: a reward must not end the run
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = "".join(traceback.format_exception_only(error)).strip()
        return None, "raised", f"{what[:500]} ({where.filename}, line {where.lineno})"
    try:
        number = float(value)
    except Exception:
        return None, "not_a_number", f"returned a {type(value).__name__}"
    return (number, "", "") if math.isfinite(number) else (None, "not_finite", f"returned {number}")


def _call_within(seconds: float, *call) -> Reply:
    """Call `grade` under an alarm that ends this process, even if C code never returns.

    Usually the runner kills a hanging call long before. The alarm is for the case that the runner itself was killed.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    reply = grade(*call)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return reply


def _prepare(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Let each file of rewards prepare what it needs. Returns what they say of the machine, and a refusal."""
    facts: dict[str, str] = {}
    try:
        for file in files_of(names):
            facts |= file.prepare() if hasattr(file, "prepare") else {}
    except ValueError as error:
        return {}, str(error)
    return facts, ""


def _take_standard_input() -> Connection:
    """Take the socket away from standard input, so that rewards cannot read it and find standard input empty."""
    connection = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


if __name__ == "__main__":
    main()
