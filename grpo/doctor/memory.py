"""Estimate the memory of a step from shapes, before anything is started.

Weights, gradient and optimiser are exact. The sampler's buffers and the activations are estimates. Left out: seconds,
which a run shows after its first step.
"""

import math
from dataclasses import dataclass

import torch

from grpo.config import Config
from grpo.doctor.facts import Facts
from grpo.kernels import onednn
from grpo.logprobs import vocabularies_per_chunk

USED = {"cuda": 0.9, "cpu": 0.6}
"""Share of a device's free memory that `budget` uses. The rest is for uncounted buffers and fragmentation."""

LEAST_TOKENS, MOST_TOKENS = 256, 8192
"""Bounds of `budget`. At the upper one matrix products are large already, so the remaining memory is left free.

The upper bound was not measured on a GPU."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, over all processes that share it."""

    held: float
    """At all times."""
    sampling: float
    """Additionally while sampling."""
    learning: float
    """Additionally while learning."""

    @property
    def peak(self) -> float:
        """Sampling and learning take turns, so the larger of the two counts."""
        return self.held + max(self.sampling, self.learning)


def updates_per_step(config: Config) -> int:
    """The number of optimiser updates in a step."""
    per_update = config.minibatch_size // config.group_size or config.prompts_per_step
    return config.num_epochs * math.ceil(config.prompts_per_step / per_update)


def shards(config: Config, facts: Facts) -> int:
    """Processes among which each weight is divided."""
    return {"none": 1, "full": facts.world_size, "hybrid": facts.nearby}[config.shard]


def copies(config: Config, facts: Facts) -> dict[str, float]:
    """{what is as large as the model: its exact bytes in one process}."""
    parts = shards(config, facts)
    size, whole, learned, lora = facts.sizes, _whole(config), trained(config, facts), config.lora_rank > 0
    moments = {
        "adamw": 2 * learned,
        "sgd": learned if config.sgd_momentum else 0,
        "muon": learned if lora else 2 * learned - size.rounded,
    }[config.optimizer]
    linear, others = _product(config) * size.rounded, whole * (size.parameters - size.rounded)
    head = _product(config) * size.vocabulary * size.width if config.device == "cuda" else 0  # of the sampler
    copied = _half(config) or lora or config.lag or parts > 1
    frozen = (linear if _stored_rounded(config, facts) else whole * size.rounded) + others
    return {
        "weights, gradient, moments": (whole * (2 * learned + moments) + (frozen if lora else 0)) / parts,
        "gradient, summed over processes": whole * learned if facts.world_size > 1 and parts == 1 else 0,
        "reference": (linear + others) / parts if config.kl_coef > 0 and not lora else 0,
        "sampler's copy": (linear + (0 if lora and parts == 1 else others) if copied else 0)
        + (head if _half(config) else 0),
    }


def gathered(config: Config, facts: Facts) -> dict[str, float]:
    """{what is whole of a sharded policy at one time while it learns: an estimate of its bytes}.

    Two layers are gathered, one of them ahead. A gradient is whole until it is sent, from a buffer of its size. Tables
    are embedding and head. The head's gradient is not counted here, because it is whole without shards too.
    """
    if shards(config, facts) == 1:
        return {}
    size, number = facts.sizes, _product(config) if _stored_rounded(config, facts) else _whole(config)
    table = size.vocabulary * size.width
    tables = 1 if config.lora_rank else 3 if size.parameters - size.rounded < 2 * table else 4
    layers = 2 if config.lora_rank else 4
    return {
        "embedding and head, gathered": _whole(config) * tables * table,
        "layers, gathered": number * layers * size.rounded / size.layers,
    }


def trained(config: Config, facts: Facts) -> int:
    """The number of parameters that are trained."""
    return config.lora_rank * facts.sizes.adapted or facts.sizes.parameters


def _stored_rounded(config: Config, facts: Facts) -> bool:
    """Whether frozen linear layers are stored in the compute dtype, since the files hold no more."""
    same = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, "none") == facts.sizes.dtype
    return config.lora_rank > 0 and same


def estimate(config: Config, facts: Facts) -> Memory:
    """What a step may need, with completions of full length. What is held is exact; the rest is not."""
    longest = facts.prompt_tokens[-1] - facts.shared_tokens
    tokens = min(config.max_tokens_per_microbatch, places(config, facts, longest))
    return Memory(
        held=facts.sharing * sum(copies(config, facts).values()),
        sampling=facts.sharing * (sampler_buffers(config, facts) + _packed(config, facts)),
        learning=facts.sharing * (tokens * kept(config, facts) + _fixed(config, facts)),
    )


def least(config: Config, facts: Facts) -> Memory:
    """What a step surely needs.

    For sampling this counts keys and values of the shortest prompts, as small as the fused kernels store them. For
    learning only the gradient is exact, so it alone counts; it does not exist while sampling.
    """
    gradient = _whole(config) * trained(config, facts) / shards(config, facts)
    shortest = facts.prompt_tokens[0] - facts.shared_tokens
    return Memory(
        held=facts.sharing * (sum(copies(config, facts).values()) - gradient),
        sampling=facts.sharing * _product(config) * _keys(facts) * places(config, facts, shortest),
        learning=facts.sharing * gradient,
    )


