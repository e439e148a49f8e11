"""Triton kernels that decode one token of every row on a GPU.

A decoding step is many small operations, and on a GPU each takes as long to start as to compute. So a layer is only ten
kernel launches: four matrix products, and six launches of the kernels in this file. These are:

- residual addition and norm (twice a layer);
- rotation of queries and keys, which also stores the new keys and values;
- attention over the trunk, the token prefix that all prompts share (such as few-shot exemplars), for all rows together;
- attention over a row's branch (the rest of its prompt) and its own tokens, merged with the trunk's by log-sum-exp;
- the gate of the MLP.

Scores and sums are float32. Loops end where a row ends, so that one captured graph serves all lengths. Left out:
prefill; float32 products; tuning; the decoder that calls the kernels (`sampler/decoder_fused.py`).
"""

import torch
from torch import Tensor, nn

from grpo.kernels.compiled import can_compile

try:  # torch's GPU builds bring Triton along
    import triton
    import triton.language as tl
except ImportError:
    triton = None

Pair = tuple[Tensor, Tensor]

KERNELS = True
"""Set to False to sample with plain torch operations on a GPU too."""
WIDEST = 128
"""The widest head whose tiles fit into the shared memory of all GPUs from Ampere on."""
QUERIES, KEYS = 64, 64
"""Size of a tile of scores over the trunk. Over branch and own tokens, a tile has the queries of one row and key head,
padded to at least 16."""
PROGRAMS = 264
"""The trunk is cut into parts until this many programs attend to it: two for each multiprocessor of an H100."""
COLUMNS = 1024
"""Columns of the MLP that one program computes."""
BLOCKS = 8
"""Blocks of the vocabulary that one program sums."""


def usable(device: str, half: bool) -> bool:
    """Whether decoding uses these kernels: in half precision (`half`), on a GPU, where Triton can compile."""
    return KERNELS and triton is not None and device == "cuda" and half and can_compile()


