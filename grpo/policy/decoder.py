"""The transformer: embedding, layers of attention and MLP, norms, head. What a family chooses is in its `Spec`.

Names of modules are those of the Hugging Face files, so that weights load and save without a map. Learning, reference,
float64, prefill, decoding and the fused step all run this code. They differ in two arguments:

- `attention` says which tokens attend to which (`attention.py`, `attention_flex.py`, `sampler/cache.py`);
- `ops` says how products and norms are computed. `Plain`, here, writes them as one would; `products.py` keeps less
  for backward; `sampler/products.py` computes a few rows with fewer calls.

There is no batch dimension: S tokens of a packed tree, or the newest token of S rows. Left out: dropout, sliding
windows, mixtures of experts, and the product with the head (`logprobs.py`).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PretrainedConfig

from grpo.policy.spec import Spec, frequencies

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [S,1,d] of the angles by which positions turn queries and keys. Each has two equal halves."""


class Attention(Protocol):
    """Which tokens attend to which."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [S,H,d], key and value [S,Hkv,d] -> [S,H,d]."""


class Norm(nn.Module):
    """RMSNorm, https://arxiv.org/abs/1910.07467: x / sqrt(mean x^2 + eps) * weight."""

    def __init__(self, width: int, eps: float):
        """A norm over the last dimension."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..,D] -> [..,D]; float32 or wider inside."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Plain:
    """The operations of a layer, as one would write them. Other classes compute the same in another way."""

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """[..,D] -> [..,D]."""
        return norm(x)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """[S,D] -> [S,E]."""
        return layer(x)

    def products(self, x: Tensor, norm: Norm | None, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """[S,D] -> [S,E1], [S,E2], ..: linear layers that read the same input, behind a norm if there is one."""
        x = x if norm is None else norm(x)
        return [layer(x) for layer in layers]

    def gated(self, x: Tensor, norm: Norm | None, mlp: "GatedMLP") -> Tensor:
        """[S,D] -> [S,D]: down(silu(gate(x)) * up(x)), behind a norm if there is one."""
        gate, up = self.products(x, norm, (mlp.gate_proj, mlp.up_proj))
        return self.linear(mlp.down_proj, F.silu(gate) * up)

    def attend(
        self, attention: Attention, layer: int, heads: Sequence[Tensor], rotation: Rotation | None, scaling: float
    ) -> Tensor:
        """Query [S,H,d], key and value [S,Hkv,d] -> [S,H,d]: queries and keys are turned, then they attend."""
        query, key, value = heads
        if rotation is not None:
            query, key = rotated(query, *rotation), rotated(key, *rotation)
        return attention.attend(layer, query, key, value, scaling)

    def add(self, hidden: Tensor, update: Tensor, factor: float) -> Tensor:
        """[S,D], [S,D] -> [S,D]: the residual stream, with an update."""
        return hidden + (update if factor == 1.0 else update * factor)


PLAIN = Plain()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[S,h,d] -> [S,h,d]: each pair (x_i, x_{i + d/2}) turned by its angle, https://arxiv.org/abs/2104.09864."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class SelfAttention(nn.Module):
    """Grouped-query attention: H query heads read Hkv heads of keys and values."""

    def __init__(self, spec: Spec, layer: int):
        """The attention of one layer."""
        super().__init__()
        self.layer, self.scaling, self.head_width = layer, spec.scaling, spec.head_width
        self.rotates, self.head_norms = spec.rotates[layer], spec.head_norms
        queries, keys = spec.heads * spec.head_width, spec.key_heads * spec.head_width
        self.q_proj = nn.Linear(spec.width, queries, bias=spec.bias_of_qkv)
        self.k_proj = nn.Linear(spec.width, keys, bias=spec.bias_of_qkv)
        self.v_proj = nn.Linear(spec.width, keys, bias=spec.bias_of_qkv)
        self.o_proj = nn.Linear(queries, spec.width, bias=spec.bias_of_out)
        if spec.head_norms == "each":
            self.q_norm, self.k_norm = Norm(spec.head_width, spec.eps), Norm(spec.head_width, spec.eps)
        elif spec.head_norms == "together":
            self.q_norm, self.k_norm = Norm(queries, spec.eps), Norm(keys, spec.eps)

    def forward(
        self, x: Tensor, norm: Norm | None, rotation: Rotation, attention: Attention, ops: Plain = PLAIN
    ) -> Tensor:
        """[S,D] -> [S,D]."""
        query, key, value = ops.products(x, norm, (self.q_proj, self.k_proj, self.v_proj))
        if self.head_norms == "together":
            query, key = ops.norm(self.q_norm, query), ops.norm(self.k_norm, key)
        query, key, value = (each.unflatten(-1, (-1, self.head_width)) for each in (query, key, value))
        if self.head_norms == "each":
            query, key = ops.norm(self.q_norm, query), ops.norm(self.k_norm, key)
        turned_by = rotation if self.rotates else None
        out = ops.attend(attention, self.layer, (query, key, value), turned_by, self.scaling)
        return ops.linear(self.o_proj, out.flatten(-2))


class GatedMLP(nn.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202."""

    def __init__(self, spec: Spec):
        """The MLP of one layer."""
        super().__init__()
        self.gate_proj = nn.Linear(spec.width, spec.mlp_width, bias=spec.bias_of_mlp)
        self.up_proj = nn.Linear(spec.width, spec.mlp_width, bias=spec.bias_of_mlp)
        self.down_proj = nn.Linear(spec.mlp_width, spec.width, bias=spec.bias_of_mlp)

    def forward(self, x: Tensor, norm: Norm | None, ops: Plain = PLAIN) -> Tensor:
        """[S,D] -> [S,D]."""
        return ops.gated(x, norm, self)


