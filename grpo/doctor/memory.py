"""What a step will hold: tokens and bytes, before anything is started. Arithmetic over shapes.

Weights, gradient and optimiser are exact; the sampler's room and activations are estimates. Left out: seconds
(`speed.py`).
"""

import math
from dataclasses import dataclass, replace

import torch

from grpo.config import Config
from grpo.doctor.facts import Facts
from grpo.kernels import decode, onednn
from grpo.logprobs import vocabularies_per_chunk
from grpo.policy import remembers

USED = 0.9
"""Share of a GPU's free memory that `budget` plans with; the rest is for what is not counted, and for gaps."""

LEAST_TOKENS, MOST_TOKENS = 256, 8192
"""Bounds of `budget`. The upper one leaves memory to others once matrix products are large; not measured on a GPU."""


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
    )


def updates_per_step(config: Config) -> int:
    """Optimiser steps in a step."""
    per_update = config.minibatch_size // config.group_size or config.prompts_per_step
    return config.num_epochs * math.ceil(config.prompts_per_step / per_update)


def by_holder(config: Config, facts: Facts) -> dict[str, float]:
    """Bytes per process, by what holds them; all but the last two are exact, for whole copies on every process."""
    step, share = tokens(config, facts), 1 / min(facts.world_size, config.prompts_per_step)
    in_flight = min(config.max_tokens_per_microbatch, step.learned * share)
    longest = facts.prompt_tokens[-1] - facts.shared_tokens
    return _copies(config, facts) | {
        "sampling: keys, values, logits, packed weights": cache(config, facts, longest)
        + _packed(config, facts)
        + 3 * 4 * facts.sizes.vocabulary * step.sequences * share,
        "learning: activations, logits": in_flight * kept(config, facts) + _fixed(config, facts),
    }


def exact(held: dict[str, float]) -> float:
    """Bytes of `by_holder` that do not depend on an estimate."""
    return sum(list(held.values())[:-2])


def peak(held: dict[str, float]) -> float:
    """Bytes of `by_holder` at one time: sampling and learning take turns."""
    return exact(held) + max(list(held.values())[-2:])


def least(config: Config, facts: Facts) -> tuple[float, float, float]:
    """Bytes per process that a step surely takes: all the time, more while sampling, more while learning.

    The sampler's keys and values are those of the shortest prompts; of learning, where the rest is an estimate, the
    gradient alone counts. There is none while sampling.
    """
    gradient = _whole(config) * facts.sizes.parameters
    held = sum(_copies(config, facts).values()) - gradient
    return held, cache(config, facts, facts.prompt_tokens[0] - facts.shared_tokens), gradient


def cache(config: Config, facts: Facts, branch: float, *, validating: bool = False) -> float:
    """Bytes per process of the sampler's keys and values: the trunk once, branches per prompt, own tokens per row.

    Args:
        config: the run's; every row has room for `max_new_tokens`.
        facts: about it.
        branch: tokens of the longest prompt after what all share: the others are padded to it.
        validating: as for `room`.
    """
    size, (prompts, rows) = facts.sizes, room(config, facts, validating=validating)
    held = facts.shared_tokens + prompts * branch + rows * config.max_new_tokens
    fused = config.compile and decode.usable(config.device, _half(config))
    number = _compute(config) if fused else _whole(config)
    return 2 * size.layers * size.key_width * number * held


def room(config: Config, facts: Facts, *, validating: bool = False) -> tuple[int, int]:
    """(prompts, rows) per process that the sampler makes room for.

    Args:
        config: the run's.
        facts: about it.
        validating: for a batch of validation as well as for a step: a GPU keeps the larger room.
    """
    prompts = math.ceil(config.prompts_per_step / facts.world_size)
    batch = config.eval_batch if validating and config.eval_every else 0
    return max(prompts, batch), max(prompts * config.group_size, batch)


