"""Which rows of a batch are computed together: micro-batches that keep to a budget of tokens.

A cut changes memory and speed, and no result beyond rounding. Left out: what is computed of them (`update.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo import distributed
from grpo.batch import Batch
from grpo.tree import PackedTree, cut, pack, read_tokens, trie_size


@dataclass
class Microbatch:
    """Some rows of a batch, packed; without rows: one token that predicts nothing, so that every rank takes part."""

    rows: Tensor
    """[b] int64: which rows of the batch."""
    tree: PackedTree
    """Their tree."""


def empty(device: torch.device) -> Microbatch:
    """A micro-batch without rows."""
    return Microbatch(torch.zeros(0, dtype=torch.long), pack([[0]], [[[]]]).to(device))


def cut_rows(batch: Batch, rows: Tensor, max_tokens: int, device: torch.device) -> list[Microbatch]:
    """Cut rows by the token budget; as many on every rank as the rank with the most has. A collective call.

    Args:
        batch: this rank's.
        rows: [b] int64 of it; those without a token to learn from are left out.
        max_tokens: of a micro-batch's tree; a longer sequence is a micro-batch alone.
        device: where the trees go.
    """
    completions = [row for group in batch.completions() for row in group]
    kept = [row for row in rows.tolist() if completions[row]]
    prompts = {row: batch.prompt_ids[row // batch.group_size] for row in kept}
    made = []
    for part in cut([read_tokens(prompts[row], completions[row]) for row in kept], max_tokens):
        part = sorted(kept[i] for i in part)
        tree = pack([prompts[row] for row in part], [[completions[row]] for row in part])
        made.append(Microbatch(torch.tensor(part), tree.to(device)))
    missing = int(distributed.all_max(torch.tensor(len(made)))) - len(made)
    return made + [empty(device)] * missing


def distinct_tokens(batch: Batch) -> int:
    """Tokens of the tree of all rows that are learned from, over all ranks; on rank 0, elsewhere 0. A collective call.

    What one forward over the whole step computes. Micro-batches and ranks compute again what they share: that is how
    the work is cut, and no metric of the step.
    """
    groups = zip(batch.prompt_ids, batch.completions(), strict=True)
    rows = [read_tokens(prompt, row) for prompt, group in groups for row in group if row]
    everywhere = [row for rank in distributed.gather_objects(rows) for row in rank]
    return trie_size(everywhere) if distributed.is_main() else 0
