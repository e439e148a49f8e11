"""The decoder's operations for one token of a few rows: the same numbers, in fewer calls.

With so few rows an operation takes hardly longer to compute than to call (on a CPU) or to start (on a GPU), and a layer
has dozens. So what reads the same input is one product here, and queries and keys are turned together. The product
reads the sampler's own weights, moved next to each other; or, on a CPU in float32, a copy packed for oneDNN, with which
few rows are multiplied a third to a half faster.

The sampler's steps alone use it: a reference that took another path than the policy would differ from it by a
rounding, and the KL of the first step not be 0. Left out: prefill; backward; linear layers of another kind, such as
adapters, with which nothing of this is used; the Triton kernels (`decoder_fused.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.kernels.onednn import multiply_packed, packable, packed
from grpo.policy import Policy
from grpo.policy.decoder import Attention, CausalLM, GatedMLP, Norm, Plain, Rotation
from grpo.policy.products import rotate


def fits(policy: Policy) -> bool:
    """Whether `FewRows` can be used: our decoder, with linear layers that compute nothing but weight and bias."""
    if not policy.is_decoder:
        return False
    named = policy.model.model.layers.named_modules()
    return all(type(module) is nn.Linear for name, module in named if name.endswith("_proj"))


class FewRows(Plain):
    """Operations of one decoder. Reads its weights; what is changed there is seen, unless its products are packed."""

    def __init__(self, model: CausalLM, *, own: bool = False):
        """Look the layers up.

        Args:
            model: the decoder.
            own: nobody else holds the weights: they may move.
        """
        self.joint: dict[nn.Linear, Joint] = {}
        """By the first of the linear layers that read the same input."""
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self._join(attention.q_proj, attention.k_proj, attention.v_proj, own=own)
            self._join(attention.o_proj)
            self._join(mlp.gate_proj, mlp.up_proj, own=own)
            self._join(mlp.down_proj)

    def _join(self, *layers: nn.Linear, own: bool = False) -> None:
        self.joint[layers[0]] = Joint([x.weight for x in layers], [x.bias for x in layers], own)

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """[..,D] -> [..,D]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if wide is x:
            return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        return F.rms_norm(wide, x.shape[-1:], None, norm.eps).to(x.dtype) * norm.weight

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """[n,D] -> [n,E]."""
        return self.joint[layer](x)

    def products(self, x: Tensor, norm: Norm | None, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """[n,D] -> [n,E1], [n,E2], ..: views of one product."""
        x = x if norm is None else self.norm(norm, x)
        joint = self.joint[layers[0]]
        return joint(x).split(joint.widths, -1)

    def gated(self, x: Tensor, norm: Norm | None, mlp: GatedMLP) -> Tensor:
        """[n,D] -> [n,D]."""
        gate, up = self.products(x, norm, (mlp.gate_proj, mlp.up_proj))
        return self.linear(mlp.down_proj, F.silu(gate).mul_(up))

    def attend(
        self, attention: Attention, layer: int, heads: Sequence[Tensor], rotation: Rotation | None, scaling: float
    ) -> Tensor:
        """Query [n,H,d], key and value [n,Hkv,d] -> [n,H,d]."""
        query, key, value = heads
        if rotation is not None:
            turned = rotate(side_by_side(query, key), *rotation)
            query, key = turned.split([query.shape[1], key.shape[1]], 1)
        return attention.attend(layer, query, key, value, scaling)


def side_by_side(*heads: Tensor) -> Tensor:
    """[n,h1,d], [n,h2,d], .. -> [n,h1 + h2 + ..,d]: a view where `FewRows.products` made them as one."""
    first, count = heads[0], sum(part.shape[1] for part in heads)
    place = first.storage_offset()
    for part in heads:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != place or part.stride() != first.stride():
            return torch.cat(heads, 1)
        place += part.shape[1] * part.stride(1)
    return first.as_strided((len(first), count, first.shape[2]), first.stride())


class Joint:
    """Linear layers that read the same input: [n,D] -> [n,E1 + E2 + ..], in the dtype of the weights."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], own: bool = False):
        """Take the layers' weights.

        Args:
            weights: [E1,D], [E2,D], ..
            biases: [E1], [E2], .., or None for each.
            own: they are parameters that may move: next to each other in memory, as views of one tensor.
        """
        self.weights, self.biases = list(weights), list(biases)
        self.widths = [len(weight) for weight in self.weights]
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
        outs = [F.linear(x, weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def _next_to_each_other(parameters: list[nn.Parameter]) -> Tensor:
    """[E1,..], [E2,..], .. -> [E1 + E2 + ..,..]: one tensor, of which the parameters become views."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(list(map(len, parameters))), strict=True):
        parameter.data = part
    return whole
