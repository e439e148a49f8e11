"""Memory in bytes, of the machine and of the process."""

import os
import subprocess
import sys

import pytest
import torch

from grpo.run.machine import device_memory, peak_bytes
from tests.fakes.runs import ROOT

CPU = torch.device("cpu")


def test_free_memory_is_that_of_the_machine_or_of_the_gpu(monkeypatch):
    free, total = device_memory(CPU)
    assert 10**8 < free < total < 10**15
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index, 80))
    assert device_memory(torch.device("cuda", 3)) == (3, 80)


def test_peak_memory_is_in_bytes():
    peak = peak_bytes(CPU)["memory/peak_bytes"]
    assert 5e7 < peak < 1e12
    kept = torch.ones(40_000_000)
    assert peak_bytes(CPU)["memory/peak_bytes"] >= peak
    del kept


@pytest.mark.parametrize(
    ("command", "own"), [("train", None), ("train", "active"), ("eval", None), ("grpo.sample", None)]
)
def test_c57_threads_that_wait_sleep(command, own):
    """Kind: threads that wait take the cores from those that work; on a busy machine a step took 20 times as long.

    Looked at: every command sets the policy before torch is loaded, and an own one stays.
    """
    script = f"import {command}, sys, os; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": own} if own else {})
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    wanted = own or "passive"
    assert done.stdout.strip() == wanted
    said = [line for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]  # of GNU's OpenMP as it is loaded
    assert all(wanted.upper() in line for line in said)
