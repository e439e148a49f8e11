"""Rows are cut by a budget of tokens: every row that is learned from once, as many micro-batches on every rank."""

from dataclasses import replace

import pytest
import torch

from grpo import distributed
from grpo.batch import Batch
from grpo.microbatch import cut_batch, cut_rows, distinct_tokens

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


@pytest.mark.parametrize("budget", [1, 4, 100])
def test_a_batch_is_cut_into_batches_of_single_rows(budget):
    """For loops without a Learner. Each part has the fields of its rows, and the tokens of its rows alone."""
    whole = replace(batch(), advantages=torch.arange(4.0), prompt_index=[5, 6])
    parts = cut_batch(whole, budget)
    rows = [micro.rows for micro in cut_rows(whole, range(4), budget)]
    assert [part.advantages.tolist() for part in parts] == rows
    for part in parts:
        assert part.group_size == 1 and len(part.prompt_ids) == len(part.completion_ids)
        for prompt, index, ids, row in zip(
            part.prompt_ids, part.prompt_index, part.completion_ids, part.advantages.int().tolist(), strict=True
        ):
            assert prompt == whole.prompt_ids[row // 2] and index == whole.prompt_index[row // 2]
            assert ids.equal(whole.completion_ids[row])


@pytest.mark.parametrize("max_tokens", ["auto", 0, -1, None, 2.5])
def test_c54_a_budget_that_is_no_number_of_tokens_is_a_sentence(max_tokens):
    with pytest.raises(ValueError, match=f"^max_tokens is {max_tokens!r}: must be a whole number, at least 1$"):
        cut_batch(batch(), max_tokens)


def test_distinct_tokens_are_counted_over_all_ranks(monkeypatch):
    assert distinct_tokens(batch()) == 1 + (1 + 2 + 0) + (1 + 1)
    monkeypatch.setattr(distributed, "gather_objects", lambda rows: [rows, [*rows, [7, 8, 20, 50]]])
    assert distinct_tokens(batch()) == 6 + 1
