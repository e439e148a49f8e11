"""A sweep runs what is not done, survives what fails, and averages over seeds with an interval that says what it is."""

import csv
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.advantages import ADVANTAGES
from grpo.config import Config, from_yaml
from grpo.corrections import CORRECTIONS
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.report import heat_map
from grpo.sweep import __main__ as command
from grpo.sweep.cells import Cell, Sweep, make_cells, split_flags
from grpo.sweep.table import as_markdown, center, differences, interval, tabulate
from grpo.weighting import WEIGHTINGS
from tests.fakes import runs

FAKE = """
import json, sys
from pathlib import Path
from grpo.config import parse_args, to_yaml
from grpo.options import write_yaml
from grpo.evaluation.protocol import options_of
config = parse_args(sys.argv[2:])
directory = Path(config.out_dir) / config.run_name
with open(Path(config.out_dir).parent / "calls", "a") as calls:
    calls.write(config.run_name + "\\n")
if config.seed == 9:
    sys.exit(3)
(directory / "eval").mkdir(parents=True, exist_ok=True)
to_yaml(config, directory / "config.yaml")
if config.seed == 8:
    sys.exit(0)  # asked to stop
cells = [
    {"model": model, "shots": shots, "grader": config.eval_correct, "n": 50, "accuracy": accuracy}
    | {"ci95": [accuracy - 0.1, accuracy + 0.1], "stop": "stop_string", "lenient_accuracy": None}
    | {"format_rate": 1.0, "finished": 1.0, "mean_tokens": 9.0}
    for model, gain in (("base", 0.0), ("tuned", 0.1 * config.num_shots + 0.2))
    for shots in config.eval_shots or (config.num_shots,)
    for accuracy in [0.1 + 0.01 * shots + 0.02 * config.seed + gain]
]
write_yaml(options_of(config, directory / "eval"), directory / "eval" / "options.yaml")
(directory / "eval" / "eval.json").write_text(json.dumps({"cells": cells, "paired": [], "split": [], "format": []}))
"""


