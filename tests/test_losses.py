"""Policy losses against hand-computed numbers, their gradients, and what they do with garbage and overflow.

Tests under `every_loss` hold for every entry of `LOSSES`; those under `clipping_losses` or `pessimistic_losses` for
that family alone. A loss gets its constants from the options, as in a run.
"""

import math
from inspect import signature

import pytest
import torch

from grpo.advantages import ADVANTAGES
from grpo.config import Config
from grpo.losses import (
    CLIPPING,
    LOSSES,
    PESSIMISTIC,
    TIED,
    TRUST_REGION,
    cispo,
    dppo_kl,
    dppo_tv,
    dro,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    reinforce,
    sapo,
)
from grpo.tables import constants


def with_options(name):
    """The loss as in a run, for calls that bound the ratio: those that do not clip have no use for the bounds."""
    loss, options = LOSSES[name], constants(LOSSES[name], Config())
    return lambda *inputs, **clip: loss(*inputs, **options | {key: clip[key] for key in clip if key in options})


def losses(names):
    return pytest.mark.parametrize("loss", [with_options(name) for name in sorted(names)], ids=sorted(names))


every_loss = losses(LOSSES)
clipping_losses = losses(CLIPPING)
pessimistic_losses = losses(PESSIMISTIC)
bounded_losses = losses(LOSSES.keys() - PESSIMISTIC - TRUST_REGION)
untied_losses = losses(LOSSES.keys() - TIED)

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
B, T = 3, 5
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)


def leaf(values, dtype=torch.float64):
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def random_inputs(seed=0, spread=0.1):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, dtype=torch.float64, generator=generator) * 3
    new = old + spread * torch.randn(B, T, dtype=torch.float64, generator=generator)
    return new, old, torch.randn(B, dtype=torch.float64, generator=generator)


def one_token(loss, ratio, advantage, **clip):
    """(loss, gradient of the loss in the log-probability, clipped) of a row of one token."""
    logprobs = leaf([[math.log(ratio) - 1]])
    result = loss(logprobs, torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([float(advantage)]),
                  torch.tensor([[True]]), **(clip or CLIP))  # fmt: skip
    result.per_token_loss.sum().backward()
    return result.per_token_loss.item(), logprobs.grad.item(), result.clipped.item()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("ratio", "at_positive", "at_negative"),
    # side of the clip interval [0.8, 1.3]; (loss, gradient, clipped) for A = 2 and for A = -2
    [
        (0.5, (-1.0, -1.0, False), (1.6, 0.0, True)),
        (1.0, (-2.0, -2.0, False), (2.0, 2.0, False)),
        (1.2, (-2.4, -2.4, False), (2.4, 2.4, False)),
        (1.5, (-2.6, 0.0, True), (3.0, 3.0, False)),
    ],
)
@pessimistic_losses
def test_c09_the_four_quadrants(loss, ratio, at_positive, at_negative, advantage):
    value, gradient, clipped = one_token(loss, ratio, advantage)
    expected = at_positive if advantage > 0 else at_negative
    assert (value, gradient) == pytest.approx(expected[:2], rel=1e-12) and clipped is expected[2]


