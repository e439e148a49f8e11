"""The numbers of a step: their names, and how sums of each rank become one value of all.

A mean is kept as a sum and a weight until all ranks have been added up, so it does not depend on how work was divided.
Left out: what the numbers mean (`docs/metrics.md`), where they come from, and where they are written (`run/log.py`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grpo import distributed

METRIC_NAMES = (
    ("step", "reward/mean", "reward/<term>", "reward/invalid", "reward/flat_groups")
    + ("completion/length", "completion/truncated", "policy/entropy", "policy/kl", "policy/ratio_mean")
    + ("policy/clip_fraction", "policy/sampler_gap_mean", "policy/sampler_gap_max", "optim/loss", "optim/grad_norm")
    + ("optim/lr", "optim/skipped", "time/rollout", "time/reward", "time/learn", "time/step", "memory/peak_bytes")
    + ("tokens/sampled", "tokens/computed")
)


def metric_names(reward_names: tuple[str, ...]) -> list[str]:
    """`METRIC_NAMES` with `reward/<term>` spelt out: the keys of every line, in order."""
    terms = [f"reward/{name}" for name in reward_names]
    return [name for metric in METRIC_NAMES for name in (terms if metric == "reward/<term>" else [metric])]


class Sums:
    """Collects sums, weights and maxima of one rank, on the device, and adds up over ranks at the end.

    Nothing is copied to the CPU before `reduce`, so `add` and `maximum` do not wait for a GPU.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], Tensor] = {}

    def add(self, name: str, total: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Adds to a mean (`total` of values, and the `weight` it stands for) or, without a weight, to a plain sum.

        A name is always used with a weight or always without. Scalars; kept in float64.
        """
        self._accumulate(("sum", name), total, torch.add)
        if weight is not None:
            self._accumulate(("weight", name), weight, torch.add)

    def maximum(self, name: str, value: Tensor | float) -> None:
        """Keeps the largest value (a scalar) of this name."""
        self._accumulate(("max", name), value, torch.maximum)

    def merge(self, other: "Sums") -> None:
        """Takes in everything that another has collected."""
        for key, value in other._values.items():
            self._accumulate(key, value, torch.maximum if key[0] == "max" else torch.add)

    def _accumulate(self, key: tuple[str, str], value: Tensor | float, combine: Callable) -> None:
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        self._values[key] = combine(self._values[key].to(value.device), value) if key in self._values else value.clone()

    def reduce(self) -> dict[str, float]:
        """{name: mean, sum or maximum over all ranks}, the same on each; NaN for a mean of weight 0.

        One collective call. A rank that had nothing to add takes part; names may differ between ranks.
        """
        here = {key: value.item() for key, value in self._values.items()}
        everywhere: dict[tuple[str, str], list[float]] = {}
        for rank in distributed.gather_objects(here):
            for key, value in rank.items():
                everywhere.setdefault(key, []).append(value)
        result = {}
        for (kind, name), parts in everywhere.items():
            if kind == "max":
                result[name] = math.nan if any(map(math.isnan, parts)) else max(parts)
            elif kind == "sum" and ("weight", name) not in everywhere:
                result[name] = sum(parts)
            elif kind == "sum":
                weight = sum(everywhere["weight", name])
                result[name] = sum(parts) / weight if weight else math.nan
        return result


