"""Numbers of a step: means that do not depend on how work is divided, lines that survive a crash, the console."""

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo import distributed
from grpo.metrics import METRIC_NAMES, Sums, metric_names
from grpo.run.log import Display, MetricsWriter, step_line
from tests.fakes.runs import run_ranks

REWARDS = ("gsm8k.format", "gsm8k.correctness")


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def writer(directory: Path, **options) -> MetricsWriter:
    return MetricsWriter(directory, reward_names=REWARDS, **options)


# ---- sums


def test_means_sums_and_maxima():
    sums = Sums()
    sums.add("policy/kl", torch.tensor(6.0), torch.tensor(2))
    sums.add("policy/kl", 3, 4.0)
    sums.add("tokens/sampled", 10)
    sums.add("tokens/sampled", torch.tensor(5))
    sums.maximum("policy/sampler_gap_max", -2.0)
    sums.maximum("policy/sampler_gap_max", torch.tensor(-3.0))
    assert sums.reduce() == {"policy/kl": 1.5, "tokens/sampled": 15.0, "policy/sampler_gap_max": -2.0}


def test_a_mean_over_a_mask_leaves_out_whatever_stands_elsewhere():
    values = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], requires_grad=True)
    sums = Sums()
    sums.add_where(torch.tensor([[True, True], [False, False]]), "policy/kl", values)
    sums.add_where(torch.tensor([True, False, True]), "policy/kl", torch.tensor([True, True, False]))
    sums.add_where(torch.zeros(2, 0, dtype=torch.bool), "policy/kl", torch.zeros(2, 0))
    assert sums.reduce() == {"policy/kl": 1.0}  # (1 + 2 + 1 + 0) / 4
    assert all(not kept.requires_grad for kept in sums._values.values())


def test_sums_are_kept_in_float64_and_without_gradient():
    value = torch.full((), 1.0, requires_grad=True)
    sums = Sums()
    sums.add("optim/loss", torch.tensor(2.0**24), 1)  # in float32, one more would be lost
    sums.add("optim/loss", value, 0)
    assert sums.reduce() == {"optim/loss": 2.0**24 + 1}
    assert all(not kept.requires_grad for kept in sums._values.values())


def test_adding_does_not_change_what_was_given():
    total, largest = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    sums = Sums()
    for _ in range(2):
        sums.add("a", total, total)
        sums.maximum("b", largest)
    sums.add("once", total)
    assert total.item() == largest.item() == 1.0
    total += 100
    assert sums.reduce() == {"a": 1.0, "b": 1.0, "once": 1.0}


def test_merging_adds_what_another_has_collected_and_leaves_it_alone():
    ours, theirs = Sums(), Sums()
    for sums, value in ((ours, 1.0), (theirs, 4.0)):
        sums.add("policy/kl", value, 2)
        sums.add("tokens/sampled", value)
        sums.maximum("policy/sampler_gap_max", -value)
    theirs.add("optim/loss", 3.0, 1)
    before = theirs.reduce()
    for _ in range(2):
        ours.merge(theirs)
    merged = {"policy/kl": 1.5, "tokens/sampled": 9.0, "policy/sampler_gap_max": -1.0, "optim/loss": 3.0}
    assert ours.reduce() == merged and theirs.reduce() == before


def test_c04_a_mean_without_weight_has_no_value():
    sums = Sums()
    sums.add("policy/kl", torch.tensor(0.0), 0)
    assert math.isnan(sums.reduce()["policy/kl"])
    assert Sums().reduce() == {}


def test_a_maximum_of_nan_is_nan_whichever_comes_first(monkeypatch):
    for values in ((math.nan, 1.0), (1.0, math.nan)):
        sums = Sums()
        for value in values:
            sums.maximum("a", value)
        assert math.isnan(sums.reduce()["a"])
        ranks = [{("max", "a"): value} for value in values]
        monkeypatch.setattr(distributed, "gather_objects", lambda _, ranks=ranks: ranks)
        assert math.isnan(Sums().reduce()["a"])
        monkeypatch.undo()


SHARED = """
import json, torch
from grpo import distributed
from grpo.metrics import Sums
distributed.init("cpu", 60)
samples = [(0.1, 3), (0.7, 1), (-2.5, 8), (1e-9, 2), (5.0, 1)]
sums = Sums()
for value, weight in samples[distributed.rank()::2] if distributed.rank() < 2 else []:
    sums.add("policy/kl", value * weight, weight)
    sums.add("tokens/sampled", weight)
    sums.maximum("policy/sampler_gap_max", torch.tensor(value))
if distributed.is_main():
    sums.add("reward/mean", 1.0, 2)
print(json.dumps(sums.reduce()))
distributed.shutdown()
"""


def test_c32_metrics_do_not_depend_on_how_samples_are_spread(tmp_path):
    outputs = run_ranks(3, SHARED, tmp_path)  # the last rank has nothing to add
    for code, out, err in outputs:
        assert code == 0, err
        assert out == outputs[0][1]
    reduced = json.loads(outputs[0][1])
    assert set(reduced) == {"policy/kl", "tokens/sampled", "policy/sampler_gap_max", "reward/mean"}
    assert reduced["policy/kl"] == pytest.approx((0.3 + 0.7 - 20.0 + 2e-9 + 5.0) / 15, rel=1e-12)
    assert (reduced["tokens/sampled"], reduced["policy/sampler_gap_max"], reduced["reward/mean"]) == (15.0, 5.0, 0.5)


