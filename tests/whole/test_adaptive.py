"""Runs whose coefficients follow a target, and whose problems are drawn by pass rate: their state is in checkpoints."""

import json
from pathlib import Path

import pytest

import data
import train
from grpo.config import Config
from grpo.optimizer import next_coefs
from grpo.prompts.curriculum import draw_by_pass_rate
from tests.fakes import runs
from tests.fakes.runs import metrics, transcripts

ADAPTIVE = {"kl_target": 0.001, "kl_horizon": 12, "entropy_target": 1.5, "entropy_step": 0.01, "entropy_share": 0.4}
CURRICULUM = {"curriculum": "pass_rate", "pool_weights": "0.1,1,0.5", "eval_correct": "gsm8k.last_number"}
REFILL = {"flat_groups": "refill", "max_refills": 2, "rewards": "gsm8k.last_number", "reward_weights": "1"}
OPTIONS = ADAPTIVE | CURRICULUM | REFILL | {"num_steps": 6, "prompts_per_step": 5, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", runs.no_report)
        yield runs.new_place(tmp_path_factory)


def argv(place: Path, name: str, **changes) -> list[str]:
    return runs.flags(str(place / "model"), str(place / "data"), place, name, **OPTIONS | changes)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    assert train.main(argv(place, "whole", keep_checkpoints=9)) == 0
    return place / "whole"


def state(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())["state"]


def test_the_coefficients_are_those_that_the_logged_kl_and_entropy_ask_for(whole):
    config = Config(kl_coef=0.05, prompts_per_step=5, group_size=4, **ADAPTIVE)
    coefs, seen = {}, []
    for line in metrics(whole):
        seen.append((line["policy/kl_coef"], line["policy/entropy_coef"]))
        assert seen[-1] == (coefs.get("kl_coef", 0.05), coefs.get("entropy_coef", 0.0))
        coefs = next_coefs(config, coefs, {name: line[name] for name in ("policy/kl", "policy/entropy")})
        assert state(whole, line["step"])["coefs"] == coefs
        assert 0.4 <= line["policy/entropy_share"] < 0.5
    assert len(set(seen)) > 3 and max(entropy for _, entropy in seen) > 0


def test_what_is_drawn_follows_from_the_pass_rates_of_the_steps_before(whole, place):
    """Pass rates are counted again from the transcripts, refills included."""
    problems = data.load("jsonl", "train", path=place / "data")
    P = len(problems)
    rates: dict[int, float] = {}
    for step, rows in enumerate(transcripts(whole).values(), start=1):
        groups: dict[int, list] = {}
        for row in rows:
            groups.setdefault(row["prompt_index"], []).append(row)
        draws = [draw_by_pass_rate(rates, P, (0.1, 1, 0.5), 5, 0, step, k) for k in range(len(groups) // 5)]
        drawn = [problem for draw in draws for problem in draw]
        assert [group[0]["prompt"] for group in groups.values()] == [problems[i].prompt for i in drawn]
        after = [sum(row["reward"] == 1 for row in group) / 4 for group in groups.values()]
        rates |= dict(zip(drawn, after, strict=True))
        assert state(whole, step)["pass_rates"] == {str(problem): rate for problem, rate in rates.items()}
        hard, easy = (metrics(whole)[step - 1][f"rollout/{pool}_problems"] for pool in ("hard", "easy"))
        assert hard == sum(rate <= 0.25 for rate in rates.values()) / P
        assert easy == sum(rate > 0.75 for rate in rates.values()) / P
    assert max(line["rollout/refills"] for line in metrics(whole)) > 0 and len(set(rates.values())) > 1


def test_c30_resumed_is_the_same_to_the_bit(whole, place):
    assert train.main(argv(place, "halves", num_steps=3)) == 0
    assert train.main(argv(place, "halves", resume="auto")) == 0
    runs.assert_same_run(whole, place / "halves")


def test_two_processes_draw_and_learn_the_same(whole, place):
    ranks = runs.start_train_ranks(argv(place, "two"), 2, place / "two")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    names = ("question", "prompt_index", "sample", "completion", "reward", "advantage")
    for ours, theirs in zip(transcripts(whole).values(), transcripts(place / "two").values(), strict=True):
        assert [[row[name] for name in names] for row in ours] == [[row[name] for name in names] for row in theirs]
    for ours, theirs in zip(runs.timeless(metrics(whole)), runs.timeless(metrics(place / "two")), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == (
                theirs[name] if ours[name] is None else pytest.approx(theirs[name], rel=1e-6, abs=1e-12)
            )
    assert state(whole, 6)["pass_rates"] == state(place / "two", 6)["pass_rates"]
    assert state(whole, 6)["coefs"] == pytest.approx(state(place / "two", 6)["coefs"], rel=1e-9)


def test_a_resumed_run_may_not_change_what_is_right(whole, place, capsys):
    assert train.main(argv(place, "whole", resume="auto", eval_threshold=0.5)) == 2
    assert "eval_threshold is 0.5, but the run to resume has None" in capsys.readouterr().err
