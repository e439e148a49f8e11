"""Factors for the mismatch of sampler and learner, against hand-computed numbers.

Tests under `every_correction` hold for every entry of `CORRECTIONS`; the others name those that they are about.
"""

import math

import pytest
import torch

from grpo.config import Config
from grpo.corrections import CORRECTIONS, mask, mask_row, none, opsm, truncate, truncate_row, veto
from grpo.tables import constants

every_correction = pytest.mark.parametrize("name", CORRECTIONS)

RATIOS = [[0.1, 0.5, 0.9], [1.0, 1.5, 100.0]]
SAMPLED = torch.full((2, 3), -2.0, dtype=torch.float64)
OLD = SAMPLED + torch.tensor(RATIOS, dtype=torch.float64).log()
NOW = OLD - 7.0
BOUNDS = {"correction_floor": 0.5, "correction_cap": 2.0}


def factor_of(correction, old, sampled, now=NOW, kept=None, advantages=None, **bounds):
    """The factor, with every token kept and every advantage positive unless said otherwise."""
    now = old - 7.0 if now.shape != old.shape else now
    kept = torch.ones_like(old, dtype=torch.bool) if kept is None else kept
    advantages = torch.ones(len(old), dtype=old.dtype) if advantages is None else advantages
    return correction(now, old, sampled, advantages, kept, **bounds)


def with_options(name, old, sampled, now=NOW, **others):
    """As in a run, with the bounds that it asks for."""
    return factor_of(CORRECTIONS[name], old, sampled, now, **others, **constants(CORRECTIONS[name], Config(**BOUNDS)))


