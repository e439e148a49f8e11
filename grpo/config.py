"""Every option of a run, in one frozen flat dataclass. Its fields are the flags of `train.py` and the keys of a recipe.

Those that an evaluation has too, model and data, come from `prompts/source.py`.

A new option is a new field: nothing else has to know of it. What is known of an option stands on its line:

- its range (without one, its type decides);
- `may_change`: it may differ when a run is resumed. These are places, the length of the run, evaluation, checkpoints,
  and how the work is divided. A change of any other option would make it another experiment;
- `settled`: its `auto` gets a value when the machine is known (`run/machine.py`);
- `evaluation`: the option of the final evaluation that takes its value (`evaluation/protocol.py`);
- `task`: its `auto` is what the data's `TASK` says (`data/problem.py`);
- `was`: an earlier name of it.

Left out: reading text (`options.py`), what other `auto` mean, and checking names of functions or files such as `loss`
or `data`. Those are looked up where their tables are (`tables.py`).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import data
from grpo import options
from grpo.options import option
from grpo.prompts.source import Source


@dataclass(frozen=True)
class Config(Source):
    """Train a language model with GRPO and verifiable rewards.

    Without options it runs the demo. --recipe FILE reads options from a YAML file; flags override the recipe.
    """

    # The run.
    run_name: str = option("demo", may_change=True)
    """Name of the run; everything is written to <out_dir>/<run_name>. Allowed: letters, digits, `_ . + = , -`."""
    out_dir: str = option("runs", may_change=True)
    """Directory that holds all runs."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", may_change=True, settled=True)
    """Where to compute; auto: cuda if there is one. With torchrun, process k of a machine takes GPU k."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = option("auto", settled=True)
    """Dtype of matrix products; master weights are float32 (float64 in fp64). auto: bf16 on cuda, fp32 on cpu."""
    resume: Literal["never", "auto"] = option("never", may_change=True)
    """never: an existing run is an error. auto: continue from its newest checkpoint, or start if there is none."""
    check: bool = option(False, may_change=True)
    """Start nothing; only check options, data, tokenizer and model sizes, and say what is wrong with them."""
    ddp_timeout: float = option(600.0, "> 0 and <= 1e9", may_change=True)  # torch: nanoseconds in 64 bits
    """Seconds that a process waits for the others, for example for slow rewards, before it stops."""

    # Prompts. `Source` has model, data and more of them.
    num_shots: int = option(0, ">= 0")
    """Worked examples put before each question."""
    max_prompt_tokens: int = option(1024, ">= 1")
    """Longest prompt in tokens; a longer prompt is an error at start-up and is never cut."""
    skip_long_prompts: bool = False
    """Skip training prompts that are longer or have no token, and say how many. Evaluations skip none."""

    # Rollouts. Sizes are global, over all processes.
    num_steps: int = option(30, ">= 1", may_change=True)
    """Number of steps; each step samples, rewards and learns."""
    prompts_per_step: int = option(16, ">= 1")
    """Prompts drawn in a step."""
    group_size: int = option(8, ">= 1")
    """Completions sampled for each prompt; the advantage compares them with each other."""
    max_new_tokens: int = option(96, ">= 1", evaluation="budget")
    """Longest completion in tokens."""
    temperature: float = option(1.0, "> 0 and finite")
    """Sampling temperature; it divides the logits of policy, old policy and reference."""
    lag: int = option(0, ">= 0 and <= 1")
    """Steps by which the weights that sample are older than those that learn. 1: as if both worked at the same time."""
    flat_groups: Literal["keep", "drop", "refill"] = "keep"
    """Groups whose advantages are all 0. drop: leave them out of learning. refill: also draw other prompts instead."""
    max_refills: int = option(4, ">= 0")
    """flat_groups refill: the most times that prompts_per_step further prompts are drawn in a step."""
    curriculum: Literal["none", "pass_rate"] = "none"
    """pass_rate: problems are drawn by their pass rate, the share of their last group that eval_correct calls right."""
    pool_weights: tuple[float, ...] = option((0.2, 1.0, 0.2), ">= 0 and finite")
    """Curriculum: weight of a problem with a pass rate up to 0.25; in between or not drawn yet; above 0.75."""

    # Rewards.
    rewards: Literal["auto"] | tuple[str, ...] = option("auto", distinct=True, task="rewards")
    """Reward functions: file.function in rewards/, or path/file.py:function, also in TRL's form; auto: the data's."""
    reward_weights: Literal["auto"] | tuple[float, ...] = option("auto", "finite", task="reward_weights")
    """One weight for each reward function; auto: those of the data, and 1 for other rewards."""
    reward_timeout: Literal["auto"] | float = option("auto", "> 0 and finite", evaluation="timeout", task="timeout")
    """Seconds that one call of a reward may take; a slower one makes the sample invalid. Its file may ask for more.
    auto: those of the data."""
    reward_workers: int = option(1, ">= 1 and <= 256", may_change=True, evaluation="reward_workers")
    """Processes that call the reward functions side by side; for rewards that run programs, one for each free core."""

    # Algorithm.
    combine: Literal["rewards", "advantages"] = "rewards"
    """rewards: the advantage of the weighted sum of rewards. advantages: the weighted sum of their own advantages."""
    advantage: str = "grpo"
    """Function of grpo/advantages.py: grpo, dr_grpo, rloo, opo, max_rl, pkpo, batch_std, reinforce_pp_baseline."""
    pass_k: int = option(1, ">= 1")
    """Advantage pkpo: the best of so many samples is what counts; below group_size, or 1, which is rloo."""
    whiten: bool = False
    """Divide advantages by their standard deviation over the step. With combine advantages this is GDPO."""
    loss: str = "grpo"
    """Function of grpo/losses.py: grpo, gspo, gspo_token, gmpo, cispo, sapo, dppo_tv, dppo_kl, reinforce, dro."""
    weighting: str = "token_mean"
    """Function of grpo/weighting.py, the weight of a token: token_mean, sequence_mean, prompt_mean, constant_length."""
    clip_low: float = option(0.2, ">= 0 and <= 1")
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = option(0.2, ">= 0")
    """The ratio is clipped above at 1 + clip_high; inf: never."""
    ratio_max: float = option(float("inf"), "> 1")
    """Loss grpo: largest ratio of a token with a negative advantage (dual clip, two-sided delta); inf: none."""
    tau_pos: float = option(1.0, "> 0 and finite")
    """Loss sapo: how fast its gate closes for tokens with an advantage of 0 or more."""
    tau_neg: float = option(1.05, "> 0 and finite")
    """Loss sapo: the same for tokens with a negative advantage."""
    tv_max: float = option(0.2, ">= 0 and <= 1")
    """Loss dppo_tv: how far the probability of a token may move before it has no gradient."""
    binary_kl_max: float = option(0.05, ">= 0")
    """Loss dppo_kl: the same as a KL in nats, of the token against all others; inf: never."""
    dro_beta: float = option(0.1, ">= 0 and finite")
    """Loss dro: strength of the tie to the policy at the time of the rollout."""
    ratio_to: Literal["learner", "sampler"] = "learner"
    """Whose log-probabilities of the rollout the loss's ratio compares with: as the learner computes them, or as the
    sampler saw them. With the sampler's, the ratio contains what `sampler_correction` would correct."""
    kl: str = "k3"
    """Function of grpo/kl.py, the estimator of the KL to the reference: k1, k2, k3, k1_plus, k3_plus, k3_ratio."""
    kl_coef: float = option(0.01, ">= 0 and finite")
    """Weight of the KL (nats per token); 0: no reference is loaded."""
    kl_target: float = option(0.0, ">= 0 and finite")
    """KL in nats per token; after a step with more, kl_coef rises, with less it falls; 0: kl_coef stays."""
    kl_horizon: int = option(10_000, ">= 1")
    """kl_target: sequences that are sampled until kl_coef has changed by a fifth, if the KL is that far off or more."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: the KL is a term of the loss. reward: it is subtracted from each token's advantage, without gradient."""
    reference_sync_every: int = option(0, ">= 0")
    """Steps after which the reference of the KL is renewed from the policy; 0: never."""
    reference_mix: float = option(1.0, "> 0 and <= 1")
    """Share of the policy in a renewed reference, the rest is the old one; 1: a copy of the policy."""
    entropy_coef: float = option(0.0, ">= 0 and finite")
    """Weight of the entropy (nats per token), which is subtracted from the loss."""
    entropy_target: float = option(0.0, ">= 0 and finite")
    """Nats per token; a step with less entropy adds entropy_step to entropy_coef, others take it away; 0: it stays."""
    entropy_step: float = option(0.005, "> 0 and <= 1")
    """entropy_target: how far entropy_coef moves after a step, within 0 and 1."""
    entropy_share: float = option(1.0, "> 0 and <= 1")
    """Share of a step's tokens that have a policy gradient: those of the highest entropy; 1: all."""
    sampler_correction: str = "none"
    """Function of corrections.py for sampler mismatch: none, truncate, mask, truncate_row, mask_row, veto, opsm."""
    correction_floor: float = option(0.5, ">= 0 and <= 1")
    """Smallest ratio of learner to sampler that mask, mask_row, veto and opsm trust."""
    correction_cap: float = option(2.0, ">= 1")
    """Largest factor of truncate and truncate_row, and largest ratio that mask, mask_row and veto trust; inf: none."""
    num_epochs: int = option(1, ">= 1")
    """Passes over the rollouts of a step."""
    minibatch_size: int = option(0, ">= 0")
    """Sequences in one update, a multiple of group_size; 0: all sequences of the step."""
    kl_stop: float = option(math.inf, ">= 0")
    """No further update in a step whose tokens have a mean k3 of old to current policy above this (nats); inf: off."""
    mask_truncated: bool = False
    """Leave completions that were cut at max_new_tokens out of the loss; they stay in the baseline."""

    # Adapters.
    lora_rank: int = option(0, ">= 0")
    """Train adapters (LoRA) of this rank, and not the weights; the reference is then the base model. 0: none."""
    lora_alpha: float = option(32.0, "> 0 and finite")
    """The output of an adapter is multiplied by lora_alpha / lora_rank."""
    lora_targets: Literal["all"] | tuple[str, ...] = option("all", distinct=True)
    """Linear layers with an adapter, such as q_proj, down_proj; all: every one but the head."""

    # Optimiser and memory.
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """Of torch. muon: Muon for the matrices of the layers, AdamW for embeddings, head, norms and biases."""
    learning_rate: float = option(2e-4, ">= 0 and finite")
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 after num_steps."""
    warmup_steps: int = option(0, ">= 0")
    """Steps in which the learning rate rises linearly from 0."""
    adam_beta1: float = option(0.9, ">= 0 and < 1")
    """Decay of the first moment."""
    adam_beta2: float = option(0.99, ">= 0 and < 1")
    """Decay of the second moment."""
    sgd_momentum: float = option(0.0, ">= 0 and < 1")
    """Momentum of sgd."""
    muon_momentum: float = option(0.95, ">= 0 and < 1")
    """Momentum of muon (Nesterov's)."""
    weight_decay: float = option(0.0, ">= 0 and finite")
    """Decoupled weight decay of matrices; sgd adds it to the gradient."""
    max_grad_norm: float = option(1.0, ">= 0 and finite")
    """A gradient with a larger norm is scaled down to this norm; 0: off."""
    shard: Literal["none", "full", "hybrid"] = option("none", may_change=True)
    """Divide weights, gradient, moments and reference. full: over all processes; hybrid: over those of each machine."""
    max_tokens_per_microbatch: Literal["auto"] | int = option("auto", ">= 1", may_change=True, settled=True)
    """Tokens of a forward and backward pass, per process; auto: by memory. Halved if a GPU runs out of memory."""
    activation_checkpointing: bool = option(False, may_change=True)
    """Recompute activations in the backward pass, which takes less memory and about a third more time."""
    compile: Literal["auto"] | bool = option("auto", may_change=True, settled=True)
    """Compile layers and attention for learning; this takes a minute or more in the first step. auto: only on cuda in
    bf16 or fp16, if there is a C compiler. Elsewhere True works too, but gains little."""

    # Checkpoints and evaluation.
    checkpoint_every: int = option(10, ">= 0", may_change=True)
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep_checkpoints: int = option(2, ">= 1", may_change=True)
    """Number of newest checkpoints to keep; the best on validation is kept too."""
    save_replay: bool = option(False, may_change=True)
    """Save what `python -m grpo.replay` needs of step 1, and of each step after one that checkpoint_every saves."""
    final_dtype: Literal["base", "float32"] = option("float32", may_change=True)
    """Dtype of weights in final/. float32: as learned. base: that of the base model; bfloat16 can lose the gain."""
    eval_every: int = option(0, ">= 0", may_change=True)
    """Steps between evaluations on validation; 0: never."""
    eval_limit: int = option(200, ">= 0", may_change=True)
    """Number of problems in an evaluation during training; 0: all."""
    eval_batch: int = option(64, ">= 1", may_change=True, evaluation="batch")
    """Problems sampled at once in evaluations, per process."""
    eval_shots: tuple[int, ...] | None = option(None, ">= 0", distinct=True, may_change=True)
    """Numbers of worked examples in the final evaluation; None: num_shots."""
    final_eval: bool = option(True, may_change=True)
    """Evaluate base and tuned model on the test split at the end."""
    final_eval_limit: int = option(500, ">= 0", may_change=True, evaluation="limit")
    """Number of problems in the final evaluation; 0: all."""
    eval_correct: str = option("auto", may_change=True, task="correct")
    """Reward function that decides in evaluations whether an answer is right; auto: that of the data."""
    eval_threshold: float | None = option(None, "finite", may_change=True, evaluation="threshold")
    """Value of eval_correct from which an answer is right; None: its full value, 1 unless it states another."""
    eval_format: str | None = option("auto", may_change=True, evaluation="format", task="format")
    """Reward function whose full value says that an answer has the format; None: no format; auto: that of the data."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", may_change=True, was="tensorboard")
    """Where the numbers of each step go beside metrics.jsonl. Each needs the extra of its name."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is not allowed: by its own line, or beside the others."""
        options.check(self)
        vars(self).update(options.followed(self, "task", data.task(self.data).with_rewards(self.rewards)))
        plain, group_size = r"\w[\w.+=,-]*", self.group_size
        ranked, three = self.curriculum == "none" or self.eval_correct in self.rewards, len(self.pool_weights) == 3
        slow = not self.kl_target or self.prompts_per_step * group_size < 5 * self.kl_horizon
        adapters, renews = self.lora_rank, self.reference_sync_every
        rules = (
            ("run_name", "a plain name (letters, digits, _.+=,-)", re.fullmatch(plain, self.run_name)),
            ("reward_weights", f"one number for each of {self.rewards}", len(self.reward_weights) == len(self.rewards)),
            ("minibatch_size", f"0 or a multiple of group_size ({group_size})", self.minibatch_size % group_size == 0),
            ("pool_weights", "three numbers, not all 0", three and any(self.pool_weights)),
            ("eval_correct", f"one of rewards {self.rewards} under curriculum {self.curriculum}", ranked),
            ("kl_horizon", "above a fifth of prompts_per_step * group_size", slow),
            ("reference_sync_every", "0 with lora_rank: that reference is fixed", not (adapters and renews)),
            ("shard", "none with optimizer muon", self.shard == "none" or self.optimizer != "muon"),
            ("pass_k", f"1 or below group_size ({group_size})", self.pass_k == 1 or self.pass_k < group_size),
        )
        for name, allowed, holds in rules:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: must be {allowed}")


def refuse_auto(config: Config) -> None:
    """Raise ValueError, which names the option, if an `auto` is not settled."""
    for name in options.facts_of(Config, "settled"):
        if getattr(config, name) == "auto":
            raise ValueError(f"{name} is 'auto': must have a value by now; `grpo.run.machine.settle` gives one")


def check_resumable(saved: Config, now: Config) -> None:
    """Check that a run with the config `saved` may continue with the config `now`.

    `num_steps` may change only under a constant schedule, because the other schedules depend on it. What is right may
    change only if no problem is drawn by it. Files of data and rewards may lie elsewhere; `inputs.py` compares them.

    Raises:
        ValueError: an option differs that may not; the message names the first one.
    """
    may_change = set(options.facts_of(type(now), "may_change"))
    if now.schedule != "constant":
        may_change -= {"num_steps"}
    if now.curriculum != "none":
        may_change -= {"eval_correct", "eval_threshold"}
    for name, before in vars(saved).items():
        after = getattr(now, name)
        if name in ("data", "rewards"):
            same = _unplaced(before) == _unplaced(after)
        else:
            same = before == after
        if name not in may_change and not same:
            raise ValueError(
                f"{name} is {after!r}, but the run to resume has {before!r}: must be the same; "
                "for another value, give the run another run_name"
            )


def _unplaced(names: str | tuple[str, ...]) -> list[str]:
    """Names of data or rewards, without the directories of Python files such as `my/task.py:reward`."""
    return [re.sub(r".*/(?=[^/]+\.py\b)", "", name) for name in ([names] if isinstance(names, str) else names)]


def parse_args(argv: list[str]) -> Config:
    """The config of a command line: flags override `--recipe FILE`, which overrides defaults. Errors exit with 2."""
    return options.parse(Config, argv, prog="train.py")


def from_yaml(path: str | Path) -> Config:
    """The config in a recipe or a run's `config.yaml`. Raises ValueError for wrong content, OSError for no file."""
    return options.read_yaml(Config, path)


def to_yaml(config: Config, path: str | Path) -> None:
    """Writes every option, so that `from_yaml(path)` and `--recipe path` give an equal config."""
    options.write_yaml(config, path)
