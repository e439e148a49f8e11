"""How an evaluation is done: its options, and those that a training run's own evaluations follow. Runs nothing."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from grpo.config import Config
from grpo.evaluation import grading
from grpo.evaluation.graders import GRADERS
from grpo.options import read_yaml


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a model, or a base and a tuned one side by side, under several graders and stop policies.

    Or, with --regrade DIR, grade old transcripts again without a model.
    """

    model: str | None = None
    """The (base) model: embedded, a local directory or a hub name."""
    tuned: str | None = None
    """The tuned model, such as runs/NAME/final."""
    regrade: str | None = None
    """Directory of an earlier evaluation: grade its transcripts again, with --graders, instead of a model."""
    revision: str | None = None
    """Commit, tag or branch of a hub `model`."""
    data: str = "arithmetic"
    """Name of a file in data/: arithmetic, gsm8k, jsonl, ..."""
    data_path: str | None = None
    """Directory with train.jsonl and test.jsonl; None: the data's own source."""
    split: Literal["train", "validation", "test"] = "test"
    """Which problems."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template."""
    seed: int = 0
    """Seed of the worked examples, as in training, and of sampling. >= 0."""
    shots: tuple[int, ...] = (0,)
    """Numbers of worked examples, each evaluated. >= 0."""
    limit: int = 0
    """The first so many problems; 0: all. >= 0."""
    budget: int = 512
    """Longest completion in tokens. >= 1."""
    stop_early: bool = False
    """End completions at the stop string, for speed; then nothing can be said of run-on text."""
    graders: tuple[str, ...] = tuple(GRADERS)
    """Entries of grpo/graders.py, or reward functions file.function, right above 0."""
    format: str = "gsm8k.format"
    """Reward function that decides whether a text has the format: a value above 0."""
    samples: int = 1
    """Completions per problem; above 1: pass@k and majority@k. >= 1."""
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
    """Directory for eval.json and the transcripts; None: eval, or that of --regrade."""

    def __post_init__(self) -> None:
        """Raises ValueError on the first option out of its range."""
        at_least = {"seed": 0, "limit": 0, "budget": 1, "samples": 1, "max_prompt_tokens": 1, "batch": 1}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: must be a whole number >= {low}")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}: must be below 2**63")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout is {self.timeout}: must be > 0 and finite")
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots is {self.shots}: must be whole numbers >= 0, none twice")
        if isinstance(self.graders, str):
            raise ValueError(f"graders is {self.graders!r}: must be a tuple of names, not one text")
        if not self.graders or len(set(self.graders)) < len(self.graders):
            raise ValueError(f"graders is {self.graders}: must be one or more names, none twice")
        if not 0 <= self.temperature < math.inf or (self.samples > 1 and self.temperature == 0):
            raise ValueError(f"temperature is {self.temperature}: must be finite, >= 0, and > 0 with several samples")
        if (self.model is None) == (self.regrade is None):
            raise ValueError("model: either --model or --regrade must be given, and not both")
        if self.regrade is not None:
            allowed = ("graders", "format", "timeout", "out")
            for field in fields(self):
                if field.name not in ("regrade", *allowed) and getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name}: --regrade takes texts as they are, and only {', '.join(allowed)}")

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop policies that can be applied to what is generated."""
        return ("stop_string",) if self.stop_early else grading.STOPS


def options_of(config: Config, out: Path) -> EvalOptions:
    """The evaluation that a training run ends with, of its base model and of `<run>/final`."""
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
        format=config.eval_format,
        batch=config.eval_batch,
        max_prompt_tokens=max(config.max_prompt_tokens, EvalOptions.max_prompt_tokens),  # more shots than in training
        timeout=config.reward_timeout,
        out=str(out),
    )


def validation_options(config: Config) -> EvalOptions:
    """The evaluation during training, of the run's own number of shots."""
    options = options_of(config, Path("eval"))
    return replace(options, split="validation", shots=(config.num_shots,), limit=config.eval_limit)


def planned(config: Config) -> list[EvalOptions]:
    """Every evaluation that a training run will make, each once."""
    during = [validation_options(config)] if config.eval_every else []
    return during + ([options_of(config, Path("eval"))] if config.final_eval else [])


NO_RESULT = frozenset(
    ("model", "tuned", "data_path", "out", "regrade", "device", "precision", "batch", "timeout", "max_prompt_tokens")
)
"""Options that say where things are or how the work is done, and change no result beyond rounding."""


def is_evaluated(options: EvalOptions) -> bool:
    """Whether `out` holds this evaluation: made with the same options (`NO_RESULT` aside), at these shots or more."""
    out = Path(options.out or "eval")
    if not (out / "eval.json").exists() or not (out / "options.yaml").exists():
        return False
    before = read_yaml(EvalOptions, out / "options.yaml")
    compared = vars(options).keys() - NO_RESULT - {"shots"}
    same = all(getattr(before, name) == getattr(options, name) for name in compared)
    return same and set(options.shots) <= set(before.shots)
