"""What a model can not be used for, or only up to a length: each is refused by the name of what it is.

Left out: files that are no model (`directory.py`); keys of a config (`spec.py`).
"""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from grpo.policy import tokens
from grpo.tree import PackedTree

KINDS = ("full_attention", "sliding_attention")
"""Kinds of layers that tree attention computes; a sliding one as long as the window holds the whole sequence."""


def positions_of(model: nn.Module) -> int | None:
    """The most tokens of a sequence that a model computes as we do; None: it has no bound.

    A bound is the length of a learned table of positions (GPT-2, OPT), or a sliding window: as long as all tokens of a
    sequence lie within it, a window hides nothing.
    """
    bounds = (_learned_positions(model), window_of(model.config.get_text_config()))
    return min((bound for bound in bounds if bound is not None), default=None)


def window_of(config: PretrainedConfig) -> int | None:
    """The sliding window of a model's layers, in tokens; None: it has none, or no layer uses it."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    return window if not kinds or "sliding_attention" in kinds else None


def _learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has a learned table for; None: it computes them (rotary), or has none."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not most:
        return None
    # A table may have a few rows more than positions: OPT's first two are for padding.
    named = [(name, x) for name, x in (*model.named_parameters(), *model.named_buffers())]
    tables = [x for name, x in named if re.search(r"wpe|pos", name) and x.dim() >= 2 and most <= len(x) <= most + 16]
    return most if tables else None


def refuse_beyond_positions(positions: int | None, prompt_ids: Sequence, new_tokens: int, option: str) -> None:
    """Raise ValueError if prompts and so many new tokens go beyond what `positions_of` says.

    Args:
        positions: of the model; None: no bound.
        prompt_ids: token lists.
        new_tokens: of a completion, at most.
        option: that says so, for the message.
    """
    longest = max(map(len, prompt_ids), default=0)
    if positions is not None and longest + new_tokens > positions:
        raise ValueError(
            f"{option}: prompts of up to {longest} tokens and {new_tokens} new ones go beyond the {positions} "
            "positions of the model, which are learned or a sliding window; at most "
            f"{max(0, positions - longest)} new ones fit"
        )


def refuse_deep(tree: PackedTree, positions: int | None) -> None:
    """Raise ValueError if a sequence of a tree is longer than `positions`; None: there is no bound."""
    if positions is not None and int(tree.position_ids.max()) >= positions:
        raise ValueError(
            f"a sequence of {int(tree.position_ids.max()) + 1} tokens goes beyond the {positions} positions of the "
            "model, which are learned or a sliding window"
        )


def refuse_unsupported(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the model needs something that tree attention or the chunked head does not compute."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    rope = getattr(config, "rope_parameters", None) or {}
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(KINDS))
    if other:
        needs = f"layers of the kind {other[0]!r}"
    elif getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        needs = "logit soft-capping"
    elif rope.get("rope_type") in ("dynamic", "longrope"):
        needs = f"rope_type {rope['rope_type']!r}, under which a row depends on the lengths of others"
    elif not getattr(model, "_supports_attention_backend", True) or config.is_encoder_decoder:
        needs = "its own attention code; only decoders that use transformers' attention interface work"
    elif not isinstance(head, nn.Linear) or head.bias is not None:
        needs = "an output head other than one linear layer without bias"
    elif tokens.num_ids(tokenizer) > len(head.weight):
        needs = f"{tokens.num_ids(tokenizer)} output rows for its tokenizer, and has {len(head.weight)}"
    else:
        return
    name = (model.config.architectures or [type(model).__name__])[0]
    raise ValueError(f"model: {name} needs {needs}, which is not supported")
