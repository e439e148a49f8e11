"""The optimiser: which weights decay, and the learning rate of each step."""

import pytest

from grpo.config import Config
from grpo.optimizer import learning_rate, make_optimizer
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


def test_matrices_decay_and_vectors_do_not():
    policy = tiny_policy()
    options = Config(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, learning_rate=3e-4)
    optimizer = make_optimizer(policy, options)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {p.ndim for p in optimizer.param_groups[0]["params"]} == {2}
    assert {p.ndim for p in optimizer.param_groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(policy.parameters()))
    assert all(group["betas"] == (0.8, 0.95) and group["lr"] == 3e-4 for group in optimizer.param_groups)
