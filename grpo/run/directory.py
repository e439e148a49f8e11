"""The directory of a run: made or found again, claimed, used by one process at a time.

`<out_dir>/<run_name>/` holds config.yaml, environment.json, inputs.json, metrics.jsonl, rollouts/, checkpoints/,
final/, eval/ and report.html. Rank 0 alone writes. A directory that exists is resumed, never overwritten. Left out:
what a checkpoint holds (`state.py`).
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from grpo import distributed
from grpo.config import Config, check_resumable, from_yaml, taken, to_yaml
from grpo.files import lock_directory, write_whole
from grpo.run import checkpoint
from grpo.run.log import Display
from grpo.run.machine import environment, resolve


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


def keep_smaller(directory: Path, config: Config, max_tokens: int, display: Display) -> Config:
    """After an out-of-memory in learning: write the halved budget into config.yaml, for resume too, and say so."""
    before, after = config.max_tokens_per_microbatch, max_tokens
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


def is_trained(directory: Path, config: Config) -> bool:
    """Whether all steps were taken and `final/` was written after the last, in the dtype that is asked for."""

    def look() -> bool:
        newest = checkpoint.latest(directory / "checkpoints")
        if newest is None or not (directory / "final").exists():
            return False
        if from_yaml(directory / "config.yaml").final_dtype != config.final_dtype:
            return False
        return int(newest.stem.removeprefix("step_")) >= config.num_steps

    return bool(distributed.on_main(look))


