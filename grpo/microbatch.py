"""Cuts a step's groups into updates, and the rows of an update into micro-batches, which keep to a budget of tokens.

A micro-batch is what one forward pass computes. How rows are cut changes memory and speed, and results only by
rounding. Left out: a budget that fits into memory (`budget.py`), and what is computed (`update.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from grpo import distributed
from grpo.batch import Batch
from grpo.tree import PackedTree, cut, pack, read_tokens, trie_size
from grpo.weighting import count, count_groups


@dataclass
class Microbatch:
    """Some rows of a batch, packed into one tree.

    One without rows has a tree of one token that predicts nothing, so that a rank without work can still take part.
    """

    rows: list[int]
    """Positions among the rows of the batch."""
    tree: PackedTree
    """The tree of these rows."""


def empty() -> Microbatch:
    """A micro-batch without rows."""
    return Microbatch([], pack([[0]], [[[]]]))


def largest(tokens: int, longest: int) -> PackedTree:
    """A tree that takes as much memory as any of so many tokens: sequences of length `longest` that share nothing.

    Every token is predicted from; this is what no micro-batch exceeds.
    """
    here, length = torch.arange(tokens), max(1, longest - 1)  # a last token is no part of a tree
    row, column, zeros = here // length, here % length, torch.zeros_like(here)
    return PackedTree(zeros, column, ((row + 1) * length).clamp(max=tokens), here, zeros, row, column)


def cut_batch(batch: Batch, max_tokens: int) -> list[Batch]:
    """Cut a batch into smaller ones by a token budget. For a loop of your own, on one process.

    Args:
        batch: any batch.
        max_tokens: the most tokens of the tree that a forward pass computes. A longer sequence is a part of its own.

    Returns:
        Batches of single rows, each with its prompt. Rows without a token to learn from are left out.

    Raises:
        ValueError: `max_tokens` is no whole number above 0, such as an `auto` that nobody has resolved.
    """
    return [batch.take(micro.rows) for micro in cut_rows(batch, range(len(batch.completion_ids)), max_tokens)]


def cut_rows(batch: Batch, rows: Sequence[int], max_tokens: int) -> list[Microbatch]:
    """Cut rows of a batch into micro-batches, as `cut_batch` does. The trees are on the CPU."""
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}: must be a whole number, at least 1")
    completions = [row for group in batch.completions() for row in group]
    kept = [row for row in rows if completions[row]]
    prompts = {row: batch.prompt_ids[row // batch.group_size] for row in kept}
    made = []
    for part in cut([read_tokens(prompts[row], completions[row]) for row in kept], max_tokens):
        part = sorted(kept[i] for i in part)
        tree = pack([prompts[row] for row in part], [[completions[row]] for row in part])
        made.append(Microbatch(part, tree))
    return made


def cut_groups(
    batch: Batch, minibatch_size: int, group_size: int, seed: tuple[int, int], epoch: int
) -> list[list[int]]:
    """This rank's rows for each update of an epoch: whole groups, in an order that all ranks draw alike.

    A collective call. The numbers of the groups may have gaps, which filtering leaves; every group counts.

    Args:
        batch: this rank's rows; may be empty.
        minibatch_size: sequences of an update over all ranks; 0: all.
        group_size: sequences of a group.
        seed: (seed of the run, step).
        epoch: from 0.

    Returns:
        For each update, positions of rows.
    """
    mine = batch.prompt_index or list(range(len(batch.prompt_ids)))
    numbers = sorted(set(chain.from_iterable(distributed.gather_objects(mine))))
    N = len(numbers)
    per_update = minibatch_size // group_size or max(1, N)
    order = np.random.default_rng([*seed, epoch]).permutation(N) if per_update < N else np.arange(N)
    place: dict[int, list[int]] = {}
    for i, number in enumerate(mine):
        place.setdefault(number, []).append(i)
    updates = []
    for start in range(0, N, per_update):
        chosen = [numbers[i] for i in order[start : start + per_update]]
        places = [i for number in chosen for i in place.get(number, ())]
        updates.append([i * group_size + j for i in places for j in range(group_size)])
    return updates


def distinct_tokens(batch: Batch) -> int:
    """How many tokens one forward pass over the whole step, on all ranks, would compute. A collective call.

    This is the size of the tree of all rows with a token to learn from. Micro-batches and ranks compute shared prefixes
    again; the count leaves this out, because it depends on how the work is cut.

    Returns:
        The number of tokens on rank 0, and 0 on the other ranks.
    """
    groups = zip(batch.prompt_ids, batch.completions(), strict=True)
    rows = [read_tokens(prompt, row) for prompt, group in groups for row in group if row]
    everywhere = [row for rank in distributed.gather_objects(rows) for row in rank]
    return trie_size(everywhere) if distributed.is_main() else 0


def counts_of(batch: Batch, rows: Sequence[int], group_size: int) -> dict[str, Any]:
    """What the weights of an update are made from: its tokens, sequences and groups on all ranks. A collective call.

    Args:
        batch: this rank's.
        rows: of the update, whole groups.
        group_size: sequences of a group.

    Returns:
        `num_tokens`, `num_sequences` and `num_groups`, summed over ranks, and `group_tokens` [B] of this rank's rows.
    """
    mask = batch.completion_mask
    num_groups, _ = count_groups(mask[rows], group_size)
    here = torch.tensor([*count(mask[rows]), num_groups])
    num_tokens, num_sequences, num_groups = distributed.all_sum(here).tolist()
    group_tokens = count_groups(mask, group_size)[1]  # of all rows: a group is in one update
    sums = {"num_tokens": num_tokens, "num_sequences": num_sequences, "num_groups": num_groups}
    return sums | {"group_tokens": group_tokens}
