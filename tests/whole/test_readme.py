"""README's "Change one thing": its blocks, put into a copy of the source as they stand, pass the tests and run."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from data.problem import Problem
from grpo.config import parse_args
from grpo.tables import constants
from rewards import gsm8k

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().partition("## Change one thing\n")[2].partition("\n## ")[0]
(CODE,) = re.findall(r"^```python\n(.*?)^```$", SECTION, re.M | re.S)
HEAD = r"# (?:grpo|recipes|rewards|data)/"
PIECES = re.findall(rf"^(?={HEAD})# (.*)\n((?:(?!{HEAD}).*\n)*)", CODE, re.M)
FLAGS = [shlex.split(flags) for flags in re.findall(r"`(--[^`]* .*?)`", SECTION) if "jsonl" not in flags]
TASK, TESTS = (
    shlex.split(re.search(rf"^python {command} (.*)$", SECTION, re.M)[1], comments=True)
    for command in ("train.py", "-m pytest")
)

# What a piece stands below, where it is no file of its own and not at the end of one.
BELOW = {
    "grpo/config.py, in Config below clip_high": r'^    clip_high: .*\n    """.*"""\n',
}
SMALL = {"num_steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8, "checkpoint_every": 0}
SMALL |= {"device": "cpu"}


def put(copy: Path, where: str, piece: str) -> None:
    """Put a piece of the page where its first line says."""
    name, _, place = where.partition(",")
    file = copy / name
    if not place:
        assert not file.exists(), f"{where}: needs a place in it: one of {[*BELOW]}, or `at the end`"
        file.write_text(piece)
    elif place == " at the end":
        file.write_text(file.read_text() + "\n\n" + piece)
    else:
        (found,) = re.findall(BELOW[where], text := file.read_text(), re.M)
        file.write_text(text.replace(found, found + piece))


def test_every_task_of_the_table_is_a_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    table = (ROOT / "README.md").read_text().partition("## Tasks\n")[2].partition("\n## ")[0]
    flags = [shlex.split(words) for words in re.findall(r"^\|[^|]*\| `(--.*?)` \|", table, re.M)]
    asked = {parse_args(words).data for words in flags}
    assert asked == {"programs", "gsm8k", "hub", "code", "symbolic", "hendrycks_math", "gym"}
    assert asked <= set(data._known())


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The source with every piece in it."""
    place, ignored = tmp_path_factory.mktemp("readme"), shutil.ignore_patterns("__pycache__")
    for name in ("grpo", "data", "rewards", "recipes", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    for name in ("train.py", "eval.py", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    assert len(PIECES) == 5
    for where, piece in PIECES:
        put(place, where, piece)
    return place


def load(file: Path):
    """A file of the copy as a module under a name of its own, so that ours stays what it is."""
    name = f"readme_{file.parent.name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(copy: Path, words: list[str]) -> str:
    """The output of `python WORDS` in the copy, which must end well."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_tests_that_the_page_names_pass_with_its_examples_and_test_them(copy):
    """Of the tests of every entry, those of the new ones: the others are tested where they are."""
    chosen = "(median or topr or test_config or test_architecture) and not page_on_conformance"
    files = [*TESTS, "tests/whole/test_architecture.py"]
    out = python(copy, ["-m", "pytest", *files, "-vv", "-rf", "-p", "no:cacheprovider", "-k", chosen])
    for name in ("median", "topr", "rewards/brevity.py", "data/product.py", "topr_cap"):
        assert re.search(rf"::test_\w+\[.*\b{name}\b.*\] PASSED", out), name


def test_the_median_is_the_baseline(copy):
    median = load(copy / "grpo" / "advantages.py").ADVANTAGES["median"]
    rewards = torch.tensor([[1.0, 0, 0, 9, 0], [1, 3, 2, torch.nan, torch.nan]])
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert median(rewards, valid).tolist() == [[1, 0, 0, 9, 0], [-1, 1, 0, 0, 0]]


def test_the_option_of_the_loss_bounds_it_and_is_checked(copy):
    """Ratios 1/2, 1, 4: the weight for A = -1, at most topr_cap; for A = 1 it is 1."""
    losses, config = load(copy / "grpo" / "losses.py"), load(copy / "grpo" / "config.py")
    loss, old, ratio = losses.LOSSES["topr"], torch.full((1, 3), -2.0), torch.tensor([[0.5, 1, 4]])
    for topr_cap in (1.0, 5.0):
        bounds = constants(loss, config.Config(topr_cap=topr_cap))
        for advantage, weight in ((-1.0, ratio.clamp(max=topr_cap)), (1.0, torch.ones(1, 3))):
            logprobs = (old + ratio.log()).requires_grad_()
            result = loss(logprobs, old, torch.tensor([advantage]), torch.ones(1, 3, dtype=torch.bool), **bounds)
            result.per_token_loss.sum().backward()
            torch.testing.assert_close(logprobs.grad, -advantage * weight)
            assert result.clipped.tolist() == [[False, False, advantage < 0 and topr_cap < 4]]
    with pytest.raises(ValueError, match="topr_cap is 0.5: must be >= 1"):
        config.Config(topr_cap=0.5)


def test_the_rewards_can_be_earned(copy):
    short = load(copy / "rewards" / "brevity.py").short
    assert [short(text, Problem("", "", {})) for text in ("", "x" * 100, "x" * 900)] == [1, 0.75, 0]
    task = load(copy / "data" / "product.py")
    for split in ("train", "validation", "test"):
        for problem in task.load(split, path=None, num_shots=0, seed=0):
            a, b = map(int, re.findall(r"\d+", problem.prompt))
            assert [gsm8k.last_number(f" {answer}", problem) for answer in (a * b, a * b + 1)] == [1, 0]


def test_the_flags_that_the_page_names_make_runs(copy):
    """One small step each: with the new advantage, loss and reward; and with the new task, its evaluation included."""
    names = [word for flags in FLAGS for word in flags]
    assert {"median", "topr", "--topr_cap", "brevity.short"} <= set(names)
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    runs = [
        [*names, *small, "--run_name", "names", "--final_eval", "False"],
        [*TASK, *small],
    ]
    program = "import sys, train; train.report = print; sys.exit(any([train.main(argv) for argv in {}]))"
    python(copy, ["-c", program.format(runs)])
    first, second = (json.loads((copy / "runs" / name / "metrics.jsonl").read_text()) for name in ("names", "product"))
    assert 0 < first["reward/brevity.short"] <= 1 and first["optim/grad_norm"] > 0 and first["optim/skipped"] == 0
    assert "topr_cap: 2" in (copy / "runs" / "names" / "config.yaml").read_text()
    assert "reward/gsm8k.last_number" in second
    cells = json.loads((copy / "runs" / "product" / "eval" / "eval.json").read_text())["cells"]
    assert [cell["n"] for cell in cells] == [10, 10]
