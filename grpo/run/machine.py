"""What a run runs on: versions, memory that there is and that was held, of a GPU or of the machine."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from grpo import distributed
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