def close(factor, expected):
    torch.testing.assert_close(factor, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_none_is_one_everywhere():
    assert factor_of(none, OLD, SAMPLED).tolist() == [[1.0] * 3] * 2


def test_truncate_caps_the_ratio_from_above_only():
    close(factor_of(truncate, OLD, SAMPLED, correction_cap=1.2), [[0.1, 0.5, 0.9], [1.0, 1.2, 1.2]])


def test_mask_drops_what_lies_outside_the_interval():
    result = factor_of(mask, OLD, SAMPLED, correction_floor=0.6, correction_cap=1.6)
    close(result, [[0.0, 0.0, 0.9], [1.0, 1.5, 0.0]])


def test_mask_has_the_two_bounds_of_icepop():
    old = torch.tensor([[0.49, 0.51, 4.9, 5.1]], dtype=torch.float64).log()
    result = factor_of(mask, old, torch.zeros_like(old), correction_floor=0.5, correction_cap=5.0)
    assert (result > 0).tolist() == [[False, True, True, False]]


def test_truncate_row_is_the_product_over_the_kept_tokens():
    """0.1 * 0.5 * 0.9 = 0.045 and 1 * 1.5 * 100 = 150; without the last token of a row 0.05 and 1.5."""
    close(factor_of(truncate_row, OLD, SAMPLED, correction_cap=9.0), [[0.045] * 3, [9.0] * 3])
    kept = torch.tensor([[True, True, False]] * 2)
    close(factor_of(truncate_row, OLD, SAMPLED, kept=kept, correction_cap=9.0), [[0.05] * 3, [1.5] * 3])


def test_mask_row_looks_at_the_geometric_mean_of_the_kept_tokens():
    """0.045^(1/3) = 0.356 and 150^(1/3) = 5.31; without the last token 0.05^(1/2) = 0.224 and 1.5^(1/2) = 1.22."""
    for floor, cap, keep in ((0.35, 5.4, [1, 1]), (0.36, 5.4, [0, 1]), (0.35, 5.3, [1, 0])):
        result = factor_of(mask_row, OLD, SAMPLED, correction_floor=floor, correction_cap=cap)
        assert result.tolist() == [[k] * 3 for k in keep]
    kept = torch.tensor([[True, True, False]] * 2)
    result = factor_of(mask_row, OLD, SAMPLED, kept=kept, correction_floor=0.35, correction_cap=1.25)
    assert result.tolist() == [[0] * 3, [1] * 3]


def test_veto_drops_a_row_for_one_token():
    for floor, cap, keep in ((0.09, 101, [1, 1]), (0.11, 101, [0, 1]), (0.09, 99, [1, 0]), (0.09, math.inf, [1, 1])):
        result = factor_of(veto, OLD, SAMPLED, correction_floor=floor, correction_cap=cap)
        assert result.tolist() == [[k] * 3 for k in keep]
    kept = torch.tensor([[True, True, False]] * 2)
    result = factor_of(veto, OLD, SAMPLED, kept=kept, correction_floor=0.09, correction_cap=2)
    assert result.tolist() == [[1] * 3] * 2


def test_opsm_drops_bad_rows_that_the_present_policy_has_left():
    """mean(lp_sampler - lp) is 0.5 nats: beyond a delta of 0.4, within one of 0.6."""
    now, advantages = SAMPLED - 0.5, torch.tensor([1.0, -1.0], dtype=torch.float64)
    for delta, bad in ((0.4, 0), (0.6, 1)):
        floor = math.exp(-delta)
        result = factor_of(opsm, OLD, SAMPLED, now, advantages=advantages, correction_floor=floor)
        assert result.tolist() == [[1] * 3, [bad] * 3]
        per_token = torch.tensor([[1.0, -1.0, 0.0]] * 2, dtype=torch.float64)
        result = factor_of(opsm, OLD, SAMPLED, now, advantages=per_token, correction_floor=floor)
        assert result.tolist() == [[1, bad, 1]] * 2


@pytest.mark.parametrize("name", ["truncate", "mask", "truncate_row"])
def test_the_ratio_is_learner_over_sampler(name):
    factor = with_options(name, torch.tensor([[-1.0]]), torch.tensor([[-1.1]]))
    assert factor.item() == pytest.approx(math.exp(0.1))


@every_correction
def test_c20_no_mismatch_means_a_factor_of_exactly_one(name):
    bad = -torch.ones(2, dtype=torch.float64)
    narrow = constants(CORRECTIONS[name], Config(correction_floor=1.0, correction_cap=1.0))
    assert factor_of(CORRECTIONS[name], OLD, OLD, OLD, advantages=bad, **narrow).eq(1).all()


@every_correction
def test_padding_has_factor_one(name):
    zeros = torch.zeros(2, 3)
    assert with_options(name, zeros, zeros, zeros, kept=zeros.bool(), advantages=-torch.ones(2)).eq(1).all()


@every_correction
@pytest.mark.parametrize("there", [math.nan, math.inf, -math.inf])
def test_c02_what_stands_where_nothing_is_learned_does_not_matter(name, there):
    kept = torch.tensor([[True, True, False], [True, False, True]])
    clean, dirty = (with_options(name, x, SAMPLED, x, kept=kept) for x in (OLD, OLD.masked_fill(~kept, there)))
    assert clean.equal(dirty) and dirty.isfinite().all()


@every_correction
def test_factors_carry_no_gradient(name):
    leaves = [x.clone().requires_grad_() for x in (OLD, SAMPLED, NOW)]
    assert not with_options(name, *leaves).requires_grad


def test_a_ratio_that_overflows_is_bounded():
    for name, expected in (("truncate", 2), ("mask", 0), ("truncate_row", 2), ("mask_row", 0), ("veto", 0)):
        assert with_options(name, torch.tensor([[0.0]]), torch.tensor([[-1000.0]])).item() == expected, name
        assert with_options(name, torch.tensor([[-1000.0]]), torch.tensor([[0.0]])).item() == 0.0, name


@every_correction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c36_inputs_are_unchanged_and_shape_and_dtype_are_kept(name, dtype):
    old, sampled = OLD.to(dtype), SAMPLED.to(dtype)
    before = old.clone(), sampled.clone()
    factor = with_options(name, old, sampled, NOW.to(dtype))
    assert factor.shape == old.shape and factor.dtype == dtype
    assert old.equal(before[0]) and sampled.equal(before[1])


@pytest.mark.parametrize("name", ["truncate", "truncate_row"])
def test_truncated_importance_sampling_is_unbiased_below_the_cap(name):
    """E under the sampler of ratio * f = E under the learner of f, on a vocabulary of four, in rows of one token."""
    learner = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    sampler = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)
    f = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    factor = factor_of(CORRECTIONS[name], learner.log()[:, None], sampler.log()[:, None], correction_cap=10.0)[:, 0]
    torch.testing.assert_close((sampler * factor * f).sum(), (learner * f).sum())


def test_the_ratio_of_rows_is_unbiased_for_what_depends_on_the_whole_row():
    """Rows of two tokens from a vocabulary of two. The ratio of single tokens is not."""
    learner, sampler = (torch.tensor(p, dtype=torch.float64) for p in ([0.3, 0.7], [0.6, 0.4]))
    rows = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    worth = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    drawn, wanted = sampler[rows].prod(-1), (learner[rows].prod(-1) * worth).sum()
    of_rows, of_tokens = (
        (drawn * factor_of(c, learner[rows].log(), sampler[rows].log(), correction_cap=9.0)[:, 0] * worth).sum()
        for c in (truncate_row, truncate)
    )
    torch.testing.assert_close(of_rows, wanted)
    assert (of_tokens - wanted).abs() > 0.1
