"""The objective: its three parts meet as the formula says, in numbers worked out by hand."""

import math

import pytest
import torch

from grpo.config import Config, constants
from grpo.corrections import mask as masked
from grpo.corrections import none, truncate
from grpo.kl import k1, k2, k3, k3_ratio
from grpo.losses import grpo, reinforce
from grpo.objective import objective

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
