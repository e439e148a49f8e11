"""What autograd keeps for backward, as bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def noted() -> Iterator[dict[int, torch.Tensor]]:
    """The tensors kept for backward within it, one per storage, by its address; held, so that none is reused."""
    seen: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield seen


def num_bytes(seen: dict[int, torch.Tensor], module: torch.nn.Module) -> int:
    """Of what was noted, without the module's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in weights)
