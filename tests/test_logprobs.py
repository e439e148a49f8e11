"""Chunked log-probabilities and entropy against a full log_softmax, values and gradients, and how large they get."""

import pytest
import torch

from grpo import logprobs as logprobs_module
from grpo.logprobs import CHUNK, CHUNK_BYTES, head_for, linear_logprobs, product, vocabularies_per_chunk
from grpo.tree import pack
from tests.fakes.models import Sizes, tiny_policy

TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def random_inputs(M, V=11, D=5, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(M)
    hidden = (scale * torch.randn(M, D, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (M,), generator=generator)


def full(hidden, weight, targets, temperature):
    """Every logit at once."""
    log_p = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize(("M", "chunk"), [(7, 256), (7, 7), (7, 3), (7, 1), (1, 256), (0, 256), (300, CHUNK)])
def test_c37_c11_chunked_equals_full(M, chunk, temperature, dtype):
    inputs = random_inputs(M, dtype=dtype)
    ours = linear_logprobs(*inputs, temperature, chunk=chunk)
    theirs = full(*inputs, temperature)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == dtype and our.shape == (M,)
        torch.testing.assert_close(our, their, **TOLERANCE[dtype])
    upstream = torch.randn(2, M, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for select in ([1, 0], [0, 1], [1, 1]):  # through the logprobs, through the entropy, through both
        picked = torch.tensor(select, dtype=dtype)[:, None] * upstream
        losses = [(picked * torch.stack(out)).sum() for out in (ours, theirs)]
        gradients = [torch.autograd.grad(loss, inputs[:2], retain_graph=True) for loss in losses]
        for our, their in zip(*gradients, strict=True):
            assert our.dtype == dtype and our.shape == their.shape
            torch.testing.assert_close(our, their, **TOLERANCE[dtype])


@pytest.mark.parametrize("temperature", [1.0, 1e-3])
@pytest.mark.parametrize(("M", "chunk"), [(7, 3), (1, 1), (300, 128)])
def test_c37_a_head_of_whole_tiles_gives_the_numbers_of_its_words_alone(M, chunk, temperature, monkeypatch):
    """As on a GPU in half precision: 300 words in rows of zeros up to 384, whose logits must not be seen."""
    monkeypatch.setattr(logprobs_module, "_pads", lambda *_: True)
    inputs = random_inputs(M, V=300)
    assert len(head_for(inputs[1].detach(), torch.float64)) == 384
    tiles = [words for _, columns in logprobs_module._blocks(M, torch.empty(384, 5), chunk) for words in columns]
    assert all(words.start % 128 == words.stop % 128 == 0 for words in tiles)
    ours, theirs = linear_logprobs(*inputs, temperature, chunk=chunk), full(*inputs, temperature)
    upstream = torch.randn(2, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((upstream * torch.stack(out)).sum(), inputs[:2]) for out in (ours, theirs)]
    for our, their in zip([*ours, *gradients[0]], [*theirs, *gradients[1]], strict=True):
        assert our.shape == their.shape
        torch.testing.assert_close(our, their, **TOLERANCE[torch.float64])


def test_a_head_is_made_larger_for_tensor_cores_alone():
    weight = torch.ones(300, 5)
    assert head_for(weight, torch.float32) is weight and len(head_for(weight, torch.bfloat16)) == 300


def test_hand_worked_numbers():
    # logits 0, 0, ln 2: probabilities 1/4, 1/4, 1/2; entropy 2 * (ln 4)/4 + (ln 2)/2 = 3/2 ln 2
    ln2 = 0.6931471805599453
    weight = torch.tensor([[0.0], [0.0], [ln2]], dtype=torch.float64)
    hidden = torch.ones(2, 1, dtype=torch.float64)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 2]))
    torch.testing.assert_close(logprobs, torch.tensor([-2 * ln2, -ln2], dtype=torch.float64))
    torch.testing.assert_close(entropy, torch.full((2,), 1.5 * ln2, dtype=torch.float64))


def test_c37_no_operation_returns_more_than_chunk_times_vocabulary():
    chunk, V = 8, 101
    inputs = random_inputs(M=40 * chunk, V=V, D=2, dtype=torch.float32)
    with Sizes() as forward:
        logprobs, entropy = linear_logprobs(*inputs, 0.7, chunk=chunk)
    with Sizes() as backward:
        (logprobs + entropy).sum().backward()
    assert chunk * V / 2 < forward.largest <= chunk * V
    assert chunk * V / 2 < backward.largest <= chunk * V


