"""Operations of few rows against plain ones: the same numbers for every family, whoever holds the weights."""

import pytest
import torch

from grpo.batch import Batch
from grpo.kernels import onednn
from grpo.policy import frozen_copy, token_logprobs
from grpo.policy.spec import FAMILIES
from grpo.sampler import Sampler
from grpo.sampler.cache import DecodeAttention
from grpo.sampler.products import FewRows, Joint, side_by_side
from tests.fakes.models import byte_tokenizer, tiny_policy
from tests.policy.test_products import policy_of

IDS, POSITIONS = torch.tensor([5, 6, 7, 5, 9]), torch.tensor([3, 4, 3, 8, 3])
WIDTH, TRUNK = 8, 3


def attention(policy):
    """Five rows of two groups behind a trunk of three tokens, with random keys and values."""
    generator, keys = torch.Generator().manual_seed(1), policy.heads.key_heads
    pair = lambda n: tuple(torch.randn(keys, n, WIDTH, generator=generator, dtype=policy.head.dtype) for _ in "kv")  # noqa: E731
    prompts = [pair(TRUNK + 3) for _ in policy.layers]
    trunk = [tuple(x[:, :TRUNK].clone() for x in layer) for layer in prompts]
    made = DecodeAttention(trunk, max_rows=8, max_groups=2, max_branch=2, max_new_tokens=4)
    made.join(prompts, [torch.tensor([3]), torch.tensor([4, 5])], 4)
    made.keep(torch.tensor([True, True, False, True, True, False, True, False]))
    made.begin()
    return made


@torch.no_grad()
def usual(policy):
    """What learning and prefill compute, [5,D]."""
    with policy.autocast():
        return policy.hidden_states(IDS, POSITIONS, attention(policy))


@torch.no_grad()
def by_few_rows(policy, ops):
    """The same, with these operations."""
    return policy.model.model(IDS, POSITIONS, attention(policy), ops)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_the_usual_ones(family, own):
    policy = policy_of(family)
    expected = usual(policy)
    ours = by_few_rows(policy, FewRows(policy.model, own=own))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_rounded_where_autocast_rounds(family, precision):
    policy = frozen_copy(policy_of(family, precision))
    expected = usual(policy)
    ours = by_few_rows(policy, FewRows(policy.model, own=True))
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
    ours = by_few_rows(sampler.policy, sampler.rows.ops)
    torch.testing.assert_close(ours, usual(frozen_copy(other)), rtol=0.01, atol=0.01)


def test_weights_that_others_hold_stay_where_they_are():
    policy = tiny_policy()
    before = [weight.data_ptr() for weight in policy.parameters()]
    assert Sampler(policy, byte_tokenizer()).rows.ops
    assert [weight.data_ptr() for weight in policy.parameters()] == before


class Doubled(torch.nn.Linear):
    """As of an adapter: what it computes is not in its weight and bias."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("what", ["q_proj", "down_proj", "nothing", "a model of transformers"])
def test_what_the_weights_do_not_say_is_decoded_as_learning_computes_it(what):
    policy = tiny_policy("gemma" if what == "a model of transformers" else "qwen2", "fp64")
    for name, layer in policy.model.named_modules():
        if name.endswith(f"1.self_attn.{what}") or name.endswith(f"1.mlp.{what}"):
            layer.__class__ = Doubled
    sampler = Sampler(policy, byte_tokenizer())
    assert (sampler.rows.ops is not None) == (what == "nothing")
    options = {"group_size": 3, "max_new_tokens": 5, "temperature": 1.0, "seed": 0, "step": 1}
    got = sampler.generate([[1, 2]], **options)
    learned, _ = token_logprobs(policy, Batch([[1, 2]], got.completion_ids, got.completion_mask), 1.0)
    torch.testing.assert_close(got.sampling_logprobs, learned.detach(), rtol=1e-6, atol=1e-6)


def test_heads_that_lie_side_by_side_are_not_copied():
    whole = torch.randn(3, 40).unflatten(1, (5, 8))
    query, key, value = whole.split([2, 2, 1], 1)
    assert side_by_side(query, key, value).data_ptr() == whole.data_ptr()
    for heads in ((query, key, value), (query, key), (query, value), (query, key.clone())):
        assert torch.equal(side_by_side(*heads), torch.cat(heads, 1))


@pytest.mark.parametrize("n", [1, 7, 8, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_products_of_layers_that_read_the_same_are_theirs_packed_or_not(n, bias, own):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, size, bias=bias) for size in (3, 2)]
    x = torch.randn(n, 5)
    expected = torch.cat([layer(x) for layer in layers], 1)
    product = Joint([layer.weight for layer in layers], [layer.bias for layer in layers], own)
    torch.testing.assert_close(product(x), expected)
    product.pack()
    assert (product.packed is not None) == onednn.AVAILABLE
    torch.testing.assert_close(product(x), expected)
    torch.testing.assert_close(product(x.repeat(1, 2)[:, 5:]), expected)  # rows that do not lie side by side


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_not_float32_is_not_packed(dtype):
    product = Joint([torch.ones(2, 3, dtype=dtype)], [None])
    product.pack()
    assert product.packed is None
    assert product(torch.ones(1, 3)).tolist() == [[3, 3]]


@pytest.mark.skipif(not onednn.AVAILABLE, reason="torch was built without oneDNN")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_packed_weights_compute_the_same_and_see_no_change_until_they_are_packed_again(family):
    policy = tiny_policy(family)
    ops = FewRows(policy.model)
    pack = lambda: [joint.pack() for joint in ops.joint.values()]  # noqa: E731
    pack()
    before = usual(policy)
    torch.testing.assert_close(by_few_rows(policy, ops), before, rtol=1e-4, atol=1e-5)
    for layer in policy.layers:
        for linear in (x for x in layer.modules() if isinstance(x, torch.nn.Linear)):
            linear.weight *= 2
            if linear.bias is not None:
                linear.bias += 1
    torch.testing.assert_close(by_few_rows(policy, ops), before, rtol=1e-4, atol=1e-5)
    pack()
    assert (usual(policy) - before).abs().max() > 0.1
    torch.testing.assert_close(by_few_rows(policy, ops), usual(policy), rtol=1e-4, atol=1e-5)


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
