"""Golden numbers across libraries: the formulas of TRL, verl and NeMo-RL, written anew in numpy, on the same inputs.

Where `docs/algorithm.md` says that one of them is the same as here, loss and gradient must be equal. Where it says that
they differ, they must differ in the way it says: ours, changed like that, is theirs. The formulas were read in

    TRL 1.16.0        https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/grpo_trainer.py
    verl 0.9.1        https://github.com/volcengine/verl/blob/v0.9.1/verl/trainer/ppo/core_algos.py, and
                      rollout_corr_helper.py beside it
    NeMo-RL 006907a   https://github.com/NVIDIA-NeMo/RL/blob/006907a9570734f3e5d484c08ada84b0b89224c9/nemo_rl/
                      algorithms/loss/loss_functions.py, and advantage_estimator.py at 00925dd

A formula is a function of lp and sg: sg is lp where it is detached. Its gradient is a finite difference in lp alone.
Left out: clamps at 10 and 20 nats, which no input reaches.
"""

import math

import numpy as np
import pytest
import torch

from grpo.advantages import ADVANTAGES, combine, whiten
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.logprobs import linear_logprobs
from grpo.losses import LOSSES
from grpo.objective import objective
from grpo.weighting import WEIGHTINGS, count

G, B, T, CAP = 3, 6, 4, 8
LENGTHS = np.array([4, 1, 3, 4, 2, 3])
MASK = np.arange(T) < LENGTHS[:, None]
WAVE = np.arange(B * T).reshape(B, T)
OLD = -2.2 + 1.5 * np.cos(1.7 * WAVE)
NEW = np.minimum(OLD + 0.9 * np.sin(2.3 * WAVE), -0.01)
NEW[4, 0] = OLD[4, 0] + 1.3  # a ratio of 3.7 where A < 0
REF, SAMPLED = OLD + 0.3 * np.sin(0.9 * WAVE), OLD - 0.4 * np.cos(0.8 * WAVE)
A = np.array([1.0, -0.5, -0.6, 0.3, -1.1, 0.7])[:, None]
LOW, HIGH = 0.2, 0.28
REWARDS = np.array([[1.0, 0.0, 0.0], [0.5, 2.0, -0.3]])
OTHER_REWARDS = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
SAME, DIFFERENT = {}, {}


def same(function):
    """It returns ours and theirs, which are equal."""
    SAME[function.__name__] = function


def different(function):
    """It returns ours, theirs, and what ours becomes with the difference that the page names: that is theirs."""
    DIFFERENT[function.__name__] = function


def tensor(array):
    return torch.from_numpy(np.asarray(array).copy())


def advantage(name, rewards=REWARDS, **facts):
    return ADVANTAGES[name](tensor(rewards), **facts).numpy()


def ours(loss, weighting="token_mean", *, kl=None, correction="none", bounds=None, mask=MASK, old=OLD, **constants):
    """[1 + B*T]: the loss of an update, then its gradient to every log-probability."""
    logprobs, kept = tensor(NEW).requires_grad_(), tensor(mask)
    found = objective(
        logprobs, tensor(old), tensor(SAMPLED), tensor(REF) if kl else None, tensor(A[:, 0]), kept,
        loss=LOSSES[loss], constants=constants, correction=CORRECTIONS[correction], bounds=bounds or {},
        kl=KL.get(kl), kl_coef=0.5,
    )  # fmt: skip
    tokens, sequences = count(kept)
    counts = {"num_tokens": tokens, "num_sequences": sequences, "max_new_tokens": CAP, "dtype": torch.float64}
    value = (WEIGHTINGS[weighting](kept, **counts) * found.per_token_loss).sum()
    value.backward()
    return np.concatenate([[value.item()], logprobs.grad.numpy().ravel()])


def theirs(formula, total, mask=MASK):
    """The same of a formula (lp, sg) -> [B,T] or [B,1], added up by `total`."""
    step, slopes = 1e-6, np.zeros(B * T)
    for i in range(B * T):
        change = np.zeros((B, T))
        change.flat[i] = step
        up, down = (total(formula(NEW + sign * change, NEW) * mask, mask) for sign in (1, -1))
        slopes[i] = (up - down) / (2 * step)
    return np.concatenate([[total(formula(NEW, NEW) * mask, mask)], slopes])


# ---- how tokens are added up
def token_mean(values, mask):
    """TRL "dapo" and "bnpo" of one micro-batch, verl "token-mean", NeMo-RL token level."""
    return values.sum() / mask.sum()


