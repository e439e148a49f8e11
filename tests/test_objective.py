"""The objective: its parts meet as the formula says, in numbers worked out by hand; and what moves its coefficients."""

import math

import pytest
import torch

from grpo.config import Config
from grpo.corrections import mask as masked
from grpo.corrections import none, truncate
from grpo.kl import k1, k2, k3, k3_ratio
from grpo.losses import grpo, reinforce
from grpo.objective import NATS_PER_BIN, NUM_BINS, highest_entropy, next_entropy_coef, next_kl_coef, objective
from grpo.tables import constants

# One row of three tokens, the last one not learned from; ratios to the old policy 2, 1/2; of old to sampler 4, 1/2.
OLD = torch.tensor([[-1.0, -2.0, 0.0]])
LOGPROBS = OLD + torch.tensor([[math.log(2), -math.log(2), 0.0]])
SAMPLING = OLD - torch.tensor([[math.log(4), -math.log(2), 0.0]])
REFERENCE = LOGPROBS - torch.tensor([[0.5, -2.0, 0.0]])
MASK = torch.tensor([[True, True, False]])
BOUNDS = {"clip_low": 0.2, "clip_high": 0.2}
ADVANTAGE = torch.tensor([3.0])


def parts_of(loss, correction, cap, kl) -> dict:
    """What `objective` is put together from."""
    bounds = constants(correction, Config(correction_floor=1 / cap, correction_cap=cap))
    terms = {"loss": loss, "constants": BOUNDS, "correction": correction, "bounds": bounds}
    return terms | {"kl": kl, "kl_coef": 0.1}


def test_surrogate_correction_and_kl_are_put_together_as_by_hand():
    """Surrogates -min(2, 1.2) 3 = -3.6 and -min(0.5, 0.8) 3 = -1.5; factors min(4, 3), 0.5; k2 0.125 and 2."""
    parts = parts_of(grpo, truncate, 3.0, k2)
    found = objective(LOGPROBS, OLD, SAMPLING, REFERENCE, ADVANTAGE, MASK, **parts)
    torch.testing.assert_close(found.per_token_loss, torch.tensor([[-10.8 + 0.0125, -0.75 + 0.2, 0.0]]))
    torch.testing.assert_close(found.kl, torch.tensor([[0.125, 2.0, 0.0]]))
    assert found.clipped.tolist() == [[True, False, False]]


def test_a_token_that_the_correction_masks_still_pays_its_kl():
    parts = parts_of(grpo, masked, 3.0, k1)
    found = objective(LOGPROBS, OLD, SAMPLING, REFERENCE, ADVANTAGE, MASK, **parts)
    torch.testing.assert_close(found.per_token_loss, torch.tensor([[0.05, -0.75 - 0.2, 0.0]]))


@pytest.mark.parametrize("there", [math.nan, math.inf, -math.inf, -1e30])
@pytest.mark.parametrize("kl", [k3, k3_ratio])
def test_whatever_stands_where_nothing_is_learned_reaches_neither_loss_nor_gradient(there, kl):
    logprobs, old = LOGPROBS.masked_fill(~MASK, there).requires_grad_(), OLD.masked_fill(~MASK, there)
    parts = parts_of(grpo, truncate, 3.0, kl)
    found = objective(logprobs, old, SAMPLING, REFERENCE.masked_fill(~MASK, -there), ADVANTAGE, MASK, **parts)
    assert (found.per_token_loss[0, 2], found.kl[0, 2]) == (0, 0) and found.per_token_loss.isfinite().all()
    (found.per_token_loss * MASK).sum().backward()
    assert logprobs.grad[0, 2] == 0 and logprobs.grad.isfinite().all()


def test_without_a_reference_there_is_no_kl():
    parts = parts_of(grpo, none, 3.0, k2)
    found = objective(LOGPROBS, OLD, SAMPLING, None, ADVANTAGE, MASK, **parts)
    torch.testing.assert_close(found.per_token_loss, torch.tensor([[-3.6, -1.5, 0.0]]))
    assert found.kl is None


def test_the_gradient_is_that_of_both_terms_and_stops_at_the_correction():
    """d/dlp of -A c lp + 0.1 d^2 / 2 = -3 c + 0.1 d, with c = (4, 0.5) and d = (0.5, -2); the old policy gets none."""
    logprobs, old = LOGPROBS.clone().requires_grad_(), OLD.clone().requires_grad_()
    parts = parts_of(reinforce, truncate, 9.0, k2)
    objective(logprobs, old, SAMPLING, REFERENCE, ADVANTAGE, MASK, **parts).per_token_loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-11.95, -1.7, 0.0]]))
    assert old.grad is None


def test_in_the_reward_the_kl_of_the_old_policy_is_taken_from_each_tokens_advantage():
    """d of the old policy is 0.5 - log 2 and -2 + log 2. A = 3 - 0.1 d; the losses are -1.2 A and -A / 2."""
    parts = parts_of(grpo, none, 3.0, k1) | {"kl_in": "reward"}
    logprobs, old = LOGPROBS.clone().requires_grad_(), OLD.clone().requires_grad_()
    found = objective(logprobs, old, SAMPLING, REFERENCE, ADVANTAGE, MASK, **parts)
    assert not found.kl.requires_grad
    d = torch.tensor([0.5 - math.log(2), math.log(2) - 2])
    torch.testing.assert_close(found.kl[0, :2], d)
    torch.testing.assert_close(found.per_token_loss[0, :2], -torch.tensor([1.2, 0.5]) * (3 - 0.1 * d))
    found.per_token_loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -0.5 * (3 - 0.1 * d[1]), 0.0]]))
    per_token = objective(LOGPROBS, OLD, SAMPLING, REFERENCE, ADVANTAGE[:, None].expand(1, 3), MASK, **parts)
    assert per_token.per_token_loss.equal(found.per_token_loss)