def attend(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    scaling: float,
    trunk: Pair,
    branch: Pair,
    own: Pair,
    group: Tensor,
    branch_lengths: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Rotate and store the newest token of every row, then attend from it over trunk, branch and own tokens.

    Args:
        heads: [n,H+2*Hkv,d] queries, keys and values of the newest tokens, before rotation.
        cos, sin: [n,d] rotation of their positions, with equal halves.
        scaling: multiplies the scores.
        trunk: keys and values [Hkv,t,d] that all rows read.
        branch: keys and values [N,Hkv,W,d], one branch per group.
        own: keys and values [n,Hkv,W,d], one per row; those of the newest tokens are written into them.
        group: [n] the group of each row.
        branch_lengths: [N] tokens of each branch.
        lengths: [n] own tokens of each row, without the newest.

    Returns:
        [n,H,d] in the dtype of the buffers.
    """
    (trunk_k, trunk_v), (branch_k, branch_v), (own_k, own_v) = trunk, branch, own
    (n, _, d), (_, Hkv, own_width, _) = heads.shape, own_k.shape
    H, t = heads.shape[1] - 2 * Hkv, trunk_k.shape[1]
    R, width = H // Hkv, max(16, triton.next_power_of_2(d))
    query, out = own_k.new_empty(n, H, d), own_k.new_empty(n, H, d)
    tile = triton.next_power_of_2(H + 2 * Hkv), triton.next_power_of_2(d // 2)
    _rotate[(n,)](heads, cos, sin, query, own_k, own_v, lengths, own_width, H, Hkv, d, *tile)

    tiles = triton.cdiv(n * R, QUERIES)
    parts = min(triton.cdiv(t, KEYS), triton.cdiv(PROGRAMS, tiles * Hkv))
    size = triton.cdiv(triton.cdiv(t, max(1, parts)), KEYS) * KEYS
    parts = triton.cdiv(t, max(1, size))
    partial = query.new_empty(parts, n, H, d, dtype=torch.float32)
    lse = partial.new_empty(parts, n, H)
    if parts:
        sizes = n, t, size, R, H, d, QUERIES, KEYS, width
        _over_trunk[(tiles, Hkv, parts)](query, trunk_k, trunk_v, partial, lse, scaling, *sizes)
    buffers = branch_k, branch_v, own_k, own_v, group, branch_lengths, lengths
    sizes = n, parts, branch_k.shape[2], own_width, R, H, Hkv, d, max(16, triton.next_power_of_2(R)), KEYS, width
    _over_rows[(n, Hkv)](query, partial, lse, out, *buffers, scaling, *sizes)
    return out


def add_norm(hidden: Tensor, added: Tensor | None, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    """Add to the residual stream, and normalise it (RMSNorm).

    Args:
        hidden: [n,D] float32, the residual stream; `added` is added to it in place.
        added: [n,D], or None to add nothing.
        norm: the norm's module, whose `weight` [D] and `eps` are read.
        dtype: dtype of the result.

    Returns:
        [n,D] x / rms(x) * weight, where x is the residual stream after the addition.
    """
    n, D = hidden.shape
    normed = hidden.new_empty(n, D, dtype=dtype)
    arguments = hidden, hidden if added is None else added, norm.weight, normed, norm.eps
    _add_norm[(n,)](*arguments, D, triton.next_power_of_2(D), added is not None)
    return normed


def gated(gate_up: Tensor) -> Tensor:
    """[n,2F] -> [n,F]: silu of the first half, rounded to the dtype, times the second half."""
    n, F = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(n, F)
    _gated[(n, triton.cdiv(F, COLUMNS))](gate_up, out, F, COLUMNS)
    return out


def block_masses(logits: Tensor, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """How likely each block of the vocabulary is.

    The kernel reads the logits once. It sums each block relative to the block's own largest logit; afterwards the sums
    are rescaled to the largest logit of the row.

    Args:
        logits: [B,V] float32.
        temperature: divides the logits; 0 is read as 1.
        block: entries of a block, a power of 2.

    Returns:
        highest [B,1], the largest logit, and mass [B,ceil(V / block)] float64, the sums of
        exp((logits - highest) / temperature) over each block.
    """
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, block)
    highest, mass = logits.new_empty(rows, blocks), logits.new_empty(rows, blocks)
    scale, sizes = temperature or 1.0, (vocabulary, logits.stride(0), blocks)
    _block_masses[(rows, triton.cdiv(blocks, BLOCKS))](logits, highest, mass, scale, *sizes, BLOCKS, block)
    top = highest.amax(-1, keepdim=True)
    return top, mass.mul_(((highest - top) / scale).exp_()).double()  # float32 until here, as in `sample`


if triton is not None:

    @triton.jit
    def _block_masses(logits, highest, mass, scale, V, stride, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
        """Largest logit and mass of BLOCKS blocks of one row."""
        row = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        word = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(logits + row * stride + word, mask=word < V, other=float("-inf"))
        m = tl.max(x, axis=1)
        finite = tl.where(m == float("-inf"), 0.0, m)
        tl.store(highest + row * blocks + block, m, mask=block < blocks)
        total = tl.sum(tl.exp((x - finite[:, None]) / scale), axis=1)
        tl.store(mass + row * blocks + block, total, mask=block < blocks)

    @triton.jit
    def _add_norm(hidden, added, weight, normed, eps, D, WIDTH: tl.constexpr, ADD: tl.constexpr):
        """Residual addition and norm of one row."""
        column = tl.arange(0, WIDTH)
        inside = column < D
        at = tl.program_id(0).to(tl.int64) * D + column
        x = tl.load(hidden + at, mask=inside, other=0.0)
        if ADD:
            x += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(hidden + at, x, mask=inside)
        y = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * tl.load(weight + column, mask=inside, other=0.0)
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)

    @triton.jit
    def _gated(gate_up, out, F, COLUMNS: tl.constexpr):
        """COLUMNS columns of one row."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < F
        gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
        activated = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
        tl.store(out + row * F + column, (activated * up).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate(
        heads, cos, sin, query, own_k, own_v, lengths, own_width, H, Hkv, d, HEADS: tl.constexpr, HALF: tl.constexpr
    ):
        """For one row: rotate queries and keys; store keys and values behind those of its earlier tokens."""
        row = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, HALF)[None, :]
        half = d // 2
        inside = (head < H + 2 * Hkv) & (column < half)
        at = heads + (row * (H + 2 * Hkv) + head) * d + column
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        angle = row * d + column
        in_row = column < half
        turned_x = x * tl.load(cos + angle, mask=in_row, other=0.0) - y * tl.load(sin + angle, mask=in_row, other=0.0)
        angle += half
        turned_y = y * tl.load(cos + angle, mask=in_row, other=0.0) + x * tl.load(sin + angle, mask=in_row, other=0.0)
        turns = head < H + Hkv
        x = tl.where(turns, turned_x, x).to(query.dtype.element_ty)
        y = tl.where(turns, turned_y, y).to(query.dtype.element_ty)
        at = query + (row * H + head) * d + column
        tl.store(at, x, mask=inside & (head < H))
        tl.store(at + half, y, mask=inside & (head < H))
        token = tl.minimum(tl.load(lengths + row), own_width - 1)
        at = own_k + ((row * Hkv + head - H) * own_width + token) * d + column
        tl.store(at, x, mask=inside & (head >= H) & turns)
        tl.store(at + half, y, mask=inside & (head >= H) & turns)
        at = own_v + ((row * Hkv + head - H - Hkv) * own_width + token) * d + column
        tl.store(at, x, mask=inside & (head >= H + Hkv))
        tl.store(at + half, y, mask=inside & (head >= H + Hkv))

    @triton.jit
    def _nothing_seen(QUERIES: tl.constexpr, WIDTH: tl.constexpr):
        """The initial m, l and out of `_over_keys`, before any key was seen."""
        m = tl.full((QUERIES,), -1e38, dtype=tl.float32)
        return m, tl.zeros((QUERIES,), dtype=tl.float32), tl.zeros((QUERIES, WIDTH), dtype=tl.float32)

    @triton.jit
    def _over_keys(q, keys, values, start, stop, scale, d, m, l, out, KEYS: tl.constexpr, WIDTH: tl.constexpr):
        """Attention of q [M,WIDTH] over tokens start..stop, merged with the keys that were seen before.

        m is the largest score so far, l the sum of exp(score - m), out the sum of exp(score - m) * value.
        """
        column = tl.arange(0, WIDTH)[None, :]
        for first in range(start, stop, KEYS):
            token = first + tl.arange(0, KEYS)
            at = token[:, None] * d + column
            inside = (token < stop)[:, None] & (column < d)
            k = tl.load(keys + at, mask=inside, other=0.0)
            v = tl.load(values + at, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where((token < stop)[None, :], scores, float("-inf"))
            larger = tl.maximum(m, tl.max(scores, axis=1))
            shrink = tl.exp(m - larger)
            weights = tl.exp(scores - larger[:, None])
            l = l * shrink + tl.sum(weights, axis=1)
            out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            m = larger
        return m, l, out

    @triton.jit
    def _over_trunk(
        query, keys, values, partial, lse, scale, n, t, size, R, H, d,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Attention of QUERIES queries over one part of the trunk. They share a key head and may be of several rows."""
        i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        kv, part = tl.program_id(1), tl.program_id(2)
        column = tl.arange(0, WIDTH)[None, :]
        at = (i // R).to(tl.int64) * H + kv * R + i % R
        real = i < n * R
        inside = real[:, None] & (column < d)
        q = tl.load(query + at[:, None] * d + column, mask=inside, other=0.0)
        m, l, out = _nothing_seen(QUERIES, WIDTH)
        of_head = kv.to(tl.int64) * t * d
        start, stop = part * size, tl.minimum(part * size + size, t)
        m, l, out = _over_keys(q, keys + of_head, values + of_head, start, stop, scale, d, m, l, out, KEYS, WIDTH)
        at += part * n * H
        tl.store(partial + at[:, None] * d + column, out / l[:, None], mask=inside)
        tl.store(lse + at, m + tl.log(l), mask=real)

    @triton.jit
    def _over_rows(
        query, partial, lse, result, branch_k, branch_v, own_k, own_v, group, branch_lengths, lengths, scale,
        n, parts, branch_width, own_width, R, H, Hkv, d,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """The queries of one row and key head: merge the trunk's parts, then attend over branch and own tokens."""
        row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
        i = tl.arange(0, QUERIES)
        column = tl.arange(0, WIDTH)[None, :]
        at = row * H + kv * R + i
        inside = (i < R)[:, None] & (column < d)
        q = tl.load(query + at[:, None] * d + column, mask=inside, other=0.0)
        m, l, out = _nothing_seen(QUERIES, WIDTH)
        for part in range(parts):
            place = at + part * n * H
            score = tl.load(lse + place, mask=i < R, other=0.0)
            larger = tl.maximum(m, score)
            shrink, weight = tl.exp(m - larger), tl.exp(score - larger)
            value = tl.load(partial + place[:, None] * d + column, mask=inside, other=0.0)
            out = out * shrink[:, None] + value * weight[:, None]
            l = l * shrink + weight
            m = larger
        prompt = tl.load(group + row)
        at_k = (prompt * Hkv + kv) * branch_width * d
        stop = tl.load(branch_lengths + prompt)
        m, l, out = _over_keys(q, branch_k + at_k, branch_v + at_k, 0, stop, scale, d, m, l, out, KEYS, WIDTH)
        at_k = (row * Hkv + kv) * own_width * d
        stop = tl.minimum(tl.load(lengths + row) + 1, own_width)
        m, l, out = _over_keys(q, own_k + at_k, own_v + at_k, 0, stop, scale, d, m, l, out, KEYS, WIDTH)
        out = (out / l[:, None]).to(result.dtype.element_ty)
        tl.store(result + at[:, None] * d + column, out, mask=inside)