def kept(config: Config, facts: Facts) -> float:
    """Bytes of learning per token of a micro-batch: what all layers keep for backward, and what one layer works with.

    Counted on Llama under float32 and under bfloat16 autocast, where the residual stream, queries, keys and values stay
    float32, and each linear layer keeps a rounded copy of its input. Without autocast: what `lean.py` keeps. Compiled
    under autocast: the stream, and rounded two inputs, query, result, key, value and both halves of the MLP.
    """
    size, whole = facts.sizes, _whole(config)
    linear = 6 * size.width + 4 * size.intermediate if _half(config) else 2 * size.intermediate
    widths = 6 if _half(config) else 4
    layer = (widths * size.width + 2 * size.key_width) * whole + linear * _compute(config)
    stored = layer
    if config.compile is True and _half(config):
        rounded = 4 * size.width + 2 * size.key_width + 2 * size.intermediate
        stored = size.width * whole + rounded * _compute(config)
    if config.activation_checkpointing:
        stored = size.width * whole
    return size.layers * stored + 2 * layer


def budget(config: Config, facts: Facts) -> int:
    """What `max_tokens_per_microbatch: auto` means on a GPU with `facts.free_bytes` before anything is loaded.

    The sampler's keys, values and graphs are counted beside learning: their buffers stay, those of validation too. All
    are counted as the plain steps keep them, since not every model has the kernels, which keep less.
    """
    longest = facts.prompt_tokens[-1] - facts.shared_tokens
    _, rows = room(config, facts, validating=True)
    graphs = 2 * _whole(config) * rows * facts.sizes.vocabulary  # logits and their exponentials
    sampler = cache(replace(config, compile=False), facts, longest, validating=True) + graphs
    taken = sum(_copies(config, facts).values()) + sampler + _fixed(config, facts)
    fitting = int((USED * facts.free_bytes - taken) / kept(config, facts))
    return min(max(fitting // LEAST_TOKENS * LEAST_TOKENS, LEAST_TOKENS), MOST_TOKENS)


def _copies(config: Config, facts: Facts) -> dict[str, float]:
    """Bytes of everything that is as large as the model, exact."""
    size, whole = facts.sizes, _whole(config)
    copy = _compute(config) * size.rounded + whole * (size.parameters - size.rounded)
    head = _compute(config) * size.vocabulary * size.width if config.device == "cuda" else 0  # of the sampler
    return {
        "weights, gradient, two moments": 4 * whole * size.parameters,
        "gradient, summed over processes": whole * size.parameters if facts.world_size > 1 else 0,
        "reference": copy + _remembered(config, facts) if config.kl_coef > 0 else 0,
        "sampler's copy": copy + head if _half(config) else 0,
    }


def _remembered(config: Config, facts: Facts) -> float:
    """Bytes of keys and values that the reference holds of what all prompts begin with, as `reference.py` says."""
    known = remembers(config.device, _half(config), config.compile is True, facts.shared_tokens)
    tokens = facts.shared_tokens if known else 0
    return 2 * facts.sizes.layers * facts.sizes.key_width * _whole(config) * tokens


def _packed(config: Config, facts: Facts) -> float:
    """Bytes of float32 weights that the sampler packs on a CPU: linear layers where nothing is rounded, the head."""
    if config.device == "cuda" or config.precision == "fp64" or not onednn.AVAILABLE:
        return 0
    linear = 0 if _half(config) else facts.sizes.rounded
    return 4 * (linear + facts.sizes.vocabulary * facts.sizes.width)


def _fixed(config: Config, facts: Facts) -> float:
    """Bytes of learning, however few tokens: weights that autocast rounds, a chunk of logits, the head's gradient."""
    size = facts.sizes
    rounded = _compute(config) * size.rounded if _half(config) else 0
    chunk = vocabularies_per_chunk(size.vocabulary, torch.device("cuda" if config.device == "cuda" else "cpu"))
    return rounded + size.vocabulary * (3 * 4 * chunk + (_compute(config) + _whole(config)) * size.width)


def _half(config: Config) -> bool:
    return config.precision in ("bf16", "fp16")


def _whole(config: Config) -> int:
    """Bytes of a number outside of matrix products."""
    return 8 if config.precision == "fp64" else 4


def _compute(config: Config) -> int:
    """Bytes of a number in matrix products."""
    return 2 if _half(config) else _whole(config)


