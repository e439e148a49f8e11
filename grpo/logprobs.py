"""Hidden states -> log-probability of each target token and entropy, chunk by chunk, with an exact gradient.

All logits of a step would be M x V numbers: 1.2 GB in float32 for 2,048 tokens and 151,936 words, and several times
that with their gradient. They never exist at one time here. Forward and backward walk over tiles: a block of
predictions times a part of the vocabulary. Backward computes a tile's logits again instead of keeping them.

The head's product returns float32, and log-softmax is float32; a bfloat16 output alone costs 0.1 nat. On a GPU, the
work on a tile between the products may be compiled. Left out: the model before the head (`policy/model.py`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels.compiled import any_size
from grpo.kernels.onednn import faster, multiply

CHUNK = 128
"""Logits held at one time on a CPU, in units of V: 128 * V numbers."""
CHUNK_BYTES = 1 << 29
"""The most bytes of float32 logits held at one time on a GPU: 768 * V numbers for V = 151,936."""
ROWS = 2048
"""Rows of a tile, if there are that many predictions. Its columns are a part of the vocabulary."""
ALIGNED = 128
"""On a GPU in half precision, the number of words in a tile is a multiple of this."""
NO_WORD = -1e30
"""The logit of a padding word: its exponential is 0, and it stays finite when a temperature divides it."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    compiled: bool = False,
    absent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and the entropy, under `softmax(hidden @ weight.T / temperature)`.

    Args:
        hidden: [M,D] hidden states that predict.
        weight: [V,D] output head.
        targets: [M] int64 token ids in 0..V-1.
        temperature: divides the logits.
        chunk: logits held at one time, in units of V. None chooses it by device and V. It changes memory and speed, and
            results only by rounding.
        compiled: compile the work on a tile's logits.
        absent: [V] bool, ids outside of the softmax, whose probability is 0; None: all are inside.

    Returns:
        logprobs [M] and entropy [M] in nats, float32 (float64 for float64 inputs), both differentiable with respect to
        `hidden` and `weight`.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} must be greater than 0 for log-probabilities")
    product_dtype = _product_dtype(hidden, weight)
    chunk = chunk or vocabularies_per_chunk(len(weight), hidden.device)
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, chunk, product_dtype, compiled, absent)


