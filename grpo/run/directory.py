"""The directory of a run: make it or find it again, claim it, and let one process at a time use it.

`<out_dir>/<run_name>/` holds config.yaml, environment.json, inputs.json, metrics.jsonl, report.html, rollouts/,
replay/, checkpoints/, final/, adapter/ and eval/. Only rank 0 writes. A run that exists is resumed, never overwritten.
Left out: what a checkpoint holds (`state.py`).
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from grpo import distributed
from grpo.config import Config, check_resumable, from_yaml, refuse_auto, to_yaml
from grpo.files import lock_directory, make_directory, write_whole
from grpo.run import checkpoint, inputs
from grpo.run.log import Display, say
from grpo.run.machine import environment

REHEARSAL = "rehearsal"
"""Name of a file that is there while learning is rehearsed, and after that has failed."""
RESULTS = ("final", "adapter", "eval")
"""Directories of a finished run."""


def begun(asked: Config) -> Config | None:
    """The config that the run to resume began with; None: a new run. It only reads.

    Raises:
        ValueError: the directory is in use and may not be, the run has done more steps, or its config or its
            checkpoints are missing.
    """
    directory = place_of(asked)
    saved, done = directory / "config.yaml", _steps_saved(directory)
    if asked.resume == "never" and directory.exists() and any(directory.iterdir()):
        raise ValueError(f"run_name: {directory} exists already; continue it with --resume auto, or take another name")
    found = [name for name in RESULTS if (directory / name).exists()]
    if found and not any((directory / "checkpoints").glob("step_*")):
        raise ValueError(
            f"resume: {directory} has {found[0]}/ but no checkpoint to go on from, and a run that starts again would "
            "replace it; put checkpoints/ back, or take another run_name"
        )
    if saved.exists() and saved.stat().st_size:
        if asked.num_steps < done:
            raise ValueError(
                f"num_steps is {asked.num_steps}: must be at least {done}, the steps that the run has done"
            )
        return from_yaml(saved)
    if done:
        raise ValueError(
            f"resume: {saved} is missing or empty, so the options of the checkpoints beside it are unknown; "
            "put it back, or take another run_name"
        )
    return None


def open_directory(config: Config, before: Config | None) -> Path:
    """Create the run's directory, or find the one to resume. Nothing is written into it yet: `claim` does that.

    Args:
        config: of the run, with every `auto` settled.
        before: what `begun` returned.

    Raises:
        ValueError: the run was made with a config that does not fit, or an `auto` is not settled.
        OSError: the directory cannot be made.
    """
    refuse_auto(config)
    if before:
        check_resumable(before, config)
    directory = place_of(config)
    make_directory(directory, "out_dir")
    return directory


def place_of(config: Config) -> Path:
    """Where a run is, or would be."""
    return Path(config.out_dir) / config.run_name


def refusal(config: Config) -> str:
    """Why the run may not start or continue in its directory; empty if it may. It only reads."""
    try:
        if before := begun(config):
            check_resumable(before, config)
    except ValueError as error:
        return str(error)
    return ""


def _steps_saved(directory: Path) -> int:
    """The step of the newest checkpoint; 0: there is none."""
    newest = checkpoint.latest(directory / "checkpoints")
    return int(newest.stem.removeprefix("step_")) if newest else 0


def claim(
    directory: Path,
    config: Config,
    device: torch.device,
    step: int,
    made_of: dict,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write config.yaml, environment.json and inputs.json, and drop model and evaluation of an earlier step.

    Call it when everything that a run needs has been built, just before its first step or before it goes on. Then a
    mistyped option leaves no claimed directory that would refuse the next try.

    Args:
        directory: the run's.
        config: its config.
        device: where it computes.
        step: steps done.
        made_of: what `inputs.look` says. What has changed since the run began is said, and a changed base is refused.
        facts: what the rewards say of the machine, for environment.json.

    Raises:
        ValueError: as `inputs.check`. Nothing is dropped then.
        OSError: a file cannot be written.
    """
    inputs.check(directory, config, step, made_of)

    def write() -> None:
        file, earlier = directory / "environment.json", []
        with suppress(OSError, ValueError, TypeError, AttributeError):  # of an earlier start; losing it does no harm
            before = json.loads(file.read_text())
            earlier = [*before.pop("earlier", []), before]
        write_whole(file, json.dumps({**environment(device), **(facts or {}), "earlier": earlier}, indent=1) + "\n")
        to_yaml(config, directory / "config.yaml")
        for old in (*RESULTS, "eval.new"):
            shutil.rmtree(directory / old, ignore_errors=True)
            if (directory / old).exists():
                raise OSError(f"{directory / old} is in the way: must be a directory that can be replaced; remove it")
        (directory / "report.html").unlink(missing_ok=True)

    distributed.on_main(write)