def sequence_mean(values, mask):
    """TRL "grpo", verl "seq-mean-token-mean" (1e-8 aside), NeMo-RL sequence level."""
    return (values.sum(-1) / np.maximum(mask.sum(-1), 1)).mean()


def trl_dr_grpo(values, mask):
    return values.sum() / (len(values) * CAP)


def verl_sum_norm(values, mask, scale=None):
    return values.sum() / (mask.any(-1).sum() * (scale or mask.shape[1]))


# ---- losses
def row_mean(values):
    return (values * MASK).sum(-1, keepdims=True) / MASK.sum(-1, keepdims=True)


def trl(lp, sg, level="token", delta=math.inf):
    log_ratio = lp - OLD
    ratio = np.exp(log_ratio if level == "token" else row_mean(log_ratio))
    return -np.minimum(np.minimum(ratio, delta) * A, np.clip(ratio, 1 - LOW, 1 + HIGH) * A)


def trl_cispo(lp, sg, cap=HIGH):
    return -np.minimum(np.exp(sg - OLD), cap) * A * lp


def sapo(lp, sg):
    tau = np.where(A > 0, 1.0, 1.05)
    return -4 / tau / (1 + np.exp(-tau * (np.exp(lp - OLD) - 1))) * A


def verl(lp, sg, dual=3.0):
    ratio = np.exp(lp - OLD)
    worse = np.maximum(-A * ratio, -A * np.clip(ratio, 1 - LOW, 1 + HIGH))
    return np.where(A < 0, np.minimum(-A * dual, worse), worse)


def verl_gspo(lp, sg):
    ratio = np.exp(row_mean(sg - OLD) + lp - sg)
    return np.maximum(-A * ratio, -A * np.clip(ratio, 1 - LOW, 1 + HIGH))


def verl_cispo(lp, sg):
    return -np.clip(np.exp(sg - OLD), 1 - LOW, 1 + HIGH) * A * lp


def verl_geo_mean(lp, sg):
    """Its bounds are on log-ratios."""
    sign, log_ratio = np.sign(A), lp - OLD
    return -A * np.exp(row_mean(sign * np.minimum(sign * log_ratio, sign * np.clip(log_ratio, -LOW, HIGH))))


def verl_dppo(lp, sg, distance, limit, cap=3.0):
    """The ratio is detached and at most `cap`."""
    far = (distance(sg) > limit) & ((sg - OLD) * A > 0)
    return -A * np.minimum(np.exp(sg - OLD), cap) * lp * ~far


def moved(lp):
    return np.abs(np.exp(lp) - np.exp(OLD))


def binary_kl(lp):
    p, old = np.exp(lp), np.exp(OLD)
    return old * (OLD - lp) + (1 - old) * np.log((1 - old) / (1 - p))


@same
def grpo_is_that_of_trl():
    return ours("grpo", "sequence_mean", clip_low=LOW, clip_high=HIGH), theirs(trl, sequence_mean)


@same
def dapo_is_that_of_trl():
    return ours("grpo", clip_low=LOW, clip_high=HIGH), theirs(trl, token_mean)


@same
def dr_grpo_is_that_of_trl():
    return ours("grpo", "constant_length", clip_low=LOW, clip_high=HIGH), theirs(trl, trl_dr_grpo)


@different
def trl_counts_rows_without_a_token():
    mask = MASK & (np.arange(B) != 2)[:, None]
    found = ours("grpo", "sequence_mean", mask=mask, clip_low=LOW, clip_high=HIGH)
    return found, theirs(trl, sequence_mean, mask), found * (B - 1) / B


@same
def the_norm_of_verl_with_a_scale_is_constant_length():
    total = theirs(verl, lambda values, mask: verl_sum_norm(values, mask, CAP))
    return ours("grpo", "constant_length", clip_low=LOW, clip_high=HIGH, ratio_max=3.0), total


@different
def the_norm_of_verl_without_a_scale_is_the_padded_width():
    found = ours("grpo", "constant_length", clip_low=LOW, clip_high=HIGH, ratio_max=3.0)
    return found, theirs(verl, verl_sum_norm), found * CAP / T


@different
def verl_clips_twice_by_default_where_trl_and_we_do_not():
    twice = ours("grpo", clip_low=LOW, clip_high=HIGH, ratio_max=3.0)
    return ours("grpo", clip_low=LOW, clip_high=HIGH), theirs(verl, token_mean), twice


@same
def the_delta_of_trl_is_ratio_max():
    found = theirs(lambda lp, sg: trl(lp, sg, delta=1.5), token_mean)
    return ours("grpo", clip_low=LOW, clip_high=HIGH, ratio_max=1.5), found


