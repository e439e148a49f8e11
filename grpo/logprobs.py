"""Hidden states -> log-probability of each target token and entropy, chunk by chunk, with an exact gradient.

The logits of a step would be M x V numbers (2,048 tokens x 151,936 words: 1.2 GB in float32, several times over with
their gradient). They are never whole here: forward and backward walk the M predictions in chunks, and backward
computes a chunk's logits again instead of keeping them. The head's product leaves the matrix product in float32, and
log-softmax is float32 (a bfloat16 output alone costs 0.1 nat). On a GPU the steps between the products may be compiled
into one pass over a chunk's logits, or all of it be one kernel that never writes them (`fused_logprobs.py`).
"""

import torch
from torch import Tensor

from grpo import fused_logprobs
from grpo.compiled import any_size

CHUNK = 256
"""Predictions whose logits exist at one time, on a CPU."""
CHUNK_BYTES = 1 << 29
"""Float32 logits that exist at one time, on a GPU, at most: 768 predictions of a vocabulary of 151,936."""
KERNEL = False
"""Whether a GPU runs the kernel instead of chunked products; `python -m bench.logprobs` says which is faster there."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and the entropy, under `softmax(hidden @ weight.T / temperature)`.

    Args:
        hidden: [M,D] hidden states that predict.
        weight: [V,D] output head.
        targets: [M] int64 token ids in 0..V-1.
        temperature: divides the logits.
        chunk: predictions per chunk, None: as the device and V ask for; changes memory and speed, never the result
            beyond rounding.
        compiled: compile what is done with a chunk's logits.

    Returns:
        logprobs [M] and entropy [M] in nats, float32 (float64 for float64 inputs), both differentiable with respect to
        `hidden` and `weight`.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} must be greater than 0 for log-probabilities")
    product_dtype = _product_dtype(hidden, weight)
    if KERNEL and hidden.is_cuda and product_dtype != torch.float64:
        return fused_logprobs.linear_logprobs(hidden, weight, targets, temperature, product_dtype)
    chunk = chunk or rows_per_chunk(len(weight), hidden.device)
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, chunk, product_dtype, compiled)


def rows_per_chunk(V: int, device: torch.device) -> int:
    """Predictions per chunk of a vocabulary of V words: enough to keep the device busy, whole tiles of a product."""
    return CHUNK if device.type == "cpu" else max(CHUNK, CHUNK_BYTES // (4 * V) // 128 * 128)


class _LinearLogprobs(torch.autograd.Function):
    """With z = h W^T / tau, p = softmax(z), H = entropy, and upstream gradients g (logprob) and e (entropy):

    `dL/dz_v = g (1[v = target] - p_v) - e p_v (log p_v + H)`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, product_dtype, compiled):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.constants = temperature, chunk, product_dtype, compiled
        head = weight.to(product_dtype)
        values = any_size(_values) if compiled else _values
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy = hidden.new_empty(len(hidden), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)
        for rows in _chunks(len(hidden), chunk):
            logprobs[rows], entropy[rows] = values(hidden[rows], head, targets[rows], temperature)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs: Tensor, d_entropy: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        temperature, chunk, product_dtype, compiled = ctx.constants
        head = weight.to(product_dtype)
        gradient = any_size(_gradient) if compiled else _gradient
        d_hidden = torch.zeros_like(hidden)
        d_head = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for rows in _chunks(len(hidden), chunk):
            upstream = d_logprobs[rows], d_entropy[rows]
            d_logits = gradient(hidden[rows], head, targets[rows], temperature, *upstream)
            d_hidden[rows] = product(d_logits, head).to(hidden.dtype)
            _accumulate(d_head, d_logits.t(), hidden[rows].to(product_dtype))
        return d_hidden, d_head.to(weight.dtype), None, None, None, None, None


def _values(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a chunk, each [m]."""
    log_p = _log_softmax(hidden, head, temperature)
    return log_p.gather(1, targets[:, None])[:, 0], _entropy(log_p, log_p.exp())


def _gradient(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, d_logprobs: Tensor, d_entropy: Tensor
) -> Tensor:
    """dL/dlogits [m,V] of a chunk before the temperature divided them, in the dtype of the head's product."""
    log_p = _log_softmax(hidden, head, temperature)
    p = log_p.exp()
    d_logits = log_p.add_(_entropy(log_p, p)[:, None]).mul_(d_entropy[:, None]).add_(d_logprobs[:, None])
    d_logits.mul_(p).neg_()
    at_target = d_logits.gather(1, targets[:, None]).add_(d_logprobs[:, None]).div_(temperature)
    d_logits = d_logits.div_(temperature).to(head.dtype)
    return d_logits.scatter_(1, targets[:, None], at_target.to(head.dtype))  # whole, not added to what is rounded


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


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """[m,D], [V,D] -> [m,V] log-probabilities; overwrites only what it made itself."""
    logits = product(hidden.to(head.dtype), head.t())
    logits = logits if temperature == 1.0 else logits.div_(temperature)
    return logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    """[m,V] -> [m]; the logits are finite, so is log p."""
    return -(p * log_p).sum(-1)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the head's inputs are rounded to: autocast's dtype on a GPU; on a CPU they are not rounded."""
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.promote_types(hidden.dtype, weight.dtype)


def _chunks(length: int, chunk: int) -> list[slice]:
    """Consecutive slices of at most `chunk` that cover 0..length."""
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
