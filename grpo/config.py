"""Every option of a run: one frozen flat dataclass, which is the flags of `train.py` and the keys of a recipe.

What is left out: reading text (`options.py`); names that are functions or files (`loss`, `advantage`, `data`), found
where their tables live, with `lookup`; sizes that depend on the machine.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_type_hints

from grpo import options

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """Train a language model with GRPO and verifiable rewards.

    Without any option: the demo. --recipe FILE reads options from a YAML file, and flags go on top of it.
    """

    # The run.
    run_name: str = "demo"
    """Name of the run; everything is written to <out_dir>/<run_name>. A plain name: letters, digits, `_ . + = , -`."""
    out_dir: str = "runs"
    """Directory that holds the runs."""
    seed: int = 0
    """Seed of data order, sampling and minibatch order. >= 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: cuda if there is one. With torchrun, process k of a machine takes GPU k."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Dtype of matrix products; master weights are float32 (float64 in fp64). auto: bf16 on cuda, fp32 on cpu."""
    resume: Literal["never", "auto"] = "never"
    """never: an existing run is an error. auto: go on from its newest checkpoint, or start if there is none."""
    check: bool = False
    """Start nothing: look at options, data, tokenizer and model sizes, and say what is wrong with them."""
    ddp_timeout: float = 600.0
    """Seconds a process waits for another one, such as for its slowest rewards, before it stops. > 0, at most 1e9."""

    # Model and data.
    model: str = "embedded"
    """embedded: the small base model shipped here; else a local directory or a Hugging Face hub name."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; None: its default branch."""
    data: str = "arithmetic"
    """Name of a file in data/: arithmetic, gsm8k, jsonl, ..."""
    data_path: str | None = None
    """Directory with train.jsonl and test.jsonl, for data read from files; None: the data's own source."""
    num_shots: int = 0
    """Worked examples put before each question. >= 0."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template, worked examples as turns."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens; a longer one is an error at start-up, never cut. >= 1."""

    # Rollouts. Sizes are global, over all processes.
    num_steps: int = 30
    """Steps; each one samples, rewards and learns. >= 1."""
    prompts_per_step: int = 16
    """Prompts drawn in a step. >= 1."""
    group_size: int = 8
    """Completions sampled for each prompt: the group that advantages compare. >= 1."""
    max_new_tokens: int = 96
    """Longest completion in tokens. >= 1."""
    temperature: float = 1.0
    """Sampling temperature; divides the logits of the policy, old policy and reference alike. > 0."""

    # Rewards.
    rewards: tuple[str, ...] = ("gsm8k.format", "gsm8k.correctness")
    """Reward functions, file.function in rewards/. At least one, none twice."""
    reward_weights: tuple[float, ...] = (1.0, 1.0)
    """One factor for each reward. Finite."""
    reward_timeout: float = 5.0
    """Seconds one call of a reward function may take; longer makes the sample invalid. > 0."""

    # Algorithm.
    combine: Literal["rewards", "advantages"] = "rewards"
    """rewards: the advantage of the weighted sum. advantages: the weighted sum of each reward's own advantage."""
    advantage: str = "grpo"
    """Function of grpo/advantages.py: grpo, dr_grpo, rloo."""
    loss: str = "grpo"
    """Function of grpo/losses.py: grpo, gspo, cispo, reinforce."""
    weighting: str = "token_mean"
    """Function of grpo/weighting.py, what a token counts: token_mean, sequence_mean, constant_length."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low. 0..1."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high. >= 0, inf allowed."""
    kl: str = "k3"
    """Function of grpo/kl.py, the estimator of the KL to the reference: k1, k2, k3."""
    kl_coef: float = 0.01
    """Weight of the KL in the loss, per token in nats; 0: no reference is loaded. >= 0."""
    sampler_correction: str = "none"
    """Function of grpo/corrections.py, for a sampler that differs from the learner: none, truncate, mask."""
    correction_cap: float = 2.0
    """Largest factor that sampler_correction may give. >= 1."""
    num_epochs: int = 1
    """Passes over the rollouts of a step. >= 1."""
    minibatch_size: int = 0
    """Sequences that make one update, a multiple of group_size; 0: the whole step."""
    mask_truncated: bool = False
    """Leave completions out of the loss that were cut at max_new_tokens (they stay in the baseline)."""

    # Optimiser (AdamW) and memory.
    learning_rate: float = 2e-4
    """Peak learning rate. >= 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling, to reach 0 after num_steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0. >= 0."""
    adam_beta1: float = 0.9
    """Decay of the first moment. 0..1, 1 excluded."""
    adam_beta2: float = 0.99
    """Decay of the second moment. 0..1, 1 excluded."""
    weight_decay: float = 0.0
    """Decoupled weight decay. >= 0."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm; 0: off. >= 0."""
    max_tokens_per_microbatch: int | Literal["auto"] = "auto"
    """Tokens of a forward and backward pass, per process; halved where a GPU has no room. >= 1; auto: by the memory."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    compile: bool | Literal["auto"] = "auto"
    """Compile layers and attention for learning, in the first step (a minute or more); auto: on cuda in bf16 or fp16,
    where there is a C compiler. True elsewhere works and gains little."""

    # Checkpoints and evaluation.
    checkpoint_every: int = 10
    """Steps between checkpoints; 0: only at the end and when interrupted. >= 0."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best on validation is kept beside them. >= 1."""
    eval_every: int = 0
    """Steps between evaluations on validation; 0: never. >= 0."""
    eval_limit: int = 200
    """Problems of an evaluation during training; 0: all. >= 0."""
    eval_batch: int = 64
    """Problems sampled at once in evaluations, per process. >= 1."""
    eval_shots: tuple[int, ...] | None = None
    """Numbers of worked examples for the final evaluation; None: num_shots."""
    final_eval: bool = True
    """Evaluate base and tuned model on test at the end."""
    final_eval_limit: int = 500
    """Problems of the final evaluation; 0: all. >= 0."""
    eval_correct: str = "gsm8k.correctness"
    """Reward function that decides in evaluations whether an answer is right: a value above 0."""
    eval_format: str = "gsm8k.format"
    """Reward function that decides in evaluations whether an answer has the format: a value above 0."""
    tensorboard: bool = False
    """Write TensorBoard files too (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        """Raises ValueError on the first option out of its range."""
        for name, allowed, holds in _rules(self):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be {allowed}")


_WHOLE = {
    0: ("seed", "num_shots", "minibatch_size", "warmup_steps", "checkpoint_every", "eval_every", "eval_limit")
    + ("final_eval_limit",),
    1: ("max_prompt_tokens", "num_steps", "prompts_per_step", "group_size", "max_new_tokens", "num_epochs")
    + ("keep_checkpoints", "eval_batch"),
}
_POSITIVE = ("ddp_timeout", "temperature", "reward_timeout")
_NOT_NEGATIVE = ("kl_coef", "learning_rate", "weight_decay", "max_grad_norm")
_CHOICES = ("device", "precision", "resume", "combine", "schedule")


def _rules(c: Config) -> list[tuple[str, str, bool]]:
    """(option, what is allowed, whether it holds), one per rule. Comparisons are written so that NaN does not hold."""
    choices = {name: get_args(get_type_hints(Config)[name]) for name in _CHOICES}
    tokens, shots, group_size = c.max_tokens_per_microbatch, c.eval_shots, max(1, c.group_size)
    return [
        *((name, f">= {low}", getattr(c, name) >= low) for low, names in _WHOLE.items() for name in names),
        *((name, "> 0 and finite", 0 < getattr(c, name) < math.inf) for name in _POSITIVE),
        *((name, ">= 0 and finite", 0 <= getattr(c, name) < math.inf) for name in _NOT_NEGATIVE),
        *((name, f"one of {', '.join(known)}", getattr(c, name) in known) for name, known in choices.items()),
        ("seed", "below 2**63", c.seed < 2**63),
        ("ddp_timeout", "at most 1e9", c.ddp_timeout <= 1e9),  # in 64 bits, torch counts 9.2e9 s of nanoseconds
        ("run_name", "a plain name (letters, digits, _.+=,-)", bool(re.fullmatch(r"\w[\w.+=,-]*", c.run_name))),
        ("rewards", "a tuple of names, not one text", not isinstance(c.rewards, str)),
        ("rewards", "one or more names, none twice", 0 < len(c.rewards) == len(set(c.rewards))),
        ("reward_weights", f"one number for each of {c.rewards}", len(c.reward_weights) == len(c.rewards)),
        ("reward_weights", "finite", all(map(math.isfinite, c.reward_weights))),
        ("clip_low", "between 0 and 1", 0 <= c.clip_low <= 1),
        ("clip_high", ">= 0", c.clip_high >= 0),
        ("correction_cap", ">= 1 and finite", 1 <= c.correction_cap < math.inf),
        ("adam_beta1", ">= 0 and < 1", 0 <= c.adam_beta1 < 1),
        ("adam_beta2", ">= 0 and < 1", 0 <= c.adam_beta2 < 1),
        ("minibatch_size", f"0 or a multiple of group_size ({c.group_size})", c.minibatch_size % group_size == 0),
        ("max_tokens_per_microbatch", "auto or >= 1", tokens == "auto" or tokens >= 1),
        ("compile", "auto, True or False", c.compile in ("auto", True, False)),
        ("eval_shots", "None or numbers >= 0", shots is None or min(shots, default=-1) >= 0),
        ("eval_shots", "without a number twice", shots is None or len(set(shots)) == len(shots)),
    ]


def lookup(table: Mapping[str, T], name: str, option: str) -> T:
    """The entry `name` of a table of known names, such as `LOSSES`.

    Raises:
      ValueError: there is none; names the option, the known names and the nearest one.
    """
    if name not in table:
        hint = options.did_you_mean(name, table)
        raise ValueError(f"{option} is {name!r}: must be one of {', '.join(table)}{hint}")
    return table[name]


def taken(config: Config) -> str:
    """The sentence with which a run ends whose directory holds something already; empty: it may start or go on."""
    directory = Path(config.out_dir) / config.run_name
    if config.resume == "auto" or not directory.exists() or not any(directory.iterdir()):
        return ""
    return f"run_name: {directory} exists already; continue it with --resume auto, or take another name"


# What may differ between a run and its continuation: where things are, how long it goes on, how often it is looked at,
# and how the work is cut (no result changes beyond rounding). Anything else would make it another experiment.
_MAY_CHANGE = frozenset(
    ("run_name", "out_dir", "data_path", "device", "resume", "check", "ddp_timeout", "num_steps", "tensorboard")
    + ("max_tokens_per_microbatch", "activation_checkpointing", "compile", "checkpoint_every", "keep_checkpoints")
    + ("eval_every", "eval_limit", "eval_batch", "eval_shots", "final_eval", "final_eval_limit")
    + ("eval_correct", "eval_format")
)


def check_resumable(saved: Config, now: Config) -> None:
    """Whether a run with the config `saved` may go on with the config `now`.

    `num_steps` may change under a constant schedule only: the other schedules stretch to `num_steps`.

    Raises:
      ValueError: names the first option that differs and may not.
    """
    may_change = _MAY_CHANGE if now.schedule == "constant" else _MAY_CHANGE - {"num_steps"}
    for name, before in vars(saved).items():
        if name not in may_change and getattr(now, name) != before:
            raise ValueError(
                f"{name} is {getattr(now, name)!r}, but the run to resume has {before!r}: must be the same, "
                "or give the run another run_name"
            )


def parse_args(argv: list[str]) -> Config:
    """The config of a command line: defaults, under `--recipe FILE`, under flags. An error: a sentence, exit code 2."""
    return options.parse(Config, argv, prog="train.py")


def from_yaml(path: str | Path) -> Config:
    """The config in a recipe or a run's `config.yaml`. Raises ValueError (what it says) or OSError (no such file)."""
    return options.read_yaml(Config, path)


def to_yaml(config: Config, path: str | Path) -> None:
    """Writes every option; `from_yaml(path)` and `--recipe path` give an equal config."""
    options.write_yaml(config, path)
