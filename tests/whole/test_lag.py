"""`lag: 1`: a step's completions are of the weights of one step before, exactly, however the run is cut."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import train
from grpo.config import parse_args
from grpo.dataloader import ProblemSets
from grpo.metrics import Sums
from grpo.policy import load_policy
from grpo.record import measure
from grpo.rollout import Collector
from grpo.run.machine import settings, settle
from grpo.sampler import Sampler
from grpo.update import Learner
from rewards.runner import RewardRunner
from tests.fakes import runs
from tests.fakes.runs import metrics, transcripts, weights

LAG = {"lag": 1, "kl_coef": 0, "num_steps": 5, "learning_rate": 0.05, "checkpoint_every": 1, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return runs.new_place(tmp_path_factory)


def argv(place: Path, name: str, **changes) -> list[str]:
    return runs.flags(str(place / "model"), str(place / "data"), place, name, **LAG | changes)


def begin(place: Path, name: str, **changes) -> Path:
    assert train.main(argv(place, name, **changes)) == 0
    return place / name


@pytest.fixture(scope="module")
def whole(place) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", runs.no_report)
        return begin(place, "whole")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(train, "report", runs.no_report)


def serial(words: list[str], lag: int) -> tuple[list[dict], list[dict[str, torch.Tensor]]]:
    """The same steps by a program that keeps the weights after every step: metrics, and these weights."""
    device = torch.device("cpu")
    config = settle(parse_args(words), device)
    sets, kept, lines = ProblemSets(config), [], []
    with ExitStack() as stack:
        stack.enter_context(settings(device))
        policy, tokenizer = load_policy(config.model, precision=config.precision)
        older, _ = load_policy(config.model, precision=config.precision)
        learner, sampler = Learner(config, policy, None), Sampler(policy, tokenizer, kernels=False, own=True)
        rewards = stack.enter_context(RewardRunner(config.rewards, config.reward_timeout, 1))
        collector = Collector(config, sets.problems("train", 0), sampler, rewards)
        kept.append({name: value.clone() for name, value in policy.state_dict().items()})
        for step in range(1, config.num_steps + 1):
            sums = Sums()
            older.load_state_dict(kept[max(0, step - 1 - lag)])
            sampler.refresh(older)
            rollout = collector.collect(step)
            learner.learn(collector.choose(rollout, sums).batch, step, sums)
            measure(rollout, config.rewards, sums)
            lines.append(sums.reduce())
            kept.append({name: value.clone() for name, value in policy.state_dict().items()})
    return lines, kept


TWINS = (
    {"precision": "fp64"},
    {"precision": "bf16", "ratio_to": "sampler"},
    {"precision": "fp32", "sampler_correction": "truncate"},
)


@pytest.mark.parametrize("changes", TWINS, ids=[changes["precision"] for changes in TWINS])
def test_it_equals_a_serial_program_to_the_bit(place, changes):
    run = begin(place, f"twin_{changes['precision']}", **changes)
    ours, (theirs, kept) = metrics(run), serial(argv(place, "twin", **changes), lag=1)
    assert len(ours) == len(theirs) == 5
    for line, expected in zip(ours, theirs, strict=True):
        assert {name: line[name] for name in expected if line[name] is not None} == {
            name: value for name, value in expected.items() if line[name] is not None
        }
    for step in range(1, 6):
        saved = weights(run / "checkpoints" / f"step_{step:06d}")
        assert all(torch.equal(value, kept[step][name]) for name, value in saved.items()) and len(saved) > 10


def test_the_first_two_steps_are_sampled_with_the_base_model_and_the_gap_is_that_of_one_step(whole, place):
    fresh = begin(place, "fresh", lag=0)
    ours, theirs = transcripts(whole), transcripts(fresh)
    first, second, third = sorted(ours)[:3]
    assert ours[first] == theirs[first] and ours[second] != theirs[second] and third in theirs
    gaps = [line["policy/sampler_gap_mean"] for line in metrics(whole)]
    assert gaps[0] < 1e-12 and min(gaps[1:]) > 1e-3
    assert max(line["policy/sampler_gap_mean"] for line in metrics(fresh)) < 1e-12
    assert not list(fresh.rglob("sampler.safetensors"))
    for step in (1, 2, 5):  # a checkpoint holds both: the weights of the step, and those that the next one samples with
        before = weights(whole / "checkpoints" / f"step_{step - 1:06d}") if step > 1 else None
        older = runs.load_file(whole / "checkpoints" / f"step_{step:06d}" / "sampler.safetensors")
        assert before is None or all(torch.equal(value, before[name]) for name, value in older.items())


@pytest.mark.parametrize(("precision", "stop"), [("fp32", 1), ("bf16", 2)])
def test_c30_resumed_it_is_the_same_to_the_bit(place, precision, stop):
    options = {"precision": precision, "num_steps": 4, "eval_every": 2, "eval_limit": 2, "checkpoint_every": 0}
    uncut = begin(place, f"uncut_{precision}", **options)
    begin(place, f"cut_{precision}", **options | {"num_steps": stop})
    runs.assert_same_run(uncut, begin(place, f"cut_{precision}", **options, resume="auto"))


def test_validation_is_of_the_present_weights_and_the_next_step_of_older_ones_all_the_same(place, whole, monkeypatch):
    seen, original = [], train.validate

    def look(config, sets, sampler, state):
        seen.append({name: value.clone() for name, value in sampler.policy.state_dict().items()})
        return original(config, sets, sampler, state)

    monkeypatch.setattr(train, "validate", look)
    assert transcripts(begin(place, "validated", eval_every=2, eval_limit=2)) == transcripts(whole)
    for step, found in zip((2, 4), seen, strict=True):
        saved = weights(whole / "checkpoints" / f"step_{step:06d}")
        assert all(torch.equal(value, found[name]) for name, value in saved.items())


def test_two_processes_sample_and_learn_the_same_and_resume(whole, place):
    for steps, resume in ((2, "never"), (5, "auto")):
        ranks = runs.start_train_ranks(argv(place, "two", num_steps=steps, resume=resume), 2, place / f"two_{steps}")
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert [[row["completion"] for row in rows] for rows in transcripts(place / "two").values()] == [
        [row["completion"] for row in rows] for rows in transcripts(whole).values()
    ]
    for ours, theirs in zip(metrics(whole), metrics(place / "two"), strict=True):
        for name in ("optim/loss", "optim/grad_norm", "policy/sampler_gap_mean", "reward/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-12)
