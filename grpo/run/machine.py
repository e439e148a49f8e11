"""What a run runs on: what `auto` means there, settings of the process, memory, versions."""

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
    """(free, total) bytes of a GPU or, for a CPU, of the machine; where the system does not say, all of it is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = Path("/proc/meminfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), total), total


def peak_bytes(device: torch.device) -> dict[str, float]:
    """The most memory held so far: the GPU's, or this process's resident set; the largest over ranks."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory/peak_bytes": float(distributed.all_max(torch.tensor(peak, dtype=torch.float64)))}


def environment(device: torch.device) -> dict:
    """What a run ran on: commit, versions, device, threads, processes, command."""
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
"""What `max_tokens_per_microbatch: auto` means on a CPU. On a GPU it depends on model and memory: `doctor.fit`."""


def resolve(config: Config, device: torch.device) -> Config:
    """The config with `auto` (device, precision, compile, on a CPU the micro-batch) replaced by what it means here."""
    precision = precision_on(device, config.precision)
    on_gpu, meant = device.type == "cuda", {"device": device.type, "precision": precision}
    if config.compile == "auto":
        meant["compile"] = on_gpu and precision in ("bf16", "fp16") and can_compile()
    if config.max_tokens_per_microbatch == "auto" and not on_gpu:
        meant["max_tokens_per_microbatch"] = TOKENS_PER_MICROBATCH
    return replace(config, **meant)


def precision_on(device: torch.device, precision: str) -> str:
    """`auto`: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slow."""
    return ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision


def prepare(device: torch.device, precision: str) -> None:
    """Process-wide settings: float64 as default under fp64; on a CPU, only operations that repeat bitwise."""
    if precision == "fp64":
        torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # fills every new tensor, to find bugs of torch
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read with the first tensor: large ones lie in huge pages
    if device.type == "cpu" and sys.platform == "linux":  # glibc keeps what is freed: every step takes as much again
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mallopt(-1, -1), mallopt(-3, 2**30)  # M_TRIM_THRESHOLD: never; M_MMAP_THRESHOLD
