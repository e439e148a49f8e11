"""Where the numbers of each step go beside `metrics.jsonl`: TensorBoard, Weights & Biases or Trackio.

A tracker is opened by rank 0. Where it keeps what it is sent, and for whom, is a matter of its own settings
(`WANDB_MODE=offline`, `TRACKIO_SPACE_ID`). Left out: texts, files and pictures.
"""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from grpo.config import Config
from grpo.files import write_whole


class Tracker(Protocol):
    """Takes the numbers of each step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a step; `numbers` are finite."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Files in `<run>/tensorboard`."""

    def __init__(self, module: Any, directory: Path, config: Config, steps_done: int):
        """Steps after `steps_done` that are there already are replaced."""
        self.writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=steps_done + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:  # noqa: D102
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:  # noqa: D102
        self.writer.close()


class Hosted:
    """Weights & Biases, and Trackio, which has the same calls. The project is `grpo`, the run has our run's name."""

    def __init__(self, module: Any, directory: Path, config: Config, steps_done: int):
        """A run that is resumed goes on there too: by an id of its own, in Trackio by its name."""
        self.module, known = module, directory / "tracker_id"
        resumed = steps_done > 0 and known.exists()
        own: dict = {"resume": "allow" if resumed else "never"}
        if module.__name__ == "wandb":
            if not resumed:
                write_whole(known, uuid.uuid4().hex[:12])
            own |= {"id": known.read_text(), "dir": str(directory)}
        elif not resumed:
            write_whole(known, config.run_name)
        module.init(project="grpo", name=config.run_name, config=dict(vars(config)), **own)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:  # noqa: D102
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:  # noqa: D102
        self.module.finish()


TRACKERS = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", Hosted),
    "trackio": ("trackio", Hosted),
}


def open_tracker(directory: Path, config: Config, steps_done: int) -> Tracker | None:
    """The tracker that the option `tracker` names; None for `none`.

    Raises:
        ValueError: its package is missing, or it can not start, for example without a login.
    """
    if config.tracker == "none":
        return None
    module, kind = TRACKERS[config.tracker]
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        install = f"install it with `pip install 'grpo[{config.tracker}]'`"
        raise ValueError(f"tracker is {config.tracker!r}: the package is missing, {install}") from error
    try:
        return kind(package, directory, config, steps_done)
    except Exception as error:  # types of their own
        said = " ".join(str(error).split())
        raise ValueError(
            f"tracker is {config.tracker!r}: it does not start ({type(error).__name__}: {said})"
        ) from error