@pytest.mark.parametrize(
    ("ratio", "weight", "clipped"), [(0.5, 0.8, True), (1.0, 1.0, False), (1.2, 1.2, False), (1.5, 1.3, True)]
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_c09_cispo_bounds_the_weight_and_keeps_the_gradient(ratio, weight, clipped, advantage):
    value, gradient, was_clipped = one_token(cispo, ratio, advantage)
    assert value == pytest.approx(-weight * advantage * (math.log(ratio) - 1))
    assert gradient == pytest.approx(-weight * advantage) and was_clipped is clipped


@pytest.mark.parametrize("ratio", [0.01, 1.0, 100.0])
def test_c09_reinforce_has_no_ratio(ratio):
    assert one_token(reinforce, ratio, 3.0) == pytest.approx((-3 * (math.log(ratio) - 1), -3.0, False))


def test_c09_gspo_uses_the_geometric_mean_of_the_kept_ratios():
    # log-ratios 0.3, 0.1 (kept) and 5.0 (masked out): s = exp(0.2); each kept token holds -s A, gradients sum to -s A
    logprobs = leaf([[-0.7, -0.9, 4.0]])
    result = gspo(logprobs, -torch.ones(1, 3, dtype=torch.float64), torch.tensor([2.0]),
                  torch.tensor([[True, True, False]]), **CLIP)  # fmt: skip
    s = math.exp(0.2)
    assert result.per_token_loss[0].tolist() == pytest.approx([-2 * s, -2 * s, 0])
    (result.per_token_loss.sum() / 2).backward()  # the weights of sequence_mean for one row of two tokens
    assert logprobs.grad[0].tolist() == pytest.approx([-s, -s, 0])


def test_gspo_clips_whole_sequences():
    log_ratio = torch.tensor([[0.4, 0.4, 0.1], [0.4, -0.4, 0.1]], dtype=torch.float64)
    result = gspo(log_ratio, torch.zeros(2, 3, dtype=torch.float64), torch.ones(2), torch.ones(2, 3).bool(), **CLIP)
    assert result.clipped.tolist() == [[True] * 3, [False] * 3]  # exp(0.3) = 1.35, exp(1/30) = 1.03


def test_gspo_of_rows_of_one_token_is_grpo():
    new, old, advantages = random_inputs(spread=0.5)
    columns = [(new[:, t : t + 1], old[:, t : t + 1], advantages, torch.ones(B, 1).bool()) for t in range(T)]
    for column in columns:
        for ours, theirs in zip(gspo(*column, **CLIP), grpo(*column, **CLIP), strict=True):
            torch.testing.assert_close(ours, theirs)


@every_loss
def test_c20_at_ratio_one_the_gradient_is_that_of_reinforce_and_nothing_is_clipped(loss):
    _, old, advantages = random_inputs()
    expected = -(advantages[:, None] * MASK)
    logprobs = leaf(old)
    result = loss(logprobs, logprobs.detach(), advantages, MASK, **CLIP)
    weights = MASK / MASK.sum(-1, keepdim=True).clamp(min=1)  # per row, so that gspo's gradient is spread evenly too
    (weights * result.per_token_loss).sum().backward()
    torch.testing.assert_close(logprobs.grad, weights * expected)
    assert not result.clipped.any()


@clipping_losses
def test_c40_old_logprobs_are_used_not_assumed_on_policy(loss):
    new, old, advantages = random_inputs()
    off, on = (loss(new, other, advantages, MASK, **CLIP).per_token_loss for other in (old, new))
    assert (off != on)[MASK].all()


def test_grpo_equals_the_textbook_formula():
    new, old, advantages = random_inputs(spread=0.5)
    ratio, A = (new - old).exp(), advantages[:, None]
    textbook = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.3) * A) * MASK
    torch.testing.assert_close(grpo(new, old, advantages, MASK, **CLIP).per_token_loss, textbook)


def gradients(loss, advantage, largest):
    """(gradient, clipped) of tokens whose log-ratios go from -largest to largest."""
    log_ratio = torch.linspace(-largest, largest, 37, dtype=torch.float64)[:, None]
    logprobs = leaf(log_ratio - 1)
    A, mask = torch.full((37,), advantage, dtype=torch.float64), torch.ones(37, 1, dtype=torch.bool)
    result = loss(logprobs, -torch.ones_like(log_ratio), A, mask, **CLIP)
    result.per_token_loss.sum().backward()
    return logprobs.grad, result.clipped


@every_loss
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_c25_nothing_but_clipping_removes_a_gradient(loss, advantage):
    """For ratios of 0.05 to 20, a kept token without gradient is reported as clipped."""
    gradient, clipped = gradients(loss, advantage, largest=3)
    assert (gradient != 0)[~clipped].all()


@losses(PESSIMISTIC | TRUST_REGION)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_c25_a_gradient_is_zero_exactly_where_it_is_clipped(loss, advantage):
    """From a ratio of 1e-26 to 1e26."""
    gradient, clipped = gradients(loss, advantage, largest=60)
    assert (gradient == 0).equal(clipped)