@same
def gspo_is_that_of_trl():
    found = theirs(lambda lp, sg: trl(lp, sg, "sequence"), sequence_mean)
    return ours("gspo", "sequence_mean", clip_low=LOW, clip_high=HIGH), found


@same
def gspo_of_verl_is_gspo_token():
    found = theirs(verl_gspo, sequence_mean)
    return ours("gspo_token", "sequence_mean", clip_low=LOW, clip_high=HIGH), found


@same
def cispo_is_that_of_verl_and_nemo():
    return ours("cispo", clip_low=LOW, clip_high=HIGH), theirs(verl_cispo, token_mean)


@different
def the_cap_of_cispo_in_trl_is_absolute():
    below_one = {"clip_low": 1.0, "clip_high": HIGH - 1}
    return ours("cispo", clip_low=1.0, clip_high=HIGH), theirs(trl_cispo, token_mean), ours("cispo", **below_one)


@same
def cispo_without_a_lower_bound_is_that_of_trl_with_one_more_in_the_cap():
    found = theirs(lambda lp, sg: trl_cispo(lp, sg, 1 + HIGH), token_mean)
    return ours("cispo", clip_low=1.0, clip_high=HIGH), found


@same
def sapo_is_that_of_trl_and_verl():
    return ours("sapo", "sequence_mean", tau_pos=1.0, tau_neg=1.05), theirs(sapo, sequence_mean)


@same
def gmpo_is_the_geo_mean_of_verl_with_bounds_of_the_log_ratio():
    bounds = {"clip_low": 1 - math.exp(-LOW), "clip_high": math.exp(HIGH) - 1}
    return ours("gmpo", "sequence_mean", **bounds), theirs(verl_geo_mean, sequence_mean)


@same
def dppo_tv_has_the_gradient_of_verl_up_to_its_cap():
    found = theirs(lambda lp, sg: verl_dppo(lp, sg, moved, 0.15, cap=20.0), token_mean)
    return ours("dppo_tv", tv_max=0.15)[1:], found[1:]


@same
def dppo_kl_has_the_gradient_of_verl_up_to_its_cap():
    found = theirs(lambda lp, sg: verl_dppo(lp, sg, binary_kl, 0.05, cap=20.0), token_mean)
    return ours("dppo_kl", binary_kl_max=0.05)[1:], found[1:]


@same
def dro_is_that_of_verl():
    found = theirs(lambda lp, sg: -(lp * A - 0.15 * (lp - OLD) ** 2), token_mean)
    return ours("dro", dro_beta=0.3), found


# ---- KL, with a coefficient of 0.5 beside a policy term
def with_kl(penalty):
    return lambda lp, sg: -A * lp + 0.5 * penalty(lp, sg)


def k3(lp, sg=None):
    return np.exp(REF - lp) - (REF - lp) - 1


def k2(lp):
    return (lp - REF) ** 2 / 2


def plain(kl):
    return ours("reinforce", kl=kl, clip_low=LOW, clip_high=HIGH)


@same
def k3_is_that_of_trl_without_its_correction_and_of_verl():
    return plain("k3"), theirs(with_kl(k3), token_mean)


@same
def the_correction_of_trl_on_since_1_10_makes_it_k3_ratio():
    return plain("k3_ratio"), theirs(with_kl(lambda lp, sg: np.exp(lp - OLD) * k3(lp)), token_mean)


@same
def k1_plus_is_that_of_verl():
    return plain("k1_plus"), theirs(with_kl(lambda lp, sg: k2(lp) - k2(sg) + sg - REF), token_mean)


@same
def k3_plus_is_that_of_verl():
    return plain("k3_plus"), theirs(with_kl(lambda lp, sg: k2(lp) - k2(sg) + k3(sg)), token_mean)


@same
def k3_of_nemo_has_the_gradient_of_k2():
    return plain("k2")[1:], theirs(with_kl(lambda lp, sg: np.exp(lp - sg) * k3(lp)), token_mean)[1:]


@different
def k1_of_nemo_has_one_more_in_its_gradient_whose_expectation_is_0():
    extra = 0.5 * MASK / MASK.sum()
    found = theirs(with_kl(lambda lp, sg: np.exp(lp - sg) * (lp - REF)), token_mean)[1:]
    return plain("k2")[1:], found, plain("k2")[1:] + extra.ravel()


