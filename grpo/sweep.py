"""Train every cell of a grid, evaluate it at several numbers of shots, and show the results as a table and a heat map.

    python -m grpo.sweep --recipe recipes/demo.yaml --grid num_shots=0,2,8 seed=0,1,2 --eval_shots 0,2,8

Every cell is a process of its own that runs `train.py` in `<out>/<cell>` with `--resume auto`:

- a finished cell is not run again;
- a stopped cell continues;
- a failed cell is reported, and the others still run.

The evaluation is the final one of each run. Further flags of `train.py` go to every cell. Left out: running cells in
parallel, and searching for the best setting.
"""

import csv
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy import stats

from grpo import options
from grpo.config import Config, from_yaml, parse_args
from grpo.evaluation.headline import read_result
from grpo.evaluation.protocol import is_evaluated, options_of
from grpo.files import write_whole
from grpo.report import heat_map
from grpo.run.directory import check_resumable
from grpo.run.signals import STOPS

OURS = ("run_name", "out_dir", "resume", "check", "final_eval", "eval_shots")
"""Options of a run that the sweep sets itself."""
DONE = "done"


@dataclass(frozen=True)
class Sweep:
    """Train every cell of a grid with train.py, and show accuracy by training setting and shots in the evaluation.

    All further flags, such as --recipe FILE, are flags of train.py and go to every cell.
    """

    grid: tuple[str, ...]
    """Options to vary, each as option=value,value,... For example: num_shots=0,2,8 seed=0,1,2."""
    eval_shots: tuple[int, ...] | None = None
    """Numbers of worked examples to evaluate with; None: the num_shots of the grid, or the recipe's."""
    out: str = "runs/sweep"
    """Directory for the runs, the table and the picture."""
    launcher: str = sys.executable
    """Command that starts train.py, such as "torchrun --nproc_per_node 8"."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    setting: dict[str, str]
    """{option: value}, as in the grid."""
    config: Config
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.config.run_name

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.out_dir) / self.name

    @property
    def trained_as(self) -> str:
        """The setting without its seed. Runs with the same one are averaged."""
        return " ".join(f"{name}={value}" for name, value in self.setting.items() if name != "seed") or "all"


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split into (words for the sweep, words for train.py). A flag takes all words up to the next flag with it."""
    known = {field.name for field in fields(Sweep)} | {"help"}
    ours: list[str] = []
    theirs: list[str] = []
    target = ours
    for word in argv:
        if word == "-h" or word.startswith("--"):
            target = ours if option_of(word) in known else theirs
        target.append(word)
    return ours, theirs


def option_of(flag: str) -> str:
    """The option that a flag sets: `eval_shots` for `--eval-shots=0`."""
    return "help" if flag == "-h" else flag.removeprefix("--").partition("=")[0].replace("-", "_")


def parse_grid(words: tuple[str, ...]) -> dict[str, list[str]]:
    """Read the grid: `num_shots=0`, `2`, `seed=0` -> {"num_shots": ["0", "2"], "seed": ["0"]}.

    A word without `=` is a further value of the option before it.

    Raises:
        ValueError: a word stands before the first option, or an option is unknown, repeated or set by the sweep.
    """
    allowed = [field.name for field in fields(Config) if field.name not in OURS]
    grid: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            value = word
        elif name in grid or name not in allowed:
            hint = options.did_you_mean(name, allowed)
            raise ValueError(f"grid is {' '.join(words)!r}: {name} must be an option of train.py, once{hint}")
        else:
            values = grid[name] = []
        if values is None or not value:
            raise ValueError(f"grid is {' '.join(words)!r}: must be option=value,value,... for each option")
        values.append(value)
    return grid


def make_cells(sweep: Sweep, train_flags: list[str]) -> list[Cell]:
    """Make and check a cell for every combination of the grid. The last option varies fastest.

    Raises:
        ValueError: the grid is wrong, a flag is set by the sweep itself, or two cells have the same name.
        SystemExit: the options of a cell are wrong; the error message of `train.py` is on stderr.
    """
    grid = parse_grid(sweep.grid)
    given = {option_of(word) for word in train_flags if word.startswith("--")}
    if taken := sorted(given & {*OURS, *grid}):
        raise ValueError(f"--{taken[0]} is set by the sweep itself; leave it out")
    shots = sweep.eval_shots or sorted({int(n) for n in grid.get("num_shots", ()) if n.isdigit()})
    script = str(Path(__file__).parent.parent / "train.py")
    cells: dict[str, Cell] = {}
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        name = re.sub(r"[^\w.+=,-]", "-", ",".join(f"{option}={value}" for option, value in setting.items()))
        if name in cells:
            raise ValueError(f"grid is {' '.join(sweep.grid)!r}: two cells are called {name!r}; values must differ")
        own = {"run_name": name, "out_dir": sweep.out, "resume": "auto", "final_eval": "True"}
        flags = list(train_flags)
        for option, value in (setting | own).items():
            flags += [f"--{option}", value]
        if shots:
            flags += ["--eval_shots", *map(str, shots)]
        cells[name] = Cell(setting, parse_args(flags), (*shlex.split(sweep.launcher), script, *flags))
    return list(cells.values())


