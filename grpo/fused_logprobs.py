"""The log-probabilities of `logprobs.py` as Triton kernels: logits exist tile by tile, in registers, never in memory.

Forward walks the vocabulary once per block of rows with the online softmax: largest logit m, sum l of exp(z - m) and
sum s of exp(z - m) (z - m), each rescaled when m grows; then logsumexp = m + log l and entropy = log l - s / l.
Backward computes the tiles again, twice: once per block of rows for the gradient of the hidden states, once per block
of the vocabulary for that of the head; one program writes a block, so nothing is added in an order that varies. That is
10 M V D operations against the 8 of chunked products, to save writing and reading M V logits a few times: which is
faster depends on the GPU. Left out: float64; tuning.
"""

import torch
from torch import Tensor

try:  # comes with torch where there is a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS, WORDS, WIDTH = 64, 128, 64
"""A tile of logits is ROWS x WORDS; the hidden dimension is walked in steps of WIDTH."""
WARPS = 8
"""Warps of a program; with 4, compiled for an H100, a tile of bfloat16 does not fit into the registers."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and the entropy, under `softmax(hidden @ weight.T / temperature)`.

    Args:
        hidden: [M,D] hidden states that predict.
        weight: [V,D] output head.
        targets: [M] int64 token ids in 0..V-1.
        temperature: divides the logits; > 0.
        product_dtype: what the factors of every product are rounded to; sums are float32.

    Returns:
        logprobs [M] and entropy [M] in nats, float32, both differentiable with respect to `hidden` and `weight`.

    Raises:
        ValueError: Triton is not installed.
    """
    if triton is None:
        raise ValueError("KERNEL in grpo/logprobs.py is True: Triton must be installed, or the constant be False")
    return _FusedLogprobs.apply(hidden, weight, targets, temperature, product_dtype)


