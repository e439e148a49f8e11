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


@pytest.mark.parametrize("command", ["train", "eval", "grpo.sample"])
def test_c57_threads_that_wait_sleep_soon(command):
    """Kind: threads that wait take the cores from those that work; on a busy machine a step took 20 times as long.

    Looked at: every command sets the bound before torch is loaded, and OpenMP reads it.
    """
    environment = os.environ | {"OMP_DISPLAY_ENV": "verbose"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    script = f"import {command}, os; print(os.environ['GOMP_SPINCOUNT'])"
    asked = [sys.executable, "-c", script]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "30000"
    said = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]  # of GNU's OpenMP as it is loaded
    assert all("'30000'" in line for line in said)


@pytest.mark.parametrize(("name", "own"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")])
def test_c57_what_was_set_before_stays(name, own):
    """Kind: as above."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    script = "import grpo, os; print([os.environ.get(name) for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | {name: own},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([own if key == name else None for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")])