def evaluation_of(cell: Cell) -> list[dict] | None:
    """The cells of the `eval.json` of a run, at the shots that are asked for; None if the run is not finished.

    A run with other options is not finished either; `train.py` will refuse to resume it. Nor is a run whose evaluation
    had other options, such as fewer shots or another limit; `train.py` evaluates it again.
    """
    config, saved, result = cell.config, cell.directory / "config.yaml", cell.directory / "eval" / "eval.json"
    if not saved.exists() or not is_evaluated(options_of(config, result.parent)):
        return None
    before = from_yaml(saved)
    if config.precision == "auto":
        config = replace(config, precision=before.precision)
    try:
        check_resumable(before, config)
    except ValueError:
        return None
    if config.num_steps > before.num_steps:
        return None
    shots = config.eval_shots or (config.num_shots,)
    rows = read_result(result)["cells"]
    return [row for row in rows if row["shots"] in shots and row["grader"] == config.eval_correct]


def interval(values: list[float], ci95: list[float]) -> tuple[float, float, float, str]:
    """Mean and interval of one accuracy over seeds.

    An interval over seeds covers what a seed changes (exemplars, order, sampling), and not the choice of problems.

    Args:
        values: one accuracy per seed.
        ci95: interval of the first value, over problems.

    Returns:
        (mean, low, high, the kind of interval in words):

        - of three or more seeds: Student's t at 95 % for their mean;
        - of two: the smaller and the larger value;
        - of one, or of equal values (an untuned model without exemplars): `ci95`, Wilson's over problems.
    """
    mean = float(np.mean(values))
    if len(set(values)) == 1:
        return mean, *ci95, "95 % over problems"
    if len(values) == 2:
        return mean, min(values), max(values), "min..max of 2 seeds"
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, max(0.0, mean - half), min(1.0, mean + half), f"95 % t over {len(values)} seeds"


def tabulate(done: list[tuple[Cell, list[dict]]]) -> list[dict]:
    """One row per model, training setting and number of shots in the evaluation, over the finished seeds."""
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for cell, rows in done:
        for row in rows:
            groups.setdefault((row["model"], cell.trained_as, row["shots"]), []).append(row)
    table = []
    for (model, trained_as, shots), rows in groups.items():
        mean, low, high, kind = interval([row["accuracy"] for row in rows], rows[0]["ci95"])
        row = {"model": model, "train": trained_as, "eval_shots": shots, "seeds": len(rows), "n": rows[0]["n"]}
        table.append(row | {"accuracy": mean, "low": low, "high": high, "interval": kind})
    return sorted(table, key=lambda row: row["model"])


def as_text(table: list[dict]) -> str:
    """The table as lines of plain text."""
    width = max(len(row["train"]) for row in table)
    lines = [f"model  {'trained with':<{width}}  eval shots  accuracy  interval"]
    for row in table:
        lines.append(
            f"{row['model']:<6} {row['train']:<{width}}  {row['eval_shots']:>10}  {row['accuracy']:>8.3f}  "
            f"{row['low']:.3f} .. {row['high']:.3f} ({row['interval']})"
        )
    return "\n".join(lines)


def write(directory: Path, cells: list[Cell], states: dict[str, str], table: list[dict]) -> None:
    """Write sweep.json, with the state of each cell by its name, and sweep.csv and sweep.png if the table has a row."""
    runs = []
    for cell in cells:
        run = {"run": str(cell.directory), "setting": cell.setting, "state": states[cell.name]}
        runs.append(run | {"command": shlex.join(cell.command)})
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "sweep.json", json.dumps({"runs": runs, "table": table}, indent=1) + "\n")
    if table:
        with open(directory / "sweep.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        heat_map(table, directory / "sweep.png")


def run_cell(cell: Cell) -> str:
    """Run train.py for a cell, with its output to the terminal. Returns `done`, or why the cell is not finished.

    Raises:
        KeyboardInterrupt: after the run, which gets the same signal, has saved its state and ended.
    """
    print(f"\n$ {shlex.join(cell.command)}", flush=True)
    with subprocess.Popen(cell.command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()  # harmless if Ctrl-C at a terminal has reached the run already
            process.wait()
            raise
    if code != 0:
        return f"failed with exit code {code}"
    return DONE if evaluation_of(cell) else "stopped before it was evaluated"


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if all cells are done, 1 if some failed, 2 for a wrong option, 130 if interrupted."""
    ours, theirs = split_flags(argv)
    sweep = options.parse(Sweep, ours, "sweep")
    states: dict[str, str] = {}
    try:
        cells = make_cells(sweep, theirs)
        for number, cell in enumerate(cells, start=1):
            print(f"cell {number} of {len(cells)}: {cell.name}", end="", flush=True)
            if evaluation_of(cell):
                states[cell.name] = DONE
                print(": done before")
                continue
            states[cell.name] = run_cell(cell)
            if states[cell.name] != DONE:
                print(f"{cell.name}: {states[cell.name]}", file=sys.stderr, flush=True)
        table = tabulate([(cell, evaluation_of(cell)) for cell in cells if states[cell.name] == DONE])
        write(Path(sweep.out), cells, states, table)
    except (ValueError, OSError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: stopped; the same command continues it", file=sys.stderr)
        return 130
    if table:
        print(f"\n{as_text(table)}\n{Path(sweep.out) / 'sweep.png'}")
    failed = {name: state for name, state in states.items() if state != DONE}
    for name, reason in failed.items():
        print(f"sweep: {name}: {reason}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    for number in STOPS:  # the run that is going on gets it too, and saves its state
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
