"""Attention over a packed token tree: shared tokens are read once, and nothing is copied per leaf.

Models of transformers reach this file through its attention interface, under the name `tree`. What is attended to
comes with the call, as the keyword argument `tree` (never through a global, so that activation checkpointing can run
a layer again in backward): anything with an `attend`. Here it is `TreeAttention`, all tokens of a packed tree at once,
differentiable: attention in parts (the descendants of a node over the node's keys, a node over its own), merged exactly
by their log-sum-exp. `flex.py` has the one of a single kernel, `decoding.py` the one that samples.

Left out: sliding windows, logit soft-capping, attention sinks and biases on the scores: refused, never computed wrong.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.tree import nodes

Pair = tuple[Tensor, Tensor]
"""Keys and values of a layer."""
KeysValues = list[Pair]
"""Keys and values of every layer."""

UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
MAX_SCORES = 1 << 24
"""Attention scores of a part that exist at one time, per key head: parts are cut along their queries to stay below."""
TRIANGLE = 256
"""Queries of a causal part at most: a long node is cut along its diagonal, and the parts above it are skipped."""


class Attention(Protocol):
    """What a layer attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1,H,S,d], key and value [1,Hkv,S,d] -> [1,S,H,d]."""


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: Attention | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer, with query [1,H,S,d] and key, value [1,Hkv,S,d]; returns [1,S,H,d].

    Without `tree` it is transformers' own sdpa, so that the model stays usable on its own (`model.generate`).

    Raises:
        ValueError: the model asks for something that this attention does not compute.
    """
    if tree is None:
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    uses = next((option for option in UNSUPPORTED if options.get(option) is not None), None)
    if value.shape[-1] != query.shape[-1]:
        uses = "values of another width than its keys"
    if uses:
        raise ValueError(f"model: {type(module).__name__} uses {uses}, which tree attention does not support")
    assert dropout == 0.0, "attention dropout must be 0: sampler, policy and reference have to agree"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("tree", attention_interface)
AttentionMaskInterface.register("tree", sdpa_mask)


