"""A decoder of Llama's form for one token of a few rows: the model's own numbers, in fewer operations.

With so few rows an operation takes hardly longer to compute than to call (on a CPU) or to start (on a GPU), and a layer
of transformers has dozens. So the layer is written out here: queries and keys are rotated together, and what reads the
same input is one product: over the sampler's own weights, moved next to each other; or, on a CPU in float32, over a
copy packed for oneDNN, with which few rows are multiplied a third to a half faster.

The sampler's steps alone use it: a reference that took another path than the policy would differ from it by a
rounding, and the KL of the first step not be 0. Left out: decoders of another form, which run as transformers wrote
them; prefill; backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.kernels.onednn import multiply_packed, packable, packed
from grpo.policy import Policy
from grpo.policy.lean import is_gated, probe, rotated, rotates
from grpo.sampler.cache import DecodeAttention


@torch.no_grad()
def fits(policy: Policy) -> bool:
    """Whether a policy's decoder is of Llama's form, by its parts' names and by what every layer computes."""
    if not policy.layers or not all(map(_named_as_usual, policy.layers)):
        return False
    return all(_is_usual(layer, policy) for layer in policy.layers)


def _is_usual(layer: nn.Module, policy: Policy) -> bool:
    mix, (x, cos, sin) = _Mix(), probe(layer.self_attn, policy.head.dtype)
    with policy.autocast():
        expected = layer.forward(x, position_embeddings=(cos, sin), tree_attention=mix)[0]
    off = (_Layer(layer, own=False)(x[0], cos[0, :, None], sin[0, :, None], mix) - expected).abs().max()
    return bool(off <= (1e-4 if policy.autocast_dtype is None else 0.03) * expected.abs().max())


def _named_as_usual(layer: nn.Module) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    plain = all(type(getattr(attention, f"{name}_proj", None)) is nn.Linear for name in "qkvo")
    return plain and rotates(attention) and is_gated(mlp)


class _Mix:
    """In place of attention, for `fits`: something of query, key and value, token by token."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `Attention.attend`."""
        return self.attend_rows(layer, *(x[0].transpose(0, 1) for x in (query, key, value)), scaling)[None]

    def attend_rows(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `DecodeAttention.attend_rows`."""
        return query * scaling + (key + value).repeat_interleave(query.shape[1] // key.shape[1], 1)


class NarrowDecoder:
    """A decoder of transformers without its head. Reads the model's weights; what is changed there is seen, unless its
    products are packed."""

    def __init__(self, decoder: nn.Module, *, own: bool = False):
        """Look the layers up.

        Args:
            decoder: of a policy that `fits`.
            own: nobody else holds the weights: they may move.
        """
        self.decoder = decoder
        self.layers = [_Layer(layer, own) for layer in decoder.layers]
        self.products = [x for layer in self.layers for x in (layer.qkv, layer.out, layer.gate_up, layer.down)]

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attention: DecodeAttention) -> Tensor:
        """[n], [n] -> [n,D]: the newest token of every row, hidden states behind the last norm."""
        hidden = self.decoder.embed_tokens(input_ids)
        cos, sin = (x[0, :, None] for x in self.decoder.rotary_emb(hidden[None], position_ids[None]))
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attention)
        return _norm(hidden, self.decoder.norm)


class _Layer:
    """What a decoder layer of transformers does, and its weights."""

    def __init__(self, layer: nn.Module, own: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scaling, self.head_width = attention.layer_idx, attention.scaling, attention.head_dim
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norms = [getattr(attention, f"{name}_norm", None) for name in "qk"]
        self.qkv = _joint([attention.q_proj, attention.k_proj, attention.v_proj], own)
        self.heads = [linear.out_features // self.head_width for linear in (attention.q_proj, attention.k_proj)]
        self.out, self.down = _joint([attention.o_proj]), _joint([mlp.down_proj])
        self.gate_up = _joint([mlp.gate_proj, mlp.up_proj], own)

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, attention: DecodeAttention) -> Tensor:
        """[n,D], cos and sin [n,1,d] -> [n,D]."""
        H, Hkv = self.heads
        heads = self.qkv(_norm(hidden, self.norms[0])).unflatten(1, (-1, self.head_width))
        turning, value = head_norms(self, heads).split([H + Hkv, Hkv], 1)
        query, key = rotated(turning, cos, sin).split([H, Hkv], 1)
        attended = attention.attend_rows(self.index, query, key, value, self.scaling)
        hidden = hidden + self.out(attended.flatten(1))
        gate, up = self.gate_up(_norm(hidden, self.norms[1])).chunk(2, -1)
        return hidden + self.down(F.silu(gate).mul_(up))


def head_norms(layer: _Layer, heads: Tensor) -> Tensor:
    """[n,H+2*Hkv,d]: queries and keys normalized one by one where the layer does so (Qwen3); values as they are."""
    if layer.head_norms[0] is None:
        return heads
    H, Hkv = layer.heads
    query, key, value = heads.split([H, Hkv, Hkv], 1)
    return torch.cat([*map(_norm, (query, key), layer.head_norms), value], 1)


def _joint(linears: Sequence[nn.Linear], own: bool = False) -> "JointLinear":
    return JointLinear([x.weight for x in linears], [x.bias for x in linears], own)


class JointLinear:
    """Linear layers that read the same input: [n,D] -> [n,E1 + E2 + ..], in the dtype of the weights."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], own: bool = False):
        """Take the layers' weights.

        Args:
            weights: [E1,D], [E2,D], ..
            biases: [E1], [E2], .., or None for each.
            own: they are parameters that may move: next to each other in memory, as views of one tensor.
        """
        self.weights, self.biases = list(weights), list(biases)
        if own:
            self.weights = [_next_to_each_other(self.weights)]
            self.biases = [None if self.biases[0] is None else _next_to_each_other(self.biases)]
        self.packed: tuple[Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def pack(self) -> None:
        """Multiply by a copy in the fastest layout, where there is one; what the weights become is not seen by it."""
        if packable(self.weights[0]):
            whole = self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)
            bias = None if self.biases[0] is None else torch.cat(self.biases)
            self.packed = packed(whole), bias

    def unpack(self) -> None:
        """Give the copy up: the weights themselves again."""
        self.packed = None

    def __call__(self, x: Tensor) -> Tensor:
        """[n,D] -> [n,E1 + E2 + ..]."""
        x = x.to(self.weights[0].dtype)
        if self.packed is not None:
            return multiply_packed(x, *self.packed)
        outs = list(map(F.linear, [x] * len(self.weights), self.weights, self.biases))
        return torch.cat(outs, -1) if len(outs) > 1 else outs[0]


def _next_to_each_other(parameters: list[nn.Parameter]) -> Tensor:
    """[E1,..], [E2,..], .. -> [E1 + E2 + ..,..]: one tensor, of which the parameters become views."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(list(map(len, parameters))), strict=True):
        parameter.data = part
    return whole


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    """[..,D] -> [..,D]: x / rms(x), in float32 or wider, times the weight; rounded in between if x is narrower."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if wide is x:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return F.rms_norm(wide, x.shape[-1:], None, norm.variance_epsilon).to(x.dtype) * norm.weight
