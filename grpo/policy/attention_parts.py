"""Attention over a packed token tree, computed in dense parts, and its gradient.

The mask `k <= q < subtree_end[k]` is cut into two kinds of parts. In a rectangle, the descendants of a node attend to
all keys of the node. In a square, the tokens of a node attend causally to their own node. Squares of about the same
size, of all completions, are computed in one call. The parts are merged exactly by their log-sum-exp. Left out: how
layers of transformers call it (`attention.py`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.tree import nodes

MAX_SCORES = 1 << 24
"""Parts are cut to have at most this many attention scores per key head. Without a fused kernel, all scores of a part
exist at one time, and twice in backward."""
SIDES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sides of squares. A shorter run of tokens is padded to the next side, so that its result does not depend on the other
runs. A longer run is cut into squares along the diagonal; what lies above the diagonal is never computed."""


class Rectangle(NamedTuple):
    """All pairs of queries `q_start..q_end` and keys `k_start..k_end` of the flat tree. Ends are exclusive."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


class Squares:
    """n runs of tokens, each attending only to itself, padded to L tokens by repeating its last token.

    The repeated tokens come after the run, so the causal mask hides them from all tokens of the run.
    """

    def __init__(self, runs: Sequence[tuple[int, int]], side: int, first: int):
        """Compute on the host which tokens are read.

        Args:
            runs: n pairs (start, end) of flat indices, none longer than `side`.
            side: L.
            first: flat index of the first token that has a query. All tokens have keys.
        """
        start, end = torch.tensor(runs).unbind(1)
        at = start[:, None] + torch.arange(side)
        self.side = side
        self.real = at < end[:, None]
        """[n,L] bool: False for the repeated tokens."""
        self.keys = torch.minimum(at, end[:, None] - 1).flatten()
        self.queries = self.keys - first
        """[n*L] indices of the runs' tokens, among all keys and among the queries that exist."""

    def move(self, device: torch.device) -> None:
        """Move the indices to the device of queries and keys."""
        self.real, self.keys, self.queries = (x.to(device) for x in (self.real, self.keys, self.queries))

    def of_queries(self, x: Tensor, key_heads: int) -> Tensor:
        """[H,S,d] -> [n*Hkv,1,R*L,d]: the R heads that read one key head become one head with R * L queries."""
        return self._by_run(x, self.queries).reshape(len(self.real) * key_heads, 1, -1, x.shape[-1])

    def of_keys(self, x: Tensor) -> Tensor:
        """[Hkv,S,d] -> [n*Hkv,L,d]."""
        return self._by_run(x, self.keys).flatten(0, 1)

    def _by_run(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[h,S,d] at tokens [n*L] -> [n,h,L,d]."""
        return x.transpose(0, 1).index_select(0, tokens).unflatten(0, (-1, self.side)).transpose(1, 2)

    def bias(self, q: Tensor) -> Tensor:
        """The causal mask for queries [..,R*L,d]: [R*L,L], -inf where the key comes later than the query."""
        later = torch.full((self.side, self.side), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
        return later.repeat(q.shape[-2] // self.side, 1)

    def by_token(self, values: Tensor, heads: int) -> Tensor:
        """Results laid out as by `of_queries` or `of_keys`, of this many heads -> one row per token [n*L,heads,d]."""
        return values.view(-1, heads, self.side, values.shape[-1]).transpose(1, 2).flatten(0, 1)


class Parts(NamedTuple):
    """The parts of a mask. Every query is in exactly one square, so no softmax is ever empty."""

    squares: list[Squares]
    rectangles: list[Rectangle]
    first: int
    """Flat index of the first token that has a query."""
    places: Tensor
    """[n] for each query, its place among the tokens of all squares."""

    def gather(self, values: list[Tensor]) -> Tensor:
        """Concatenate the results of all squares, each [runs*L,h,d], and order them by query: [h,n,d]."""
        return torch.cat(values).index_select(0, self.places).transpose(0, 1)


def plan_parts(
    position_ids: Tensor,
    subtree_end: Tensor,
    heads_per_key: int,
    known: int = 0,
    device: torch.device | None = None,
) -> Parts:
    """Cut the mask of a packed tree.

    Args:
        position_ids: [S] depths.
        subtree_end: [S] the mask.
        heads_per_key: query heads that read one key head (grouped-query attention); sizes the parts.
        known: tokens at the start that need no result, fewer than S. A square that also holds other tokens is still
            computed whole.
        device: where queries and keys will be; None: where `position_ids` is.

    Returns:
        The squares and rectangles that together cover the mask.
    """
    runs, rectangles = [], []
    side = min(SIDES[-1], max(1, math.isqrt(MAX_SCORES // heads_per_key)))
    for start, end, last in nodes(position_ids, subtree_end):
        queries = max(1, MAX_SCORES // (heads_per_key * (end - start)))
        for q in range(start, end, side):
            stop = min(q + side, end)
            runs.append((q, stop))
            if q > start:
                rectangles += [Rectangle(i, min(i + queries, stop), start, q) for i in range(q, stop, queries)]
        rectangles += [Rectangle(q, min(q + queries, last), start, end) for q in range(end, last, queries)]
    runs = [run for run in runs if run[1] > known]
    first = min(start for start, _ in runs)
    squares = []
    for size, alike in _by_side(runs, side).items():
        most = max(1, MAX_SCORES // (heads_per_key * size * size))
        batches = [alike[i : i + most] for i in range(0, len(alike), most)]
        squares += [Squares(batch, size, first) for batch in batches]
    real = torch.cat([one.real.flatten() for one in squares]).nonzero()[:, 0]
    places = real[torch.cat([one.queries for one in squares])[real].argsort()]
    device = device or position_ids.device
    for one in squares:
        one.move(device)
    return Parts(squares, [part for part in rectangles if part.q_end > known], first, places.to(device))


def _by_side(runs: Sequence[tuple[int, int]], most: int) -> dict[int, list[tuple[int, int]]]:
    """Group runs by the side that they are padded to, which is at most `most`."""
    found: dict[int, list[tuple[int, int]]] = {}
    for start, end in runs:
        side = min(next(side for side in SIDES if side >= end - start), most)
        found.setdefault(side, []).append((start, end))
    return found


class AttentionInParts(torch.autograd.Function):
    """q [H,n,d] of the last n tokens, k and v [Hkv,S,d] -> out [H,n,d].

    H / Hkv consecutive query heads read one key head. Forward merges the parts. With the log-sum-exp l of a part's
    scores and its output o, `l = logaddexp(l1, l2)` and `o = exp(l1 - l) o1 + exp(l2 - l) o2`. Backward uses the merged
    l in each part. So `p = exp(s - l)` are the weights of the whole softmax, and `ds = p (dp - sum(do * o))`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scaling: float, parts: Parts) -> Tensor:
        H, Hkv, first, of_squares = len(q), len(k), parts.first, []
        with torch.autocast(q.device.type, enabled=False):
            for squares in parts.squares:
                inputs = squares.of_queries(q, Hkv), squares.of_keys(k), squares.of_keys(v)
                outputs = _part_forward(*inputs, scaling, squares.bias(inputs[0]))
                of_squares.append([squares.by_token(x, H) for x in outputs])
            out, lse = (parts.gather(values) for values in zip(*of_squares, strict=True))
            lse = lse.contiguous()
            by_key_head = [x.unflatten(0, (Hkv, -1)) for x in (q, out, lse)]
            for part in parts.rectangles:
                rows, columns = slice(part.q_start - first, part.q_end - first), slice(part.k_start, part.k_end)
                q_here, out_here, lse_here = (x[:, :, rows] for x in by_key_head)
                part_out, part_lse = _part_forward(q_here, k[:, columns], v[:, columns], scaling)
                merged = torch.logaddexp(lse_here, part_lse)
                out_here *= torch.exp(lse_here - merged)
                out_here += part_out.mul_(torch.exp(part_lse - merged))
                lse_here.copy_(merged)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scaling, ctx.parts = scaling, parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        Hkv, parts, first, of_squares = len(k), ctx.parts, ctx.parts.first, []
        with torch.autocast(q.device.type, enabled=False):
            for squares in parts.squares:
                q_here, *of_queries = (squares.of_queries(x, Hkv) for x in (q, d_out, out, lse))
                of_queries[0].view(len(squares.real), len(q), squares.side, -1).mul_(squares.real[:, None, :, None])
                inputs = q_here, squares.of_keys(k), squares.of_keys(v), *of_queries
                d_inputs = _part_backward(*inputs, ctx.scaling, squares.bias(q_here))
                pairs = zip(d_inputs, (q, k, v), strict=True)
                of_squares.append([squares.by_token(d_input, len(x)) for d_input, x in pairs])
            dq, *d_keys = (parts.gather(values) for values in zip(*of_squares, strict=True))
            dk, dv = (nn.functional.pad(x, (0, 0, first, 0)) if first else x for x in d_keys)
            by_key_head = [x.unflatten(0, (Hkv, -1)) for x in (q, d_out, out, lse, dq)]
            for part in parts.rectangles:
                rows, columns = slice(part.q_start - first, part.q_end - first), slice(part.k_start, part.k_end)
                q_here, *of_queries, dq_here = (x[:, :, rows] for x in by_key_head)
                d_inputs = _part_backward(q_here, k[:, columns], v[:, columns], *of_queries, ctx.scaling)
                for total, d_input in zip((dq_here, dk[:, columns], dv[:, columns]), d_inputs, strict=True):
                    total += d_input
        return dq, dk, dv, None, None


