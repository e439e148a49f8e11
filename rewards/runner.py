"""Call reward functions so that none of them can stop a run. A call that fails only makes its own sample invalid.

One worker process (`rewards/worker.py`) makes the calls, because a call that hangs (in a regular expression, say) can
only be killed from outside. A call gives None if it raises, exceeds the timeout, ends its process, or returns no
finite number. Left out: weights, advantages, and the use of invalid samples.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.problem import Problem
from rewards import after_reasoning, asks_for, label, load
from rewards.worker import Reply

START_SECONDS = 300
"""Seconds that a worker may take to import the rewards, before its first call is timed."""


class RewardRunner:
    """K reward functions and the process that runs them. Use it in a `with` statement, or close it.

    Attributes:
      failures: the number of failed calls since the start, by reason: `raised`, `timed_out`, `died`, `returned_none`,
        `not_a_number`, `not_finite`.
      first_errors: {name of a reward that failed: its first error, in words}.
    """

    def __init__(self, names: Sequence[str], timeout: float, *, reasoning_end: str | None = None, chat: bool = False):
        """Look up the names. The worker starts with the first batch.

        Args:
          names: K names for `rewards.load`, e.g. `["gsm8k.format", "gsm8k.correctness"]`.
          timeout: seconds that one call may take.
          reasoning_end: rewards get the text behind the last one; None: all of it.
          chat: whether prompts go through a chat template, for rewards that ask.

        Raises:
          ValueError: a name is unknown, two have the same label, or the timeout is out of range.
        """
        if not 0 < timeout < 1e6:
            raise ValueError(f"reward_timeout is {timeout}: must be a number of seconds > 0 and < 1e6")
        self.asked = {name: asks_for(load(name)) for name in names}
        for one, two in itertools.combinations(dict.fromkeys(names), 2):
            if label(one) == label(two):
                raise ValueError(f"rewards: {one!r} and {two!r} are both {label(one)} in metrics; rename one")
        self.names = list(names)
        self.timeout, self.reasoning_end, self.chat = timeout, reasoning_end, chat
        self.failures: Counter[str] = Counter()
        self.first_errors: dict[str, str] = {}
        self._process: subprocess.Popen | None = None

    def score(
        self, completions: Sequence[str], problems: Sequence[Problem], told: Mapping[str, Sequence] | None = None
    ) -> list[list[float | None]]:
        """Call every reward on every sample.

        Args:
          completions: B texts.
          problems: B problems; `problems[b]` is what `completions[b]` answers.
          told: B values for each name of `rewards.TOLD` that is known; only what a reward asks for is sent to it.

        Returns:
          K lists of B values, in the order of `names`. None means that the call failed, -inf that it does not apply.

        Raises:
          RuntimeError: the worker cannot be started.
          ValueError: a reward asks for what is not known.
        """
        told = self._asked_of({"whole": completions, "chat": [self.chat] * len(completions), **(told or {})})
        completions = [after_reasoning(completion, self.reasoning_end) for completion in completions]
        B, num_calls = len(completions), len(self.names) * len(completions)
        assert len(problems) == B, (B, len(problems))
        values: list[float | None] = []
        try:
            while len(values) < num_calls:  # once, and again after each call that ended the worker
                self._request(completions, problems, told, start=len(values))
                while self._process is not None and len(values) < num_calls:
                    value, reason, message = self._reply()
                    if reason:
                        self.failures[reason] += 1
                        self.first_errors.setdefault(self.names[len(values) // B], message)
                    values.append(value)
        except BaseException:
            self.close()  # its late replies must not be taken for those of the next batch
            raise
        return [values[k * B : (k + 1) * B] for k in range(len(self.names))]

    def close(self) -> None:
        """End the worker and the processes it started. The next batch starts a new worker."""
        if self._process is None:
            return
        self._connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _asked_of(self, known: Mapping[str, Sequence]) -> dict[str, list]:
        """What the rewards ask for, of what is known."""
        for reward, names in self.asked.items():
            for name in names:
                if name not in known:
                    raise ValueError(f"rewards: {reward!r} asks for {name!r}, which is not known of these texts")
        return {name: list(known[name]) for names in self.asked.values() for name in names}

    def _request(
        self, completions: Sequence[str], problems: Sequence[Problem], told: dict[str, list], start: int
    ) -> None:
        """Send the whole batch. The worker reads it before its first call, so sending does not wait for a call."""
        batch = list(completions), list(problems), told, start
        if self._process is None:
            self._start()
        try:
            self._connection.send(batch)
        except ConnectionError:  # the worker ended between two batches
            self.close()
            self._start()
            self._connection.send(batch)

    def _reply(self) -> Reply:
        """The result of the current call. After a timeout, or if the worker ended, the worker is closed."""
        process = self._process
        try:
            if self._connection.poll(self.timeout):
                return self._connection.recv()
            self.close()
            return None, "timed_out", f"took longer than {self.timeout:g} s"
        except (EOFError, ConnectionError):
            self.close()
            return None, "died", f"ended its process (exit status {process.returncode})"

    def _start(self) -> None:
        """Start a worker in its own session, so that Ctrl-C at the terminal reaches only the run."""
        self._connection, theirs = multiprocessing.Pipe()
        root = str(Path(__file__).parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rewards.worker"],
            stdin=theirs.fileno(),
            stdout=2,
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root},
            start_new_session=True,
        )
        theirs.close()
        try:
            self._connection.send((self.names, self.timeout, sys.path))
            if self._connection.poll(START_SECONDS) and self._connection.recv():
                return
            problem = f"it was not ready after {START_SECONDS} s"
        except (EOFError, ConnectionError):
            problem = "it ended; its own message is above"
        self.close()
        raise RuntimeError(f"the process for the rewards {', '.join(self.names)} did not start: {problem}")
