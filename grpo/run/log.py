"""What a run writes and prints about each step (rollout plus learning): `metrics.jsonl`, a tracker, the console.

The clock that times the phases of a step is here too, and the sentence that a run ends with. Only rank 0 writes and
prints. Left out: which metrics there are (`metrics.py`), and what they mean (`docs/metrics.md`).
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from grpo import distributed
from grpo.config import Config
from grpo.files import write_whole
from grpo.metrics import METRIC_NAMES, metric_names
from grpo.run.trackers import Tracker, open_tracker


class Clock:
    """Measures the seconds of each phase of a step."""

    def __init__(self, show: Callable[[str], None] = lambda phase: None):
        """Start the clock. `show` is called with the name of each phase when it begins."""
        self.show = show
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the time inside the `with` block as this phase."""
        self.show(phase)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.phases[f"time/{phase}"] = self.phases.get(f"time/{phase}", 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase, and `time/step` since the clock was made; each is that of the slowest rank."""
        names = [*self.phases, "time/step"]
        values = torch.tensor([*self.phases.values(), time.perf_counter() - self.start], dtype=torch.float64)
        return dict(zip(names, distributed.all_max(values).tolist(), strict=True))


class Log:
    """Writes and prints the metrics of each step: `metrics.jsonl`, a tracker, console. Silent except on rank 0.

    The file has one JSON object per step. It is on the disk before `write` returns.
    """

    def __init__(self, directory: Path, config: Config, steps_done: int):
        """Open the files. What a stopped run wrote after step `steps_done` is removed.

        Raises:
            ValueError: the tracker can not be used.
            OSError: the files cannot be written.
        """
        self.display = Display(config.num_steps, steps_done)
        self._names = metric_names(config.rewards)
        self._file: TextIO | None = None
        self._tracker: Tracker | None = None

        def open_files() -> None:
            self._tracker = open_tracker(directory, config, steps_done)
            path = directory / "metrics.jsonl"
            _cut(path, steps_done)
            self._file = path.open("a", encoding="utf-8")

        distributed.on_main(open_files)

    def __enter__(self) -> "Log":
        self.display.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.display.__exit__(*exception)
        for output in (self._file, self._tracker):
            if output is not None:
                with suppress(OSError):  # a full disk: `write` has reported it already
                    output.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the line of a step, and print its main numbers. Values that are missing or not finite become null.

        Args:
            step: counted from 1.
            metrics: values of `metric_names`, and of any `eval/...` and `reward_metrics/...`; others are a mistake.

        Raises:
            OSError: the disk is full; one sentence.
        """
        extra = [name for name in metrics if name not in self._names]
        known = all(name.startswith(("eval/", "reward_metrics/")) for name in extra)
        assert known, f"metrics without a meaning: {extra}"
        line = {name: _plain(name, metrics.get(name)) for name in self._names + extra} | {"step": step}
        distributed.on_main(lambda: self._write(line))

    def _write(self, line: dict[str, float | None]) -> None:
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self._file.name} ({error.strerror})") from error
        if self._tracker is not None:
            known = {name: value for name, value in line.items() if value is not None and name != "step"}
            self._tracker.write(line["step"], known)
        self.display.step(line)


def say(sentence: object) -> None:
    """Print to stderr why a run ends. Ranks other than 0 add their number."""
    who = "" if distributed.is_main() else f"rank {distributed.rank()}: "
    with suppress(OSError):  # stderr is closed
        print(f"{who}{sentence}", file=sys.stderr, flush=True)


_COUNTS = (  # written as integers
    ("step", "rollout/refills", "rollout/dropped_groups", "optim/updates", "optim/skipped", "memory/peak_bytes")
    + ("tokens/sampled", "tokens/computed", "eval/n", "eval/correct")
)


def _plain(name: str, value: float | None) -> float | int | None:
    """The value as a JSON number; None if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if name in _COUNTS else float(value)


def _cut(path: Path, last_step: int) -> None:
    """Keep the complete lines of steps up to `last_step`. A torn line and all after it are removed. Atomic."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if step > last_step or not line.endswith("\n"):
            break
        kept.append(line)
    write_whole(path, "".join(kept))


_COLUMNS = {
    **{"completion/length": "length", "completion/truncated": "truncated", "policy/entropy": "entropy"},
    **{"policy/kl": "kl", "optim/grad_norm": "grad", "optim/skipped": "skipped"},
}


def step_line(line: Mapping[str, float | None], num_steps: int, seconds_left: float) -> str:
    """One line of text with a step's main numbers: reward and its terms, completions, policy, evaluation, time.

    Args:
        line: as it is written. Numbers that are null are left out, and so is `skipped` if it is 0.
        num_steps: steps of the run.
        seconds_left: estimate of the time to the end of the run.
    """
    shown = {"reward": line["reward/mean"]}
    terms = [name for name in line if name.startswith("reward/") and name not in METRIC_NAMES]
    shown |= {name.removeprefix("reward/"): line[name] for name in terms}
    shown |= {label: line[name] for name, label in _COLUMNS.items() if name != "optim/skipped" or line[name]}
    shown |= {name: line[name] for name in line if name.startswith("eval/")}
    numbers = "  ".join(f"{label} {value:.4g}" for label, value in shown.items() if value is not None)
    seconds = line["time/step"] or 0.0
    width = len(str(num_steps))
    left = timedelta(seconds=round(seconds_left))
    return f"step {line['step']:{width}}/{num_steps}  {numbers}  {seconds:.1f} s  left {left}"


class _Console(Console):
    """A console that goes silent when its output is closed (such as `| tee`, interrupted), so that the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # discard what is still buffered when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Prints a line per step and, on a terminal, a progress bar below. Only rank 0 prints."""

    def __init__(self, num_steps: int, steps_done: int = 0, console: Console | None = None) -> None:
        self._num_steps = num_steps
        self._seconds: deque[float] = deque(maxlen=10)  # of the last steps, to estimate the time left
        self._console = console or _Console(quiet=not distributed.is_main())
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=num_steps, completed=steps_done, left="?")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line, never wrapped, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        with suppress(OSError):
            self._console.file.flush()

    def phase(self, name: str) -> None:
        """Show the step's present phase beside the bar."""
        self._bar.update(self._task, description=name)

    def step(self, line: Mapping[str, float | None]) -> None:
        """Print a step's numbers and advance the bar."""
        self._seconds.append(line["time/step"] or 0.0)
        left = (self._num_steps - line["step"]) * sum(self._seconds) / len(self._seconds)
        self.say(step_line(line, self._num_steps, left))
        self._bar.update(self._task, completed=line["step"], left=str(timedelta(seconds=round(left))))
