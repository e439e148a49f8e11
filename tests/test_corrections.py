"""Factors for the mismatch of sampler and learner, against hand-computed numbers.

Tests under `every_correction` hold for every entry of `CORRECTIONS`; the others name those that they are about.
"""

import math

import pytest
import torch

from grpo.corrections import CORRECTIONS, mask, none, truncate

every_correction = pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS.keys())

RATIOS = [[0.1, 0.5, 0.9], [1.0, 1.5, 100.0]]
SAMPLED = torch.full((2, 3), -2.0, dtype=torch.float64)
OLD = SAMPLED + torch.tensor(RATIOS, dtype=torch.float64).log()


def close(factor, expected):
    torch.testing.assert_close(factor, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_none_is_one_everywhere():
    assert none(OLD, SAMPLED, cap=2.0).tolist() == [[1.0] * 3] * 2


def test_truncate_caps_the_ratio_from_above_only():
    close(truncate(OLD, SAMPLED, cap=1.2), [[0.1, 0.5, 0.9], [1.0, 1.2, 1.2]])


def test_mask_drops_what_lies_outside_the_interval():
    close(mask(OLD, SAMPLED, cap=1.6), [[0.0, 0.0, 0.9], [1.0, 1.5, 0.0]])


def test_mask_has_an_interval_symmetric_in_the_log():
    old = torch.tensor([[-0.70, -0.68, 0.68, 0.70]], dtype=torch.float64)  # log 2 = 0.693
    assert (mask(old, torch.zeros_like(old), cap=2.0) > 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("correction", [truncate, mask], ids=["truncate", "mask"])
def test_the_ratio_is_learner_over_sampler(correction):
    factor = correction(torch.tensor([[-1.0]]), torch.tensor([[-1.1]]), cap=3.0)
    assert factor.item() == pytest.approx(math.exp(0.1))


@every_correction
def test_c20_no_mismatch_means_a_factor_of_exactly_one(correction):
    assert correction(OLD, OLD, cap=1.0).eq(1).all()


@every_correction
def test_padding_has_factor_one(correction):
    assert correction(torch.zeros(2, 3), torch.zeros(2, 3), cap=2.0).eq(1).all()


@every_correction
def test_factors_carry_no_gradient(correction):
    assert not correction(OLD.clone().requires_grad_(), SAMPLED.clone().requires_grad_(), cap=2.0).requires_grad


@pytest.mark.parametrize(("correction", "expected"), [(truncate, 2.0), (mask, 0.0)], ids=["truncate", "mask"])
def test_a_ratio_that_overflows_is_bounded(correction, expected):
    assert correction(torch.tensor([[0.0]]), torch.tensor([[-1000.0]]), cap=2.0).item() == expected
    assert correction(torch.tensor([[-1000.0]]), torch.tensor([[0.0]]), cap=2.0).item() == 0.0


@every_correction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c36_inputs_are_unchanged_and_shape_and_dtype_are_kept(correction, dtype):
    old, sampled = OLD.to(dtype), SAMPLED.to(dtype)
    before = old.clone(), sampled.clone()
    factor = correction(old, sampled, cap=2.0)
    assert factor.shape == old.shape and factor.dtype == dtype
    assert old.equal(before[0]) and sampled.equal(before[1])


def test_truncated_importance_sampling_is_unbiased_below_the_cap():
    """E under the sampler of ratio * f = E under the learner of f, on a vocabulary of four."""
    learner = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    sampler = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)
    f = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    corrected = (sampler * truncate(learner.log()[None], sampler.log()[None], cap=10.0)[0] * f).sum()
    torch.testing.assert_close(corrected, (learner * f).sum())
