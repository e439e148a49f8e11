"""Twenty steps of a tiny model against committed numbers: a change that moves any of them has to be meant.

To record them again, after a change that is meant to move them, with the reason in the message of the commit:

    python -m tests.test_golden_run

float64, weights from a fixed table and counted randomness: another processor, thread count or version of torch differs
in the last digits only, far below the tolerance.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

import train
from tests.fakes import runs

GOLDEN = Path(__file__).parent / "golden" / "run.json"
NAMES = ("optim/loss", "optim/grad_norm", "reward/mean", "policy/entropy", "policy/kl", "policy/clip_fraction")
TOLERANCE = 1e-6
OPTIONS = {
    "num_steps": 20,
    "prompts_per_step": 4,
    "max_new_tokens": 10,
    "minibatch_size": 8,
    "num_epochs": 2,
    "max_tokens_per_microbatch": 60,
    "schedule": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "weighting": "sequence_mean",
    "combine": "advantages",
    "clip_high": 0.28,
    "learning_rate": 0.003,
    "checkpoint_every": 0,
}


def recorded(place: Path) -> list[dict]:
    """The named metrics of each step of the run."""
    model, data = runs.save_digits(place / "model"), runs.write_problems(place / "data")
    assert train.main(runs.flags(model, data, place, "golden", **OPTIONS)) == 0
    return [{name: line[name] for name in ("step", *NAMES)} for line in runs.metrics(place / "golden")]


def test_twenty_steps_are_as_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "report", runs.no_report)
    golden = json.loads(GOLDEN.read_text())
    ours = recorded(tmp_path)
    assert len(golden) == len(ours) == 20
    for line, expected in zip(ours, golden, strict=True):
        for name in expected:
            assert line[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-12), (line["step"], name)


def test_the_recorded_run_exercises_what_it_should():
    """Numbers that are zero or constant would hide a change."""
    golden = json.loads(GOLDEN.read_text())
    for name in NAMES:
        assert len({line[name] for line in golden}) > 5, name
    assert sum(line["policy/clip_fraction"] > 0 for line in golden) > 5
    assert all(abs(line["optim/loss"]) > 1e-6 and line["optim/grad_norm"] > 1e-3 for line in golden)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        lines = recorded(Path(place))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
    print(f"recorded {GOLDEN}", file=sys.stderr)