def budget(config: Config, facts: Facts) -> int:
    """The most tokens of a micro-batch on a device that has `facts.free_bytes` before anything is loaded.

    The sampler's buffers, also those of validation, stay while learning, so they are counted too. On a CPU they are
    freed, but glibc keeps them.
    """
    batch = config.eval_batch if config.eval_every else 0
    taken = sum(copies(config, facts).values()) + sampler_buffers(config, facts, batch) + _fixed(config, facts)
    fitting = int((USED[config.device] * facts.free_bytes / facts.sharing - taken) / kept(config, facts))
    return min(max(fitting // LEAST_TOKENS * LEAST_TOKENS, LEAST_TOKENS), MOST_TOKENS)


def places(config: Config, facts: Facts, branch: int, batch: int = 0) -> int:
    """Tokens per process in the sampler's cache: the shared prefix once, the rest of each prompt once, and every row.

    Args:
        config: of the run; every row has room for `max_new_tokens`.
        facts: about it.
        branch: tokens of the longest prompt without the shared prefix; the others are padded to it.
        batch: problems of an evaluation for which there must be room too.
    """
    prompts = math.ceil(config.prompts_per_step / facts.world_size)
    rows = max(prompts * config.group_size, batch)
    return facts.shared_tokens + max(prompts, batch) * branch + rows * config.max_new_tokens


def kept(config: Config, facts: Facts) -> float:
    """Bytes of learning per token of a micro-batch: saved activations of all layers, and working memory of one layer.

    The numbers were counted on Llama:

    - in float32: what `policy/products.py` keeps;
    - under bfloat16 autocast: the residual stream, queries, keys and values in float32, and a rounded copy of the input
      of each linear layer;
    - compiled, under autocast: the residual stream in float32, and rounded two inputs, query, result, key, value and
      both halves of the MLP;
    - with adapters: what lies between the two factors of each of 7 products. Frozen norms keep their input alone.
    """
    size, whole = facts.sizes, _whole(config)
    linear = 6 * size.width + 4 * size.intermediate if _half(config) else 2 * size.intermediate
    widths = 6 if _half(config) and not config.lora_rank else 4
    layer = (widths * size.width + 2 * size.key_width) * whole + linear * _product(config)
    if config.lora_rank and not _half(config):  # the input of each product
        layer += (2 * size.width + 2 * size.intermediate) * whole
    layer += 7 * config.lora_rank * _product(config)
    stored = layer
    if config.compile is True and _half(config):
        rounded = 4 * size.width + 2 * size.key_width + 2 * size.intermediate
        stored = size.width * whole + rounded * _product(config)
    if config.activation_checkpointing:
        stored = size.width * whole
    return size.layers * stored + 2 * layer


def _keys(facts: Facts) -> int:
    """Numbers in the keys and values of one token."""
    return 2 * facts.sizes.layers * facts.sizes.key_width


def sampler_buffers(config: Config, facts: Facts, batch: int = 0) -> float:
    """Bytes per process of the sampler's buffers: keys, values, and logits with their exponentials (CUDA graphs).

    They are counted without the fused kernels, which need less, because not every model can use the kernels.
    """
    longest = facts.prompt_tokens[-1] - facts.shared_tokens
    rows = max(math.ceil(config.prompts_per_step / facts.world_size) * config.group_size, batch)
    cache = _keys(facts) * places(config, facts, longest, batch)
    return _whole(config) * (cache + 2 * rows * facts.sizes.vocabulary)


def _packed(config: Config, facts: Facts) -> float:
    """Bytes of the weights that the sampler packs for oneDNN on a CPU: the head and, in fp32, the linear layers."""
    if config.device == "cuda" or config.precision == "fp64" or not onednn.AVAILABLE:
        return 0
    linear = 0 if _half(config) else facts.sizes.rounded
    return 4 * (linear + facts.sizes.vocabulary * facts.sizes.width)


def _fixed(config: Config, facts: Facts) -> float:
    """Bytes of learning that do not grow with tokens: weights rounded by autocast, a chunk of logits, the head and its
    gradient, and what is gathered from shards. Rounded weights of a shard are made again where activations are."""
    size, parts = facts.sizes, shards(config, facts)
    rounded = _product(config) * size.rounded if _half(config) and not _stored_rounded(config, facts) else 0
    if parts > 1 and (config.activation_checkpointing or config.compile is True):
        rounded /= size.layers
    head = _product(config) + (0 if config.lora_rank else _whole(config))
    chunk = vocabularies_per_chunk(size.vocabulary, torch.device("cuda" if config.device == "cuda" else "cpu"))
    rounded += sum(gathered(config, facts).values())
    return rounded + size.vocabulary * (3 * 4 * chunk + head * size.width)


def _half(config: Config) -> bool:
    return config.precision in ("bf16", "fp16")


def _whole(config: Config) -> int:
    """Bytes of a number outside matrix products."""
    return 8 if config.precision == "fp64" else 4


def _product(config: Config) -> int:
    """Bytes of a number in matrix products."""
    return 2 if _half(config) else _whole(config)
