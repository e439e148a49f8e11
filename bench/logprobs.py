"""The head's log-probabilities, forward and backward: chunked products, the same with compiled chunks, and the kernel.

    python -m bench.logprobs --rows 16384 --width 896 --vocabulary 151936

Says which is faster on this machine, so what `KERNEL` in `grpo/logprobs.py` should be. Bytes are the most that a way
holds at one time beyond its inputs; the gradient of the head alone is 4 x vocabulary x width of them.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.work import at_least
from grpo import fused_logprobs, logprobs, options


@dataclass(frozen=True)
class Options:
    """Time ways to compute log-probabilities."""

    rows: int = 16384
    """M, predictions of a micro-batch."""
    width: int = 896
    """D, width of the hidden states."""
    vocabulary: int = 151936
    """V, words."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where; on a CPU there is no kernel."""
    chunk: int = 0
    """Logits held at one time, in units of V; 0: as in a run."""
    repeats: int = 5
    """Timed calls, after one that is not; the median counts."""

    def __post_init__(self) -> None:
        """Raises ValueError on a size that can not be."""
        at_least(self, {"rows": 1, "width": 1, "vocabulary": 1, "chunk": 0, "repeats": 1})


def measure(way: Callable[[], tuple[Tensor, Tensor]], inputs: tuple[Tensor, Tensor], repeats: int) -> tuple[float, int]:
    """Median seconds of forward and backward, and the most bytes held meanwhile (0 on a CPU, where nobody counts)."""
    on_gpu = inputs[0].is_cuda
    seconds, held = [], 0
    for i in range(repeats + 1):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        values, entropy = way()
        gradients = torch.autograd.grad(values.sum() + entropy.sum(), inputs)
        if on_gpu:
            torch.cuda.synchronize()
        if i:
            seconds.append(time.perf_counter() - start)
        del values, entropy, gradients
    return statistics.median(seconds), torch.cuda.max_memory_allocated() - held if on_gpu else 0


def main(argv: list[str]) -> int:
    """Print one line per way. Returns the exit code."""
    chosen = options.parse(Options, argv, prog="bench.logprobs")
    device, on_gpu = torch.device(chosen.device), chosen.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("bench.logprobs: error: device is 'cuda', and there is none; try --device cpu", file=sys.stderr)
        return 2
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(chosen.rows, chosen.width, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(chosen.vocabulary, chosen.width, device=device)).requires_grad_()
    targets = torch.randint(chosen.vocabulary, (chosen.rows,), device=device)
    inputs, chunk = (hidden, weight, targets), chosen.chunk or None
    ways = {
        "chunked": lambda: logprobs.linear_logprobs(*inputs, chunk=chunk),
        "chunked, compiled": lambda: logprobs.linear_logprobs(*inputs, chunk=chunk, compiled=True),
        "kernel": lambda: fused_logprobs.linear_logprobs(*inputs, 1.0, dtype),
    }
    first = None
    for name, way in ways.items():
        if name == "kernel" and not on_gpu:
            print(f"{name:20} not here: needs a CUDA device")
            continue
        with torch.autocast(chosen.device, dtype=dtype, enabled=on_gpu):
            seconds, held = measure(way, (hidden, weight), chosen.repeats)
        first = first or seconds
        print(f"{name:20} {seconds:8.4f} s   {seconds / first:6.2f} x chunked   {held / 2**20:8.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