@dataclass(frozen=True)
class Part:
    """Queries `q_start..q_end` over keys `k_start..k_end` of the flat tree: all pairs; causal if both are the same."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    squares: int = 1
    """Of a causal part: that many squares of the same size side by side, which see nothing of each other."""

    @property
    def causal(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.q_start == self.k_start


class TreeAttention:
    """Attention over all tokens of a packed tree, in parts. Built once per tree, used by every layer."""

    def __init__(self, position_ids: Tensor, subtree_end: Tensor, heads_per_key: int, trunk: KeysValues | None = None):
        """Plan the parts.

        Args:
            position_ids: [S] depths of a packed tree.
            subtree_end: [S] its mask.
            heads_per_key: query heads that read one key head (grouped-query attention); sizes the parts.
            trunk: keys and values [Hkv,t,d] of the first t tokens, where they are known: only the S - t others are
                computed. Every row has to pass through these tokens.
        """
        known = trunk[0][0].shape[1] if trunk else 0
        self.trunk = trunk
        self.parts = [p for p in plan_parts(position_ids, subtree_end, heads_per_key) if p.q_end > known]
        self.unused = known - min((part.q_start for part in self.parts), default=known)
        """Known tokens in a part that begins with them. It is computed whole, so that its shape does not change."""

    @torch.compiler.disable
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1,H,S-t,d], key and value [1,Hkv,S-t,d] -> [1,S-t,H,d]; differentiable in all three."""
        compute = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x[0].to(compute) for x in (query, key, value))
        k, v = self._whole(layer, k, v)
        q = nn.functional.pad(q, (0, 0, self.unused, 0)) if self.unused else q
        out = _AttentionInParts.apply(q, k, v, scaling, self.parts)[:, self.unused :]
        return out.to(query.dtype).transpose(0, 1)[None]

    def _whole(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Keys and values [Hkv,S-t,d] of a layer -> [Hkv,S,d]."""
        if self.trunk is None:
            return k, v
        trunk_k, trunk_v = self.trunk[layer]
        return torch.cat([trunk_k, k], 1), torch.cat([trunk_v, v], 1)


def plan_parts(position_ids: Tensor, subtree_end: Tensor, heads_per_key: int) -> list[Part]:
    """Cut the mask `k <= q < subtree_end[k]` into dense rectangles and causal squares.

    A node's keys are read by its descendants (dense) and by itself (causal), in that form by nobody else. The parts of
    every query start with the one that holds the query itself, so no softmax is ever empty.
    """
    squares, dense = [], []
    for start, end, last in nodes(position_ids, subtree_end):
        queries = max(1, MAX_SCORES // (heads_per_key * (end - start)))
        side = min(TRIANGLE, max(1, math.isqrt(MAX_SCORES // heads_per_key)))
        for q in range(start, end, side):
            stop = min(q + side, end)
            squares.append(Part(q, stop, q, stop))
            dense += [Part(i, min(i + queries, stop), start, q) for i in range(q, stop, queries) if q > start]
        dense += [Part(q, min(q + queries, last), start, end) for q in range(end, last, queries)]
    return _side_by_side(squares, heads_per_key) + dense


def _side_by_side(squares: list[Part], heads_per_key: int) -> list[Part]:
    """Causal squares of the same size that lie side by side, as completions of the same length do, in one part."""
    parts: list[Part] = []
    for square in squares:
        n, last = square.q_end - square.q_start, parts[-1] if parts else square
        count = last.squares + 1
        alike = last.q_end == square.q_start and last.q_end - last.q_start == last.squares * n
        if alike and count * heads_per_key * n * n <= MAX_SCORES:
            parts[-1] = replace(last, q_end=square.q_end, k_end=square.k_end, squares=count)
        else:
            parts.append(square)
    return parts


class _AttentionInParts(torch.autograd.Function):
    """q [H,n,d] of the last n tokens, k and v [Hkv,S,d] -> out [H,n,d]; query heads `h * H / Hkv ...` read key head h.

    Forward merges the parts: with the log-sum-exp l of the scores of a part and its output o,
    `l = logaddexp(l1, l2)` and `o = exp(l1 - l) o1 + exp(l2 - l) o2`. Backward uses the merged l in each part, so that
    `p = exp(s - l)` are the weights of the whole softmax, and `ds = p (dp - sum(do * o))`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scaling: float, parts: list[Part]) -> Tensor:
        H, n, d = q.shape
        out = q.new_zeros(n, H, d).transpose(0, 1)  # so that the caller's [n,H,d] is no copy
        lse = q.new_full((H, n, 1), -torch.inf)
        first = k.shape[1] - n
        by_key_head = [x.unflatten(0, (len(k), -1)) for x in (q, out, lse)]
        with torch.autocast(q.device.type, enabled=False):
            for part in parts:
                rows, columns = slice(part.q_start - first, part.q_end - first), slice(part.k_start, part.k_end)
                q_here, out_here, lse_here = (x[:, :, rows] for x in by_key_head)
                inputs = (_apart(x, part.squares) for x in (q_here, k[:, columns], v[:, columns]))
                part_out, part_lse = _part_forward(*inputs, scaling, part.causal)
                if part.causal:  # the first of its queries
                    out_here.copy_(_together(part_out, part.squares)), lse_here.copy_(_together(part_lse, part.squares))
                    continue
                merged = torch.logaddexp(lse_here, part_lse)
                out_here *= torch.exp(lse_here - merged)
                out_here += part_out.mul_(torch.exp(part_lse - merged))
                lse_here.copy_(merged)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scaling, ctx.parts = scaling, parts
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        by_key_head = [x.unflatten(0, (len(k), -1)) for x in (q, d_out, out, lse, dq)]
        first = k.shape[1] - q.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            for part in ctx.parts:
                rows, columns = slice(part.q_start - first, part.q_end - first), slice(part.k_start, part.k_end)
                *of_queries, dq_here = (x[:, :, rows] for x in by_key_head)
                inputs = of_queries[0], k[:, columns], v[:, columns], *of_queries[1:]
                d_inputs = _part_backward(*(_apart(x, part.squares) for x in inputs), ctx.scaling, part.causal)
                for total, d_input in zip((dq_here, dk[:, columns], dv[:, columns]), d_inputs, strict=True):
                    total += _together(d_input, part.squares)
        return dq, dk, dv, None, None


