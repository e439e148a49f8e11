"""Token sequences -> one packed token tree: every shared prefix once, laid out flat in depth-first order.

Few-shot exemplars are common to all prompts of a step, and a prompt to its G completions. `pack` finds the longest
common token prefixes by itself; nobody has to say what is shared. One array, `subtree_end`, is the whole attention
mask: token q may attend to token k iff `k <= q and q < subtree_end[k]`.

    read         A B C     A B D     A E            flat index      0  1  2  3  4
                                                    input_ids       A  B  C  D  E
                   A ── B ── C                      position_ids    0  1  2  2  1
                   │    └─── D                      subtree_end     5  4  3  4  5
                   └─── E

What is read is a prompt and its completion but for the last token, which predicts nothing. Left out: attention itself
(`attention.py`); what to predict where is only recorded here (`source`, `target`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTree:
    """A packed token tree of S tokens with M predictions. All fields are int64.

    The hidden state at flat index `source[m]` predicts token `target[m]`, which stands at `[row[m], column[m]]` of the
    padded completions. Siblings share their first source (the last prompt token), so M may exceed S.
    """

    input_ids: Tensor
    """[S] token ids in depth-first order."""
    position_ids: Tensor
    """[S] depth on the path from the root."""
    subtree_end: Tensor
    """[S] flat index one past the last token of the subtree of that token's node; padding: `i + 1`."""
    source: Tensor
    """[M] flat index of the hidden state that predicts."""
    target: Tensor
    """[M] the token that it predicts."""
    row: Tensor
    """[M] which completion."""
    column: Tensor
    """[M] which token of that completion."""

    def to(self, device: torch.device | str) -> "PackedTree":
        """The same tree with every tensor on `device`."""
        return PackedTree(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def padded(self, size: int) -> "PackedTree":
        """The same tree with padding tokens at the end, S = `size`: each sees itself alone and predicts nothing."""
        pad = size - len(self.input_ids)
        assert pad >= 0, f"a tree of {len(self.input_ids)} tokens does not fit into {size}"
        zeros = self.input_ids.new_zeros(pad)
        own_end = torch.arange(size - pad, size, device=zeros.device) + 1
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, zeros]),
            position_ids=torch.cat([self.position_ids, zeros]),
            subtree_end=torch.cat([self.subtree_end, own_end]),
        )


@dataclass(frozen=True)
class Trie:
    """The prefix tree of R token sequences, flat: `paths[r][d]` is the flat index of token d of sequence r."""

    input_ids: np.ndarray
    """[S] int64."""
    position_ids: np.ndarray
    """[S] int64."""
    subtree_end: np.ndarray
    """[S] int64."""
    paths: list[np.ndarray]
    """R arrays of int64, one flat index per token of the sequence."""


def build_trie(sequences: Sequence[Sequence[int]]) -> Trie:
    """Lay the prefix tree of the sequences out flat.

    In sorted order a sequence shares its longest common prefix with its neighbour, so one pass suffices: keep the
    flat indices of the current path, close what the next sequence leaves, append what is new.

    Args:
        sequences: R sequences of token ids, of any lengths, in any order; equal ones share all of their tokens.

    Returns:
        The trie; its tokens are numbered in depth-first order.
    """
    tokens = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    total = sum(map(len, tokens))
    input_ids, position_ids, subtree_end = (np.zeros(total, dtype=np.int64) for _ in range(3))
    paths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(tokens)
    previous = path = np.zeros(0, dtype=np.int64)
    S = 0
    for r in sorted(range(len(tokens)), key=lambda r: list(sequences[r])):
        shared = common_prefix(previous, tokens[r])
        subtree_end[path[shared:]] = S
        new = np.arange(S, S + len(tokens[r]) - shared)
        input_ids[new] = tokens[r][shared:]
        position_ids[new] = np.arange(shared, len(tokens[r]))
        path = paths[r] = np.concatenate([path[:shared], new])
        previous, S = tokens[r], S + len(new)
    subtree_end[path] = S
    return Trie(input_ids[:S], position_ids[:S], subtree_end[:S], paths)


