"""A run as a thing on disk: its directory is claimed late and never overwritten, its state saved and found again."""

import io
import json
import os
import shutil
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo import distributed
from grpo.config import Config, from_yaml, to_yaml
from grpo.policy import Policy
from grpo.run import checkpoint, log
from grpo.run import directory as directory_module
from grpo.run.directory import begun, claim, is_trained, keep_smaller, open_directory
from grpo.run.log import Clock, Display, say
from grpo.run.machine import environment, settle
from grpo.run.state import State, due, restore_state, save_state, why_stop
from grpo.update import Learner
from tests.fakes import runs

CPU = torch.device("cpu")


def config(place: Path, **changes) -> Config:
    fixed = {"out_dir": str(place), "run_name": "r", "kl_coef": 0.0, "num_steps": 4, "max_tokens_per_microbatch": 64}
    return Config(**fixed | changes)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


MADE_OF = {"model": "weights", "commit": None, "data": "d", "prompts": "p", "rewards": {}}


def found(asked: Config) -> tuple[Config, Path]:
    """As a run does it: the config with which it goes on, and its directory."""
    before = begun(asked)
    config = settle(asked, CPU, before)
    return config, open_directory(config, before)


def opened(asked: Config) -> tuple[Config, Path]:
    """As a run does it: open, then claim."""
    config, directory = found(asked)
    claim(directory, config, CPU, 0, MADE_OF)
    return config, directory


# The directory.


def test_opening_writes_nothing_and_claiming_does(tmp_path):
    wanted, directory = found(config(tmp_path))
    assert directory == tmp_path / "r" and contents(directory) == {}
    found(config(tmp_path))  # an empty directory stands in nobody's way
    claim(directory, wanted, CPU, 0, MADE_OF)
    assert sorted(contents(directory)) == ["config.yaml", "environment.json", "inputs.json"]
    assert from_yaml(directory / "config.yaml") == wanted


def test_an_existing_run_is_refused_or_resumed(tmp_path):
    first, directory = opened(config(tmp_path))
    before = contents(directory)
    with pytest.raises(ValueError, match=r"run_name: .*/r exists already; continue it with --resume auto"):
        found(config(tmp_path))
    assert contents(directory) == before
    again, same = found(config(tmp_path, resume="auto", num_steps=9))
    assert same == directory and again == replace(first, resume="auto", num_steps=9)
    with pytest.raises(ValueError, match="seed is 1, but the run to resume has 0"):
        found(config(tmp_path, resume="auto", seed=1))
    assert contents(directory) == before