def _fused(q: Tensor) -> bool:
    """Whether torch's fused CPU kernel computes the parts. On other devices matrix products do."""
    return q.device.type == "cpu"


def fused_part(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, to be merged with attention over others. Only for CPUs.

    It calls the kernel behind torch's own attention, which stores no scores and returns their log-sum-exp.

    Args:
        q: [B,H,n,d].
        k, v: [B,H,m,d], m > 0.
        scaling: multiplies the scores.
        bias: [B or 1,H or 1,n or 1,m] added to the scores; -inf hides a key.

    Returns:
        out [B,H,n,d] and the log-sum-exp of the scores [B,H,n].
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, False, attn_mask=bias, scale=scaling)


def _part_forward(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [B,R,n,d], k and v [B,m,d] that R query heads share, bias [n,m] -> out [B,R,n,d], log-sum-exp [B,R,n,1]."""
    if _fused(q):
        mask = None if bias is None else bias[None, None]
        out, lse = fused_part(q, _per_query(q, k), _per_query(q, v), scaling, mask)
        return out, lse[..., None]
    scores = _scores(q, k, scaling, bias)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = scores.sub_(lse).exp_().flatten(1, 2)
    return torch.bmm(weights, v).view(q.shape), lse


def _part_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's share of dq [B,R,n,d], dk and dv [B,m,d]. `out` and `lse` belong to the merged softmax."""
    if _fused(q):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = d_out, q, _per_query(q, k), _per_query(q, v), out, lse[..., 0], 0.0, False
        mask = None if bias is None else bias[None, None]
        dq, dk, dv = flash(*inputs, attn_mask=mask, scale=scaling)
        return dq, dk.sum(1), dv.sum(1)
    weights = _scores(q, k, scaling, bias).sub_(lse).exp_().flatten(1, 2)
    flat_q, flat_d_out, weighted = (x.flatten(1, 2) for x in (q, d_out, d_out * out))
    d_scores = torch.bmm(flat_d_out, v.transpose(1, 2)).sub_(weighted.sum(-1, keepdim=True))
    d_scores.mul_(weights).mul_(scaling)
    dk, dv = torch.bmm(d_scores.transpose(1, 2), flat_q), torch.bmm(weights.transpose(1, 2), flat_d_out)
    return torch.bmm(d_scores, k).view(q.shape), dk, dv


def _per_query(q: Tensor, k: Tensor) -> Tensor:
    """[B,m,d] -> [B,R,m,d]: a view that repeats the keys for each of the R query heads, without a copy."""
    return k[:, None].expand(-1, q.shape[1], -1, -1)


def _scores(q: Tensor, k: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """Scaled scores [B,R,n,m], with the bias [n,m] added."""
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2)).mul_(scaling).view(*q.shape[:3], -1)
    return scores if bias is None else scores.add_(bias)
