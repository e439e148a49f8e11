"""The work that is measured, as dataclasses that are the flags too: `Work` of `bench.peers` and `bench.roofline`, and
`Sampled` of `bench.stopping`, which only samples.

Imports nothing heavy: the process that starts measurements stays small. The prompts themselves are made in
`ours.py`.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal


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
        at_least(self, {"shots": 0, "prompts": 1, "group": 2, "new_tokens": 1, "threads": 0})
        if self.train is not None and not Path(self.train).is_file():
            raise ValueError(f"train is {self.train!r}: must be a file")


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


def at_least(asked: Sampled, lowest: dict[str, int]) -> None:
    """Raises ValueError naming the first option that is below its lowest value."""
    for name, low in lowest.items():
        if getattr(asked, name) < low:
            raise ValueError(f"{name} is {getattr(asked, name)}: must be at least {low}")


def work_of(options: Work) -> dict:
    """The fields of `Work` alone, of options that may have more: the argument of every contestant."""
    return {field.name: getattr(options, field.name) for field in fields(Work)}