def test_c37_a_whole_policy_never_holds_the_logits_of_more_than_a_chunk():
    policy = tiny_policy()
    prompt, rows = [1, 2, 3, 4], [[i, *range(40 + i, 90 + i)] for i in range(12)]
    tree = pack([prompt], [rows])
    M, V = len(tree.target), policy.vocab_size
    assert M == 12 * 51 > 4 * CHUNK
    with Sizes() as forward:
        logprobs, entropy = policy(tree, 1.0)
    with Sizes() as backward:
        (logprobs + entropy).sum().backward()
    assert CHUNK * V / 2 < forward.largest <= CHUNK * V
    assert CHUNK * V / 2 < backward.largest <= CHUNK * V


def test_c37_a_chunk_is_a_number_of_rows_on_a_cpu_and_of_bytes_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [vocabularies_per_chunk(V, cpu) for V in (11, 151_936)] == [CHUNK, CHUNK]
    assert [vocabularies_per_chunk(V, gpu) for V in (32_768, 151_936, 10**7)] == [4096, 768, CHUNK]
    assert 4 * 151_936 * vocabularies_per_chunk(151_936, gpu) <= CHUNK_BYTES


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_c27_the_product_of_bfloat16_leaves_in_float32(weight_dtype):
    hidden, weight, targets = random_inputs(50, V=200, D=16)
    hidden, weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would round the product
        ours = linear_logprobs(hidden, weight, targets, 0.5, chunk=16)
    exact = full(hidden.double(), weight.double(), targets, 0.5)
    rounded = full(hidden, weight.to(torch.bfloat16), targets, 0.5)
    for our, their, coarse in zip(ours, exact, rounded, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)
        assert (coarse - their).abs().max() > 0.02
    gradients = torch.autograd.grad(ours[0].sum() + ours[1].sum(), (hidden, weight))
    their_gradients = torch.autograd.grad(exact[0].sum() + exact[1].sum(), (hidden, weight))
    for our, their in zip(gradients, their_gradients, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=2e-2, atol=2e-2 * float(their.abs().max()))


def test_c27_weights_in_bfloat16_accumulate_their_gradient_in_float32():
    # a hundred chunks of equal size: adding the last ones to a bfloat16 sum would lose most of each
    M = 4096
    hidden = torch.ones(M, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = linear_logprobs(hidden, weight, torch.zeros(M, dtype=torch.long), chunk=1)
    (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert gradient.flatten().tolist() == [M / 2, -M / 2]


def test_c27_product_keeps_float64_and_float32_and_widens_the_rest():
    a, b = torch.full((1, 3), 1 / 3), torch.full((3, 1), 1 / 7)
    results = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
    for dtype, result in results.items():
        x, y = a.to(dtype), b.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = product(x, y)
        assert out.dtype == result
        torch.testing.assert_close(out, (x.double() @ y.double()).to(result))


def test_logits_far_apart_stay_finite():
    hidden = torch.tensor([[300.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [4.0]], dtype=torch.float64, requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == -1500 and entropy.item() == 0
    (logprobs + entropy).sum().backward()
    assert hidden.grad.item() == -5 and weight.grad.flatten().tolist() == [0, 300, -300]


def test_c13_c36_inputs_are_left_as_they_are():
    inputs = random_inputs(9)
    copies = [x.detach().clone() for x in inputs]
    logprobs, entropy = linear_logprobs(*inputs, 0.5, chunk=4)
    upstream = torch.ones_like(logprobs)
    torch.autograd.grad((logprobs, entropy), inputs[:2], (upstream, upstream))
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert (upstream == 1).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature: {temperature}"):
        linear_logprobs(*random_inputs(2), temperature)


def test_a_target_that_the_vocabulary_lacks_is_an_error():
    hidden, weight, targets = random_inputs(2)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|index"):
        linear_logprobs(hidden, weight, targets + 11)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = random_inputs(5)
    logprobs, _ = linear_logprobs(hidden, weight.detach(), targets)
    logprobs.sum().backward()
    assert hidden.grad is not None
