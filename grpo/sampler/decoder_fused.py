"""Decoder and attention that compute one token of every row with the Triton kernels of `kernels/decode.py`.

Keys and values are kept in the dtype of the products, to which `policy/attention_flex.py` rounds them in learning too.
The same in plain operations is in `narrow.py` and `cache.py`. Left out: prefill; float32, which uses the plain
operations.
"""

from torch import Tensor

from grpo.kernels import decode
from grpo.kernels.decode import add_norm, gated
from grpo.sampler.cache import DecodeAttention
from grpo.sampler.draw import BLOCK
from grpo.sampler.narrow import NarrowDecoder, head_norms


class FusedDecodeAttention(DecodeAttention):
    """Attention of one new token per row, with the buffers of `DecodeAttention` and kernels that know row lengths."""

    @property
    def key(self) -> tuple:
        """A captured decoding step depends only on the number of rows."""
        return self.shape[:1]

    def begin(self) -> None:
        """Does nothing: the kernels read the lengths themselves."""

    def attend_heads(self, layer: int, heads: Tensor, cos: Tensor, sin: Tensor, scaling: float) -> Tensor:
        """Rotate the newest tokens' queries and keys, store keys and values, and attend.

        Args:
            layer: index of the layer.
            heads: [n,H+2*Hkv,d] queries, keys and values, before rotation.
            cos, sin: [n,d] rotation of their positions, with equal halves.
            scaling: multiplies the scores.

        Returns:
            [n,H,d] in the dtype of the buffers.
        """
        buffers = self.trunk[layer], self.branch[layer], self.own[layer]
        return decode.attend(heads, cos, sin, scaling, *buffers, self.group, self.branch_lengths, self.lengths)


class FusedDecoder(NarrowDecoder):
    """A decoder without its head, for `FusedDecodeAttention`."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, attention: FusedDecodeAttention) -> Tensor:
        """[n], [n] -> [n,D]: like `NarrowDecoder`, but the result is in the dtype of the products."""
        hidden = self.decoder.embed_tokens(input_ids)
        cos, sin = (x[0].contiguous() for x in self.decoder.rotary_emb(hidden[None], position_ids[None]))
        dtype = self.layers[0].qkv.weights[0].dtype
        following = [layer.norms[0] for layer in self.layers[1:]] + [self.decoder.norm]
        normed = add_norm(hidden, None, self.layers[0].norms[0], dtype)
        for layer, next_norm in zip(self.layers, following, strict=True):
            heads = head_norms(layer, layer.qkv(normed).unflatten(1, (-1, layer.head_width)))
            attended = attention.attend_heads(layer.index, heads, cos, sin, layer.scaling)
            normed = add_norm(hidden, layer.out(attended.flatten(1)), layer.norms[1], dtype)
            normed = add_norm(hidden, layer.down(gated(layer.gate_up(normed))), next_norm, dtype)
        return normed


def block_masses(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same as `draw.block_masses`, computed by a kernel."""
    return decode.block_masses(logits, temperature, BLOCK)