def test_an_effective_size_is_that_of_all_weights_together():
    """Weights 1, 3, 0 of three samples: 16 / (3 * 10). In parts, and what the mask leaves out does not count."""
    whole, parts = Sums(), Sums()
    whole.add_effective_size(torch.tensor([True, True, True, False]), "ess", torch.tensor([1.0, 3.0, 0.0, math.nan]))
    for weight in (1.0, 3.0, 0.0):
        more = Sums()
        more.add_effective_size(torch.tensor([True]), "ess", torch.tensor([weight]))
        parts.merge(more)
    assert whole.reduce()["ess"] == pytest.approx(16 / 30) and parts.reduce() == whole.reduce()
    none = Sums()
    none.add_effective_size(torch.tensor([True, True]), "ess", torch.zeros(2))
    assert none.reduce()["ess"] == 0


# ---- metrics.jsonl


def test_every_line_has_every_name_in_order(tmp_path):
    log = writer(tmp_path)
    log.write(1, {"reward/mean": 0.5})
    log.write(2, {"eval/accuracy": 0.25, "optim/lr": 1e-6, "reward/gsm8k.format": 0.5})
    log.close()
    first, second = lines(tmp_path)
    names = metric_names(REWARDS)
    assert list(first) == names
    assert list(second) == [*names, "eval/accuracy"]
    assert {name: value for name, value in first.items() if value is not None} == {"step": 1, "reward/mean": 0.5}
    assert (second["step"], second["eval/accuracy"], second["optim/lr"]) == (2, 0.25, 1e-6)


def test_names_of_the_reward_terms_are_those_of_the_config():
    names = metric_names(REWARDS)
    assert names[:4] == ["step", "reward/mean", "reward/gsm8k.format", "reward/gsm8k.correctness"]
    assert [name for name in METRIC_NAMES if name not in names] == ["reward/<term>"]
    assert len(names) == len(set(names)) == len(METRIC_NAMES) + 1


def test_every_name_is_explained_in_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) >= set(METRIC_NAMES)


def test_what_is_not_finite_is_null_and_the_file_is_strict_json(tmp_path):
    log = writer(tmp_path)
    given = {"policy/kl": math.nan, "optim/grad_norm": math.inf, "optim/loss": -math.inf, "reward/mean": 0.0}
    line = log.write(1, given)
    assert line["policy/kl"] is line["optim/grad_norm"] is line["optim/loss"] is None
    assert line["reward/mean"] == 0.0
    assert lines(tmp_path) == [line]


def test_counts_are_integers_and_floats_are_exact(tmp_path):
    line = writer(tmp_path).write(1, {"tokens/sampled": 1280.0, "memory/peak_bytes": 2.0**40, "reward/mean": 0.1 + 0.2})
    assert '"tokens/sampled": 1280,' in (tmp_path / "metrics.jsonl").read_text()
    assert line["memory/peak_bytes"] == 2**40
    assert lines(tmp_path)[0]["reward/mean"] == 0.1 + 0.2


def test_a_line_is_in_the_file_before_write_returns(tmp_path):
    log = writer(tmp_path)
    log.write(1, {})
    assert len(lines(tmp_path)) == 1


def test_a_name_without_a_meaning_is_a_mistake(tmp_path):
    with pytest.raises(AssertionError, match="reward/maen"):
        writer(tmp_path).write(1, {"reward/maen": 1.0})


@pytest.mark.parametrize("resume_step", [0, 2, 4])
@pytest.mark.parametrize("torn", ["", '{"step": 5, "reward/me', '{"step": 5}', "\x00\x00"])
def test_c30_resuming_cuts_what_came_after_the_checkpoint(tmp_path, resume_step, torn):
    log = writer(tmp_path)
    for step in range(1, 5):
        log.write(step, {"reward/mean": step / 3})
    log.close()
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    log = writer(tmp_path, resume_step=resume_step)
    assert lines(tmp_path) == whole[:resume_step]
    for step in range(resume_step + 1, 5):
        log.write(step, {"reward/mean": step / 3})
    assert lines(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_of_the_last_kept_step_is_written_again(tmp_path):
    log = writer(tmp_path)
    log.write(1, {})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2}')  # whole JSON, but the newline is missing
    writer(tmp_path, resume_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, monkeypatch):
    log = writer(tmp_path)
    log._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match=r"^cannot write /dev/full \(No space left on device\)$"):
        log.write(1, {})


def test_tensorboard_gets_the_numbers_that_there_are(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = writer(tmp_path, tensorboard=True)
    log.write(1, {"reward/mean": 0.5, "policy/kl": math.nan})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5)]


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard is True: .*`pip install 'grpo\[tensorboard\]'`"):
        writer(tmp_path, tensorboard=True)


# ---- console


def test_c10_a_steps_line_shows_the_reward_and_each_term(tmp_path):
    metrics = {"reward/mean": 0.75, "reward/gsm8k.format": 0.25, "reward/gsm8k.correctness": 0.5, "time/step": 1.25}
    metrics |= {"completion/length": 61.25, "policy/entropy": 0.5, "policy/kl": math.nan, "optim/grad_norm": 0.125}
    line = writer(tmp_path).write(7, metrics | {"eval/accuracy": 0.4, "optim/skipped": 0})
    assert step_line(line, 30, 93.4) == (
        "step  7/30  reward 0.75  gsm8k.format 0.25  gsm8k.correctness 0.5  length 61.25  entropy 0.5  grad 0.125"
        "  eval/accuracy 0.4  1.2 s  left 0:01:33"
    )
    skipped = writer(tmp_path).write(1, {"optim/skipped": 1})
    assert "skipped 1" in step_line(skipped, 30, 0)


def shown(tmp_path, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60, color_system=None, legacy_windows=False)
    with Display(4, steps_done=1, console=console) as display:
        display.say("base model: " + "x" * 100 + " [bold]7[/bold]")
        display.phase("rollout")
        for step in (2, 3):
            display.step(writer(tmp_path).write(step, {"reward/mean": 0.5, "time/step": 10.0 * step}))
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