class Layer(nn.Module):
    """Attention, then the MLP; each adds to the residual stream."""

    def __init__(self, spec: Spec, layer: int):
        """The layer of this index."""
        super().__init__()
        self.norms_behind, self.factor = spec.norms_behind, spec.residual_multiplier
        self.self_attn, self.mlp = SelfAttention(spec, layer), GatedMLP(spec)
        self.post_attention_layernorm = Norm(spec.width, spec.eps)
        if spec.norms_behind:
            self.post_feedforward_layernorm = Norm(spec.width, spec.eps)
        else:
            self.input_layernorm = Norm(spec.width, spec.eps)

    def forward(self, hidden: Tensor, rotation: Rotation, attention: Attention, ops: Plain = PLAIN) -> Tensor:
        """[S,D] -> [S,D]."""
        if self.norms_behind:
            update = ops.norm(self.post_attention_layernorm, self.self_attn(hidden, None, rotation, attention, ops))
            hidden = ops.add(hidden, update, self.factor)
            update = ops.norm(self.post_feedforward_layernorm, self.mlp(hidden, None, ops))
            return ops.add(hidden, update, self.factor)
        update = self.self_attn(hidden, self.input_layernorm, rotation, attention, ops)
        hidden = ops.add(hidden, update, self.factor)
        # In the files of these families the norm in front of the MLP bears this name.
        update = self.mlp(hidden, self.post_attention_layernorm, ops)
        return ops.add(hidden, update, self.factor)


class Decoder(nn.Module):
    """Token ids -> hidden states, behind the last norm."""

    def __init__(self, spec: Spec, angles: Tensor, factor: float):
        """A decoder with weights that are still to be read.

        Args:
            spec: its sizes and choices.
            angles: [d/2] rotary frequencies, in radians per position.
            factor: multiplies cosines and sines.
        """
        super().__init__()
        self.spec, self.factor = spec, factor
        self.embed_tokens = nn.Embedding(spec.vocabulary, spec.width)
        self.layers = nn.ModuleList(Layer(spec, layer) for layer in range(spec.layers))
        self.norm = Norm(spec.width, spec.eps)
        self.register_buffer("angles", angles, persistent=False)
        self.recomputes = False
        """Compute each layer's activations again in backward instead of keeping them."""

    def rotation(self, position_ids: Tensor) -> Rotation:
        """[S] -> cosines and sines [S,1,d] of the angles of these positions, in the dtype of the embedding."""
        dtype = self.embed_tokens.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        angles = position_ids[:, None, None].to(wide) * self.angles.to(wide)
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention: Attention,
        ops: Plain = PLAIN,
        *,
        eager: bool = False,
    ) -> Tensor:
        """Run all layers.

        Args:
            input_ids, position_ids: [S].
            attention: which tokens attend to which.
            ops: how products and norms are computed.
            eager: run the layers as written, even where `kernels/compiled.py` compiled them.

        Returns:
            [S,D].
        """
        rotation = self.rotation(position_ids)
        hidden = self.embed_tokens(input_ids)
        if self.spec.embedding_multiplier != 1.0:
            hidden = hidden * self.spec.embedding_multiplier
        for layer in self.layers:
            run = layer.forward if eager else layer
            if self.recomputes and torch.is_grad_enabled():
                arguments = {"use_reentrant": False, "preserve_rng_state": False}
                hidden = checkpoint(run, hidden, rotation, attention, ops, **arguments)
            else:
                hidden = run(hidden, rotation, attention, ops)
        hidden = ops.norm(self.norm, hidden)
        return hidden if self.spec.logits_scaling == 1.0 else hidden / self.spec.logits_scaling


class CausalLM(nn.Module):
    """A decoder and its output head."""

    def __init__(self, config: PretrainedConfig, spec: Spec):
        """A model with weights that are still to be read.

        Args:
            config: of the checkpoint; kept for EOS tokens and for saving.
            spec: of this config.
        """
        super().__init__()
        self.config, self.generation_config = config, GenerationConfig()
        self.model = Decoder(spec, *frequencies(config))
        self.lm_head = nn.Linear(spec.width, spec.vocabulary, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding, where the spec says so; to be repeated when weights were replaced."""
        if self.model.spec.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> Decoder:
        """The decoder, under the name that transformers gives it."""
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, under the name that transformers gives it."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The head, under the name that transformers gives it."""
        return self.lm_head
