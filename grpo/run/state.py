"""Where a run stands: what a checkpoint holds beside weights and optimiser, when it is written, why a run stops.

Data order and randomness are functions of the step, so the state is small. Left out: the file itself (`checkpoint.py`).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from grpo import distributed
from grpo.files import check_kinds
from grpo.run import checkpoint
from grpo.run.signals import Signals

MAX_SKIPPED = 3
"""Steps in a row whose gradient is not finite, after which a run stops."""


@dataclass
class State:
    """What a checkpoint holds beside weights and optimiser. Data order and randomness are functions of the step."""

    step: int = 0
    """Steps done."""
    skipped: int = 0
    """Steps in a row, up to now, whose gradient was not finite."""
    best_step: int = 0
    """The step of the best evaluation on validation; 0 = none yet."""
    best_accuracy: float = -1.0
    """Its accuracy."""

    def after(self, step: int, finite: bool) -> "State":
        """The state when `step` is done; not `finite`: one of its updates was left out."""
        return replace(self, step=step, skipped=0 if finite else self.skipped + 1)


class Learned(Protocol):
    """What a checkpoint takes from a learner."""

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


class Stopped(Exception):
    """The run ends early, for a reason that is a sentence; its state is saved."""

    def __init__(self, reason: str, code: int):
        """`code`: what the process exits with, 0 if somebody asked for it."""
        super().__init__(reason)
        self.code = code


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def why_stop(state: State, signals: Signals) -> tuple[str, int] | None:
    """What the run is `Stopped` with after this step, the same on every rank; None: it goes on."""
    if distributed.any_true(signals.asked()):
        return f"asked to stop; saved after step {state.step}, go on with --resume auto", 0
    if state.skipped >= MAX_SKIPPED:
        return (
            f"the gradient was not finite in {state.skipped} steps in a row, whose updates were left out; the last "
            f"good state is saved as step {state.step}",
            1,
        )
    return None


def stop_before(state: State, signals: Signals) -> None:
    """Raise `Stopped` on every rank if a stop was asked for before the next step; nothing is written then."""
    if distributed.any_true(signals.asked()):
        raise Stopped(f"asked to stop before step {state.step + 1}; go on with --resume auto", 0)


def save_state(directory: Path, learner: Learned, state: State, keep: int) -> None:
    """Write a checkpoint of this moment, and drop old ones."""
    content = {**asdict(state), "scaler": learner.scaler.state_dict()}

    def write() -> None:
        checkpoint.save(directory / "checkpoints", state.step, learner.policy, learner.optimizer, content)
        checkpoint.prune(directory / "checkpoints", keep, state.best_step or None)

    distributed.on_main(write)


def restore_state(directory: Path, learner: Learned) -> State:
    """Load the newest checkpoint, if there is one, into the learner; returns the state to go on from."""

    def newest() -> Path | None:
        path, places = checkpoint.latest(directory / "checkpoints"), (directory / "checkpoints").glob("step_*")
        damaged = [place.name for place in places if place.suffix != ".tmp"]
        if path is None and damaged:
            raise ValueError(f"resume: of {', '.join(sorted(damaged))} in {directory / 'checkpoints'} none is complete")
        return path

    def read() -> dict | None:
        if (path := newest()) is None:
            return None
        content = checkpoint.load(path, learner.policy, learner.optimizer)
        _check(content, path / "state.json")
        return content | {"path": path}

    content = distributed.on_main(read)  # hosts need not share a disk: rank 0 reads, and the others receive
    if content is None:
        return State()
    checkpoint.share(learner.policy, learner.optimizer)
    path = content.pop("path")
    try:
        learner.scaler.load_state_dict(content.pop("scaler"))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"resume: {path / 'state.json'}: scaler does not fit ({error})") from error
    return State(**content)


def _check(content: dict, file: Path) -> None:
    """Raise ValueError, which names the field, if another version has written this state."""
    kinds = {"step": int, "skipped": int, "best_step": int, "best_accuracy": float | int, "scaler": dict}
    if unknown := sorted(content.keys() - kinds.keys()):
        raise ValueError(
            f"resume: {file} holds {unknown[0]!r}, which this version does not know; go on with the version that wrote "
            "it (see environment.json), or give the run another run_name"
        )
    check_kinds(content, f"resume: {file}", kinds)
