"""Attention over a packed token tree: shared tokens are read once, and nothing is copied per leaf.

Models of transformers reach this file through its attention interface, under the name `tree`. What is attended to
comes with the call, as the keyword argument `tree` (never through a global, so that activation checkpointing can run
a layer again in backward): anything with an `attend`. Here it is `TreeAttention`, all tokens of a packed tree at once,
differentiable: attention in parts (the descendants of a node over the node's keys, a node over its own), merged exactly
by their log-sum-exp. `flex.py` has the one of a single kernel, `decoding.py` the one that samples.

Left out: sliding windows, logit soft-capping, attention sinks and biases on the scores: refused, never computed wrong.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.tree import nodes

UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
MAX_SCORES = 1 << 24
"""Attention scores of a part that exist at one time, per key head: parts are cut along their queries to stay below."""
TRIANGLE = 256
"""Queries of a causal part at most: a long node is cut into steps along its diagonal, and the upper half is skipped."""


class Attention(Protocol):
    """What a layer attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1,H,S,d], key and value [1,Hkv,S,d] -> [1,S,H,d]."""


def attention_interface(
    module: torch.nn.Module,
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
    """Queries `q_start..q_end` over keys `k_start..k_end` of the flat tree; causal where the two overlap."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


class TreeAttention:
    """Attention over all tokens of a packed tree, in parts. Built once per tree, used by every layer."""

    def __init__(self, position_ids: Tensor, subtree_end: Tensor, heads_per_key: int):
        """Plan the parts.

        Args:
            position_ids: [S] depths of a packed tree.
            subtree_end: [S] its mask.
            heads_per_key: query heads that read one key head (grouped-query attention); sizes the parts.
        """
        self.parts = plan_parts(position_ids, subtree_end, heads_per_key)

    @torch.compiler.disable
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1,H,S,d], key and value [1,Hkv,S,d] -> [1,S,H,d]; differentiable in all three."""
        _, H, S, d = query.shape
        Hkv = key.shape[1]
        compute = torch.promote_types(query.dtype, torch.float32)
        q = query.view(Hkv, H // Hkv, S, d).transpose(1, 2).to(compute)
        out = _AttentionInParts.apply(q, key[0].to(compute), value[0].to(compute), scaling, self.parts)
        return out.to(query.dtype).transpose(0, 1).reshape(1, S, H, d)


def plan_parts(position_ids: Tensor, subtree_end: Tensor, heads_per_key: int) -> list[Part]:
    """Cut the mask `k <= q < subtree_end[k]` into dense rectangles and causal triangles.

    A node's keys are read by its descendants (dense) and by itself (causal), in that form by nobody else. The parts of
    every query start with the one that holds the query itself, so no softmax is ever empty.
    """
    own, shared = [], []
    for start, end, last in nodes(position_ids, subtree_end):
        queries = max(1, MAX_SCORES // (heads_per_key * (end - start)))
        steps = min(queries, TRIANGLE)
        for q in range(start, end, steps):
            stop = min(q + steps, end)
            own.append(Part(q, stop, start, stop))
        for q in range(end, last, queries):
            shared.append(Part(q, min(q + queries, last), start, end))
    return own + shared


class _AttentionInParts(torch.autograd.Function):
    """q [Hkv,S,R,d], k and v [Hkv,S,d] -> out [Hkv,S,R,d], R query heads per key head.

    Forward merges the parts: with the log-sum-exp l of the scores of a part and its output o,
    `l = logaddexp(l1, l2)` and `o = exp(l1 - l) o1 + exp(l2 - l) o2`. Backward uses the merged l in each part, so that
    `p = exp(s - l)` are the weights of the whole softmax, and `ds = p (dp - sum(do * o))`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scaling: float, parts: list[Part]) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q = q.contiguous()
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
            for part in parts:
                scores = _scores(q, k, scaling, part)
                part_lse = torch.logsumexp(scores, dim=-1)
                weights = scores.sub_(part_lse[..., None]).exp_()
                part_out = torch.bmm(weights, v[:, part.k_start : part.k_end])
                rows = slice(part.q_start, part.q_end)
                part_lse, part_out = part_lse.view_as(lse[:, rows]), part_out.view_as(out[:, rows])
                merged = torch.logaddexp(lse[:, rows], part_lse)
                out[:, rows] *= torch.exp(lse[:, rows] - merged)[..., None]
                out[:, rows] += part_out * torch.exp(part_lse - merged)[..., None]
                lse[:, rows] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scaling, ctx.parts = scaling, parts
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (d_out * out).sum(-1)
        with torch.autocast(q.device.type, enabled=False):
            for part in ctx.parts:
                rows, keys = slice(part.q_start, part.q_end), slice(part.k_start, part.k_end)
                flat_q, flat_do = q[:, rows].flatten(1, 2), d_out[:, rows].flatten(1, 2)
                scores = _scores(q, k, ctx.scaling, part)
                weights = scores.sub_(lse[:, rows].flatten(1, 2)[..., None]).exp_()
                dv[:, keys] += torch.bmm(weights.transpose(1, 2), flat_do)
                d_scores = torch.bmm(flat_do, v[:, keys].transpose(1, 2))
                d_scores.sub_(delta[:, rows].flatten(1, 2)[..., None]).mul_(weights).mul_(ctx.scaling)
                dq[:, rows] += torch.bmm(d_scores, k[:, keys]).view_as(q[:, rows])
                dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), flat_q)
        return dq, dk, dv, None, None


def _scores(q: Tensor, k: Tensor, scaling: float, part: Part) -> Tensor:
    """Scaled scores [Hkv, n*R, m] of a part's n queries (R heads each) over its m keys; -inf above the diagonal."""
    R = q.shape[2]
    keys = k[:, part.k_start : part.k_end]
    scores = torch.bmm(q[:, part.q_start : part.q_end].flatten(1, 2), keys.transpose(1, 2)).mul_(scaling)
    if part.k_end > part.q_start:
        at_query = torch.arange(part.q_start, part.q_end, device=q.device).repeat_interleave(R)
        at_key = torch.arange(part.k_start, part.k_end, device=q.device)
        scores.masked_fill_(at_key > at_query[:, None], -torch.inf)
    return scores
