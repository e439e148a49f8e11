"""The state of a run beside weights and optimiser; saving and restoring it; the reasons to stop a run.

A step is rollout plus learning. Randomness is a function of the step's number, and so is the order of the data unless a
curriculum prefers some problems. So the state is small.
Left out: the file format (`checkpoint.py`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from grpo import distributed
from grpo.files import check_kinds
from grpo.run import checkpoint
from grpo.run.log import say
from grpo.run.signals import Signals

MAX_SKIPPED = 3
"""A run stops after this many steps in a row whose gradient was not finite."""


@dataclass
class State:
    """What a checkpoint holds beside weights, optimiser, other modules that change, and fp16's loss scaler."""

    step: int = 0
    """Number of steps done."""
    skipped: int = 0
    """Number of steps in a row, up to now, whose gradient was not finite."""
    best_step: int = 0
    """The step with the best accuracy on validation; 0 = none yet."""
    best_accuracy: float = -1.0
    """The accuracy of `best_step`."""
    coefs: dict[str, float] = field(default_factory=dict)
    """Coefficients of the objective that follow a target, for the next step."""
    pass_rates: dict[int, float] = field(default_factory=dict)
    """{index of a training problem: its last pass rate}, under a curriculum."""

    def after(self, step: int, finite: bool, **moved: dict) -> "State":
        """The state after `step`.

        Args:
            step: counted from 1.
            finite: False if one of its updates (optimiser steps) was skipped.
            moved: new values of other fields.
        """
        return replace(self, step=step, skipped=0 if finite else self.skipped + 1, **moved)


class Learned(Protocol):
    """The parts of a learner that a checkpoint saves."""

    trained: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    moving_reference: nn.Module | None


class Stopped(Exception):
    """Raised to end a run early, after its state was saved. The message is one sentence."""

    def __init__(self, reason: str, code: int):
        """Keep the reason and the exit code of the process, which is 0 if the user asked to stop."""
        super().__init__(reason)
        self.code = code


def due(step: int, every: int) -> bool:
    """Whether something that happens after every `every` steps (0: never) is due after this step."""
    return every > 0 and step % every == 0


def why_stop(state: State, signals: Signals, metrics: Mapping[str, float]) -> tuple[str, int] | None:
    """The reason and exit code for `Stopped` after this step, the same on every rank; None if the run goes on.

    Args:
        state: after the step.
        signals: what was asked of this process.
        metrics: of the step, over all ranks.
    """
    if distributed.any_true(signals.asked()):
        return f"asked to stop; saved after step {state.step}, go on with --resume auto", 0
    if metrics["reward/invalid"] == 1:
        return (
            f"no completion of step {state.step} got a reward: each call failed, or none applies; mend the reward "
            "functions and go on with --resume auto",
            1,
        )
    if state.skipped >= MAX_SKIPPED:
        return (
            f"the gradient was not finite in {state.skipped} steps in a row, and these updates were skipped; the last "
            f"good state is saved as step {state.step}",
            1,
        )
    return None


def stop_before(state: State, signals: Signals) -> None:
    """Raise `Stopped` on every rank if a stop was asked for before the next step; nothing is written then."""
    if distributed.any_true(signals.asked()):
        raise Stopped(f"asked to stop before step {state.step + 1}; go on with --resume auto", 0)


def save_state(directory: Path, learner: Learned, state: State, keep: int, sampler: nn.Module | None = None) -> None:
    """Write a checkpoint of the present state, and remove old ones except the `keep` newest and the best.

    A collective call.

    Args:
        directory: the run's.
        learner: what has learned.
        state: of the run.
        keep: number of newest checkpoints to keep.
        sampler: the weights that sample, if they are older than the learner's.
    """
    content = {**asdict(state), "scaler": learner.scaler.state_dict()}
    place, parts = directory / "checkpoints", (learner.trained, learner.optimizer, content, _others(learner, sampler))
    checkpoint.save(place, state.step, *parts)
    distributed.on_main(lambda: checkpoint.prune(place, keep, state.best_step or None))


def restore_state(
    directory: Path, learner: Learned, path: Path | None = None, sampler: nn.Module | None = None
) -> State:
    """Load a checkpoint of a run, by default the newest if there is one, into the learner and older `sampler` weights.

    Returns:
        The state to continue from; without a checkpoint, that of a new run.

    Raises:
        ValueError: there are checkpoints but none is complete, or the newest is damaged or does not fit.
    """

    def newest() -> Path | None:
        folder = directory / "checkpoints"
        path = checkpoint.latest(folder)
        found = sorted(place.name for place in folder.glob("step_*") if place.suffix != ".tmp")
        if path is None and found:
            raise ValueError(f"resume: none of the checkpoints {', '.join(found)} in {folder} is complete")
        if path and Path(found[-1]).stem > path.stem:
            say(f"warning: {found[-1]} in {folder} is not complete; the run goes on from {path.name}")
        return path

    path = distributed.on_main(lambda: path or newest())
    if path is None:
        return State()
    content = checkpoint.load(path, learner.trained, learner.optimizer, _others(learner, sampler))
    _check(content, path / "state.json")
    content["pass_rates"] = {int(problem): rate for problem, rate in content["pass_rates"].items()}  # JSON: texts
    try:
        learner.scaler.load_state_dict(content.pop("scaler"))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"resume: {path / 'state.json'}: scaler does not fit ({error})") from error
    return State(**content)


def _others(learner: Learned, sampler: nn.Module | None) -> dict[str, nn.Module]:
    """What a checkpoint holds beside the policy, by name."""
    found = {"reference": learner.moving_reference, "sampler": sampler}
    return {name: module for name, module in found.items() if module is not None}


def _check(content: dict, file: Path) -> None:
    """Raise ValueError, which names the field, if another version has written this state."""
    kinds = {"step": int, "skipped": int, "best_step": int, "best_accuracy": float | int, "scaler": dict}
    kinds |= {"coefs": dict, "pass_rates": dict}
    if unknown := sorted(content.keys() - kinds.keys()):
        raise ValueError(
            f"resume: {file} holds {unknown[0]!r}, which this version does not know; go on with the version that wrote "
            "it (see environment.json), or give the run another run_name"
        )
    check_kinds(content, f"resume: {file}", kinds)
