"""Attention over a packed token tree: shared tokens are computed once, and nothing is copied per leaf.

A layer calls a method `attend` of an object that is built once per tree. There are four such classes:

- `TreeAttention`, here: all tokens of a tree, differentiable, computed in parts (`attention_parts.py`);
- `PrefillAttention`, here: the same, and it keeps keys and values for sampling;
- `FlexAttention` (`attention_flex.py`): all tokens of a tree in one GPU kernel;
- `DecodeAttention` (`sampler/cache.py`): one new token per row.

Left out: sliding windows, logit soft-capping, attention sinks and biases on the scores. A model with one is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from grpo.policy.attention_parts import AttentionInParts, plan_parts

Pair = tuple[Tensor, Tensor]
"""Keys and values of a layer."""
KeysValues = list[Pair]
"""Keys and values of every layer."""


class TreeAttention:
    """Attention over all tokens of a packed tree, in parts. Built once per tree, used by every layer."""

    def __init__(
        self,
        position_ids: Tensor,
        subtree_end: Tensor,
        heads_per_key: int,
        trunk: KeysValues | None = None,
        device: torch.device | None = None,
    ):
        """Plan the parts.

        Args:
            position_ids: [S] depths of a packed tree.
            subtree_end: [S] its mask.
            heads_per_key: query heads that read one key head (grouped-query attention); sizes the parts.
            trunk: keys and values [Hkv,t,d] per layer of the trunk, if they are known already. The trunk is the token
                prefix that all prompts of a run share, such as few-shot exemplars. Here it must be the first t tokens
                of every row. Then only the S - t other tokens are computed.
            device: where attention will be computed; None: where `position_ids` is.
        """
        self.trunk = trunk
        self.known = trunk[0][0].shape[1] if trunk else 0
        """t, the number of tokens whose keys and values are known."""
        self.parts = plan_parts(position_ids, subtree_end, heads_per_key, self.known, device)
        self.unused = self.known - self.parts.first
        """Known tokens for which a query is computed in vain, in the square that also holds the first unknown token."""

    @torch.compiler.disable
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [S-t,H,d], key and value [S-t,Hkv,d] -> [S-t,H,d]; differentiable in all three."""
        compute = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.transpose(0, 1).to(compute) for x in (query, key, value))
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the fused kernel assumes it
        k, v = self._whole(layer, k, v)
        q = nn.functional.pad(q, (0, 0, self.unused, 0)) if self.unused else q
        out = AttentionInParts.apply(q, k, v, scaling, self.parts)[:, self.unused :]
        return out.to(query.dtype).transpose(0, 1)

    def _whole(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Keys and values [Hkv,S-t,d] of a layer -> [Hkv,S,d], with those of the trunk in front."""
        if self.trunk is None:
            return k, v
        trunk_k, trunk_v = self.trunk[layer]
        return torch.cat([trunk_k, k], 1), torch.cat([trunk_v, v], 1)


class PrefillAttention(TreeAttention):
    """Tree attention that also keeps every layer's keys and values, in float32. Decoding starts from them."""

    def __init__(self, *arguments: Any, rounded_to: torch.dtype | None = None):
        """Plan the parts.

        Args:
            arguments: as for `TreeAttention`.
            rounded_to: the dtype in which decoding stores keys and values, if it is narrower; they are rounded to it.
                Prompts that join later attend to the rounded trunk, so the first prompts must do so too.
        """
        super().__init__(*arguments)
        self.rounded_to = rounded_to
        self.kept: KeysValues = []
        """[Hkv,S,d] per layer, of the whole tree."""

    def _whole(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        if layer != len(self.kept):
            raise ValueError(
                f"model: layer {layer} attends after {len(self.kept)} others; layers must run once, in order"
            )
        if self.rounded_to is not None:
            k, v = (x.to(self.rounded_to).to(x.dtype) for x in (k, v))
        self.kept.append(super()._whole(layer, k, v))
        return self.kept[-1]
