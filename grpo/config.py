"""Every option of a run, in one frozen flat dataclass. Its fields are the flags of `train.py` and the keys of a recipe.

Left out: reading text (`options.py`), sizes that depend on the machine, and checking names of functions or files such
as `loss` or `data`. Those are looked up with `lookup` where their tables are.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from grpo import options

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """Train a language model with GRPO and verifiable rewards.

    Without options it runs the demo. --recipe FILE reads options from a YAML file; flags override the recipe.
    """

    # The run.
    run_name: str = "demo"
    """Name of the run; everything is written to <out_dir>/<run_name>. Allowed: letters, digits, `_ . + = , -`."""
    out_dir: str = "runs"
    """Directory that holds all runs."""
    seed: int = 0
    """Seed of data order, sampling and minibatch order. >= 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: cuda if there is one. With torchrun, process k of a machine takes GPU k."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Dtype of matrix products; master weights are float32 (float64 in fp64). auto: bf16 on cuda, fp32 on cpu."""
    resume: Literal["never", "auto"] = "never"
    """never: an existing run is an error. auto: continue from its newest checkpoint, or start if there is none."""
    check: bool = False
    """Start nothing; only check options, data, tokenizer and model sizes, and say what is wrong with them."""
    ddp_timeout: float = 600.0
    """Seconds that a process waits for the others, for example for slow rewards, before it stops. > 0, at most 1e9."""

    # Model and data.
    model: str = "embedded"
    """embedded: the small base model in this repository; otherwise a local directory or a Hugging Face hub name."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; None: its default branch."""
    data: str = "arithmetic"
    """Name of a file in data/: arithmetic, gsm8k, jsonl, ..."""
    data_path: str | None = None
    """Directory with train.jsonl and test.jsonl (or .json, .parquet), or one file; None: the data's own source."""
    num_shots: int = 0
    """Worked examples put before each question. >= 0."""
    chat: bool = False
    """Render prompts with the tokenizer's chat template; worked examples become turns of the chat."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens; a longer prompt is an error at start-up and is never cut. >= 1."""
    skip_long_prompts: bool = False
    """Skip training prompts that are longer or have no token, and say how many. Evaluations skip none."""

    # Rollouts. Sizes are global, over all processes.
    num_steps: int = 30
    """Number of steps; each step samples, rewards and learns. >= 1."""
    prompts_per_step: int = 16
    """Prompts drawn in a step. >= 1."""
    group_size: int = 8
    """Completions sampled for each prompt; the advantage compares them with each other. >= 1."""
    max_new_tokens: int = 96
    """Longest completion in tokens. >= 1."""
    temperature: float = 1.0
    """Sampling temperature; it divides the logits of policy, old policy and reference. > 0."""

    # Rewards.
    rewards: tuple[str, ...] = ("gsm8k.format", "gsm8k.correctness")
    """Reward functions in rewards/, as file.function. At least one, none twice."""
    reward_weights: tuple[float, ...] = (1.0, 1.0)
    """One weight for each reward function. Finite."""
    reward_timeout: float = 5.0
    """Seconds that one call of a reward function may take; a slower call makes the sample invalid. > 0."""

    # Algorithm.
    combine: Literal["rewards", "advantages"] = "rewards"
    """rewards: the advantage of the weighted sum of rewards. advantages: the weighted sum of their own advantages."""
    advantage: str = "grpo"
    """Function of grpo/advantages.py: grpo, dr_grpo, rloo."""
    loss: str = "grpo"
    """Function of grpo/losses.py: grpo, gspo, cispo, reinforce."""
    weighting: str = "token_mean"
    """Function of grpo/weighting.py, the weight of a token: token_mean, sequence_mean, constant_length."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low. 0..1."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high. >= 0, inf allowed."""
    kl: str = "k3"
    """Function of grpo/kl.py, the estimator of the KL to the reference: k1, k2, k3."""
    kl_coef: float = 0.01
    """Weight of the KL (nats per token) in the loss; 0: no reference is loaded. >= 0."""
    sampler_correction: str = "none"
    """Function of grpo/corrections.py, used if the sampler differs from the learner: none, truncate, mask."""
    correction_cap: float = 2.0
    """Cap of the factor that sampler_correction computes. >= 1."""
    num_epochs: int = 1
    """Passes over the rollouts of a step. >= 1."""
    minibatch_size: int = 0
    """Sequences in one update, a multiple of group_size; 0: all sequences of the step."""
    mask_truncated: bool = False
    """Leave completions that were cut at max_new_tokens out of the loss; they stay in the baseline."""

    # Optimiser (AdamW) and memory.
    learning_rate: float = 2e-4
    """Peak learning rate. >= 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 after num_steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0. >= 0."""
    adam_beta1: float = 0.9
    """Decay of the first moment. >= 0 and < 1."""
    adam_beta2: float = 0.99
    """Decay of the second moment. >= 0 and < 1."""
    weight_decay: float = 0.0
    """Decoupled weight decay. >= 0."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this norm; 0: off. >= 0."""
    max_tokens_per_microbatch: int | Literal["auto"] = "auto"
    """Tokens of a forward and backward pass, per process; auto: by memory. Halved if a GPU runs out of memory. >= 1."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and about a third more time."""
    compile: bool | Literal["auto"] = "auto"
    """Compile layers and attention for learning; this takes a minute or more in the first step. auto: only on cuda in
    bf16 or fp16, if there is a C compiler. Elsewhere True works too, but gains little."""

    # Checkpoints and evaluation.
    checkpoint_every: int = 10
    """Steps between checkpoints; 0: only at the end and when interrupted. >= 0."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; the best on validation is kept too. >= 1."""
    final_dtype: Literal["base", "float32"] = "base"
    """Dtype of the weights in final/. base: that of the base model's files (bfloat16 halves the size, and rounds
    what was learned); float32: as it was learned."""
    eval_every: int = 0
    """Steps between evaluations on validation; 0: never. >= 0."""
    eval_limit: int = 200
    """Number of problems in an evaluation during training; 0: all. >= 0."""
    eval_batch: int = 64
    """Problems sampled at once in evaluations, per process. >= 1."""
    eval_shots: tuple[int, ...] | None = None
    """Numbers of worked examples in the final evaluation, none twice; None: num_shots. >= 0."""
    final_eval: bool = True
    """Evaluate base and tuned model on the test split at the end."""
    final_eval_limit: int = 500
    """Number of problems in the final evaluation; 0: all. >= 0."""
    eval_correct: str = "gsm8k.correctness"
    """Reward function that decides in evaluations whether an answer is right."""
    eval_threshold: float | None = None
    """Value of eval_correct from which an answer is right; None: its full value, 1 unless it states another. Finite."""
    eval_format: str = "gsm8k.format"
    """Reward function that decides in evaluations whether an answer has the format: by its full value."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is out of its range."""
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
_CHOICES = ("device", "precision", "resume", "combine", "schedule", "final_dtype")


