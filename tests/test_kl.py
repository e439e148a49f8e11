"""KL estimators by enumeration: on a vocabulary of five, expectations and exact gradients are sums, not samples.

Tests under `every_estimator` hold for every entry of `KL`; the others name the estimators that they are about.
"""

import math

import pytest
import torch

from grpo.kl import KL, k1, k1_plus, k2, k3, k3_plus, k3_ratio

every_estimator = pytest.mark.parametrize("estimator", KL.values(), ids=KL.keys())

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.3], dtype=torch.float64)
REFERENCE = torch.tensor([-0.2, 0.4, 1.1, -1.5, 0.6], dtype=torch.float64).log_softmax(-1)


def expectation(estimator):
    """E over the policy's own tokens: (value, expected gradient in the logits of the sampled estimator as a loss)."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp().detach()  # tokens are drawn, then the estimator is differentiated
    loss = (probabilities * estimator(logprobs[None], REFERENCE[None])[0]).sum()
    return loss.item(), torch.autograd.grad(loss, logits)[0]


def exact(reverse=True):
    """KL(policy || reference), or the other direction, and its exact gradient in the logits."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    d = logprobs - REFERENCE
    kl = (logprobs.exp() * d).sum() if reverse else (REFERENCE.exp() * -d).sum()
    return kl.item(), torch.autograd.grad(kl, logits)[0]


@pytest.mark.parametrize("estimator", [k1, k3, k1_plus, k3_plus, k3_ratio])
def test_c24_all_values_but_that_of_k2_are_unbiased(estimator):
    assert expectation(estimator)[0] == pytest.approx(exact()[0], rel=1e-12)


def test_c24_the_value_of_k2_is_biased():
    assert abs(expectation(k2)[0] / exact()[0] - 1) > 0.05


@pytest.mark.parametrize("estimator", [k2, k1_plus, k3_plus, k3_ratio])
def test_c24_the_gradient_of_k2_and_of_those_made_from_it_is_that_of_the_exact_kl(estimator):
    torch.testing.assert_close(expectation(estimator)[1], exact()[1], rtol=1e-12, atol=1e-14)


def test_c24_with_the_ratio_value_and_gradient_are_exact_on_samples_of_another_policy():
    """And without it they are not."""
    drawn_by = torch.tensor([1.0, 0.2, -0.5, 0.3, 0.0], dtype=torch.float64).log_softmax(-1)

    def expected(estimator):
        logits = LOGITS.clone().requires_grad_()
        values = estimator(logits.log_softmax(-1)[None], REFERENCE[None], drawn_by[None])[0]
        loss = (drawn_by.exp() * values).sum()
        return loss.item(), torch.autograd.grad(loss, logits)[0]

    value, gradient = expected(k3_ratio)
    assert value == pytest.approx(exact()[0], rel=1e-12)
    torch.testing.assert_close(gradient, exact()[1], rtol=1e-12, atol=1e-14)
    assert (expected(k2)[1] - exact()[1]).norm() / exact()[1].norm() > 0.1


def test_c09_golden_value_and_gradient_of_the_ratio_times_k3():
    """r = 1.5, d = 0.2: 1.5 * 0.018731 and 1.5 * 0.2."""
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    value = k3_ratio(logprobs, logprobs.detach() - 0.2, logprobs.detach() - math.log(1.5))
    value.backward()
    assert (value.item(), logprobs.grad.item()) == pytest.approx((0.028096, 0.3), abs=1e-6)


def test_c24_the_gradient_of_k1_has_expectation_zero():
    assert expectation(k1)[1].abs().max() < 1e-15 < exact()[1].abs().max()


def test_c24_the_gradient_of_k3_is_biased_it_is_that_of_the_other_direction():
    gradient = expectation(k3)[1]
    torch.testing.assert_close(gradient, exact(reverse=False)[1], rtol=1e-12, atol=1e-14)
    assert (gradient - exact()[1]).norm() / exact()[1].norm() > 0.1


def test_golden_values():
    d = torch.tensor([[math.log(2.0), -math.log(2.0), 0.0]], dtype=torch.float64)
    reference = torch.full((1, 3), -1.0, dtype=torch.float64)
    log2 = math.log(2.0)
    assert k1(reference + d, reference)[0].tolist() == pytest.approx([log2, -log2, 0])
    assert k2(reference + d, reference)[0].tolist() == pytest.approx([log2**2 / 2, log2**2 / 2, 0])
    assert k3(reference + d, reference)[0].tolist() == pytest.approx([0.5 - 1 + log2, 2 - 1 - log2, 0])


@every_estimator
def test_c22_equal_policies_have_kl_exactly_zero(estimator):
    logprobs = -torch.rand(4, 7) * 20
    assert estimator(logprobs, logprobs).eq(0).all()


@pytest.mark.parametrize("estimator", [k2, k3], ids=["k2", "k3"])
@pytest.mark.parametrize("exponent", range(-7, 2))
def test_k2_and_k3_are_never_negative_and_agree_near_zero(estimator, exponent):
    # in float32, exp(-d) - 1 + d at d = 1e-4 keeps no digit of 5e-9 and is negative for many d; expm1 keeps its sign
    d = torch.linspace(-1, 1, 2001)[None] * 10.0**exponent
    reference = torch.zeros_like(d)
    assert estimator(d, reference).min() >= -1e-7 * d.abs().max()
    if exponent in (-2, -3):
        torch.testing.assert_close(k3(d, reference), k2(d, reference), rtol=0.02, atol=1e-7 * 10.0**exponent)


def test_c25_k3_does_not_clamp_its_gradient():
    logprobs = torch.tensor([[-30.0, -60.0]], dtype=torch.float64, requires_grad=True)
    k3(logprobs, torch.zeros(1, 2, dtype=torch.float64)).sum().backward()
    assert logprobs.grad[0].tolist() == pytest.approx([1 - math.exp(30), 1 - math.exp(60)], rel=1e-12)


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c36_inputs_are_unchanged_and_shape_and_dtype_are_kept(estimator, dtype):
    logprobs, reference = -torch.rand(2, 3, dtype=dtype), -torch.rand(2, 3, dtype=dtype)
    before = logprobs.clone(), reference.clone()
    result = estimator(logprobs, reference)
    assert result.shape == (2, 3) and result.dtype == dtype
    assert logprobs.equal(before[0]) and reference.equal(before[1])


@every_estimator
def test_padding_holds_zero_in_both_and_costs_nothing(estimator):
    padding = torch.zeros(1, 4, requires_grad=True)
    value = estimator(padding, torch.zeros(1, 4))
    (value * torch.zeros(1, 4)).sum().backward()
    assert value.eq(0).all() and padding.grad.eq(0).all()