def _apart(x: Tensor, squares: int) -> Tensor:
    """[Hkv,..,squares*n,d] -> [squares*Hkv,..,n,d]: a square of its own each; a view where there is one."""
    return x if squares == 1 else x.unflatten(-2, (squares, -1)).movedim(-3, 0).flatten(0, 1)


def _together(x: Tensor, squares: int) -> Tensor:
    """[squares*Hkv,..,n,d] -> [Hkv,..,squares*n,d]."""
    return x if squares == 1 else x.unflatten(0, (squares, -1)).movedim(0, -3).flatten(-3, -2)


def _fused(q: Tensor) -> bool:
    """Whether torch's fused kernel for CPUs computes the parts; elsewhere matrix products do."""
    return q.device.type == "cpu"


def fused_part(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, to be merged with that over others; on a CPU alone.

    The kernel behind torch's own attention: it keeps no scores, and hands out their log-sum-exp.

    Args:
        q: [B,H,n,d].
        k, v: [B,H,m,d], m > 0.
        scaling: of the scores.
        causal: queries and keys are the same tokens.
        bias: [B or 1,H or 1,n or 1,m] added to the scores: -inf hides a key.

    Returns:
        out [B,H,n,d] and the log-sum-exp of the scores [B,H,n].
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, causal, attn_mask=bias, scale=scaling)


def _part_forward(q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q [B,R,n,d], k and v [B,m,d] that R query heads share -> out [B,R,n,d], log-sum-exp of the scores [B,R,n,1]."""
    if _fused(q):
        out, lse = fused_part(q, _per_query(q, k), _per_query(q, v), scaling, causal)
        return out, lse[..., None]
    scores = _scores(q, k, scaling, causal)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = scores.sub_(lse).exp_().flatten(1, 2)
    return torch.bmm(weights, v).view(q.shape), lse


def _part_backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, lse: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's share of dq [B,R,n,d], dk and dv [B,m,d]; `out` and `lse` are those of the whole softmax."""
    if _fused(q):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash(d_out, q, _per_query(q, k), _per_query(q, v), out, lse[..., 0], 0.0, causal, scale=scaling)
        return dq, dk.sum(1), dv.sum(1)
    weights = _scores(q, k, scaling, causal).sub_(lse).exp_().flatten(1, 2)
    flat_q, flat_d_out, weighted = (x.flatten(1, 2) for x in (q, d_out, d_out * out))
    d_scores = torch.bmm(flat_d_out, v.transpose(1, 2)).sub_(weighted.sum(-1, keepdim=True))
    d_scores.mul_(weights).mul_(scaling)
    dk, dv = torch.bmm(d_scores.transpose(1, 2), flat_q), torch.bmm(weights.transpose(1, 2), flat_d_out)
    return torch.bmm(d_scores, k).view(q.shape), dk, dv


def _per_query(q: Tensor, k: Tensor) -> Tensor:
    """[B,m,d] -> [B,R,m,d]: each key once per query that reads it, in the same memory."""
    return k[:, None].expand(-1, q.shape[1], -1, -1)


def _scores(q: Tensor, k: Tensor, scaling: float, causal: bool) -> Tensor:
    """Scaled scores [B,R,n,m]; -inf above the diagonal where causal."""
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2)).mul_(scaling).view(*q.shape[:3], -1)
    if causal:
        above = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(above, -torch.inf)
    return scores