def _rules(c: Config) -> list[tuple[str, str, bool]]:
    """One (option, what is allowed, whether it holds) per rule. A NaN fails every comparison, so it is refused."""
    choices = {name: get_args(get_type_hints(Config)[name]) for name in _CHOICES}
    tokens, shots, group_size = c.max_tokens_per_microbatch, c.eval_shots, max(1, c.group_size)
    return [
        *((name, f">= {low}", getattr(c, name) >= low) for low, names in _WHOLE.items() for name in names),
        *((name, "> 0 and finite", 0 < getattr(c, name) < math.inf) for name in _POSITIVE),
        *((name, ">= 0 and finite", 0 <= getattr(c, name) < math.inf) for name in _NOT_NEGATIVE),
        *((name, f"one of {', '.join(known)}", getattr(c, name) in known) for name, known in choices.items()),
        ("seed", "below 2**63", c.seed < 2**63),
        ("ddp_timeout", "at most 1e9", c.ddp_timeout <= 1e9),  # torch counts nanoseconds in 64 bits: 9.2e9 s at most
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
        ("eval_threshold", "None, or finite", c.eval_threshold is None or math.isfinite(c.eval_threshold)),
        ("eval_shots", "None or numbers >= 0", shots is None or min(shots, default=-1) >= 0),
        ("eval_shots", "without a number twice", shots is None or len(set(shots)) == len(shots)),
    ]