@pytest.mark.parametrize("loss", [cispo, reinforce], ids=["cispo", "reinforce"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_c25_no_token_of_cispo_and_reinforce_loses_its_gradient(loss, advantage):
    assert (gradients(loss, advantage, largest=60)[0] != 0).all()


@pessimistic_losses
def test_c25_without_bounds_the_gradient_is_the_ratio(loss):
    for ratio in (1e-6, 1e-2, 1e2, 1e6):
        for advantage in (1.0, -1.0):
            _, gradient, clipped = one_token(loss, ratio, advantage, clip_low=1.0, clip_high=math.inf)
            assert gradient == pytest.approx(-advantage * ratio) and not clipped


def far_away(loss, log_ratio, advantage):
    """(loss, gradient) of a row of one token in float32, where exp overflows at 88; the likelier policy is certain."""
    logprobs, old = leaf([[min(log_ratio, 0.0)]], torch.float32), torch.tensor([[min(-log_ratio, 0.0)]])
    result = loss(logprobs, old, torch.tensor([advantage]), torch.tensor([[True]]), **CLIP)
    result.per_token_loss.sum().backward()
    return result.per_token_loss.item(), logprobs.grad.item()


@every_loss
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_c25_a_ratio_that_overflows_makes_no_nan(loss, log_ratio, advantage):
    value, gradient = far_away(loss, log_ratio, advantage)
    assert not math.isnan(value) and not math.isnan(gradient)
    if advantage >= 0:
        assert math.isfinite(value) and math.isfinite(gradient)


@untied_losses
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1000.0, -1000.0])
def test_a_token_of_advantage_zero_costs_nothing_however_far_away(loss, log_ratio):
    assert far_away(loss, log_ratio, 0.0) == (0, 0)


@bounded_losses
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1000.0, -1000.0])
def test_c25_a_ratio_that_overflows_is_finite_for_a_bad_token_too(loss, log_ratio):
    value, gradient = far_away(loss, log_ratio, -1.0)
    assert math.isfinite(value) and math.isfinite(gradient)


@every_loss
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "everywhere"])
def test_c02_garbage_where_the_mask_is_false_changes_nothing(loss, garbage, where):
    new, old, advantages = random_inputs()
    advantages = advantages[:, None].expand(B, T)
    names = ("logprobs", "old_logprobs", "advantages")
    inputs = dict(zip(names, (new, old, advantages), strict=True))
    clean = [leaf(x) for x in inputs.values()]
    dirty = [leaf(x.masked_fill(~MASK, garbage) if where in (name, "everywhere") else x) for name, x in inputs.items()]
    results = [loss(*each, MASK, **CLIP) for each in (clean, dirty)]
    for result in results:
        result.per_token_loss.sum().backward()
    assert results[1].per_token_loss[~MASK].eq(0).all() and not results[1].clipped[~MASK].any()
    torch.testing.assert_close(results[1].per_token_loss, results[0].per_token_loss, rtol=0, atol=0)
    assert dirty[0].grad[~MASK].eq(0).all()
    torch.testing.assert_close(dirty[0].grad, clean[0].grad, rtol=0, atol=0)


@every_loss
def test_c04_a_batch_without_a_kept_token_gives_zeros(loss):
    logprobs = leaf(torch.full((B, T), torch.nan))
    nothing = torch.zeros(B, T, dtype=torch.bool)
    result = loss(logprobs, torch.full((B, T), torch.nan), torch.full((B,), torch.nan), nothing, **CLIP)
    result.per_token_loss.sum().backward()
    assert result.per_token_loss.eq(0).all() and logprobs.grad.eq(0).all() and not result.clipped.any()


@untied_losses
def test_a_zero_advantage_gives_exactly_zero_loss_and_gradient(loss):
    new, old, _ = random_inputs(spread=2.0)
    logprobs = leaf(new)
    result = loss(logprobs, old, torch.zeros(B, dtype=torch.float64), MASK, **CLIP)
    result.per_token_loss.sum().backward()
    assert result.per_token_loss.eq(0).all() and logprobs.grad.eq(0).all()


@losses(PESSIMISTIC | TRUST_REGION)
def test_at_a_zero_advantage_nothing_is_clipped(loss):
    """There was no gradient to remove."""
    new, old, _ = random_inputs(spread=2.0)
    assert not loss(new, old, torch.zeros(B, dtype=torch.float64), MASK, **CLIP).clipped.any()


@every_loss
def test_advantages_per_sequence_and_per_token_agree(loss):
    new, old, advantages = random_inputs(spread=0.5)
    per_row = loss(new, old, advantages, MASK, **CLIP)
    per_token = loss(new, old, advantages[:, None].expand(B, T), MASK, **CLIP)
    assert per_row.per_token_loss.equal(per_token.per_token_loss) and per_row.clipped.equal(per_token.clipped)


