"""One token of every row on a GPU in ten kernels a layer: four matrix products, and six written here (Triton).

A step of decoding is many small operations, and on a GPU each takes as long to start as to compute. So what lies
between two products is one kernel: residual and norm; rotation of queries and keys, which go where they are kept;
attention over the trunk, all rows together; attention over a row's branch and its own tokens, joined with the trunk's
by log-sum-exp; the gate of the MLP. Scores and sums are float32. Loops end where a row ends, so that one captured graph
serves all lengths. Left out: prefill; float32; tuning; the decoder that calls them (`sampler/decoder_fused.py`).
"""

import torch
from torch import Tensor, nn

from grpo.kernels.compiled import can_compile

try:  # comes with torch where there is a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

Pair = tuple[Tensor, Tensor]

KERNELS = True
"""False: a GPU samples by the plain operations."""
WIDEST = 128
"""The widest head whose tiles fit into the shared memory of all GPUs from Ampere on."""
QUERIES, KEYS = 64, 64
"""A tile of scores over the trunk; over a row's own tokens it has the queries of a key head alone, at least 16."""
PROGRAMS = 264
"""The trunk is cut into parts until so many programs attend to it: two for each processor of an H100."""
COLUMNS = 1024
"""Of the MLP, in one program."""
BLOCKS = 8
"""Blocks of the vocabulary in one program."""


def usable(device: str, half: bool) -> bool:
    """Whether steps are these kernels: in half precision, on a GPU where Triton can compile."""
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
    """Attention of the newest token of every row over trunk, branch and own tokens, its own key and value kept first.

    Args:
        heads: [n,H+2*Hkv,d] queries, keys, values.
        cos, sin: [n,d] of their positions, with equal halves.
        scaling: of the scores.
        trunk: keys and values [Hkv,t,d] that all rows read.
        branch: [N,Hkv,W,d], of each group.
        own: [n,Hkv,W,d], of each row; the new ones are written there.
        group: [n] the group of each row.
        branch_lengths: [N] tokens of each branch.
        lengths: [n] own tokens of each row so far.

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
    """The residual stream and its norm.

    Args:
        hidden: [n,D] float32, to which `added` is added in place.
        added: [n,D], or None.
        norm: its `weight` [D] and `variance_epsilon`.
        dtype: of the result.

    Returns:
        [n,D] x / rms(x) * weight.
    """
    n, D = hidden.shape
    normed = hidden.new_empty(n, D, dtype=dtype)
    arguments = hidden, hidden if added is None else added, norm.weight, normed, norm.variance_epsilon
    _add_norm[(n,)](*arguments, D, triton.next_power_of_2(D), added is not None)
    return normed


def gated(gate_up: Tensor) -> Tensor:
    """[n,2F] -> [n,F]: silu of the first half, rounded, times the second."""
    n, F = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(n, F)
    _gated[(n, triton.cdiv(F, COLUMNS))](gate_up, out, F, COLUMNS)
    return out


def block_masses(logits: Tensor, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """How likely each block of the vocabulary is, from one look at the logits: each by its own largest one, then all.

    Args:
        logits: [B,V] float32.
        temperature: divides them; 0 reads as 1.
        block: entries of a block, a power of 2.

    Returns:
        highest [B,1], the largest logit, and mass [B,ceil(V / block)] float64.
    """
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, block)
    highest, mass = logits.new_empty(rows, blocks), logits.new_empty(rows, blocks)
    scale, sizes = temperature or 1.0, (vocabulary, logits.stride(0), blocks)
    _block_masses[(rows, triton.cdiv(blocks, BLOCKS))](logits, highest, mass, scale, *sizes, BLOCKS, block)
    top = highest.amax(-1, keepdim=True)
    return top, mass.mul_(((highest - top) / scale).exp_()).double()  # in float32, as `sample` looks into a block


if triton is not None:

    @triton.jit
    def _block_masses(logits, highest, mass, scale, V, stride, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
        """BLOCKS blocks of one row."""
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
        """Of one row."""
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
        """COLUMNS of one row."""
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
        """Of one row: queries and keys turned, keys and values stored behind those of its earlier tokens."""
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
        """m, l and out of `_over_keys` before the first key."""
        m = tl.full((QUERIES,), -1e38, dtype=tl.float32)
        return m, tl.zeros((QUERIES,), dtype=tl.float32), tl.zeros((QUERIES, WIDTH), dtype=tl.float32)

    @triton.jit
    def _over_keys(q, keys, values, start, stop, scale, d, m, l, out, KEYS: tl.constexpr, WIDTH: tl.constexpr):
        """Attention of q [M,WIDTH] over tokens start..stop, joined with what was seen before.

        m: largest score, l: sum of exp(score - m), out: sum of exp(score - m) * value.
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
        """QUERIES of one key head, of any rows, over one part of the trunk."""
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
        """The queries of one row and key head: what the trunk gave, over the branch, over the row's own tokens."""
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
