"""Operations and attention of one token of every row with the Triton kernels of `kernels/decode.py`.

Keys and values are kept in the dtype of the products, to which `policy/attention_flex.py` rounds them in learning too.
The same in plain operations is in `products.py` and `cache.py`. Left out: prefill; float32, which uses the plain
operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grpo.kernels import decode
from grpo.policy.decoder import CausalLM, GatedMLP, Norm, Rotation
from grpo.sampler.cache import DecodeAttention
from grpo.sampler.draw import BLOCK
from grpo.sampler.products import FewRows, side_by_side


class FusedDecodeAttention(DecodeAttention):
    """Attention of one new token per row, with the buffers of `DecodeAttention` and kernels that know row lengths."""

    @property
    def key(self) -> tuple:
        """A captured decoding step depends only on the number of rows."""
        return self.shape[:1]

    def begin(self) -> None:
        """Does nothing: the kernels read the lengths themselves."""

    def attend_heads(self, layer: int, heads: Tensor, rotation: Rotation, scaling: float) -> Tensor:
        """Rotate the newest tokens' queries and keys, store keys and values, and attend.

        Args:
            layer: index of the layer.
            heads: [n,H+2*Hkv,d] queries, keys and values, before rotation.
            rotation: of their positions.
            scaling: multiplies the scores.

        Returns:
            [n,H,d] in the dtype of the buffers.
        """
        cos, sin = (x[:, 0].contiguous() for x in rotation)
        buffers = self.trunk[layer], self.branch[layer], self.own[layer]
        return decode.attend(heads, cos, sin, scaling, *buffers, self.group, self.branch_lengths, self.lengths)


class FusedRows(FewRows):
    """`FewRows` with kernels. An update of the residual stream waits for the norm behind it, which adds it."""

    def __init__(self, model: CausalLM, *, own: bool = False):
        """As `FewRows`."""
        super().__init__(model, own=own)
        self.dtype = model.model.layers[0].self_attn.q_proj.weight.dtype
        """Of the products."""
        self.update: Tensor | None = None
        """[n,D], still to be added to the residual stream."""

    def add(self, hidden: Tensor, update: Tensor, factor: float) -> Tensor:
        """[n,D], [n,D] -> [n,D]: the residual stream as it was; `_stream_normed` adds to it in place."""
        self.update = update if factor == 1.0 else update * factor
        return hidden

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """[n,D] -> [n,D] in the dtype of the products: of the residual stream if an update waits."""
        return self._stream_normed(x, norm) if self.update is not None else super().norm(norm, x)

    def products(self, x: Tensor, norm: Norm | None, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """[n,D] -> [n,E1], [n,E2], ..: views of one product. x is the residual stream."""
        joint = self.joint[layers[0]]
        return joint(self._stream_normed(x, norm)).split(joint.widths, -1)

    def gated(self, x: Tensor, norm: Norm | None, mlp: GatedMLP) -> Tensor:
        """[n,D] -> [n,D]. x is the residual stream."""
        gate_up = self.joint[mlp.gate_proj](self._stream_normed(x, norm))
        return self.linear(mlp.down_proj, decode.gated(gate_up))

    def attend(
        self,
        attention: FusedDecodeAttention,
        layer: int,
        heads: Sequence[Tensor],
        rotation: Rotation | None,
        scaling: float,
    ) -> Tensor:
        """Query [n,H,d], key and value [n,Hkv,d] -> [n,H,d]; the kernel turns queries and keys itself."""
        if rotation is None:
            ones = torch.ones(len(heads[0]), 1, heads[0].shape[-1], device=heads[0].device)
            rotation = ones, torch.zeros_like(ones)
        return attention.attend_heads(layer, side_by_side(*heads), rotation, scaling)

    def _stream_normed(self, hidden: Tensor, norm: Norm | None) -> Tensor:
        """[n,D] -> [n,D]: add the waiting update to the residual stream, in place, and normalise it."""
        update, self.update = self.update, None
        if norm is not None:
            return decode.add_norm(hidden, update, norm, self.dtype)
        return hidden if update is None else hidden.add_(update)


def block_masses(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same as `draw.block_masses`, computed by a kernel."""
    return decode.block_masses(logits, temperature, BLOCK)
