"""The options of an evaluation, and the options that a training run uses for its own evaluations. Runs nothing."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import data
from grpo import options
from grpo.config import Config
from grpo.options import option, read_yaml
from grpo.prompts.source import Source


@dataclass(frozen=True)
class EvalOptions(Source):
    """Evaluate a model, or a base and a tuned model side by side, under several graders and stop policies.

    With --regrade DIR, grade old transcripts again without a model.
    """

    # Facts: `no_result`: it changes no result beyond rounding, but says where things are or how the work is done.
    # `regrades`: it may be given beside --regrade.
    model: str | None = option(None, no_result=True)
    """The (base) model: embedded, a local directory or a hub name; `revision` is of this one."""
    tuned: str | None = option(None, no_result=True)
    """The tuned model, such as runs/NAME/final."""
    regrade: str | None = option(None, no_result=True)
    """Directory of an earlier evaluation, whose transcripts are graded again with --graders; no model is run."""
    split: Literal["train", "validation", "test"] = "test"
    """Which split of the data to evaluate on."""
    shots: tuple[int, ...] = option((0,), ">= 0", distinct=True)
    """Numbers of worked examples in the prompt; each number is evaluated."""
    limit: int = option(0, ">= 0")
    """Evaluate only the first `limit` problems; 0: all."""
    budget: int = option(512, ">= 1")
    """Longest completion in tokens."""
    stop_early: bool = False
    """End completions at the stop string, which is faster; run-on text can then not be graded."""
    graders: Literal["auto"] | tuple[str, ...] = option("auto", distinct=True, regrades=True, task="graders")
    """Entries of grpo/evaluation/graders.py, or reward functions file.function, right from `threshold` on; auto: those
    of the data."""
    lenient: str | None = option("auto", regrades=True, task="lenient")
    """Grader that reads the answer wherever it stands, used beside the others; None: none. auto: that of the data."""
    threshold: float | None = option(None, "finite", regrades=True)
    """Value of a reward function among the graders from which an answer is right; None: its full value."""
    format: str | None = option("auto", regrades=True, task="format")
    """Reward function that decides whether a text has the format: by its full value. None: there is no format; auto:
    that of the data."""
    samples: int = option(1, ">= 1")
    """Completions per problem; with more than 1, pass@k and majority@k are computed."""
    temperature: float = option(0.0, ">= 0 and finite")
    """Sampling temperature; 0: greedy. > 0 with several samples."""
    max_prompt_tokens: int = option(4096, ">= 1", no_result=True)
    """Longest prompt in tokens; a longer one is an error."""
    batch: int = option(64, ">= 1", no_result=True)
    """Completions sampled at once, per process."""
    timeout: Literal["auto"] | float = option("auto", "> 0 and finite", no_result=True, regrades=True, task="timeout")
    """Seconds one call of a reward function may take; longer counts as wrong. auto: those of the data."""
    reward_workers: int = option(1, ">= 1 and <= 256", no_result=True, regrades=True)
    """Processes that call the reward functions side by side; for rewards that run programs, one for each free core."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", no_result=True)
    """Where to compute; auto: cuda if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = option("auto", no_result=True)
    """Dtype of the matrix products. auto: bf16 on cuda, fp32 on cpu."""
    out: str | None = option(None, no_result=True, regrades=True)
    """Directory for eval.json and the transcripts; None: eval, or the directory of --regrade."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is out of its range."""
        options.check(self)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"temperature is {self.temperature}: must be finite, >= 0, and > 0 with several samples")
        if (self.model is None) == (self.regrade is None):
            raise ValueError(f"model: give either --model or --regrade{', not both' if self.model else ''}")
        if self.regrade is not None:
            allowed = options.facts_of(EvalOptions, "regrades")
            for field in fields(self):
                if field.name not in ("regrade", *allowed) and getattr(self, field.name) != field.default:
                    only = ", ".join(allowed)
                    raise ValueError(f"{field.name}: must be left out with --regrade, which allows only {only}")
        else:  # the data of transcripts is known when they are read
            vars(self).update(options.followed(self, "task", data.task(self.data)))


def options_of(config: Config, out: Path) -> EvalOptions:
    """The final evaluation of a training run: its base model and `<run>/final`.

    The options of a run say which option of an evaluation takes their value (`evaluation=` in `grpo/config.py`).
    """
    taken = {theirs: getattr(config, ours) for ours, theirs in options.facts_of(Config, "evaluation").items()}
    return EvalOptions(
        **taken,
        tuned=str(out.parent / "final"),
        shots=config.eval_shots or (config.num_shots,),
        stop_early=True,
        graders=(config.eval_correct,),
        max_prompt_tokens=max(config.max_prompt_tokens, EvalOptions.max_prompt_tokens),  # more shots than in training
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


NO_RESULT = options.facts_of(EvalOptions, "no_result").keys()


def is_evaluated(options: EvalOptions) -> bool:
    """Whether `out` holds this evaluation: with the same options except `NO_RESULT`, and at least these shots."""
    out = Path(options.out or "eval")
    if not (out / "eval.json").exists() or not (out / "options.yaml").exists():
        return False
    before = read_yaml(EvalOptions, out / "options.yaml")
    compared = vars(options).keys() - NO_RESULT - {"shots"}
    same = all(getattr(before, name) == getattr(options, name) for name in compared)
    return same and set(options.shots) <= set(before.shots)
