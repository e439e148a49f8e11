"""Estimate the seconds of a step from the tokens that it computes and the measured speed of this device.

The estimate can be off by a factor of two or three. Left out: attention scores, whose share is small up to a few
thousand tokens.
"""

import math
import time
from collections.abc import Callable

import torch

from grpo.config import Config
from grpo.doctor.facts import Facts
from grpo.doctor.memory import product_bytes, tokens, updates_per_step
from grpo.kernels import onednn

EFFICIENCY = 0.5
"""A whole model is assumed to reach this share of the speed of one large matrix product."""

TOKEN_S, LAYER_S, PART_S = 4e-3, 1e-3, 1e-4
"""Seconds of overhead that do not depend on the model's size: per decoding step, per layer of a decoding step, and per
completion and layer of a learning pass (attention). Measured on a CPU with a model of a million parameters."""


def seconds(config: Config, facts: Facts, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds of a step, in which each process does its share.

    Args:
        config: of the run; `max_tokens_per_microbatch` must be a number.
        facts: about it.
        flops, bandwidth: operations and bytes per second, as `measured` returns them.

    Returns:
        {"rollout": seconds, "learn": seconds}.
    """
    size, step = facts.sizes, tokens(config, facts)
    rate, share = flops * EFFICIENCY, 1 / min(facts.world_size, config.prompts_per_step)
    per_token = 2 * size.parameters
    prefill = per_token * step.prompts / rate
    reading = product_bytes(config) * size.parameters / bandwidth + TOKEN_S + size.layers * LAYER_S
    decode = per_token * step.sampled * share / rate + config.max_new_tokens * reading
    passes = 3 + config.activation_checkpointing  # a backward pass costs two forward passes
    extra = (config.kl_coef > 0) + (updates_per_step(config) > 1)
    work = per_token * step.learned * share * (passes * config.num_epochs + extra) / rate
    calls = step.sequences * share * size.layers * PART_S * (passes * config.num_epochs + extra)
    return {"rollout": prefill + decode, "learn": work + calls}


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
