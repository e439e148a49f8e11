"""The rows in flight, seen from the device: join, decode a token, keep. Which row has ended is the host's business.

On a CPU every shape is exact. On a GPU shapes are rounded up to a few sizes, buffers are kept for the whole run, and
the step of one token (forward, head, uniforms, draw) is captured as a CUDA graph per size and replayed, so that the
host neither launches kernels one by one nor reads a value between two looks. Left out: when to look (`sampler.py`).
"""

from collections.abc import Callable, Sequence
from operator import le

import numpy as np
import torch
from torch import Tensor

from grpo.kernels import decode
from grpo.logprobs import NO_WORD, head_for, product
from grpo.policy import Policy
from grpo.policy.attention import KeysValues, PrefillAttention
from grpo.sampler import decoder_fused
from grpo.sampler.cache import DecodeAttention
from grpo.sampler.decoder_fused import FusedDecodeAttention, FusedDecoder
from grpo.sampler.draw import Draw, block_masses, sample, streams, uniforms_at
from grpo.sampler.narrow import JointLinear, NarrowDecoder, fits
from grpo.tree import build_trie

GRAIN = {"cpu": 1, "cuda": 32}
"""Rows and own tokens are rounded up to multiples of this, by device."""


class Rows:
    """The device side of sampling. Built once per run; `start` makes room, or takes what is there if it fits."""

    def __init__(self, policy: Policy, *, own: bool = False, kernels: bool = True):
        """Take the policy, which is read at every step, so that weights copied into it in place are seen.

        Args:
            policy: samples.
            own: nobody else holds it.
            kernels: steps may be those of `kernels/decode.py`.
        """
        self.policy = policy
        self.grain = GRAIN[policy.device.type]
        known = fits(policy)
        usable = decode.usable(policy.device.type, policy.autocast_dtype is not None)
        self.fused = kernels and known and usable and policy.heads.width <= decode.WIDEST
        self.rounded_to = policy.autocast_dtype if self.fused else None
        """What keys and values are kept in, if not in float32 or wider."""
        decoder = FusedDecoder if self.fused else NarrowDecoder
        self.decoder = decoder(policy.model.base_model, own=own) if known else None
        self.head = JointLinear([policy.head], [None])
        self.products = [self.head, *(self.decoder.products if self.decoder else ())]
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
        """Make room.

        Args:
            draw: names the uniforms.
            trunk: token ids that all prompts begin with, may be none; computed with the first of them.
            max_rows, max_groups: rows and prompts in flight.
            max_branch: tokens of the longest prompt after the trunk.
            max_new_tokens: of a row.
        """
        self.draw = draw
        if self.rounded_head is not None:
            self.rounded_head[: self.policy.vocab_size] = self.policy.head
        self.trunk_length, self.trunk_known = len(trunk), False
        for narrow in self.products:
            narrow.pack()
        sizes = (len(trunk), max_rows, max_groups, max_branch, max_new_tokens)
        if self.sizes and len(trunk) == self.sizes[0] and all(map(le, sizes, self.sizes)):
            self.attention.restart()
        else:
            if self.grain > 1:  # room for all that was asked for so far, so that it is soon made for the last time
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
            number = lambda *shape: torch.zeros(shape, dtype=torch.long, device=self.policy.device)  # noqa: E731
            self.stream, self.prompt_length, self.newest = number(max_rows), number(max_rows), number(max_rows)
            self.ids = number(max_rows, max_new_tokens)
            dtype = torch.promote_types(self.policy.head.dtype, torch.float32)
            self.drawn_logprobs = self.ids.new_zeros(self.ids.shape, dtype=dtype)
            self.sizes = sizes

    def stop(self) -> None:
        """Nothing is in flight any more. On a CPU the room and packed weights are given back: learning comes next."""
        if self.grain == 1:
            self._forget()
            for narrow in self.products:
                narrow.unpack()

    def _forget(self) -> None:
        """Give the room back, and the graphs that hold its addresses with the memory that they share.

        Graphs may share it: they run one after another, and nothing of a step is read there when the next one runs.
        """
        self.sizes = self.attention = None
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.policy.device.type == "cuda" else None

    def join(self, prompts: Sequence[Sequence[int]], index: Sequence[int], group_size: int) -> None:
        """Add the rows of further prompts, and draw their first token.

        Args:
            prompts: token lists, all beginning with the trunk and longer than it.
            index: their numbers in the step.
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
        """So many further tokens of every row."""
        for _ in range(steps):
            self._replay() if self.policy.device.type == "cuda" else self._step()
            self.attention.advance()

    def drawn(self) -> tuple[Tensor, list[int]]:
        """The ids of all rows [n,longest] on the host, and how many of them each row has drawn."""
        lengths = [length + 1 for _, length in self.attention.of_row]
        return self.ids[: len(lengths), : max(lengths)].cpu(), lengths

    def logprobs(self) -> Tensor:
        """The log-probabilities of the same [n,longest], on the host."""
        lengths = [length + 1 for _, length in self.attention.of_row]
        return self.drawn_logprobs[: len(lengths), : max(lengths)].cpu()

    def keep(self, alive: Tensor) -> Tensor:
        """Drop finished rows; as `DecodeAttention.keep`."""
        order = self.attention.keep(alive)
        at = order.to(self.policy.device)
        per_row = (self.stream, self.prompt_length, self.newest, self.ids, self.drawn_logprobs)
        for buffer in per_row:
            buffer[: len(at)] = buffer[at]
        return order

    def _prefill(self, prompts) -> tuple[KeysValues, list[Tensor], Tensor]:
        """Compute the prompts' tree once; the trunk with the first prompts only.

        Returns:
            keys and values of the tree, where in it each prompt's tokens after the trunk are, and the hidden states
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
        """Keys and values of so many tokens, not yet filled."""
        layers = self.policy.model.config.get_text_config().num_hidden_layers
        dtype = self.rounded_to or torch.promote_types(self.policy.head.dtype, torch.float32)
        shape = self.policy.heads.key_heads, self.trunk_length, self.policy.heads.width
        room = lambda: torch.empty(shape, dtype=dtype, device=self.policy.device)  # noqa: E731
        return [(room(), room()) for _ in range(layers)]

    def _logits(self, hidden: Tensor) -> Tensor:
        """[n,D] -> [n,V]: the head's product leaves the matrix product in float32, as in learning."""
        if hidden.device.type == "cpu":
            logits = self.head(hidden)
        else:
            head = self.policy.head if self.rounded_head is None else self.rounded_head
            logits = product(hidden.to(head.dtype), head.t())[:, : self.policy.vocab_size]
        absent = self.policy.absent
        return logits if absent is None else logits.masked_fill_(absent, NO_WORD)

    def _draw(self, logits: Tensor, rows: slice) -> None:
        """Draw the next token of these rows and write it down."""
        tokens = self.attention.lengths[rows]
        masses = decoder_fused.block_masses if self.fused else block_masses
        ids, logprobs = sample(logits, uniforms_at(self.stream[rows], tokens), self.draw.temperature, masses)
        at = torch.arange(rows.start, rows.stop, device=ids.device)
        tokens = tokens.clamp(max=self.ids.shape[1] - 1)
        self.newest[rows] = ids
        self.ids[at, tokens], self.drawn_logprobs[at, tokens] = ids, logprobs

    def _step(self) -> None:
        """One token of every row. No value is read back: all of it can run inside a CUDA graph."""
        n = self.attention.shape[0]
        self.attention.begin()
        position_ids = self.prompt_length[:n] + self.attention.lengths[:n]
        if self.decoder:
            hidden = self.decoder(self.newest[:n], position_ids, self.attention)
        else:
            with self.policy.autocast():
                hidden = self.policy.hidden_states(self.newest[:n], position_ids, self.attention)
        logits = self._logits(hidden)
        self.attention.lengths[:n] += 1
        self._draw(logits, slice(0, n))

    def _replay(self) -> None:
        """`_step` as a CUDA graph, captured once per key."""
        key = (*self.attention.key, self.draw.temperature)
        if key not in self.graphs:
            self.graphs[key] = self._capture()
        self.graphs[key]()

    def _capture(self) -> Callable[[], None]:
        """Record `_step`. The runs that warm it up are undone: they write where the next token will be written."""
        changed = (self.attention.lengths, self.newest)
        before = [buffer.clone() for buffer in changed]
        self.warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.warming):  # one for all: cuBLAS keeps a workspace per stream
            for _ in range(2):
                self._step()
                for buffer, value in zip(changed, before, strict=True):
                    buffer.copy_(value)
        torch.cuda.current_stream().wait_stream(self.warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._step()
        return graph.replay
