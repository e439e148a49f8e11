"""Tree attention and decode attention against dense masked softmax attention, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.policy import attention_parts
from grpo.policy.attention import TreeAttention
from grpo.policy.attention_parts import plan_parts
from grpo.policy.wrapped import attention_interface
from grpo.tree import nodes, pack
from tests.fakes.models import Sizes

H, HKV, R, D = 4, 2, 2, 5  # query heads, key heads, query heads per key head, width of a head
EXACT = {"rtol": 1e-9, "atol": 1e-9}

TREES = {
    "one row": [[1, 2, 3]],
    "one token": [[1]],
    "siblings": [[1, 2, 3, 4], [1, 2, 5, 6, 7], [1, 2, 8]],
    "siblings of one length": [[1, 2, 3, 4, 5], [1, 2, 6, 7, 8], [1, 2, 9, 9, 9], [2, 1, 1], [2, 2, 2], [2, 3]],
    "three levels": [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7, 8], [1, 2, 6, 9], [1, 5]],
    "a forest": [[1, 2, 3], [1, 4], [2, 2, 2], [3]],
    "a prefix and equal rows": [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5]],
}
every_tree = pytest.mark.parametrize("rows", TREES.values(), ids=TREES.keys())
every_size = pytest.mark.parametrize("max_scores", [1 << 24, 24, 1])  # whole parts, cut ones, one query at a time


def tree_of(rows, padding=0):
    tree = pack([row[:1] for row in rows], [[[*row[1:], 0]] for row in rows])  # the last token is not read
    return tree.padded(len(tree.input_ids) + padding)


def mask_of(subtree_end):
    at = torch.arange(len(subtree_end))
    return (at[None, :] <= at[:, None]) & (at[:, None] < subtree_end[None, :])


def dense(query, key, value, mask, scaling):
    """[S,H,d], 2 x [n,Hkv,d], [S,n] -> [S,H,d] by one masked softmax over everything."""
    per_key = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(per_key, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores.masked_fill(~mask, -torch.inf), -1), value)


def random_heads(S, key_heads=HKV, dtype=torch.float64, seed=0):
    """A query [S,H,d], a key and a value [S,Hkv,d]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((S, H, D), (S, key_heads, D), (S, key_heads, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@every_tree
@every_size
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("fused", [True, False])
def test_c39_tree_attention_equals_dense_attention(rows, max_scores, key_heads, fused, monkeypatch):
    """By torch's fused kernel for CPUs, and by the matrix products of other devices."""
    monkeypatch.setattr(attention_parts, "_fused", lambda q: fused)
    monkeypatch.setattr(attention_parts, "MAX_SCORES", max_scores)
    monkeypatch.setattr(attention_parts, "SIDES", (1, 3))
    tree = tree_of(rows, padding=2)
    S = len(tree.input_ids)
    inputs = random_heads(S, key_heads)
    upstream = torch.randn(S, H, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = TreeAttention(tree.position_ids, tree.subtree_end, H // key_heads).attend(0, *inputs, scaling=0.7)
    theirs = dense(*inputs, mask_of(tree.subtree_end), 0.7)
    torch.testing.assert_close(ours, theirs, **EXACT)
    our_gradients, their_gradients = (torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs))
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, **EXACT)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6),
    st.integers(0, 2),
    st.integers(1, 40),
    st.sampled_from([(1,), (2,), (1, 2, 4), (3, 7)]),
    st.integers(1, 3),
    st.integers(0, 6),
)
def test_parts_cover_the_mask_exactly_once_and_keep_their_size(rows, padding, max_scores, sides, heads_per_key, known):
    tree = tree_of(rows, padding)
    S = len(tree.input_ids)
    _, end, last = nodes(tree.position_ids, tree.subtree_end)[0]
    known = min(known, end, S - 1) if last == S else 0  # all rows pass through what is known
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_parts, "MAX_SCORES", max_scores)
        patch.setattr(attention_parts, "SIDES", sides)
        plan = plan_parts(tree.position_ids, tree.subtree_end, heads_per_key, known)
    covered, places = torch.zeros(S, S, dtype=torch.int64), []
    for squares in plan.squares:
        (n, side), L = squares.real.shape, squares.side
        assert side == L <= sides[-1] and (n == L == 1 or n * L * L * heads_per_key <= max_scores)
        assert torch.equal(squares.queries, squares.keys - plan.first)
        visible = squares.bias(torch.zeros(1, 1, L, 3)) == 0
        for tokens, real in zip(squares.keys.view(n, L), squares.real, strict=True):
            pairs = visible & real[:, None]
            assert not (pairs & ~real).any()  # what is repeated is seen by nothing of the run
            covered[tokens[:, None].expand(L, L)[pairs], tokens.expand(L, L)[pairs]] += 1
        places += squares.keys.where(squares.real.flatten(), -1).tolist()
    for part in plan.rectangles:
        assert part.k_end <= part.q_start and part.q_start >= plan.first
        queries, keys = part.q_end - part.q_start, part.k_end - part.k_start
        assert queries == 1 or queries * keys * heads_per_key <= max_scores
        covered[part.q_start : part.q_end, part.k_start : part.k_end] += 1
    assert torch.equal(covered[plan.first :], mask_of(tree.subtree_end).long()[plan.first :])
    assert not covered[: plan.first].any() and known - sides[-1] < plan.first <= known
    assert [places[i] for i in plan.places.tolist()] == list(range(plan.first, S))


