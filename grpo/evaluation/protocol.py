"""The options of an evaluation, and the options that a training run uses for its own evaluations. Runs nothing."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from grpo.config import Config
from grpo.evaluation.graders import GRADERS
from grpo.options import read_yaml


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a model, or a base and a tuned model side by side, under several graders and stop policies.

    With --regrade DIR, grade old transcripts again without a model.
    """

    model: str | None = None
    """The (base) model: embedded, a local directory or a hub name."""
    tuned: str | None = None
    """The tuned model, such as runs/NAME/final."""
    regrade: str | None = None
    """Directory of an earlier evaluation, whose transcripts are graded again with --graders; no model is run."""
    revision: str | None = None
    """Commit, tag or branch of `model` on the hub; None: its default branch."""
    data: str = "arithmetic"
    """Name of a file in data/: arithmetic, gsm8k, jsonl, ..."""
    data_path: str | None = None
    """Directory with train.jsonl and test.jsonl (or .json, .parquet), or one file; None: the data's own source."""
    split: Literal["train", "validation", "test"] = "test"
    """Which split of the data to evaluate on."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template."""
    seed: int = 0
    """Seed of the worked examples, as in training, and of sampling. >= 0."""
    shots: tuple[int, ...] = (0,)
    """Numbers of worked examples in the prompt; each number is evaluated. >= 0."""
    limit: int = 0
    """Evaluate only the first `limit` problems; 0: all. >= 0."""
    budget: int = 512
    """Longest completion in tokens. >= 1."""
    stop_early: bool = False
    """End completions at the stop string, which is faster; run-on text can then not be graded."""
    graders: tuple[str, ...] = tuple(GRADERS)
    """Entries of grpo/graders.py, or reward functions file.function, right from `threshold` on."""
    threshold: float | None = None
    """Value of a reward function among the graders from which an answer is right; None: its full value. Finite."""
    format: str = "gsm8k.format"
    """Reward function that decides whether a text has the format: by its full value."""
    samples: int = 1
    """Completions per problem; with more than 1, pass@k and majority@k are computed. >= 1."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy. >= 0, and > 0 with several samples."""
    max_prompt_tokens: int = 4096
    """Longest prompt in tokens; a longer one is an error. >= 1."""
    batch: int = 64
    """Completions sampled at once, per process. >= 1."""
    timeout: float = 5.0
    """Seconds one call of a reward function may take; longer counts as wrong. > 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: cuda if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Dtype of the matrix products. auto: bf16 on cuda, fp32 on cpu."""
    out: str | None = None
    """Directory for eval.json and the transcripts; None: eval, or the directory of --regrade."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is out of its range."""
        at_least = {"seed": 0, "limit": 0, "budget": 1, "samples": 1, "max_prompt_tokens": 1, "batch": 1}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: must be a whole number >= {low}")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}: must be below 2**63")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout is {self.timeout}: must be > 0 and finite")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}: must be None, or finite")
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots is {self.shots}: must be whole numbers >= 0, none twice")
        if isinstance(self.graders, str):
            raise ValueError(f"graders is {self.graders!r}: must be a tuple of names, not one text")
        if not self.graders or len(set(self.graders)) < len(self.graders):
            raise ValueError(f"graders is {self.graders}: must be one or more names, none twice")
        if not 0 <= self.temperature < math.inf or (self.samples > 1 and self.temperature == 0):
            raise ValueError(f"temperature is {self.temperature}: must be finite, >= 0, and > 0 with several samples")
        if (self.model is None) == (self.regrade is None):
            raise ValueError("model: give either --model or --regrade, not both")
        if self.regrade is not None:
            allowed = ("graders", "threshold", "format", "timeout", "out")
            for field in fields(self):
                if field.name not in ("regrade", *allowed) and getattr(self, field.name) != field.default:
                    only = ", ".join(allowed)
                    raise ValueError(f"{field.name}: must be left out with --regrade, which allows only {only}")


def options_of(config: Config, out: Path) -> EvalOptions:
    """The final evaluation of a training run: its base model and `<run>/final`."""
    return EvalOptions(
        model=config.model,
        tuned=str(out.parent / "final"),
        revision=config.revision,
        data=config.data,
        data_path=config.data_path,
        chat=config.chat,
        seed=config.seed,
        shots=config.eval_shots or (config.num_shots,),
        limit=config.final_eval_limit,
        budget=config.max_new_tokens,
        stop_early=True,
        graders=(config.eval_correct,),
        threshold=config.eval_threshold,
        format=config.eval_format,
        batch=config.eval_batch,
        max_prompt_tokens=max(config.max_prompt_tokens, EvalOptions.max_prompt_tokens),  # more shots than in training
        timeout=config.reward_timeout,
        out=str(out),
    )


def validation_options(config: Config) -> EvalOptions:
    """The evaluation during training, with the run's own number of shots."""
    options = options_of(config, Path("eval"))
    return replace(options, split="validation", shots=(config.num_shots,), limit=config.eval_limit)


def planned(config: Config) -> list[EvalOptions]:
    """The options of every evaluation that a training run will make."""
    during = [validation_options(config)] if config.eval_every else []
    return during + ([options_of(config, Path("eval"))] if config.final_eval else [])


NO_RESULT = frozenset(
    ("model", "tuned", "data_path", "out", "regrade", "device", "precision", "batch", "timeout", "max_prompt_tokens")
)
"""Options that change no result beyond rounding: they say where things are or how the work is done."""


def is_evaluated(options: EvalOptions) -> bool:
    """Whether `out` holds this evaluation: with the same options except `NO_RESULT`, and at least these shots."""
    out = Path(options.out or "eval")
    if not (out / "eval.json").exists() or not (out / "options.yaml").exists():
        return False
    before = read_yaml(EvalOptions, out / "options.yaml")
    compared = vars(options).keys() - NO_RESULT - {"shots"}
    same = all(getattr(before, name) == getattr(options, name) for name in compared)
    return same and set(options.shots) <= set(before.shots)
