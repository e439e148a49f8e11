"""The decoder for few rows against the model's own: the same numbers for every family, whoever holds the weights."""

import pytest
import torch

from grpo import narrow
from grpo.decoding import DecodeAttention
from grpo.narrow import NarrowDecoder, Product, few_logits, fits
from grpo.policy import Policy, frozen_copy
from grpo.rows import Rows
from grpo.sampler import Sampler
from tests.models import FAMILIES, byte_tokenizer, tiny_model, tiny_policy

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


@pytest.mark.parametrize("n", [1, 7, 8, 9, 32])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_rows_are_filled_up_and_cut_again(n, bias):
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(5, size, bias=bias) for size in (3, 2)]
    x = torch.randn(n, 5, generator=generator)
    expected = torch.cat([layer(x) for layer in layers], 1)
    for own in (False, True):
        torch.testing.assert_close(Product(layers, own)(x), expected)


@pytest.mark.parametrize(("n", "vocabulary"), [(1, 5), (3, 4), (9, 13)])
def test_logits_are_those_of_the_whole_head_and_rows_lie_side_by_side(n, vocabulary, monkeypatch):
    monkeypatch.setattr(narrow, "WORDS", 4)
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(n, 5, generator=generator), torch.randn(vocabulary, 5, generator=generator)
    ours = few_logits(x, head)
    torch.testing.assert_close(ours, x @ head.t())
    assert ours.is_contiguous()
