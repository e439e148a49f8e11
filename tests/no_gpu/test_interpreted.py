"""Where there is no GPU, what Inductor writes for one runs in Triton's interpreter, in a process of its own."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: what is compiled runs on it")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch on Linux")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler (c++)")
@pytest.mark.parametrize("which, count", [("not slow", 1), ("slow", 3)])
def test_c22_c39_kernels_written_for_an_h100_compute_what_the_plain_operations_do(which, count):
    plugin = ["-p", "tests.no_gpu.interpreted", "-m", which, "--show-capture=no", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugin, "tests/no_gpu/check_interpreted.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert f"{count} passed, {4 - count} deselected" in done.stdout