def vocabularies_per_chunk(V: int, device: torch.device) -> int:
    """How many logits to hold at one time, in units of V: enough to keep the device busy, in whole product tiles."""
    return CHUNK if device.type == "cpu" else max(CHUNK, CHUNK_BYTES // (4 * V) // 128 * 128)


class _LinearLogprobs(torch.autograd.Function):
    """Forward accumulates the softmax tile by tile; backward computes each tile's logits again.

    Let z = h W^T / tau, p = softmax(z), H its entropy, and g and e the upstream gradients of logprob and entropy. Then
    `dL/dz_v = g (1[v = target] - p_v) - e p_v (log p_v + H)`.

    Forward keeps the running maximum m, `s = sum exp(z - m)` and `t = sum (z - m) exp(z - m)`. At the end the
    log-sum-exp is `m + log s`, and the entropy is `log s - t / s`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, product_dtype, compiled, absent):
        ctx.constants = temperature, chunk, product_dtype, compiled, absent
        add = any_size(_add_tile) if compiled else _add_tile
        head, dtype = head_for(weight, product_dtype), torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, lse = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        logits, spare = _room(hidden, head, chunk)
        for rows, columns in _blocks(len(hidden), head, chunk):
            inputs = hidden[rows].to(product_dtype)
            highest = torch.full_like(lse[rows], torch.finfo(dtype).min / 2)  # finite, since -inf * 0 is NaN
            sums = highest, *(torch.zeros_like(highest) for _ in range(3))
            for words in columns:
                place, inside = _target_in(words, targets[rows], len(head))
                z, mass = (_of_size(x, inputs, head[words]) for x in (logits, spare))
                z = _tile_logits(inputs, head, words, len(weight), z, absent)
                sums = add(z, mass, place, inside, temperature, *sums)
            highest, total, weighted, score = sums
            lse[rows], entropy[rows] = highest + total.log(), total.log() - weighted / total
            logprobs[rows] = score - lse[rows]
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs: Tensor, d_entropy: Tensor):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk, product_dtype, compiled, absent = ctx.constants
        gradient = any_size(_tile_gradient) if compiled else _tile_gradient
        head = head_for(weight, product_dtype)
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        learns = ctx.needs_input_grad[1]
        d_head = torch.zeros_like(head, dtype=torch.promote_types(weight.dtype, torch.float32)) if learns else None
        logits, spare = _room(hidden, head, chunk)
        for rows, columns in _blocks(len(hidden), head, chunk):
            inputs = hidden[rows].to(product_dtype)
            of_rows = [values[rows] for values in (lse, entropy, d_logprobs, d_entropy)]
            for words in columns:
                place, inside = _target_in(words, targets[rows], len(head))
                z, p = (_of_size(x, inputs, head[words]) for x in (logits, spare))
                z = _tile_logits(inputs, head, words, len(weight), z, absent)
                d_logits = gradient(z, p, place, inside, temperature, *of_rows, product_dtype)
                d_hidden[rows] += product(d_logits, head[words])
                if learns:
                    _accumulate(d_head[words], d_logits.t(), inputs)
        d_weight = d_head[: len(weight)].to(weight.dtype) if learns else None
        return d_hidden.to(hidden.dtype), d_weight, *[None] * 6


def _add_tile(
    logits: Tensor,
    spare: Tensor | None,
    place: Tensor,
    inside: Tensor,
    temperature: float,
    before: Tensor,
    total: Tensor,
    weighted: Tensor,
    score: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add one tile to the running maximum, s, t and the target's logit, each [m]. Overwrites logits and spare [m,v].

    When compiled it overwrites nothing: an in-place result would be written to memory although nothing reads it.
    """
    into = None if torch.compiler.is_compiling() else logits
    z = logits if temperature == 1.0 else torch.div(logits, temperature, out=into)
    score = score + z.gather(1, place)[:, 0].where(inside, 0)
    highest = torch.maximum(before, z.amax(-1))
    rescale = torch.exp(before - highest)
    z = torch.sub(z, highest[:, None], out=into)
    mass = torch.exp(z, out=spare)
    weighted = rescale * (weighted + (before - highest) * total) + torch.mul(z, mass, out=into).sum(-1)
    return highest, rescale * total + mass.sum(-1), weighted, score


def _tile_gradient(
    logits: Tensor,
    spare: Tensor | None,
    place: Tensor,
    inside: Tensor,
    temperature: float,
    lse: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """dL/dlogits [m,v] of a tile, for the logits before the temperature, in `dtype`. Overwrites logits and spare [m,v].

    When compiled it overwrites nothing: it reads the logits and writes only the result.
    """
    at_target = d_logprobs.to(lse.dtype).where(inside, 0)[:, None]
    if torch.compiler.is_compiling():
        log_p = (logits if temperature == 1.0 else logits / temperature) - lse[:, None]
        d_logits = -log_p.exp() * ((log_p + entropy[:, None]) * d_entropy[:, None] + d_logprobs[:, None])
        column = torch.arange(logits.shape[1], device=logits.device)
        d_logits = torch.where(column == place, d_logits + at_target, d_logits)
        return (d_logits if temperature == 1.0 else d_logits / temperature).to(dtype)
    log_p = (logits if temperature == 1.0 else logits.div_(temperature)).sub_(lse[:, None])
    p = torch.exp(log_p, out=spare)
    d_logits = log_p.add_(entropy[:, None]).mul_(d_entropy[:, None]).add_(d_logprobs[:, None]).mul_(p).neg_()
    d_logits.scatter_add_(1, place, at_target)
    return (d_logits if temperature == 1.0 else d_logits.div_(temperature)).to(dtype)


def head_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[V,D] -> [W,D] in the dtype of the product.

    On a GPU in half precision, rows of zeros are added up to a multiple of `ALIGNED`. Tensor cores load 16 bytes at a
    time, and with an odd vocabulary size a product runs at half its speed. The caller must hide the logits of the added
    rows. Elsewhere W = V.
    """
    more = -len(weight) % ALIGNED if _pads(weight, dtype) else 0
    if not more:
        return weight.to(dtype)
    head = weight.new_zeros(len(weight) + more, weight.shape[1], dtype=dtype)
    head[: len(weight)] = weight
    return head


def _pads(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.is_cuda and dtype in (torch.bfloat16, torch.float16)


def _tile_logits(
    inputs: Tensor, head: Tensor, words: slice, V: int, out: Tensor | None, absent: Tensor | None
) -> Tensor:
    """[m,D], [W,D] -> the logits [m,v] of a tile; `NO_WORD` where `absent`, and for rows that `head_for` added."""
    logits = product(inputs, head[words].t(), out)
    if words.stop > V:
        logits[:, max(0, V - words.start) :] = NO_WORD
    if absent is not None:
        logits[:, : V - words.start].masked_fill_(absent[words], NO_WORD)
    return logits


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [m,k] @ b [k,n], returned in float32 even for bfloat16 inputs (float64 inputs give float64).

    The result may be written into `out`, or `out` is ignored.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == b.dtype and faster(b):
            return multiply(a, b.t())
        if a.dtype in (torch.float32, torch.float64):
            return torch.mm(a, b, out=out)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == total.dtype:
            total.addmm_(a, b)
        else:
            total += product(a, b)


def _target_in(words: slice, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Where each row's target lies in this tile.

    A target outside of the whole vocabulary stays outside of the first or last tile, so that indexing fails.

    Returns:
        The column of each target [m,1], and whether the target is in this tile [m] bool. Where it is not, the column is
        an arbitrary one.
    """
    place = targets - words.start
    inside = (place >= 0) & (place < words.stop - words.start)
    if words.start > 0:
        place = place.clamp(min=0)
    if words.stop < vocabulary:
        place = place.clamp(max=words.stop - words.start - 1)
    return place[:, None], inside


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that the head's inputs are rounded to: autocast's dtype on a GPU. On a CPU they are not rounded."""
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.promote_types(hidden.dtype, weight.dtype)


def _room(hidden: Tensor, head: Tensor, chunk: int) -> tuple[Tensor | None, Tensor | None]:
    """Two buffers that all tiles use in turn, for logits and for a spare result.

    On a CPU, getting new memory costs more than computing the products that are written to it. A buffer is None on a
    GPU, whose allocator keeps freed memory, and where the product cannot write into a buffer.
    """
    if hidden.is_cuda or head.dtype not in (torch.float32, torch.float64):
        return None, None
    blocks = _blocks(len(hidden), head, chunk)
    size = max(((rows.stop - rows.start) * columns[0].stop for rows, columns in blocks), default=0)
    return None if faster(head) else head.new_empty(size), head.new_empty(size)


def _of_size(buffer: Tensor | None, inputs: Tensor, head: Tensor) -> Tensor | None:
    """[m,v] at the start of a buffer, for inputs [m,D] and a tile of the head [v,D]."""
    m, v = len(inputs), len(head)
    return None if buffer is None else buffer[: m * v].view(m, v)


def _blocks(length: int, head: Tensor, chunk: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of predictions, each with the parts of the vocabulary that make up its tiles.

    A tile has at most chunk * vocabulary logits. It has many predictions and a part of the vocabulary, instead of few
    predictions and all of the vocabulary: a matrix product of that shape is nearly twice as fast on a CPU.
    """
    size, vocabulary, whole = max(chunk, ROWS), len(head), ALIGNED if _pads(head, head.dtype) else 1
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        tile = max(1, chunk * vocabulary // (rows.stop - rows.start) // whole) * whole
        yield rows, [slice(word, min(word + tile, vocabulary)) for word in range(0, vocabulary, tile)]
