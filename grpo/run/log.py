"""What a run writes and says of each step: `metrics.jsonl`, TensorBoard, the console; the clock; a last sentence.

Rank 0 alone speaks. Left out: what the numbers are (`metrics.py`) and what they mean (`docs/metrics.md`).
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

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from grpo import distributed
from grpo.config import Config
from grpo.files import write_whole
from grpo.metrics import METRIC_NAMES, metric_names


class Clock:
    """Seconds per phase of a step."""

    def __init__(self, show: Callable[[str], None] = lambda phase: None):
        """`show` is told of each phase when it begins."""
        self.show = show
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Within it the step is in this phase."""
        self.show(phase)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.phases[f"time/{phase}"] = self.phases.get(f"time/{phase}", 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Every phase, and `time/step` since the clock was made; the slowest rank's."""
        names = [*self.phases, "time/step"]
        values = torch.tensor([*self.phases.values(), time.perf_counter() - self.start], dtype=torch.float64)
        return dict(zip(names, distributed.all_max(values).tolist(), strict=True))


class Log:
    """What a run writes and says per step: `metrics.jsonl`, TensorBoard, the console. Silent except on rank 0."""

    def __init__(self, directory: Path, config: Config, steps_done: int):
        """Open the files; lines after `steps_done` are cut off.

        Raises:
            ValueError: TensorBoard is asked for and not installed.
            OSError: the files can not be written.
        """
        self.display = Display(config.num_steps, steps_done)
        self.writer: MetricsWriter | None = None

        def open_files() -> None:
            self.writer = MetricsWriter(
                directory, reward_names=config.rewards, tensorboard=config.tensorboard, resume_step=steps_done
            )

        distributed.on_main(open_files)

    def __enter__(self) -> "Log":
        self.display.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.display.__exit__(*exception)
        if self.writer is not None:
            with suppress(OSError):  # a full disk again: `write` has said so already, in words
                self.writer.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the line of a step, and say what matters of it."""

        def write() -> None:
            self.display.step(self.writer.write(step, metrics))

        distributed.on_main(write)


def say(sentence: object) -> None:
    """Tell the person at the terminal why a run ends; other ranks than 0 add who they are."""
    who = "" if distributed.is_main() else f"rank {distributed.rank()}: "
    with suppress(OSError):  # nobody reads any more
        print(f"{who}{sentence}", file=sys.stderr, flush=True)

_COUNTS = (  # written as integers
    ("step", "optim/skipped", "memory/peak_bytes", "tokens/sampled", "tokens/computed", "eval/n", "eval/correct")
)


class MetricsWriter:
    """Appends one JSON object per step to `metrics.jsonl`, on the disk before `write` returns. For rank 0 only."""

    def __init__(
        self, run_dir: str | Path, *, reward_names: tuple[str, ...], tensorboard: bool = False, resume_step: int = 0
    ) -> None:
        """Opens the file of a run; what a stopped run has written after step `resume_step` is cut off.

        Raises:
          ValueError: `tensorboard` is asked for and not installed.
          OSError: the file cannot be written.
        """
        self._names = metric_names(reward_names)
        self._board = _tensorboard(Path(run_dir), resume_step) if tensorboard else None
        path = Path(run_dir) / "metrics.jsonl"
        _cut(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> dict[str, float | None]:
        """Writes the line of a step (counted from 1); what `metrics` lacks, and what is not finite, is null.

        Args:
          metrics: values of `metric_names`, and of any `eval/...`; other names are a mistake.

        Returns:
          The line as it was written.

        Raises:
          OSError: one sentence, when the disk is full.
        """
        extra = [name for name in metrics if name not in self._names]
        assert all(name.startswith("eval/") for name in extra), f"metrics without a meaning: {extra}"
        line = {name: _plain(name, metrics.get(name)) for name in self._names + extra} | {"step": step}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(f"cannot write {self._file.name} ({error.strerror})") from error
        if self._board is not None:
            for name, value in line.items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, step)
        return line

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _plain(name: str, value: float | None) -> float | int | None:
    """A JSON number; None where there is no value or it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if name in _COUNTS else float(value)


def _cut(path: Path, last_step: int) -> None:
    """Keeps the whole lines of steps up to `last_step`: a torn line and all after it go. Atomic."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if step > last_step or not line.endswith("\n"):
            break
        kept.append(line)
    write_whole(path, "".join(kept))


def _tensorboard(run_dir: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is True: the package is missing, install it with `pip install 'grpo[tensorboard]'`"
        ) from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

_COLUMNS = {
    **{"completion/length": "length", "completion/truncated": "truncated", "policy/entropy": "entropy"},
    **{"policy/kl": "kl", "optim/grad_norm": "grad", "optim/skipped": "skipped"},
}


def step_line(line: Mapping[str, float | None], num_steps: int, seconds_left: float) -> str:
    """The numbers of a step that matter, in words: reward and its terms, shape of the completions, state of the policy.

    Args:
      line: what `MetricsWriter.write` returned. Numbers that are null, and `skipped` when it is 0, are left out.
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
    """Where nobody reads any more (`| tee`, interrupted), a run goes on and saves what it has, without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # what is still in its buffer can go nowhere when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """What a run says: a line per step and, where the output is a terminal, a live bar below. Only rank 0 speaks."""

    def __init__(self, num_steps: int, steps_done: int = 0, console: Console | None = None) -> None:
        self._num_steps = num_steps
        self._seconds: deque[float] = deque(maxlen=10)  # of the last steps, for the time left
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
        """Prints one line, never wrapped, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        with suppress(OSError):
            self._console.file.flush()

    def phase(self, name: str) -> None:
        """What the step is doing now; shown beside the bar only."""
        self._bar.update(self._task, description=name)

    def step(self, line: Mapping[str, float | None]) -> None:
        """Prints a step's numbers and moves the bar on."""
        self._seconds.append(line["time/step"] or 0.0)
        left = (self._num_steps - line["step"]) * sum(self._seconds) / len(self._seconds)
        self.say(step_line(line, self._num_steps, left))
        self._bar.update(self._task, completed=line["step"], left=str(timedelta(seconds=round(left))))
