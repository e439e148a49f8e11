"""Trouble is named when it shows, once, and a healthy run is left in peace."""

from dataclasses import replace

import pytest

from grpo.config import Config
from grpo.doctor.watch import Watch

CONFIG = Config(precision="fp32", max_tokens_per_microbatch=4096)
HEALTHY = {
    "reward/mean": 0.5, "reward/invalid": 0.0, "reward/flat_groups": 0.5, "completion/length": 50.0,
    "completion/truncated": 0.1, "policy/entropy": 0.5, "policy/kl": 0.0, "policy/clip_fraction": 0.0,
    "policy/sampler_gap_mean": 1e-6, "optim/skipped": 0,
}  # fmt: skip


def run(*changes: dict, config: Config = CONFIG) -> list[tuple[int, str]]:
    """(step, sentence) of a run whose steps are healthy but for these changes."""
    watch = Watch(config)
    return [(step, text) for step, change in enumerate(changes, 1) for text in watch.see(step, HEALTHY | change)]


def test_a_healthy_run_is_left_in_peace():
    steps = [{"reward/mean": 0.01 * i, "policy/kl": 0.001 * i, "completion/length": 50 + i} for i in range(40)]
    steps[9] |= {"eval/accuracy": 0.3, "eval/n": 200}
    steps[19] |= {"eval/accuracy": 0.25, "eval/n": 200}  # within chance: 200 problems tell 7 points apart
    assert run(*steps) == []


@pytest.mark.parametrize(
    ("changes", "step", "said"),
    [
        ([{"reward/flat_groups": 1.0}] * 12, 5, "almost all groups were flat for 5 steps, at a mean reward of 0.5"),
        ([{"reward/flat_groups": None}] * 4 + [{"reward/flat_groups": 1.0}] * 4, 5, "almost all groups were flat"),
        ([{"reward/invalid": 0.03}] * 3, 1, "3% of the rewards failed"),
        ([{}] * 8 + [{"completion/length": 120.0}] * 12, 12, "completions grew from 50 to 106 tokens"),
        ([{}] * 8 + [{"completion/length": 5.0}] * 12, 13, "completions shrank from 50 to 5 tokens"),
        ([{"completion/truncated": 0.8}] * 9, 5, "80% of the completions are cut at max_new_tokens (96)"),
        ([{"policy/kl": 0.01}] * 2, 1, "policy/kl is 0.01 in step 1, where it must be 0"),
        ([{}] + [{"policy/kl": 0.01}] * 9 + [{"policy/kl": 0.5}] * 5, 11, "the KL to the reference runs away (0.17"),
        ([{}] + [{"policy/kl": 4.0}] * 3, 2, "the KL to the reference runs away (2 nats"),
        ([{}] * 9 + [{"policy/entropy": 0.01}] * 5, 12, "the entropy fell from 0.5 to 0.01"),
        ([{}] * 9 + [{"policy/entropy": 2.0}] * 5, 12, "the entropy rose from 0.5 to 2"),
        ([{"policy/sampler_gap_mean": 0.01}] * 2, 1, "sampler and learner differ by 0.01 nats"),
        ([{"policy/clip_fraction": 0.4}] * 5, 3, "40% of the tokens are clipped"),
        ([{}, {"optim/skipped": 1}, {"optim/skipped": 1}], 2, "gradient was not finite"),
    ],
)
def test_trouble_is_named_once_when_it_shows(changes, step, said):
    named = run(*changes)
    assert len(named) == 1, named
    assert named[0][0] == step and named[0][1].startswith("trouble: ") and said in named[0][1]


def test_reward_up_and_accuracy_down():
    def evaluated(after: float, reward: float):
        later = {"reward/mean": reward}
        first, last = {"eval/accuracy": 0.4, "eval/n": 400}, {"eval/accuracy": after, "eval/n": 400}
        return run(*[{}] * 5, first, *[later] * 6, later | last)

    (named,) = evaluated(0.34, 0.9)
    assert named[0] == 13
    assert "the reward rose from 0.5 to 0.9 while accuracy on validation fell from 0.400 to 0.340" in named[1]
    assert evaluated(0.36, 0.9) == []  # within chance
    assert evaluated(0.34, 0.4) == []  # both fell: no game


def test_two_troubles_are_both_named():
    assert len(run(*[{"reward/flat_groups": 1.0, "completion/truncated": 1.0}] * 9)) == 2


def test_what_rounding_explains_depends_on_the_precision():
    change = {"policy/sampler_gap_mean": 0.01}
    assert run(change, config=replace(CONFIG, precision="bf16")) == []
    assert len(run(change, config=replace(CONFIG, precision="fp16"))) == 0
    assert len(run(change)) == 1
    assert run(change, config=replace(CONFIG, lag=1)) == []


def test_the_first_kl_is_no_sign_after_a_resume_or_with_several_updates():
    watch = Watch(CONFIG)
    assert watch.see(7, HEALTHY | {"policy/kl": 0.01}) == []
    assert run({"policy/kl": 0.01}, config=replace(CONFIG, num_epochs=2)) == []


def test_metrics_without_a_value_are_no_trouble():
    assert run(*[dict.fromkeys(HEALTHY), dict.fromkeys(HEALTHY, float("nan"))] * 8) == []


def test_what_a_reward_fails_of_is_said_once():
    watch = Watch(CONFIG)
    errors = {"mine.format": "ValueError: no number (rewards/mine.py, line 3)"}
    assert watch.see(1, HEALTHY) == []
    (said,) = watch.see(2, HEALTHY, [{}, errors, {"mine.format": "of another rank"}])
    assert said == f"trouble: reward mine.format failed for the first time: {errors['mine.format']}"
    assert watch.see(3, HEALTHY, [errors]) == []
