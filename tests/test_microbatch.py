"""Rows are cut by a budget of tokens: every row that is learned from once, as many micro-batches on every rank."""

import pytest
import torch

from grpo import distributed
from grpo.batch import Batch
from grpo.microbatch import cut_rows, distinct_tokens

LENGTHS = [3, 1, 0, 2]  # of 2 prompts, 2 completions each


def batch() -> Batch:
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    return Batch([[7, 8], [7, 9]], torch.arange(20, 32).view(4, 3) * mask, mask)


def size(micro) -> int:
    return len(micro.tree.input_ids)


@pytest.mark.parametrize(("budget", "rows"), [(1, [[1], [0], [3]]), (4, [[0, 1], [3]]), (100, [[0, 1, 3]])])
def test_every_row_with_tokens_is_in_one_micro_batch(budget, rows):
    made = cut_rows(batch(), range(4), budget)
    assert [micro.rows for micro in made] == rows
    assert all(size(micro) <= budget or len(micro.rows) == 1 for micro in made)
    assert sum(len(micro.tree.target) for micro in made) == sum(LENGTHS)


def test_only_the_rows_asked_for_are_cut():
    (made,) = cut_rows(batch(), [1, 2], 100)
    assert made.rows == [1] and made.tree.input_ids.tolist() == [7, 8]  # 23 predicts nothing


def test_distinct_tokens_are_counted_over_all_ranks(monkeypatch):
    assert distinct_tokens(batch()) == 1 + (1 + 2 + 0) + (1 + 1)
    monkeypatch.setattr(distributed, "gather_objects", lambda rows: [rows, [*rows, [7, 8, 20, 50]]])
    assert distinct_tokens(batch()) == 6 + 1