def test_somebody_s_directory_is_refused(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        found(config(tmp_path))


@pytest.mark.parametrize("result", ["final", "adapter", "eval"])
def test_results_without_a_checkpoint_are_not_begun_again(tmp_path, result):
    _, directory = opened(config(tmp_path))
    (directory / result).mkdir()
    (directory / result / "kept.json").write_text("{}")
    before = contents(directory)
    with pytest.raises(ValueError, match=rf"^resume: .*/r has {result}/ but no checkpoint to go on from"):
        found(config(tmp_path, resume="auto"))
    assert contents(directory) == before


def test_a_resumed_run_keeps_what_its_autos_meant(tmp_path):
    """As if it had been made on a GPU."""
    made = config(tmp_path, precision="bf16", compile=True, max_tokens_per_microbatch=16384, device="cpu")
    (tmp_path / "r").mkdir()
    to_yaml(made, tmp_path / "r" / "config.yaml")
    wanted = config(tmp_path, precision="auto", max_tokens_per_microbatch="auto", resume="auto")
    assert found(wanted)[0] == replace(made, resume="auto")


def test_claiming_drops_the_results_of_an_earlier_end(tmp_path):
    wanted, directory = opened(config(tmp_path))
    (directory / "final").mkdir()
    (directory / "eval").mkdir()
    for file in (directory / "final" / "config.json", directory / "eval" / "eval.json", directory / "report.html"):
        file.write_text("{}")
    with pytest.raises(ValueError, match="^model: the weights in .* are not those that the run began with"):
        claim(directory, replace(wanted, kl_coef=0.1), CPU, 3, MADE_OF | {"model": "other"})
    assert (directory / "final" / "config.json").exists() and (directory / "report.html").exists()
    claim(directory, wanted, CPU, 0, MADE_OF)
    assert sorted(contents(directory)) == ["config.yaml", "environment.json", "inputs.json"]


def test_every_start_stays_in_the_environment(tmp_path, monkeypatch):
    wanted, directory = opened(config(tmp_path))
    for threads in (2, 3):
        monkeypatch.setattr(directory_module, "environment", lambda device, threads=threads: {"threads": threads})
        claim(directory, wanted, CPU, 0, MADE_OF, {"sandbox": "seccomp"} if threads == 3 else None)
    recorded = json.loads((directory / "environment.json").read_text())
    assert recorded["threads"] == 3 and recorded["sandbox"] == "seccomp"
    assert [start["threads"] for start in recorded["earlier"]] == [torch.get_num_threads(), 2]
    assert all("earlier" not in start for start in recorded["earlier"])


@pytest.mark.parametrize("out_dir", ["a_file", "/proc/nowhere"])
def test_a_place_that_can_not_be_written_is_one_sentence(tmp_path, out_dir):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(OSError, match=r"out_dir: .*/r can not be made \("):
        found(config(tmp_path / out_dir))


def test_the_environment_says_on_what_it_ran():
    recorded = environment(CPU)
    assert set(recorded) == {
        *("commit", "python", "torch", "transformers", "numpy", "device", "threads", "processes", "command")
    }
    assert recorded["device"] and recorded["processes"] == 1 and recorded["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(recorded)) == recorded


def test_a_halved_micro_batch_is_written_for_the_continuation_and_said_once(tmp_path):
    wanted, directory = opened(config(tmp_path))
    made, out = learner(tmp_path), io.StringIO()
    display = Display(4, console=Console(file=out))
    keep_smaller(directory, wanted, 64, made.max_tokens, display)
    assert from_yaml(directory / "config.yaml") == wanted and out.getvalue() == ""
    made.budget.max_tokens = 16
    keep_smaller(directory, wanted, 64, made.max_tokens, display)
    kept = replace(wanted, max_tokens_per_microbatch=16)
    assert from_yaml(directory / "config.yaml") == kept
    keep_smaller(directory, wanted, 16, made.max_tokens, display)
    (said,) = out.getvalue().splitlines()
    assert said.startswith("warning: out of memory in learning; ") and "16 instead of 64" in said
    resumed = config(tmp_path, resume="auto", max_tokens_per_microbatch="auto")
    assert found(resumed)[0] == replace(kept, resume="auto")


# The state.


def learner(place: Path, seed: int = 0, **changes) -> Learner:
    policy = Policy(runs.digit_model(seed), runs.digit_tokenizer(), changes.get("precision", "fp32"))
    return Learner(config(place, **changes), policy, None)


def test_the_state_is_saved_and_found_again(tmp_path):
    one, other = learner(tmp_path, precision="fp16"), learner(tmp_path, seed=1, precision="fp16")
    one.scaler.scale(torch.ones(()))  # it makes its state when it is first used
    one.scaler.update(3.0)
    state = State(step=2, skipped=1, best_step=2, best_accuracy=0.1 + 0.2)
    assert restore_state(tmp_path, other) == State()
    save_state(tmp_path, one, state, keep=2)
    assert restore_state(tmp_path, other) == state
    assert other.scaler.get_scale() == 3.0
    ours, theirs = one.policy.state_dict(), other.policy.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_newer_checkpoint_that_is_not_complete_is_named(tmp_path, capsys):
    one = learner(tmp_path)
    for step in (1, 2):
        save_state(tmp_path, one, State(step=step), keep=2)
    assert restore_state(tmp_path, one).step == 2 and capsys.readouterr().err == ""
    folder = tmp_path / "checkpoints"
    (folder / "step_000002" / "optimizer.pt").rename(folder / "left")
    (folder / "step_000001").rename(folder / "step_000001.old")  # a crash between two renames
    assert restore_state(tmp_path, one).step == 1
    said = f"warning: step_000002 in {folder} is not complete; the run goes on from step_000001.old\n"
    assert capsys.readouterr().err == said
    shutil.copytree(folder / "step_000001.old", folder / "step_000001")
    shutil.rmtree(folder / "step_000002")
    assert restore_state(tmp_path, one).step == 1 and capsys.readouterr().err == ""


def test_everything_in_the_state_survives(tmp_path):
    values = {"step": 7, "skipped": 2, "best_step": 5, "best_accuracy": 0.625}
    values |= {"coefs": {"kl_coef": 0.1 + 0.2}, "pass_rates": {17: 1 / 3, 4: 0.0}}
    assert set(values) == {field.name for field in fields(State)}
    save_state(tmp_path, learner(tmp_path), State(**values), keep=1)
    assert restore_state(tmp_path, learner(tmp_path)) == State(**values)


def rewritten(path: Path, change) -> None:
    """Change what a checkpoint says of itself, as another version might have written it."""
    file = path / "state.json"
    content = json.loads(file.read_text())
    change(content["state"])
    file.write_text(json.dumps(content | {"crc32": checkpoint._check_sums(path, content)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.update(best_reward=1.0), "holds 'best_reward', which this version does not know"),
        (lambda state: state.pop("best_step"), "lacks 'best_step'"),
        (lambda state: state.update(skipped="2"), "skipped is '2': must be of type int"),
        (lambda state: state.pop("scaler"), "lacks 'scaler'"),
        (lambda state: state.update(scaler={"scale": 1.0}), "scaler does not fit"),
    ],
    ids=["newer", "older", "another type", "no scaler", "another scaler"],
)
def test_c62_a_checkpoint_of_another_version_is_a_sentence_that_names_the_field(tmp_path, change, said):
    """Kind: a file that is read back is taken to be of this version, and another one ends in a traceback."""
    one = learner(tmp_path, precision="fp16")
    save_state(tmp_path, one, State(step=2), keep=2)
    rewritten(tmp_path / "checkpoints" / "step_000002", change)
    with pytest.raises(ValueError, match=f"^resume: .*state.json.*{said}"):
        restore_state(tmp_path, one)


def test_a_run_is_done_when_its_last_step_and_its_model_are_there(tmp_path):
    wanted, directory = opened(config(tmp_path))
    assert not is_trained(directory, wanted)
    (directory / "final").mkdir()
    assert not is_trained(directory, wanted)
    for step in (3, 4, 1_000_000):
        save_state(directory, learner(tmp_path), State(step=step), keep=9)
        assert is_trained(directory, wanted) == (step >= 4)
    assert is_trained(directory, replace(wanted, num_steps=1_000_000))
    assert not is_trained(directory, replace(wanted, num_steps=1_000_001))
    (directory / "final").rmdir()
    assert not is_trained(directory, wanted)


def test_steps_without_a_finite_gradient_are_counted_in_a_row():
    state = State().after(1, True).after(2, False).after(3, False)
    assert (state.step, state.skipped) == (3, 2)
    assert state.after(4, True).skipped == 0 and state.after(4, False).skipped == 3


class Asked:
    def __init__(self, answer: bool):
        self.answer = answer

    def asked(self) -> bool:
        return self.answer


def test_why_a_run_stops():
    assert why_stop(State(step=1, skipped=2), Asked(False), {"reward/invalid": 0.99}) is None
    asked = why_stop(State(step=7), Asked(True), {"reward/invalid": 1.0})
    assert asked == ("asked to stop; saved after step 7, go on with --resume auto", 0)
    spoilt = why_stop(State(step=7, skipped=3), Asked(False), {"reward/invalid": 0.0})
    assert "not finite in 3 steps in a row" in spoilt[0] and spoilt[1] == 1


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (7, [])])
def test_what_is_due(every, steps):
    assert [step for step in range(1, 7) if due(step, every)] == steps


