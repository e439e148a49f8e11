"""Every Triton kernel, compiled for GPUs that are not there: it fits into their registers and shared memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with torch on Linux")

SHARED = {80: 163, 86: 99, 90: 227}
"""KiB that a program may have, by compute capability: A100; the GPUs of desktops, which have least; H100."""
DECODING = ["_rotate", "_over_trunk", "_over_rows", "_add_norm", "_gated", "_block_masses"]


@pytest.mark.parametrize("capability", [90, *(pytest.param(x, marks=pytest.mark.slow) for x in (80, 86))])
def test_kernels_keep_what_they_compute_on_the_chip(capability):
    command = [sys.executable, "-m", "tests.no_gpu.machine_code", str(capability)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel["name"] for kernel in kernels] == 2 * DECODING
    for kernel in kernels:
        assert kernel["spilled"] == 0 and kernel["shared"] <= SHARED[capability] << 10, kernel
