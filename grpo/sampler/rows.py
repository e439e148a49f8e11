"""The device side of sampling: rows join, draw a token each, and leave.

On a CPU every shape is exact. On a GPU shapes are rounded up to a few sizes, and buffers are kept for the whole run.
There a decoding step (forward, head, uniforms, draw of one token per row) is captured as one CUDA graph per size and
replayed. So the host neither launches kernels one by one nor reads a value between two checks for ended rows. Left out:
these checks (`generate.py`).
"""

from collections.abc import Callable, Sequence
from operator import le

import numpy as np
import torch
from torch import Tensor

from grpo.kernels import decode, heap
from grpo.logprobs import NO_WORD, head_for, product
from grpo.policy import Policy
from grpo.policy.attention import KeysValues, PrefillAttention
from grpo.sampler import decoder_fused
from grpo.sampler.cache import DecodeAttention
from grpo.sampler.decoder_fused import FusedDecodeAttention, FusedRows
from grpo.sampler.draw import Draw, block_masses, sample, streams, uniforms_at
from grpo.sampler.products import FewRows, Joint, fits
from grpo.tree import build_trie

GRAIN = {"cpu": 1, "cuda": 32}
"""Numbers of rows and own tokens are rounded up to multiples of this, by device."""


class Rows:
    """The rows in flight. Built once per run; `start` allocates buffers, or uses the present ones if they suffice."""

    def __init__(self, policy: Policy, *, own: bool = False, kernels: bool = True):
        """Prepare decoding for a policy. If its weights are changed in place, the next `start` takes them up.

        Args:
            policy: what to sample from.
            own: True if the policy is the sampler's own copy, whose weights may be moved in memory.
            kernels: allow the kernels of `kernels/decode.py`.
        """
        self.policy = policy
        self.grain = GRAIN[policy.device.type]
        usable = decode.usable(policy.device.type, policy.autocast_dtype is not None)
        few = fits(policy)
        self.fused = kernels and few and usable and policy.heads.width <= decode.WIDEST
        self.rounded_to = policy.autocast_dtype if self.fused else None
        """The dtype of stored keys and values; None: float32 or wider."""
        kind = FusedRows if self.fused else FewRows
        self.ops = kind(policy.model, own=own) if few else None
        self.head = Joint([policy.head], [None])
        self.products = [self.head, *(self.ops.joint.values() if self.ops else ())]
        self.graphs: dict[tuple, Callable[[], None]] = {}
        on_gpu, half = policy.device.type == "cuda", policy.autocast_dtype
        self.rounded_head = head_for(policy.head.detach(), half) if on_gpu and half else None
        self.warming = torch.cuda.Stream() if on_gpu else None
        self._forget()

    @property
    def num_groups(self) -> int:
        """Prompts in flight."""
        return self.attention.num_groups

    def start(
        self, draw: Draw, trunk: Sequence[int], max_rows: int, max_groups: int, max_branch: int, max_new_tokens: int
    ) -> None:
        """Begin a `generate`: allocate buffers, or use the present ones if they suffice.

        Args:
            draw: seed, purpose, step and temperature of all draws.
            trunk: token ids that all prompts begin with, may be none; prefilled together with the first prompts.
            max_rows, max_groups: the most rows and prompts in flight at one time.
            max_branch: the most tokens of a branch, which is the rest of a prompt after the trunk.
            max_new_tokens: the most tokens drawn for a row.
        """
        self.draw = draw
        if self.rounded_head is not None:
            self.rounded_head[: self.policy.vocab_size] = self.policy.head
        self.trunk_length, self.trunk_known = len(trunk), False
        for joint in self.products:
            joint.pack()
        sizes = (len(trunk), max_rows, max_groups, max_branch, max_new_tokens)
        if self.sizes and len(trunk) == self.sizes[0] and all(map(le, sizes, self.sizes)):
            self.attention.restart()
        else:
            if self.grain > 1:  # never smaller than before: then buffers soon stop changing
                branch = -(-max_branch // self.grain) * self.grain
                wanted = max_rows, max_groups, branch, max_new_tokens
                max_rows, max_groups, max_branch, max_new_tokens = map(max, wanted, (self.sizes or (0,) * 5)[1:])
                sizes = (len(trunk), max_rows, max_groups, max_branch, max_new_tokens)
            self._forget()
            attention = FusedDecodeAttention if self.fused else DecodeAttention
            self.attention = attention(
                self._room_for_trunk(),
                max_rows=max_rows,
                max_groups=max_groups,
                max_branch=max_branch,
                max_new_tokens=max_new_tokens,
                grain=self.grain,
            )
            self.ids = torch.zeros(max_rows, max_new_tokens, dtype=torch.long, device=self.policy.device)
            self.stream, self.prompt_length, self.newest = (self.ids.new_zeros(max_rows) for _ in range(3))
            dtype = torch.promote_types(self.policy.head.dtype, torch.float32)
            self.drawn_logprobs = self.ids.new_zeros(self.ids.shape, dtype=dtype)
            self.sizes = sizes

    def stop(self) -> None:
        """End a `generate`. On a CPU free the buffers and packed weights, because learning comes next."""
        if self.grain == 1:
            self._forget()
            for joint in self.products:
                joint.unpack()
            heap.give_back()  # the next buffers have another size

    def _forget(self) -> None:
        """Free the buffers, the graphs that hold their addresses, and the memory pool of the graphs.

        Graphs may share one pool: they run one after another, and no step reads what an earlier one left there.
        """
        self.sizes = self.attention = None
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.policy.device.type == "cuda" else None

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], group_size: int) -> None:
        """Add the rows of further prompts, and draw the first token of each.

        Args:
            prompts: token lists, which all begin with the trunk and are longer than it.
            index: the place of each prompt in the step, over all ranks.
            group_size: rows per prompt.
        """
        n, new = len(self.attention.of_row), len(prompts) * group_size
        kept, tails, hidden = self._prefill(prompts)
        self.attention.join(kept, tails, group_size)
        rows, draw = slice(n, n + new), self.draw
        number, length = (torch.tensor(x)[:, None] for x in (list(index), list(map(len, prompts))))
        stream = streams(draw.seed, draw.purpose, draw.step, number, torch.arange(group_size))
        self.stream[rows], self.prompt_length[rows] = stream.flatten(), length.expand_as(stream).flatten()
        self._draw(self._logits(hidden).repeat_interleave(group_size, 0), rows)

    def decode(self, steps: int) -> None:
        """Draw this many further tokens for every row."""
        for _ in range(steps):
            if self.policy.device.type == "cuda":
                self._replay()
            else:
                self._step()
            self.attention.advance()

    def drawn(self) -> tuple[Tensor, list[int]]:
        """The ids drawn so far [n,longest], copied to the host, and how many of them each row has."""
        lengths = [length + 1 for _, length in self.attention.of_row]
        return self.ids[: len(lengths), : max(lengths)].cpu(), lengths

    def logprobs(self) -> Tensor:
        """The log-probabilities of the ids that `drawn` returns [n,longest], copied to the host."""
        lengths = [length + 1 for _, length in self.attention.of_row]
        return self.drawn_logprobs[: len(lengths), : max(lengths)].cpu()

    def keep(self, alive: Tensor) -> Tensor:
        """Drop finished rows. Argument and result are those of `DecodeAttention.keep`."""
        order = self.attention.keep(alive)
        at = order.to(self.policy.device)
        per_row = (self.stream, self.prompt_length, self.newest, self.ids, self.drawn_logprobs)
        for buffer in per_row:
            buffer[: len(at)] = buffer[at]
        return order

    def _prefill(self, prompts) -> tuple[KeysValues, list[Tensor], Tensor]:
        """Compute the prompts' tree once. The trunk is computed with the first prompts only.

        Returns:
            Keys and values of the tree; for each prompt, the flat indices of its branch; the hidden states
            [len(prompts),D] of the last tokens.
        """
        trie, device = build_trie(prompts), self.policy.device
        skipped = self.trunk_length if self.trunk_known else 0
        position_ids = torch.from_numpy(trie.position_ids)
        plan = position_ids, torch.from_numpy(trie.subtree_end), self.policy.heads.per_key
        trunk = self.attention.trunk if skipped else None
        attention = PrefillAttention(*plan, trunk, device, rounded_to=self.rounded_to)
        last = torch.from_numpy(np.array([path[-1] for path in trie.paths])).to(device) - skipped
        with self.policy.autocast():
            input_ids = torch.from_numpy(trie.input_ids[skipped:]).to(device)
            hidden = self.policy.hidden_states(input_ids, position_ids[skipped:].to(device), attention)[last]
        if not self.trunk_known:
            self.attention.set_trunk(attention.kept)
            self.trunk_known = True
        tails = [torch.from_numpy(path[self.trunk_length :]) for path in trie.paths]
        return attention.kept, tails, hidden

    def _room_for_trunk(self) -> KeysValues:
        """Unfilled buffers for the trunk's keys and values."""
        layers = self.policy.model.config.get_text_config().num_hidden_layers
        dtype = self.rounded_to or torch.promote_types(self.policy.head.dtype, torch.float32)
        shape = self.policy.heads.key_heads, self.trunk_length, self.policy.heads.width

        def room() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.policy.device)

        return [(room(), room()) for _ in range(layers)]

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n,D] -> [n,V]: the head's product, returned in float32 as in learning."""
        if hidden.device.type == "cpu":
            logits = self.head(hidden)
        else:
            head = self.policy.head if self.rounded_head is None else self.rounded_head
            logits = product(hidden.to(head.dtype), head.t())[:, : self.policy.vocab_size]
        absent = self.policy.absent
        return logits if absent is None else logits.masked_fill_(absent, NO_WORD)

    def _draw(self, logits: Tensor, rows: slice) -> None:
        """Draw the next token of these rows, and store it with its log-probability."""
        tokens = self.attention.lengths[rows]
        masses = decoder_fused.block_masses if self.fused else block_masses
        ids, logprobs = sample(logits, uniforms_at(self.stream[rows], tokens), self.draw.temperature, masses)
        at = torch.arange(rows.start, rows.stop, device=ids.device)
        tokens = tokens.clamp(max=self.ids.shape[1] - 1)
        self.newest[rows] = ids
        self.ids[at, tokens], self.drawn_logprobs[at, tokens] = ids, logprobs

    def _step(self) -> None:
        """Draw one token for every row. No value is read back, so all of it can run inside a CUDA graph."""
        n = self.attention.shape[0]
        self.attention.begin()
        position_ids = self.prompt_length[:n] + self.attention.lengths[:n]
        if self.ops:
            hidden = self.policy.model.model(self.newest[:n], position_ids, self.attention, self.ops, eager=True)
        else:
            with self.policy.autocast():
                hidden = self.policy.hidden_states(self.newest[:n], position_ids, self.attention)
        logits = self._logits(hidden)
        self.attention.lengths[:n] += 1
        self._draw(logits, slice(0, n))

    def _replay(self) -> None:
        """Run `_step` as a CUDA graph, which is captured once per key."""
        key = (*self.attention.key, self.draw.temperature)
        if key not in self.graphs:
            self.graphs[key] = self._capture()
        self.graphs[key]()

    def _capture(self) -> Callable[[], None]:
        """Capture `_step`. The warm-up runs are undone; what else they write, the next token overwrites."""
        changed = (self.attention.lengths, self.newest)
        before = [buffer.clone() for buffer in changed]
        self.warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.warming):  # always the same stream: cuBLAS keeps a workspace for each
            for _ in range(2):
                self._step()
                for buffer, value in zip(changed, before, strict=True):
                    buffer.copy_(value)
        torch.cuda.current_stream().wait_stream(self.warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._step()
        return graph.replay
