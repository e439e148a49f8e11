"""Linear layers through oneDNN against torch's own: values, gradients, and which layers are taken."""

import pytest
import torch
from torch import nn

from grpo.kernels import onednn
from grpo.kernels.onednn import faster, linear, multiply

pytestmark = pytest.mark.skipif(not onednn.AVAILABLE, reason="torch has no oneDNN for this processor")
WIDE, NARROW = 400, 300  # of a layer that is large enough


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(bias):
    torch.manual_seed(0)
    return nn.Linear(NARROW, WIDE, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, NARROW), (1, 7, NARROW), (2, 3, NARROW), (0, NARROW)])
def test_values_and_gradients_are_those_of_the_layer(shape, bias):
    ours, theirs = layer(bias), layer(bias)
    x, same_x = (random(*shape).requires_grad_() for _ in range(2))
    y, expected = linear(ours, x), theirs(same_x)
    assert "_Linear" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    upstream = random(*expected.shape, seed=1)
    gradients = torch.autograd.grad(y, [x, *ours.parameters()], upstream)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad(expected, [same_x, *theirs.parameters()], upstream), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_gradients_the_bits_are_the_same():
    one, x = layer(True), random(1, 33, NARROW)
    with torch.enable_grad():
        with_gradients = linear(one, x)
    assert with_gradients.requires_grad and torch.equal(linear(one, x), with_gradients)


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_a_product_may_be_added_and_its_weight_transposed(least, monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", least)
    x, weight, added = random(7, WIDE), random(WIDE, NARROW, seed=1), random(7, NARROW, seed=2)
    expected = added.double() + x.double() @ weight.double()
    ours = multiply(x, weight.t(), added=added)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_compiled_is_left_to_the_compiler(monkeypatch):
    """Inductor would fail on the operations of oneDNN; a backend that compiles nothing shows what it is given."""

    def refused(*_):
        raise AssertionError("an operation of oneDNN in a graph")

    monkeypatch.setattr(onednn, "multiply_packed", refused)
    one, x = layer(True), random(3, NARROW)
    compiled = torch.compile(lambda x: linear(one, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), one(x))


class Adapted(nn.Linear):
    """As adapters do it: a layer that computes more than its weight says."""

    def forward(self, x):
        return super().forward(x) + 1


def test_other_layers_compute_for_themselves():
    adapted, x = Adapted(NARROW, WIDE), random(2, NARROW)
    assert faster(adapted.weight) and torch.equal(linear(adapted, x), adapted(x))


@pytest.mark.parametrize(
    "weight", [torch.ones(9, 9), *(torch.ones(WIDE, NARROW, dtype=x) for x in (torch.double, torch.bfloat16))]
)
def test_small_weights_and_other_dtypes_stay_with_torch(weight):
    assert not faster(weight)
    assert multiply(torch.ones(2, weight.shape[1], dtype=weight.dtype), weight).unique().tolist() == [weight.shape[1]]


def test_of_frozen_weights_no_input_is_kept_and_no_gradient_made():
    frozen = layer(True).requires_grad_(False)
    x = random(7, NARROW).requires_grad_()
    y = linear(frozen, x)
    assert [kept is None for kept in y.grad_fn.saved_tensors] == [True, False]
    y.sum().backward()
    assert frozen.weight.grad is None and frozen.bias.grad is None
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(7, -1), rtol=1e-4, atol=1e-5)


def test_under_autocast_the_product_is_rounded_as_torch_rounds_it():
    plain, x = layer(True), random(7, NARROW)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(onednn.product(x, plain.weight, plain.bias), plain(x))
