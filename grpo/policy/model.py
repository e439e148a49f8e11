"""The policy: one `nn.Module` whose forward takes a packed token tree and returns log-probabilities and entropy.

The product with the output head is part of this forward. `DistributedDataParallel` wraps exactly this module, and
learning calls only its forward. Left out: loading and saving (`load.py`).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.batch import Batch
from grpo.logprobs import linear_logprobs
from grpo.policy import attention_flex, limits, tokens, wrapped
from grpo.policy.attention import TreeAttention
from grpo.policy.decoder import PLAIN, Attention, CausalLM
from grpo.policy.products import LEAN
from grpo.policy.spec import head_sizes
from grpo.policy.weights import taken_over
from grpo.tree import PackedTree, pack

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision -> the dtype that inputs of matrix products are rounded to. Master weights are float64 under fp64, and
float32 under the others."""


class Policy(nn.Module):
    """A causal language model over packed token trees."""

    def __init__(self, model: CausalLM | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str = "fp32"):
        """Take a model.

        Args:
            model: our decoder; or a model of transformers, of which a decoder takes over the weights if it knows the
                family. Otherwise it stays as it is, but for its attention and its dropout (`wrapped.py`).
            tokenizer: ids that it lacks are never sampled, and are outside of every softmax.
            precision: a key of `AUTOCAST`.

        Raises:
            ValueError: the model needs what is not supported, or `precision` is unknown.
        """
        super().__init__()
        refuse_precision(precision)
        limits.refuse_unsupported(model, tokenizer)
        model = taken_over(model)
        if not isinstance(model, CausalLM):
            wrapped.prepare(model)
        self.model = model
        self.vocab_size = tokens.num_ids(tokenizer)
        absent = tokens.absent_ids(tokenizer)
        self.register_buffer("absent", None if absent is None else absent.to(self.device), persistent=False)
        """[V] bool: ids below the highest one that no token has; None: there are none."""
        self.autocast_dtype = AUTOCAST[precision]
        self.compiled = False
        """Whether `kernels/compiled.py` compiled the layers."""
        self.heads = head_sizes(model.config)
        self.commit: str | None = None
        """Of the hub, if the weights come from there."""
        self.positions = limits.positions_of(model)
        """The most tokens of a sequence, where the model has a bound; None: there is none."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.get_output_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of master weights. Asking `head` for it could gather a sharded one."""
        return self.model.get_output_embeddings().weight.dtype

    @property
    def is_decoder(self) -> bool:
        """Whether our decoder computes the model; otherwise transformers' own code does."""
        return isinstance(self.model, CausalLM)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, which all run the same code. There are none where transformers' own code runs."""
        return list(self.model.model.layers) if self.is_decoder else []

    @property
    def head(self) -> Tensor:
        """[V,D] output weights, without rows beyond the tokenizer's vocabulary."""
        weight = self.model.get_output_embeddings().weight
        return weight if len(weight) == self.vocab_size else weight[: self.vocab_size]

    @property
    def is_half(self) -> bool:
        """Whether products are rounded to half precision: by autocast, or because the weights are."""
        return self.autocast_dtype is not None or self.dtype.itemsize < 4

    def autocast(self) -> torch.autocast:
        """The autocast context that sampling, learning and the reference all use.

        It keeps no rounded weights: each is used once, and those of a layer that was sharded are to go with the layer.
        """
        on = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=on, cache_enabled=False)

    def checkpoint_activations(self) -> None:
        """From now on compute each layer's activations again in backward, instead of keeping them."""
        if self.is_decoder:
            self.model.model.recomputes = True
        else:
            model = self.model  # older versions of transformers know the second name alone
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention: Attention) -> Tensor:
        """[S], [S] -> [S,D]: the model without its head, never compiled. Everything but learning uses it.

        Layers are compiled for learning only; while decoding, every length would be compiled anew.
        """
        return self._run_layers(input_ids, position_ids, attention, eager=True)

    def _run_layers(self, input_ids: Tensor, position_ids: Tensor, attention: Attention, *, eager: bool) -> Tensor:
        """[S], [S] -> [S,D]."""
        if not self.is_decoder:
            return wrapped.hidden_states(self.model, input_ids, position_ids, attention)
        compiled = self.compiled and not eager
        ops = PLAIN if self.is_half or compiled else LEAN
        return self.model.model(input_ids, position_ids, attention, ops, eager=eager and self.compiled)

    def forward(self, tree: PackedTree, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every prediction of the tree.

        Args:
            tree: a packed token tree, on the policy's device.
            temperature: divides the logits.

        Returns:
            logprobs [M] and entropy [M], float32 (float64 under fp64).

        Raises:
            ValueError: a sequence of the tree is longer than `positions`.
        """
        limits.refuse_deep(tree, self.positions)
        if self.compiled and attention_flex.usable(self.device, self.autocast_dtype, self.heads.width):
            tree = tree.padded(attention_flex.padded_size(len(tree.input_ids)))
            attention = attention_flex.FlexAttention(tree.subtree_end, self.autocast_dtype)
        else:
            attention = TreeAttention(tree.position_ids, tree.subtree_end, self.heads.per_key)
        with self.autocast():
            hidden = self._run_layers(tree.input_ids, tree.position_ids, attention, eager=False)
            hidden = hidden[tree.source]  # a GPU sums this gradient in a fixed order
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


def refuse_precision(precision: str) -> None:
    """Raise ValueError if a precision is none; `auto` has to be resolved before."""
    if precision not in AUTOCAST:
        raise ValueError(f"precision is {precision!r}: must be one of {', '.join(AUTOCAST)} where a model is loaded")
