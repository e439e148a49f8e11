"""Where there is no GPU, tests marked `gpu` that compile nothing run on a stand-in, in a process of their own."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PARTS = ["no_gpu/check_stand_in.py", "sampler/test_rows.py", "sampler/test_draw.py"]
WHOLE = ["whole/test_gpu.py"]
KERNELS = ["kernels/test_decode.py"] if find_spec("triton") else []  # `make test` interprets them on the host


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they run on it")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler (c++)")
@pytest.mark.parametrize(
    ("files", "which", "at_least"),
    [
        pytest.param(PARTS, "gpu and not slow", 15, id="parts"),
        pytest.param(WHOLE, "gpu and not slow", 7, id="whole"),
        pytest.param([*PARTS, *WHOLE, *KERNELS], "gpu", 30, id="all", marks=pytest.mark.slow),
    ],
)
def test_what_is_written_for_a_gpu_runs_on_one_that_is_not_there(files, which, at_least):
    plugin = ["-p", "tests.no_gpu.stand_in", "-m", which, "--show-capture=no", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugin, *(f"tests/{name}" for name in files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least and "skipped" not in done.stdout
