"""Lean operations against plain ones: the same numbers and gradients for every family, fewer bytes kept."""

import pytest
import torch

from grpo.policy.attention import TreeAttention
from grpo.policy.decoder import PLAIN
from grpo.policy.products import LEAN
from grpo.policy.spec import FAMILIES
from grpo.tree import pack
from tests.fakes import saved
from tests.fakes.models import tiny_policy

TREE = pack([[1, 2, 3]], [[[4] * 20, [5] * 17]])
CHOICES = {
    "granite": {"residual_multiplier": 0.5},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
}
"""What is not the same in both layers of a family's tiny model, or is left out by default."""
LINEAR = ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def policy_of(family, precision="fp64", **changes):
    return tiny_policy(family, precision, **CHOICES.get(family, {}) | changes)


def run(policy, ops):
    """The mean square of the hidden states of a fixed tree."""
    attention = TreeAttention(TREE.position_ids, TREE.subtree_end, policy.heads.per_key)
    return policy.model.model(TREE.input_ids, TREE.position_ids, attention, ops).square().mean()


def gradients(policy, ops, **options):
    value = run(policy, ops)
    return value, torch.autograd.grad(value, list(policy.model.model.parameters()), **options)


def assert_the_same(policy, **tolerance):
    (ours, our_gradients), (plain, plain_gradients) = (gradients(policy, ops) for ops in (LEAN, PLAIN))
    with torch.no_grad():
        assert torch.equal(run(policy, LEAN), ours), "with and without gradient the bits are the same"
    torch.testing.assert_close(ours, plain, **tolerance)
    for our, their in zip(our_gradients, plain_gradients, strict=True):
        scale = their.abs().max()
        assert scale > 0
        torch.testing.assert_close(our / scale, their / scale, **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_the_plain_ones(family):
    assert_the_same(policy_of(family), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])  # biases everywhere, in attention, no norms in front
def test_in_float32_products_may_be_those_of_onednn(family):
    assert_the_same(policy_of(family, "fp32"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", LINEAR)
def test_a_layer_that_is_no_plain_linear_one_is_called(place):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    policy = policy_of("qwen2")
    before = run(policy, LEAN)
    policy.layers[0].get_submodule(place).__class__ = Doubled
    assert_the_same(policy, rtol=1e-12, atol=1e-12)
    assert (run(policy, LEAN) - before).abs() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "qwen2", "olmo2"])
def test_less_is_kept_for_backward(family):
    policy, kept = policy_of(family, "fp32", intermediate_size=96), []
    for ops in (LEAN, PLAIN):
        with saved.noted() as seen:
            run(policy, ops)
        kept.append(saved.num_bytes(seen, policy))
    assert kept[0] < 0.65 * kept[1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_a_second_derivative_is_refused_and_never_wrong(family):
    with pytest.raises(RuntimeError, match="once_differentiable"):
        _, first = gradients(policy_of(family), LEAN, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()
