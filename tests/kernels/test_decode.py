"""Steps of decoding as kernels, in Triton's interpreter, against the plain ones: attention, a decoder, whole rows."""

from functools import partial

import pytest
import torch

from tests.policy.test_products import policy_of
from tests.sampler.test_generate import ENDS, make_sampler, rows_of
from tests.sampler.test_rows import OPTIONS, PROMPTS, one_at_a_time

pytest.importorskip("triton", reason="Triton comes with torch where there is a GPU")

from grpo.kernels import decode  # noqa: E402
from grpo.kernels.decode import add_norm, gated  # noqa: E402
from grpo.policy.decoder import rotated  # noqa: E402
from grpo.sampler.cache import DecodeAttention  # noqa: E402
from grpo.sampler.decoder_fused import FusedDecodeAttention, FusedRows  # noqa: E402
from grpo.sampler.decoder_fused import block_masses as fused_block_masses
from grpo.sampler.draw import BLOCK, block_masses, sample  # noqa: E402
from grpo.sampler.products import FewRows  # noqa: E402

DEVICES = [
    "cpu" if not torch.cuda.is_available() else pytest.param("cpu", marks=pytest.mark.skip("the interpreter is off")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def keys_and_values(key_heads, tokens, width, random, device):
    """Of two layers."""
    shape = 2, 2, key_heads, tokens, width
    return [tuple(pair) for pair in torch.randn(shape, generator=random).to(device)]


def rooms(heads, key_heads, width, trunk_length, branches, device, group_size=3, grain=4):
    """The two kinds of attention over the same prompts, two layers, some rows further than others, one gone."""
    made = []
    for kind in (DecodeAttention, FusedDecodeAttention):
        random = torch.Generator().manual_seed(0)
        draw = partial(keys_and_values, key_heads, width=width, random=random, device=device)
        sizes = {"max_rows": 16, "max_groups": 5, "max_branch": max(branches), "max_new_tokens": 70}
        room = kind(draw(trunk_length), **sizes, grain=grain)
        for count in branches:
            room.join(draw(count), [torch.arange(count, device=device)], group_size)
        room.keep(torch.arange(len(room.of_row)) != 1)
        for buffers in room.own:
            for buffer in buffers:
                buffer.copy_(torch.randn(buffer.shape, generator=random))
        for row, _ in enumerate(room.of_row):
            room.of_row[row] = room.of_row[row][0], 5 * row
        room._place_rows()
        made.append(room)
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "heads, key_heads, width, trunk_length",
    [(4, 2, 16, 330), (4, 2, 16, 0), (7, 1, 8, 1), (3, 3, 64, 64), (20, 1, 24, 64)],  # queries above and below a tile
)
def test_attention_is_that_of_the_plain_one(device, heads, key_heads, width, trunk_length, monkeypatch):
    monkeypatch.setattr(decode, "PROGRAMS", 9)
    plain, fused = rooms(heads, key_heads, width, trunk_length, [3, 1, 90], device)
    n, random = plain.shape[0], torch.Generator().manual_seed(1)
    assert n == fused.shape[0] == 8 and fused.key == (8,)
    for layer in (0, 1):
        x = torch.randn(n, heads + 2 * key_heads, width, generator=random).to(device)
        angle = torch.rand(n, width // 2, generator=random).repeat(1, 2).to(device)
        rotation = angle.cos()[:, None], angle.sin()[:, None]
        turning, value = x.split([heads + key_heads, key_heads], 1)
        query, key = rotated(turning, *rotation).split([heads, key_heads], 1)
        plain.begin(), fused.begin()
        expected = plain.attend(layer, query, key, value, 0.3)
        ours = fused.attend_heads(layer, x, rotation, 0.3)
        torch.testing.assert_close(ours, expected, **NEAR)
        for our, their in zip(fused.own[layer], plain.own[layer], strict=True):
            torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_in_bfloat16_rounds_what_goes_into_products_and_no_sum(device):
    plain, fused = rooms(4, 2, 16, 330, [3, 1, 90], device)
    for name in ("trunk", "branch", "own"):
        rounded = [[x.bfloat16() for x in buffers] for buffers in getattr(fused, name)]
        setattr(fused, name, rounded)
        setattr(plain, name, [[x.float() for x in buffers] for buffers in rounded])
    random = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(8, n, 16, generator=random).bfloat16().to(device) for n in (4, 2, 2))
    rotation = torch.ones(8, 1, 16, device=device), torch.zeros(8, 1, 16, device=device)
    plain.begin()
    expected = plain.attend(0, query.float(), key.float(), value.float(), 0.3)
    ours = fused.attend_heads(0, torch.cat([query, key, value], 1), rotation, 0.3)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, rtol=5e-3, atol=3e-3)  # weights and result, rounded
    for our, their in zip(fused.own[0], plain.own[0], strict=True):
        assert torch.equal(our.float(), their)


