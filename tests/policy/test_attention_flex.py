"""FlexAttention over a tree against attention in parts: blocks, values, gradients, one graph for all sizes.

On a CPU its kernel exists for the forward only and for one size at a time, so gradients and sizes are tested with the
operations that the kernel stands for (`aot_eager`); the kernel itself, forward and backward, under the mark `gpu`.
"""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from grpo.kernels.compiled import compile_layers
from grpo.policy import attention_flex, frozen_copy
from grpo.policy.attention import TreeAttention
from grpo.policy.attention_flex import BLOCK, BUCKET, LEAST, FlexAttention, block_mask, padded_size, usable
from grpo.tree import pack
from tests.fakes.compiling import aot_eager, forget, graphs  # noqa: F401  (a fixture)
from tests.fakes.models import Sizes, tiny_policy
from tests.policy.test_attention import dense, mask_of

H, HKV, D = 4, 2, 16
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def tree_of(*lengths, trunk=100):
    """A trunk and one completion of each length, padded as in a run."""
    tree = pack([list(range(trunk))], [[[i] * (length + 1) for i, length in enumerate(lengths)]])
    return tree.padded(padded_size(len(tree.input_ids)))


def heads(S, dtype=torch.float32, device="cpu", head_width=D, query_heads=H):
    """A query [S,H,d], a key and a value [S,Hkv,d]."""
    generator = torch.Generator().manual_seed(S)
    shapes = ((S, n, head_width) for n in (query_heads, HKV, HKV))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def attended(plan, inputs):
    """Values and gradients [S,H,d], 3 x [S,_,d], with one fixed upstream gradient."""
    out = plan.attend(0, *inputs, scaling=0.3)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def in_parts(tree):
    return TreeAttention(tree.position_ids, tree.subtree_end, H // HKV)


# ---- blocks ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=8),
    st.lists(st.integers(1, 150), min_size=40, max_size=40),
)
def test_blocks_are_those_that_looking_at_the_whole_mask_finds(rows, repeats):
    """Tokens are repeated, so that nodes begin and end anywhere in and between blocks."""
    long = [[100 * d + token for d, token in enumerate(row) for _ in range(repeats[8 * d + token])] for row in rows]
    assert_blocks_are_those_of_the_whole_mask(pack([[7]], [[[*row, 0] for row in long]]))


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
def test_blocks_are_right_where_a_tree_ends_at_the_border_of_a_block_or_beside_it(length):
    assert_blocks_are_those_of_the_whole_mask(pack([[1], [2]], [[[5] * length], [[6] * 200]]))


