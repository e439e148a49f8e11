"""The work that is measured, as dataclasses whose fields are also flags.

`Sampled` is for `bench.stopping`, which only samples. `Work` is for `bench.peers` and `bench.roofline`. Nothing heavy
is imported, so that the process that starts measurements stays small. Left out: making the prompts (`ours.py`).
"""

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from bench.process import call


@dataclass(frozen=True)
class Sampled:
    """The sizes of a rollout, and where it runs."""

    model: str = "embedded"
    """embedded, or a directory with a model and its tokenizer."""
    train: str | None = None
    """GSM8K's training file, JSON lines of question and answer; None: the arithmetic problems of this repository."""
    shots: int = 8
    """Worked examples put before each question."""
    prompts: int = 4
    """Prompts in a step."""
    group: int = 8
    """Completions per prompt."""
    new_tokens: int = 64
    """Longest completion in tokens; each is this long unless something ends it earlier."""
    threads: int = 0
    """Number of torch threads, the same for all; 0: torch decides."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype. bf16: learning multiplies in bfloat16 with float32 weights; sampling uses bfloat16 weights."""
    seed: int = 0
    """Seed of exemplars, prompts and sampling."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size or file that is not allowed."""
        at_least(self, {"shots": 0, "prompts": 1, "group": 2, "new_tokens": 1, "threads": 0, "seed": 0})
        for name in ("train", "recipe"):
            if (file := getattr(self, name, None)) is not None and not Path(file).is_file():
                raise ValueError(f"{name} is {file!r}: must be a file")


@dataclass(frozen=True)
class Work(Sampled):
    """The sizes of a whole step, and the number of steps. Nothing ends a completion early."""

    steps: int = 1
    """Number of timed steps; the mean over them is reported."""
    warmup: int = 1
    """Steps before the timed ones. They are not in the mean, because the first one compiles and allocates memory."""
    random_weights: bool = False
    """Use only config.json and tokenizer of the model, with random weights; speed does not depend on weights."""
    tokenizer: str | None = None
    """With random_weights: directory of the tokenizer; None: that of the model. It is extended to the vocabulary."""
    recipe: str | None = None
    """YAML file with further options of ours, such as activation_checkpointing. The flags here override it."""

    def __post_init__(self) -> None:
        """Raises ValueError for a size or file that is not allowed."""
        super().__post_init__()
        at_least(self, {"steps": 1, "warmup": 0})


def at_least(asked: Any, lowest: dict[str, int]) -> None:
    """Raise ValueError for the first option with a number that is NaN or below its lowest value."""
    for name, low in lowest.items():
        value = getattr(asked, name)
        several = value if isinstance(value, tuple) else (value,)
        if not several or not all(low <= number < 2**63 for number in several):
            raise ValueError(f"{name} is {value}: must be at least {low}, and below 2**63")


def check_out(out: str) -> None:
    """Raise ValueError if no file can be written there. Check before the work, which would be lost otherwise."""
    path = Path(out)
    try:
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"out is {out!r}: must be a file that can be written ({error.strerror})") from None


def work_of(options: Work) -> dict:
    """Only the fields of `Work`, from options that may have more. This is the argument of every contestant."""
    return {field.name: getattr(options, field.name) for field in fields(Work)}


def prepared(asked: Work, place: str, limit: float) -> dict:
    """Check in another process that all of the work can be read, and return its fields.

    Args:
        asked: the work.
        place: directory for a model with random weights.
        limit: seconds for the check.

    Raises:
        ValueError: something cannot be read; nothing was measured or written yet.
    """
    work, calls = work_of(asked), []
    if asked.random_weights:
        made = {"model": asked.model, "directory": place, "tokenizer": asked.tokenizer, "seed": asked.seed}
        calls.append(("bench.models:make", made))
        work["model"] = place
    for function, arguments in [*calls, ("bench.ours:check", {"work": work})]:
        if failed := call(function, arguments, limit=limit).get("error"):
            raise ValueError(failed)
    return work
