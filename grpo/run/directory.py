"""A run as a thing on disk and in a shell: its directory, its state, its signals, its clock. No algorithm here.

`<out_dir>/<run_name>/` holds config.yaml, environment.json, metrics.jsonl, rollouts/, checkpoints/, final/ and eval/,
and what `report.py` draws. Rank 0 alone writes. A directory that exists is resumed, never overwritten.
"""

import ctypes
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from grpo import distributed
from grpo.config import Config, check_resumable, from_yaml, taken, to_yaml
from grpo.files import lock_directory, write_whole
from grpo.kernels.compiled import can_compile
from grpo.metrics import Display, MetricsWriter
from grpo.run import checkpoint
from grpo.run.machine import environment
from grpo.run.signals import Signals
from grpo.update import Learner

TOKENS_PER_MICROBATCH = 4096
"""What `max_tokens_per_microbatch: auto` means on a CPU. On a GPU it depends on model and memory: `doctor.fit`."""

MAX_SKIPPED = 3
"""Steps in a row whose gradient is not finite, after which a run stops."""


@dataclass
class State:
    """What a checkpoint holds beside weights and optimiser. Data order and randomness are functions of the step."""

    step: int = 0
    """Steps done."""
    skipped: int = 0
    """Steps in a row, up to now, whose gradient was not finite."""
    best_step: int = 0
    """The step of the best evaluation on validation; 0 = none yet."""
    best_accuracy: float = -1.0
    """Its accuracy."""

    def after(self, step: int, finite: bool) -> "State":
        """The state when `step` is done; not `finite`: one of its updates was left out."""
        return replace(self, step=step, skipped=0 if finite else self.skipped + 1)


class Stopped(Exception):
    """The run ends early, for a reason that is a sentence; its state is saved."""

    def __init__(self, reason: str, code: int):
        """`code`: what the process exits with, 0 if somebody asked for it."""
        super().__init__(reason)
        self.code = code


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


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
        self.phases[f"time/{phase}"] = time.perf_counter() - start

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


def why_stop(state: State, signals: Signals) -> tuple[str, int] | None:
    """What the run is `Stopped` with after this step, the same on every rank; None: it goes on."""
    if distributed.any_true(signals.asked()):
        return f"asked to stop; saved after step {state.step}, go on with --resume auto", 0
    if state.skipped >= MAX_SKIPPED:
        return (
            f"the gradient was not finite in {state.skipped} steps in a row, whose updates were left out; the last "
            f"good state is saved as step {state.step}",
            1,
        )
    return None


def resolve(config: Config, device: torch.device) -> Config:
    """The config with `auto` (device, precision, compile, on a CPU the micro-batch) replaced by what it means here."""
    precision = precision_on(device, config.precision)
    on_gpu, meant = device.type == "cuda", {"device": device.type, "precision": precision}
    if config.compile == "auto":
        meant["compile"] = on_gpu and precision in ("bf16", "fp16") and can_compile()
    if config.max_tokens_per_microbatch == "auto" and not on_gpu:
        meant["max_tokens_per_microbatch"] = TOKENS_PER_MICROBATCH
    return replace(config, **meant)


def precision_on(device: torch.device, precision: str) -> str:
    """`auto`: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slow."""
    return ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision


def prepare(device: torch.device, precision: str) -> None:
    """Process-wide settings: float64 as default under fp64; on a CPU, only operations that repeat bitwise."""
    if precision == "fp64":
        torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # fills every new tensor, to find bugs of torch
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read with the first tensor: large ones lie in huge pages
    if device.type == "cpu" and sys.platform == "linux":  # glibc keeps what is freed: every step takes as much again
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mallopt(-1, -1), mallopt(-3, 2**30)  # M_TRIM_THRESHOLD: never; M_MMAP_THRESHOLD


def say(sentence: object) -> None:
    """Tell the person at the terminal why a run ends; other ranks than 0 add who they are."""
    who = "" if distributed.is_main() else f"rank {distributed.rank()}: "
    with suppress(OSError):  # nobody reads any more
        print(f"{who}{sentence}", file=sys.stderr, flush=True)


def open_directory(config: Config, device: torch.device) -> tuple[Config, Path]:
    """Make the run's directory, or find the one to resume. Nothing is written into it yet: `claim` does that.

    Returns:
        the config (a resumed run keeps what its `auto`s meant; on a GPU a new one leaves its micro-batch `auto`, for
        `doctor.fit` to settle) and the directory.

    Raises:
        ValueError: it exists and `resume` is `never`, or it was made by another config.
        OSError: it can not be written.
    """
    return distributed.on_main(lambda: _open_directory(config, device))


