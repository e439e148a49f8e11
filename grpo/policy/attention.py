"""Attention over a packed token tree: shared tokens are computed once, and nothing is copied per leaf.

Models of transformers call this file through its attention interface, under the name `tree`. The call passes an object
with a method `attend`, in the keyword argument `tree_attention`. It is never a global, so that activation checkpointing
can run a layer again in backward. There are four such classes:

- `TreeAttention`, here: all tokens of a tree, differentiable, computed in parts (`attention_parts.py`);
- `PrefillAttention`, here: the same, and it keeps keys and values for sampling;
- `FlexAttention` (`attention_flex.py`): all tokens of a tree in one GPU kernel;
- `DecodeAttention` (`sampler/cache.py`): one new token per row.

Left out: sliding windows, logit soft-capping, attention sinks and biases on the scores. A model with one is refused.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.policy.attention_parts import AttentionInParts, plan_parts

Pair = tuple[Tensor, Tensor]
"""Keys and values of a layer."""
KeysValues = list[Pair]
"""Keys and values of every layer."""

UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


class HeadSizes(NamedTuple):
    """The sizes of a model's attention heads."""

    heads: int
    """H, the number of query heads."""
    key_heads: int
    """Hkv, the number of key and value heads."""
    width: int
    """d, the width of one head."""

    @property
    def per_key(self) -> int:
        """How many query heads read one key head (grouped-query attention)."""
        return self.heads // self.key_heads


def head_sizes(model: PreTrainedModel) -> HeadSizes:
    """Read the head sizes from a model's config; what it does not say follows from the rest."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return HeadSizes(heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads)


class Attention(Protocol):
    """What a layer calls to attend; see the four classes above."""

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
    tree_attention: Attention | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """The function that transformers calls for attention in every layer.

    Without `tree_attention` it is transformers' own sdpa, so that the model stays usable on its own (`model.generate`).

    Args:
        module: the layer's attention module.
        query: [1,H,S,d].
        key, value: [1,Hkv,S,d].
        attention_mask: read only without `tree_attention`.
        scaling: multiplies the scores; None: 1 / sqrt(d).
        dropout: must be 0 with `tree_attention`.
        tree_attention: computes the attention.
        options: what else the model passes; those in `UNSUPPORTED` are refused.

    Returns:
        [1,S,H,d], and None in the place of attention weights.

    Raises:
        ValueError: the model asks for something that this attention does not compute.
    """
    if tree_attention is None:
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    uses = next((option for option in UNSUPPORTED if options.get(option) is not None), None)
    if value.shape[-1] != query.shape[-1]:
        uses = "values of another width than its keys"
    if uses:
        raise ValueError(f"model: {type(module).__name__} uses {uses}, which tree attention does not support")
    assert dropout == 0.0, "attention dropout must be 0: sampler, policy and reference have to agree"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree_attention.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("tree", attention_interface)
AttentionMaskInterface.register("tree", sdpa_mask)


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
        """query [1,H,S-t,d], key and value [1,Hkv,S-t,d] -> [1,S-t,H,d]; differentiable in all three."""
        compute = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x[0].to(compute) for x in (query, key, value))
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the fused kernel assumes it
        k, v = self._whole(layer, k, v)
        q = nn.functional.pad(q, (0, 0, self.unused, 0)) if self.unused else q
        out = AttentionInParts.apply(q, k, v, scaling, self.parts)[:, self.unused :]
        return out.to(query.dtype).transpose(0, 1)[None]

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
        assert layer == len(self.kept), "layers must run once each, in order"
        if self.rounded_to is not None:
            k, v = (x.to(self.rounded_to).to(x.dtype) for x in (k, v))
        self.kept.append(super()._whole(layer, k, v))
        return self.kept[-1]
