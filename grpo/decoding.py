"""Attention while sampling: the prompts' tree once, then one new token per row over what was computed.

`PrefillAttention` keeps the keys and values of the prompts' tree; `DecodeAttention` reads them in place, so that
neither compute nor memory of a prompt is multiplied by its group. Left out: what is drawn, and when a row ends
(`sampler.py`).
"""

import torch
from torch import Tensor

from grpo.attention import TreeAttention
from grpo.tree import Trie, common_prefix


class PrefillAttention(TreeAttention):
    """Tree attention that keeps every layer's keys and values, in float32: the prompt side of a decode."""

    def __init__(self, position_ids: Tensor, subtree_end: Tensor, heads_per_key: int):
        super().__init__(position_ids, subtree_end, heads_per_key)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        assert layer == len(self.keys), "layers must run once each, in order"
        compute = torch.promote_types(query.dtype, torch.float32)
        self.keys.append(key[0].to(compute))
        self.values.append(value[0].to(compute))
        return super().attend(layer, query, key, value, scaling)


class DecodeAttention:
    """Attention of one new token per row over three parts: the trunk, the row's branch, and the row's own tokens.

    The trunk is the common prefix of all prompts (few-shot exemplars): one matrix product for all rows. A branch is the
    rest of a prompt: one product for all rows of its group. Neither is copied per row. One softmax runs over the
    scores of the three, so the merge is exact, in float32 as in learning (scores rounded to bfloat16 cost 0.1 nat).
    Rows that finish leave: `keep` moves the last rows into their places.

    Shapes: n rows alive of B, N groups, R query heads per key head; buffers are [Hkv, ..., d], one per layer.
    """

    def __init__(self, prefill: PrefillAttention, trie: Trie, group_size: int, max_new_tokens: int):
        """Cut the prefilled keys and values into trunk and branches, and make room for the rows' own tokens.

        Args:
            prefill: what the forward over the prompts' tree kept.
            trie: that tree; `trie.paths` has one path per prompt.
            group_size: rows per prompt; row `i * group_size + j` belongs to prompt i.
            max_new_tokens: room for own tokens per row.
        """
        paths = trie.paths
        first = prefill.keys[0]
        Hkv, _, d = first.shape
        N, B, device = len(paths), len(paths) * group_size, first.device
        trunk = min(common_prefix(paths[0], path) for path in paths)
        tails = [torch.from_numpy(path[trunk:]) for path in paths]
        gather = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device)
        self.branch_lengths = torch.tensor([len(tail) for tail in tails], device=device)
        self.trunk = [(k[:, :trunk], v[:, :trunk]) for k, v in zip(prefill.keys, prefill.values, strict=True)]
        self.branch = [(k[:, gather], v[:, gather]) for k, v in zip(prefill.keys, prefill.values, strict=True)]
        room = (Hkv, B, max_new_tokens, d)
        self.own = [(first.new_empty(room), first.new_empty(room)) for _ in prefill.keys]
        self.length = 0
        self.group = torch.arange(N, device=device).repeat_interleave(group_size)
        self._place_rows()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1,H,n,d], key and value [1,Hkv,n,d] of the rows' newest tokens -> [1,n,H,d]. Stores key and value."""
        _, H, n, d = query.shape
        Hkv = key.shape[1]
        R, t = H // Hkv, self.length
        own_k, own_v = (buffer[:, :n, : t + 1] for buffer in self.own[layer])
        own_k[:, :, t], own_v[:, :, t] = key[0], value[0]
        q = (query.to(own_k.dtype) * scaling).view(Hkv, R, n, d).transpose(1, 2).contiguous()
        (trunk_k, trunk_v), (branch_k, branch_v) = self.trunk[layer], self.branch[layer]

        with torch.autocast(query.device.type, enabled=False):
            over_trunk = torch.bmm(q.view(Hkv, n * R, d), trunk_k.transpose(1, 2)).view(Hkv, n, R, -1)
            over_branch = torch.matmul(self._by_group(q), branch_k.transpose(2, 3))
            over_branch = self._by_row(over_branch.masked_fill_(self.branch_hidden, -torch.inf), R)
            over_own = torch.matmul(q, own_k.transpose(2, 3))

            sizes = [over_trunk.shape[-1], over_branch.shape[-1], t + 1]
            weights = torch.softmax(torch.cat([over_trunk, over_branch, over_own], dim=-1), dim=-1)
            on_trunk, on_branch, on_own = weights.split(sizes, dim=-1)

            out = torch.matmul(on_own, own_v)
            out += torch.bmm(on_trunk.reshape(Hkv, n * R, -1), trunk_v).view(Hkv, n, R, d)
            out += self._by_row(torch.matmul(self._by_group(on_branch), branch_v), R)
        return out.to(query.dtype).transpose(0, 1).reshape(1, n, H, d)

    def advance(self) -> None:
        """The newest tokens of all rows are stored in all layers: the next call appends behind them."""
        self.length += 1

    def keep(self, alive: Tensor) -> Tensor:
        """Drop finished rows.

        Args:
            alive: [n] bool on the CPU, in the present order of rows.

        Returns:
            [m] int64 on the CPU: which present row each of the m rows that stay is; rows move as little as possible.
        """
        rows = torch.arange(len(alive))
        m = int(alive.sum())
        holes, movers = rows[:m][~alive[:m]], rows[m:][alive[m:]]
        order = rows[:m].clone()
        order[holes] = movers
        if len(holes):
            t = self.length
            for buffers in self.own:
                for buffer in buffers:
                    buffer[:, holes, :t] = buffer[:, movers, :t]
        self.group = self.group[order.to(self.group.device)]
        self._drop_empty_groups()
        self._place_rows()
        return order

    def _drop_empty_groups(self) -> None:
        """Forget branches without rows once they are half of all: copying then costs O(1) per branch over a run."""
        used = torch.unique(self.group)
        if len(used) * 2 > len(self.branch_lengths):
            return
        self.branch = [(k[:, used], v[:, used]) for k, v in self.branch]
        self.branch_lengths = self.branch_lengths[used]
        self.group = torch.searchsorted(used, self.group)

    def _place_rows(self) -> None:
        """Give every row a place in a [groups, places] grid, for products of whole groups."""
        n, N = len(self.group), len(self.branch_lengths)
        order = torch.argsort(self.group, stable=True)
        counts = torch.bincount(self.group, minlength=N)
        first = torch.cumsum(counts, 0) - counts
        within = torch.empty_like(self.group)
        within[order] = torch.arange(n, device=order.device) - first[self.group[order]]
        self.places = int(counts.max()) if n else 0
        self.place = self.group * self.places + within
        self.dense = n == N * self.places and bool((self.place == torch.arange(n, device=order.device)).all())
        positions = torch.arange(self.branch[0][0].shape[2], device=order.device)
        self.branch_hidden = (positions >= self.branch_lengths[:, None])[:, None, :]

    def _by_group(self, rows: Tensor) -> Tensor:
        """[Hkv,n,R,x] -> [Hkv,N,places*R,x]; places without a row hold 0."""
        Hkv, _, R, x = rows.shape
        N = len(self.branch_lengths)
        if not self.dense:
            grid = rows.new_zeros(Hkv, N * self.places, R, x)
            grid[:, self.place] = rows
            rows = grid
        return rows.reshape(Hkv, N, self.places * R, x)

    def _by_row(self, groups: Tensor, R: int) -> Tensor:
        """[Hkv,N,places*R,x] -> [Hkv,n,R,x]."""
        Hkv, N, _, x = groups.shape
        grid = groups.view(Hkv, N * self.places, R, x)
        return grid if self.dense else grid[:, self.place]
