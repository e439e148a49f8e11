"""Measure the speed of this device: matrix products and memory copies. Left out: whole models."""

import math
import time
from collections.abc import Callable

import torch

from grpo.kernels import onednn


def measured(device: torch.device, precision: str) -> tuple[float, float]:
    """Operations of matrix products per second, and bytes copied per second; measuring takes about a second."""
    on_gpu = device.type == "cuda"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.get(precision, torch.float32)
    size, numbers = (8192, 1 << 28) if on_gpu else (768, 1 << 24)
    # Random numbers: a GPU multiplies matrices of ones faster than real data, because they take less power.
    random = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, dtype=dtype, device=device, generator=random)
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    ways = (lambda: matrix @ matrix, lambda: onednn.multiply(matrix, matrix))  # the second is what learning uses
    flops = 2 * size**3 / min(fastest(way, on_gpu) for way in ways)
    return flops, 2 * 4 * numbers / fastest(lambda: target.copy_(source), on_gpu)


def fastest(action: Callable[[], object], on_gpu: bool) -> float:
    """Seconds of the fastest of several calls."""
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        action()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
