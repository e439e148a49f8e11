"""Advantages against hand-computed numbers, and the properties that hold for any reward.

Tests under `every_advantage` hold for every entry of `ADVANTAGES` that takes any reward; those under `mean_baselines`
for that family alone.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import (
    ADVANTAGES,
    BINARY,
    MEAN_BASELINE,
    OF_THE_STEP,
    batch_std,
    combine,
    dr_grpo,
    grpo,
    max_rl,
    opo,
    pkpo,
    reinforce_pp_baseline,
    rloo,
    weighted_sum,
    whiten,
)


def advantages(names):
    return pytest.mark.parametrize("advantage", [ADVANTAGES[name] for name in names], ids=list(names))


repeatable = settings(deadline=None, max_examples=60, derandomize=True)
every_advantage = advantages([name for name in ADVANTAGES if name not in BINARY])
of_the_group = advantages([name for name in ADVANTAGES if name not in BINARY | OF_THE_STEP])
mean_baselines = advantages(sorted(MEAN_BASELINE))

# A group of at least two rewards, not nearly flat: below that the 1e-4 of `grpo` matters and scale says nothing.
groups = (
    st.lists(st.integers(-50, 50), min_size=2, max_size=16)
    .filter(lambda rewards: len(set(rewards)) > 1)
    .map(lambda rewards: torch.tensor(rewards, dtype=torch.float64) / 8)
)


def test_c09_grpo_is_pinned_to_hand_computed_numbers():
    # mean 1/4; unbiased variance (9/16 + 3/16) / 3 = 1/4, so std 1/2 (the biased one would be 0.433 and give 1.732)
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64) / 0.5001
    torch.testing.assert_close(grpo(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)), expected, rtol=1e-14, atol=0)


def test_c09_dr_grpo_is_pinned_to_hand_computed_numbers():
    assert dr_grpo(torch.tensor([1.5, 0.5, 0, 0])).tolist() == [1.0, 0.0, -0.5, -0.5]


def test_c09_rloo_is_pinned_to_hand_computed_numbers():
    # 1 - mean(0, 0, 3) = 0;  0 - mean(1, 0, 3) = -4/3;  3 - mean(1, 0, 0) = 8/3
    expected = torch.tensor([0, -4 / 3, -4 / 3, 8 / 3])
    torch.testing.assert_close(rloo(torch.tensor([1.0, 0, 0, 3])), expected)


@every_advantage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3, 1.5, -0.7, 1e-30, 1e30])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 64])
def test_c05_flat_group_is_exactly_zero(advantage, dtype, value, size):
    assert advantage(torch.full((size,), value, dtype=dtype)).eq(0).all()


def test_c05_the_trap_is_real():
    assert (torch.full((8,), 0.1) - torch.full((8,), 0.1).mean()).ne(0).any(), "choose another trap: this one is closed"


@every_advantage
def test_c05_a_flat_group_beside_another_is_still_zero(advantage):
    result = advantage(torch.tensor([[0.1] * 8, [0.1] * 7 + [0.2]]))
    assert result[0].eq(0).all() and result[1, 7] > 0


@every_advantage
@pytest.mark.parametrize("size", [2, 8, 64, 1024])
@pytest.mark.parametrize("height", [1e-6, 1.0, 1e6, 1e30])
def test_c06_one_hot_groups_are_finite(advantage, size, height):
    rewards = torch.zeros(size)
    rewards[size // 2] = height
    result = advantage(rewards)
    assert result.isfinite().all() and result[size // 2] > 0 and result.argmax() == size // 2


@mean_baselines
@pytest.mark.parametrize("size", [2, 8, 64, 1024])
@pytest.mark.parametrize("height", [1e-6, 1.0, 1e6, 1e30])
def test_c06_one_hot_groups_are_bounded(advantage, size, height):
    result = advantage(torch.eye(size)[size // 2] * height)
    assert result.ne(0).all() and result.abs().max() <= max(height, math.sqrt(size)) * 2


@every_advantage
def test_c07_a_group_of_one_has_advantage_zero(advantage):
    assert advantage(torch.tensor([[5.0], [-3.0]])).eq(0).all()


@every_advantage
def test_c07_a_group_with_one_valid_sample_has_advantage_zero(advantage):
    valid = torch.tensor([[False, True, False], [False, False, False]])
    assert advantage(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), valid).eq(0).all()


@every_advantage
@pytest.mark.parametrize("garbage", [0.0, 1e30, torch.nan, torch.inf, -torch.inf])
def test_c35_an_invalid_sample_is_left_out_of_the_baseline(advantage, garbage):
    rewards = torch.tensor([[1.0, garbage, 0.0, 4.0, garbage]])
    valid = torch.tensor([[True, False, True, True, False]])
    result = advantage(rewards, valid)
    assert result[~valid].tolist() == [0.0, 0.0]
    torch.testing.assert_close(result[valid], advantage(torch.tensor([1.0, 0.0, 4.0])))


@every_advantage
def test_c35_equal_valid_rewards_are_flat_whatever_the_invalid_ones_are(advantage):
    valid = torch.tensor([True] * 8 + [False])
    assert advantage(torch.tensor([0.1] * 8 + [7.0]), valid).eq(0).all()


@of_the_group
def test_c08_groups_are_the_last_axis_and_do_not_see_one_another(advantage):
    rewards = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    result = advantage(rewards)
    assert result.shape == rewards.shape
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(result[i, j], advantage(rewards[i, j]))


@mean_baselines
@repeatable
@given(rewards=groups)
def test_the_mean_of_a_group_is_zero(advantage, rewards):
    assert abs(advantage(rewards).mean().item()) < 1e-12


@mean_baselines
@repeatable
@given(rewards=groups, shift=st.integers(-1000, 1000))
def test_shifting_all_rewards_changes_nothing(advantage, rewards, shift):
    torch.testing.assert_close(advantage(rewards + shift), advantage(rewards), rtol=1e-9, atol=1e-9)


@every_advantage
@repeatable
@given(rewards=groups, seed=st.integers(0, 1000))
def test_permuting_a_group_permutes_its_advantages(advantage, rewards, seed):
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(advantage(rewards[order]), advantage(rewards)[order], rtol=1e-12, atol=1e-12)


@every_advantage
@repeatable
@given(rewards=groups)
def test_a_better_reward_never_gets_a_worse_advantage(advantage, rewards):
    assert advantage(rewards)[rewards.argsort()].diff().min() >= 0


@repeatable
@given(rewards=groups, scale=st.sampled_from([2.0, 16.0]))
def test_scale_matters_only_without_the_standard_deviation(rewards, scale):
    torch.testing.assert_close(dr_grpo(rewards * scale), dr_grpo(rewards) * scale)
    torch.testing.assert_close(rloo(rewards * scale), rloo(rewards) * scale)
    torch.testing.assert_close(grpo(rewards * scale), grpo(rewards), rtol=1e-2, atol=0)


@repeatable
@given(rewards=groups)
def test_rloo_is_dr_grpo_times_n_over_n_minus_one(rewards):
    n = len(rewards)
    torch.testing.assert_close(rloo(rewards), dr_grpo(rewards) * n / (n - 1))


@every_advantage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c36_inputs_are_unchanged_and_the_dtype_is_kept(advantage, dtype):
    rewards = torch.tensor([[1.0, 0.0, torch.nan], [0.5, 0.5, 0.5]], dtype=dtype)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    before, valid_before = rewards.clone(), valid.clone()
    assert advantage(rewards, valid).dtype == dtype
    torch.testing.assert_close(rewards, before, rtol=0, atol=0, equal_nan=True)
    assert valid.equal(valid_before)


# ---- several reward terms. Two groups of two samples; term 0 is correctness, term 1 is format.
WAYS = ("rewards", "advantages")
TERMS = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 0.5], [0.5, 0.0]]], dtype=torch.float64)
ALL = torch.ones(2, 2, dtype=torch.bool)


def test_weighted_sum_is_the_optimised_reward():
    assert weighted_sum(TERMS, [1.0, 2.0]).tolist() == [[1.0, 1.0], [2.0, 1.0]]
    assert weighted_sum(TERMS, torch.tensor([0.5, 0.0])).tolist() == [[0.5, 0.0], [0.5, 0.5]]


def test_c05_samples_with_equal_terms_get_bitwise_equal_rewards():
    terms = torch.tensor([0.1, 0.2, 0.3, 0.7])[:, None, None].expand(4, 1, 61)
    assert weighted_sum(terms, [0.3, 0.7, 0.1, 0.9]).unique().numel() == 1


def test_combining_rewards_takes_the_advantage_of_the_weighted_sum():
    result = combine(TERMS, [1.0, 2.0], dr_grpo, "rewards", ALL)
    assert result.tolist() == [[0.0, 0.0], [0.5, -0.5]]


def test_combining_advantages_normalises_each_term_first():
    # std of (1, 0) is 0.7071, of (0, 0.5) is 0.3536: both become +-0.7071 up to eps, so the weights alone decide
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    b = 0.25 / (math.sqrt(0.125) + 1e-4)
    expected = torch.tensor([[a - 2 * b, -a + 2 * b], [2 * b, -2 * b]], dtype=torch.float64)
    torch.testing.assert_close(combine(TERMS, [1.0, 2.0], grpo, "advantages", ALL), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("advantage", [dr_grpo, rloo])
def test_the_two_ways_agree_for_linear_estimators(advantage):
    terms = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ways = [combine(terms, [0.5, 1.0, -2.0], advantage, how) for how in WAYS]
    torch.testing.assert_close(ways[0], ways[1])


@pytest.mark.parametrize("how", WAYS)
@every_advantage
def test_c35_an_invalid_sample_is_left_out_of_every_combination(how, advantage):
    terms = torch.tensor([[[1.0, torch.nan, 0.0, 4.0]], [[0.5, 0.5, 0.5, 0.0]]])
    valid = torch.tensor([[True, False, True, True]])
    before = terms.clone()
    result = combine(terms, [1.0, 0.5], advantage, how, valid)
    assert result.shape == (1, 4) and result[0, 1] == 0
    expected = combine(terms[..., [0, 2, 3]], [1.0, 0.5], advantage, how)
    torch.testing.assert_close(result[0, [0, 2, 3]], expected[0])
    torch.testing.assert_close(terms, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("how", WAYS)
@every_advantage
def test_one_term_of_weight_one_is_the_plain_advantage(how, advantage):
    torch.testing.assert_close(combine(TERMS[:1], [1.0], advantage, how, ALL), advantage(TERMS[0], ALL), rtol=0, atol=0)


# ---- advantages that need more than the rewards of a group.
def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_c09_opo_weighs_the_baseline_by_length():
    """(1 * 30 + 0 * 10 + 0 * 20) / 60 = 1/2; without the invalid sample 30 / 40."""
    lengths, rewards = torch.tensor([30, 10, 20]), double([1, 0, 0])
    assert opo(rewards, lengths=lengths).tolist() == [0.5, -0.5, -0.5]
    valid = torch.tensor([True, True, False])
    assert opo(rewards, valid, lengths=lengths).tolist() == [0.25, -0.75, 0]


def test_c09_max_rl_divides_by_the_mean_and_a_failed_group_gets_minus_one():
    rewards = double([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert max_rl(rewards).tolist() == [[3, -1, -1, -1], [1, 1, -1, -1], [-1] * 4, [0] * 4]
    valid = torch.tensor([[True, True, False, True]] * 4)
    torch.testing.assert_close(max_rl(rewards, valid)[0], double([2, -1, 0, -1]))
    assert max_rl(rewards * torch.nan, ~(valid | True)).eq(0).all()
    assert max_rl(double([1, 1]), torch.tensor([True, False])).tolist() == [0, 0]


def test_max_rl_refuses_other_rewards_than_0_and_1_on_every_rank():
    with pytest.raises(ValueError, match="^advantage is 'max_rl': every reward must be 0 or 1"):
        max_rl(double([0.5, 1]))
    with pytest.raises(ValueError, match="must be 0 or 1"):
        max_rl(double([0, 1]), sum_over_ranks=lambda here: here + 1)  # another rank has one
    assert max_rl(double([0.5, 1, 0]), torch.tensor([False, True, True])).tolist() == [0, 1, -1]


def test_c09_pkpo_is_pinned_to_the_hand_computed_numbers_of_its_paper():
    """n = 4, two right, k = 2: s is 1/2 and 1/3, centred +-1/12, times n^2 / (n - k) = 8."""
    torch.testing.assert_close(pkpo(double([1, 0, 1, 0]), pass_k=2), double([2, -2, 2, -2]) / 3)
    assert pkpo(double([1, 0, 1, 0]), pass_k=4).eq(0).all() and pkpo(double([1, 0, 1]), pass_k=5).eq(0).all()


@pytest.mark.parametrize("pass_k", [1, 2, 3, 5])
def test_pkpo_of_any_reward_is_the_mean_over_subsets_of_their_best(pass_k):
    rewards, n = double([0.3, -1, 2, 2, 0.1, 0.7]), 6
    subsets = list(itertools.combinations(range(n), pass_k))
    sums = [sum(max(rewards[list(s)]).item() for s in subsets if i in s) / len(subsets) for i in range(n)]
    expected = (double(sums) - sum(sums) / n) * n**2 / (n - pass_k)
    torch.testing.assert_close(pkpo(rewards, pass_k=pass_k), expected)
    result = pkpo(rewards, pass_k=pass_k)
    assert result[2] == result[3], "equal rewards"
    valid = torch.tensor([True] * 6 + [False])
    torch.testing.assert_close(pkpo(double([*rewards, torch.nan]), valid, pass_k=pass_k)[:6], expected)


def test_pkpo_of_large_groups_stays_finite():
    result = pkpo(torch.rand(3, 2048, generator=torch.Generator().manual_seed(0)), pass_k=900)
    assert result.isfinite().all() and result.dtype == torch.float32 and result.amax(-1).gt(0.1).all()


STEP = double([[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [3, 0, 0, 0]])
VALID = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False]])


def test_c09_batch_std_and_reinforce_pp_baseline_divide_by_the_spread_of_the_step():
    flat, valid = STEP.flatten(), VALID.flatten()
    deviation = dr_grpo(STEP, VALID)
    torch.testing.assert_close(batch_std(STEP, VALID), deviation / (flat[valid].std() + 1e-4))
    whitened = deviation / (deviation.flatten()[valid].std() + 1e-4)
    torch.testing.assert_close(reinforce_pp_baseline(STEP, VALID), whitened)
    for result in (batch_std(STEP, VALID), whiten(deviation, VALID)):
        assert result[1].eq(0).all() and result[2, 3] == 0


def test_c09_the_spread_of_a_step_of_two_samples_and_of_one():
    """The std of 1 and 0 is the root of 1/2, that of one sample is 0."""
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(batch_std(double([[1, 0]])), double([[a, -a]]))
    torch.testing.assert_close(whiten(double([[2, 0]]), torch.tensor([[True, False]])), double([[2e4, 0]]))


@pytest.mark.parametrize("how", WAYS)
def test_a_combination_hands_on_what_an_advantage_asks_for(how):
    lengths = torch.tensor([[3, 1], [1, 2]])
    expected = opo(weighted_sum(TERMS, [1.0, 2.0]), lengths=lengths)
    torch.testing.assert_close(combine(TERMS, [1.0, 2.0], opo, how, ALL, lengths=lengths), expected)
    assert not expected.allclose(dr_grpo(weighted_sum(TERMS, [1.0, 2.0])))


@pytest.mark.parametrize("function", [batch_std, reinforce_pp_baseline])
@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[2, 0], [], [1]]])
def test_c01_statistics_of_the_step_do_not_depend_on_how_groups_are_spread(function, parts):
    """Each rank adds its share; a rank without a group adds nothing, and is asked as often as the others."""
    totals = []
    whole = function(STEP, VALID, sum_over_ranks=lambda here: totals.append(here) or here)
    shares = []
    for groups in parts:
        left = iter(totals)
        given = []
        alone = function(STEP[groups], VALID[groups], sum_over_ranks=lambda h, g=given, t=left: g.append(h) or next(t))
        torch.testing.assert_close(alone, whole[groups])
        shares.append(given)
    for number, total in enumerate(totals):
        torch.testing.assert_close(sum(share[number] for share in shares), total)


@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.9])
def test_what_each_advantage_climbs_by_enumeration(p):
    """E[gradient] = w(p) dp/dtheta for 0/1 rewards: w = E_K[K A+ / p - (N - K) A- / (1 - p)] / N, K of N right.

    rloo climbs p; max_rl climbs sum_k (1 - (1 - p)^k) / k, N terms; pkpo the chance that one of k is right.
    """
    N = 8
    rewards = (torch.arange(N) < torch.arange(N + 1)[:, None]).double()

    def weight(advantage):
        A, total = advantage(rewards), 0.0
        for K in range(N + 1):
            chance = math.comb(N, K) * p**K * (1 - p) ** (N - K)
            total += chance * (A[K, :K].sum() / p - A[K, K:].sum() / (1 - p)).item() / N
        return total

    assert weight(rloo) == pytest.approx(1)
    assert weight(dr_grpo) == pytest.approx((N - 1) / N)
    assert weight(max_rl) == pytest.approx((1 - (1 - p) ** N) / p)
    for k in (2, 4, 7):
        assert weight(partial(pkpo, pass_k=k)) == pytest.approx(k * (1 - p) ** (k - 1))
    roots = [math.comb(N, K) * p**K * (1 - p) ** (N - K) * math.sqrt(K * (N - K) * (N - 1) / N) for K in range(N + 1)]
    assert weight(grpo) == pytest.approx(sum(roots) / (N * p * (1 - p)), rel=1e-3)  # 1e-4 is added to the std


def test_a_term_that_does_not_apply_adds_nothing_to_the_sum_and_is_not_in_its_own_baseline():
    """By hand: sums 3, 1, 2 with mean 2. Own baselines: 2 of 1 and 3 for the first term, 2/3 for the second."""
    terms = torch.tensor([[[1.0, -math.inf, 3.0]], [[2.0, 1.0, -1.0]]], dtype=torch.float64)
    found = combine(terms, (1.0, 1.0), ADVANTAGES["dr_grpo"], "rewards")
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64))
    found = combine(terms, (1.0, 1.0), ADVANTAGES["dr_grpo"], "advantages")
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, -2 / 3]], dtype=torch.float64))
