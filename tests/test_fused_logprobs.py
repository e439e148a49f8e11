"""The Triton kernels against the chunked products and the full softmax; without a GPU in Triton's interpreter."""

import pytest
import torch

from grpo import fused_logprobs, logprobs
from grpo.fused_logprobs import linear_logprobs
from tests.test_logprobs import full, random_inputs

pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch where there is a GPU")

ON_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(ON_GPU, reason="kernels are compiled where there is a CUDA device")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]),
]
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name, size in {"ROWS": 16, "WORDS": 32, "WIDTH": 16}.items():
        monkeypatch.setattr(fused_logprobs, name, size)


def inputs_on(device, *sizes, **options):
    hidden, weight, targets = random_inputs(*sizes, **options)
    return *(x.detach().to(device).requires_grad_() for x in (hidden, weight)), targets.to(device)


def outputs_and_gradients(function, hidden, weight, targets, temperature, *options):
    """[M] logprobs and entropy, and the gradients of a mixture of both."""
    outputs = function(hidden, weight, targets, temperature, *options)
    upstream = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(1)).to(hidden.device)
    loss = sum((factor * output).sum() for factor, output in zip(upstream, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(loss, (hidden, weight))]


@every_device
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("M", "V", "D"), [(37, 101, 24), (1, 5, 3), (32, 64, 32)])  # ragged, tiny, whole tiles
def test_c37_kernels_equal_chunked_products_and_the_full_softmax(M, V, D, temperature, device):
    inputs = inputs_on(device, M, V, D, dtype=torch.float32, scale=0.5)
    ours = outputs_and_gradients(linear_logprobs, *inputs, temperature, torch.float32)
    chunked = outputs_and_gradients(logprobs.linear_logprobs, *inputs, temperature)
    doubles = (x.detach().double().requires_grad_() for x in inputs[:2])
    exact = outputs_and_gradients(full, *doubles, inputs[2], temperature)
    for our, their, true in zip(ours, chunked, exact, strict=True):
        assert our.dtype == torch.float32 and our.shape == their.shape
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(our.double(), true, rtol=1e-4, atol=1e-5)


@every_device
def test_c27_factors_in_bfloat16_are_summed_in_float32(device):
    hidden, weight, targets = inputs_on(device, 37, 101, 24, dtype=torch.float32, scale=0.5)
    hidden = hidden.detach().bfloat16().requires_grad_()
    ours = outputs_and_gradients(linear_logprobs, hidden, weight, targets, 0.6, torch.bfloat16)
    rounded = (hidden.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_())
    exact = outputs_and_gradients(full, *rounded, targets, 0.6)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    for our, true in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(our.double(), true, rtol=1e-5, atol=1e-5)
    for our, true in zip(ours[2:], exact[2:], strict=True):
        torch.testing.assert_close(our.double(), true, rtol=2e-2, atol=2e-2 * float(true.abs().max()))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_the_constant_chooses_the_kernel_under_autocast_too(device, monkeypatch):
    inputs = inputs_on(device, 300, 1000, 64, dtype=torch.float32, scale=0.2)
    calls = []
    monkeypatch.setattr(fused_logprobs, "linear_logprobs", lambda *a: calls.append(a[-1]) or linear_logprobs(*a))
    with torch.autocast(device, dtype=torch.bfloat16):
        chunked = outputs_and_gradients(logprobs.linear_logprobs, *inputs, 0.6)
        monkeypatch.setattr(logprobs, "KERNEL", True)
        ours = outputs_and_gradients(logprobs.linear_logprobs, *inputs, 0.6)
    assert calls == [torch.bfloat16]
    for our, their in zip(ours, chunked, strict=True):
        torch.testing.assert_close(our, their, rtol=2e-2, atol=2e-2 * float(their.abs().max()))


@every_device
def test_logits_far_apart_stay_finite(device):
    hidden = torch.tensor([[300.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [4.0]], device=device, requires_grad=True)
    target = torch.tensor([1], device=device)
    values, entropy = linear_logprobs(hidden, weight, target, 1.0, torch.float32)
    assert values.item() == -1500 and entropy.item() == 0
    (values + entropy).sum().backward()
    assert hidden.grad.item() == -5 and weight.grad.flatten().tolist() == [0, 300, -300]


@every_device
def test_no_prediction_is_no_work(device):
    hidden, weight, targets = inputs_on(device, 0, dtype=torch.float32)
    values, entropy = linear_logprobs(hidden, weight, targets, 1.0, torch.float32)
    (values.sum() + entropy.sum()).backward()
    assert values.shape == entropy.shape == (0,) and (weight.grad == 0).all()
