"""The packed tree against a naive trie: a set of prefixes."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.tree import PackedTree, build_trie, common_prefix, cut, nodes, pack, shared_prefix, trie_size, trunk_length

repeatable = settings(deadline=None, max_examples=100, derandomize=True)

# few tokens and short rows, so that rows are often equal, empty, or prefixes of each other
tokens = st.integers(0, 2)
prompts_and_completions = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=5),
        st.lists(st.lists(tokens, max_size=4), max_size=3),
    ),
    max_size=4,
).map(lambda groups: ([prompt for prompt, _ in groups], [completions for _, completions in groups]))
rows_of_tokens = st.lists(st.lists(tokens, max_size=7), max_size=7)


def prefixes(rows):
    """The nodes of a naive trie, one per token."""
    return {tuple(row[:length]) for row in rows for length in range(1, len(row) + 1)}


def visible(subtree_end):
    """[S,S] bool: may token q (first index) attend to token k?"""
    at = torch.arange(len(subtree_end))
    return (at[None, :] <= at[:, None]) & (at[:, None] < subtree_end[None, :])


def path_of(tree, q):
    """What token q sees: the tokens of its ancestors and its own."""
    return tuple(tree.input_ids[visible(tree.subtree_end)[q]].tolist())


def test_the_worked_example():
    A, B, C, D, E = range(10, 15)
    last = 15  # of every completion: predicted, never read
    tree = pack([[A]], [[[B, C, last], [B, D, last], [E, last]]])
    assert tree.input_ids.tolist() == [A, B, C, D, E]
    assert tree.position_ids.tolist() == [0, 1, 2, 2, 1]
    assert tree.subtree_end.tolist() == [5, 4, 3, 4, 5]
    assert tree.source.tolist() == [0, 1, 2, 0, 1, 3, 0, 4]
    assert tree.target.tolist() == [B, C, last, B, D, last, E, last]
    assert tree.row.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert tree.column.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@repeatable
@given(rows_of_tokens)
def test_the_size_of_a_trie_is_the_number_of_distinct_prefixes(rows):
    assert trie_size(rows) == len(prefixes(rows)) == len(build_trie(rows).input_ids)


@repeatable
@given(prompts_and_completions)
def test_c39_the_tree_is_the_trie_of_what_is_read_and_the_mask_its_ancestor_relation(batch):
    prompts, completions = batch
    tree = pack(prompts, completions)
    rows = [prompt + c[:-1] for prompt, group in zip(prompts, completions, strict=True) for c in group]
    seen = [path_of(tree, q) for q in range(len(tree.input_ids))]
    assert len(seen) == len(set(seen)) == len(prefixes(rows))  # no prefix twice
    assert set(seen) == prefixes(rows)
    assert tree.position_ids.tolist() == [len(path) - 1 for path in seen]
    for q, mine in enumerate(seen):
        expected = [other == mine[: len(other)] for other in seen]
        assert visible(tree.subtree_end)[q].tolist() == expected


@repeatable
@given(prompts_and_completions)
def test_c18_every_completion_token_is_predicted_once_from_what_stands_before_it(batch):
    prompts, completions = batch
    tree = pack(prompts, completions)
    pairs = [(prompt, c) for prompt, group in zip(prompts, completions, strict=True) for c in group]
    assert list(zip(tree.row.tolist(), tree.column.tolist(), strict=True)) == [
        (r, t) for r, (_, completion) in enumerate(pairs) for t in range(len(completion))
    ]
    for source, target, r, t in zip(tree.source, tree.target, tree.row, tree.column, strict=True):
        prompt, completion = pairs[r]
        assert path_of(tree, source) == tuple(prompt + completion[:t])
        assert target == completion[t]


def test_fields_are_int64_whatever_is_empty():
    for batch in ([], []), ([[1, 2]], [[]]), ([[1, 2]], [[[], []]]), ([[1]], [[[2]]]):
        assert all(getattr(pack(*batch), field.name).dtype == torch.int64 for field in fields(PackedTree))
    assert len(pack([], []).input_ids) == 0
    assert pack([[1, 2]], [[[], []]]).input_ids.tolist() == [1, 2]


def test_prompts_must_have_tokens_and_completions():
    with pytest.raises(ValueError, match="prompts"):
        pack([[1], []], [[[2]], [[3]]])
    with pytest.raises(ValueError):
        pack([[1], [2]], [[[2]]])


@repeatable
@given(rows_of_tokens)
def test_trie_paths_spell_their_sequences(rows):
    trie = build_trie(rows)
    assert len(trie.input_ids) == len(trie.position_ids) == len(trie.subtree_end) == len(prefixes(rows))
    for row, path in zip(rows, trie.paths, strict=True):
        assert trie.input_ids[path].tolist() == row
        assert trie.position_ids[path].tolist() == list(range(len(row)))
        assert (np.diff(path) > 0).all()


def test_inputs_are_left_as_they_are():
    rows = [[2, 1], [1], [1, 2]]
    build_trie(rows), cut(rows, 2), pack([[1]], [rows])
    assert rows == [[2, 1], [1], [1, 2]]


@repeatable
@given(rows_of_tokens, st.integers(1, 12))
def test_cut_keeps_the_budget_and_wastes_none(rows, budget):
    parts = cut(rows, budget)
    assert sorted(r for part in parts for r in part) == list(range(len(rows)))
    assert all(parts)
    for part in parts:
        assert len(part) == 1 or len(prefixes(rows[r] for r in part)) <= budget
    for part, following in zip(parts, parts[1:], strict=False):
        assert len(prefixes(rows[r] for r in [*part, following[0]])) > budget
    in_order = [rows[r] for part in parts for r in part]
    assert in_order == sorted(rows)  # what shares a prefix stays together


def test_cut_gives_a_row_longer_than_the_budget_a_part_alone():
    assert cut([[1], [1, 2, 3, 4], [1, 2, 3, 4], [2]], 3) == [[0], [1], [2], [3]]


@repeatable
@given(rows_of_tokens, st.integers(0, 3))
def test_nodes_are_the_runs_that_the_same_tokens_see(rows, padding):
    trie = build_trie(rows)
    S = len(trie.input_ids)
    empty = torch.zeros(0, dtype=torch.int64)
    tree = PackedTree(
        torch.from_numpy(trie.input_ids), torch.from_numpy(trie.position_ids), torch.from_numpy(trie.subtree_end),
        empty, empty, empty, empty,
    ).padded(S + padding)  # fmt: skip
    runs = nodes(tree.position_ids, tree.subtree_end)
    assert [q for start, end, _ in runs for q in range(start, end)] == list(range(S + padding))
    mask = torch.zeros(S + padding, S + padding, dtype=torch.bool)
    for start, end, last in runs:
        assert start < end <= last
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        mask[end:last, start:end] = True
    assert torch.equal(mask, visible(tree.subtree_end))
    # maximal: a run ends where its last token has no child, or several
    for _, end, last in runs:
        depth = tree.position_ids[end - 1]
        assert (tree.position_ids[end:last] == depth + 1).sum() != 1


@repeatable
@given(prompts_and_completions, st.integers(0, 3))
def test_c17_padding_sees_itself_alone_and_is_seen_by_nobody(batch, padding):
    tree = pack(*batch)
    S = len(tree.input_ids)
    padded = tree.padded(S + padding)
    mask = visible(padded.subtree_end)
    assert torch.equal(mask[:S, :S], visible(tree.subtree_end))
    assert not mask[:S, S:].any() and not mask[S:, :S].any()
    assert torch.equal(mask[S:, S:], torch.eye(padding, dtype=torch.bool))
    for name in ("source", "target", "row", "column"):
        assert torch.equal(getattr(padded, name), getattr(tree, name))
    for name in ("input_ids", "position_ids", "subtree_end"):
        assert torch.equal(getattr(padded, name)[:S], getattr(tree, name))
        assert len(getattr(padded, name)) == S + padding


def test_a_tree_does_not_fit_into_less_than_its_size():
    with pytest.raises(AssertionError, match="does not fit"):
        pack([[1, 2]], [[[3, 4]]]).padded(2)


def test_to_moves_every_field():
    moved = pack([[1, 2]], [[[3]]]).to("meta")
    assert all(getattr(moved, field.name).is_meta for field in fields(PackedTree))


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [1], 0), ([1], [1, 2], 1), ([1, 2, 3], [1, 5, 3], 1), ([4, 4], [4, 4], 2), ([1], [2], 0)],
)
def test_common_prefix(a, b, length):
    assert common_prefix(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)) == length


@pytest.mark.parametrize(
    ("prompts", "shared", "trunk"),
    [
        ([[1, 2, 3], [1, 2, 4, 5], [1, 2]], 2, 1),
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 4]], 2, 2),
        ([[7, 8]], 2, 1),
        ([[7, 8], [7, 8]], 2, 1),
        ([[1], [2]], 0, 0),
    ],
)
def test_every_prompt_has_a_token_after_the_trunk(prompts, shared, trunk):
    assert shared_prefix(prompts) == shared and trunk_length(prompts) == trunk
    assert trunk_length([np.array(prompt, dtype=np.int32) for prompt in prompts]) == trunk
