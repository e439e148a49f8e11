"""Ctrl-C, SIGTERM and the signals of schedulers end a run after its present step; a second one ends it at once.

Left out: saving the run's state (`state.py`).
"""

import os
import signal
import sys
import time
from contextlib import suppress

from grpo import distributed

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask for a stop: a person's (Ctrl-C, a terminal that closes), Slurm's (TERM, USR1) and submitit's (USR2).

`rewards/worker.py` lets the same ones pass."""

SAME_SIGNAL_S = 2.0
"""A second signal within this many seconds is ignored: torchrun repeats a Ctrl-C that all processes have received."""


class Signals:
    """Each of `STOPS` asks for an orderly stop; a second one stops at once. Under nohup, SIGHUP stays ignored."""

    def __init__(self):
        self.first: float | None = None

    def __enter__(self) -> "Signals":
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        taken = [number for number in STOPS if number != signal.SIGHUP or not nohup]
        self._before = {number: signal.signal(number, self._handle) for number in taken}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.first is not None and now - self.first > SAME_SIGNAL_S:
            os._exit(128 + number)
        if self.first is None:
            self.first = now
            if distributed.is_main():
                with suppress(OSError):  # stderr is closed
                    print("stopping after this step; a second signal stops at once", file=sys.stderr, flush=True)

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.first is not None
