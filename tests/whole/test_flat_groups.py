"""Runs that leave flat groups out or draw other prompts instead: the same on any number of ranks and after a resume."""

from pathlib import Path

import pytest
import torch

import train
from tests.fakes import runs
from tests.fakes.runs import metrics, transcripts, weights

REFILL = {"flat_groups": "refill", "max_refills": 3, "rewards": "gsm8k.last_number", "reward_weights": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the runs go; `model`, `data` and `unsolvable` are there."""
    place = runs.new_place(tmp_path_factory)
    runs.write_problems(place / "unsolvable", answer="9")
    return place


def argv(place: Path, name: str, data: str = "data", **changes) -> list[str]:
    return runs.flags(str(place / "model"), str(place / data), place, name, **REFILL | changes)


@pytest.fixture(scope="module")
def refilled(place) -> Path:
    assert train.main(argv(place, "refilled")) == 0
    return place / "refilled"


def test_a_refill_ends_when_the_step_has_enough_groups_and_all_is_written_and_measured(refilled):
    lines = metrics(refilled)
    assert {line["rollout/refills"] for line in lines} - {0}, "nothing was refilled: the run shows nothing"
    for line, rows in zip(lines, transcripts(refilled).values(), strict=True):
        draws, groups = 1 + line["rollout/refills"], {}
        for row in rows:
            groups.setdefault(row["prompt_index"], []).append(row["reward"])
        assert list(groups) == list(range(3 * draws))
        learnable = [number for number, rewards in groups.items() if len(set(rewards)) > 1]
        kept = learnable[:3]
        assert draws == 4 or len(learnable) >= 3
        assert sum(number < 3 * (draws - 1) for number in learnable) < 3, "one refill too many"
        assert line["rollout/dropped_groups"] == len(groups) - len(kept)
        assert line["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
        assert line["tokens/sampled"] == sum(len(row["tokens"]) for row in rows)
        assert len({(row["question"], row["prompt_index"]) for row in rows}) == len({row["question"] for row in rows})


def test_two_processes_draw_and_learn_the_same(refilled, place):
    ranks = runs.start_train_ranks(argv(place, "two"), 2, place / "two")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    names = ("question", "prompt_index", "sample", "completion", "reward", "advantage", "finished")
    for ours, theirs in zip(transcripts(refilled).values(), transcripts(place / "two").values(), strict=True):
        assert [[row[name] for name in names] for row in ours] == [[row[name] for name in names] for row in theirs]
    for ours, theirs in zip(runs.timeless(metrics(refilled)), runs.timeless(metrics(place / "two")), strict=True):
        assert {name for name in ours if ours[name] is None} == {name for name in theirs if theirs[name] is None}
        numbers = [{name: value for name, value in line.items() if value is not None} for line in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-12)
    ours, theirs = weights(refilled / "final"), weights(place / "two" / "final")
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7) for name in ours)


def test_c30_resumed_is_the_same_to_the_bit(refilled, place):
    assert train.main(argv(place, "halves", num_steps=2)) == 0
    assert train.main(argv(place, "halves", resume="auto")) == 0
    runs.assert_same_run(refilled, place / "halves")


@pytest.mark.parametrize("flat_groups", ["drop", "refill"])
def test_a_step_without_a_learnable_group_makes_no_update(place, flat_groups):
    options = {"flat_groups": flat_groups, "max_refills": 2, "num_steps": 2, "minibatch_size": 4}
    assert train.main(argv(place, flat_groups, "unsolvable", **options)) == 0
    draws = 3 if flat_groups == "refill" else 1
    for line in metrics(place / flat_groups):
        assert (line["rollout/refills"], line["rollout/dropped_groups"]) == (draws - 1, 3 * draws)
        assert line["reward/flat_groups"] == 1 and line["reward/mean"] == 0
        assert line["optim/grad_norm"] is None and line["tokens/computed"] == 0
    assert [len(rows) for rows in transcripts(place / flat_groups).values()] == [12 * draws] * 2
    base, final = weights(place / "model"), weights(place / flat_groups / "final")
    assert all(torch.equal(base[name], final[name]) for name in base)


def test_c31_the_first_draw_is_that_of_a_run_without_refills(refilled, place):
    assert train.main(argv(place, "kept", flat_groups="keep", num_steps=1)) == 0
    ours, theirs = (transcripts(run)["step_000001.jsonl"] for run in (refilled, place / "kept"))
    assert len(theirs) == 12 and ours[:12] == theirs
    assert metrics(place / "kept")[0]["rollout/dropped_groups"] is None
