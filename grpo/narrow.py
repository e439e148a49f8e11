"""Forwards for a step of decoding on a CPU, where a few rows meet large weights and nothing is kept for backward.

Weight times rows instead of rows times weight: the same products, a quarter to a half faster in torch's CPU
library, as long as the rows are a multiple of 8 (7 more take half as long again as 8 more, so they are filled up). The
sampler's steps alone use them: a reference that took another path than the policy would differ from it by a rounding,
and the KL of the first step not be 0. Left out: anything under autocast, other devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Forward = tuple[nn.Linear, MethodType]

MULTIPLE = 8
"""Rows are filled up to a multiple of this."""
WORDS = 2048
"""Logits of so many words are computed at one time, few enough to be turned around before they leave the cache."""


def narrow_forwards(model: nn.Module) -> list[Forward]:
    """The linear layers of a model that have torch's forward, each with the one for few rows."""
    usual = (m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m))
    return [(module, MethodType(_linear, module)) for module in usual]


@contextmanager
def using(forwards: list[Forward]) -> Iterator[None]:
    """Let the modules use these forwards. They are written past nn.Module's own bookkeeping, twice for every token."""
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[n,D], [E,D], [E] -> [n,E]: x @ weight.T + bias, rows being the last dimension in memory."""
    rows = _filled_up(x)
    out = weight @ rows if bias is None else torch.addmm(bias[:, None], weight, rows)
    return out[:, : len(x)].t()


def logits(x: Tensor, head: Tensor) -> Tensor:
    """[n,D], [V,D] -> [n,V]: x @ head.T, every row's logits side by side in memory, as drawing from them needs it."""
    rows, out = _filled_up(x), x.new_empty(len(x), len(head))
    for words, part in zip(head.split(WORDS), out.split(WORDS, dim=1), strict=True):
        part.copy_((words @ rows)[:, : len(x)].t())
    return out


def _filled_up(x: Tensor) -> Tensor:
    """[n,D] -> [D,m]: the rows as columns, and as many of zeros as are missing."""
    missing = -len(x) % MULTIPLE
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).t()  # padding by nothing is a copy


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """[..,n,D] -> [..,n,E]."""
    return product(x.flatten(0, -2), module.weight, module.bias).view(*x.shape[:-1], -1)