@different
def k2_of_nemo_has_half_a_square_more_in_its_gradient():
    extra = 0.5 * k2(NEW) * MASK / MASK.sum()
    found = theirs(with_kl(lambda lp, sg: np.exp(lp - sg) * k2(lp)), token_mean)[1:]
    return plain("k2")[1:], found, plain("k2")[1:] + extra.ravel()


@different
def the_correction_of_trl_with_ratios_of_rows_is_another_penalty():
    found = theirs(with_kl(lambda lp, sg: np.exp(row_mean(lp - OLD)) * k3(lp)), token_mean)
    ratio = np.exp(row_mean(NEW - OLD)) * MASK
    in_a_row = (k3(NEW) * MASK).sum(-1, keepdims=True) / MASK.sum(-1, keepdims=True)
    slope = (-A + 0.5 * ratio * (1 - np.exp(REF - NEW) + in_a_row)) * MASK / MASK.sum()
    return plain("k3_ratio")[1:], found[1:], slope.ravel()


# ---- corrections of the sampler, on a policy term without a ratio
def corrected(correction, **bounds):
    return ours("reinforce", correction=correction, bounds=bounds, clip_low=LOW, clip_high=HIGH)


def times(weight):
    """Policy term times a detached weight."""
    return theirs(lambda lp, sg: weight * -A * lp, token_mean)


RHO = np.exp(OLD - SAMPLED)
OF_THE_ROW = np.exp(((OLD - SAMPLED) * MASK).sum(-1, keepdims=True))
GEOMETRIC = np.exp(row_mean(OLD - SAMPLED))


@same
def truncate_is_that_of_all_three():
    return corrected("truncate", correction_cap=1.2), times(np.minimum(RHO, 1.2))


@same
def truncate_row_is_that_of_trl_and_verl():
    return corrected("truncate_row", correction_cap=1.1), times(np.minimum(OF_THE_ROW, 1.1))


@same
def mask_is_the_token_mask_of_trl_and_icepop_of_verl_and_nemo():
    bounds = {"correction_floor": 0.8, "correction_cap": 1.3}
    return corrected("mask", **bounds), times(np.where((RHO >= 0.8) & (RHO <= 1.3), RHO, 0))


@different
def the_default_of_trl_masks_by_the_product_and_keeps_it_as_a_weight():
    kept = np.where(OF_THE_ROW <= 1.1, OF_THE_ROW, 0)
    found = corrected("truncate_row", correction_cap=1.1)
    rows = np.repeat(OF_THE_ROW <= 1.1, T, 1).ravel()
    return found[1:], times(kept)[1:], found[1:] * rows


@different
def the_row_mask_of_nemo_keeps_the_ratios_of_tokens():
    bounds = {"correction_floor": 0.95, "correction_cap": 1.1}
    found = corrected("mask_row", **bounds)
    kept = (GEOMETRIC >= 0.95) & (GEOMETRIC <= 1.1)
    return found[1:], times(RHO * kept)[1:], found[1:] * RHO.ravel()


@same
def opsm_is_the_mask_of_trl():
    kept = (A >= 0) | (row_mean(SAMPLED - NEW) <= 0.05)
    return corrected("opsm", correction_floor=math.exp(-0.05)), times(kept)


# ---- advantages
MEAN, STD = REWARDS.mean(-1, keepdims=True), REWARDS.std(-1, ddof=1, keepdims=True)


@same
def the_advantage_is_that_of_trl():
    return advantage("grpo"), (REWARDS - MEAN) / (STD + 1e-4)


@different
def the_advantage_of_verl_has_another_eps():
    found = advantage("grpo")
    return found, (REWARDS - MEAN) / (STD + 1e-6), found * (STD + 1e-4) / (STD + 1e-6)


@different
def a_group_of_one_keeps_its_reward_in_verl():
    rewards = REWARDS[1:, 1:2]
    return advantage("grpo", rewards), (rewards - 0.0) / (1.0 + 1e-6), rewards / (1 + 1e-6)


@different
def the_advantage_of_nemo_leaves_the_sample_out_of_mean_and_std():
    others = [[np.delete(row, i) for i in range(G)] for row in REWARDS]
    mean, std = np.mean(others, -1), np.std(others, -1, ddof=1)
    nemo = np.where(std > 0, (REWARDS - mean) / (std + 1e-6), REWARDS - mean)
    return advantage("grpo"), nemo, np.where(std > 0, advantage("rloo") / (std + 1e-6), advantage("rloo"))


@same
def scale_rewards_none_of_trl_is_dr_grpo():
    return advantage("dr_grpo"), REWARDS - MEAN


@same
def scale_rewards_batch_of_trl_is_batch_std():
    return advantage("batch_std"), (REWARDS - MEAN) / (REWARDS.std(ddof=1) + 1e-4)


