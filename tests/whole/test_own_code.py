"""A run whose data and rewards lie outside of the repository: metrics, transcripts, evaluation, and after a move."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train
from tests.fakes import runs

TASK = '''
from data.problem import Problem

def load(split, *, path, num_shots, seed):
    """Sums, as digits."""
    first = {"train": 0, "validation": 3, "test": 4}[split]
    return [Problem(f"{first}+{b}=", str((first + b) % 4), {"stop": ["##"]}) for b in range(1, 5)]
'''
REWARDS = '''
def contains(completions, answer, **columns):
    """In the form of TRL."""
    return [float(gold in text) for text, gold in zip(completions, answer)]

def logs(completion, problem, *, log_metric):
    """Reports two numbers, one of them of some samples only."""
    log_metric("length", len(completion))
    if completion[:1] in "01":
        log_metric("third", len(completion) / 3)
    return 0.0

def even(completions, question=None, **columns):
    """Has nothing to say of a text that is empty or begins with 0 or 1."""
    return [None if text[:1] in "01" else float(len(text) % 2 == 0) for text in completions]
'''


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    runs.save_digits(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "task.py").write_text(TASK)
    (tmp_path / "mine" / "own.py").write_text(REWARDS)
    return tmp_path


def flags(place: Path, mine: str, **changes) -> list[str]:
    own = f"{place}/{mine}/own.py"
    options = {"data": f"{place}/{mine}/task.py", "rewards": f"{own}:contains,{own}:even", "data_path": "none"}
    options |= {"eval_correct": f"{own}:contains", "eval_format": f"{own}:contains", "final_eval": True, "num_steps": 2}
    return runs.flags(str(place / "model"), "", place / "runs", "own", **options | changes)


def test_a_run_with_code_of_ones_own_is_named_by_file_and_function_and_goes_on_after_a_move(place, capsys):
    assert train.main(flags(place, "mine")) == 0
    directory = place / "runs" / "own"
    lines = runs.metrics(directory)
    assert {"reward/own.contains", "reward/own.even"} <= lines[0].keys() and lines[0]["reward/invalid"] == 0
    rows = [row for part in runs.transcripts(directory).values() for row in part]
    assert {tuple(row["rewards"]) for row in rows} == {("own.contains", "own.even")}
    assert {row["rewards"]["own.even"] is None for row in rows} == {True, False}
    assert all((row["rewards"]["own.even"] is None) == (row["completion"][:1] in "01") for row in rows)
    alone = [row for row in rows if row["rewards"]["own.even"] is None]
    assert all(row["reward"] == 2 * row["rewards"]["own.contains"] for row in alone)
    assert "(grader own.contains, " in capsys.readouterr().out
    (cell, *_) = json.loads((directory / "eval" / "eval.json").read_text())["cells"]
    assert cell["grader"].endswith("own.py:contains") and "failures" not in cell

    shutil.move(place / "mine", place / "moved")
    assert train.main([*flags(place, "mine"), "--resume", "auto", "--num_steps", "3"]) == 2
    assert f"there is no Python file {place}/mine/" in capsys.readouterr().err
    assert train.main([*flags(place, "moved"), "--resume", "auto", "--num_steps", "3"]) == 0
    assert "has changed" not in capsys.readouterr().err and len(runs.metrics(directory)) == 3


def test_numbers_that_a_reward_reports_are_metrics_and_the_same_over_processes_and_after_a_resume(place):
    own = {"rewards": f"{place}/mine/own.py:contains,{place}/mine/own.py:logs", "final_eval": False}
    for name, steps in (("whole", 2), ("halves", 1), ("halves", 2)):
        changes = own | {"run_name": name, "num_steps": steps, "checkpoint_every": 1, "resume": "auto"}
        assert train.main(flags(place, "mine", **changes)) == 0
    ranks = runs.start_train_ranks(flags(place, "mine", **own, run_name="two"), 2, place / "two")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    whole, halves, two = (runs.metrics(place / "runs" / name) for name in ("whole", "halves", "two"))
    assert runs.timeless(whole) == runs.timeless(halves)
    for line, other, rows in zip(whole, two, runs.transcripts(place / "runs" / "whole").values(), strict=True):
        lengths = [len(row["completion"]) for row in rows]
        some = [len(row["completion"]) / 3 for row in rows if row["completion"][:1] in "01"]
        assert 0 < len(some) < len(lengths)
        assert line["reward_metrics/length"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-12)
        assert line["reward_metrics/third"] == pytest.approx(sum(some) / len(some), rel=1e-12)
        assert other["reward_metrics/length"] == line["reward_metrics/length"]
        assert other["reward_metrics/third"] == pytest.approx(line["reward_metrics/third"], rel=1e-12)


def test_a_run_stops_where_every_call_of_a_step_fails_and_goes_on_when_that_is_mended(place, capsys):
    own = place / "mine" / "own.py"
    own.write_text(f"{REWARDS}\ndef broken(completion, problem):\n    return problem.nothing\n")
    argv = flags(place, "mine", rewards=f"{own}:broken", reward_weights="1", final_eval=False)
    assert train.main(argv) == 1
    assert "no completion of step 1 got a reward" in capsys.readouterr().err
    own.write_text(own.read_text().replace("problem.nothing", "1.0"))
    assert train.main([*argv, "--resume", "auto"]) == 0
    assert [line["reward/invalid"] for line in runs.metrics(place / "runs" / "own")] == [1.0, 0.0]


def test_an_evaluation_knows_them_too(place):
    options = {"model": place / "model", "data": f"{place}/mine/task.py", "out": place / "eval", "budget": 4}
    options |= {"graders": f"{place}/mine/own.py:contains", "format": "marker", "device": "cpu"}
    assert evaluation.main([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    (cell, *_) = json.loads((place / "eval" / "eval.json").read_text())["cells"]
    assert cell["n"] == 4 and "failures" not in cell
