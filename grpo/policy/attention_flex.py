"""Tree attention as one kernel: FlexAttention with the one-line mask, for half precision on a GPU.

Query, key and value are rounded to the compute dtype, and the weights of the softmax are for their product with the
values; scores, softmax and sums are float32. No S x S mask exists: which blocks of 128 x 128 are empty, full or partial
follows from the smallest and largest `subtree_end` of each block, and inside a partial block the mask is computed.
Elsewhere (float32, float64, CPU, which has no backward) attention runs in parts, in `attention.py`.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from grpo.kernels.compiled import any_size

BLOCK = 128
"""Queries and keys of a block."""
BUCKET = 256
"""Trees are padded to a multiple of it: few sizes for the allocator, whole blocks for the kernel."""
LEAST = 1024
"""And to this at least. Below it, Inductor splits a norm's reduction by the first size that the graph sees: for the
policy that can be the empty tree of DDP's exchange, for the reference a full one, and both must give the same bits."""
NARROWEST = 16
"""The narrowest head that the kernel takes."""


def usable(device: torch.device, dtype: torch.dtype | None, head_width: int) -> bool:
    """Whether attention in this compute dtype (None: that of the weights) can be one kernel on this device."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_width >= NARROWEST


def padded_size(S: int) -> int:
    """The size that a tree of S tokens is padded to."""
    return max(LEAST, -(-S // BUCKET) * BUCKET)


class FlexAttention:
    """Attention over all tokens of a packed tree, in one kernel. Built once per tree, used by every layer."""

    def __init__(self, subtree_end: Tensor, dtype: torch.dtype):
        """Find the blocks; nothing is read back from the device.

        Args:
            subtree_end: [S] the mask of a packed tree, S a multiple of `BLOCK`.
            dtype: what query, key and value are rounded to.
        """
        self.mask, self.dtype = block_mask(subtree_end), dtype

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1,H,S,d], key and value [1,Hkv,S,d] -> [1,S,H,d]; differentiable in all three, on a GPU."""
        assert query.shape[2] % BLOCK == 0, "whole blocks: the compiled kernel then checks no bounds"
        q, k, v = (x.to(self.dtype) for x in (query, key, value))
        kernel = flex_attention if torch.compiler.is_compiling() else any_size(flex_attention)
        grouped = query.shape[1] != key.shape[1]
        out = kernel(q, k, v, block_mask=self.mask, scale=scaling, enable_gqa=grouped)
        return out.to(query.dtype).transpose(1, 2)


def block_mask(subtree_end: Tensor) -> BlockMask:
    """[S] -> the blocks of the mask `k <= q < subtree_end[k]`; `create_block_mask` would look at all S x S for them.

    For queries from i * BLOCK on and a block of keys before them, some key is seen iff the largest `subtree_end` of
    the block lies behind the first query, and all are seen by all iff the smallest lies behind the last one.
    """
    S = len(subtree_end)
    ends = subtree_end.to(torch.int32)
    smallest, largest = ends.view(-1, BLOCK).aminmax(dim=1)
    first = torch.arange(0, S, BLOCK, device=ends.device)[:, None]
    before = first > first.T
    full = before & (smallest >= first + BLOCK)
    partial = (before & (largest > first) & ~full) | (first == first.T)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k])

    parts = (*_listed(partial), *_listed(full))
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(S, S))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[n,n] bool -> how many blocks of keys each block of queries has [1,1,n], and which, those first [1,1,n,n]."""
    which = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32)[None, None], which[None, None]