def keep_smaller(directory: Path, config: Config, before: int, after: int, display: Display) -> None:
    """If learning has run out of memory and lowered its token budget, write it into config.yaml, and say so.

    Args:
        directory: the run's.
        config: its config; a resumed run reads the new budget.
        before, after: the learner's budget of a micro-batch before and after a step.
        display: prints the warning.
    """
    if after < before:
        smaller = replace(config, max_tokens_per_microbatch=after)
        distributed.on_main(lambda: to_yaml(smaller, directory / "config.yaml"))
        display.say(
            f"warning: out of memory in learning; the updates were made again from the start with "
            f"max_tokens_per_microbatch {after} instead of {before}, and so will be all further ones"
        )


def after_rehearsal(config: Config) -> Config:
    """The config; with half as large micro-batches if an earlier start ended in a rehearsal (`rehearsal`)."""
    file = place_of(config) / REHEARSAL
    if config.resume == "never" or not file.exists():
        return config
    half = min(config.max_tokens_per_microbatch, max(1, int(file.read_text()) // 2))
    say(f"warning: the last start ended in a rehearsal of learning; max_tokens_per_microbatch is {half} from now on")
    return replace(config, max_tokens_per_microbatch=half)


@contextmanager
def rehearsal(directory: Path, tokens: int) -> Iterator[None]:
    """Around a trial of the largest micro-batch, which may run out of memory and leave other processes waiting.

    A mark of it lies in the directory meanwhile, so that the next start takes half.

    Args:
        directory: the run's.
        tokens: of a micro-batch.

    Raises:
        ValueError: memory does not suffice.
    """
    mark = directory / REHEARSAL
    distributed.on_main(lambda: write_whole(mark, f"{tokens}\n"))
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"max_tokens_per_microbatch is {tokens}: out of memory in a rehearsal of learning; start again with "
            "--resume auto, which takes half (torchrun --max-restarts does so by itself), or use "
            f"activation_checkpointing ({error})"
        ) from error
    distributed.any_true(False)  # until all have come so far
    distributed.on_main(lambda: mark.unlink())


@contextmanager
def sole_user(directory: Path) -> Iterator[None]:
    """Lock the run's directory against other processes.

    Raises:
        ValueError: another process works in it.
    """
    held = distributed.on_main(lambda: lock_directory(directory))
    try:
        yield
    finally:
        if distributed.is_main():
            os.close(held)


def take_evaluation(directory: Path) -> None:
    """Rename the finished `eval.new/` to `eval/`. An older evaluation is removed, and the report that shows it."""

    def take() -> None:
        shutil.rmtree(directory / "eval", ignore_errors=True)
        (directory / "eval.new").rename(directory / "eval")
        (directory / "report.html").unlink(missing_ok=True)

    distributed.on_main(take)


def is_trained(directory: Path, config: Config) -> bool:
    """Whether all steps were taken and `final/` was written after the last, in the dtype that is asked for."""

    def look() -> bool:
        if _steps_saved(directory) < config.num_steps or not (directory / "final").is_dir():
            return False
        return from_yaml(directory / "config.yaml").final_dtype == config.final_dtype

    return bool(distributed.on_main(look))
