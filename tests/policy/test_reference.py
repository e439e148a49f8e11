"""The reference that remembers what prompts begin with, against one that computes whole trees."""

import pytest
import torch

from grpo.kernels.compiled import compile_layers
from grpo.policy import Reference, attention_parts, reference
from grpo.tree import pack
from tests.fakes.models import FAMILIES, tiny_policy

EXACT = {"fp64": {"rtol": 1e-9, "atol": 1e-9}, "fp32": {"rtol": 1e-4, "atol": 1e-5}}
TRUNK = [3, 1, 4, 1, 5, 9, 2]
TREES = {
    "the trunk ends where prompts differ": ([[*TRUNK, 11, 12], [*TRUNK, 13]], [[[1, 2], [1, 3]], [[4, 5, 6], []]]),
    "prompts share more": ([[*TRUNK, 11, 12, 13], [*TRUNK, 11, 12, 14]], [[[1, 2], [2]], [[4, 5, 6], [7]]]),
    "one prompt": ([[*TRUNK, 11]], [[[1, 2, 3], [1, 2, 4]]]),
    "one row": ([[*TRUNK, 11, 12]], [[[1, 2, 3]]]),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short trunks are worth it, and squares are so small that the trunk is cut."""
    monkeypatch.setattr(reference, "MIN_TRUNK", 1)
    monkeypatch.setattr(attention_parts, "SIDES", (1, 3))


def remembering(policy, trunk=TRUNK):
    made = Reference(policy)
    made.remember(trunk)
    return made


def decoded(monkeypatch, made) -> list[int]:
    """How many tokens go through the reference's layers, call by call."""
    seen, decode = [], made.policy._run_layers
    monkeypatch.setattr(made.policy, "_run_layers", lambda ids, *args: seen.append(len(ids)) or decode(ids, *args))
    return seen


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("case", TREES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_the_numbers_are_those_of_the_whole_tree(precision, family, case, monkeypatch):
    policy, tree = tiny_policy(family, precision), pack(*TREES[case])
    made = remembering(policy)
    seen = decoded(monkeypatch, made)
    with torch.no_grad():
        for ours, whole in zip(made(tree, 0.7), policy(tree, 0.7), strict=True):
            torch.testing.assert_close(ours, whole, **EXACT[precision])
    assert seen == [len(tree.input_ids) - len(TRUNK)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("length", range(1, 8))
def test_a_trunk_of_any_length(length, fused, monkeypatch):
    monkeypatch.setattr(attention_parts, "_fused", lambda q: fused)
    policy, tree = tiny_policy(precision="fp64"), pack(*TREES["prompts share more"])
    with torch.no_grad():
        ours, whole = remembering(policy, TRUNK[:length])(tree, 1.0), policy(tree, 1.0)
    torch.testing.assert_close(ours, whole, **EXACT["fp64"])


NOT_THIS_TREE = {
    "another trunk": ([[*TRUNK[:-1], 8, 11]], [[[1, 2]]]),
    "rows that leave it": ([[*TRUNK, 11], [*TRUNK[:3], 7]], [[[1, 2]], [[3]]]),
    "its last token predicts": ([TRUNK], [[[1, 2], [3]]]),
    "a forest that reads like it": ([TRUNK[:2], [*TRUNK[2:], 11]], [[[]], [[1, 2]]]),
    "shorter": ([TRUNK[:3]], [[[1]]]),
    "nothing": ([[0]], [[[]]]),
}


@pytest.mark.parametrize("case", NOT_THIS_TREE)
def test_a_tree_that_does_not_begin_with_it_is_computed_whole(case, monkeypatch):
    policy, tree = tiny_policy(), pack(*NOT_THIS_TREE[case])
    made = remembering(policy)
    seen = decoded(monkeypatch, made)
    with torch.no_grad():
        assert all(map(torch.equal, made(tree, 1.0), policy(tree, 1.0)))
    assert seen == [len(tree.input_ids)]


def test_few_tokens_are_not_remembered(monkeypatch):
    monkeypatch.setattr(reference, "MIN_TRUNK", 8)
    assert remembering(tiny_policy()).trunk is None
    assert remembering(tiny_policy(), [*TRUNK, 1]).trunk is not None


def test_c22_what_rounds_by_shape_computes_whole_trees():
    half, compiled = Reference(tiny_policy(precision="bf16")), Reference(tiny_policy())
    compile_layers(compiled.policy)  # at the first call, so that nothing is compiled here
    for made in (half, compiled):
        made.remember(TRUNK)
        assert made.trunk is None


def test_c23_it_stays_the_policy_that_it_was_made_of():
    policy, tree = tiny_policy(), pack(*TREES["one prompt"])
    made = remembering(policy)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    before = made(tree, 1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert all(map(torch.equal, before, made(tree, 1.0)))
