"""The process in which rewards are called: `python -m rewards.worker`, started by `rewards/runner.py` and no use alone.

Its standard input is a socket to the runner. First (names, timeout, search path) comes in and True goes out; then, for
each batch (completions, problems, start), one reply per call goes out at once. What a reward prints goes to standard
error. The process ends with its input, so with the runner's process, however that ended.
"""

import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from data.problem import Problem
from rewards import load

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to stop, the same as in `grpo/run/signals.py`; schedulers send them to every process."""

Reply = tuple[float | None, str, str]
"""(value, "", "") of a good call; (None, reason, message) of a failed one. The reasons are listed in the runner."""


def main() -> None:
    """Serves batches until the runner is gone."""
    # A run that is asked to stop finishes its step first, and needs its rewards for that. No-op handlers, because
    # programs that a reward starts would inherit SIG_IGN.
    for stop in STOPS:
        signal.signal(stop, lambda *_: None)
    connection = _take_standard_input()
    try:
        names, timeout, search_path = connection.recv()
        sys.path += [place for place in search_path if place not in sys.path]
        rewards = [load(name) for name in names]
        connection.send(True)
        while True:
            completions, problems, start = connection.recv()
            for call in range(start, len(rewards) * len(completions)):
                term, sample = divmod(call, len(completions))
                connection.send(_call_within(2 * timeout, rewards[term], completions[sample], problems[sample]))
    except (EOFError, ConnectionError):
        return


def grade(reward: Callable, completion: str, problem: Problem) -> Reply:
    """Calls a reward once, and survives it if Python does."""
    try:
        value = reward(completion, problem)
        if value is None:
            return None, "returned_none", "returned None"
        if isinstance(value, str | bytes | bytearray):  # float() would read them
            return None, "not_a_number", f"returned a {type(value).__name__}"
    except BaseException as error:  # SystemExit too: a reward does not end the run
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = "".join(traceback.format_exception_only(error)).strip()
        return None, "raised", f"{what[:500]} ({where.filename}, line {where.lineno})"
    try:
        number = float(value)
    except Exception:
        return None, "not_a_number", f"returned a {type(value).__name__}"
    return (number, "", "") if math.isfinite(number) else (None, "not_finite", f"returned {number}")


def _call_within(seconds: float, *call) -> Reply:
    """Grades under an alarm that ends this process even in C code that never returns.

    The runner kills a call that hangs long before; the alarm is for a runner that was killed itself meanwhile.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    reply = grade(*call)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return reply


def _take_standard_input() -> Connection:
    """The socket that is standard input, out of the reach of rewards: they find standard input empty."""
    connection = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


if __name__ == "__main__":
    main()
