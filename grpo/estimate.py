"""What a step will cost: tokens, bytes, seconds, before anything is started. Arithmetic over shapes.

Weights, gradient and optimiser are exact; activations, caches and times are rough, and a time can be off by a factor of
two or three. Attention itself is left out: its share is small up to a few thousand tokens.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo.config import Config
from grpo.facts import Facts
from grpo.logprobs import CHUNK

EFFICIENCY = 0.5
"""Share of the speed of one large matrix product that a whole model reaches."""

TOKEN_S, LAYER_S, PART_S = 4e-3, 1e-3, 5e-4
"""Seconds that calls alone take, however small the model: one token of all rows, one layer of it, and, in learning, the
attention of one completion in one layer of a pass. As seen on a CPU with a model of a million parameters."""


@dataclass(frozen=True)
class Tokens:
    """Of one step, all processes together."""

    sequences: int
    typical: float
    """Of a completion: the mean of the data's worked answers, each cut at max_new_tokens; half of that without them."""
    sampled: float
    prompts: float
    """Distinct ones: the exemplars once, each question once."""
    learned: float
    """Of one forward pass of learning: the exemplars once per micro-batch."""
    microbatches: int


def tokens(config: Config, facts: Facts) -> Tokens:
    """What a step samples and computes; `max_tokens_per_microbatch` must be a number."""
    sequences = config.prompts_per_step * config.group_size
    worked = facts.solution_tokens
    lengths = [min(length, config.max_new_tokens) for length in worked] or [config.max_new_tokens / 2]
    typical = sum(lengths) / len(lengths)
    own = sum(facts.prompt_tokens) / len(facts.prompt_tokens) - facts.shared_tokens
    sampled, questions = sequences * typical, config.prompts_per_step * own
    room = max(config.max_tokens_per_microbatch - facts.shared_tokens, own + typical)
    microbatches = max(math.ceil((sampled + questions) / room), min(facts.world_size, config.prompts_per_step))
    return Tokens(
        sequences,
        typical,
        sampled,
        prompts=facts.shared_tokens + questions,
        learned=sampled + questions + microbatches * facts.shared_tokens,
        microbatches=microbatches,
    )


def updates_per_step(config: Config) -> int:
    """Optimiser steps in a step."""
    per_update = config.minibatch_size // config.group_size or config.prompts_per_step
    return config.num_epochs * math.ceil(config.prompts_per_step / per_update)


def memory(config: Config, facts: Facts) -> dict[str, float]:
    """Bytes per process, by what holds them; the first four are exact, for whole copies on every process."""
    size, whole = facts.sizes, 8 if config.precision == "fp64" else 4
    half = config.precision in ("bf16", "fp16")
    compute = 2 if half else whole
    copy = compute * size.rounded + whole * (size.parameters - size.rounded)
    step, share = tokens(config, facts), 1 / min(facts.world_size, config.prompts_per_step)
    kept = (12 * size.width + 5 * size.intermediate) * compute  # of a token, in a layer, for backward
    if config.activation_checkpointing:
        kept = size.width * whole
    in_flight = min(config.max_tokens_per_microbatch, step.learned * share)
    rows = step.sequences * share
    cache = 2 * size.layers * size.key_width * compute * (step.prompts + rows * config.max_new_tokens)
    logits = 3 * 4 * size.vocabulary
    return {
        "weights, gradient, two moments": 4 * whole * size.parameters,
        "reference": copy if config.kl_coef > 0 else 0,
        "sampler's copy": copy if half else 0,
        "sampling: keys, values, logits": cache + logits * rows,
        "learning: activations, logits": in_flight * size.layers * kept + logits * CHUNK,
    }


def exact(parts: dict[str, float]) -> float:
    """Bytes of `memory` that do not depend on an estimate."""
    return sum(list(parts.values())[:3])


def peak(parts: dict[str, float]) -> float:
    """Bytes of `memory` at one time: sampling and learning take turns."""
    return exact(parts) + max(list(parts.values())[3:])


def seconds(config: Config, facts: Facts, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds of a step: `rollout` and `learn`, each process doing its share.

    Args:
        config: the run's, `max_tokens_per_microbatch` a number.
        facts: about it.
        flops, bandwidth: what `measured` returned.
    """
    size, step = facts.sizes, tokens(config, facts)
    rate, share = flops * EFFICIENCY, 1 / min(facts.world_size, config.prompts_per_step)
    width = 2 if config.precision in ("bf16", "fp16") else 4
    per_token = 2 * size.parameters
    prefill = per_token * step.prompts / rate
    reading = width * size.parameters / bandwidth + TOKEN_S + size.layers * LAYER_S
    decode = per_token * step.sampled * share / rate + config.max_new_tokens * reading
    passes = 3 + config.activation_checkpointing  # backward is two
    extra = (config.kl_coef > 0) + (updates_per_step(config) > 1)
    work = per_token * step.learned * share * (passes * config.num_epochs + extra) / rate
    calls = step.sequences * share * size.layers * PART_S * (passes * config.num_epochs + extra)
    return {"rollout": prefill + decode, "learn": work + calls}


def measured(device: torch.device, precision: str) -> tuple[float, float]:
    """(operations of matrix products, bytes read and written) per second on this device; takes about a second."""
    on_gpu = device.type == "cuda"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.get(precision, torch.float32)
    size, numbers = (8192, 1 << 28) if on_gpu else (768, 1 << 24)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / fastest(lambda: matrix @ matrix, on_gpu)
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
