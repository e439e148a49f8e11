"""Make a saved step again from the weights before it, and beside each of its gradients that of another objective.

All updates of the step are made as the run made them, with its optimizer. In each update, before it is made, the other
objective gets its gradient at the same weights, for the same completions and rows. So with minibatches or epochs it is
seen off-policy, as the run saw its own. Left out: runs of several processes as such; one process holds all rows, which
changes a gradient only by rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo import distributed
from grpo.advantages import ADVANTAGES, FACTS
from grpo.batch import Batch
from grpo.config import Config, from_yaml
from grpo.corrections import CORRECTIONS
from grpo.files import read_metrics
from grpo.losses import LOSSES
from grpo.metrics import Sums
from grpo.optimizer import coefficients
from grpo.policy import load_policy
from grpo.replay.saved import Saved, place_of, read_step
from grpo.rollout import advantage_of, judge
from grpo.run import checkpoint
from grpo.run.machine import settings, settle
from grpo.run.state import restore_state
from grpo.tables import constants
from grpo.update import Learner, make_ready

OF_OBJECTIVE = (
    ("reward_weights", "combine", "advantage", "whiten", "mask_truncated", "loss", "weighting", "entropy_coef")
    + ("kl", "kl_coef", "kl_in", "sampler_correction")
)  # fmt: skip
"""Options that a replay can change, beside the constants of advantages, losses and corrections."""
OF_MACHINE = ("device", "max_tokens_per_microbatch", "activation_checkpointing", "compile")
"""Options of how the work is done. They hold for both objectives."""
COSINE = "cosine"
SHOWN = {
    "loss": "optim/loss",
    "gradient norm": "optim/grad_norm",
    "clip fraction": "policy/clip_fraction",
    "kl": "policy/kl",
    "effective size": "policy/correction_ess",
}
"""{column: metric}; before the gradient is clipped. docs/metrics.md says what they mean."""


@dataclass
class Row:
    """What one objective made of one update."""

    update: str
    """Its number in the step, from 1; `all`: the mean over the updates."""
    objective: str
    """`as it was`, `as asked`, or `metrics.jsonl`: what the run itself has written."""
    numbers: dict[str, float | None]
    """Those of `SHOWN`, and `cosine` to the gradient that was taken. Missing or None: there is no such number."""


def replay(run: Path, step: int, **changes: Any) -> list[Row]:
    """Make a saved step again, and compute the gradient of another objective in each of its updates.

    Args:
        run: its directory. Nothing is written there.
        step: counted from 1.
        changes: options in which the other objective differs from the run's config; without any there is no other.

    Returns:
        for each update the row of the run's objective and, if anything was changed, of the one that was asked for;
        then those of the step.

    Raises:
        ValueError: the step can not be replayed, or an option is wrong or can not be changed.
        OSError: a file can not be read.
    """
    config = config_of(run)
    refuse_others(config, changes)
    before, saved = weights_before(run, step), read_step(run, step)
    was = replace(config, **{name: value for name, value in changes.items() if name in OF_MACHINE})
    device = distributed.init(was.device)
    if distributed.world_size() > 1:
        raise ValueError(f"a replay runs in one process, not in {distributed.world_size()}; start it without torchrun")
    was = settle(was, device)
    with settings(device):
        asked = replace(was, **{name: value for name, value in changes.items() if name not in OF_MACHINE})
        taken, other = learners(was, asked, device)
        coefs = {} if before is None else restore_state(run, taken, before).coefs
        rows, means = make_again(taken, other, saved, step, coefs)
    if len(rows) > 1 + (other is not None):
        rows.append(Row("all", "as it was", columns(means)))
    logged = logged_metrics(run, step)
    return rows if logged is None else [*rows, Row("all", "metrics.jsonl", columns(logged))]


def changeable(config: Config) -> set[str]:
    """The names of the options of an objective."""
    tables = ADVANTAGES, LOSSES, CORRECTIONS
    functions = [function for table in tables for function in table.values()]
    return {*OF_OBJECTIVE, *(name for function in functions for name in constants(function, config, given=FACTS))}


def refuse_others(config: Config, changes: Mapping[str, Any]) -> None:
    """Raise ValueError for the first option that decides what is sampled or how updates are cut and made."""
    allowed = changeable(config)
    for name, value in changes.items():
        if name not in allowed and name not in OF_MACHINE:
            raise ValueError(
                f"{name} is {value!r}: a replay can not change it, as completions and updates stay as they were; must "
                f"be one of {', '.join(sorted(allowed))}, or of {', '.join(OF_MACHINE)}"
            )


def config_of(run: Path) -> Config:
    """The config of a run. Raises ValueError if it is none."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{run} is not a run directory: it has no config.yaml")
    return from_yaml(file)