def _open_directory(config: Config, device: torch.device) -> tuple[Config, Path]:
    saved = (directory := Path(config.out_dir) / config.run_name) / "config.yaml"
    if saved.exists() and config.resume == "auto":
        before = from_yaml(saved)
        kept = {name: getattr(before, name) for name in ("precision", "compile", "max_tokens_per_microbatch")}
        config = replace(config, **{name: value for name, value in kept.items() if getattr(config, name) == "auto"})
        config = resolve(config, device)
        check_resumable(before, config)
    elif sentence := taken(config):
        raise ValueError(sentence)
    else:
        config = resolve(config, device)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out_dir: {directory} can not be made ({error.strerror})") from error
    return config, directory


def claim(directory: Path, config: Config, device: torch.device) -> None:
    """Write config.yaml, add to environment.json; drop `final/` and its evaluation, which would be of another step.

    For a run about to take its first step or to go on, when all it needs has been built: a mistyped option must not
    leave a directory that stands in the way of the next try.

    Raises:
        OSError: it can not be written.
    """

    def write() -> None:
        file, earlier = directory / "environment.json", []
        with suppress(OSError, ValueError, TypeError, AttributeError):  # of an earlier start; nothing hangs on it
            before = json.loads(file.read_text())
            earlier = [*before.pop("earlier", []), before]
        write_whole(file, json.dumps({**environment(device), "earlier": earlier}, indent=1) + "\n")
        to_yaml(config, directory / "config.yaml")
        for old in ("final", "eval", "eval.new"):
            shutil.rmtree(directory / old, ignore_errors=True)
        (directory / "report.html").unlink(missing_ok=True)

    distributed.on_main(write)


def keep_smaller(directory: Path, config: Config, learner: Learner, display: Display) -> Config:
    """After an out-of-memory in learning: write the halved budget into config.yaml, for resume too, and say so."""
    before, after = config.max_tokens_per_microbatch, learner.max_tokens
    if after < before:
        config = replace(config, max_tokens_per_microbatch=after)
        distributed.on_main(lambda: to_yaml(config, directory / "config.yaml"))
        display.say(
            f"warning: out of memory in learning; the updates were made again from the start with "
            f"max_tokens_per_microbatch {after} instead of {before}, as will be all further ones"
        )
    return config


@contextmanager
def sole_user(directory: Path) -> Iterator[None]:
    """Within it no other process can work in the run's directory; ValueError if one does."""
    held = distributed.on_main(lambda: lock_directory(directory))
    try:
        yield
    finally:
        if distributed.is_main():
            os.close(held)


def take_evaluation(directory: Path) -> None:
    """Let `eval.new/`, which is whole, become `eval/`; an old one is given up, and the page that shows it."""

    def take() -> None:
        shutil.rmtree(directory / "eval", ignore_errors=True)
        (directory / "eval.new").rename(directory / "eval")
        (directory / "report.html").unlink(missing_ok=True)

    distributed.on_main(take)


def save(directory: Path, learner: Learner, state: State, keep: int) -> None:
    """Write a checkpoint of this moment, and drop old ones."""
    content = {**asdict(state), "scaler": learner.scaler.state_dict()}

    def write() -> None:
        checkpoint.save(directory / "checkpoints", state.step, learner.policy, learner.optimizer, content)
        checkpoint.prune(directory / "checkpoints", keep, state.best_step or None)

    distributed.on_main(write)


def is_trained(directory: Path, config: Config) -> bool:
    """Whether all steps were taken and `final/` was written after the last."""

    def look() -> bool:
        newest = checkpoint.latest(directory / "checkpoints")
        if newest is None or not (directory / "final").exists():
            return False
        return int(newest.stem.removeprefix("step_")) >= config.num_steps

    return bool(distributed.on_main(look))


def restore(directory: Path, learner: Learner) -> State:
    """Load the newest checkpoint, if there is one, into the learner; returns the state to go on from."""

    def newest() -> Path | None:
        path, places = checkpoint.latest(directory / "checkpoints"), (directory / "checkpoints").glob("step_*")
        damaged = [place.name for place in places if place.suffix != ".tmp"]
        if path is None and damaged:
            raise ValueError(f"resume: of {', '.join(sorted(damaged))} in {directory / 'checkpoints'} none is complete")
        return path

    path = distributed.on_main(newest)
    if path is None:
        return State()
    content = checkpoint.load(path, learner.policy, learner.optimizer)
    learner.scaler.load_state_dict(content.pop("scaler"))
    return State(**content)