@same
def rloo_is_that_of_verl():
    return advantage("rloo"), REWARDS * G / (G - 1) - MEAN * G / (G - 1)


@same
def opo_is_that_of_verl():
    lengths = LENGTHS.reshape(2, G)
    baseline = (lengths * REWARDS).sum(-1, keepdims=True) / lengths.sum(-1, keepdims=True)
    return advantage("opo", lengths=tensor(lengths)), REWARDS - baseline


@different
def reinforce_pp_baseline_of_verl_whitens_over_tokens():
    centred = REWARDS - MEAN
    tokens = np.repeat(centred.ravel(), LENGTHS)
    found = advantage("reinforce_pp_baseline")
    per_token = found * (centred.std(ddof=1) + 1e-4) - tokens.mean()
    return found, (centred - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8), per_token / tokens.std(ddof=1)


@same
def gdpo_is_that_of_trl():
    terms = np.stack([REWARDS, OTHER_REWARDS])
    added = sum(w * (r - r.mean(-1, keepdims=True)) / (r.std(-1, ddof=1, keepdims=True) + 1e-4)
                for w, r in zip((2.0, 1.0), terms, strict=True))  # fmt: skip
    found = combine(tensor(terms), (2.0, 1.0), ADVANTAGES["grpo"], "advantages")
    found = whiten(found, torch.ones_like(found).bool()).numpy()
    return found, (added - added.mean()) / (added.std(ddof=1) + 1e-4)


# ---- entropy
@same
def entropy_is_that_of_trl_and_verl():
    hidden, weight = np.sin(WAVE[:, :3] + 1.0), np.cos(1.3 * np.arange(21.0)).reshape(7, 3)
    logits = hidden @ weight.T / 0.7
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = np.log(np.exp(logits).sum(-1)) - (p * logits).sum(-1)
    found = linear_logprobs(tensor(hidden), tensor(weight), torch.zeros(B, dtype=torch.int64), 0.7)[1]
    return found.numpy(), entropy


@pytest.mark.parametrize("name", SAME)
def test_c09_the_same_as_theirs(name):
    one, other = SAME[name]()
    assert np.abs(one).max() > 1e-3
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", DIFFERENT)
def test_c09_different_in_the_way_that_the_page_says(name):
    one, other, explained = DIFFERENT[name]()
    assert np.abs(one - other).max() > 1e-8
    np.testing.assert_allclose(explained, other, rtol=1e-6, atol=1e-7)


def test_a_residue_of_rounding_explodes_in_a_std_of_the_others_that_subtracts_squares():
    """NeMo-RL before https://github.com/NVIDIA-NeMo/RL/pull/4158: one reward apart from seven equal ones."""
    rewards = np.array([0.0] + [0.95] * 7, dtype=np.float32)
    others = rewards[1:]
    square_of_mean = np.square(others.sum(dtype=np.float32) / np.float32(7))
    variance = np.square(others).sum(dtype=np.float32) / np.float32(7) - square_of_mean
    assert variance != 0 and (0.95 / np.sqrt(abs(variance))) > 1000
    assert ADVANTAGES["grpo"](torch.from_numpy(rewards)).abs().max() < 3


def test_the_inputs_exercise_what_they_should():
    ratio = np.exp(NEW - OLD)[MASK]
    signs = np.broadcast_to(A, (B, T))[MASK] > 0
    for side in (ratio > 1 + HIGH, ratio < 1 - LOW):
        assert side[signs].any() and side[~signs].any()
    assert (ratio[~signs] > 3).any() and (NEW < 0).all()
    geometric = np.exp(row_mean(NEW - OLD))
    assert (geometric > 1 + HIGH).any() or (geometric < 1 - LOW).any()
    assert 0 < ((binary_kl(NEW) > 0.05) & ((NEW - OLD) * A > 0))[MASK].sum() < MASK.sum()
    assert 0 < ((moved(NEW) > 0.15) & ((NEW - OLD) * A > 0))[MASK].sum() < MASK.sum()
    assert (RHO[MASK] < 0.8).any() and (RHO[MASK] > 1.3).any() and ((RHO >= 0.8) & (RHO <= 1.3))[MASK].any()
    assert 0 < ((row_mean(SAMPLED - NEW) > 0.05) & (A < 0)).sum() < (A < 0).sum()
    assert 0 < ((GEOMETRIC >= 0.95) & (GEOMETRIC <= 1.1)).sum() < B and 0 < (OF_THE_ROW > 1.1).sum() < B
