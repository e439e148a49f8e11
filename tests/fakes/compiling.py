"""For tests of what is compiled: the compiler without kernels, and how many graphs were made."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from torch._dynamo.utils import counters

from grpo.kernels import compiled


@pytest.fixture
def aot_eager(monkeypatch):
    """Everything is traced, differentiated and guarded as for a GPU, then run as plain operations.

    FlexAttention refuses gradients on a CPU because its kernel has none there; the plain operations have.
    """
    monkeypatch.setattr(compiled, "SETTINGS", {"dynamic": True, "backend": "aot_eager"})
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    forget()
    yield
    forget()


def graphs() -> int:
    """Graphs compiled so far in this test."""
    return counters["stats"]["unique_graphs"]


def forget() -> None:
    """As in a process that has compiled nothing yet."""
    torch._dynamo.reset()
    compiled.any_size.cache_clear()
    counters.clear()