@every_loss
def test_c17_a_row_does_not_depend_on_the_others_or_on_padding(loss):
    new, old, advantages = random_inputs(spread=0.5)
    together = loss(new, old, advantages, MASK, **CLIP)
    alone = loss(new[:1, :3], old[:1, :3], advantages[:1], MASK[:1, :3], **CLIP)
    torch.testing.assert_close(together.per_token_loss[:1, :3], alone.per_token_loss)
    assert together.clipped[:1, :3].equal(alone.clipped)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c36_inputs_are_unchanged_and_shapes_and_dtypes_are_as_documented(loss, dtype):
    inputs = [x.to(dtype) for x in random_inputs(spread=0.5)]
    before = [x.clone() for x in inputs]
    result = loss(*inputs, MASK, **CLIP)
    assert result.per_token_loss.shape == (B, T) and result.per_token_loss.dtype == dtype
    assert result.clipped.shape == (B, T) and result.clipped.dtype == torch.bool
    assert all(x.equal(y) for x, y in zip(inputs, before, strict=True))


@every_loss
def test_c09_descending_the_loss_makes_good_tokens_likelier(loss):
    """The sign, end to end: one gradient step on the logits of a bandit raises its expected reward."""
    rewards = torch.tensor([0.0, 0.2, 0.4, 1.0], dtype=torch.float64)
    logits = leaf(torch.zeros(4))
    logprobs = logits.log_softmax(-1)
    advantages = ADVANTAGES["grpo"](rewards)
    one = torch.ones(4, 1, dtype=torch.bool)
    loss(logprobs[:, None], logprobs.detach()[:, None], advantages, one, **CLIP).per_token_loss.mean().backward()
    after = (logits - 0.1 * logits.grad).softmax(-1)
    assert after @ rewards > rewards.mean() + 0.001


# The published formulas in numbers: (value, gradient) for A = 1 and A = -1, where p = p_old r and p_old = 0.6.
GOLDEN = {
    "grpo": {1.5: [(-1.2, 0), (1.5, 1.5)], 0.5: [(-0.5, -0.5), (0.8, 0)], 4: [(-1.2, 0), (4, 4)]},
    "grpo, ratio_max 3": {1.5: [(-1.2, 0), (1.5, 1.5)], 0.5: [(-0.5, -0.5), (0.8, 0)], 4: [(-1.2, 0), (3, 0)]},
    "sapo": {1.5: [(-2.489837, -1.410022), (2.393585, 1.401210)], 0.5: [(-1.510163, -0.470007), (1.415938, 0.467070)]},
    "dppo_tv": {1.5: [(0, 0), (1.5, 1.5)], 0.5: [(-0.5, -0.5), (0, 0)]},  # p = 0.9 and 0.3
    "dppo_kl": {1.5: [(0, 0), (1.5, 1.5)], 0.5: [(-0.5, -0.5), (0, 0)]},  # 0.311239 and 0.192042 nats
    "dro": {1.5: [(0.113581, -0.959453), (-0.097140, 1.040547)], 0.5: [(1.227995, -1.069315), (-1.179950, 0.930685)]},
}


@pytest.mark.parametrize("case", GOLDEN)
def test_c09_golden_values_and_gradients(case):
    name, *changed = case.split(", ")
    options = {"ratio_max": 3.0} if changed else {}
    for ratio, expected in GOLDEN[case].items():
        for advantage, numbers in zip((1.0, -1.0), expected, strict=True):
            logprobs = leaf([[math.log(0.6 * ratio)]])
            bound = constants(LOSSES[name], Config(clip_low=0.2, clip_high=0.2, **options))
            old, A = torch.tensor([[math.log(0.6)]], dtype=torch.float64), torch.tensor([advantage])
            result = LOSSES[name](logprobs, old, A, torch.tensor([[True]]), **bound)
            result.per_token_loss.sum().backward()
            assert (result.per_token_loss.item(), logprobs.grad.item()) == pytest.approx(numbers, abs=1e-6), ratio


@pytest.mark.parametrize(("ratio", "distance"), [(1.5, 0.311239), (0.5, 0.192042)])
def test_c09_the_binary_kl_is_that_of_the_token_against_all_others(ratio, distance):
    """From 0.6 to 0.9 and to 0.3: the token is left out just above its distance, and kept just below."""
    old, new = (torch.tensor([[math.log(p)]], dtype=torch.float64) for p in (0.6, 0.6 * ratio))
    away = torch.tensor([math.copysign(1.0, ratio - 1)])
    for bound, clipped in ((distance - 1e-6, True), (distance + 1e-6, False)):
        assert dppo_kl(new, old, away, torch.tensor([[True]]), binary_kl_max=bound).clipped.item() is clipped
        assert not dppo_kl(new, old, -away, torch.tensor([[True]]), binary_kl_max=bound).clipped.item()


