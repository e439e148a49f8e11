"""Hidden states -> log-probability of each target token and entropy, chunk by chunk, with an exact gradient.

The logits of a step would be M x V numbers (2,048 tokens x 151,936 words: 1.2 GB in float32, several times over with
their gradient). They are never whole here: forward and backward walk blocks of predictions and tiles of the vocabulary,
and backward computes a tile's logits again instead of keeping them. The head's product leaves the matrix product in
float32, and log-softmax is float32 (a bfloat16 output alone costs 0.1 nat). Left out: fused kernels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 256
"""Logits that exist at one time, in whole vocabularies."""
ROWS = 2048
"""Predictions whose logits of a part of the vocabulary exist at one time."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and the entropy, under `softmax(hidden @ weight.T / temperature)`.

    Args:
        hidden: [M,D] hidden states that predict.
        weight: [V,D] output head.
        targets: [M] int64 token ids in 0..V-1.
        temperature: divides the logits.
        chunk: logits that exist at one time, in multiples of V; changes memory and speed, no result beyond rounding.

    Returns:
        logprobs [M] and entropy [M] in nats, float32 (float64 for float64 inputs), both differentiable with respect to
        `hidden` and `weight`.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} must be greater than 0 for log-probabilities")
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, chunk)


class _LinearLogprobs(torch.autograd.Function):
    """With z = h W^T / tau, p = softmax(z), H = entropy, and upstream gradients g (logprob) and e (entropy):

    `dL/dz_v = g (1[v = target] - p_v) - e p_v (log p_v + H)`.

    The softmax is gathered tile by tile: with the running maximum m, `s = sum exp(z - m)` and
    `t = sum (z - m) exp(z - m)`, the log-sum-exp is `m + log s` and the entropy `log s - t / s`.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int):
        ctx.product_dtype = _product_dtype(hidden, weight)
        ctx.temperature, ctx.chunk = temperature, chunk
        head, dtype = weight.to(ctx.product_dtype), torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, lse = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3))
        for rows, columns in _blocks(len(hidden), len(weight), chunk):
            inputs = hidden[rows].to(head.dtype)
            highest = torch.full_like(lse[rows], torch.finfo(dtype).min / 2)  # finite: -inf times no mass is NaN
            total, weighted, score = (torch.zeros_like(highest) for _ in range(3))
            for words in columns:
                logits = _logits(inputs, head[words], temperature)
                place, inside = _target_in(words, targets[rows], len(weight))
                score += logits.gather(1, place)[:, 0].where(inside, 0)
                before, highest = highest, torch.maximum(highest, logits.amax(-1))
                mass = logits.sub_(highest[:, None]).exp()
                rescale = torch.exp(before - highest)
                weighted = rescale * (weighted + (before - highest) * total) + logits.mul_(mass).sum(-1)
                total = rescale * total + mass.sum(-1)
            lse[rows], entropy[rows] = highest + total.log(), total.log() - weighted / total
            logprobs[rows] = score - lse[rows]
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs: Tensor, d_entropy: Tensor):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        head = weight.to(ctx.product_dtype)
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        d_head = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for rows, columns in _blocks(len(hidden), len(weight), ctx.chunk):
            inputs, g, e = hidden[rows].to(head.dtype), d_logprobs[rows, None], d_entropy[rows, None]
            for words in columns:
                log_p = _logits(inputs, head[words], ctx.temperature).sub_(lse[rows, None])
                p = log_p.exp()
                d_logits = log_p.add_(entropy[rows, None]).mul_(e).add_(g).mul_(p).neg_()
                place, inside = _target_in(words, targets[rows], len(weight))
                d_logits.scatter_add_(1, place, g.to(d_logits.dtype).where(inside[:, None], 0))
                d_logits = d_logits.div_(ctx.temperature).to(head.dtype)
                _accumulate(d_hidden[rows], d_logits, head[words])
                _accumulate(d_head[words], d_logits.t(), inputs)
        return d_hidden.to(hidden.dtype), d_head.to(weight.dtype), None, None, None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m,k] @ b [k,n] that leaves the matrix product in float32, from bfloat16 inputs too (float64 stays)."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype in (torch.float32, torch.float64):
            return a @ b
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


def _logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """[m,D], [v,D] -> [m,v]."""
    logits = product(hidden, head.t())
    return logits if temperature == 1.0 else logits.div_(temperature)


def _target_in(words: slice, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """[m] -> [m,1] the column of each row's target in this tile, and [m] bool whether it is there (if not: any column).

    A target outside of the whole vocabulary stays outside of the first or last tile, so that indexing fails.
    """
    place = targets - words.start
    inside = (place >= 0) & (place < words.stop - words.start)
    if words.start > 0:
        place = place.clamp(min=0)
    if words.stop < vocabulary:
        place = place.clamp(max=words.stop - words.start - 1)
    return place[:, None], inside


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the head's inputs are rounded to: autocast's dtype on a GPU; on a CPU they are not rounded."""
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.promote_types(hidden.dtype, weight.dtype)


def _blocks(length: int, vocabulary: int, chunk: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of predictions, and the tiles of the vocabulary that each walks: at most chunk x vocabulary logits a tile.

    Many predictions and a part of the vocabulary, rather than few and all of it: a matrix product of that shape is
    nearly twice as fast on a CPU.
    """
    size = max(chunk, ROWS)
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        tile = max(1, chunk * vocabulary // (rows.stop - rows.start))
        yield rows, [slice(word, min(word + tile, vocabulary)) for word in range(0, vocabulary, tile)]
