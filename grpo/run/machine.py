"""The machine of a run: what `auto` means on it, process-wide settings, memory, versions.

Left out: how large a micro-batch a GPU's memory allows (`doctor/memory.py`).
"""

import ctypes
import os
import platform
import resource
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from grpo import distributed
from grpo.config import Config
from grpo.kernels.compiled import can_compile
from grpo.run.version import commit


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a GPU or, for a CPU, of the machine. If the system does not say, all counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = Path("/proc/meminfo")
    lines = told.read_text().splitlines() if told.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1]), total
    return total, total


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
"""The value of `max_tokens_per_microbatch: auto` on a CPU. On a GPU the doctor chooses it, by model and memory."""


def resolve(config: Config, device: torch.device) -> Config:
    """The config with each `auto` replaced by its value on this device.

    These are device, precision, compile and, on a CPU, `max_tokens_per_microbatch`.
    """
    precision = precision_on(device, config.precision)
    on_gpu, meant = device.type == "cuda", {"device": device.type, "precision": precision}
    if config.compile == "auto":
        meant["compile"] = on_gpu and precision in ("bf16", "fp16") and can_compile()
    if config.max_tokens_per_microbatch == "auto" and not on_gpu:
        meant["max_tokens_per_microbatch"] = TOKENS_PER_MICROBATCH
    return replace(config, **meant)


def precision_on(device: torch.device, precision: str) -> str:
    """The precision, with `auto` resolved: bf16 on a GPU, and fp32 on a CPU, where bfloat16 is slow."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def prepare(device: torch.device, precision: str) -> None:
    """Make the process-wide settings.

    - Under fp64, the default dtype is float64.
    - On a CPU, all operations are deterministic, and freed memory is kept for the next step.
    """
    if precision == "fp64":
        torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill every new tensor, for debugging only
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at the first tensor: huge pages for large ones
    if device.type == "cpu" and sys.platform == "linux":  # keep freed memory: each step needs as much again
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
