"""The decoder for few rows against the model's own: the same numbers for every family, whoever holds the weights."""

import pytest
import torch

from grpo.kernels import onednn
from grpo.policy import Policy, frozen_copy
from grpo.sampler import Sampler
from grpo.sampler.cache import DecodeAttention
from grpo.sampler.narrow import JointLinear, NarrowDecoder, fits
from grpo.sampler.rows import Rows
from tests.fakes.models import FAMILIES, byte_tokenizer, tiny_model, tiny_policy

IDS, POSITIONS = torch.tensor([5, 6, 7, 5, 9]), torch.tensor([3, 4, 3, 8, 3])
KEYS, WIDTH, TRUNK = 2, 8, 3


def attention(layers=2, dtype=torch.float32):
    """Five rows of two groups behind a trunk of three tokens, with random keys and values."""
    generator = torch.Generator().manual_seed(1)
    pair = lambda n: tuple(torch.randn(KEYS, n, WIDTH, generator=generator, dtype=dtype) for _ in "kv")  # noqa: E731
    prompts = [pair(TRUNK + 3) for _ in range(layers)]
    trunk = [tuple(x[:, :TRUNK].clone() for x in layer) for layer in prompts]
    made = DecodeAttention(trunk, max_rows=8, max_groups=2, max_branch=2, max_new_tokens=4)
    made.join(prompts, [torch.tensor([3]), torch.tensor([4, 5])], 4)
    made.keep(torch.tensor([True, True, False, True, True, False, True, False]))
    made.begin()
    return made