def test_squares_of_about_the_same_size_are_one_call_whatever_else_is_there(monkeypatch):
    monkeypatch.setattr(attention_parts, "SIDES", (2, 4, 6))
    found = []
    for more in ([], [[7, 1, 2, 3, 4, 5, 6, 7, 8]]):
        tree = tree_of([[0, 1, 2], [0, 3, 4, 4], [0, 5, 6, 6, 6], [0, 7], *more])
        plan = plan_parts(tree.position_ids, tree.subtree_end, R)
        found.append({squares.side: squares.real.sum(1).tolist() for squares in plan.squares})
    assert found == [{2: [1, 2, 1], 4: [3, 4]}, {2: [1, 2, 1], 4: [3, 4, 3], 6: [6]}]


def test_parts_are_planned_for_the_device_of_the_queries():
    """The tree of prompts is planned on the host, for a GPU too."""
    tree = tree_of(TREES["siblings"])
    here, there = (
        TreeAttention(tree.position_ids, tree.subtree_end, R, device=device) for device in (None, torch.device("meta"))
    )
    for plan, device in ((here, "cpu"), (there, "meta")):
        tensors = [plan.parts.places, *(x for one in plan.parts.squares for x in (one.keys, one.queries, one.real))]
        assert {x.device.type for x in tensors} == {device}


@pytest.mark.parametrize("place", range(3))
def test_heads_may_lie_in_any_order(place):
    """The fused kernel reads on where it is handed numbers that do not lie side by side, and does not say so."""
    tree = tree_of(TREES["three levels"])
    inputs = random_heads(len(tree.input_ids))
    expected = dense(*inputs, mask_of(tree.subtree_end), 0.7)
    inputs[place] = inputs[place].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    ours = TreeAttention(tree.position_ids, tree.subtree_end, R).attend(0, *inputs, 0.7)
    torch.testing.assert_close(ours, expected, **EXACT)


def test_a_second_derivative_is_refused():
    tree = tree_of(TREES["siblings"])
    inputs = random_heads(len(tree.input_ids))
    out = TreeAttention(tree.position_ids, tree.subtree_end, R).attend(0, *inputs, 0.7)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("known", range(1, 6))