def lookup(table: Mapping[str, T], name: str, option: str) -> T:
    """The entry `name` of a table of known names, such as `LOSSES`.

    Args:
      table: {name: entry}.
      name: the value of the option.
      option: the name of the option, for the message.

    Raises:
      ValueError: there is no such entry; the message gives the option, the known names and the nearest one.
    """
    if name not in table:
        hint = options.did_you_mean(name, table)
        raise ValueError(f"{option} is {name!r}: must be one of {', '.join(table)}{hint}")
    return table[name]


def constants(loss: Callable, config: Config) -> dict[str, Any]:
    """The constants of a function of `losses.py`, each with the value of the option of its name.

    Constants are its arguments that are keyword-only or have a default.

    Raises:
      ValueError: there is no such option. A default in the signature does not replace one: it could not be set.
    """
    parameters = signature(loss).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    for name in names:
        if name not in vars(config):
            hint = options.did_you_mean(name, vars(config))
            raise ValueError(
                f"loss {loss.__name__} has the constant {name}, but no option has that name: "
                f"add the field {name} to Config in grpo/config.py{hint}"
            )
    return {name: getattr(config, name) for name in names}


def taken(config: Config) -> str:
    """The error message if the run's directory is in use already; empty if the run may start or continue."""
    directory = Path(config.out_dir) / config.run_name
    if config.resume == "auto" or not directory.exists() or not any(directory.iterdir()):
        return ""
    return f"run_name: {directory} exists already; continue it with --resume auto, or take another name"


# Options that may change when a run is resumed: places, length of the run, evaluation, checkpoints, and how the work is
# divided (this changes results only by rounding). Any other change would make it another experiment.
_MAY_CHANGE = frozenset(
    ("run_name", "out_dir", "data_path", "device", "resume", "check", "ddp_timeout", "num_steps", "tensorboard")
    + ("max_tokens_per_microbatch", "activation_checkpointing", "compile", "checkpoint_every", "keep_checkpoints")
    + ("eval_every", "eval_limit", "eval_batch", "eval_shots", "final_eval", "final_eval_limit")
    + ("eval_correct", "eval_threshold", "eval_format", "final_dtype")
)


def check_resumable(saved: Config, now: Config) -> None:
    """Check that a run with the config `saved` may continue with the config `now`.

    `num_steps` may change only under a constant schedule, because the other schedules depend on it.

    Raises:
      ValueError: an option differs that may not; the message names the first one.
    """
    may_change = _MAY_CHANGE if now.schedule == "constant" else _MAY_CHANGE - {"num_steps"}
    for name, before in vars(saved).items():
        if name not in may_change and getattr(now, name) != before:
            raise ValueError(
                f"{name} is {getattr(now, name)!r}, but the run to resume has {before!r}: must be the same; "
                "for another value, give the run another run_name"
            )


def parse_args(argv: list[str]) -> Config:
    """The config of a command line: flags override `--recipe FILE`, which overrides defaults. Errors exit with 2."""
    return options.parse(Config, argv, prog="train.py")


def from_yaml(path: str | Path) -> Config:
    """The config in a recipe or a run's `config.yaml`. Raises ValueError for wrong content, OSError for no file."""
    return options.read_yaml(Config, path)


def to_yaml(config: Config, path: str | Path) -> None:
    """Writes every option, so that `from_yaml(path)` and `--recipe path` give an equal config."""
    options.write_yaml(config, path)
