"""The work that is measured, as a dataclass whose fields are also flags.

Nothing heavy is imported, so that the process that starts measurements stays small. Left out: making the prompts
(`ours.py`).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Work:
    """The sizes of a step, where it runs, and the number of steps."""

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
    """Tokens of a completion. Nothing ends one earlier, except with one_in."""
    one_in: int = 0
    """One in this many tokens of the vocabulary ends a completion, at random places; only ours can. 0: none does."""
    threads: int = 0
    """Number of torch threads, the same for all; 0: torch decides."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype. bf16: learning multiplies in bfloat16 with float32 weights; sampling uses bfloat16 weights."""
    seed: int = 0
    """Seed of exemplars, prompts and sampling."""
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
        at_least(self, {"shots": 0, "prompts": 1, "group": 2, "new_tokens": 1, "one_in": 0, "threads": 0, "seed": 0})
        at_least(self, {"steps": 1, "warmup": 0})
        for name in ("train", "recipe"):
            file = getattr(self, name)
            if file is not None and not Path(file).is_file():
                raise ValueError(f"{name} is {file!r}: must be a file")


def at_least(asked: Any, lowest: dict[str, int]) -> None:
    """Raise ValueError for the first option with a number that is NaN or below its lowest value."""
    for name, low in lowest.items():
        value = getattr(asked, name)
        several = value if isinstance(value, tuple) else (value,)
        if not several or not all(low <= number < 2**63 for number in several):
            raise ValueError(f"{name} is {value}: must be at least {low}, and below 2**63")


def work_of(options: Work) -> dict:
    """Only the fields of `Work`, from options that may have more. This is the argument of every contestant."""
    return {field.name: getattr(options, field.name) for field in fields(Work)}
