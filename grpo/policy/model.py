"""The policy: one `nn.Module` whose forward takes a packed token tree and returns log-probabilities and entropy.

The product with the output head is part of this forward. `DistributedDataParallel` wraps exactly this module, and
learning calls only its forward. A decoder of transformers works if it computes plain softmax attention through the
library's attention interface, such as the Llama, Qwen2, Qwen3 and Mistral families. Left out: loading and saving
(`load.py`).
"""

import copy
import re
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.batch import Batch
from grpo.logprobs import linear_logprobs
from grpo.policy import attention_flex, tokens
from grpo.policy.attention import Attention, KeysValues, TreeAttention, head_sizes
from grpo.policy.lean import keep_less, norms_made_again
from grpo.tree import PackedTree, pack

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> the dtype that inputs of matrix products are rounded to. Master weights are float64 under fp64, and
float32 under the others."""


class Policy(nn.Module):
    """A causal language model over packed token trees."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str = "fp32"):
        """Wrap a model of transformers. Its attention implementation becomes `tree`, and its dropout 0.

        Args:
            model: a decoder with an output head.
            tokenizer: ids that it lacks are never sampled, and are outside of every softmax.
            precision: a key of `AUTOCAST`.

        Raises:
            ValueError: the model needs what is not supported, or `precision` is unknown.
        """
        super().__init__()
        refuse_precision(precision)
        refuse_unsupported(model, tokenizer)
        model.set_attn_implementation("tree")
        remove_dropout(model)
        if AUTOCAST[precision] is None:
            keep_less(model)
        self.model = model
        self.vocab_size = tokens.num_ids(tokenizer)
        self.register_buffer("absent", tokens.absent_ids(tokenizer), persistent=False)
        """[V] bool: ids below the highest one that no token has; None: there are none."""
        self.autocast_dtype = AUTOCAST[precision]
        self.compiled = False
        self.heads = head_sizes(model)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, which all run the same code."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @property
    def head(self) -> Tensor:
        """[V,D] output weights, without rows beyond the tokenizer's vocabulary."""
        weight = self.model.get_output_embeddings().weight
        return weight if len(weight) == self.vocab_size else weight[: self.vocab_size]

    def autocast(self) -> torch.autocast:
        """The autocast context that sampling, learning and the reference all use."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, tree_attention: Attention) -> Tensor:
        """[S], [S] -> [S,D]: the decoder without its head, never compiled. Everything but learning uses it.

        Layers are compiled for learning only; while decoding, every length would be compiled anew.
        """
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            return self._run_layers(input_ids, position_ids, tree_attention)

    def _run_layers(self, input_ids: Tensor, position_ids: Tensor, tree_attention: Attention) -> Tensor:
        """[S], [S] -> [S,D], through compiled layers if the policy was compiled.

        The modules are those of transformers. Forwards of norms, MLPs and attention are replaced by `lean.py` (without
        autocast) and `float64.py`, or compiled (`kernels/compiled.py`). Attention calls `tree_attention.attend`.
        """
        ready_mask = torch.empty(1, 1, 1, 1, device=input_ids.device)  # 4-D: transformers builds none of its own
        return self.model.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            attention_mask=ready_mask,
            use_cache=False,
            tree_attention=tree_attention,
        ).last_hidden_state[0]

    def forward(self, tree: PackedTree, temperature: float, trunk: KeysValues | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every prediction of the tree.

        Args:
            tree: a packed token tree, on the policy's device.
            temperature: divides the logits.
            trunk: keys and values [Hkv,t,d] per layer of the trunk, the token prefix that all prompts share. Its t
                tokens are then not computed. All rows must begin with them, and they must predict nothing. None if
                layers are compiled.

        Returns:
            logprobs [M] and entropy [M], float32 (float64 under fp64).
        """
        if self.compiled and attention_flex.usable(self.device, self.autocast_dtype, self.heads.width):
            tree = tree.padded(attention_flex.padded_size(len(tree.input_ids)))
            attention, known = attention_flex.FlexAttention(tree.subtree_end, self.autocast_dtype), 0
        else:
            attention = TreeAttention(tree.position_ids, tree.subtree_end, self.heads.per_key, trunk)
            known = attention.known
        as_written = self.compiled or self.autocast_dtype is not None
        with self.autocast(), nullcontext() if as_written else norms_made_again():
            hidden = self._run_layers(tree.input_ids[known:], tree.position_ids[known:], attention)
            hidden = hidden[tree.source - known]  # a GPU sums this gradient in a fixed order
            return linear_logprobs(
                hidden, self.head, tree.target, temperature, compiled=self.compiled, absent=self.absent
            )