def test_the_trust_region_contains_its_border():
    yes, certain = torch.tensor([[True]]), torch.zeros(1, 1, dtype=torch.float64)
    old, new = certain + math.log(0.25), certain + math.log(0.5)
    assert not dppo_tv(new, old, torch.ones(1), yes, tv_max=(new.exp() - old.exp()).item()).clipped.item()
    assert not dppo_kl(certain - 0.5, certain, -torch.ones(1), yes, binary_kl_max=0.5).clipped.item()  # log 1 + 0.5


def test_the_binary_kl_knows_probabilities_that_rounding_lifts_above_1():
    yes, above, half = torch.tensor([[True]]), torch.tensor([[1e-7]]), torch.tensor([[math.log(0.5)]])
    assert dppo_kl(above, half, torch.ones(1), yes).clipped.item()
    assert dppo_kl(half, above, -torch.ones(1), yes).clipped.item()


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_of_constants_are_those_of_the_options(name):
    for parameter in signature(LOSSES[name]).parameters.values():
        assert parameter.default in (parameter.empty, getattr(Config(), parameter.name, None))


def test_the_trust_region_lets_a_rare_token_grow_a_hundredfold():
    old, new = (torch.tensor([[math.log(p)]], dtype=torch.float64) for p in (1e-4, 1e-2))
    for loss in (dppo_tv, dppo_kl):
        result = loss(new, old, torch.ones(1), torch.tensor([[True]]))
        assert result.per_token_loss.item() == pytest.approx(-100) and not result.clipped.item()


def test_c09_gmpo_clips_each_ratio_before_the_mean():
    """Ratios 1.5 (clipped at exp(0.4)) and 0.5: exp((0.4 + log 0.5) / 2). For A < 0 it is 0.5 that is clipped."""
    logprobs, bounds = leaf([[math.log(1.5), math.log(0.5)]]), {"clip_low": 1 - math.exp(-0.4)}
    bounds["clip_high"] = math.exp(0.4) - 1
    rest = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1), torch.ones(1, 2, dtype=torch.bool)
    result = gmpo(logprobs, *rest, **bounds)
    assert result.per_token_loss[0].tolist() == pytest.approx([-0.863662] * 2, abs=1e-6)
    assert result.clipped.tolist() == [[True, False]]
    (result.per_token_loss.sum() / 2).backward()
    assert logprobs.grad[0].tolist() == pytest.approx([0, -0.863662 / 2], abs=1e-6)
    assert gmpo(logprobs, rest[0], -rest[1], rest[2], **bounds).clipped.tolist() == [[False, True]]


def test_c09_gspo_token_gives_each_token_the_gradient_of_its_own_advantage():
    """s = exp(0.2), as for gspo; the gradient is that of the token alone, s A_t, where gspo would mix the two."""
    logprobs, A = leaf([[-0.7, -0.9]]), torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    result = gspo_token(logprobs, -torch.ones(1, 2, dtype=torch.float64), A, torch.ones(1, 2).bool(), **CLIP)
    s = math.exp(0.2)
    assert result.per_token_loss[0].tolist() == pytest.approx([-2 * s, s])
    result.per_token_loss.sum().backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-2 * s, s])


def test_sapo_has_another_gate_for_each_sign():
    for advantage, tau in ((1.0, 0.5), (-1.0, 2.0)):
        logprobs = leaf([[math.log(1.5)]])
        rest = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([advantage]), torch.tensor([[True]])
        result = sapo(logprobs, *rest, tau_pos=0.5, tau_neg=2.0)
        q = 1 / (1 + math.exp(-tau / 2))
        assert result.per_token_loss.item() == pytest.approx(-4 / tau * q * advantage)


def test_dro_pulls_back_to_the_old_policy_where_there_is_no_advantage():
    logprobs = leaf([[-0.5]])
    dro(
        logprobs, torch.tensor([[-1.0]]), torch.zeros(1), torch.tensor([[True]]), dro_beta=0.3
    ).per_token_loss.backward()
    assert logprobs.grad.item() == pytest.approx(0.15)