# Time and ranks.


def test_the_clock_adds_up(monkeypatch):
    now = iter([10.0, 10.0, 11.5, 12.0, 12.5, 15.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(now))
    shown = []
    clock = Clock(shown.append)
    for phase in ("rollout", "reward"):
        with clock(phase):
            assert shown[-1] == phase
    assert clock.seconds() == {"time/rollout": 1.5, "time/reward": 0.5, "time/step": 5.0}


def test_c56_a_phase_that_is_entered_twice_adds_up(monkeypatch):
    """Kind: a second measurement in a step replaces the first. A loop that samples again enters a phase twice."""
    now = iter([10.0, 10.0, 11.5, 12.0, 12.5, 13.0, 15.0, 16.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(now))
    clock = Clock()
    for phase in ("rollout", "reward", "rollout"):
        with clock(phase):
            pass
    assert clock.seconds() == {"time/rollout": 3.5, "time/reward": 0.5, "time/step": 6.0}


def _on_main(out: Path) -> None:
    distributed.init("cpu", 60)
    rank = distributed.rank()
    said = [distributed.on_main(lambda: f"from {rank}")]
    for error in (ValueError("a wrong option"), OSError(28, "No space left on device")):

        def fail(error=error):
            raise error

        try:
            distributed.on_main(fail)
        except (ValueError, OSError) as caught:
            said.append(f"{type(caught).__name__}: {caught}")
    say("the end")
    Path(f"{out}_{rank}.json").write_text(json.dumps(said))
    distributed.shutdown()
    os._exit(0)


def test_what_rank_0_does_or_can_not_do_all_know(tmp_path):
    ranks = runs.start_ranks(partial(_on_main, tmp_path / "said"), 2, tmp_path / "out")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    expected = ["from 0", "ValueError: a wrong option", "OSError: [Errno 28] No space left on device"]
    assert [json.loads((tmp_path / f"said_{r}.json").read_text()) for r in (0, 1)] == [expected] * 2
    assert [rank.stderr.splitlines()[-1] for rank in ranks] == ["the end", "rank 1: the end"]