def test_the_factor_of_the_correction_is_there_to_be_measured():
    found = objective(LOGPROBS, OLD, SAMPLING, None, ADVANTAGE, MASK, **parts_of(grpo, truncate, 3.0, k2))
    torch.testing.assert_close(found.factor, torch.tensor([[3.0, 0.5, 1.0]]))


def test_a_token_without_a_surrogate_has_no_gradient_of_it_and_pays_its_kl():
    logprobs = LOGPROBS.clone().requires_grad_()
    only = torch.tensor([[False, True, True]])
    found = objective(
        logprobs, OLD, SAMPLING, REFERENCE, ADVANTAGE, MASK, **parts_of(reinforce, none, 3.0, k2), surrogate_mask=only
    )
    assert found.per_token_loss[0, 0].item() == pytest.approx(0.1 * 0.125)
    found.per_token_loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.05, -3 - 0.2, 0.0]]))


def whole(counts):
    return counts


ENTROPY = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.1, math.nan]])
FIVE = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("share", "kept"), [(1.0, [0.1, 0.5, 1, 2, 3]), (0.6, [1, 2, 3]), (0.4, [2, 3]), (0.3, [2, 3]), (0.01, [3])]
)
def test_the_tokens_of_the_highest_entropy_are_a_share_of_those_that_are_learned_from(share, kept):
    chosen = highest_entropy(ENTROPY, FIVE, share, sum_over_ranks=whole)
    assert ENTROPY[chosen].sort().values.tolist() == pytest.approx(kept)


def test_siblings_with_the_same_entropy_but_for_rounding_stay_together():
    """Every row of a group begins after the same prompt; which of them is higher is the rounding of a product."""
    entropy = torch.tensor([[1.5, 0.2], [1.5 - 1e-7, 0.3], [1.5 + 1e-7, 4.0]], dtype=torch.float64)
    for share, kept in ((0.2, 4), (1 / 6, 1)):  # two of six tokens, and one
        chosen = highest_entropy(entropy, torch.ones(3, 2, dtype=torch.bool), share, sum_over_ranks=whole)
        assert chosen.sum() == kept


def test_neighbouring_bins_are_told_apart_and_both_ends_hold_what_lies_beyond():
    one, top, lengths = NATS_PER_BIN, (NUM_BINS - 1) * NATS_PER_BIN, []
    entropy = torch.tensor([[-1.0, 0.0, one, top - one, top, 100.0, math.nan]], dtype=torch.float64)
    mask = ~entropy.isnan()
    for tokens, kept in ((1, 2), (3, 3), (4, 4), (5, 6)):  # of six; two are in the lowest bin and two in the highest
        chosen = highest_entropy(
            entropy, mask, tokens / 6, sum_over_ranks=lambda here: lengths.append(len(here)) or here
        )
        assert chosen.sum() == kept and not chosen[~mask].any()
    assert set(lengths) == {NUM_BINS}, "ranks add up counts of the same bins"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_threshold_is_that_of_all_ranks(share):
    """Against sorting all tokens; ranks have other numbers of them, and one of them has none."""
    entropy = torch.rand(30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    mask = entropy.frac() < 0.7
    parts = [slice(0, 20), slice(20, 20), slice(20, 30)]
    counts = []
    for part in parts:
        highest_entropy(entropy[part], mask[part], 1.0, sum_over_ranks=lambda here: counts.append(here) or here)
    chosen = [highest_entropy(entropy[p], mask[p], share, sum_over_ranks=lambda _: sum(counts)) for p in parts]
    least = entropy[mask].sort(descending=True).values[math.ceil(share * int(mask.sum())) - 1]
    assert torch.equal(torch.cat(chosen), mask & (entropy >= least - 1e-4)) and counts[1].sum() == 0


@pytest.mark.parametrize(
    ("kl", "after"), [(0.2, 0.00102048), (9.0, 0.00102048), (0.11, 0.00101024), (0.1, 0.001), (-1.0, 0.00097952)]
)
def test_the_weight_of_the_kl_moves_by_the_relative_error_within_a_fifth(kl, after):
    """0.001 (1 + 0.2 * 1024 / 10000) = 0.00102048, as in verl and TRL."""
    found = next_kl_coef(0.001, kl, kl_target=0.1, sequences=1024, kl_horizon=10_000)
    assert found == pytest.approx(after, rel=1e-12)


def test_the_weight_of_the_entropy_moves_by_a_step_towards_the_target_within_its_bounds():
    coef, seen = 0.0, []
    for entropy in (0.3, 0.1, 0.1, 0.2, 0.1):
        coef = next_entropy_coef(coef, entropy, entropy_target=0.2, entropy_step=0.005)
        seen.append(coef)
    assert seen == pytest.approx([0, 0.005, 0.01, 0.005, 0.01])
    assert next_entropy_coef(0.9, 0.1, entropy_target=0.2, entropy_step=0.5) == 1
