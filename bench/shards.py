"""Measure what each process of a sharded run holds in memory, on a CPU under Linux.

    MALLOC_MMAP_THRESHOLD_=1000000 torchrun --nproc_per_node 2 -m bench.shards --model DIR --shard full

Prints, of the process with the most: megabytes above those of the libraries once the policy is loaded, once it is
sharded and has an optimiser, and at the peak of an update. With that variable glibc gives freed memory back. Left out:
the sampler, whose copy is whole everywhere.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grpo import distributed, options
from grpo.config import Config
from grpo.metrics import Sums
from grpo.microbatch import largest
from grpo.optimizer import clip_and_step
from grpo.options import option
from grpo.policy import load_policy
from grpo.update import Learner


@dataclass(frozen=True)
class Asked:
    """Measure the memory of a learner."""

    model: str = "embedded"
    """Directory or hub name."""
    shard: Literal["none", "full", "hybrid"] = "full"
    """As in train.py."""
    tokens: int = option(256, ">= 2")
    """Of a micro-batch."""
    activation_checkpointing: bool = True
    """As in train.py."""


def status(name: str) -> int:
    """Bytes that the kernel counts for this process under a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def main(argv: list[str]) -> None:
    """Load, shard, make two updates, print."""
    asked = options.parse(Asked, argv, prog="bench.shards")
    distributed.init("cpu")
    before, found = status("VmRSS"), {}
    policy, _ = load_policy(asked.model, activation_checkpointing=asked.activation_checkpointing)
    parameters = sum(p.numel() for p in policy.parameters())
    found["loaded"] = status("VmRSS") - before
    config = Config(shard=asked.shard, max_tokens_per_microbatch=asked.tokens, precision="fp32", kl_coef=0.0)
    learner = Learner(config, policy, None)
    found["with optimiser"] = status("VmRSS") - before
    tree = largest(asked.tokens, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    for _ in range(2):
        logprobs, _ = learner.module(tree, 1.0)
        logprobs.sum().backward()
        clip_and_step(policy, learner.optimizer, learner.scaler, 1.0, Sums())
    found["peak of an update"] = status("VmHWM") - before
    most = {name: max(distributed.gather_objects(size)) for name, size in found.items()}
    if distributed.is_main():
        held = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in most.items())
        print(f"{asked.shard}, processes: {distributed.world_size()}, {parameters / 1e6:.0f} million weights: {held}")
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
