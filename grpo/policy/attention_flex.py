"""Tree attention in one kernel: FlexAttention with the tree's mask, for half precision on a GPU.

Query, key and value are rounded to the compute dtype. So are the softmax weights, for their product with the values.
Scores, softmax and sums are float32. No S x S mask exists. The smallest and largest `subtree_end` of a block tell which
blocks of 128 x 128 are empty, full or partial. The mask is computed only inside partial blocks.

Left out: float32, float64, and CPUs, where the kernel has no backward. There attention runs in parts (`attention.py`).
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from grpo.kernels.compiled import any_size

BLOCK = 128
"""Number of queries, and of keys, in a block."""
BUCKET = 256
"""Trees are padded to a multiple of this, so that the allocator sees few sizes and the kernel only whole blocks."""
LEAST = 1024
"""Trees are padded to this size at least. Below it, Inductor splits a norm's reduction by the first size that the graph
sees. For the policy this can be the empty tree of DDP's exchange, and for the reference a full one. Both must give the
same bits."""
NARROWEST = 16
"""The narrowest head that the kernel takes."""


def usable(device: torch.device, dtype: torch.dtype | None, head_width: int) -> bool:
    """Whether this kernel can be used on this device, in this compute dtype (None: the dtype of the weights)."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_width >= NARROWEST


def padded_size(S: int) -> int:
    """The size that a tree of S tokens is padded to."""
    return max(LEAST, -(-S // BUCKET) * BUCKET)


class FlexAttention:
    """Attention over all tokens of a packed tree, in one kernel. Built once per tree, used by every layer."""

    def __init__(self, subtree_end: Tensor, dtype: torch.dtype):
        """Find the blocks, without reading a value back from the device.

        Args:
            subtree_end: [S] the mask of a packed tree, where S is a multiple of `BLOCK`.
            dtype: query, key and value are rounded to it.
        """
        self.mask, self.dtype = block_mask(subtree_end), dtype

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [S,H,d], key and value [S,Hkv,d] -> [S,H,d]; differentiable in all three, on a GPU."""
        assert len(query) % BLOCK == 0, "whole blocks: the compiled kernel then checks no bounds"
        q, k, v = (x.to(self.dtype).transpose(0, 1)[None] for x in (query, key, value))
        kernel = flex_attention if torch.compiler.is_compiling() else any_size(flex_attention)
        grouped = query.shape[1] != key.shape[1]
        out = kernel(q, k, v, block_mask=self.mask, scale=scaling, enable_gqa=grouped)
        return out.to(query.dtype)[0].transpose(0, 1)


def block_mask(subtree_end: Tensor) -> BlockMask:
    """[S] -> the blocks of the mask `k <= q < subtree_end[k]`. `create_block_mask` would compute all S x S entries.

    Take a block of queries and an earlier block of keys. Some query sees some key iff the largest `subtree_end` of the
    keys lies behind the first query. Every query sees every key iff the smallest lies behind the last query.
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
    """[n,n] bool -> for each block of queries, its number of key blocks [1,1,n] and their indices first [1,1,n,n]."""
    which = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32)[None, None], which[None, None]
