"""What is installed is whole: a wheel in a clean environment has every file, all commands, and runs the demo."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("grpo", "rewards", "data")
MODULES = ("train.py", "eval.py")
PROMISED = """
from grpo.advantages import ADVANTAGES
from grpo.losses import LOSSES
from grpo.kl import KL
from grpo.weighting import WEIGHTINGS
from grpo.logprobs import linear_logprobs
from grpo.tree import pack
from grpo.policy import Policy, load_policy, token_logprobs
from grpo.sampler import Sampler
import data, rewards, sys
assert rewards.load("gsm8k.format") and data.load("arithmetic", "test")
assert not any("{root}" in module.__file__ for module in (data, rewards, sys.modules["grpo"]))
"""
DEMO = ["--num_steps", "1", "--prompts_per_step", "2", "--group_size", "2", "--final_eval_limit", "4"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*MODULES, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, source]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Runs python where the wheel is installed and the checkout is not: what it depends on is that of the tests."""
    place = tmp_path_factory.mktemp("clean")
    venv.create(place / "venv", with_pip=True)
    scheme = sysconfig.get_path("purelib", vars={"base": str(place / "venv")})
    # A path in a .pth file is added as it is: an editable install that lies there is not followed.
    Path(scheme, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    executable = str(place / "venv" / "bin" / "python")
    install = [executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=600)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        command = [executable, *arguments]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_packages(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    assert inside == {name for name in files if "__pycache__" not in name} | {*MODULES}


@pytest.mark.slow
def test_promised_names_and_commands_are_there(python):
    python("-c", PROMISED.format(root=ROOT))
    for command in ("grpo.report", "grpo.sweep", "grpo.sample", "grpo.pretrain", "grpo.oracle", "train", "eval"):
        assert "usage" in python("-m", command, "--help").lower()


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel_and_so_do_the_commands_on_it(python):
    assert "gain" in python("-m", "train", "--run_name", "demo", *DEMO)
    assert "report.html" in python("-m", "grpo.report", "runs/demo")
    python("-m", "grpo.sample", "runs/demo/final", "--question", "Tom has 3 apples. Sam gives Tom 4 more. How many?")
    python("-m", "eval", "--model", "embedded", "--data", "arithmetic", "--limit", "4", "--out", "evaluated")
    sweep = ["--grid", "seed=0", "--out", "swept", "--num_steps", "1", "--prompts_per_step", "2", "--group_size", "2"]
    assert "sweep.png" in python("-m", "grpo.sweep", *sweep, "--final_eval_limit", "4")
