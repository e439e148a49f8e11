"""A project that has a package `data` or `rewards` of its own is told what collides, and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["data/__init__.py", "rewards/__init__.py", "data.py"])
def project(request, tmp_path) -> Path:
    """A directory with a package or a module of one of our names."""
    file = tmp_path / request.param
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    return tmp_path


def python(*words, cwd: Path, path: object = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def sentence(project: Path) -> str:
    (own,) = project.iterdir()
    name = own.stem
    ours = f"grpo needs the package `{name}` that lies beside it ({ROOT / name})"
    return f"{ours}, but `import {name}` finds {own}; rename that one"


@pytest.mark.parametrize("code", ["import grpo.rollout", "import data, rewards; import grpo.advantages"])
def test_c73_an_import_says_what_collides_and_what_to_do(project, code):
    """The kind: our top-level names are common ones, and another package of that name is imported instead of ours.

    It died with "No module named 'data.problem'". Siblings: `rewards`, a module instead of a package, one that was
    imported before, our commands, a directory without `__init__.py` that takes the place of nothing.
    """
    ended = python("-c", code, cwd=project)
    assert ended.returncode == 1
    assert f"ImportError: {sentence(project)}" in ended.stderr.splitlines()[-1]
    assert f"put {ROOT} first in PYTHONPATH and start Python with -P" in ended.stderr


COMMANDS = [("-m", "grpo.report", "x"), ("-m", "train", "--help"), ("-P", str(ROOT / "eval.py"))]


@pytest.mark.parametrize("words", COMMANDS)
def test_c73_a_command_ends_with_the_sentence_and_code_2(project, words):
    ended = python(*words, cwd=project, path=f"{project}{os.pathsep}{ROOT}")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert ended.stderr.startswith(f"grpo: error: {sentence(project)}")


def test_c73_what_the_sentence_says_helps(project):
    code = "import data, rewards, grpo, data.problem, rewards.runner; print(data.__file__)"
    ended = python("-P", "-c", code, cwd=project, path=f"{ROOT}{os.pathsep}{project}")
    assert (ended.stdout.strip(), ended.returncode) == (str(ROOT / "data" / "__init__.py"), 0), ended.stderr


def test_c73_a_directory_of_files_is_no_package(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("")
    assert python("-c", "import grpo, data.problem", cwd=tmp_path).returncode == 0
