"""Token weights: their sums, and that no cut of an update changes its loss or gradient, whatever the loss.

Tests under `every_weighting` and `every_loss` hold for every entry of those tables.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import Config
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.objective import objective
from grpo.tables import asked, constants
from grpo.weighting import (
    SUM_TO_ONE,
    WEIGHTINGS,
    constant_length,
    count,
    count_groups,
    prompt_mean,
    sequence_mean,
    token_mean,
)


def with_facts(name):
    """The weighting as in an update: of all facts it gets those that it asks for."""
    return lambda mask, **facts: WEIGHTINGS[name](mask, **asked(WEIGHTINGS[name], facts))


def weightings(names):
    return pytest.mark.parametrize("weighting", [with_facts(name) for name in names], ids=list(names))


every_weighting = weightings(WEIGHTINGS)
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
repeatable = settings(deadline=None, max_examples=10, derandomize=True)

# lengths 3, 1, 0 and 2 with a hole: 6 kept tokens in 3 sequences
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
PLAIN = {"num_tokens": 6, "num_sequences": 3, "max_new_tokens": 10}
# two groups of two rows: 4 and 2 kept tokens
COUNTS = PLAIN | {"num_groups": 2, "group_tokens": torch.tensor([4, 4, 2, 2])}


def of_rows(rows, counts=COUNTS):
    """The facts of an update for some of its rows."""
    return counts | {"group_tokens": counts["group_tokens"][rows]}


def test_c02_count_leaves_out_rows_without_a_kept_token():
    assert count(MASK) == (6, 3) and count(MASK[2:3]) == (0, 0)


def test_c09_token_mean_is_pinned():
    w = 1 / 6
    expected = torch.tensor([[w, w, w], [w, 0, 0], [0, 0, 0], [w, 0, w]])
    torch.testing.assert_close(token_mean(MASK, **PLAIN), expected)


def test_c09_sequence_mean_is_pinned():
    expected = torch.tensor([[1 / 9, 1 / 9, 1 / 9], [1 / 3, 0, 0], [0, 0, 0], [1 / 6, 0, 1 / 6]])
    torch.testing.assert_close(sequence_mean(MASK, **PLAIN), expected)


def test_c09_constant_length_is_pinned():
    torch.testing.assert_close(constant_length(MASK, **PLAIN), MASK / 30)


def test_c09_prompt_mean_is_pinned():
    assert count_groups(MASK, 2)[0] == 2 and count_groups(MASK, 2)[1].tolist() == [4, 4, 2, 2]
    assert count_groups(MASK[2:3], 1)[0] == 0  # a group without a kept token is not counted
    expected = torch.tensor([[1 / 8] * 3, [1 / 8, 0, 0], [0, 0, 0], [1 / 4, 0, 1 / 4]])
    torch.testing.assert_close(prompt_mean(MASK, num_groups=2, group_tokens=COUNTS["group_tokens"]), expected)


@every_weighting
def test_c02_only_the_tokens_of_the_mask_have_a_weight(weighting):
    weights = weighting(MASK, **COUNTS)
    assert weights[~MASK].eq(0).all() and weights[MASK].gt(0).all()


@weightings(sorted(SUM_TO_ONE))
def test_c02_the_weights_sum_to_one_over_the_tokens_of_the_numerator(weighting):
    assert weighting(MASK, **COUNTS, dtype=torch.float64).sum().item() == pytest.approx(1, rel=1e-12)


@every_weighting
def test_c02_an_update_of_one_token_has_a_weight_of_one(weighting):
    one = torch.tensor([[False, True]])
    num_tokens, num_sequences = count(one)
    num_groups, group_tokens = count_groups(one, 1)
    assert (num_tokens, num_sequences, num_groups) == (1, 1, 1)
    facts = {"num_tokens": num_tokens, "num_sequences": num_sequences, "num_groups": num_groups}
    assert weighting(one, **facts, group_tokens=group_tokens, max_new_tokens=1).tolist() == [[0, 1]]


@every_weighting
def test_c02_rows_left_out_change_nothing_for_the_rest(weighting):
    """A truncated or invalid row (all False) weighs nothing and is not in the denominator."""
    kept = MASK[[0, 1, 3]]
    num_tokens, num_sequences = count(kept)
    assert (num_tokens, num_sequences) == count(MASK)
    weights = weighting(MASK, **COUNTS)
    assert weights[2].eq(0).all() and weights[[0, 1, 3]].equal(weighting(kept, **of_rows([0, 1, 3])))


@every_weighting
def test_c04_an_update_without_a_kept_token_has_weight_zero_and_no_nan(weighting):
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    none = {"num_tokens": 0, "num_sequences": 0, "num_groups": 0, "group_tokens": torch.zeros(2, dtype=torch.long)}
    assert weighting(nothing, **none, max_new_tokens=8).eq(0).all()
    assert weighting(nothing, **of_rows([0, 1])).eq(0).all()  # a rank with nothing, beside ranks with something


@every_weighting
def test_c36_the_mask_is_unchanged_and_the_dtype_is_the_one_asked_for(weighting):
    before = MASK.clone()
    weights = weighting(MASK, **COUNTS)
    assert weights.shape == MASK.shape and weights.dtype == torch.float32
    assert MASK.equal(before) and MASK.dtype == torch.bool
    double = weighting(MASK, **COUNTS, dtype=torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), weights)


@every_weighting
def test_no_weight_depends_on_torchs_default_dtype(weighting):
    before = weighting(MASK, **COUNTS)
    torch.set_default_dtype(torch.float64)
    assert weighting(MASK, **COUNTS).dtype == torch.float32 and weighting(MASK, **COUNTS).equal(before)


@every_weighting
def test_the_weights_of_a_part_are_the_part_of_the_weights(weighting):
    whole = weighting(MASK, **COUNTS)
    parts = [weighting(MASK[i : i + 1], **of_rows([i])) for i in range(4)]
    assert torch.cat(parts).equal(whole)


B, T, D = 8, 9, 4


def update(loss, weighting, parts, **kind):
    """(loss, gradient in the parameters) of one update of B unequal sequences, cut into `parts` (lists of rows).

    Padding is cut to the longest row of a part, as a micro-batch does it.
    """
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 1, 4, 0, 7, 2, 9, 3])
    mask = torch.arange(T) < lengths[:, None]
    mask[4, 2] = False  # a hole
    features = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    old, reference, sampled = (-torch.rand(3, B, T, generator=generator, dtype=torch.float64) * mask).unbind()
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    theta = torch.linspace(-0.5, 0.5, D, dtype=torch.float64).requires_grad_()
    num_tokens, num_sequences = count(mask)
    num_groups, group_tokens = count_groups(mask, 2)
    correction = CORRECTIONS[kind.get("correction", "none")]
    total = 0.0
    for rows in parts:
        width = max(int(lengths[rows].max()), 1)
        cut = [x[rows, :width] for x in (features, old, reference, sampled, mask)]
        feature, part_old, part_reference, part_sampled, part_mask = cut
        logprobs = -torch.nn.functional.softplus(feature @ theta)
        found = objective(
            logprobs,
            part_old,
            part_sampled,
            part_reference,
            advantages[rows],
            part_mask,
            loss=loss,
            constants=constants(loss, Config(clip_low=0.2, clip_high=0.3)),
            correction=correction,
            bounds=constants(correction, Config(correction_floor=0.8, correction_cap=1.2)),
            kl=KL[kind.get("kl", "k3")],
            kl_coef=0.04,
            kl_in=kind.get("kl_in", "loss"),
        )
        counts = {"num_tokens": num_tokens, "num_sequences": num_sequences, "max_new_tokens": T}
        counts |= {"num_groups": num_groups, "group_tokens": group_tokens[rows]}
        weights = weighting(part_mask, **counts, dtype=logprobs.dtype)
        part_loss = (weights * found.per_token_loss).sum()
        part_loss.backward()  # accumulates
        total += part_loss.item()
    return total, theta.grad


def assert_cut_changes_nothing(loss, weighting, parts, **kind):
    whole, cut = (update(loss, weighting, p, **kind) for p in ([list(range(B))], parts))
    assert whole[1].abs().min() > 1e-6
    assert cut[0] == pytest.approx(whole[0], rel=1e-9)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-9, atol=1e-12)


@every_weighting
@every_loss
@repeatable
@given(assignment=st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
def test_c01_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(loss, weighting, assignment):
    parts = [[row for row in range(B) if assignment[row] == part] for part in sorted(set(assignment))]
    assert_cut_changes_nothing(loss, weighting, parts)


@every_weighting
@every_loss
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_c01_micro_batches_of_any_size_give_the_same_loss_and_gradient(loss, weighting, size):
    assert_cut_changes_nothing(loss, weighting, [list(range(i, min(i + size, B))) for i in range(0, B, size)])


KINDS = [{"kl": k, "kl_in": place} for k in KL for place in ("loss", "reward")]
KINDS += [{"correction": c} for c in CORRECTIONS]


@every_weighting
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_c01_every_estimator_and_correction_is_indifferent_to_the_cut(weighting, kind):
    assert_cut_changes_nothing(LOSSES["grpo"], weighting, [[5, 0], [3], [1, 2, 7], [6, 4]], **kind)