@pytest.mark.parametrize("device", DEVICES)
def test_norm_and_gate_are_those_of_torch(device):
    torch.manual_seed(0)
    hidden, added = torch.randn(5, 44, device=device), torch.randn(5, 44, device=device)
    norm = torch.nn.RMSNorm(44, eps=1e-3, device=device)
    torch.nn.init.normal_(norm.weight)
    stream = hidden.clone()
    with torch.no_grad():
        torch.testing.assert_close(add_norm(stream, None, norm, torch.float32), norm(hidden), **NEAR)
        assert stream.equal(hidden)
        torch.testing.assert_close(add_norm(stream, added, norm, torch.float32), norm(hidden + added), **NEAR)
        assert stream.equal(hidden + added)
        x = torch.randn(3, 2 * 1500, device=device)
        torch.testing.assert_close(gated(x), torch.nn.functional.silu(x[:, :1500]) * x[:, 1500:], **NEAR)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("vocabulary", [3, 512, 5000])
def test_blocks_of_the_vocabulary_weigh_what_they_weigh(device, temperature, vocabulary):
    torch.manual_seed(0)
    logits = (30 * torch.randn(4, vocabulary + 5, device=device))[:, :vocabulary]  # as of a head of whole tiles
    logits[1] -= 1000
    logits[2, : vocabulary // 2] = -torch.inf
    ours, expected = (masses(logits, temperature) for masses in (fused_block_masses, block_masses))
    assert ours[0].equal(expected[0]) and ours[1].dtype == torch.float64
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_weighs_nothing_where_none_of_its_words_does(device):
    logits = torch.full((1, 3 * BLOCK), -torch.inf, device=device)
    logits[0, 1:BLOCK], logits[0, 700] = -200.0, 0.0
    ids, logprobs = sample(logits, torch.zeros(1, dtype=torch.float64, device=device), 1.0, fused_block_masses)
    assert (ids.tolist(), logprobs.tolist()) == ([700], [0.0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "granite", "smollm3"])
def test_a_decoder_is_the_plain_one(device, family):
    policy = policy_of(family, "fp32").to(device)
    plain, fused = rooms(4, 2, 8, 70, [3, 1, 90], device)
    ids = torch.arange(plain.shape[0], device=device)
    with torch.inference_mode():
        plain.begin()
        expected = policy.model.model(ids, 9 * ids, plain, FewRows(policy.model))
        ours = policy.model.model(ids, 9 * ids, fused, FusedRows(policy.model))
    torch.testing.assert_close(ours, expected, **NEAR)


@pytest.mark.parametrize(
    ("device", "half", "compiles", "expected"),
    [
        ("cuda", True, True, True),
        ("cpu", True, True, False),
        ("cuda", False, True, False),
        ("cuda", True, False, False),
    ],
)
def test_kernels_are_for_half_precision_on_a_gpu(device, half, compiles, expected, monkeypatch):
    monkeypatch.setattr(decode, "can_compile", lambda: compiles)
    assert decode.usable(device, half) is expected


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
def test_rows_are_those_of_the_plain_sampler(monkeypatch):
    plain = make_sampler(eos=ENDS, precision="fp32")
    prompts = PROMPTS[:3]  # the last one joins late
    short = OPTIONS | {"max_new_tokens": 5}
    expected = one_at_a_time(plain, prompts, max_new_tokens=5)
    monkeypatch.setattr(decode, "usable", lambda *_: True)
    fused = make_sampler(eos=ENDS, precision="fp32")
    fused.rows.grain, fused.check_every = 4, 3
    assert isinstance(fused.rows.ops, FusedRows)
    for _ in range(2):  # the second time in the same room
        ours = rows_of(fused.generate(prompts, max_rows=6, **short))
        assert [ids for ids, _ in ours] == [ids for ids, _ in expected]
        for (_, our), (_, their) in zip(ours, expected, strict=True):
            torch.testing.assert_close(our, their, **NEAR)