def assert_blocks_are_those_of_the_whole_mask(tree):
    tree = tree.padded(padded_size(len(tree.input_ids)))
    S = len(tree.input_ids)
    ours = block_mask(tree.subtree_end)
    theirs = create_block_mask(ours.mask_mod, None, None, S, S, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE == (BLOCK, BLOCK)
    for side in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(ours, f"{side}_{what}") for what in ("num_blocks", "indices"))
        their_counts, their_indices = (getattr(theirs, f"{side}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, their_counts) and counts.dtype == indices.dtype == torch.int32
        for i, count in enumerate(counts[0, 0].tolist()):
            assert sorted(indices[0, 0, i, :count].tolist()) == sorted(their_indices[0, 0, i, :count].tolist())
    at = torch.arange(S)
    assert torch.equal(ours.mask_mod(0, 0, at[:, None], at[None, :]), mask_of(tree.subtree_end))


def test_a_mask_of_all_pairs_never_exists():
    tree = tree_of(*[300] * 20)
    S = len(tree.input_ids)
    with Sizes() as sizes:
        block_mask(tree.subtree_end)
    assert sizes.largest < 2 * max(S, (S // BLOCK + 1) ** 2)


def test_trees_are_padded_to_whole_buckets():
    assert [padded_size(S) for S in (1, LEAST, LEAST + 1)] == [LEAST, LEAST, LEAST + BUCKET]
    assert LEAST % BUCKET == BUCKET % BLOCK == 0


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("aot_eager")
def test_c39_values_and_gradients_equal_attention_in_parts_with_one_graph_for_all_sizes():
    for lengths in ((40, 40, 40), (200, 1, 190, 30), (700, 650)):  # the first tree has 2 blocks, like 2 key heads
        tree = tree_of(*lengths)
        inputs = heads(len(tree.input_ids))
        ours = attended(FlexAttention(tree.subtree_end, torch.float32), inputs)
        theirs = attended(in_parts(tree), inputs)
        exact = dense(*inputs, mask_of(tree.subtree_end), 0.3)
        torch.testing.assert_close(ours[0], exact, rtol=1e-4, atol=1e-5)
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


@pytest.mark.usefixtures("aot_eager")
def test_c39_a_sibling_has_no_influence_and_gets_no_gradient():
    tree = tree_of(150, 150)
    inputs = heads(len(tree.input_ids))
    plan = FlexAttention(tree.subtree_end, torch.float32)
    out = plan.attend(0, *inputs, 0.3)
    first, second = slice(100, 250), slice(250, 400)
    gradients = torch.autograd.grad(out[second].sum(), inputs)
    assert all((gradient[first] == 0).all() for gradient in gradients)
    query, key, value = (x.detach().clone() for x in inputs)
    key[first], value[first] = 50, -50
    assert torch.equal(plan.attend(0, query, key, value, 0.3)[second], out[second])


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_c27_inputs_are_rounded_and_the_output_has_the_dtype_of_the_query(dtype):
    tree = tree_of(40, 40)
    query, key, value = heads(len(tree.input_ids))
    with torch.autocast("cpu", dtype=dtype):  # rotary positions leave query and key in float32, and value rounded
        out = FlexAttention(tree.subtree_end, dtype).attend(0, query, key, value.to(dtype), 0.3)
    exact = dense(*(x.to(dtype).double() for x in (query, key, value)), mask_of(tree.subtree_end), 0.3)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_compiled_kernel_of_a_cpu_equals_attention_in_parts(monkeypatch):
    # All that a CPU can: one graph for one size.
    monkeypatch.setattr(attention_flex, "any_size", lambda function: torch.compile(function, dynamic=False))
    tree = tree_of(200, 1, 190, 30)
    inputs = [x.detach() for x in heads(len(tree.input_ids))]
    ours = FlexAttention(tree.subtree_end, torch.float32).attend(0, *inputs, 0.3)
    torch.testing.assert_close(ours, in_parts(tree).attend(0, *inputs, 0.3), rtol=1e-4, atol=1e-5)


# ---- in a policy -----------------------------------------------------------------------------------------------------


def test_it_is_used_in_half_precision_on_a_gpu_and_for_heads_that_the_kernel_takes():
    assert usable(CUDA, torch.bfloat16, 64) and usable(CUDA, torch.float16, 16)
    assert not usable(CUDA, None, 64) and not usable(CPU, torch.bfloat16, 64) and not usable(CUDA, torch.bfloat16, 8)


@pytest.mark.slow
@pytest.mark.usefixtures("aot_eager")
def test_c22_policy_and_reference_agree_exactly_and_with_attention_in_parts_up_to_rounding(monkeypatch):
    policy = tiny_policy(precision="bf16", head_dim=D)
    tree = pack([list(range(1, 50))], [[[i] * 30 for i in range(1, 9)]])
    in_parts, _ = policy(tree, 1.0)
    reference = frozen_copy(policy)
    compile_layers(policy, reference, None)
    monkeypatch.setattr(attention_flex, "usable", lambda *_: True)
    made = []
    monkeypatch.setattr(attention_flex, "FlexAttention", lambda *a: made.append(len(a[0])) or FlexAttention(*a))
    learned, _ = policy(tree, 1.0)
    with torch.no_grad():
        old, _ = policy(tree, 1.0)
        referred, _ = reference(tree, 1.0)
    assert made == [LEAST] * 3  # 289 tokens
    assert torch.equal(learned, referred) and torch.equal(learned, old)
    assert 0 < (learned - in_parts).abs().max() < 0.3


# ---- the kernel ------------------------------------------------------------------------------------------------------


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("query_heads", [4, 14])  # groups of 2 and of 7
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_kernel_of_a_gpu_equals_attention_in_parts_backwards_too(device, dtype, query_heads):
    trees = (40, 40, 40), (200, 1, 190, 30), (700, 650)
    assert_the_kernel_equals_attention_in_parts(device, dtype, query_heads, trees, 2e-2)


def assert_the_kernel_equals_attention_in_parts(device, dtype, query_heads, trees, tolerance):
    """With one graph for trees of all these lengths."""
    forget()
    for lengths in trees:
        tree = tree_of(*lengths).to(device)
        inputs = heads(len(tree.input_ids), dtype, device, head_width=64, query_heads=query_heads)
        ours = attended(FlexAttention(tree.subtree_end, dtype), inputs)
        plan = TreeAttention(tree.position_ids, tree.subtree_end, query_heads // HKV)
        for our, their in zip(ours, attended(plan, inputs), strict=True):
            torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * float(their.abs().max()))
    assert graphs() == 1


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_blocks_are_found_without_waiting_for_the_gpu(device):
    tree = tree_of(200, 1, 190).to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_mask(tree.subtree_end)
    finally:
        torch.cuda.set_sync_debug_mode("default")
