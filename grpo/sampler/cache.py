"""The key-value cache of sampling, and attention of one new token per row over it.

`PrefillAttention` has computed the keys and values of the prompts' tree. `DecodeAttention` stores those of a prompt
once per group, not once per row. So neither compute nor memory of a prompt grows with the group size. Rows may leave
and groups may join at any time. Left out: which tokens are drawn, and when a row ends (`generate.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grpo.policy.attention import KeysValues, Pair
from grpo.policy.attention_parts import fused_part


class DecodeAttention:
    """Attention of one new token per row over three parts: the trunk, the row's branch, and the row's own tokens.

    - The trunk is the token prefix that all prompts share, such as few-shot exemplars. All rows read it in one product.
    - A branch is the rest of a prompt. All rows of its group read it in one product.
    - The own tokens of a row are those of its completion so far.

    On a CPU, a fused kernel computes each part, and their log-sum-exps merge them. Elsewhere one softmax runs over the
    scores of all three. Both are exact, and compute in float32 as learning does: bfloat16 scores cost 0.1 nat.

    All buffers are allocated here and keep their addresses; `join` and `keep` write into them. With `grain` above 1,
    the shapes that `attend` works on are rounded up to multiples of it, and the padding is hidden. So only few shapes
    occur, and a CUDA graph of each can be replayed.

    Shapes: n rows of `max_rows`, N groups, R query heads per key head, t trunk tokens, W places for tokens in a buffer.
    Buffers are [.., Hkv, W, d], one per layer.
    """

    def __init__(
        self, trunk: KeysValues, *, max_rows: int, max_groups: int, max_branch: int, max_new_tokens: int, grain: int = 1
    ):
        """Allocate the buffers.

        Args:
            trunk: buffers [Hkv,t,d] per layer for keys and values, which are read in place; `set_trunk` fills them.
            max_rows, max_groups: the most rows and prompts in flight at one time.
            max_branch: the most tokens of a branch.
            max_new_tokens: the most own tokens of a row.
            grain: rows, groups and own tokens are rounded up to multiples of it. With 1 shapes are exact, and the fused
                kernel is used, which only CPUs have.
        """
        self.trunk, self.grain = trunk, grain
        keys = trunk[0][0]
        Hkv, self.trunk_length, d = keys.shape

        def room(count: int, width: int) -> Tensor:
            return keys.new_zeros(count, Hkv, width, d)

        def numbers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.long, device=keys.device)

        self.branch = [(room(max_groups, max_branch), room(max_groups, max_branch)) for _ in trunk]
        self.own = [(room(max_rows, max_new_tokens), room(max_rows, max_new_tokens)) for _ in trunk]
        self.branch_lengths, self.group = numbers(max_groups), numbers(max_rows)
        self.lengths, self.place = numbers(max_rows), numbers(max_rows)
        """Number of own tokens of each row, and the row's cell in the grid [groups, places]."""
        self.of_row: list[tuple[int, int]] = []
        """On the host, for each row alive: its group and its number of own tokens."""
        self.num_groups = 0

    def restart(self) -> None:
        """Forget all rows and groups; the buffers stay."""
        self.of_row, self.num_groups = [], 0

    def set_trunk(self, prefilled: KeysValues) -> None:
        """Copy the trunk into its buffers: the first t tokens of keys and values [Hkv,S,d] per layer."""
        for ours, theirs in zip(self.trunk, prefilled, strict=True):
            for buffer, kept in zip(ours, theirs, strict=True):
                buffer.copy_(kept[:, : self.trunk_length])

    @property
    def longest(self) -> int:
        """The most own tokens of any row."""
        return max((length for _, length in self.of_row), default=0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes that `attend` works on: rows, groups, rows of a group, own tokens including the next one."""

        def up(size: int, limit: int) -> int:
            return min(-(-size // self.grain) * self.grain, limit)

        rows, groups = up(len(self.of_row), len(self.lengths)), up(self.num_groups, len(self.branch_lengths))
        return rows, groups, self.places, up(self.longest + 1, self.own[0][0].shape[2])

    @property
    def key(self) -> tuple:
        """Decoding steps with the same key can replay the same CUDA graph."""
        return *self.shape, self.dense

    def join(self, prefilled: KeysValues, tails: Sequence[Tensor], group_size: int) -> None:
        """Add the rows of further prompts behind those that are there.

        Args:
            prefilled: keys and values [Hkv,S,d] per layer.
            tails: for each prompt, the indices in S of its branch; on the CPU.
            group_size: rows per prompt.
        """
        groups = slice(self.num_groups, self.num_groups + len(tails))
        device = self.branch_lengths.device
        at = nn.utils.rnn.pad_sequence(list(tails), batch_first=True).to(device)  # padding is hidden by `branch_bias`
        for buffers, source in zip(self.branch, prefilled, strict=True):
            for buffer, kept in zip(buffers, source, strict=True):
                buffer[groups, :, : at.shape[1]] = kept[:, at].transpose(0, 1)
        lengths = list(map(len, tails))
        self.branch_lengths[groups] = torch.tensor(lengths).to(device)
        self.of_row += [(i, 0) for i in range(groups.start, groups.stop) for _ in range(group_size)]
        self.num_groups = groups.stop
        self._place_rows()

    def keep(self, alive: Tensor) -> Tensor:
        """Drop finished rows.

        Args:
            alive: [n] bool on the CPU, in the present order of rows.

        Returns:
            [m] int64 on the CPU: for each of the m rows that stay, its index before. As few rows as possible move.
        """
        order, holes, movers = _fill_holes(alive)
        _move([x[:, :, : self.longest] for buffers in self.own for x in buffers], holes, movers)
        self.of_row = [self.of_row[i] for i in order.tolist()]
        self._drop_empty_groups()
        self._place_rows()
        return order

    def begin(self) -> None:
        """Prepare the next token: indices and masks that all layers share.

        Where decoding steps are captured, this reads no value from the device to the host.
        """
        rows, groups, _, width = self.shape
        longest_branch = self.branch[0][0].shape[2]
        at = torch.arange(max(rows, width, longest_branch), device=self.lengths.device)
        column = self.lengths[:rows].clamp(max=self.own[0][0].shape[2] - 1)

        def hide(beyond: Tensor) -> Tensor:
            return self.own[0][0].new_zeros(()).masked_fill(beyond[:, None, None], -torch.inf)

        self.newest = at[:rows], slice(None), column
        self.branch_bias = hide(at[:longest_branch] >= self.branch_lengths[:groups, None])
        self.own_bias = None
        if self.grain == 1 and len({length for _, length in self.of_row}) == 1:
            self.newest = slice(rows), slice(None), self.longest  # slices are written several times faster
        else:
            self.own_bias = hide(at[:width] > column[:, None])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store key and value [n,Hkv,d] of the rows' newest tokens, and attend with query [n,H,d] -> [n,H,d]."""
        n, Hkv, d = key.shape
        for buffer, x in zip(self.own[layer], (key, value), strict=True):
            buffer[self.newest] = x.to(buffer.dtype)
        _, groups, _, width = self.shape
        own_k, own_v = (buffer[:n, :, :width] for buffer in self.own[layer])
        branch_k, branch_v = (buffer[:groups] for buffer in self.branch[layer])
        attend = self._in_parts if self.grain == 1 else self._by_one_softmax
        rows = query.to(own_k.dtype).view(n, Hkv, -1, d)
        out = attend(rows, self.trunk[layer], (branch_k, branch_v), (own_k, own_v), scaling)
        return out.to(query.dtype).reshape(query.shape)

    def _in_parts(self, q: Tensor, trunk: Pair, branch: Pair, own: Pair, scaling: float) -> Tensor:
        """[n,Hkv,R,d] -> [n,Hkv,R,d]: `sum_i softmax(l)_i o_i`, with output o_i and log-sum-exp l_i of each part."""
        n, Hkv, R, d = q.shape
        heads_first = q.transpose(0, 1).contiguous()
        q = heads_first.transpose(0, 1)  # in this layout `_by_group` of whole groups is a view
        parts = [fused_part(q, *own, scaling, bias=self.own_bias)]
        out, lse = fused_part(self._by_group(q), *branch, scaling, bias=self.branch_bias)
        parts.append((self._by_row(out, n, R), self._by_row(lse[..., None], n, R)[..., 0]))
        if self.trunk_length:
            out, lse = fused_part(heads_first.view(1, Hkv, n * R, d), *(x[None] for x in trunk), scaling)
            parts.append((out.view(Hkv, n, R, d).transpose(0, 1), lse.view(Hkv, n, R).transpose(0, 1)))
        outs, lses = zip(*parts, strict=True)
        weights = torch.softmax(torch.stack(lses), 0)[..., None]
        merged = outs[0] * weights[0]
        for out, weight in zip(outs[1:], weights[1:], strict=True):
            merged.addcmul_(out, weight)
        return merged

    def _by_one_softmax(self, q: Tensor, trunk: Pair, branch: Pair, own: Pair, scaling: float) -> Tensor:
        """[n,Hkv,R,d] -> [n,Hkv,R,d]. Scores are laid out heads first, so that the many over the trunk need no copy."""
        n, Hkv, R, d = q.shape
        heads_first = (q.transpose(0, 1) * scaling).contiguous()
        q = heads_first.transpose(0, 1)
        over_trunk = torch.bmm(heads_first.flatten(1, 2), trunk[0].transpose(1, 2)).view(Hkv, n, R, -1)
        over_branch = torch.matmul(self._by_group(q), branch[0].transpose(2, 3)).add_(self.branch_bias)
        over_own = torch.matmul(q, own[0].transpose(2, 3))
        if self.own_bias is not None:
            over_own += self.own_bias
        scores = [over_trunk, self._by_row(over_branch, n, R).transpose(0, 1), over_own.transpose(0, 1)]
        weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1)
        on_trunk, on_branch, on_own = weights.split([keys.shape[-2] for keys, _ in (trunk, branch, own)], dim=-1)
        out = torch.matmul(on_own.transpose(0, 1), own[1])
        out += torch.bmm(on_trunk.flatten(1, 2), trunk[1]).view(Hkv, n, R, d).transpose(0, 1)
        out += self._by_row(torch.matmul(self._by_group(on_branch.transpose(0, 1)), branch[1]), n, R)
        return out

    def advance(self, steps: int = 1) -> None:
        """Count this many further tokens for every row, on the host."""
        self.of_row = [(group, length + steps) for group, length in self.of_row]

    def _drop_empty_groups(self) -> None:
        """Forget branches without rows; the last branches move into their places."""
        used = torch.zeros(self.num_groups, dtype=torch.bool)
        used[[group for group, _ in self.of_row]] = True
        order, holes, movers = _fill_holes(used)
        _move([self.branch_lengths, *(x for buffers in self.branch for x in buffers)], holes, movers)
        now = {before: group for group, before in enumerate(order.tolist())}
        self.of_row = [(now[group], length) for group, length in self.of_row]
        self.num_groups = len(order)

    def _place_rows(self) -> None:
        """Give every row a cell in a grid [groups, places], for products of whole groups, and copy it to the device."""
        n, taken, cells = len(self.of_row), [0] * self.num_groups, []
        for group, _ in self.of_row:
            cells.append(taken[group])
            taken[group] += 1
        self.places = max(taken, default=0)
        if self.grain > 1:
            self.places = max(self.places, len(self.lengths) // len(self.branch_lengths))
        group, length = torch.tensor(self.of_row, dtype=torch.long).view(n, 2).unbind(1)
        place = group * self.places + torch.tensor(cells, dtype=torch.long)
        spare = self.shape[1] * self.places
        self.dense = self.shape[0] == n == spare and bool((place == torch.arange(n)).all())
        for buffer, values, rest in ((self.group, group, 0), (self.lengths, length, 0), (self.place, place, spare)):
            buffer.fill_(rest)
            buffer[:n] = values.to(buffer.device)

    def _by_group(self, rows: Tensor) -> Tensor:
        """[n,Hkv,R,x] -> [N,Hkv,places*R,x]. Cells without a row hold 0; padding rows go to a cell behind the grid."""
        (n, Hkv, R, x), N = rows.shape, self.shape[1]
        if not self.dense:
            grid = rows.new_zeros(N * self.places + 1, Hkv, R, x)
            grid[self.place[:n]] = rows
            rows = grid[:-1]
        return rows.view(N, self.places, Hkv, R, x).transpose(1, 2).reshape(N, Hkv, -1, x)

    def _by_row(self, groups: Tensor, n: int, R: int) -> Tensor:
        """The inverse of `_by_group`: [N,Hkv,places*R,x] -> [n,Hkv,R,x]."""
        N, Hkv, _, x = groups.shape
        grid = groups.view(N, Hkv, self.places, R, x).transpose(1, 2).reshape(N * self.places, Hkv, R, x)
        return grid if self.dense else grid[self.place[:n].clamp(max=len(grid) - 1)]


def _move(buffers: Sequence[Tensor], holes: Tensor, movers: Tensor) -> None:
    """Copy entries `movers` to `holes` in each buffer. Both are on the CPU, and sent to the device once."""
    if len(holes):
        holes, movers = (x.to(buffers[0].device) for x in (holes, movers))
        for buffer in buffers:
            buffer[holes] = buffer[movers]


def _fill_holes(alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the places that are not alive [n] with the last entries that are.

    Returns:
        The new order [m] of the m entries that stay, the free places below m, and which entry moves into each.
    """
    places = torch.arange(len(alive))
    m = int(alive.sum())
    holes, movers = places[:m][~alive[:m]], places[m:][alive[m:]]
    order = places[:m].clone()
    order[holes] = movers
    return order, holes, movers