class _FusedLogprobs(torch.autograd.Function):
    """As `_LinearLogprobs` of `logprobs.py`."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, product_dtype: torch.dtype):
        h, head = (x.to(product_dtype).contiguous() for x in (hidden, weight))
        M = len(h)
        logprobs, entropy, lse = (h.new_empty(M, dtype=torch.float32) for _ in range(3))
        if M:
            grid = (triton.cdiv(M, ROWS),)
            outputs = logprobs, entropy, lse
            _forward[grid](
                h, head, targets, *outputs, 1 / temperature, M, *head.shape, ROWS, WORDS, WIDTH, num_warps=WARPS
            )
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature, ctx.product_dtype = temperature, product_dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs: Tensor, d_entropy: Tensor):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        h, head = (x.to(ctx.product_dtype).contiguous() for x in (hidden, weight))
        M, V = len(h), len(head)
        d_hidden, d_head = torch.zeros_like(h, dtype=torch.float32), torch.zeros_like(head, dtype=torch.float32)
        upstream = targets, entropy, lse, d_logprobs.contiguous(), d_entropy.contiguous()
        sizes = 1 / ctx.temperature, M, *head.shape, ROWS, WORDS, WIDTH
        if M:
            _hidden_gradient[(triton.cdiv(M, ROWS),)](h, head, *upstream, d_hidden, *sizes, num_warps=WARPS)
            _head_gradient[(triton.cdiv(V, WORDS),)](h, head, *upstream, d_head, *sizes, num_warps=WARPS)
        return d_hidden.to(hidden.dtype), d_head.to(weight.dtype), None, None, None


if triton is not None:

    @triton.jit
    def _dot(a, b, total):
        """total + a @ b, from factors in b's dtype, summed in float32."""
        return tl.dot(a.to(b.dtype), b, total, input_precision="ieee")

    @triton.jit
    def _logits(h, head, rows, words, scale, M, V, D, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr):
        """A tile of logits, [ROWS] x [WORDS] -> float32; -inf beyond the vocabulary."""
        z = tl.zeros((ROWS, WORDS), dtype=tl.float32)
        for start in range(0, D, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            inside = columns < D
            at_h = h + rows.to(tl.int64)[:, None] * D + columns[None, :]
            at_w = head + words.to(tl.int64)[None, :] * D + columns[:, None]
            a = tl.load(at_h, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
            b = tl.load(at_w, mask=(words < V)[None, :] & inside[:, None], other=0.0)
            z = _dot(a, b, z)
        return tl.where((words < V)[None, :], z * scale, float("-inf"))

    @triton.jit
    def _forward(
        h, head, targets, logprobs, entropy, lse, scale, M, V, D,
        ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Log-probability, entropy and logsumexp of ROWS rows, by one walk over the vocabulary."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        target = tl.load(targets + rows, mask=rows < M, other=0)
        m = tl.full((ROWS,), -1e38, dtype=tl.float32)
        l = tl.zeros((ROWS,), dtype=tl.float32)
        s = tl.zeros((ROWS,), dtype=tl.float32)
        picked = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, V, WORDS):
            words = start + tl.arange(0, WORDS)
            z = _logits(h, head, rows, words, scale, M, V, D, ROWS, WORDS, WIDTH)
            larger = tl.maximum(m, tl.max(z, axis=1))
            shrink = tl.exp(m - larger)
            s = shrink * (s + (m - larger) * l)
            l = shrink * l
            x = z - larger[:, None]
            e = tl.exp(x)
            l += tl.sum(e, axis=1)
            s += tl.sum(e * tl.where((words < V)[None, :], x, 0.0), axis=1)
            picked += tl.sum(tl.where(words[None, :] == target[:, None], z, 0.0), axis=1)
            m = larger
        total = m + tl.log(l)
        tl.store(logprobs + rows, picked - total, mask=rows < M)
        tl.store(entropy + rows, tl.log(l) - s / l, mask=rows < M)
        tl.store(lse + rows, total, mask=rows < M)

    @triton.jit
    def _d_logits(
        h, head, targets, entropy, lse, d_logprobs, d_entropy, rows, words, scale, M, V, D,
        ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """A tile of dL/dlogits before the temperature divided them; 0 beyond the rows and the vocabulary."""
        inside = rows < M
        target = tl.load(targets + rows, mask=inside, other=0)
        g = tl.load(d_logprobs + rows, mask=inside, other=0.0)[:, None]
        e = tl.load(d_entropy + rows, mask=inside, other=0.0)[:, None]
        H = tl.load(entropy + rows, mask=inside, other=0.0)[:, None]
        total = tl.load(lse + rows, mask=inside, other=0.0)[:, None]
        log_p = _logits(h, head, rows, words, scale, M, V, D, ROWS, WORDS, WIDTH) - total
        d = tl.where(words[None, :] == target[:, None], g, 0.0) - tl.exp(log_p) * (g + e * (log_p + H))
        return tl.where(inside[:, None] & (words < V)[None, :], d * scale, 0.0)

    @triton.jit
    def _hidden_gradient(
        h, head, targets, entropy, lse, d_logprobs, d_entropy, d_hidden, scale, M, V, D,
        ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """d_hidden of ROWS rows += d_logits @ head, by one walk over the vocabulary."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        for start in range(0, V, WORDS):
            words = start + tl.arange(0, WORDS)
            d = _d_logits(
                h, head, targets, entropy, lse, d_logprobs, d_entropy, rows, words, scale, M, V, D, ROWS, WORDS, WIDTH
            )
            for column in range(0, D, WIDTH):
                columns = column + tl.arange(0, WIDTH)
                at_w = head + words.to(tl.int64)[:, None] * D + columns[None, :]
                b = tl.load(at_w, mask=(words < V)[:, None] & (columns < D)[None, :], other=0.0)
                at = d_hidden + rows.to(tl.int64)[:, None] * D + columns[None, :]
                mask = (rows < M)[:, None] & (columns < D)[None, :]
                tl.store(at, _dot(d, b, tl.load(at, mask=mask, other=0.0)), mask=mask)

    @triton.jit
    def _head_gradient(
        h, head, targets, entropy, lse, d_logprobs, d_entropy, d_head, scale, M, V, D,
        ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """d_head of WORDS words += d_logits^T @ hidden, by one walk over the rows."""
        words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
        for start in range(0, M, ROWS):
            rows = start + tl.arange(0, ROWS)
            d = _d_logits(
                h, head, targets, entropy, lse, d_logprobs, d_entropy, rows, words, scale, M, V, D, ROWS, WORDS, WIDTH
            )
            for column in range(0, D, WIDTH):
                columns = column + tl.arange(0, WIDTH)
                at_h = h + rows.to(tl.int64)[:, None] * D + columns[None, :]
                b = tl.load(at_h, mask=(rows < M)[:, None] & (columns < D)[None, :], other=0.0)
                at = d_head + words.to(tl.int64)[:, None] * D + columns[None, :]
                mask = (words < V)[:, None] & (columns < D)[None, :]
                tl.store(at, _dot(tl.trans(d), b, tl.load(at, mask=mask, other=0.0)), mask=mask)
