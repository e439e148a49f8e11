"""Token sequences -> one packed token tree: every shared prefix once, laid out flat in depth-first order.

All prompts of a step may share few-shot exemplars, and the G completions of a prompt share the prompt. `pack` finds the
longest common token prefixes by itself, so callers do not say what is shared. One array, `subtree_end`, is the whole
attention mask: token q may attend to token k iff `k <= q and q < subtree_end[k]`.

    read         A B C     A B D     A E            flat index      0  1  2  3  4
                                                    input_ids       A  B  C  D  E
                   A ── B ── C                      position_ids    0  1  2  2  1
                   │    └─── D                      subtree_end     5  4  3  4  5
                   └─── E

The model reads a prompt and its completion without the last token, which predicts nothing. Left out: attention itself
(`policy/attention.py`) and predictions: `source` and `target` only record which token predicts which.
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
        """The same tree, padded at the end to S = `size`. A padding token sees only itself and predicts nothing."""
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
    """Lay out the prefix tree of the sequences flat.

    In sorted order, the longest prefix that a sequence shares with any earlier one is shared with its neighbour. So one
    pass suffices. It keeps the flat indices of the current path, closes the nodes that the next sequence leaves, and
    appends the tokens that are new.

    Args:
        sequences: R sequences of token ids, of any lengths, in any order. Equal ones share all of their tokens.

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
    """The number of tokens S of `build_trie(sequences)`, without building it: the number of distinct prefixes."""
    tokens = [np.asarray(sequence) for sequence in sorted(map(list, sequences))]
    shared = sum(common_prefix(a, b) for a, b in zip(tokens, tokens[1:], strict=False))
    return sum(map(len, tokens)) - shared


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two integer arrays."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix of all sequences."""
    first = np.asarray(sequences[0])
    return min(common_prefix(first, np.asarray(other)) for other in sequences)


def trunk_length(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the trunk: the token prefix that all prompts share, such as few-shot exemplars.

    The rest of a prompt is its branch. No branch is empty: the trunk is always shorter than the shortest prompt.
    """
    return min(shared_prefix(prompts), min(map(len, prompts)) - 1)


def cut(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Cut sequences into parts whose trees have at most `max_tokens` tokens each.

    Args:
        sequences: R sequences of token ids.
        max_tokens: budget of a part, in tokens of its tree. A sequence that is longer becomes a part of its own.

    Returns:
        The parts, each a list of positions in `sequences`. Sequences are taken in sorted order, so that those with a
        common prefix stay together.
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
    """The tokens that a forward pass reads to predict the completion. The last one predicts nothing and is left out."""
    return [*prompt, *completion[:-1]]


def pack(prompts: list[list[int]], completions: list[list[list[int]]]) -> PackedTree:
    """Pack prompts and their completions into one token tree.

    Args:
        prompts: N token lists, none empty.
        completions: for each prompt its completions (any number, any lengths). Rows are counted in this order.

    Returns:
        The tree of all `prompt + completion` sequences, each without its last token, and one prediction for every
        completion token.

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

    def as_tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))

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
    """The nodes of a packed tree. A node is a run of tokens, as long as possible, that always occur together in a row.

    Args:
        position_ids: [S] depths.
        subtree_end: [S] the mask.

    Returns:
        One `(start, end, subtree_end)` per node, in depth-first order. Its own tokens are `start..end`, and those of
        its descendants are `end..subtree_end`; the end of a range is not in it.
    """
    if len(position_ids) == 0:
        return []
    same = (position_ids[1:] == position_ids[:-1] + 1) & (subtree_end[1:] == subtree_end[:-1])
    starts = [0, *(torch.nonzero(~same).flatten() + 1).tolist()]
    ends = [*starts[1:], len(position_ids)]
    return list(zip(starts, ends, subtree_end[starts].tolist(), strict=True))