def trie_size(sequences: Sequence[Sequence[int]]) -> int:
    """The number of distinct prefixes of the sequences: the tokens of `build_trie(sequences)`, without building it."""
    tokens = [np.asarray(sequence) for sequence in sorted(map(list, sequences))]
    shared = sum(common_prefix(a, b) for a, b in zip(tokens, tokens[1:], strict=False))
    return sum(map(len, tokens)) - shared


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two integer arrays."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all of the sequences share."""
    first = np.asarray(sequences[0])
    return min(common_prefix(first, np.asarray(other)) for other in sequences)


def trunk_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, such as few-shot exemplars, each of them having more than these."""
    return min(shared_prefix(prompts), min(map(len, prompts)) - 1)


def cut(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Cut sequences into parts whose trees have at most `max_tokens` tokens each; a longer sequence is a part alone.

    Args:
        sequences: R sequences of token ids.
        max_tokens: budget of a part, in tokens of its tree.

    Returns:
        Parts as lists of positions in `sequences`, in sorted order, so that what shares a prefix stays together.
    """
    parts: list[list[int]] = []
    size, previous = 0, np.zeros(0, dtype=np.int64)
    for r in sorted(range(len(sequences)), key=lambda r: list(sequences[r])):
        tokens = np.asarray(sequences[r], dtype=np.int64)
        size += len(tokens) - common_prefix(previous, tokens)
        if not parts or size > max_tokens:
            parts.append([])
            size = len(tokens)
        parts[-1].append(r)
        previous = tokens
    return parts


def read_tokens(prompt: Sequence[int], completion: Sequence[int]) -> list[int]:
    """What a forward has to read to predict the completion: its last token predicts nothing and is left out."""
    return [*prompt, *completion[:-1]]


def pack(prompts: list[list[int]], completions: list[list[list[int]]]) -> PackedTree:
    """Pack prompts and their completions into one token tree.

    Args:
        prompts: N token lists, none empty.
        completions: for each prompt its completions (any number, any lengths). Rows are counted in this order.

    Returns:
        The tree of all `prompt + completion` sequences, without the last token of each completion, and one prediction
        for every completion token.

    Raises:
        ValueError: a prompt is empty (nothing would predict its first completion token).
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: a prompt has no token; every prompt needs at least one")
    pairs = [(prompt, completion) for prompt, group in zip(prompts, completions, strict=True) for completion in group]
    trie = build_trie([read_tokens(prompt, completion) for prompt, completion in pairs])
    lengths = np.array([len(completion) for _, completion in pairs], dtype=np.int64)
    source = [path[len(prompt) - 1 :] for (prompt, c), path in zip(pairs, trie.paths, strict=True) if len(c)]
    target = [np.asarray(completion, dtype=np.int64) for _, completion in pairs]
    column = [np.arange(length) for length in lengths]
    as_tensor = lambda parts: torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))  # noqa: E731
    return PackedTree(
        input_ids=torch.from_numpy(trie.input_ids),
        position_ids=torch.from_numpy(trie.position_ids),
        subtree_end=torch.from_numpy(trie.subtree_end),
        source=as_tensor(source),
        target=as_tensor(target),
        row=torch.from_numpy(np.repeat(np.arange(len(pairs)), lengths)),
        column=as_tensor(column),
    )


def nodes(position_ids: Tensor, subtree_end: Tensor) -> list[tuple[int, int, int]]:
    """The nodes of a packed tree: maximal runs of tokens that all rows through them share.

    Args:
        position_ids: [S].
        subtree_end: [S].

    Returns:
        One `(start, end, subtree_end)` per node, in depth-first order: its own tokens are `start..end`, those of its
        descendants `end..subtree_end`.
    """
    if len(position_ids) == 0:
        return []
    same = (position_ids[1:] == position_ids[:-1] + 1) & (subtree_end[1:] == subtree_end[:-1])
    starts = [0, *(torch.nonzero(~same).flatten() + 1).tolist()]
    ends = [*starts[1:], len(position_ids)]
    return list(zip(starts, ends, subtree_end[starts].tolist(), strict=True))
