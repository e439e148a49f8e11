"""Families that the decoder does not compute: transformers' own model, unchanged, over our attention.

Models of transformers call their attention through the library's interface, under a name. This file registers one
called `tree`, which hands the call on to an object with a method `attend`, passed as the keyword `tree_attention`. It
is never a global, so that activation checkpointing can run a layer again in backward. No forward is replaced. Left out:
everything that makes the decoder fast; models with attention code of their own, or whose scores are bounded, biased or
have sinks. These are refused.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo.policy.decoder import Attention

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Options of an attention that ours does not compute."""


def prepare(model: PreTrainedModel) -> None:
    """Let a model call our attention, and set every dropout to 0: sampler, policy and reference have to agree.

    Both `nn.Dropout` modules and the dropout rates that layers hold as numbers are set.
    """
    model.set_attn_implementation("tree")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
    """[S], [S] -> [S,D]: what the model computes in front of its head."""
    ready_mask = torch.empty(1, 1, 1, 1, device=input_ids.device)  # 4-D: transformers builds none of its own
    return model.base_model(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=ready_mask,
        use_cache=False,
        tree_attention=attention,
    ).last_hidden_state[0]


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
        options: what else the model passes; those in `UNSUPPORTED` are refused. A sliding window is not looked at:
            `positions_of` keeps sequences within it.

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
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return tree_attention.attend(module.layer_idx, *rows, scaling)[None], None


AttentionInterface.register("tree", attention_interface)
AttentionMaskInterface.register("tree", sdpa_mask)
