"""The optimiser: which weights decay, and the learning rate and the coefficients of each step."""

import pytest
import torch

from grpo.config import Config
from grpo.optimizer import learning_rate, make_optimizer, next_coefs
from grpo.run import checkpoint
from tests.fakes.models import tiny_policy


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_learning_rate_by_hand(schedule, expected):
    made = Config(schedule=schedule, warmup_steps=4, num_steps=8, learning_rate=3.0)
    assert [learning_rate(made, step) / 3 for step in range(1, 9)] == pytest.approx(expected, rel=1e-12)


STEPS = [(0.5, 0.3), (0.01, 0.1), (None, None), (0.2, 0.1), (0.2, 0.25)]
"""(KL, entropy) of each step, in nats; None: nothing was learned in it."""


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({}, [{}] * 5),
        ({"kl_target": 0.1}, [{"kl_coef": c} for c in (0.5 * 1.02, 0.5 * 1.02 * 0.98)]),
        (
            {"entropy_target": 0.2},
            [{"entropy_level": 0.0, "entropy_coef": 0.0}, *[{"entropy_level": 0.01, "entropy_coef": 0.01}] * 2]
            + [{"entropy_level": 0.02, "entropy_coef": 0.02}, {"entropy_level": 0.01, "entropy_coef": 0.0}],
        ),
    ],
)
def test_coefficients_follow_their_targets_and_rest_where_nothing_was_learned(targets, expected):
    config, coefs = Config(kl_coef=0.5, kl_horizon=1280, entropy_step=0.01, **targets), {}  # of 128 sequences in a step
    for (kl, entropy), after in zip(STEPS, expected, strict=False):
        metrics = {} if kl is None else {"policy/kl": kl, "policy/entropy": entropy}
        coefs = next_coefs(config, coefs, metrics)
        assert coefs == pytest.approx(after, rel=1e-12)
    assert next_coefs(config, coefs, {"policy/kl": float("nan"), "policy/entropy": float("nan")}) == coefs


def test_matrices_decay_and_vectors_do_not():
    policy = tiny_policy()
    options = Config(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, learning_rate=3e-4)
    optimizer = make_optimizer(policy, options)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {p.ndim for p in optimizer.param_groups[0]["params"]} == {2}
    assert {p.ndim for p in optimizer.param_groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(policy.parameters()))
    assert all(group["betas"] == (0.8, 0.95) and group["lr"] == 3e-4 for group in optimizer.param_groups)


def advance(policy, optimizer, steps: int, start: int = 0) -> None:
    """Steps with random gradients, the same for the same numbers."""
    for step in range(start, start + steps):
        random = torch.Generator().manual_seed(step)
        for p in policy.parameters():
            p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def same(one, other) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_sgd_without_momentum_moves_by_the_rate_times_the_gradient():
    policy = tiny_policy(precision="fp64")
    optimizer = make_optimizer(policy, Config(optimizer="sgd", learning_rate=0.3))
    before = [p.detach().clone() for p in policy.parameters()]
    gradients = [torch.full_like(p, 0.5) for p in before]
    for p, gradient in zip(policy.parameters(), gradients, strict=True):
        p.grad = gradient
    optimizer.step()
    for p, old, gradient in zip(policy.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.3 * gradient, rtol=0, atol=1e-15)


OPTIMIZERS = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "weight_decay": 0.1},
    "sgd with momentum": {"optimizer": "sgd", "sgd_momentum": 0.9},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
}
each = pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)


@each
def test_moments_are_made_at_once_and_are_those_of_torch(options):
    policies = tiny_policy(), tiny_policy()
    ours, torchs = (make_optimizer(policy, Config(**options)) for policy in policies)
    held = {id(moment) for state in ours.state.values() for moment in state.values()}
    torchs.state.clear()  # as it comes: filled in the first step
    for policy, optimizer in zip(policies, (ours, torchs), strict=True):
        advance(policy, optimizer, 3)
    assert same(*policies)
    assert {id(moment) for state in ours.state.values() for moment in state.values()} == held
    assert bool(held) == (options != OPTIMIZERS["sgd"])


@each
def test_c30_saved_and_loaded_it_goes_on_to_the_bit(options, tmp_path):
    policy, other = tiny_policy(), tiny_policy(seed=1)
    optimizer, loaded = (make_optimizer(one, Config(**options)) for one in (policy, other))
    advance(policy, optimizer, 2)
    path = checkpoint.save(tmp_path, 2, policy, optimizer, {})
    checkpoint.load(path, other, loaded)
    for one, its in ((policy, optimizer), (other, loaded)):
        advance(one, its, 2, start=2)
    assert same(policy, other)
    fresh = tiny_policy()
    advance(fresh, make_optimizer(fresh, Config(**options)), 4)
    assert same(policy, fresh)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_is_for_the_matrices_of_the_layers_and_adamw_for_the_rest(tied):
    policy, twin = (tiny_policy(tie_word_embeddings=tied) for _ in range(2))
    optimizer = make_optimizer(policy, Config(optimizer="muon", learning_rate=1e-2, adam_beta2=0.9))
    named = {id(p): name for name, p in policy.named_parameters()}
    muon, *adamw = [{named[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert muon == {name for name in named.values() if "_proj.weight" in name}
    assert adamw[0] == {"model.model.embed_tokens.weight"} | ({"model.lm_head.weight"} if not tied else set())
    assert muon | adamw[0] | adamw[1] == set(named.values())

    inner = [p for name, p in twin.named_parameters() if name in muon]
    others = [p for name, p in twin.named_parameters() if name not in muon]
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Muon(inner, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.9), weight_decay=0.0, fused=True).step()
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert same(policy, twin)
