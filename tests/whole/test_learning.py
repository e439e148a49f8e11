"""It learns, and because of the advantages: with the true ones the reward rises, negated or shuffled it does not."""

import json

import pytest
import torch

import train
from grpo.advantages import ADVANTAGES
from grpo.losses import LOSSES
from tests.fakes import runs

TRUE = ADVANTAGES["grpo"]


def negated(rewards, valid=None):
    return -TRUE(rewards, valid)


def shuffled(rewards, valid=None):
    """The advantages of the step, handed out at random."""
    advantages = TRUE(rewards, valid)
    order = torch.randperm(advantages.numel(), generator=torch.Generator().manual_seed(int(1e6 * rewards.sum())))
    return advantages.flatten()[order].view_as(advantages)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(train, "report", runs.no_report)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Any prompt is answered right by a text whose last number is 3."""
    place = tmp_path_factory.mktemp("learning")
    return runs.save_digits(place / "model"), runs.write_problems(place / "data", num_train=60, answer="3"), place


def rewards_of(directory) -> list[float]:
    return [line["reward/mean"] for line in runs.metrics(directory)]


def learned(digits, name: str, **changes) -> tuple[float, float]:
    """Mean reward of the first three and of the last three steps."""
    options = {"precision": "fp32", "num_steps": 15, "prompts_per_step": 8, "group_size": 8, "kl_coef": 0}
    options |= {"rewards": "gsm8k.last_number", "reward_weights": 1, "checkpoint_every": 0}
    assert train.main(runs.flags(*digits, name, **options | changes)) == 0
    rewards = rewards_of(digits[2] / name)
    return sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3


def test_the_reward_rises_with_true_advantages_and_not_with_negated_or_shuffled_ones(digits, monkeypatch):
    before, after = learned(digits, "true")
    assert before < 0.4 and after > 0.8
    for other in (negated, shuffled):
        monkeypatch.setitem(ADVANTAGES, "grpo", other)
        before, after = learned(digits, other.__name__)
        assert after < before + 0.05 < 0.4


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "grpo"])
def test_every_loss_learns(digits, loss):
    before, after = learned(digits, loss, loss=loss)
    assert before < 0.4 and after > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": "rloo", "weighting": "sequence_mean"},
        {"advantage": "dr_grpo", "weighting": "constant_length", "learning_rate": 0.02},
        {"minibatch_size": 16, "num_epochs": 2, "learning_rate": 0.005},
        {"kl_coef": 0.02, "kl": "k2"},
    ],
    ids=["rloo", "dr_grpo", "off_policy", "kl"],
)
def test_variants_learn(digits, changes, request):
    before, after = learned(digits, request.node.callspec.id, **changes)
    assert before < 0.5 and after > before + 0.3


@pytest.mark.slow
def test_the_demo_learns_from_true_advantages_only(tmp_path, monkeypatch):
    """The demo at a smaller size: sampled reward in training, and greedy accuracy on held-out problems."""
    gains, cells = {}, {}
    for name, advantage in {"true": TRUE, "negated": negated, "shuffled": shuffled}.items():
        monkeypatch.setitem(ADVANTAGES, "grpo", advantage)
        options = {"num_steps": 20, "prompts_per_step": 8, "final_eval_limit": 200, "device": "cpu"}
        options |= {"out_dir": tmp_path, "run_name": name}
        assert train.main([word for option in options.items() for word in (f"--{option[0]}", str(option[1]))]) == 0
        rewards = rewards_of(tmp_path / name)
        gains[name] = (sum(rewards[-5:]) - sum(rewards[:5])) / 5
        cells[name] = json.loads((tmp_path / name / "eval" / "eval.json").read_text())["cells"]
    assert gains["true"] > 0.25
    assert gains["negated"] < 0 and gains["shuffled"] < 0.1
    base, tuned = cells["true"]
    assert tuned["ci95"][0] > base["ci95"][1] and tuned["lenient_ci95"][0] > base["lenient_ci95"][1]
    for name in ("negated", "shuffled"):
        assert cells[name][1]["ci95"][1] < tuned["ci95"][0]