def weights_before(run: Path, step: int) -> Path | None:
    """The checkpoint that a step began with; None: it is the first, and began with the base model.

    Raises:
        ValueError: the step was not saved, or its checkpoint is gone; the message names the steps that can be replayed.
    """
    kept = {0: None} | checkpoint.complete(run / "checkpoints")
    steps = sorted(done + 1 for done in kept if place_of(run, done + 1).is_file())
    if step in steps:
        return kept[step - 1]
    missing = f"checkpoint of step {step - 1}" if place_of(run, step).is_file() else "saved step"
    can = f"these can: {', '.join(map(str, steps))}" if steps else "nor can any other"
    raise ValueError(f"step {step} of {run} can not be replayed, there is no {missing}; {can} (see save_replay)")


def learners(was: Config, asked: Config, device: torch.device) -> tuple[Learner, Learner | None]:
    """A learner of the run, with the base model, and one of the other objective, if it differs, of the same policy."""
    policy, _ = load_policy(
        was.model,
        revision=was.revision,
        device=device,
        precision=was.precision,
        activation_checkpointing=was.activation_checkpointing,
    )
    reference = make_ready(policy, was, was.kl_coef > 0 or asked.kl_coef > 0)
    taken = Learner(was, policy, reference if was.kl_coef > 0 else None)
    if asked == was:
        return taken, None
    without_moments = replace(asked, optimizer="sgd", sgd_momentum=0.0)  # it makes no update
    other = Learner(without_moments, policy, reference if asked.kl_coef > 0 else None)
    other.scaler = taken.scaler
    return taken, other


def make_again(
    taken: Learner, other: Learner | None, saved: Saved, step: int, coefs: Mapping[str, float]
) -> tuple[list[Row], dict[str, float]]:
    """The rows of each update, which `taken` makes and `other` only computes; and the step's metrics of `taken`.

    `coefs` are those that the run had moved to a target. They hold for `other` too, but for those that it changes.
    """
    rows: list[Row] = []
    parameters = list(taken.trained.parameters())
    if other is not None:
        batch, whole, updates = other.prepare(learned_from(other.config, saved, taken.policy.device), step)
        kept = {
            name: coef for name, coef in coefs.items() if vars(other.config).get(name) == vars(taken.config).get(name)
        }
        of_asked = coefficients(other.config, kept)

    def look(number: int, of_update: Sums) -> None:
        gradient = [p.grad for p in parameters]
        rows.append(Row(f"{number + 1}", "as it was", measured(taken, of_update, gradient, gradient)))
        if other is None:
            return
        taken.policy.zero_grad(set_to_none=True)
        of_other = other.accumulate(batch, updates[number], whole, of_asked)
        found = [p.grad for p in parameters]
        numbers = {} if of_other is None else measured(other, of_other, found, gradient)
        rows.append(Row(f"{number + 1}", "as asked", numbers))
        for p, grad in zip(parameters, gradient, strict=True):
            p.grad = grad

    sums = Sums()
    taken.learn(learned_from(taken.config, saved, taken.policy.device), step, sums, coefs, look)
    return rows, sums.reduce()


def learned_from(config: Config, saved: Saved, device: torch.device) -> Batch:
    """The batch of the groups that were learned from, with advantages and masks of a config."""
    advantage, numbers, n = advantage_of(config), saved.batch.prompt_index, len(saved.batch.prompt_ids)
    draws = [number // config.prompts_per_step for number in numbers]
    judged = []
    for draw in sorted(set(draws)):  # each by itself, as an advantage may depend on the others of its draw
        of_draw = [i for i in range(n) if draws[i] == draw]
        finished = saved.finished.view(n, -1)[of_draw].flatten()
        drawn = saved.batch.select(of_draw)
        judged.append(judge(config, advantage, drawn, finished, saved.reward_terms[:, of_draw])[-1])
    return Batch.join(judged).select(saved.learned).to(device)


def measured(
    learner: Learner, sums: Sums, gradient: Sequence[Tensor | None], taken: Sequence[Tensor | None]
) -> dict[str, float | None]:
    """The columns of an update with this gradient, which `learner` has scaled as the one that was taken."""
    norm = nn.utils.get_total_norm([g for g in gradient if g is not None]) / learner.scaler.get_scale()
    found = columns(sums.reduce() | {"optim/grad_norm": norm.item()})
    return found | {COSINE: cosine(gradient, taken)}


def cosine(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """The cosine of the angle between two gradients, given by parameter; NaN if one of them is 0."""

    def dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
        products = [(x.double() * y).sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        return torch.stack(products).sum()

    return (dot(one, other) / (dot(one, one) * dot(other, other)).sqrt()).item()


def columns(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The numbers that are shown, of a step's or an update's metrics."""
    return {column: metrics.get(metric) for column, metric in SHOWN.items()}


def logged_metrics(run: Path, step: int) -> dict[str, float | None] | None:
    """The line of metrics.jsonl of a step; None: there is none."""
    file = run / "metrics.jsonl"
    lines = read_metrics(file) if file.is_file() else []
    return next((line for line in lines if line["step"] == step), None)