@torch.no_grad()
def usual(policy, **options):
    """What transformers' layers compute, [5,D]."""
    with policy.autocast():
        return policy.hidden_states(IDS, POSITIONS, attention(**options))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_numbers_are_those_of_transformers(family, own):
    policy = tiny_policy(family, "fp64")
    assert fits(policy)
    expected = usual(policy, dtype=torch.float64)
    ours = NarrowDecoder(policy.model.base_model, own=own)(IDS, POSITIONS, attention(dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_is_rounded_where_autocast_rounds(family, precision):
    policy = frozen_copy(tiny_policy(family, precision))
    assert fits(policy)
    expected = usual(policy)
    ours = NarrowDecoder(policy.model.base_model, own=True)(IDS, POSITIONS, attention())
    assert ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.01, atol=0.01)


@torch.no_grad()
def test_weights_of_its_own_lie_next_to_each_other_and_can_still_be_refreshed():
    policy, other = (tiny_policy(precision="bf16", seed=seed) for seed in (0, 1))
    sampler = Sampler(policy, byte_tokenizer())
    attn, mlp = sampler.policy.layers[0].self_attn, sampler.policy.layers[0].mlp
    for parts in ((attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)):
        for name in ("weight", "bias"):
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is not None:
                assert len({x.untyped_storage().data_ptr() for x in tensors}) == 1
    sampler.refresh(other)
    ours = sampler.rows.decoder(IDS, POSITIONS, attention())
    torch.testing.assert_close(ours, usual(frozen_copy(other)), rtol=0.01, atol=0.01)


def test_weights_that_others_hold_stay_where_they_are():
    policy = tiny_policy()
    before = [weight.data_ptr() for weight in policy.parameters()]
    assert Sampler(policy, byte_tokenizer()).rows.decoder
    assert [weight.data_ptr() for weight in policy.parameters()] == before


def changed(part, forward):
    """A policy whose first layer has a part that computes something else, under the usual names."""
    policy = tiny_policy("qwen3")
    policy.layers[0].get_submodule(part).forward = forward
    return policy


def with_another_linear_layer():
    """As adapters do it: the numbers are the same, until something is learned."""

    class Adapted(torch.nn.Linear):
        pass

    policy = tiny_policy()
    policy.layers[1].self_attn.o_proj.__class__ = Adapted
    return policy


def other_forms():
    yield "biases in MLPs", tiny_policy("llama", mlp_bias=True)
    yield "another activation", tiny_policy("llama", hidden_act="gelu")
    yield "another linear layer", with_another_linear_layer()
    yield "another family", Policy(tiny_model("olmo2", pad_token_id=0), byte_tokenizer())
    yield "another MLP", changed("mlp", lambda x: 0.9 * x)
    yield "another norm", changed("input_layernorm", lambda x: 0.9 * x)
    yield "another norm of heads", changed("self_attn.k_norm", lambda x: 0.9 * x)


@pytest.mark.parametrize(("what", "policy"), list(other_forms()), ids=lambda x: x if isinstance(x, str) else "")
def test_another_form_does_not_fit_and_is_decoded_as_it_is(what, policy):
    assert not fits(policy)
    assert Rows(policy).decoder is None
    options = {"group_size": 2, "max_new_tokens": 4, "temperature": 1.0, "seed": 0, "step": 1}
    assert Sampler(policy, byte_tokenizer()).generate([[1, 2], [1, 3]], **options).completion_mask.any()


@pytest.mark.parametrize("n", [1, 7, 8, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_products_of_layers_that_read_the_same_are_theirs_packed_or_not(n, bias, own):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, size, bias=bias) for size in (3, 2)]
    x = torch.randn(n, 5)
    expected = torch.cat([layer(x) for layer in layers], 1)
    product = JointLinear([layer.weight for layer in layers], [layer.bias for layer in layers], own)
    torch.testing.assert_close(product(x), expected)
    product.pack()
    assert (product.packed is not None) == onednn.AVAILABLE
    torch.testing.assert_close(product(x), expected)
    torch.testing.assert_close(product(x.repeat(1, 2)[:, 5:]), expected)  # rows that do not lie side by side


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_not_float32_is_not_packed(dtype):
    product = JointLinear([torch.ones(2, 3, dtype=dtype)], [None])
    product.pack()
    assert product.packed is None
    assert product(torch.ones(1, 3)).tolist() == [[3, 3]]


@pytest.mark.skipif(not onednn.AVAILABLE, reason="torch was built without oneDNN")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_weights_compute_the_same_and_see_no_change_until_they_are_packed_again(family):
    policy = tiny_policy(family)
    decoder = NarrowDecoder(policy.model.base_model)
    pack = lambda: [product.pack() for product in decoder.products]  # noqa: E731
    pack()
    before = usual(policy)
    torch.testing.assert_close(decoder(IDS, POSITIONS, attention()), before, rtol=1e-4, atol=1e-5)
    for layer in policy.layers:
        for linear in (x for x in layer.modules() if isinstance(x, torch.nn.Linear)):
            linear.weight *= 2
            if linear.bias is not None:
                linear.bias += 1
    torch.testing.assert_close(decoder(IDS, POSITIONS, attention()), before, rtol=1e-4, atol=1e-5)
    pack()
    assert (usual(policy) - before).abs().max() > 0.1
    torch.testing.assert_close(decoder(IDS, POSITIONS, attention()), usual(policy), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_generate_packs_the_weights_of_then_and_gives_them_back():
    policy, other = (tiny_policy(seed=seed) for seed in (0, 1))
    sampler = Sampler(policy, byte_tokenizer())
    sampler.is_eos[:] = False
    options = {"group_size": 4, "max_new_tokens": 8, "temperature": 1.0, "seed": 0, "step": 1}
    first = sampler.generate([[1, 2, 3]], **options).completion_ids
    assert all(product.packed is None for product in sampler.rows.products)
    for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        ours.copy_(theirs)
    fresh = Sampler(other, byte_tokenizer())
    fresh.is_eos[:] = False
    expected = fresh.generate([[1, 2, 3]], **options).completion_ids
    assert (expected != first).any()
    assert (sampler.generate([[1, 2, 3]], **options).completion_ids == expected).all()
