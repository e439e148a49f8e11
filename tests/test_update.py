"""Learning: the loss is the formula, rows are cut without a trace, and an update that went wrong is left out."""

import copy
import inspect
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from grpo import distributed, losses, update
from grpo.batch import Batch
from grpo.config import Config
from grpo.kl import KL
from grpo.losses import CLIPPING, LOSSES
from grpo.metrics import Sums
from grpo.microbatch import cut_groups
from grpo.objective import objective
from grpo.policy import frozen_copy
from grpo.tables import asked, constants
from grpo.update import Learner
from grpo.weighting import WEIGHTINGS, count_groups
from tests.fakes import runs
from tests.fakes.models import plain_logprobs, plain_twin, tiny_policy

EXACT = {"rtol": 1e-9, "atol": 1e-12}
LENGTHS = [3, 1, 5, 2, 4, 4, 1, 6]  # of 4 prompts, 2 completions each
V = 257


def config(**changes) -> Config:
    sizes = {"precision": "fp64", "group_size": 2, "max_new_tokens": 7, "max_tokens_per_microbatch": 4096}
    rates = {"temperature": 0.7, "learning_rate": 1.0, "max_grad_norm": 0.0, "kl_coef": 0.0}
    return Config(**sizes | rates | changes)


def experience(lengths=LENGTHS, seed: int = 0, dtype=torch.float64) -> Batch:
    """Random rows of these lengths, two per prompt; all that the sampler and the rewards would have said is random."""
    random = torch.Generator().manual_seed(seed)
    draw = {"generator": random, "dtype": dtype}
    B, T = len(lengths), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    trunk = [7, 8, 9]
    return Batch(
        prompt_ids=[trunk[: 1 + i % 3] + [20 + i] for i in range(B // 2)],
        completion_ids=torch.where(mask, torch.randint(V, (B, T), generator=random), 0),
        completion_mask=mask,
        advantages=torch.randn(B, **draw),
        sampling_logprobs=torch.where(mask, -torch.rand(B, T, **draw), 0),
        prompt_index=list(range(B // 2)),
    )


def learner(policy, reference=None, **changes) -> Learner:
    """With plain gradient descent at rate 1, so that weights move by exactly the gradient."""
    made = Learner(config(**changes), policy, reference)
    made.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    return made


def learn(policy, batch: Batch, reference=None, step: int = 1, **changes) -> tuple[dict, dict, bool]:
    """(metrics, gradient by parameter, what `learn` returned) of one step."""
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    sums = Sums()
    finite = learner(policy, reference, **changes).learn(batch, step, sums)
    moved = {name: before[name] - p.detach() for name, p in policy.named_parameters()}
    return sums.reduce(), moved, finite


@pytest.mark.parametrize("changes", [{}, {"minibatch_size": 4, "learning_rate": 0.1}], ids=["one", "minibatches"])
def test_c55_gaps_in_the_numbers_of_groups_change_nothing(changes):
    """Kind: learning assumes groups 0 to N - 1. The rows of groups 0, 1, 5 and 14 all count, as those of 0 to 3 do."""
    whole, gaps = experience(), replace(experience(), prompt_index=[0, 1, 5, 14])
    (expected, gradient, _), (metrics, moved, _) = [
        learn(tiny_policy(precision="fp64"), batch, **changes) for batch in (whole, gaps)
    ]
    assert metrics == pytest.approx(expected, rel=1e-9)
    assert_same(gradient, moved)


@pytest.mark.parametrize("index", [[3, 3, 7, 9], [9, 0, 4, 2]], ids=["one number twice", "any order"])
def test_c55_each_row_is_in_one_update_whatever_the_numbers_are(index):
    """Kind: as above. No row is left out of the updates of an epoch, and none is in two."""
    updates = cut_groups(replace(experience(), prompt_index=index), 2, 2, (0, 1), 0)
    assert sorted(row for rows in updates for row in rows) == list(range(8))


LEFT_OUT = {"minibatch_size": 2, "num_epochs": 2, "learning_rate": 0.1, "kl_coef": 0.3}


def left_out(keep: list[int], out: Path | None = None) -> tuple[dict, dict]:
    """(metrics, gradient) of a step of which the groups in `keep` are left. Rank r had each so-many-th of them."""
    distributed.init("cpu", 120)
    policy, whole = tiny_policy(precision="fp64"), experience()
    here = range(distributed.rank(), len(whole.prompt_ids), distributed.world_size())
    batch = whole.select(list(here)).select([place for place, number in enumerate(here) if number in keep])
    metrics, moved, _ = learn(policy, batch, tiny_policy(precision="fp64", seed=1), **LEFT_OUT)
    if out is not None:
        torch.save((metrics, moved), f"{out}_{distributed.rank()}.pt")
        distributed.shutdown()
    return metrics, moved


@pytest.mark.parametrize("keep", [[0, 2], [1, 2, 3], [3]])
def test_c55_groups_that_are_left_out_are_as_if_never_drawn(keep):
    """Kind: as above. What a filter leaves is a step of its own: weights, minibatches, metrics."""
    metrics, moved = left_out(keep)
    drawn = replace(experience().select(keep), prompt_index=list(range(len(keep))))
    expected, gradient, _ = learn(
        tiny_policy(precision="fp64"), drawn, tiny_policy(precision="fp64", seed=1), **LEFT_OUT
    )
    assert metrics == pytest.approx(expected, rel=1e-9)
    assert_same(moved, gradient)


def test_c04_c55_a_rank_that_lost_all_of_its_groups_learns_what_the_others_do(tmp_path):
    """Of the groups 0 and 2 on rank 0, and 1 and 3 on rank 1, those of rank 0 are left."""
    metrics, moved = left_out([0, 2])
    out = tmp_path / "learned"
    ranks = runs.start_ranks(partial(left_out, [0, 2], out), 2, out)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    for rank in (0, 1):
        there_metrics, there = torch.load(f"{out}_{rank}.pt")
        assert there_metrics == pytest.approx(metrics, rel=1e-9)
        assert_same(there, moved)


def updates(made: Learner) -> int:
    """Of the optimiser, the same for every weight."""
    (number,) = {int(state["step"]) for state in made.optimizer.state.values()}
    return number


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **EXACT)


def plain(policy, batch: Batch):
    """Logprobs and entropy of the batch from transformers' own model, with a graph; and that model."""
    twin = plain_twin(policy)
    G = batch.group_size
    rows = [ids[: int(m.sum())].tolist() for ids, m in zip(batch.completion_ids, batch.completion_mask, strict=True)]
    completions = [rows[i * G : (i + 1) * G] for i in range(len(batch.prompt_ids))]
    return *plain_logprobs(twin, batch.prompt_ids, completions, 0.7, V, batch.completion_ids.shape[1]), twin


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_c11_c18_c21_loss_gradient_and_metrics_are_the_formulas(loss, weighting):
    policy, batch = tiny_policy(precision="fp64"), experience()
    reference = tiny_policy(precision="fp64", seed=1)
    noise = torch.randn(batch.completion_mask.shape, generator=torch.Generator().manual_seed(1)).double() / 4
    logprobs, entropy, twin = plain(policy, batch)
    ref_logprobs = plain(reference, batch)[0].detach()
    batch.old_logprobs = torch.where(batch.completion_mask, logprobs.detach() + noise, 0)
    mask, tokens = batch.completion_mask, sum(LENGTHS)

    bound = constants(LOSSES[loss], config(clip_low=0.1, clip_high=0.2))
    expected = LOSSES[loss](logprobs, batch.old_logprobs, batch.advantages, mask, **bound)
    kl = KL["k3"](logprobs, ref_logprobs)
    num_groups, group_tokens = count_groups(mask, batch.group_size)
    facts = {"num_tokens": tokens, "num_sequences": 8, "max_new_tokens": 7, "dtype": torch.float64}
    facts |= {"num_groups": num_groups, "group_tokens": group_tokens}
    weights = WEIGHTINGS[weighting](mask, **asked(WEIGHTINGS[weighting], facts))
    total = (weights * (expected.per_token_loss + 0.3 * kl)).sum()
    total.backward()

    options = {"loss": loss, "weighting": weighting, "kl_coef": 0.3, "clip_low": 0.1}
    metrics, moved, finite = learn(policy, batch, reference, **options)
    assert finite
    assert_same(moved, {f"model.{name}": p.grad for name, p in twin.named_parameters()})
    ratio = (logprobs - batch.old_logprobs).exp()
    gap = (batch.old_logprobs - batch.sampling_logprobs).abs()
    norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
    for name, value in {
        "optim/loss": total,
        "optim/grad_norm": norm,
        "policy/entropy": entropy[mask].mean(),
        "policy/kl": kl[mask].mean(),
        "policy/ratio_mean": ratio[mask].mean(),
        "policy/clip_fraction": expected.clipped[mask].double().mean(),
        "policy/sampler_gap_mean": gap[mask].mean(),
        "policy/sampler_gap_max": gap[mask].max(),
    }.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-9), name
    if loss in CLIPPING:
        assert 0 < metrics["policy/clip_fraction"] < 1
    assert metrics["optim/lr"] == 1.0 and metrics["optim/skipped"] == 0


def test_c18_the_gradient_of_a_token_is_that_of_its_own_logprob():
    policy, batch = tiny_policy(precision="fp64"), experience()
    for row, column in ((0, 0), (2, 4), (7, 5), (4, 1)):
        here = copy.deepcopy(policy)
        batch.advantages = torch.zeros(batch.completion_mask.shape, dtype=torch.float64)
        batch.advantages[row, column] = 2.0
        logprobs, _, twin = plain(here, batch)
        (-2.0 * logprobs[row, column] / sum(LENGTHS)).backward()
        metrics, moved, _ = learn(here, batch)
        assert_same(moved, {f"model.{name}": p.grad for name, p in twin.named_parameters()})


def calls(module) -> list:
    """Grows by (tokens, with gradient) at each forward of the module."""
    seen = []
    module.register_forward_hook(lambda _, args, output: seen.append((len(args[0].input_ids), output[0].requires_grad)))
    return seen


def test_c20_on_policy_the_ratio_is_exactly_1_without_an_extra_forward():
    policy = tiny_policy()  # in float32, where a second forward of another cut would show
    reference = frozen_copy(policy)
    of_policy, of_reference = calls(policy), calls(reference)
    options = {"precision": "fp32", "kl_coef": 0.1, "max_tokens_per_microbatch": 12, "max_grad_norm": 1.0}
    metrics, _, _ = learn(policy, experience(dtype=torch.float32), reference, **options)
    assert metrics["policy/ratio_mean"] == 1.0 and metrics["policy/clip_fraction"] == 0.0
    assert len(of_policy) == len(of_reference) > 2
    assert all(gradient for _, gradient in of_policy) and not any(gradient for _, gradient in of_reference)
    assert metrics["policy/kl"] == 0.0  # C22, at step 0


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_the_ratio_can_be_against_the_sampler(num_epochs):
    policy, batch = tiny_policy(precision="fp64"), experience()
    options = {"ratio_to": "sampler", "num_epochs": num_epochs, "learning_rate": 0.0}
    metrics, _, _ = learn(policy, batch, **options)
    old = plain(policy, batch)[0].detach()
    ratio = (old - batch.sampling_logprobs)[batch.completion_mask].exp()
    assert metrics["policy/ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-9)
    gap = (old - batch.sampling_logprobs)[batch.completion_mask].abs()
    assert metrics["policy/sampler_gap_max"] == pytest.approx(gap.max().item(), rel=1e-9)
    same = replace(batch, sampling_logprobs=old.where(batch.completion_mask, 0))
    moved, expected = (
        learn(tiny_policy(precision="fp64"), same, num_epochs=num_epochs, learning_rate=0.1, ratio_to=to)[1]
        for to in ("sampler", "learner")
    )
    assert_same(moved, expected)


def test_c21_the_gap_to_the_sampler_is_measured_on_the_sampled_tokens():
    policy, batch = tiny_policy(precision="fp64"), experience()
    logprobs = plain(policy, batch)[0].detach()
    batch.sampling_logprobs = torch.where(batch.completion_mask, logprobs - 0.25, 0)
    batch.sampling_logprobs[2, 3] += 1.0
    metrics, _, _ = learn(policy, batch)
    assert metrics["policy/sampler_gap_mean"] == pytest.approx(0.25 + 0.5 / sum(LENGTHS), rel=1e-9)
    assert metrics["policy/sampler_gap_max"] == pytest.approx(0.75, rel=1e-9)


@pytest.fixture
def ratios(monkeypatch) -> list[tuple[float, float]]:
    """Grows by (smallest, largest) ratio of each call of the objective."""
    seen = []

    def spied(logprobs, old_logprobs, *others, **parts):
        ratio = (logprobs - old_logprobs).detach().exp()[others[-1]]
        seen.append((ratio.min().item(), ratio.max().item()))
        return objective(logprobs, old_logprobs, *others, **parts)

    monkeypatch.setattr(update, "objective", spied)
    return seen


@pytest.mark.parametrize(("minibatch_size", "num_epochs", "updates"), [(4, 1, 2), (0, 2, 2), (4, 2, 4), (6, 1, 2)])
def test_c40_old_logprobs_are_recomputed_before_the_first_of_several_updates(
    minibatch_size, num_epochs, updates, ratios
):
    policy, batch = tiny_policy(precision="fp64"), experience()
    batch.old_logprobs = torch.full(batch.completion_mask.shape, -99.0)  # whatever stood there
    forwards = calls(policy)
    made = learner(policy, minibatch_size=minibatch_size, num_epochs=num_epochs, learning_rate=0.05)
    made.learn(batch, 1, Sums())
    assert len(ratios) == updates
    assert ratios[0] == pytest.approx((1.0, 1.0), abs=1e-12)
    for low, high in ratios[1:]:
        assert low < 1 - 1e-6 and high > 1 + 1e-6
    assert [gradient for _, gradient in forwards] == [False] + [True] * updates


def test_one_update_leaves_given_old_logprobs_alone(ratios):
    policy, batch = tiny_policy(precision="fp64"), experience()
    batch.old_logprobs = plain(policy, batch)[0].detach() - math.log(2) * batch.completion_mask.double()
    made = learner(policy)
    made.learn(batch, 1, Sums())
    assert ratios == [pytest.approx((2.0, 2.0), rel=1e-9)]


def updates_of(made: Learner, batch: Batch, step: int = 1) -> list[list[int]]:
    """The rows of each update."""
    seen = []

    def spied(*args):
        updates = cut_groups(*args)
        seen.extend(updates)
        return updates

    with mock.patch.object(update, "cut_groups", spied):
        made.learn(batch, step, Sums())
    return seen


def test_c33_minibatches_are_whole_groups_of_a_permutation_by_seed_step_and_epoch():
    policy, batch = tiny_policy(precision="fp64"), experience([2] * 14)
    options = {"minibatch_size": 6, "num_epochs": 2, "learning_rate": 0.0}
    drawn = updates_of(learner(policy, **options), batch)
    assert [len(rows) for rows in drawn] == [6, 6, 2] * 2
    for epoch in (drawn[:3], drawn[3:]):
        groups = [row // 2 for rows in epoch for row in rows]
        assert sorted(groups) == sorted([*range(7)] * 2)
        assert all(rows[i] + 1 == rows[i + 1] and rows[i] % 2 == 0 for rows in epoch for i in range(0, len(rows), 2))
    assert drawn[:3] != drawn[3:]
    assert updates_of(learner(policy, **options), batch) == drawn
    assert updates_of(learner(policy, **options), batch, step=2) != drawn
    assert updates_of(learner(policy, **options, seed=1), batch) != drawn
    whole = updates_of(learner(policy, num_epochs=2), batch)
    assert whole == [list(range(14))] * 2


def test_a_minibatch_is_an_update_of_its_own():
    """Two minibatches are two steps of the optimiser, each with the counts of its own rows."""
    policy, batch = tiny_policy(precision="fp64"), experience()
    twin = copy.deepcopy(policy)
    made = learner(policy, minibatch_size=4)
    order = updates_of(made, batch)
    old = plain(twin, batch)[0].detach()
    for rows in order:
        groups = [row // 2 for row in rows[::2]]
        part = replace(batch, old_logprobs=old).select(groups)
        part.prompt_index = None
        assert learn(twin, part)[2]
    assert_same(dict(policy.named_parameters()), dict(twin.named_parameters()))


def test_c02_rows_left_out_count_nowhere():
    """The update of a batch with rows masked out is that of the batch without them, whatever stands in those rows."""
    policy = tiny_policy(precision="fp64")
    batch = experience()
    kept = batch.select([0, 2])  # rows 0, 1, 4, 5
    kept.prompt_index = None
    out = torch.tensor([2, 3, 6, 7])
    batch.completion_mask[out] = False
    batch.advantages[out] = torch.nan
    batch.sampling_logprobs[out] = torch.inf
    for weighting in WEIGHTINGS:
        ours = learn(copy.deepcopy(policy), batch, frozen_copy(policy), weighting=weighting, kl_coef=0.1)
        theirs = learn(copy.deepcopy(policy), kept, frozen_copy(policy), weighting=weighting, kl_coef=0.1)
        assert_same(ours[1], theirs[1])
        assert ours[0] == pytest.approx(theirs[0], rel=1e-9)


def test_c04_an_update_without_a_kept_token_changes_nothing():
    policy, batch = tiny_policy(precision="fp64"), experience()
    batch.completion_mask[:] = False
    before = copy.deepcopy(policy.state_dict())
    made = Learner(config(weight_decay=0.1, minibatch_size=4), policy, frozen_copy(policy))
    sums = Sums()
    assert made.learn(batch, 1, sums)
    assert_same(policy.state_dict(), before)
    assert updates(made) == 0
    metrics = sums.reduce()
    assert "optim/grad_norm" not in metrics and "optim/loss" not in metrics
    assert metrics["tokens/computed"] == 0


def test_c36_learning_writes_into_no_tensor_of_the_batch():
    policy, batch = tiny_policy(precision="fp64"), experience()
    before = copy.deepcopy(batch)
    learn(policy, batch, frozen_copy(policy), minibatch_size=4, num_epochs=2, kl_coef=0.1, max_tokens_per_microbatch=9)
    assert batch.prompt_ids == before.prompt_ids and batch.old_logprobs is None
    for name in ("completion_ids", "completion_mask", "advantages", "sampling_logprobs"):
        assert torch.equal(getattr(batch, name), getattr(before, name)), name


def test_c23_the_reference_stays_the_initial_policy():
    policy, batch = tiny_policy(precision="fp64"), experience()
    initial = copy.deepcopy(policy)
    reference = frozen_copy(policy)
    made = learner(policy, reference, kl_coef=0.1, learning_rate=0.1)
    divergences = []
    for step in range(1, 4):
        sums = Sums()
        made.learn(batch, step, sums)
        divergences.append(sums.reduce()["policy/kl"])
    assert divergences[0] == 0.0 and 0 < divergences[1] < divergences[2]
    assert_same(reference.state_dict(), initial.state_dict())
    assert not any(p.requires_grad for p in reference.parameters())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_c26_a_small_update_of_a_master_weight_is_not_lost(dtype):
    policy = tiny_policy(precision=dtype)
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    made = Learner(config(precision=dtype, learning_rate=1e-5), policy, None)
    assert made.learn(experience(), 1, Sums())
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    moved = before - torch.cat([p.detach().flatten() for p in policy.parameters()])
    moved = moved[(before.abs() > 0.09) & (before.abs() < 0.11)]
    # Adam's first step is the learning rate times the sign of the gradient; the spacing of bfloat16 at 0.1 is 5e-4.
    assert len(moved) > 500
    assert moved.abs().median().item() == pytest.approx(1e-5, rel=0.01)


def test_a_gradient_that_is_not_finite_is_left_out_and_counted():
    policy, batch = tiny_policy(precision="fp64"), experience()
    before = copy.deepcopy(policy.state_dict())
    made = Learner(config(weight_decay=0.1, minibatch_size=2), policy, None)
    bad = replace(batch, advantages=batch.advantages.clone())
    bad.advantages[:] = torch.nan
    sums = Sums()
    assert made.learn(bad, 1, sums) is False
    assert_same(policy.state_dict(), before)
    assert updates(made) == 0
    assert sums.reduce()["optim/skipped"] == 4 and "optim/grad_norm" not in sums.reduce()

    one_bad = replace(batch, advantages=batch.advantages.clone())
    one_bad.advantages[3] = torch.inf
    sums = Sums()
    assert made.learn(one_bad, 2, sums) is False
    metrics = sums.reduce()
    assert metrics["optim/skipped"] == 1 and 0 < metrics["optim/grad_norm"] < math.inf
    assert all(p.isfinite().all() for p in policy.parameters())
    assert updates(made) == 3
    assert made.learn(batch, 3, Sums()) is True


def test_a_back_off_of_the_fp16_scaler_is_no_skipped_update():
    policy, batch = tiny_policy(precision="fp16"), experience()
    made = Learner(config(precision="fp16", learning_rate=1e-3), policy, None)
    assert made.scaler.is_enabled()
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = copy.deepcopy(policy.state_dict())
    sums = Sums()
    assert made.learn(batch, 1, sums) is True
    assert made.scaler.get_scale() == 2.0**126
    assert sums.reduce()["optim/skipped"] == 0
    assert_same(policy.state_dict(), before)
    while made.scaler.get_scale() > 1 and not updates(made):
        assert made.learn(batch, 1, Sums())
    assert made.scaler.get_scale() > 2.0**10 and updates(made) == 1  # it found its scale

    made.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    bad = replace(batch, advantages=torch.full_like(batch.advantages, torch.nan))
    sums = Sums()
    assert made.learn(bad, 2, sums) is False  # no scale would help
    assert sums.reduce()["optim/skipped"] == 1


def test_the_scale_of_fp16_changes_no_gradient():
    policy, norms = tiny_policy(precision="fp16"), []
    for scale in (1.0, 1024.0):
        here = copy.deepcopy(policy)
        made = learner(here, precision="fp16")
        made.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        sums = Sums()
        made.learn(experience(), 1, sums)
        norms.append((sums.reduce()["optim/grad_norm"], sums.reduce()["optim/loss"]))
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_the_gradient_is_scaled_down_to_max_grad_norm():
    policy, batch = tiny_policy(precision="fp64"), experience()
    metrics, whole, _ = learn(copy.deepcopy(policy), batch)
    limit = metrics["optim/grad_norm"] / 4
    clipped_metrics, clipped, _ = learn(copy.deepcopy(policy), batch, max_grad_norm=limit)
    assert clipped_metrics["optim/grad_norm"] == pytest.approx(metrics["optim/grad_norm"], rel=1e-12)  # before clipping
    for name in whole:
        torch.testing.assert_close(4 * clipped[name], whole[name], rtol=1e-5, atol=1e-9)
    loose = learn(copy.deepcopy(policy), batch, max_grad_norm=5 * limit)[1]
    assert_same(loose, whole)


def test_tokens_computed_are_the_nodes_of_the_trie():
    batch = experience()
    G, prefixes = batch.group_size, set()
    for row, length in enumerate(LENGTHS):
        sequence = batch.prompt_ids[row // G] + batch.completion_ids[row, : max(0, length - 1)].tolist()
        prefixes |= {tuple(sequence[: i + 1]) for i in range(len(sequence))}
    policy = tiny_policy(precision="fp64")
    forwards = calls(policy)
    metrics, _, _ = learn(policy, batch)
    assert metrics["tokens/computed"] == len(prefixes) == sum(tokens for tokens, _ in forwards)
    assert len(prefixes) < sum(len(prompt) for prompt in batch.prompt_ids for _ in range(G)) + sum(LENGTHS)
    forwards.clear()
    assert learn(policy, batch, max_tokens_per_microbatch=1)[0]["tokens/computed"] == len(prefixes)  # however it is cut
    assert sum(tokens for tokens, _ in forwards) > len(prefixes)


@pytest.mark.parametrize("budget", [1, 10, 17, 1000])
def test_micro_batches_keep_to_the_token_budget(budget):
    policy, batch = tiny_policy(precision="fp64"), experience()
    forwards = calls(policy)
    learn(policy, batch, max_tokens_per_microbatch=budget)
    longest = max(len(batch.prompt_ids[row // 2]) + length for row, length in enumerate(LENGTHS))
    assert all(tokens <= max(budget, longest) for tokens, _ in forwards)
    assert len(forwards) == {1: 8, 1000: 1}.get(budget, len(forwards))


@pytest.mark.parametrize("option", ["loss", "weighting", "kl", "sampler_correction"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(option):
    with pytest.raises(ValueError, match=f"{option} is 'nonsense': must be one of "):
        learner(tiny_policy(precision="fp64"), **{option: "nonsense"})


def test_constants_of_a_loss_come_from_the_options_of_their_names(monkeypatch):
    seen = {}

    def new(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high, correction_cap=0.0):
        seen.update(clip_low=clip_low, clip_high=clip_high, correction_cap=correction_cap)
        return losses.reinforce(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)

    monkeypatch.setitem(LOSSES, "new", new)
    learn(tiny_policy(precision="fp64"), experience(), loss="new", clip_low=0.1, clip_high=0.3, correction_cap=5.0)
    assert seen == {"clip_low": 0.1, "clip_high": 0.3, "correction_cap": 5.0}


def test_a_constant_of_a_loss_without_an_option_is_an_error(monkeypatch):
    monkeypatch.setitem(LOSSES, "sapo", sapo)
    with pytest.raises(ValueError, match="^loss sapo has the constant clip_hi, but no option has that name"):
        learner(tiny_policy(precision="fp64"), loss="sapo")


def sapo(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_hi=1.0):
    return losses.reinforce(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_hi)


@pytest.mark.parametrize(
    ("correction", "cap", "factor"),
    [("truncate", 2.0, 1.5), ("truncate", 1.2, 1.2), ("mask", 2.0, 1.5), ("mask", 1.2, 0)],
)
def test_the_correction_multiplies_the_surrogate_and_not_the_kl(correction, cap, factor):
    """By the ratio of the policy at rollout time to the sampler, 1.5 everywhere; the present policy is a third one."""
    policy, batch = tiny_policy(precision="fp64"), experience()
    old = torch.where(batch.completion_mask, plain(policy, batch)[0].detach() - 0.1, 0)
    batch.old_logprobs, batch.sampling_logprobs = old, torch.where(batch.completion_mask, old - math.log(1.5), 0)
    options = {"reference": tiny_policy(precision="fp64", seed=1), "kl_coef": 0.2}
    corrected = learn(copy.deepcopy(policy), batch, sampler_correction=correction, correction_cap=cap, **options)[1]
    scaled = replace(batch, advantages=factor * batch.advantages)
    assert_same(corrected, learn(copy.deepcopy(policy), scaled, **options)[1])


def test_from_learn_to_the_loss_it_is_four_calls(monkeypatch):
    """Nothing is bound or wrapped on the way, so that a reader can follow it."""
    way = []

    def asks(*tensors, clip_low, clip_high):
        way.append([frame.function for frame in inspect.stack()[1:5]])
        return losses.reinforce(*tensors, clip_low=clip_low, clip_high=clip_high)

    monkeypatch.setitem(LOSSES, "asks", asks)
    learn(tiny_policy(precision="fp64"), experience(), loss="asks")
    assert way == [["objective", "_loss", "accumulate", "learn"]]


def test_the_log_probabilities_of_the_reference_may_be_had_before_the_advantages():
    """A reward may then use them. What is there already is used, and not computed again."""
    policy, reference = tiny_policy(precision="fp64"), tiny_policy(precision="fp64", seed=1)
    expected, gradient, _ = learn(copy.deepcopy(policy), experience(), reference, kl_coef=0.3)
    of_reference, made = calls(reference), learner(policy, reference, kl_coef=0.3)
    drawn = made.with_ref_logprobs(replace(experience(), advantages=None))
    torch.testing.assert_close(drawn.ref_logprobs, plain(reference, drawn)[0].detach(), **EXACT)
    assert drawn.ref_logprobs.dtype == torch.float64
    assert made.with_ref_logprobs(drawn) is drawn and len(of_reference) == 1
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    sums = Sums()
    made.learn(replace(drawn, advantages=experience().advantages), 1, sums)
    assert sums.reduce() == pytest.approx(expected, rel=1e-9) and len(of_reference) == 1
    assert_same({name: before[name] - p.detach() for name, p in policy.named_parameters()}, gradient)
    other = replace(drawn, advantages=experience().advantages, ref_logprobs=drawn.ref_logprobs - 1)
    assert learn(tiny_policy(precision="fp64"), other, None, kl_coef=0.3)[0]["policy/kl"] > 0.3  # of e - 1 - 1


def test_without_a_reference_a_batch_stays_as_it_is():
    batch = experience()
    assert learner(tiny_policy(precision="fp64")).with_ref_logprobs(batch) is batch


def test_without_a_reference_there_is_no_kl():
    metrics, _, _ = learn(tiny_policy(precision="fp64"), experience())
    assert "policy/kl" not in metrics


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used():
    policy = tiny_policy(precision="fp64")
    made = learner(policy, schedule="linear", warmup_steps=2, num_steps=4, learning_rate=0.5)
    for step, rate in ((1, 0.25), (2, 0.5), (3, 0.5), (4, 0.25)):
        sums = Sums()
        made.learn(experience(), step, sums)
        assert sums.reduce()["optim/lr"] == made.optimizer.param_groups[0]["lr"] == rate


def test_moments_are_made_before_the_first_update_and_are_those_of_torch():
    policy, batch = tiny_policy(), experience()
    policies = policy, copy.deepcopy(policy)
    ours, torchs = (Learner(config(learning_rate=1e-2, weight_decay=0.1), one, None) for one in policies)
    assert len(ours.optimizer.state) == len(list(policy.parameters())) and updates(ours) == 0
    torchs.optimizer.state.clear()  # as it comes: filled in the first update
    held = [moment.data_ptr() for state in ours.optimizer.state.values() for moment in state.values()]
    for step in (1, 2):
        for made in (ours, torchs):
            assert made.learn(batch, step, Sums())
    assert [moment.data_ptr() for state in ours.optimizer.state.values() for moment in state.values()] == held
    assert all(map(torch.equal, *(one.parameters() for one in policies)))
    for mine, theirs in zip(*(made.optimizer.state.values() for made in (ours, torchs)), strict=True):
        assert mine.keys() == theirs.keys() and all(map(torch.equal, mine.values(), theirs.values()))


def test_c54_what_a_step_can_not_be_learned_without_is_said():
    """The kind: a value that a run would have settled or made, given to the library as it is."""
    policy = tiny_policy(precision="fp64")
    with pytest.raises(ValueError, match="max_tokens_per_microbatch is 'auto': a Learner needs a number"):
        Learner(Config(), policy, None)
    for name in ("advantages", "sampling_logprobs"):
        with pytest.raises(ValueError, match=f"{name}: the batch has none"):
            learner(policy).learn(replace(experience(), **{name: None}), 1, Sums())
    with pytest.raises(ValueError, match="group_size is 4: the batch has groups of 2"):
        learner(policy, group_size=4).learn(experience(), 1, Sums())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_entropy_bonus_is_the_weighted_entropy_of_the_same_tokens(weighting):
    """Against autograd through transformers' own logits. A row that is left out has no entropy to gain."""
    policy, batch = tiny_policy(precision="fp64"), experience()
    batch.completion_mask[3] = False
    entropy, twin = plain(policy, experience())[1:]
    counts = {"num_tokens": sum(LENGTHS) - LENGTHS[3], "num_sequences": 7, "max_new_tokens": 7}
    num_groups, group_tokens = count_groups(batch.completion_mask, batch.group_size)
    facts = counts | {"num_groups": num_groups, "group_tokens": group_tokens, "dtype": torch.float64}
    weights = WEIGHTINGS[weighting](batch.completion_mask, **asked(WEIGHTINGS[weighting], facts))
    bonus = 0.3 * (weights * entropy).sum()
    bonus.backward()
    (without, plainly, _), (metrics, moved, _) = (
        learn(copy.deepcopy(policy), batch, weighting=weighting, entropy_coef=coef) for coef in (0.0, 0.3)
    )
    assert metrics["optim/loss"] == pytest.approx(without["optim/loss"] - bonus.item(), rel=1e-9)
    assert metrics["policy/entropy"] == without["policy/entropy"]
    gained = {f"model.{name}": -p.grad for name, p in twin.named_parameters()}
    assert_same({name: moved[name] - plainly[name] for name in moved}, gained)


def test_a_uniform_policy_has_no_entropy_to_gain():
    policy, batch = tiny_policy(precision="fp64"), experience()
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.zero_()
    batch.advantages.zero_()
    metrics, moved, _ = learn(policy, batch, entropy_coef=1.0)
    assert metrics["policy/entropy"] == pytest.approx(math.log(V)) == -metrics["optim/loss"]
    assert all(gradient.abs().max() < 1e-12 for gradient in moved.values())


FAR = {"num_epochs": 4, "learning_rate": 0.005}


def far(threshold: float, out: Path | None = None) -> tuple[dict, dict]:
    """(metrics, movement) of a step of up to four updates, until the policy is further than a threshold."""
    distributed.init("cpu", 120)
    whole = experience()
    here = list(range(distributed.rank(), len(whole.prompt_ids), distributed.world_size()))
    metrics, moved, _ = learn(tiny_policy(precision="fp64"), whole.select(here), kl_stop=threshold, **FAR)
    if out is not None:
        torch.save((metrics, moved), f"{out}_{distributed.rank()}.pt")
        distributed.shutdown()
    return metrics, moved


def distances() -> tuple[list[float], list[float]]:
    """Mean k3 of old to current policy before updates 2, 3 and 4, over all rows, and before update 2 on two ranks."""
    batch, found = experience(), []
    mask = batch.completion_mask
    old = plain(tiny_policy(precision="fp64"), batch)[0].detach()
    for epochs in (1, 2, 3):
        policy = tiny_policy(precision="fp64")
        learn(policy, batch, **FAR | {"num_epochs": epochs})
        ratio = plain(policy, batch)[0].detach() - old
        found.append(ratio.exp() - 1 - ratio)
    of_ranks = [found[0][rows][mask[rows]].mean().item() for rows in ([0, 1, 4, 5], [2, 3, 6, 7])]
    return [k3[mask].mean().item() for k3 in found], of_ranks


def test_updates_end_where_the_policy_has_moved_too_far():
    measured, _ = distances()
    assert 0 < measured[0] < measured[1] < measured[2]
    for made, threshold in enumerate([0.0, *(1.001 * distance for distance in measured[:2])], start=1):
        metrics, moved = far(threshold)
        expected, gradient, _ = learn(tiny_policy(precision="fp64"), experience(), **FAR | {"num_epochs": made})
        assert metrics["optim/updates"] == made == expected["optim/updates"]
        assert_same(moved, gradient)
    all_of_them = far(1.001 * measured[2])
    assert all_of_them[0] == far(math.inf)[0] and all_of_them[0]["optim/updates"] == 4
    assert all_of_them[0]["policy/old_kl"] == pytest.approx(sum(measured) / 4, rel=1e-9)


def test_ranks_agree_on_the_update_that_they_stop_at(tmp_path):
    """One rank is above the threshold alone and the other below; what counts is the mean over both."""
    (together, *_), of_ranks = distances()
    assert min(of_ranks) < 0.999 * together < 1.001 * together < max(of_ranks)
    for name, threshold, made in (("above", 0.999 * together, 1), ("below", 1.001 * together, 2)):
        out = tmp_path / name
        ranks = runs.start_ranks(partial(far, threshold, out), 2, out)
        assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
        expected, moved = far(threshold)
        for rank in (0, 1):
            there_metrics, there = torch.load(f"{out}_{rank}.pt")
            assert there_metrics["optim/updates"] == expected["optim/updates"] == made
            assert_same(there, moved)


def test_coefficients_that_have_moved_take_the_place_of_their_options():
    reference, found = tiny_policy(precision="fp64", seed=1), []
    moved = {"kl_coef": 0.3, "entropy_coef": 0.2}
    for options, coefs in ((moved, None), ({"kl_coef": 0.1}, moved | {"entropy_level": 0.7})):
        made, sums = learner(tiny_policy(precision="fp64"), reference, **options), Sums()
        made.learn(experience(), 1, sums, coefs)
        found.append((sums.reduce(), list(made.policy.parameters())))
    (expected, theirs), (metrics, ours) = found
    assert metrics == expected and all(map(torch.equal, ours, theirs))
    assert (metrics["policy/kl_coef"], metrics["policy/entropy_coef"]) == (0.3, 0.2)


def test_only_the_tokens_of_the_highest_entropy_have_a_policy_gradient_and_the_denominator_stays():
    """What the others lack is their own part of the formula. Entropies and gradients are those of transformers."""
    policy, batch, reference = tiny_policy(precision="fp64"), experience(), tiny_policy(precision="fp64", seed=1)
    mask, tokens = batch.completion_mask, sum(LENGTHS)
    logprobs, entropy, twin = plain(policy, batch)
    least = entropy[mask].sort(descending=True).values[math.ceil(0.3 * tokens) - 1]
    options = {"kl_coef": 0.3, "max_tokens_per_microbatch": 9}
    (expected, whole, _), (metrics, moved, _) = (
        learn(copy.deepcopy(policy), batch, reference, entropy_share=share, **options) for share in (1.0, 0.3)
    )
    assert metrics["policy/entropy_share"] == math.ceil(0.3 * tokens) / tokens
    assert "policy/entropy_share" not in expected and metrics["policy/kl"] == expected["policy/kl"]
    left_out = -(batch.advantages[:, None] * logprobs).where(mask & (entropy < least), 0).sum() / tokens
    left_out.backward()
    lacking = {f"model.{name}": p.grad for name, p in twin.named_parameters()}
    assert_same({name: whole[name] - moved[name] for name in moved}, lacking)
