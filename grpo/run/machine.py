"""The machine of a run: what `auto` means on it, settings of the whole process, memory, versions.

Left out: how large a micro-batch a GPU's memory allows (`doctor/memory.py`), and what has to be set before torch is
loaded (`grpo/__init__.py`).
"""

import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from grpo import distributed
from grpo.kernels import heap
from grpo.kernels.compiled import can_compile, taken_back
from grpo.run.version import commit

T = TypeVar("T")


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a GPU or, for a CPU, as `heap.memory` says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return heap.memory()


def peak_bytes(device: torch.device) -> dict[str, float]:
    """The most memory held so far, in bytes: of the GPU, or this process's resident set. The largest over ranks."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory/peak_bytes": float(distributed.all_max(torch.tensor(peak, dtype=torch.float64)))}


def environment(device: torch.device) -> dict:
    """The content of environment.json: commit, versions, device, threads, processes, command."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "device": processor or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "command": [sys.executable, *sys.argv],
    }


TOKENS_PER_MICROBATCH = 4096
"""What `max_tokens_per_microbatch: auto` means on a CPU, if its memory allows that many."""
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Torch reads this variable at its first tensor: large tensors get large pages."""


def settle(
    asked: T, device: torch.device, before: Any = None, budget: Callable[[T], int] = lambda known: TOKENS_PER_MICROBATCH
) -> T:
    """Options in which each `auto` is replaced by what it means. This is decided here and nowhere else.

    Args:
        asked: of a run, of an evaluation, or of a sample.
        device: of this process.
        before: options that a resumed run began with. What `auto` meant then stays, also on another device.
        budget: says how many tokens of a micro-batch fit into memory, from options that are settled but for that one.
    """
    on_gpu = device.type == "cuda"
    meanings = {  # in this order: a later one depends on those before it
        "precision": lambda known: "bf16" if on_gpu else "fp32",  # bfloat16 is slow on a CPU
        "compile": lambda known: on_gpu and known.precision in ("bf16", "fp16") and can_compile(),
        "max_tokens_per_microbatch": budget if on_gpu else lambda known: min(budget(known), TOKENS_PER_MICROBATCH),
    }
    known = replace(asked, device=device.type)
    for name, meaning in meanings.items():
        if getattr(known, name, None) == "auto":
            meant = getattr(before, name, "auto")
            known = replace(known, **{name: meaning(known) if meant == "auto" else meant})
    return known


@contextmanager
def settings(device: torch.device) -> Iterator[None]:
    """Make the settings of the whole process for a computation, and take them back when it ends.

    - On a CPU all operations are deterministic, and memory that was freed is kept for the next step.
    - Large tensors get large pages.
    - What compiling sets is taken back too.
    """
    on_cpu, fill = device.type == "cpu", torch.utils.deterministic
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with taken_back(), ExitStack() as at_end:
        at_end.callback(torch.use_deterministic_algorithms, was, warn_only=warned)
        torch.use_deterministic_algorithms(on_cpu)
        at_end.callback(setattr, fill, "fill_uninitialized_memory", fill.fill_uninitialized_memory)
        fill.fill_uninitialized_memory = False  # it would fill every new tensor, for debugging only
        if LARGE_PAGES not in os.environ:
            at_end.callback(os.environ.pop, LARGE_PAGES, None)
            os.environ[LARGE_PAGES] = "1"
        if on_cpu:
            at_end.callback(heap.as_usual)
            heap.keep_freed()
        yield