class InThisProcess(nullcontext):
    """A command that is run at once instead of in a process: `python fake.py train.py ARGUMENTS`."""

    def __init__(self, command, **_):
        assert list(command[:2]) == ["python", "fake.py"]
        super().__init__(self)
        self.argv = command[1:]

    def poll(self) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", self.argv)
            try:
                exec(FAKE, {})
            except SystemExit as ended:
                return ended.code
        return 0


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Sweeps with a train.py that only pretends; returns exit code, calls made and what was said."""
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=None))
    monkeypatch.setattr(command, "PAUSE", 0)

    def call(*argv: str):
        (tmp_path / "calls").write_text("")
        out = ["--out", str(tmp_path / "out"), "--launcher", "python fake.py"]
        code = command.main([*argv, *out])
        said = capsys.readouterr()
        return code, (tmp_path / "calls").read_text().split(), said.out, said.err

    return call


def test_every_cell_is_run_once_and_evaluated_at_all_shots(launch, tmp_path):
    code, calls, out, _ = launch("--grid", "num_shots=0,2", "seed=0,1,2", "--eval-shots", "0,4")
    assert code == 0
    assert calls == [f"num_shots={n},seed={s}" for n in (0, 2) for s in (0, 1, 2)]
    assert "fake.py" in out and "--resume auto" in out and "--eval_shots 0 4" in out
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert len(rows) == 8
    row = next(r for r in rows if (r["model"], r["train"], r["eval_shots"]) == ("tuned", "num_shots=2", "4"))
    assert float(row["accuracy"]) == pytest.approx(0.1 + 0.04 + 0.02 + 0.4)
    assert (row["seeds"], row["interval"]) == ("3", "95 % t over 3 seeds")
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["state"] for run in written["runs"]] == ["done"] * 6
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_a_recipe_is_that_of_every_run(launch, tmp_path):
    (tmp_path / "recipe.yaml").write_text("run_name: other\nnum_steps: 7\nnum_shots: 2\n")
    code, calls, out, _ = launch("--recipe", str(tmp_path / "recipe.yaml"), "--grid", "seed=0,1")
    assert (code, calls) == (0, ["seed=0", "seed=1"])
    assert out.count(f"--recipe {tmp_path / 'recipe.yaml'} ") == 2
    saved = from_yaml(tmp_path / "out" / "seed=1" / "config.yaml")
    assert (saved.num_steps, saved.num_shots, saved.run_name) == (7, 2, "seed=1")


def test_a_cell_that_is_done_is_not_run_again(launch):
    launch("--grid", "seed=0,1")
    code, calls, out, _ = launch("--grid", "seed=0,1,2")
    assert (code, calls) == (0, ["seed=2"])
    assert out.count("done before") == 2


@pytest.mark.parametrize(
    ("first", "done", "again"),
    [
        (["--eval_shots", "0,4"], ["--eval_shots", "4"], ["--eval_shots", "0,8"]),
        (["--final_eval_limit", "50"], ["--final_eval_limit", "50", "--eval_batch", "8"], ["--final_eval_limit", "60"]),
        (["--num_steps", "5"], ["--num_steps", "5"], ["--num_steps", "6"]),
        (["--num_steps", "5"], ["--num_steps", "5"], ["--num_steps", "4"]),  # for train.py to refuse
        ([], [], ["--temperature", "0.9"]),  # for train.py to refuse
    ],
)
def test_a_cell_is_run_again_for_more_shots_problems_or_steps_and_for_other_options(launch, first, done, again):
    grid = ("--grid", "seed=0")
    assert launch(*grid, *first)[1] == ["seed=0"]
    assert launch(*grid, *done)[1] == []
    assert launch(*grid, *again)[1] == ["seed=0"]


def test_a_failing_cell_stops_no_other_and_is_reported(launch, tmp_path):
    code, calls, out, err = launch("--grid", "seed=9,8,0")
    assert (code, calls) == (1, ["seed=9", "seed=8", "seed=0"])
    assert "seed=9: failed with exit code 3" in err and "seed=8: stopped before it was evaluated" in err
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    states = [run["state"] for run in written["runs"]]
    assert states == ["failed with exit code 3", "stopped before it was evaluated", "done"]
    assert {row["seeds"] for row in written["table"]} == {1}


@pytest.mark.parametrize("file", ["config.yaml", "eval/eval.json", "eval/options.yaml"])
def test_a_damaged_cell_is_one_that_is_not_done(launch, tmp_path, file):
    launch("--grid", "seed=0,1")
    (tmp_path / "out" / "seed=0" / file).write_text("{")
    code, calls, _, _ = launch("--grid", "seed=0,1")
    assert (code, calls) == (0, ["seed=0"])


def test_no_table_of_an_earlier_sweep_stays_where_nothing_is_done(launch, tmp_path):
    launch("--grid", "seed=0")
    assert launch("--grid", "seed=9")[0] == 1
    assert [path.name for path in (tmp_path / "out").glob("sweep.*")] == ["sweep.json"]


def test_numbers_of_settings_are_read_as_in_a_recipe(tmp_path):
    (tmp_path / "settings.yaml").write_text("a: &a {seed: 010, learning_rate: 1e-5}\nb: {<<: *a, chat: yes}\n")
    with pytest.raises(SystemExit):  # `yes` is True in YAML 1.1, and no word of a recipe
        make_cells(Sweep(("lag=0",), settings=str(tmp_path / "settings.yaml")), [])
    (tmp_path / "settings.yaml").write_text("a: &a {seed: 010, learning_rate: 1e-5}\nb: {<<: *a, chat: true}\n")
    cells = make_cells(Sweep(("lag=0",), settings=str(tmp_path / "settings.yaml")), [])
    assert [(c.config.seed, c.config.learning_rate, c.config.chat) for c in cells] == [
        (10, 1e-5, False),
        (10, 1e-5, True),
    ]


@pytest.mark.parametrize("launcher", ["'python", "", "nonesuch-program -n 8"])
def test_a_launcher_that_is_none_is_one_sentence(tmp_path, launcher):
    with pytest.raises(ValueError, match="^launcher is "):
        make_cells(Sweep(("seed=0",), out=str(tmp_path), launcher=launcher), [])


def test_eval_shots_are_those_of_the_grid_if_nothing_else_is_said(tmp_path):
    cells = make_cells(Sweep(("num_shots=8", "0"), out=str(tmp_path)), [])
    assert [cell.config.eval_shots for cell in cells] == [(0, 8), (0, 8)]
    (cell,) = make_cells(Sweep(("seed=0",), out=str(tmp_path)), ["--num_shots", "3"])
    assert cell.config.eval_shots is None


def test_the_command_starts_the_same_run_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.sweep.cells.shutil.which", lambda program: program)
    grid = ("model=a/b", "learning_rate=1e-5")
    (cell,) = make_cells(Sweep(grid, out=str(tmp_path), launcher="torchrun --nproc_per_node 8"), ["--chat"])
    assert cell.command[:3] == ("torchrun", "--nproc_per_node", "8")
    assert cell.command[3] == str(runs.ROOT / "train.py")
    assert cell.config.run_name == "model=a-b,learning_rate=1e-5"
    assert (cell.config.model, cell.config.learning_rate, cell.config.chat) == ("a/b", 1e-5, True)
    assert (cell.config.final_eval, cell.config.resume) == (True, "auto")


@pytest.mark.parametrize(
    ("grid", "flags", "said"),
    [
        (("seeed=0",), [], "seeed must be an option of train.py, once; did you mean seed?"),
        (("run_name=a",), [], "run_name must be an option of train.py"),
        (("seed=0", "seed=1"), [], "seed must be an option of train.py, once"),
        (("seed=",), [], "must be option=value,value"),
        (("0",), [], "must be option=value,value"),
        (("seed=0", "0"), [], "two cells are called 'seed=0'"),
        (("seed=0",), ["--seed", "1"], "--seed is set by the sweep itself"),
        (("seed=0",), ["--out_dir=x"], "--out_dir is set by the sweep itself"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, grid, flags, said):
    with pytest.raises(ValueError) as error:
        make_cells(Sweep(grid, out=str(tmp_path / "out")), flags)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_flags_go_to_whom_they_belong():
    argv = ["--rewards", "a", "b", "--grid", "seed=0", "1", "--num_steps=3", "--eval-shots", "0", "8", "--chat"]
    ours, theirs = split_flags(argv)
    assert ours == ["--grid", "seed=0", "1", "--eval-shots", "0", "8"]
    assert theirs == ["--rewards", "a", "b", "--num_steps=3", "--chat"]


def test_intervals_over_seeds():
    assert interval([0.5], [0.4, 0.6]) == (0.5, 0.4, 0.6, "95 % over problems")
    assert interval([0.5, 0.3], [0.4, 0.6]) == (0.4, 0.3, 0.5, "min..max of 2 seeds")
    mean, low, high, kind = interval([0.4, 0.5, 0.6], [0.0, 1.0])
    half = 4.302653 * 0.1 / 3**0.5  # t of 2 degrees of freedom at 97.5 %
    assert (mean, low, high) == (pytest.approx(0.5), pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert kind == "95 % t over 3 seeds"
    assert interval([0.0, 0.0, 0.3], [0.0, 1.0])[1] == 0.0
    assert interval([0.5] * 3, [0.4, 0.6]) == (0.5, 0.4, 0.6, "95 % over problems")
    assert center([0.3 - 0.2, 0.2 - 0.1, 0.1])[1:] == (pytest.approx(0.1), pytest.approx(0.1), "the same with 3 seeds")


def test_the_untuned_model_is_one_row_if_it_does_not_depend_on_the_setting(monkeypatch, tmp_path):
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_yticks", lambda axes, ticks, names: labels.append(names))

    def cell(setting: dict, base: float):
        rows = [{"model": "base", "accuracy": base}, {"model": "tuned", "accuracy": 0.5}]
        return Cell(setting, Config(), ()), [{"shots": 0, "ci95": [0, 1], "n": 5, **row} for row in rows]

    for second in (0.1, 0.2):
        table = tabulate([cell({"num_shots": "0"}, 0.1), cell({"num_shots": "2"}, second)])
        heat_map(table, tmp_path / "map.png")
    tuned = ["num_shots=0", "num_shots=2"]
    assert labels == [[*tuned, "untuned"], [*tuned, "untuned, num_shots=0", "untuned, num_shots=2"]]


def test_settings_with_their_intervals_and_gains_as_markdown():
    """Accuracies by seed: a 0.2, 0.4; b 0.3, 0.7; c 0.3, 0.5, which is 0.1 more than a with both seeds."""
    seeds = {"a": (0.2, 0.4), "b": (0.3, 0.7), "c": (0.3, 0.5)}
    done = [
        (Cell({"setting": name, "seed": str(seed)}, Config(), ()), [ROW | {"accuracy": accuracy}])
        for name, accuracies in seeds.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    kind = "(min..max of 2 seeds)"
    assert as_markdown(tabulate(done), differences(done, "a")).splitlines() == [
        "| trained with | shots | accuracy | interval | against a, points | interval |",
        "|---|--:|--:|---|--:|---|",
        f"| b | 0 | 0.500 | 0.300 .. 0.700 {kind} | +20.0 | +10.0 .. +30.0 {kind} |",
        f"| c | 0 | 0.400 | 0.300 .. 0.500 {kind} | +10.0 | +10.0 .. +10.0 (the same with 2 seeds) |",
        f"| a | 0 | 0.300 | 0.200 .. 0.400 {kind} | | |",
    ]
    assert differences(done[1:], "a") == [], "one seed in common gives no interval"
    assert differences(done[2:], "a") == [], "no other takes the place of the first setting"


ROW = {"model": "tuned", "shots": 0, "ci95": [0, 1], "n": 5}


def test_a_real_run(tmp_path, capfd):
    runs.save_digits(tmp_path / "model")
    runs.write_problems(tmp_path / "data")
    options = {"model": tmp_path / "model", "data": "jsonl", "data_path": tmp_path / "data", "num_steps": 1}
    options |= {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4, "precision": "fp32"}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    argv += ["--grid", "seed=1", "--out", str(tmp_path / "out")]
    assert command.main(argv) == 0
    assert "step 1/1" in capfd.readouterr().out
    assert (tmp_path / "out" / "seed=1" / "final").is_dir()
    assert command.main(argv) == 0
    assert "seed=1: done before" in capfd.readouterr().out
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())["table"]
    assert [(row["model"], row["n"], row["interval"]) for row in table] == [
        ("base", 7, "95 % over problems"),
        ("tuned", 7, "95 % over problems"),
    ]
    assert Path(tmp_path / "out" / "sweep.png").exists()


def test_settings_of_a_file_are_trained_at_every_point_of_the_grid(launch, tmp_path):
    (tmp_path / "settings.yaml").write_text(
        "plain: {}\nno clip, one reward: {clip_low: 1, rewards: [gsm8k.correctness], reward_weights: [1]}\n"
    )
    code, calls, out, _ = launch("--settings", str(tmp_path / "settings.yaml"), "--grid", "seed=0,1")
    assert code == 0 and calls == [f"{name},seed={s}" for name in ("plain", "no-clip,-one-reward") for s in (0, 1)]
    assert out.count("--rewards gsm8k.correctness --reward_weights 1 --seed") == 2
    assert from_yaml(tmp_path / "out" / "no-clip,-one-reward,seed=1" / "config.yaml").clip_low == 1
    rows = {
        row["train"]: row for row in csv.DictReader((tmp_path / "out" / "sweep.csv").open()) if row["model"] == "tuned"
    }
    assert list(rows) == ["plain", "no clip, one reward"] and rows["plain"]["seeds"] == "2"
    assert "| no clip, one reward | 0 |" in (tmp_path / "out" / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("a: {los: gspo}", [], "a: 'los' must be an option of train.py; did you mean loss?"),
        ("a: {run_name: x}", [], "'run_name' must be an option"),
        ("[1, 2]", [], "must hold names"),
        ("a: 3", [], "must hold names"),
        ("a: {", [], "cannot be read"),
        ("a: {loss: gspo}", ["--loss", "grpo"], "--loss is set by the sweep itself"),
        ("a: {seed: 3}", [], "--seed is set by the sweep itself"),
        ("a: {}\na: {loss: gspo}", [], "a stands more than once in"),
        ("a: {loss: gspo, loss: cispo}", [], "loss stands more than once in"),
        ("a: {loss: gspoo}", [], "a,seed=0: loss is 'gspoo': must be one of"),
        ("a: {clip_low: 0.20}\nb: {clip_low: 2e-1}", [], "a,seed=0 and b,seed=0 are the same run"),
    ],
)
def test_wrong_settings_are_one_sentence(launch, tmp_path, text, flags, said):
    (tmp_path / "settings.yaml").write_text(text)
    code, calls, _, err = launch("--settings", str(tmp_path / "settings.yaml"), "--grid", "seed=0", *flags)
    assert (code, calls) == (2, []) and said in err and err.count("\n") == 1
    assert launch("--settings", str(tmp_path / "gone.yaml"), "--grid", "seed=0")[0] == 2


def test_several_jobs_run_side_by_side_with_a_file_and_some_cores_each(tmp_path, monkeypatch):
    started = []

    class Waiting:
        def __init__(self, command, stdout=None, env=None, **_):
            started.append((command[command.index("--run_name") + 1], stdout.name, env["OMP_NUM_THREADS"]))
            self.looks = 0

        def poll(self):
            self.looks += 1
            return 3 if self.looks > len(started) else None

        def terminate(self):
            started.append("terminated")

        wait = terminate

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=Waiting, STDOUT=None))
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(command, "PAUSE", 0)
    cells = make_cells(Sweep(("seed=0", "1", "2"), out=str(tmp_path / "out"), jobs=2), [])
    ended = command.run_cells(cells, 2)
    assert next(ended) == (cells[0], "failed with exit code 3")
    assert started == [(f"seed={s}", f"{tmp_path / 'out' / f'seed={s}'}.txt", "4") for s in (0, 1)]
    ended.close()
    assert started[2:] == ["terminated"] * 2, "the run that goes on is told to stop, and waited for"


def test_differences_are_to_the_first_setting_seed_by_seed():
    def cell(seed: int, clip: float, accuracy: float):
        setting = {"clip_low": str(clip), "seed": str(seed)}
        return Cell(setting, Config(), ()), [{"model": "tuned", "shots": 0, "accuracy": accuracy}]

    done = [cell(0, 0.1, 0.2), cell(1, 0.1, 0.4), cell(0, 0.2, 0.3), cell(1, 0.2, 0.7), cell(1, 0.3, 0.9)]
    (row,) = differences(done, "clip_low=0.1")
    kind = "min..max of 2 seeds"
    about = {"train": "clip_low=0.2", "against": "clip_low=0.1", "eval_shots": 0, "seeds": 2, "interval": kind}
    assert row == about | {
        name: pytest.approx(value) for name, value in (("difference", 0.2), ("low", 0.1), ("high", 0.3))
    }
    (row,) = differences([*done[:4], cell(2, 0.1, 0.5), cell(2, 0.2, 0.7)], "clip_low=0.1")
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with 2 degrees of freedom; the gains 0.1, 0.3, 0.2 scatter by 0.1
    assert [row[name] for name in ("difference", "low", "high")] == pytest.approx([0.2, 0.2 - half, 0.2 + half])


def test_the_gallery_shows_every_entry_of_every_table():
    file = str(Path(__file__).parents[2] / "recipes" / "sweeps" / "gallery.yaml")
    shown = [cell.config for cell in make_cells(Sweep(("seed=0",), settings=file), ["--minibatch_size", "32"])]
    tables = {
        "loss": LOSSES,
        "advantage": ADVANTAGES,
        "weighting": WEIGHTINGS,
        "kl": KL,
        "sampler_correction": CORRECTIONS,
    }
    for option, table in tables.items():
        assert {getattr(config, option) for config in shown} == {*table}, option
