"""The whole run from outside: what it leaves, that it repeats and resumes to the bit, how it stops, what it refuses."""

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train
from grpo import distributed, update
from grpo.advantages import ADVANTAGES
from grpo.config import Config, from_yaml
from grpo.evaluation import grading
from grpo.evaluation.protocol import EvalOptions
from grpo.files import lock_directory
from grpo.metrics import metric_names
from grpo.sampler import Sampler
from grpo.update import Learner
from rewards.runner import RewardRunner
from tests.fakes import runs
from tests.fakes.runs import asked_to_stop, at, flags, killed, metrics, send, transcripts, weights

REWARDS = ("gsm8k.last_number", "gsm8k.format")
# Several updates in a step, a schedule, evaluations: all that a resumed run could get wrong.
OPTIONS = {
    "precision": "fp32",
    "num_steps": 6,
    "prompts_per_step": 4,
    "minibatch_size": 8,
    "num_epochs": 2,
    "max_tokens_per_microbatch": 40,
    "schedule": "cosine",
    "warmup_steps": 2,
    "eval_every": 3,
    "final_eval": True,
}


REPORT = train.report


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(train, "report", runs.no_report)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the runs go; `model` and `data` are there."""
    return runs.new_place(tmp_path_factory)


def argv(place: Path, name: str, **changes) -> list[str]:
    return flags(str(place / "model"), str(place / "data"), place, name, **changes)


@pytest.fixture(scope="module")
def finished(place) -> tuple[Path, str]:
    """(directory, what was printed) of a run started as people do, from another directory."""
    command = [sys.executable, str(runs.ROOT / "train.py"), *argv(place, "finished", **OPTIONS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=runs.PATIENCE)
    assert done.returncode == 0, done.stderr
    return place / "finished", done.stdout


# What a run leaves.


def test_a_run_leaves_its_files(finished):
    directory, _ = finished
    names = sorted(path.name for path in directory.iterdir())
    files = ["config.yaml", "environment.json", "inputs.json", "metrics.jsonl", "report.html"]
    assert names == sorted([*files, "checkpoints", "curves", "eval", "final", "rollouts"])
    assert sorted(transcripts(directory)) == [f"step_{step:06d}.jsonl" for step in range(1, 7)]
    assert all(len(lines) == 16 for lines in transcripts(directory).values())
    assert not list(directory.rglob("*.tmp"))


def test_what_is_printed(finished, place):
    _, out = finished
    lines = out.splitlines()
    assert lines[0] == f"base model: {place / 'model'}"
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{step}/6" for step in range(1, 7)]
    assert all("reward " in line and "left " in line for line in steps)
    assert [line.split()[0] for line in lines[1:] if line.startswith(("base ", "tuned "))] == ["base", "tuned"]
    assert "\x1b" not in out  # plain lines where it is no terminal


def test_metrics_have_every_name_in_every_line(finished):
    directory, _ = finished
    lines = metrics(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        extra = [name for name in line if name not in metric_names(REWARDS)]
        assert set(metric_names(REWARDS)) <= set(line)
        assert all(name.startswith("eval/") for name in extra) and bool(extra) == (line["step"] in (3, 6))
        assert line["policy/kl"] is not None and line["optim/grad_norm"] > 0 and line["optim/skipped"] == 0
        assert line["tokens/sampled"] == pytest.approx(16 * line["completion/length"])
    assert {"eval/accuracy", "eval/n"} <= set(lines[2])
    # 2 updates in each of 2 epochs: the first is on-policy, the later ones are not.
    assert all(line["policy/ratio_mean"] != 1 for line in lines)
    assert lines[0]["policy/sampler_gap_mean"] < 1e-5


def test_transcripts_are_what_the_metrics_count(finished):
    directory, _ = finished
    lines = metrics(directory)
    for step, rows in enumerate(transcripts(directory).values(), start=1):
        line = lines[step - 1]
        assert [row["prompt_index"] for row in rows] == [i for i in range(4) for _ in range(4)]
        assert line["reward/mean"] == pytest.approx(sum(row["reward"] for row in rows) / 16)
        assert line["completion/truncated"] == pytest.approx(sum(not row["finished"] for row in rows) / 16)
        for name in REWARDS:
            assert line[f"reward/{name}"] == pytest.approx(sum(row["rewards"][name] for row in rows) / 16)
        assert all(row["reward"] == 2 * row["rewards"][REWARDS[0]] + row["rewards"][REWARDS[1]] for row in rows)


def test_c29_config_is_complete_and_a_recipe_of_the_same_run(finished, place):
    directory, _ = finished
    text = (directory / "config.yaml").read_text()
    config = from_yaml(directory / "config.yaml")
    assert [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"] == [f.name for f in fields(Config)]
    assert (config.device, config.precision, config.max_tokens_per_microbatch) == ("cpu", "fp32", 40)
    runs.run(["--recipe", str(directory / "config.yaml"), "--run_name", "again"], place / "again")
    runs.assert_same_run(directory, place / "again")  # C29 too: the same run in another process


def test_auto_is_written_as_what_it_meant(place):
    options = {"num_steps": 1, "precision": "auto", "device": "auto", "max_tokens_per_microbatch": "auto"}
    assert train.main(argv(place, "auto", **options)) == 0
    config = from_yaml(place / "auto" / "config.yaml")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert config.device == device and config.precision == {"cpu": "fp32", "cuda": "bf16"}[device]
    assert isinstance(config.max_tokens_per_microbatch, int)


def test_without_options_it_is_the_demo(place, capsys):
    """The embedded model and the generated problems, at the smallest size."""
    small = {"num_steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8, "final_eval_limit": 4}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert train.main([*words, "--out_dir", str(place), "--device", "cpu"]) == 0
    assert f"base model: {runs.ROOT / 'grpo' / 'base_model'}\n" in capsys.readouterr().out
    (rows,) = transcripts(place / "demo").values()
    assert len(rows) == 4 and all(row["completion"].startswith(("\n", " ")) for row in rows)
    assert set(rows[0]["rewards"]) == {"gsm8k.format", "gsm8k.correctness"}


def test_c58_every_file_has_the_mode_that_umask_gives(finished):
    """Kind: a library writes through a temporary file, which no other user may read.

    Looked at: everything that a run leaves, weights of `final/` and of checkpoints too.
    """
    directory, _ = finished
    umask = os.umask(0)
    os.umask(umask)
    modes = {str(path): path.stat().st_mode & 0o777 for path in directory.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_environment_is_recorded(finished):
    directory, _ = finished
    recorded = json.loads((directory / "environment.json").read_text())
    assert recorded["torch"] == torch.__version__.split("+")[0] or recorded["torch"] == torch.__version__
    assert {"commit", "python", "transformers", "numpy", "device"} <= set(recorded)
    assert recorded["threads"] == 1 and recorded["processes"] == 1
    assert recorded["command"][1].endswith("train.py") and "--num_steps" in recorded["command"]


def test_final_is_a_hugging_face_directory(finished, place):
    directory, _ = finished
    model = AutoModelForCausalLM.from_pretrained(directory / "final")
    tokenizer = AutoTokenizer.from_pretrained(directory / "final")
    assert (directory / "final" / "generation_config.json").exists()
    assert tokenizer("1+2=").input_ids == runs.digit_tokenizer()("1+2=").input_ids
    assert model.generate(torch.tensor([tokenizer("1+2=").input_ids]), max_new_tokens=3, do_sample=False).shape[1] > 4
    tuned, base = weights(directory / "final"), weights(place / "model")
    assert tuned.keys() == base.keys() and all(tensor.dtype == torch.float32 for tensor in tuned.values())
    assert not any(torch.equal(tuned[name], base[name]) for name in base)


def test_evaluation_has_the_shape_that_is_documented(finished):
    directory, _ = finished
    cells = json.loads((directory / "eval" / "eval.json").read_text())["cells"]
    assert [cell["model"] for cell in cells] == ["base", "tuned"]
    for cell in cells:
        assert {"shots", "n", "correct", "accuracy", "ci95", "format_rate", "finished"} <= set(cell)
        assert (cell["shots"], cell["n"]) == (0, 7)  # C42: the whole split
        assert cell["accuracy"] == cell["correct"] / cell["n"]
        assert 0 <= cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1] <= 1


def test_checkpoints_are_pruned_and_the_best_is_kept(place, monkeypatch):
    """Also when the best step is no multiple of `checkpoint_every`."""
    accuracies = iter([0.2, 0.9])

    def evaluated(*_):
        return {"accuracy": next(accuracies), "n": 1}

    monkeypatch.setattr(train, "evaluate", evaluated)
    options = {"num_steps": 6, "checkpoint_every": 2, "keep_checkpoints": 2}
    assert train.main(argv(place, "best", **options, eval_every=3)) == 0
    assert kept(place / "best") == ["step_000004", "step_000006"]
    accuracies = iter([0.2, 0.9, 0.1, 0.9, 0.5, 0.6, 0.7, 0.8])
    assert train.main(argv(place, "best_odd", **options | {"num_steps": 8}, eval_every=1)) == 0
    assert kept(place / "best_odd") == ["step_000002", "step_000006", "step_000008"]
    accuracies = iter([0.9, 0.2])
    assert train.main(argv(place, "best_first", **options | {"checkpoint_every": 5}, eval_every=3)) == 0
    assert kept(place / "best_first") == ["step_000003", "step_000005", "step_000006"]


def test_validation_is_of_the_weights_that_the_step_has_left(place, monkeypatch):
    """In bfloat16 the sampler has a copy."""
    off = []

    def evaluated(sampler, *_):
        pairs = zip(sampler.policy.parameters(), seen[0].parameters(), strict=True)
        off.append(max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs))
        return {"accuracy": 0.5, "n": 1}

    seen, load = [], train.load_policy
    monkeypatch.setattr(train, "load_policy", lambda *a, **k: seen.append((made := load(*a, **k))[0]) or made)
    monkeypatch.setattr(train, "evaluate", evaluated)
    assert train.main(argv(place, "validated", precision="bf16", num_steps=2, eval_every=1, learning_rate=0.1)) == 0
    assert len(off) == 2 and max(off) < 2**-8  # rounded


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


# Repeating and resuming, to the bit.


def test_c29_another_seed_is_another_run(finished, place):
    directory, _ = finished
    runs.run(argv(place, "seed", **OPTIONS, seed=1), place / "seed")
    rewards = [[line["reward/mean"] for line in metrics(run)] for run in (directory, place / "seed")]
    assert rewards[0] != rewards[1]


KILLS = {
    "before the first step": ("grpo.sampler:Sampler.generate", 1),
    "sampling": ("grpo.sampler:Sampler.generate", 3),
    "rewarding": ("rewards.runner:RewardRunner.score", 3),
    "in a micro-batch": ("grpo.update:Learner._loss", 25),
    "between minibatches": ("grpo.update:clip_and_step", 14),
    "writing transcripts": ("train:write_transcripts", 4),
    "writing metrics": ("grpo.run.log:Log.write", 5),
    "evaluating": ("train:evaluate", 1),
    "before the checkpoint": ("grpo.run.checkpoint:save", 2),
    "inside the checkpoint": ("torch:save", 2),
    "after the checkpoint": ("grpo.run.checkpoint:prune", 2),
    "after the last step": ("train:save_model", 1),
    "in the final evaluation": ("train:compare_models", 1),
}


@pytest.mark.parametrize(("where", "call"), KILLS.values(), ids=KILLS.keys())
def test_c23_c30_killed_there_and_resumed_equals_uninterrupted(finished, place, where, call, request):
    directory, _ = finished
    name = request.node.callspec.id.replace(" ", "_")
    again = argv(place, name, **OPTIONS, resume="auto")
    assert runs.start(again, place / name, before=killed(where, call)).wait() == -signal.SIGKILL
    runs.run(again, place / name)
    runs.assert_same_run(directory, place / name)
    assert (place / name / "eval" / "eval.json").read_text() == (directory / "eval" / "eval.json").read_text()


@pytest.mark.slow
def test_c30_killed_at_random_moments_and_resumed_equals_uninterrupted(place):
    options = OPTIONS | {"num_steps": 25, "eval_every": 5, "checkpoint_every": 3}
    runs.run(argv(place, "steady", **options), place / "steady")
    again, delays, kills = argv(place, "shaken", **options, resume="auto"), random.Random(), 0
    for progress in (1, 5, 9, 13, 17):
        process = runs.start(again, place / "shaken")
        while process.running and _steps_done(place / "shaken") < progress:
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.4))
        if process.running:
            process.signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills > 2
    runs.run(again, place / "shaken")
    runs.assert_same_run(place / "steady", place / "shaken")


def _steps_done(directory: Path) -> int:
    lines = directory / "metrics.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_c30_c31_four_steps_are_two_and_two_and_nothing_is_sampled_twice(place, precision):
    options = {"precision": precision, "minibatch_size": 4, "num_epochs": 2}
    name = f"halves_{precision}"
    assert train.main(argv(place, f"whole_{precision}", **options)) == 0
    assert train.main(argv(place, name, **options | {"num_steps": 2})) == 0
    before = {path: path.stat().st_mtime_ns for path in (place / name / "rollouts").iterdir()}
    assert len(before) == 2
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        sample = train.Collector.sample
        patch.setattr(train.Collector, "sample", lambda self, *step: steps.append(step[0]) or sample(self, *step))
        assert train.main(argv(place, name, **options, resume="auto")) == 0
    assert steps == [3, 4]
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    runs.assert_same_run(place / f"whole_{precision}", place / name)


def test_a_longer_run_does_not_take_the_shorter_one_s_final_for_its_own(place):
    assert train.main(argv(place, "longer", num_steps=2)) == 0
    again = argv(place, "longer", num_steps=4, resume="auto", final_eval=True)
    assert runs.start(again, place / "longer", before=killed("train:save_model", 1)).wait() == -signal.SIGKILL
    assert not (place / "longer" / "final").exists()
    assert train.main(again) == 0
    assert train.main(argv(place, "longer_at_once", num_steps=4)) == 0
    runs.assert_same_run(place / "longer_at_once", place / "longer")


def test_a_finished_run_prints_its_result_again_without_work(finished, place, capsys):
    directory, out = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train", "load_policy", "Sampler"):
            patch.setattr(train, name, None)
        patch.setattr(train, "compare_models", None)
        patch.setattr(train, "report", REPORT)
        assert train.main(argv(place, "finished", **OPTIONS, resume="auto")) == 0
    result = [line for line in out.splitlines() if not line.startswith(("step ", "trouble"))]
    assert capsys.readouterr().out.splitlines() == result and len(result) > 3
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before


def test_a_finished_run_asked_for_another_evaluation_makes_it_and_trains_no_more(place, capsys, monkeypatch):
    run = {"num_steps": 1, "final_eval": True}
    assert train.main(argv(place, "asked_again", **run)) == 0
    result = place / "asked_again" / "eval" / "eval.json"
    monkeypatch.setattr(train, "train", None)
    capsys.readouterr()
    for changes, n, grader in (({"final_eval_limit": 4}, 4, "gsm8k.correctness"), ({}, 7, "gsm8k.correctness"),
                               ({"eval_correct": "gsm8k.last_number"}, 7, "gsm8k.last_number")):  # fmt: skip
        assert train.main(argv(place, "asked_again", **run, **changes, resume="auto")) == 0
        assert [(cell["n"], cell["grader"]) for cell in json.loads(result.read_text())["cells"]] == [(n, grader)] * 2
        assert capsys.readouterr().out.count(f"{grader}  ") == 2


def test_another_evaluation_that_is_cut_short_goes_on_and_the_one_before_stays_until_then(place):
    run = {"num_steps": 1, "final_eval": True, "eval_batch": 2, "resume": "auto"}
    assert train.main(argv(place, "twice", **run, final_eval_limit=3)) == 0
    before = tree(place / "twice" / "eval")
    again = argv(place, "twice", **run)
    for limit in (4, 0):  # the second one begins anew beside what the first has left
        where = asked_to_stop("grpo.sampler:Sampler.generate", 2)
        cut = runs.start(argv(place, "twice", **run, final_eval_limit=limit), place / "twice", before=where)
        assert cut.wait() == 0, cut.stderr
        assert tree(place / "twice" / "eval") == before
        assert json.loads((place / "twice" / "eval.new" / "unfinished.json").read_text())["limit"] == limit
    runs.run(again, place / "twice")
    cells = json.loads((place / "twice" / "eval" / "eval.json").read_text())["cells"]
    assert [cell["n"] for cell in cells] == [7, 7] and not (place / "twice" / "eval.new").exists()


def test_resume_auto_without_a_checkpoint_starts_from_the_beginning(place):
    assert train.main(argv(place, "fresh", num_steps=2, resume="auto")) == 0
    assert [line["step"] for line in metrics(place / "fresh")] == [1, 2]


def test_a_run_can_start_from_another_run_s_final(finished, place, capsys):
    directory, _ = finished
    options = {"num_steps": 1, "learning_rate": 0.0, "model": directory / "final"}
    assert train.main(argv(place, "next", **options)) == 0
    assert f"base model: {directory / 'final'}\n" in capsys.readouterr().out
    first, second = weights(directory / "final"), weights(place / "next" / "final")
    assert all(torch.equal(first[name], second[name]) for name in first)


# Stopping.


def last_checkpoint(directory: Path) -> str:
    return kept(directory)[-1]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
def test_c59_a_signal_of_a_scheduler_finishes_the_step_and_saves(place, number):
    """Kind: a signal that announces an end ends the process at once, and nothing is saved."""
    name = f"announced_{int(number)}"
    again = argv(place, name, num_steps=3, checkpoint_every=0)
    process = runs.start(again, place / name, before=partial(_announced, number))
    assert process.wait() == 0, process.stderr
    assert kept(place / name) == ["step_000001"]


def _announced(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)  # also where nohup has started the tests
    at("grpo.update:clip_and_step", 1, partial(send, number))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["sigint", "sigterm"])
def test_a_signal_finishes_the_step_saves_and_ends_well(finished, place, number):
    directory, _ = finished
    name = f"asked_{int(number)}"
    again = argv(place, name, **OPTIONS, resume="auto")
    process = runs.start(again, place / name, before=asked_to_stop("grpo.update:clip_and_step", 9, number))
    assert process.wait() == 0, process.stderr  # asked inside step 3, a step without a checkpoint of its own
    assert [line["step"] for line in metrics(place / name)] == [1, 2, 3]
    assert last_checkpoint(place / name) == "step_000003"
    assert "asked to stop; saved after step 3" in process.stderr and "Traceback" not in process.stderr
    assert not (place / name / "final").exists()
    runs.run(again, place / name)
    runs.assert_same_run(directory, place / name)


def test_c65_a_stop_in_the_doctors_look_comes_before_the_first_step(place):
    """Kind: work before the first step that has no bound: a stop signal waited for all of it, and for a step."""
    again = argv(place, "looked", resume="auto")
    process = runs.start(again, place / "looked", before=asked_to_stop("grpo.doctor.facts:examine", 1))
    assert process.wait() == 0, process.stderr
    assert "asked to stop before step 1; go on with --resume auto" in process.stderr
    assert not list((place / "looked").iterdir())
    runs.run(argv(place, "looked", num_steps=1), place / "looked")


@pytest.mark.parametrize("changed", ["data", "model", "nothing"])
def test_c63_what_changes_between_a_stop_and_a_resume_is_said_or_refused(tmp_path, changed, capsys):
    """Kind: `config.yaml` names something that it does not hold; that changes, and the run goes on without a word."""
    model, problems = runs.save_digits(tmp_path / "model"), runs.write_problems(tmp_path / "data")
    capsys.readouterr()  # saving shows a bar
    begun = flags(model, problems, tmp_path, "x", num_steps=1)
    assert train.main(begun) == 0
    if changed == "data":
        runs.write_problems(tmp_path / "data", answer="1")
    if changed == "model":
        runs.save_digits(tmp_path / "model", seed=1)
    capsys.readouterr()
    code = train.main(flags(model, problems, tmp_path, "x", num_steps=2, resume="auto"))
    said = capsys.readouterr().err
    assert code == (2 if changed == "model" else 0)
    assert ("train.py: error: model: the weights in" in said) == (changed == "model")
    assert ("warning: data: the training problems of 'jsonl' have changed after step 1" in said) == (changed == "data")
    assert len(metrics(tmp_path / "x")) == (1 if changed == "model" else 2)


def test_what_learns_is_gone_before_the_group_it_sums_over(place, monkeypatch):
    """Gradients are summed by an object of the group; one that outlives it may wait for ever."""
    learners, alive = [], []

    def ask(learner, *arguments):
        learners.append(weakref.ref(learner))
        os.kill(os.getpid(), signal.SIGTERM)
        return learn(learner, *arguments)

    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", ask)
    monkeypatch.setattr(distributed, "shutdown", lambda: alive.append(learners[0]()))
    gc.disable()
    try:
        assert train.main(argv(place, "gone", num_steps=2)) == 0
    finally:
        gc.enable()
    assert alive == [None] and len(metrics(place / "gone")) == 1


def test_a_signal_from_outside(place):
    again = argv(place, "outside", num_steps=500, checkpoint_every=0, resume="auto")
    process = runs.start(again, place / "outside")
    runs.wait_until(lambda: process.stdout.count("\nstep ") > 1 or not process.running)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0, process.stderr
    done = len(metrics(place / "outside"))
    assert 1 < done < 500 and kept(place / "outside") == [f"step_{done:06d}"]


def test_a_second_signal_stops_at_once_and_an_echo_does_not(place):
    again = argv(place, "at_once", **OPTIONS, resume="auto")
    before = partial(at, "grpo.sampler:Sampler.generate", 5, partial(_twice, 2.2))  # the fourth one validates
    process = runs.start(again, place / "at_once", before=before)
    assert process.wait() == 128 + signal.SIGTERM
    assert [line["step"] for line in metrics(place / "at_once")] == [1, 2, 3]
    assert last_checkpoint(place / "at_once") == "step_000003"  # the best so far; step 4 was not finished
    before = partial(at, "grpo.sampler:Sampler.generate", 1, partial(_twice, 0.1))
    process = runs.start(again, place / "at_once", before=before)
    assert process.wait() == 0, process.stderr
    assert [line["step"] for line in metrics(place / "at_once")] == [1, 2, 3, 4]


def _twice(pause: float) -> None:
    send(signal.SIGTERM)
    time.sleep(pause)
    send(signal.SIGTERM)


def test_a_signal_in_the_final_evaluation_keeps_the_model(place):
    again = argv(place, "asked_late", num_steps=1, final_eval=True, eval_batch=2, resume="auto")
    where = asked_to_stop("grpo.sampler:Sampler.generate", 3)  # step 1, then batches of the evaluation
    process = runs.start(again, place / "asked_late", before=where)
    assert process.wait() == 0, process.stderr
    assert "the model is saved" in process.stderr and not (place / "asked_late" / "eval").exists()
    answered = (place / "asked_late" / "eval.new" / "tuned_0shots.jsonl").read_text()
    assert answered.count("\n") == 4
    runs.run(again, place / "asked_late")
    for line in answered.splitlines():
        assert line in (place / "asked_late" / "eval" / "tuned_0shots.jsonl").read_text().splitlines()
    assert not (place / "asked_late" / "eval.new").exists()
    assert (place / "asked_late" / "eval" / "eval.json").exists() and len(metrics(place / "asked_late")) == 1


def test_ranks_agree_on_the_step_they_stop_after(place):
    """Only rank 1 is asked: both stop after the same step, and both end well."""
    again = argv(place, "agreed", num_steps=50, resume="auto")
    where = asked_to_stop("grpo.sampler:Sampler.generate", 3, rank=1)
    ranks = runs.start_train_ranks(again, 2, place / "agreed", before=where)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert [line["step"] for line in metrics(place / "agreed")] == [1, 2, 3]
    assert last_checkpoint(place / "agreed") == "step_000003"


def _grade_otherwise() -> None:
    """As a grader does that runs into its time limit on one rank only: rank 0 sees a gain each time, rank 1 none."""
    grade, seen = grading.grade, iter((0.1, 0.2, 0.3) if os.environ["RANK"] == "0" else (0.1, 0.1, 0.1))

    def otherwise(rows: list[dict], options: EvalOptions) -> list[grading.Grades]:
        (grades,) = grade(rows, options)
        grades.cell["accuracy"] = next(seen)
        return [grades]

    grading.grade = otherwise


def test_ranks_agree_on_what_an_evaluation_found(place):
    options = {"num_steps": 3, "eval_every": 1, "checkpoint_every": 10, "ddp_timeout": 200}
    ranks = runs.start_train_ranks(argv(place, "found", **options), 2, place / "found", before=_grade_otherwise)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert [line["eval/accuracy"] for line in metrics(place / "found")] == [0.1, 0.2, 0.3]


def _problems_in_another_order() -> None:
    load = data.load
    data.load = lambda *arguments, **options: load(*arguments, **options)[:: -1 if os.environ["RANK"] == "1" else 1]


def test_ranks_that_were_given_other_problems_say_so(place):
    name = "given"
    ranks = runs.start_train_ranks(argv(place, name), 2, place / name, before=_problems_in_another_order)
    assert [rank.wait() for rank in ranks] == [2, 2], ranks[0].stderr
    assert all("data: processes were given different problems" in rank.stderr for rank in ranks)


def test_what_a_reward_fails_of_on_another_rank_is_said_too(place):
    ranks = runs.start_train_ranks(
        argv(place, "elsewhere", num_steps=1), 2, place / "elsewhere", before=_fail_on_rank_1
    )
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert "trouble: reward gsm8k.format failed for the first time: it broke" in ranks[0].stdout + ranks[0].stderr


def _fail_on_rank_1() -> None:
    score = RewardRunner.score

    def fail(runner, completions, problems, *told):
        runner.first_errors["gsm8k.format"] = "it broke"
        return score(runner, completions, problems)

    if os.environ["RANK"] == "1":
        RewardRunner.score = fail


@pytest.mark.parametrize("where", ["sampling", "validating"])
def test_out_of_memory_where_nothing_can_be_halved_is_one_sentence(place, capsys, monkeypatch, where):
    generate, calls = Sampler.generate, []

    def run_out(*arguments, **options):
        calls.append(options.get("purpose", "training"))
        if calls[-1] == ("training" if where == "sampling" else "evaluation"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(*arguments, **options)

    monkeypatch.setattr(Sampler, "generate", run_out)
    said = refused(place, capsys, f"full_{where}", eval_every=1)
    assert "lower prompts_per_step, group_size, max_new_tokens or eval_batch (CUDA out of memory. Tried" in said


@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_rank_dies_the_other_stops_with_an_error(place, lost):
    name = f"lost_{lost}"
    where = killed("grpo.update:Learner._loss", 5, rank=lost)
    ranks = runs.start_train_ranks(argv(place, name, num_steps=50), 2, place / name, before=where)
    assert ranks[lost].wait() == -signal.SIGKILL
    assert ranks[1 - lost].wait() == 1  # within half of `ddp_timeout`: it is told, it does not wait for that
    assert len(metrics(place / name)) < 50 and not (place / name / "final").exists()
    said = [line for line in ranks[1 - lost].stderr.splitlines() if not line.startswith(("warning:", "trouble:"))]
    assert "train.py: error: another process ended, or did not answer" in said[-1] and "Traceback" not in "".join(said)


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed(place):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    command = [*launch, *argv(place, "torchrun", num_steps=5000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=runs.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    runs.wait_until(lambda: (place / "torchrun" / "rollouts" / "step_000002.jsonl").exists())
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode != 0


# What goes wrong.


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(place: Path, capsys, name: str, **changes) -> str:
    """The one sentence with which it is refused, exit code 2."""
    capsys.readouterr()
    try:
        code = train.main(argv(place, name, **changes))
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    sentences = [line for line in err.splitlines() if not line.startswith(("warning:", "sure:"))]
    assert len(sentences) == 1 and sentences[0].startswith("train.py: error: "), err
    return sentences[0].removeprefix("train.py: error: ")


def test_an_existing_run_is_an_error_and_stays_as_it_is(finished, place, capsys):
    directory, _ = finished
    before = tree(directory)
    assert "exists already; continue it with --resume auto" in refused(place, capsys, "finished")
    assert "learning_rate is 0.5, but the run to resume has 0.01" in refused(
        place, capsys, "finished", **OPTIONS | {"resume": "auto", "learning_rate": 0.5}
    )
    assert tree(directory) == before
    other = place / "not_a_run"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "exists already" in refused(place, capsys, "not_a_run")
    assert tree(other) == {str(other / "thesis.txt"): b"mine"}


def test_a_run_that_can_not_go_on_keeps_what_it_has(place, capsys):
    """Wrong options for a new evaluation, a damaged checkpoint, none that is complete, somebody else at work."""
    options = OPTIONS | {"num_steps": 2, "final_eval": True, "resume": "auto", "schedule": "constant"}
    assert train.main(argv(place, "precious", **options)) == 0
    directory = place / "precious"
    before = tree(directory)
    for mistake, said in (
        ({"eval_correct": "gsm8k.nope"}, "'gsm8k.nope' is not one of"),
        ({"eval_shots": "0,99"}, "num_shots: 99"),
    ):
        assert said in refused(place, capsys, "precious", **options | mistake)
        assert tree(directory) == before
    newest = directory / "checkpoints" / "step_000002" / "optimizer.pt"
    newest.write_bytes(b"x" * newest.stat().st_size)
    damaged = tree(directory)
    assert "step_000002 does not match its check sums" in refused(
        place, capsys, "precious", **options | {"num_steps": 3}
    )
    assert tree(directory) == damaged
    for checkpoint in (directory / "checkpoints").iterdir():
        (checkpoint / "optimizer.pt").write_bytes(b"x")
    cut = tree(directory)
    assert "step_000002 in" in refused(place, capsys, "precious", **options | {"num_steps": 3})
    assert tree(directory) == cut
    held = lock_directory(directory)
    assert "another process works in" in refused(place, capsys, "precious", **options)
    os.close(held)


def test_c63_what_is_missing_beside_checkpoints_or_was_done_already_is_said(place, capsys):
    """The kind: config.yaml names what a run was, and something of it has changed between a stop and a resume."""
    options = {"num_steps": 2, "checkpoint_every": 1, "resume": "auto"}
    assert train.main(argv(place, "lost", **options)) == 0
    directory = place / "lost"
    assert "num_steps is 1: must be at least 2, the steps that the run has done" in refused(
        place, capsys, "lost", **options | {"num_steps": 1}
    )
    config = (directory / "config.yaml").read_text()
    for change in ((directory / "config.yaml").unlink, partial((directory / "config.yaml").write_text, "")):
        change()
        before = tree(directory)
        assert "config.yaml is missing or empty" in refused(place, capsys, "lost", **options)
        assert tree(directory) == before
    (directory / "config.yaml").write_text(config)
    shutil.rmtree(directory / "final")
    (directory / "final").touch()
    assert "final is in the way: must be a directory" in refused(place, capsys, "lost", **options | {"num_steps": 3})


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("seed", 2**63, "seed is 9223372036854775808: must be a whole number >= 0 and < 2**63"),
        ("data", "gsm9k", "data: 'gsm9k' is not one of arithmetic, "),
        ("data_path", "/nowhere", "data_path: /nowhere"),
        ("model", "/nowhere", "model: '/nowhere' can not be loaded"),
        ("loss", "ppo", "loss is 'ppo': must be one of grpo, gspo, "),
        ("advantage", "gae", "advantage is 'gae': must be one of grpo, dr_grpo, rloo"),
        (
            "weighting",
            "mean",
            "weighting is 'mean': must be one of token_mean, sequence_mean, prompt_mean, constant_length",
        ),
        ("kl", "k4", "kl is 'k4': must be one of k1, k2, k3"),
        ("rewards", "gsm8k.nope,gsm8k.format", "rewards: 'gsm8k.nope' is not one of"),
        ("eval_correct", "gsm8k.nope", "'gsm8k.nope' is not one of"),
        ("max_prompt_tokens", 4, "max_prompt_tokens: "),
        ("num_shots", 2, "num_shots: 2 is not 0"),
        ("chat", True, "chat: True needs a tokenizer with a chat template"),
        ("lerning_rate", 1, "--lerning_rate is not an option; did you mean learning_rate?"),
        ("num_steps", "ten", "--num_steps is 'ten': must be a whole number"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_in_the_way(place, capsys, option, value, sentence):
    name = f"mistake_{option}"
    assert sentence in refused(place, capsys, name, **{"final_eval": True, option: value})
    assert not (place / name).exists() or not list((place / name).iterdir())


def test_a_mistake_mended_runs_without_another_name(place, capsys):
    refused(place, capsys, "mended", loss="ppo")
    assert train.main(argv(place, "mended", num_steps=1)) == 0


def test_a_path_that_can_not_be_written_is_one_sentence(place, capsys):
    (place / "a_file").write_text("")
    assert f"out_dir: {place}/a_file/x can not be made" in refused(place, capsys, "x", out_dir=place / "a_file")
    assert "out_dir: /proc/nowhere/x can not be made" in refused(place, capsys, "x", out_dir="/proc/nowhere")


def _small_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


FULL = {
    "transcripts": ("train:write_transcripts", 2, 400),
    "metrics": ("grpo.run.log:Log.write", 4, 2000),
    "checkpoint": ("grpo.run.checkpoint:save", 1, 10_000),
    "final": ("train:save_model", 1, 10_000),
}


@pytest.mark.parametrize(("where", "call", "size"), FULL.values(), ids=FULL.keys())
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(place, where, call, size, request):
    """As a limit on the size of a file, which is the same error to the program."""
    name = f"full_{request.node.callspec.id}"
    again = argv(place, name, resume="auto", num_steps=4)
    process = runs.start(again, place / name, before=partial(at, where, call, partial(_small_files, size)))
    assert process.wait() == 2, process.stderr
    (last,) = [line for line in process.stderr.splitlines() if not line.startswith(("warning", "sure"))]
    assert last.startswith("train.py: error: cannot write") and "File too large" in last
    assert "Traceback" not in process.stderr
    runs.run(again, place / name)
    runs.run(argv(place, f"{name}_not", num_steps=4), place / f"{name}_not")
    runs.assert_same_run(place / f"{name}_not", place / name)


# The algorithm, through the whole run.


@pytest.mark.parametrize(("asked", "dtype"), [({}, torch.float32), ({"final_dtype": "base"}, torch.bfloat16)])
def test_final_keeps_what_the_base_models_dtype_would_round_away(place, tmp_path, asked, dtype):
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    runs.digit_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").symlink_to(place / "data")
    assert train.main(argv(tmp_path, "run", num_steps=2, precision="fp32", **asked)) == 0
    final, stored = weights(tmp_path / "run" / "final"), weights(tmp_path / "run" / "checkpoints" / "step_000002")
    learned = {name.removeprefix("model."): tensor for name, tensor in stored.items()}  # of Policy.model
    shared = final.keys() & learned.keys()
    assert shared and all(torch.equal(final[name], learned[name].to(dtype)) for name in shared)
    assert dtype == torch.bfloat16 or not all(torch.equal(final[n], final[n].bfloat16().float()) for n in shared)


def test_without_a_kl_no_reference_is_made(place, monkeypatch):
    made, make = [], update.reference_of
    monkeypatch.setattr(update, "reference_of", lambda policy: made.append(1) or make(policy))
    assert train.main(argv(place, "no_kl", kl_coef=0, num_steps=2)) == 0
    assert not made and all(line["policy/kl"] is None for line in metrics(place / "no_kl"))
    assert train.main(argv(place, "kl", num_steps=2)) == 0
    assert made == [1]
    assert metrics(place / "kl")[0]["policy/kl"] == 0.0 < metrics(place / "kl")[1]["policy/kl"]


def test_compiling_is_for_policy_and_reference_and_off_on_a_cpu(place, monkeypatch):
    seen = []
    monkeypatch.setattr(update, "compile_layers", lambda *policies: seen.append(policies))
    assert train.main(argv(place, "plain", num_steps=1)) == 0 and not seen
    assert train.main(argv(place, "compiled", num_steps=1, compile=True)) == 0
    ((policy, reference),) = seen
    assert next(policy.parameters()).requires_grad and not next(reference.parameters()).requires_grad


def spoil(monkeypatch, calls: set[int]) -> None:
    """Advantages of the so-many-th steps of this process (from 1) are NaN."""
    done = []

    def spoilt(rewards, valid=None):
        done.append(1)
        return rewards * torch.nan if len(done) in calls else rewards - rewards.mean(-1, keepdim=True)

    monkeypatch.setitem(ADVANTAGES, "grpo", spoilt)


def test_three_steps_in_a_row_without_a_finite_gradient_stop_the_run(place, monkeypatch, capsys):
    spoil(monkeypatch, {3, 4, 5})
    assert train.main(argv(place, "spoilt", num_steps=9, checkpoint_every=0)) == 1
    err = capsys.readouterr().err
    assert "the gradient was not finite in 3 steps in a row" in err and "Traceback" not in err
    lines = metrics(place / "spoilt")
    assert [line["optim/skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert [line["optim/grad_norm"] is None for line in lines] == [False, False, True, True, True]
    assert kept(place / "spoilt") == ["step_000005"] and not (place / "spoilt" / "final").exists()
    spoil(monkeypatch, set())
    assert train.main(argv(place, "good", num_steps=2, checkpoint_every=0)) == 0
    saved = weights(place / "spoilt" / "checkpoints" / "step_000005")
    good = weights(place / "good" / "checkpoints" / "step_000002")
    assert saved.keys() == good.keys() and all(torch.equal(saved[name], good[name]) for name in good)
    assert train.main(argv(place, "spoilt", num_steps=9, checkpoint_every=0, resume="auto")) == 0


def test_two_bad_steps_are_skipped_and_counted(place, monkeypatch):
    spoil(monkeypatch, {1, 2, 4})
    assert train.main(argv(place, "skipped", num_steps=5)) == 0
    assert [line["optim/skipped"] for line in metrics(place / "skipped")] == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(("precision", "gap"), [("fp64", 1e-12), ("fp32", 1e-4), ("bf16", 0.05), ("fp16", 0.02)])
def test_every_precision_runs(place, precision, gap):
    options = {"precision": precision, "num_steps": 3, "learning_rate": 1e-3, "minibatch_size": 0}
    assert train.main(argv(place, precision, **options)) == 0
    for line in metrics(place / precision):
        assert line["policy/sampler_gap_mean"] < gap
        assert line["policy/ratio_mean"] == 1.0 and line["policy/clip_fraction"] == 0.0
        assert line["optim/skipped"] == 0
    assert metrics(place / precision)[0]["policy/kl"] == 0.0  # C22: the reference sees what the policy sees
    assert metrics(place / precision)[-1]["policy/kl"] > 0 or precision == "fp16"
    dtype = torch.float64 if precision == "fp64" else torch.float32
    assert {tensor.dtype for tensor in weights(place / precision / "final").values()} == {dtype}


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_a_run_leaves_the_process_as_it_was(place, precision, ends):
    """Default dtype, deterministic algorithms, environment and handlers of signals."""

    def seen() -> tuple:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        torch_ = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
        return *torch_, torch.utils.deterministic.fill_uninitialized_memory, dict(os.environ), handlers

    before = seen()
    assert before[:2] == (torch.float32, False)
    wrong = {} if ends == "well" else {"eval_correct": "gsm8k.nope"}
    options = {"precision": precision, "num_steps": 1, "final_eval": True, **wrong}
    assert train.main(argv(place, f"leaves_{precision}_{ends[0]}", **options)) == (2 if wrong else 0)
    assert seen() == before


@pytest.mark.parametrize("option", ["mask_truncated", "activation_checkpointing"])
def test_an_option_of_learning_runs(place, option):
    assert train.main(argv(place, option, **{option: True})) == 0
    assert train.main(argv(place, f"not_{option}")) == 0
    ours, theirs = metrics(place / option), metrics(place / f"not_{option}")
    assert ours[0]["reward/mean"] == theirs[0]["reward/mean"]
    if option == "activation_checkpointing":  # memory, and no result
        assert [line["optim/grad_norm"] for line in ours] == [line["optim/grad_norm"] for line in theirs]
    else:
        assert ours[0]["optim/grad_norm"] != theirs[0]["optim/grad_norm"]


def test_a_run_of_truncated_completions_only_teaches_nothing(place):
    options = {"mask_truncated": True, "max_new_tokens": 1, "num_steps": 2}
    assert train.main(argv(place, "cut", **options)) == 0
    base, tuned = weights(place / "model"), weights(place / "cut" / "final")
    lines = metrics(place / "cut")
    assert lines[0]["completion/truncated"] < 1 or all(torch.equal(base[name], tuned[name].float()) for name in base)