def token_logprobs(policy: nn.Module, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a batch's completion tokens.

    Args:
        policy: a `Policy`, or a module that wraps one.
        batch: `prompt_ids`, `completion_ids` and `completion_mask` are read.
        temperature: divides the logits.

    Returns:
        logprobs [B,T] and entropy [B,T], 0 where there is no token.
    """
    tree = pack(batch.prompt_ids, batch.completions()).to(batch.completion_ids.device)
    return scatter(tree, policy(tree, temperature), batch.completion_ids.shape)


def scatter(tree: PackedTree, values: tuple[Tensor, ...], shape: torch.Size) -> tuple[Tensor, ...]:
    """Values [M], one per prediction -> padded tensors [B,T], 0 where there is no token. Differentiable."""
    return tuple(value.new_zeros(shape).index_put((tree.row, tree.column), value) for value in values)


def frozen_copy(policy: Policy) -> Policy:
    """A copy without gradients, for the reference and for sampling. Its forward gives the same numbers.

    Under autocast, the weights of linear layers are stored rounded, as autocast would round them in each forward.
    Embeddings, norms and the head keep their dtype.
    """
    frozen = copy.deepcopy(policy).requires_grad_(False)
    frozen.compiled = False  # copies of an nn.Module lose what `compile` made
    head = frozen.model.get_output_embeddings()
    if policy.autocast_dtype is not None:
        for module in frozen.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.to(policy.autocast_dtype)
    return frozen


def refuse_precision(precision: str) -> None:
    """Raise ValueError if a precision is none; `auto` has to be resolved before."""
    if precision not in AUTOCAST:
        raise ValueError(f"precision is {precision!r}: must be one of {', '.join(AUTOCAST)} where a model is loaded")


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has a learned table for (GPT-2, OPT); None: it computes them (rotary), or has none."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not most:
        return None
    # A table may have a few rows more than positions: OPT's first two are for padding.
    named = [(name, x) for name, x in (*model.named_parameters(), *model.named_buffers())]
    tables = [x for name, x in named if re.search(r"wpe|pos", name) and x.dim() >= 2 and most <= len(x) <= most + 16]
    return most if tables else None


def refuse_beyond_positions(positions: int | None, prompt_ids: Sequence, new_tokens: int, option: str) -> None:
    """Raise ValueError if prompts and so many new tokens go beyond what `learned_positions` says.

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
            f"positions that the model has learned; at most {max(0, positions - longest)} new ones fit"
        )


def remove_dropout(model: PreTrainedModel) -> None:
    """Set every dropout to 0, because sampler, policy and reference have to agree.

    Both `nn.Dropout` modules and the dropout rates that layers hold as numbers are set.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def refuse_unsupported(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the model needs something that tree attention or the chunked head does not compute."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if any(kind != "full_attention" for kind in layer_types) or (not layer_types and window is not None):
        needs = "a sliding window or another kind of layer than full attention"
    elif getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        needs = "logit soft-capping"
    elif rope.get("rope_type") in ("dynamic", "longrope"):
        needs = f"rope_type {rope['rope_type']!r}, under which a row depends on the lengths of others"
    elif not model._supports_attention_backend or config.is_encoder_decoder:
        needs = "its own attention code; only decoders that use transformers' attention interface work"
    elif not isinstance(head, nn.Linear) or head.bias is not None:
        needs = "an output head other than one linear layer without bias"
    elif tokens.num_ids(tokenizer) > len(head.weight):
        needs = f"{tokens.num_ids(tokenizer)} output rows for its tokenizer, and has {len(head.weight)}"
    else:
        return
    raise ValueError(f"model: {type(model).__name__} needs {needs}, which is not supported")
