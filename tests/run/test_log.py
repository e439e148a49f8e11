"""What a run says of each step: lines that survive a crash, the console."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from grpo import distributed
from grpo.config import Config
from grpo.metrics import metric_names
from grpo.run.log import Display, Log, step_line

CONFIG = Config(num_steps=30)


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def written(directory: Path, *steps: dict, done: int = 0, config: Config = CONFIG) -> list[dict]:
    """The lines of a run, after these steps have been added to the `done` ones; each is there when its call returns."""
    with Log(directory, config, done) as log:
        for step, metrics in enumerate(steps, done + 1):
            log.write(step, metrics)
            assert lines(directory)[-1]["step"] == step
    return lines(directory)


def test_every_line_has_every_name_in_order(tmp_path):
    second = {"eval/accuracy": 0.25, "optim/lr": 1e-6, "reward/gsm8k.format": 0.5}
    first, second = written(tmp_path, {"reward/mean": 0.5}, second)
    names = metric_names(CONFIG.rewards)
    assert list(first) == names and list(second) == [*names, "eval/accuracy"]
    assert {name: value for name, value in first.items() if value is not None} == {"step": 1, "reward/mean": 0.5}
    assert (second["step"], second["eval/accuracy"], second["optim/lr"]) == (2, 0.25, 1e-6)


def test_what_is_not_finite_is_null_counts_are_integers_and_floats_are_exact(tmp_path):
    given = {"policy/kl": math.nan, "optim/grad_norm": math.inf, "optim/loss": -math.inf, "reward/mean": 0.1 + 0.2}
    (line,) = written(tmp_path, given | {"tokens/sampled": 1280.0, "memory/peak_bytes": 2.0**40})
    assert line["policy/kl"] is line["optim/grad_norm"] is line["optim/loss"] is None
    assert line["reward/mean"] == 0.1 + 0.2 and line["memory/peak_bytes"] == 2**40
    assert '"tokens/sampled": 1280,' in (tmp_path / "metrics.jsonl").read_text()


def test_a_name_without_a_meaning_is_a_mistake(tmp_path):
    with pytest.raises(AssertionError, match="reward/maen"):
        written(tmp_path, {"reward/maen": 1.0})


@pytest.mark.parametrize("done", [0, 2, 4])
@pytest.mark.parametrize("torn", ["", '{"step": 5, "reward/me', '{"step": 5}', "\x00\x00"])
def test_c30_resuming_cuts_what_came_after_the_checkpoint(tmp_path, done, torn):
    steps = [{"reward/mean": step / 3} for step in range(1, 5)]
    whole = written(tmp_path, *steps)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert written(tmp_path, done=done) == whole[:done]
    assert written(tmp_path, *steps[done:], done=done) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_of_the_last_kept_step_is_written_again(tmp_path):
    written(tmp_path, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}')  # whole JSON, but the newline is missing
    assert [line["step"] for line in written(tmp_path, done=2)] == [1]


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path):
    with Log(tmp_path, CONFIG, 0) as log:
        log._file = open("/dev/full", "a")  # noqa: SIM115
        with pytest.raises(OSError, match=r"^cannot write /dev/full \(No space left on device\)$"):
            log.write(1, {})


def test_c10_a_steps_line_shows_the_reward_and_each_term(tmp_path):
    metrics = {"reward/mean": 0.75, "reward/gsm8k.format": 0.25, "reward/gsm8k.correctness": 0.5, "time/step": 1.25}
    metrics |= {"completion/length": 61.25, "policy/entropy": 0.5, "policy/kl": math.nan, "optim/grad_norm": 0.125}
    line, skipped = written(
        tmp_path, metrics | {"eval/accuracy": 0.4, "optim/skipped": 0}, {"optim/skipped": 1}, done=6
    )
    assert step_line(line, 30, 93.4) == (
        "step  7/30  reward 0.75  gsm8k.format 0.25  gsm8k.correctness 0.5  length 61.25  entropy 0.5  grad 0.125"
        "  eval/accuracy 0.4  1.2 s  left 0:01:33"
    )
    assert "skipped 1" in step_line(skipped, 30, 0)


def shown(tmp_path, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60, color_system=None, legacy_windows=False)
    log = Log(tmp_path, Config(num_steps=4), 1)
    log.display = Display(4, 1, console)
    with log:
        log.display.say("base model: " + "x" * 100 + " [bold]7[/bold]")
        log.display.phase("rollout")
        for step in (2, 3):
            log.write(step, {"reward/mean": 0.5, "time/step": 10.0 * step})
    return out.getvalue()


def test_where_the_output_is_no_terminal_there_are_plain_unwrapped_lines(tmp_path):
    assert shown(tmp_path, terminal=False).splitlines() == [
        "base model: " + "x" * 100 + " [bold]7[/bold]",
        "step 2/4  reward 0.5  20.0 s  left 0:00:40",
        "step 3/4  reward 0.5  30.0 s  left 0:00:25",  # the mean of the steps so far, 25 s, for the one left
    ]


def test_on_a_terminal_there_is_a_bar_below_the_same_lines(tmp_path):
    text = shown(tmp_path, terminal=True)
    assert "base model: " + "x" * 100 + " [bold]7[/bold]" in text
    assert "step 3/4  reward 0.5  30.0 s  left 0:00:25" in text
    assert "\x1b[" in text and "3/4 left 0:00:25" in text.split("step 3/4")[-1]


def test_where_nobody_reads_any_more_a_run_goes_on(monkeypatch):
    """As after Ctrl-C in `train.py | tee log`, which ends tee at once and the run after its step."""

    class Gone(io.StringIO):
        def write(self, *_):
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    with Display(3) as display:
        display.say("one")
        display.say("two")


def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with Display(3) as display:
        display.say("hello")
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    with Display(3) as display:
        display.say("hello")
    assert capsys.readouterr().out == "hello\n"
