"""The lower bound ("floor") of a step on this machine, from operations, bytes and measured speeds.

The floor of each part of a step is the larger of two times:

- its operations, divided by the speed of matrix products at the model's own shapes;
- its bytes, divided by the speed of a memory copy.

Shared prefixes count once. Weights, keys, values, logits and optimiser are counted. Left out: reading and writing
activations, so no step reaches the floor.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from bench.ours import LONGEST_PROMPT, problems_of, problems_of_step, setting
from bench.work import Work
from grpo import distributed
from grpo.dataloader import encode_prompts
from grpo.doctor.facts import sizes
from grpo.kernels import onednn
from grpo.policy import head_sizes, load_shapes
from grpo.tree import build_trie

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = {"cpu": 1024, "cuda": 16384}
"""Tokens in the matrix products that are timed, enough to make them fast."""
COPIED = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Numbers in the copy that is timed."""


@dataclass(frozen=True)
class Part:
    """One part of the work of a step."""

    phase: str
    """`rollout` or `learn`."""
    name: str
    operations: float
    read_and_written: float
    """In bytes."""

    def seconds(self, flops: float, bandwidth: float) -> float:
        """The least possible seconds, for `flops` operations and `bandwidth` bytes per second."""
        return max(self.operations / flops, self.read_and_written / bandwidth)


def floor(work: dict) -> dict:
    """Measure the machine and compute the floors of all parts. `work` holds the fields of `Work`.

    Returns:
        `rollout_s`, `learn_s` and `step_s`, as other contestants do, `parts`, and both speeds.
    """
    asked = Work(**work)
    device = distributed.init(asked.device)
    model, tokenizer = load_shapes(asked.model)
    problems = problems_of_step(asked, problems_of(asked), asked.warmup + asked.steps)
    encoded = encode_prompts(problems, tokenizer, chat=False, max_prompt_tokens=LONGEST_PROMPT)
    prompt_ids = [row.tolist() for row in encoded]
    flops = speed_of_products(model, ROWS[device.type], device, DTYPES[asked.dtype])
    bandwidth = speed_of_copies(COPIED[device.type], device)
    rows = []
    seconds = {"rollout": 0.0, "learn": 0.0}
    for part in parts(asked, model, len(tokenizer), prompt_ids):
        least = part.seconds(flops, bandwidth)
        seconds[part.phase] += least
        rows.append(asdict(part) | {"floor_s": least})
    return {
        **setting(prompt_ids, device),
        "rollout_s": seconds["rollout"],
        "learn_s": seconds["learn"],
        "step_s": sum(seconds.values()),
        "flops": flops,
        "bytes_per_s": bandwidth,
        "parts": rows,
    }


def parts(asked: Work, model: nn.Module, vocabulary: int, prompt_ids: list[list[int]]) -> list[Part]:
    """The parts of a step, with operations and bytes.

    Args:
        asked: sizes of the step.
        model: for its shapes.
        vocabulary: number of rows of the head that are used.
        prompt_ids: prompts of the step.
    """
    size, heads, width = sizes(model), head_sizes(model.config), DTYPES[asked.dtype].itemsize
    N, B, T = asked.prompts, asked.prompts * asked.group, asked.new_tokens
    layers, head = size.rounded, vocabulary * size.width
    weights = width * (layers + head)
    positions = build_trie(prompt_ids).position_ids
    stored = len(positions)
    computed = stored + B * (T - 1)  # a last token is only predicted
    per_key = 4 * size.layers * heads.heads * heads.width  # operations of attention per token and key
    cache = 2 * size.layers * size.key_width * width  # bytes of keys and values per token
    keys_of_prompts = int((positions + 1).sum())
    keys_of_decode = asked.group * sum(len(row) + t for row in prompt_ids for t in range(1, T))
    read = sum(stored + B * t for t in range(1, T))  # tokens read from the cache, over all decoding steps

    prefill = 2 * (layers * stored + head * N) + per_key * keys_of_prompts
    decode = 2 * (layers + head) * B * (T - 1) + per_key * keys_of_decode
    forward = 2 * (layers * computed + head * B * T) + per_key * (keys_of_prompts + keys_of_decode)
    return [
        Part("rollout", "prefill", prefill, weights + cache * stored),
        Part("rollout", "decode", decode, weights * (T - 1) + cache * read),
        Part("learn", "reference forward", forward, weights),
        Part("learn", "policy forward", forward, weights),
        Part("learn", "policy backward", 2 * forward, 2 * weights),
        Part("learn", "optimiser", 0, 7 * 4 * size.parameters),  # reads 4 arrays (weight, gradient, moments), writes 3
    ]


def speed_of_products(model: nn.Module, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of `rows` tokens times every matrix of the model, the head included."""
    seconds: dict[tuple[int, int], float] = {}
    operations = total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
            if shape not in seconds:
                seconds[shape] = _seconds_of_product(rows, *shape, device, dtype)
            operations += 2 * rows * shape[0] * shape[1]
            total += seconds[shape]
    return operations / total


def _seconds_of_product(rows: int, i: int, o: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of [rows, i] times [i, o], the faster of the two ways that this project knows."""
    tokens = torch.randn(rows, i, device=device, dtype=dtype)
    weight = torch.randn(o, i, device=device, dtype=dtype)
    ways = (partial(torch.matmul, tokens, weight.t()), partial(onednn.multiply, tokens, weight))
    return min(fastest(way, device) for way in ways)


def speed_of_copies(numbers: int, device: torch.device) -> float:
    """Bytes read and written per second when a large array is copied."""
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * numbers / fastest(lambda: target.copy_(source), device)


def fastest(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