def test_with_a_known_trunk_the_rest_is_that_of_the_whole_tree(known, fused, monkeypatch):
    monkeypatch.setattr(attention_parts, "_fused", lambda q: fused)
    monkeypatch.setattr(attention_parts, "SIDES", (2, 4))
    tree = tree_of([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8], [1, 2, 3, 4, 5, 9]])
    query, key, value = inputs = random_heads(len(tree.input_ids))
    rest = [x[known:] for x in inputs]
    trunk = [tuple(x[:known].detach().transpose(0, 1) for x in (key, value))]
    ours = TreeAttention(tree.position_ids, tree.subtree_end, R, trunk).attend(0, *rest, 0.7)
    theirs = dense(*inputs, mask_of(tree.subtree_end), 0.7)[known:]
    torch.testing.assert_close(ours, theirs, **EXACT)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    for our_gradient, their_gradient in zip(
        *(torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(our_gradient[known:], their_gradient[known:], **EXACT)


def test_large_scores_stay_finite():
    tree = tree_of(TREES["three levels"])
    query, key, value = random_heads(len(tree.input_ids))
    inputs = (query * 1e4, key, value)
    ours = TreeAttention(tree.position_ids, tree.subtree_end, R).attend(0, *inputs, scaling=1.0)
    torch.testing.assert_close(ours, dense(*inputs, mask_of(tree.subtree_end), 1.0), **EXACT)


def test_c39_a_sibling_has_no_influence_and_gets_no_gradient():
    tree = tree_of(TREES["siblings"])
    query, key, value = random_heads(len(tree.input_ids))
    plan = TreeAttention(tree.position_ids, tree.subtree_end, R)
    before = plan.attend(0, query, key, value, 1.0)
    hidden = ~mask_of(tree.subtree_end)[-1]
    assert hidden.sum() == 5  # the third sibling sees two ancestors and itself, not the other two's five tokens
    key_gradient, value_gradient = torch.autograd.grad(before[-1].sum(), (key, value))
    assert (key_gradient[hidden] == 0).all() and (value_gradient[hidden] == 0).all()
    noise = 100 * hidden[:, None, None]
    assert torch.equal(plan.attend(0, query, key + noise, value - noise, 1.0)[-1], before[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_c27_scores_and_softmax_are_float32_whatever_the_dtype(dtype):
    tree = tree_of(TREES["three levels"])
    inputs = random_heads(len(tree.input_ids), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a run: the products inside must not be rounded by it
        ours = TreeAttention(tree.position_ids, tree.subtree_end, R).attend(0, *inputs, scaling=2.0)
    exact = dense(*(x.double() for x in inputs), mask_of(tree.subtree_end), 2.0)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(ours.float().pow(2).sum(), inputs)
    theirs = torch.autograd.grad(exact.pow(2).sum(), inputs)
    for gradient, their in zip(gradients, theirs, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, their, rtol=8 * eps, atol=64 * eps * float(their.abs().max()))


def test_c36_inputs_are_left_as_they_are():
    tree = tree_of(TREES["siblings"])
    inputs = random_heads(len(tree.input_ids))
    copies = [x.detach().clone() for x in inputs]
    out = TreeAttention(tree.position_ids, tree.subtree_end, R).attend(0, *inputs, 1.0)
    upstream = torch.ones_like(out)
    torch.autograd.grad(out, inputs, upstream)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert (upstream == 1).all()


def test_nothing_is_copied_per_leaf():
    trunk, leaves = list(range(100, 140)), 30
    tree = tree_of([[*trunk, leaf] for leaf in range(leaves)])
    inputs = random_heads(len(tree.input_ids))
    plan = TreeAttention(tree.position_ids, tree.subtree_end, R)
    with Sizes() as sizes:
        out = plan.attend(0, *inputs, 1.0)
        torch.autograd.grad(out.sum(), inputs)
    # keys and values are D wide, scores as wide as a node; a copy per leaf would have 30 * 40 * Hkv * D elements
    wide = [shape.numel() for shape in sizes.shapes if D in shape[-2:]]
    filled_up = 2 * len(tree.input_ids)  # in squares of a few sides
    assert max(wide) <= H * filled_up * D < leaves * len(trunk) * HKV * D


# ---- the interface of transformers -----------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    layer_idx, is_causal, num_key_value_groups = 0, True, R


def through_the_interface(inputs, **options):
    """[S,_,d] -> [S,H,d], as a layer of transformers asks for it."""
    return attention_interface(Layer(), *(x.transpose(0, 1)[None] for x in inputs), None, **options)[0][0]


def test_the_interface_hands_on_what_a_layer_asks_for_and_without_a_tree_it_is_sdpa():
    tree = tree_of(TREES["siblings"])
    inputs = random_heads(len(tree.input_ids))
    plan, seen = TreeAttention(tree.position_ids, tree.subtree_end, R), mask_of(tree.subtree_end)
    for tree_attention, mask in ((plan, seen), (None, torch.ones_like(seen).tril())):
        for scaling in (0.3, None):  # None: the root of the width
            ours = through_the_interface(inputs, scaling=scaling, tree_attention=tree_attention)
            torch.testing.assert_close(ours, dense(*inputs, mask, scaling or D**-0.5), **EXACT)


def test_c22_what_the_interface_does_not_compute_is_refused():
    tree = tree_of(TREES["siblings"])
    query, key, value = inputs = random_heads(len(tree.input_ids))
    with_tree = {"tree_attention": TreeAttention(tree.position_ids, tree.subtree_end, R)}
    for option in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"model: Layer uses {option}"):
            through_the_interface(inputs, **with_tree, **{option: 4})
        through_the_interface(inputs, **with_tree, **{option: None})
    with pytest.raises(ValueError, match="values of another width"):
        through_the_interface((query, key, value[..., :3]), **with_tree)
    with pytest.raises(AssertionError, match="dropout"):
        through_the_interface(inputs, dropout=0.1, **with_tree)
