"""Call reward functions so that none of them can stop a run. A call that fails only makes its own sample invalid.

Worker processes (`rewards/worker.py`) make the calls, because a call that hangs (in a regular expression, say) can
only be killed from outside. A call gives None if it raises, exceeds the timeout, ends its process, or returns no
finite number. Left out: weights, advantages, and the use of invalid samples.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from data.problem import Problem
from rewards import after_reasoning, asks_for, files_of, label, load
from rewards.worker import Reply

START_SECONDS = 300
"""Seconds that a worker may take to import the rewards, before its first call is timed."""

Samples = tuple[list[str], list[Problem], dict[str, list]]
"""Completions, their problems, and what the rewards are told of them."""


class RewardRunner:
    """K reward functions and the processes that run them. Use it in a `with` statement, or close it.

    Attributes:
      failures: the number of failed calls since the start, by reason: `raised`, `timed_out`, `died`, `returned_none`,
        `not_a_number`, `not_finite`.
      first_errors: {name of a reward that failed: its first error, in words}.
    """

    def __init__(
        self,
        names: Sequence[str],
        timeout: float,
        workers: int = 1,
        *,
        reasoning_end: str | None = None,
        chat: bool = False,
    ):
        """Look up the names. The workers start with the first batch, or with `prepare`.

        Args:
          names: K names for `rewards.load`, e.g. `["gsm8k.format", "gsm8k.correctness"]`.
          timeout: seconds that one call may take. A file of rewards with limits of its own, which says `LEAST_SECONDS`,
            gets at least those.
          workers: processes that share a batch.
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
        self.files = files_of(names)
        self.timeout = max([timeout, *(getattr(file, "LEAST_SECONDS", 0.0) for file in self.files)])
        self.reasoning_end, self.chat = reasoning_end, chat
        self._prepares = any(hasattr(file, "prepare") for file in self.files)
        self.failures: Counter[str] = Counter()
        self.first_errors: dict[str, str] = {}
        self._workers = [_Worker(self.names, self.timeout) for _ in range(workers)]

    def prepare(self) -> dict[str, str]:
        """Start the workers now if a file of rewards has something to prepare: what it then says about the machine.

        Raises:
          RuntimeError: a worker cannot be started.
          ValueError: a reward refuses this machine.
        """
        facts: dict[str, str] = {}
        if self._prepares:
            for worker in self._workers:
                worker.start()
                facts |= worker.facts
        return facts

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
          RuntimeError: a worker cannot be started.
          ValueError: a reward asks for what is not known, or refuses this machine.
        """
        of_text = {"whole": completions, "chat": [self.chat] * len(completions)}
        of_text["log_metric"] = [None] * len(completions)  # the worker puts the function in its place
        told = self._asked_of({**of_text, **(told or {})})
        completions = [after_reasoning(completion, self.reasoning_end) for completion in completions]
        B, n = len(completions), len(self._workers)
        assert len(problems) == B, (B, len(problems))
        values: list[list[float | None]] = [[None] * B for _ in self.names]
        errors: dict[tuple[int, int], str] = {}
        try:
            for w, worker in enumerate(self._workers):  # every n-th sample, so that a group is shared evenly
                known = {name: given[w::n] for name, given in told.items()}
                worker.begin((list(completions[w::n]), list(problems[w::n]), known))
            while any(worker.calls_left for worker in self._workers):
                worker, call, (value, reason, message) = self._reply()
                k, i = divmod(call, len(worker.samples[0]))
                b = self._workers.index(worker) + n * i
                values[k][b] = value
                if reason:
                    self.failures[reason] += 1
                    errors[k, b] = message
        except BaseException:
            self.close()  # late replies must not be taken for those of the next batch
            raise
        for (k, _), message in sorted(errors.items()):  # the first sample's, not that of the fastest worker
            self.first_errors.setdefault(self.names[k], message)
        return values

    def reported(self) -> dict[str, tuple[float, int]]:
        """{name: sum and count} of the numbers that rewards reported with `log_metric` since this was last asked.

        The sum is exact before it is rounded once, so the order in which workers reply does not change it.
        """
        values: dict[str, list[float]] = {}
        for worker in self._workers:
            for name, number in worker.reported:
                values.setdefault(name, []).append(number)
            worker.reported.clear()
        return {name: (math.fsum(values[name]), len(values[name])) for name in sorted(values)}

    def close(self) -> None:
        """End the workers and the processes they started. The next batch starts new workers."""
        for worker in self._workers:
            worker.close()

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

    def _reply(self) -> tuple["_Worker", int, Reply]:
        """The next reply of any worker: from which, to which of its calls, and what it says."""
        busy = {worker.connection: worker for worker in self._workers if worker.calls_left}
        first = min(worker.deadline for worker in busy.values())
        ready = wait(busy.keys(), max(0.0, first - time.monotonic()))
        worker = busy[ready[0]] if ready else min(busy.values(), key=lambda late: late.deadline)
        return worker, *worker.reply(in_time=bool(ready))


class _Worker:
    """A process that calls rewards, and its part of a batch.

    Attributes:
      connection: to the process; None: there is none.
      samples: of the batch. Its calls are numbered: every sample of the first reward, of the second, and so on.
      calls_left: how many of them have had no reply.
      deadline: the moment until which the current call may take.
      facts: what rewards said about the machine when they were prepared.
      reported: (name, number) of each that rewards reported.
    """

    def __init__(self, names: list[str], timeout: float):
        self.names, self.timeout = names, timeout
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None
        self.samples: Samples = [], [], {}
        self.calls_left = 0
        self.facts: dict[str, str] = {}
        self.reported: list[tuple[str, float]] = []

    def begin(self, samples: Samples) -> None:
        """Send a batch, if there is anything in it."""
        self.samples, self.calls_left = samples, len(self.names) * len(samples[0])
        if self.calls_left:
            self._request()

    def reply(self, in_time: bool) -> tuple[int, Reply]:
        """(number of the current call, its result). A worker that is late or has ended is replaced by a new one."""
        call = self._current()
        process = self.process
        try:
            if in_time:
                result, reported = self.connection.recv()
                self.reported += reported.items()
            else:
                result = None, "timed_out", f"took longer than {self.timeout:g} s"
                self.close()
        except (EOFError, ConnectionError):
            self.close()
            result = None, "died", f"ended its process (exit status {process.returncode})"
        self.calls_left -= 1
        self.deadline = time.monotonic() + self.timeout
        if self.calls_left and self.process is None:
            self._request()
        return call, result

    def close(self) -> None:
        """End the process and those it started."""
        if self.process is None:
            return
        self.connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _current(self) -> int:
        return len(self.names) * len(self.samples[0]) - self.calls_left

    def _request(self) -> None:
        """Send the whole batch. The worker reads it before its first call, so sending does not wait for a call."""
        batch = *self.samples, self._current()
        self.start()
        try:
            self.connection.send(batch)
        except ConnectionError:  # the worker ended between two batches
            self.close()
            self.start()
            self.connection.send(batch)
        self.deadline = time.monotonic() + self.timeout

    def start(self) -> None:
        """Start the process, if there is none, in its own session, so that Ctrl-C at the terminal reaches only the run.

        Raises:
          RuntimeError: it does not come up.
          ValueError: a reward refuses this machine.
        """
        if self.process is not None:
            return
        self.connection, theirs = multiprocessing.Pipe()
        root = str(Path(__file__).parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rewards.worker"],
            stdin=theirs.fileno(),
            stdout=2,
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root},
            start_new_session=True,
        )
        theirs.close()
        problem = f"it was not ready after {START_SECONDS} s"
        try:
            self.connection.send((self.names, self.timeout, sys.path))
            if self.connection.poll(START_SECONDS):
                self.facts, refusal = self.connection.recv()
                if not refusal:
                    return
                self.close()
                raise ValueError(refusal)
        except (EOFError, ConnectionError):
            problem = "it ended; its own message is above"
        self.close()
        raise RuntimeError(f"the process for the rewards {', '.join(self.names)} did not start: {problem}")
