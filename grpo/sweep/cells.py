"""The cells of a sweep: every combination of a grid, for every setting of a file, checked before the first one starts.

Left out: running them (`__main__.py`).
"""

import itertools
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from grpo import options
from grpo.config import Config, check_resumable, from_yaml, parse_args
from grpo.doctor.facts import wrong_algorithm
from grpo.evaluation.headline import read_result
from grpo.evaluation.protocol import is_evaluated, options_of
from grpo.options import option

OURS = ("run_name", "out_dir", "resume", "check", "final_eval", "eval_shots")
"""Options of a run that the sweep sets itself."""
ALLOWED = [field.name for field in fields(Config) if field.name not in OURS]
"""The others, which may be varied."""
DONE = "done"
NAMED = "setting"
"""Where the name of a setting stands among the options of a cell."""


class Texts(yaml.SafeLoader):
    """Reads YAML with scalars as they are written, as recipes do; `<<` takes over another setting."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


@dataclass(frozen=True)
class Sweep:
    """Train every cell of a grid with train.py, and show accuracy by training setting and shots in the evaluation.

    All further flags, such as --recipe FILE, are flags of train.py and go to every cell.
    """

    grid: tuple[str, ...]
    """Options to vary, each as option=value,value,... For example: num_shots=0,2,8 seed=0,1,2."""
    settings: str | None = None
    """YAML file of named settings, each {option: value}; every one of them is trained at every point of the grid."""
    eval_shots: tuple[int, ...] | None = None
    """Numbers of worked examples to evaluate with; None: the num_shots of the grid, or the recipe's."""
    out: str = "runs/sweep"
    """Directory for the runs, the table and the picture."""
    launcher: str = shlex.quote(sys.executable)
    """Command that starts train.py, such as "torchrun --nproc_per_node 8"."""
    jobs: int = option(1, ">= 1")
    """Runs at a time. If several, each gets its share of the cores, and what it prints goes to <out>/<cell>.txt."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is out of its range."""
        options.check(self)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    setting: dict[str, str]
    """{option: value}, as in the grid; under `setting`, the name of a setting of the file."""
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
        named = [
            value if name == NAMED else f"{name}={value}" for name, value in self.setting.items() if name != "seed"
        ]
        return " ".join(named) or "all"


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
    grid: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            value = word
        elif name in grid or name not in ALLOWED:
            hint = options.did_you_mean(name, ALLOWED)
            raise ValueError(f"grid is {' '.join(words)!r}: {name} must be an option of train.py, once{hint}")
        else:
            values = grid[name] = []
        if values is None or not value:
            raise ValueError(f"grid is {' '.join(words)!r}: must be option=value,value,... for each option")
        values.append(value)
    return grid


def read_settings(path: str | None) -> dict[str, dict[str, list[str]]]:
    """{name: {option: its words on a command line}} of a file of settings; one without a name if there is no file.

    Raises:
        ValueError: the file can not be read, is not {name: {option: value}} with options of train.py, or has a name or
            an option twice.
    """
    if path is None:
        return {"": {}}
    try:
        text = Path(path).read_text(encoding="utf-8")
        read, node = yaml.load(text, Texts), yaml.compose(text, Texts)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"settings: {path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(read, dict) or not read or not all(isinstance(setting, dict) for setting in read.values()):
        raise ValueError(f"settings: {path} must hold names, and under each one options with their values")
    for whole in (node, *(setting for _, setting in node.value)):
        names = [key.value for key, _ in whole.value]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"settings: {repeated[0]} stands more than once in {path}")
    for label, setting in read.items():
        for unknown in [name for name in setting if name not in ALLOWED]:
            hint = options.did_you_mean(str(unknown), ALLOWED)
            raise ValueError(f"settings: {path}, {label}: {unknown!r} must be an option of train.py{hint}")
    return {str(name): {option: _words(value) for option, value in of.items()} for name, of in read.items()}


def make_cells(sweep: Sweep, train_flags: list[str]) -> list[Cell]:
    """Make and check a cell for every setting and combination of the grid. The last option varies fastest.

    Raises:
        ValueError: grid, settings or launcher are wrong, an option is set twice, or two cells are the same.
        SystemExit: the options of a cell are wrong; the error message of `train.py` is on stderr.
    """
    grid, settings = parse_grid(sweep.grid), read_settings(sweep.settings)
    given = {option_of(word) for word in train_flags if word.startswith("--")}
    within = {option for setting in settings.values() for option in setting}
    if taken := sorted(given & {*OURS, *grid, *within}) + sorted(within & {*grid}):
        raise ValueError(f"--{taken[0]} is set by the sweep itself; leave it out")
    shots = sweep.eval_shots or sorted({int(n) for n in grid.get("num_shots", ()) if n.isdigit()})
    launcher, script = _launcher(sweep.launcher), str(Path(__file__).parents[2] / "train.py")
    cells: dict[str, Cell] = {}
    for label, *values in itertools.product(settings, *grid.values()):
        point = dict(zip(grid, values, strict=True))
        named = [label] * bool(label) + [f"{option}={value}" for option, value in point.items()]
        name = re.sub(r"[^\w.+=,-]", "-", ",".join(named))
        if name in cells:
            raise ValueError(f"grid is {' '.join(sweep.grid)!r}: two cells are called {name!r}; values must differ")
        own = {"run_name": name, "out_dir": sweep.out, "resume": "auto", "final_eval": "True"}
        of_cell = settings[label] | {option: [value] for option, value in (point | own).items()}
        of_cell |= {"eval_shots": [*map(str, shots)]} if shots else {}
        flags = list(train_flags)
        for flag, words in of_cell.items():
            flags += [f"--{flag}", *words]
        config = parse_args(flags)
        for sentence in wrong_algorithm(config):
            raise ValueError(f"{name}: {sentence}")
        for other in cells.values():
            if config == replace(other.config, run_name=name):
                raise ValueError(f"{other.name} and {name} are the same run; one of them must be left out")
        setting = ({NAMED: label} if label else {}) | point
        cells[name] = Cell(setting, config, (*launcher, script, *flags))
    return list(cells.values())


def evaluation_of(cell: Cell) -> list[dict] | None:
    """The cells of the `eval.json` of a run, at the shots that are asked for; None if the run is not finished.

    A run with other options is not finished either; `train.py` will refuse to resume it. Nor is a run whose evaluation
    had other options, such as fewer shots or another limit; `train.py` evaluates it again. Nor is a run with a damaged
    file, which `train.py` will name.
    """
    config, saved, result = cell.config, cell.directory / "config.yaml", cell.directory / "eval" / "eval.json"
    try:
        if not saved.exists() or not is_evaluated(options_of(config, result.parent)):
            return None
        before = from_yaml(saved)
        if config.precision == "auto":
            config = replace(config, precision=before.precision)
        check_resumable(before, config)
        rows = read_result(result)["cells"]
    except ValueError:
        return None
    if config.num_steps != before.num_steps:
        return None
    shots = config.eval_shots or (config.num_shots,)
    return [row for row in rows if row["shots"] in shots and row["grader"] == config.eval_correct]


def _launcher(text: str) -> list[str]:
    """The words of the launcher. Raises ValueError if they are none, or the first is no program."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"launcher is {text!r}: must be the words of a command ({error})") from error
    if not words or shutil.which(words[0]) is None:
        raise ValueError(f"launcher is {text!r}: must begin with a program that is found")
    return words


def _words(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
