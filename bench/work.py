"""The work that is measured, as dataclasses that are the flags too: `Work` of `bench.peers` and `bench.roofline`, and
`Sampled` of `bench.stopping`, which only samples.

Imports nothing heavy: the process that starts measurements stays small. The prompts themselves are made in
`ours.py`.
"""

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from bench.process import call


@dataclass(frozen=True)
class Sampled:
    """What is sampled from, and on what."""

    model: str = "embedded"
    """embedded, or a directory with a model and its tokenizer."""
    train: str | None = None
    """GSM8K's training file, JSON lines of question and answer; None: the arithmetic problems shipped here."""
    shots: int = 8
    """Worked examples put before each question."""
    prompts: int = 4
    """Prompts of a step."""
    group: int = 8
    """Completions of each prompt."""
    new_tokens: int = 64
    """Tokens of a completion at most; of every one where nothing ends it earlier."""
    threads: int = 0
    """Threads of torch, the same for all; 0: as torch decides."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: learning multiplies matrices in bfloat16 over float32 weights, sampling alone has bfloat16 weights."""
    seed: int = 0
    """Seed of exemplars, prompts and sampling."""

    def __post_init__(self) -> None:
        """Raises ValueError on a size or file that can not be."""
        at_least(self, {"shots": 0, "prompts": 1, "group": 2, "new_tokens": 1, "threads": 0, "seed": 0})
        for name in ("train", "recipe"):
            if (file := getattr(self, name, None)) is not None and not Path(file).is_file():
                raise ValueError(f"{name} is {file!r}: must be a file")


@dataclass(frozen=True)
class Work(Sampled):
    """What is sampled and learned from, and how often. Nothing ends a completion early."""

    steps: int = 1
    """Steps that are timed; what is reported is their mean."""
    warmup: int = 1
    """Whole steps before those, not in the mean: the first one compiles, or meets memory that is new to it."""
    random_weights: bool = False
    """Take only config.json (and the tokenizer) of the model and draw the weights: no speed depends on them."""
    tokenizer: str | None = None
    """With random_weights: where the tokenizer is; None: with the model. It is filled up to the model's vocabulary."""
    recipe: str | None = None
    """YAML file of further options of ours, such as activation_checkpointing; what is compared is not taken from it."""

    def __post_init__(self) -> None:
        """Raises ValueError on a size or file that can not be."""
        super().__post_init__()
        at_least(self, {"steps": 1, "warmup": 0})


def at_least(asked: Any, lowest: dict[str, int]) -> None:
    """Raises ValueError naming the first option, of one number or several, that is below its lowest value or NaN."""
    for name, low in lowest.items():
        value = getattr(asked, name)
        several = value if isinstance(value, tuple) else (value,)
        if not several or not all(low <= number < 2**63 for number in several):
            raise ValueError(f"{name} is {value}: must be at least {low}, and below 2**63")


def check_out(out: str) -> None:
    """Raises ValueError if no file can be written there: before the work, which would be lost, and not after it."""
    path = Path(out)
    try:
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"out is {out!r}: must be a file that can be written ({error.strerror})") from None


def work_of(options: Work) -> dict:
    """The fields of `Work` alone, of options that may have more: the argument of every contestant."""
    return {field.name: getattr(options, field.name) for field in fields(Work)}


def prepared(asked: Work, place: str, limit: float) -> dict:
    """The work, when all of it could be read, in a process of its own; `place`: where random weights are drawn to.

    Raises:
        ValueError: what is wrong with it; nothing was measured or written yet.
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
