"""The directory of a run: make it or find it again, claim it, and let one process at a time use it.

`<out_dir>/<run_name>/` holds config.yaml, environment.json, inputs.json, metrics.jsonl, report.html, rollouts/,
checkpoints/, final/ and eval/. Only rank 0 writes. A run that exists is resumed, never overwritten. Left out: what a
checkpoint holds (`state.py`).
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
    """Create the run's directory, or find the one to resume. Nothing is written into it yet: `claim` does that.

    Returns:
        The config, in which the values `auto` are resolved, and the directory. A resumed run keeps the values that its
        first start chose. A new run on a GPU keeps `max_tokens_per_microbatch: auto`, which the doctor resolves.

    Raises:
        ValueError: the run exists and `resume` is `never`, or it was made with a config that does not fit.
        OSError: the directory cannot be made.
    """
    return distributed.on_main(lambda: _open_directory(config, device))


def _open_directory(config: Config, device: torch.device) -> tuple[Config, Path]:
    directory = Path(config.out_dir) / config.run_name
    saved = directory / "config.yaml"
    newest = checkpoint.latest(directory / "checkpoints") if config.resume == "auto" else None
    if newest and not (saved.exists() and saved.stat().st_size):
        raise ValueError(
            f"resume: {saved} is missing or empty, so the options of the checkpoints beside it are unknown; "
            "put it back, or take another run_name"
        )
    if saved.exists() and config.resume == "auto":
        before = from_yaml(saved)
        kept = {}
        for name in ("precision", "compile", "max_tokens_per_microbatch"):
            if getattr(config, name) == "auto":
                kept[name] = getattr(before, name)
        config = resolve(replace(config, **kept), device)
        check_resumable(before, config)
        done = int(newest.stem.removeprefix("step_")) if newest else 0
        if config.num_steps < done:
            raise ValueError(
                f"num_steps is {config.num_steps}: must be at least {done}, the steps that the run has done"
            )
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
    """Write config.yaml and environment.json, and drop `final/` and its evaluation, which belong to an earlier step.

    Call it when everything that a run needs has been built, just before its first step or before it goes on. Then a
    mistyped option leaves no claimed directory that would refuse the next try.

    Raises:
        OSError: a file cannot be written.
    """

    def write() -> None:
        file, earlier = directory / "environment.json", []
        with suppress(OSError, ValueError, TypeError, AttributeError):  # of an earlier start; losing it does no harm
            before = json.loads(file.read_text())
            earlier = [*before.pop("earlier", []), before]
        write_whole(file, json.dumps({**environment(device), "earlier": earlier}, indent=1) + "\n")
        to_yaml(config, directory / "config.yaml")
        for old in ("final", "eval", "eval.new"):
            shutil.rmtree(directory / old, ignore_errors=True)
            if (directory / old).exists():
                raise OSError(f"{directory / old} is in the way: must be a directory that can be replaced; remove it")
        (directory / "report.html").unlink(missing_ok=True)

    distributed.on_main(write)


def keep_smaller(directory: Path, config: Config, max_tokens: int, display: Display) -> Config:
    """If learning has run out of memory and lowered its token budget, write it into config.yaml, and say so.

    Args:
        directory: the run's.
        config: its config so far.
        max_tokens: the learner's present budget of a micro-batch.
        display: prints the warning.

    Returns:
        The config with this budget. A resumed run reads it from config.yaml.
    """
    before, after = config.max_tokens_per_microbatch, max_tokens
    if after < before:
        config = replace(config, max_tokens_per_microbatch=after)
        distributed.on_main(lambda: to_yaml(config, directory / "config.yaml"))
        display.say(
            f"warning: out of memory in learning; the updates were made again from the start with "
            f"max_tokens_per_microbatch {after} instead of {before}, and so will be all further ones"
        )
    return config


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
        newest = checkpoint.latest(directory / "checkpoints")
        if newest is None or not (directory / "final").is_dir():
            return False
        if from_yaml(directory / "config.yaml").final_dtype != config.final_dtype:
            return False
        return int(newest.stem.removeprefix("step_")) >= config.num_steps

    return bool(distributed.on_main(look))
