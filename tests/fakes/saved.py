"""What autograd keeps for backward, as bytes: also where the code under test packs what it keeps its own way."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def noted() -> Iterator[dict[int, torch.Tensor]]:
    """The tensors kept for backward within it, one per storage, by the storage's address; held, so that none is reused.

    Hooks that are set within it are noted too, by what they pack, as deep as tuples go.
    """
    seen: dict[int, torch.Tensor] = {}

    def note(packed):
        if isinstance(packed, torch.Tensor):
            seen[packed.untyped_storage().data_ptr()] = packed
        elif isinstance(packed, tuple):
            for item in packed:
                note(item)
        return packed

    class Noting(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pack, unpack):
            super().__init__(lambda tensor: note(pack(tensor)), unpack)

    patched = mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", Noting)
    with patched, Noting(lambda tensor: tensor, lambda tensor: tensor):
        yield seen


def num_bytes(seen: dict[int, torch.Tensor], module: torch.nn.Module) -> int:
    """Of what was noted, without the module's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in weights)
