"""The metrics of a step: their names, and how each rank's sums become one value over all ranks.

A mean is kept as a sum and a weight until all ranks are added up, so it does not depend on how the work was divided.
Left out: what the metrics mean (`docs/metrics.md`), where they are computed, and where they are written (`run/log.py`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grpo import distributed
from rewards import label

METRIC_NAMES = (
    ("step", "reward/mean", "reward/<term>", "reward/invalid", "reward/flat_groups")
    + ("rollout/refills", "rollout/dropped_groups", "rollout/hard_problems", "rollout/easy_problems")
    + ("completion/length", "completion/truncated", "policy/entropy", "policy/kl", "policy/old_kl", "policy/ratio_mean")
    + ("policy/clip_fraction", "policy/sampler_gap_mean", "policy/sampler_gap_max", "policy/correction_ess")
    + ("policy/correction_max", "policy/correction_masked")
    + ("policy/kl_coef", "policy/entropy_coef", "policy/entropy_share", "optim/loss", "optim/grad_norm", "optim/lr")
    + ("optim/updates", "optim/skipped", "time/rollout", "time/reward", "time/learn", "time/step", "memory/peak_bytes")
    + ("tokens/sampled", "tokens/computed")
)


def metric_names(reward_names: tuple[str, ...]) -> list[str]:
    """The keys of each line in `metrics.jsonl`, in order: `METRIC_NAMES` with the names of all reward functions."""
    terms = [f"reward/{label(name)}" for name in reward_names]
    return [name for metric in METRIC_NAMES for name in (terms if metric == "reward/<term>" else [metric])]


class Sums:
    """Collects sums, weights and maxima on the device of one rank; `reduce` combines all ranks.

    Nothing is copied to the CPU before `reduce`, so `add` and `maximum` do not wait for a GPU.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], Tensor] = {}

    def add(self, name: str, total: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Adds to a mean or, without a weight, to a plain sum.

        Args:
          name: of the metric; use it always with a weight or always without.
          total: scalar, the sum of the values; kept in float64.
          weight: scalar, the number of values (or the sum of their weights).
        """
        self._accumulate(("sum", name), total, torch.add)
        if weight is not None:
            self._accumulate(("weight", name), weight, torch.add)

    def add_where(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Adds to a mean those values where the mask is True; whatever stands elsewhere, even NaN, is left out.

        Args:
          name: of the metric.
          values: of any shape.
          mask: bool, of the same shape.
        """
        kept = values.detach().where(mask, 0)  # selecting instead would wait for a GPU
        self.add(name, kept.sum(), mask.sum())

    def add_effective_size(self, name: str, weights: Tensor, mask: Tensor) -> None:
        """Adds weights to (sum w)^2 / (n sum w^2), the share of n samples that would say as much, weighted alike.

        Args:
          name: of the metric.
          weights: of any shape, >= 0.
          mask: bool, of the same shape, n times True.
        """
        self.add_where(name, weights, mask)
        self._accumulate(("square", name), weights.detach().double().where(mask, 0).square().sum(), torch.add)

    def maximum(self, name: str, value: Tensor | float) -> None:
        """Keeps the largest value of this name. `value` is a scalar."""
        self._accumulate(("max", name), value, torch.maximum)

    def merge(self, other: "Sums") -> None:
        """Adds everything that `other` has collected."""
        for key, value in other._values.items():
            self._accumulate(key, value, torch.maximum if key[0] == "max" else torch.add)

    def _accumulate(self, key: tuple[str, str], value: Tensor | float, combine: Callable) -> None:
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        self._values[key] = combine(self._values[key].to(value.device), value) if key in self._values else value.clone()

    def reduce(self) -> dict[str, float]:
        """Combines all ranks, in one collective call. Every rank must call it; names may differ between ranks.

        Returns:
          {name: mean, sum, effective size or maximum over all ranks}, the same on each rank. A mean of weight 0 is NaN.
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
        for (kind, name), parts in everywhere.items():
            if kind == "square" and sum(parts):
                result[name] *= sum(everywhere["sum", name]) / sum(parts)
        return result
