"""Estimate the tokens and the memory of a step from shapes, before anything is started.

Weights, gradient and optimiser are exact. The sampler's buffers and the activations are estimates. Left out: seconds
(`speed.py`).
"""

import math
from dataclasses import dataclass, replace

import torch

from grpo.config import Config
from grpo.doctor.facts import Facts
from grpo.kernels import decode, onednn
from grpo.logprobs import vocabularies_per_chunk

USED = 0.9
"""Share of a GPU's free memory that `budget` uses. The rest is for uncounted buffers and fragmentation."""

LEAST_TOKENS, MOST_TOKENS = 256, 8192
"""Bounds of `budget`. At the upper one matrix products are large already, so the remaining memory is left free.

The upper bound was not measured on a GPU."""


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens in one step, over all processes."""

    sequences: int
    typical: float
    """Assumed length of a completion: the mean length of the data's worked answers, each cut at max_new_tokens.

    If the data has none, half of max_new_tokens."""
    sampled: float
    prompts: float
    """Prompt tokens that are computed: the exemplars once, each question once."""
    learned: float
    """Tokens of one forward pass of learning: the exemplars count once per micro-batch."""


def tokens(config: Config, facts: Facts) -> Tokens:
    """The tokens that a step samples and computes. `max_tokens_per_microbatch` must be a number."""
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
    """The number of optimiser updates in a step."""
    per_update = config.minibatch_size // config.group_size or config.prompts_per_step
    return config.num_epochs * math.ceil(config.prompts_per_step / per_update)


def by_holder(config: Config, facts: Facts) -> dict[str, float]:
    """{what needs memory: bytes per process}. All but the last two are exact; every process holds whole copies."""
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
    """Bytes of the exact entries of `by_holder`."""
    return sum(list(held.values())[:-2])


def peak(held: dict[str, float]) -> float:
    """Peak bytes. Sampling and learning take turns, so the larger of the two estimates counts."""
    return exact(held) + max(list(held.values())[-2:])


def least(config: Config, facts: Facts) -> tuple[float, float, float]:
    """Bytes per process that a step surely needs: (at all times, additionally while sampling, while learning).

    For sampling this counts keys and values of the shortest prompts. For learning only the gradient is exact, so it
    alone counts; it does not exist while sampling.
    """
    gradient = _whole(config) * facts.sizes.parameters
    held = sum(_copies(config, facts).values()) - gradient
    return held, cache(config, facts, facts.prompt_tokens[0] - facts.shared_tokens), gradient


def cache(config: Config, facts: Facts, branch: float, *, validating: bool = False) -> float:
    """Bytes per process of the sampler's keys and values.

    The cache holds the shared prefix once, the rest of each prompt once, and the sampled tokens of every row.

    Args:
        config: of the run; every row has room for `max_new_tokens`.
        facts: about it.
        branch: tokens of the longest prompt without the shared prefix; the others are padded to it.
        validating: as in `room`.
    """
    size, (prompts, rows) = facts.sizes, room(config, facts, validating=validating)
    held = facts.shared_tokens + prompts * branch + rows * config.max_new_tokens
    fused = config.compile and decode.usable(config.device, _half(config))
    number = product_bytes(config) if fused else _whole(config)
    return 2 * size.layers * size.key_width * number * held


def room(config: Config, facts: Facts, *, validating: bool = False) -> tuple[int, int]:
    """The (prompts, rows) per process for which the sampler allocates buffers.

    Args:
        config: of the run.
        facts: about it.
        validating: whether to count a validation batch too; a GPU keeps the larger buffers.
    """
    prompts = math.ceil(config.prompts_per_step / facts.world_size)
    batch = config.eval_batch if validating and config.eval_every else 0
    return max(prompts, batch), max(prompts * config.group_size, batch)


def kept(config: Config, facts: Facts) -> float:
    """Bytes of learning per token of a micro-batch: saved activations of all layers, and working memory of one layer.

    The numbers were counted on Llama:

    - in float32: what `policy/products.py` keeps;
    - under bfloat16 autocast: the residual stream, queries, keys and values in float32, and a rounded copy of the input
      of each linear layer;
    - compiled, under autocast: the residual stream in float32, and rounded two inputs, query, result, key, value and
      both halves of the MLP.
    """
    size, whole = facts.sizes, _whole(config)
    linear = 6 * size.width + 4 * size.intermediate if _half(config) else 2 * size.intermediate
    widths = 6 if _half(config) else 4
    layer = (widths * size.width + 2 * size.key_width) * whole + linear * product_bytes(config)
    stored = layer
    if config.compile is True and _half(config):
        rounded = 4 * size.width + 2 * size.key_width + 2 * size.intermediate
        stored = size.width * whole + rounded * product_bytes(config)
    if config.activation_checkpointing:
        stored = size.width * whole
    return size.layers * stored + 2 * layer


def budget(config: Config, facts: Facts) -> int:
    """The value of `max_tokens_per_microbatch: auto` on a GPU that has `facts.free_bytes` before anything is loaded.

    The sampler's buffers (keys, values, CUDA graphs, also those of validation) stay while learning, so they are counted
    too. They are counted without the fused kernels, which need less, because not every model can use the kernels.
    """
    longest = facts.prompt_tokens[-1] - facts.shared_tokens
    _, rows = room(config, facts, validating=True)
    graphs = 2 * _whole(config) * rows * facts.sizes.vocabulary  # logits and their exponentials
    sampler = cache(replace(config, compile=False), facts, longest, validating=True) + graphs
    taken = sum(_copies(config, facts).values()) + sampler + _fixed(config, facts)
    fitting = int((USED * facts.free_bytes - taken) / kept(config, facts))
    return min(max(fitting // LEAST_TOKENS * LEAST_TOKENS, LEAST_TOKENS), MOST_TOKENS)


def _copies(config: Config, facts: Facts) -> dict[str, float]:
    """Exact bytes of everything that is as large as the model."""
    size, whole = facts.sizes, _whole(config)
    moments = {
        "adamw": 2 * size.parameters,
        "sgd": size.parameters if config.sgd_momentum else 0,
        "muon": 2 * size.parameters - size.rounded,
    }[config.optimizer]
    copy = product_bytes(config) * size.rounded + whole * (size.parameters - size.rounded)
    head = product_bytes(config) * size.vocabulary * size.width if config.device == "cuda" else 0  # of the sampler
    return {
        "weights, gradient, moments": whole * (2 * size.parameters + moments),
        "gradient, summed over processes": whole * size.parameters if facts.world_size > 1 else 0,
        "reference": copy if config.kl_coef > 0 else 0,
        "sampler's copy": copy + head if _half(config) else 0,
    }


def _packed(config: Config, facts: Facts) -> float:
    """Bytes of the weights that the sampler packs for oneDNN on a CPU: the head and, in fp32, the linear layers."""
    if config.device == "cuda" or config.precision == "fp64" or not onednn.AVAILABLE:
        return 0
    linear = 0 if _half(config) else facts.sizes.rounded
    return 4 * (linear + facts.sizes.vocabulary * facts.sizes.width)


def _fixed(config: Config, facts: Facts) -> float:
    """Bytes of learning that do not grow with tokens: weights rounded by autocast, a chunk of logits, head gradient."""
    size = facts.sizes
    rounded = product_bytes(config) * size.rounded if _half(config) else 0
    chunk = vocabularies_per_chunk(size.vocabulary, torch.device("cuda" if config.device == "cuda" else "cpu"))
    return rounded + size.vocabulary * (3 * 4 * chunk + (product_bytes(config) + _whole(config)) * size.width)


def _half(config: Config) -> bool:
    return config.precision in ("bf16", "fp16")


def _whole(config: Config) -> int:
    """Bytes of a number outside matrix products."""
    return 8 if config.precision == "fp64" else 4


def product_bytes(config: Config) -> int:
    """Bytes of a number in matrix products."""
    return 2 if _half(config) else _whole(config)
