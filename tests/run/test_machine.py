"""What `auto` means, settings of the process, and memory in bytes, of the machine and of the process."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental import _config as symbolic_shapes

from grpo.config import Config
from grpo.evaluation.protocol import EvalOptions
from grpo.kernels.compiled import compile_layers
from grpo.run import machine
from grpo.run.machine import device_memory, peak_bytes, settings, settle
from grpo.sample import SampleOptions
from tests.fakes.runs import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize("possible", [True, False])
def test_auto_is_settled_by_device(possible, monkeypatch):
    monkeypatch.setattr(machine, "can_compile", lambda: possible)
    asked, room = [], 8192

    def budget(known: Config) -> int:
        asked.append((known.device, known.precision, known.compile))
        return 77 if known.device == "cuda" else room

    on_cpu, on_gpu = settle(Config(), CPU, budget=budget), settle(Config(), GPU, budget=budget)
    assert (on_cpu.device, on_cpu.precision, on_cpu.max_tokens_per_microbatch) == ("cpu", "fp32", 4096)
    assert (on_cpu.compile, on_gpu.compile) == (False, possible)
    assert settle(Config(precision="fp32"), GPU, budget=budget).compile is False
    assert (on_gpu.device, on_gpu.precision, on_gpu.max_tokens_per_microbatch) == ("cuda", "bf16", 77)
    assert asked == [("cpu", "fp32", False), ("cuda", "bf16", possible), ("cuda", "fp32", False)]  # all else is settled
    room = 512
    assert settle(Config(), CPU, budget=budget).max_tokens_per_microbatch == 512
    chosen = Config(precision="fp16", compile=True, max_tokens_per_microbatch=7)
    assert settle(chosen, CPU, budget=budget) == replace(chosen, device="cpu")


def test_auto_stays_what_it_meant_when_the_run_began():
    made = Config(device="cuda", precision="bf16", compile=True, max_tokens_per_microbatch=16384)
    assert settle(Config(num_steps=7), CPU, made) == replace(made, num_steps=7, device="cpu")
    chosen = Config(precision="fp32", compile=False, max_tokens_per_microbatch=9)
    assert settle(chosen, CPU, made) == replace(chosen, device="cpu")
    assert settle(Config(), CPU, replace(made, precision="auto")).precision == "fp32"  # by hand, in its config.yaml


def test_auto_of_other_commands_means_the_same():
    for asked in (EvalOptions(model="m"), SampleOptions()):
        assert (settle(asked, CPU).device, settle(asked, CPU).precision) == ("cpu", "fp32")
        assert (settle(asked, GPU).device, settle(asked, GPU).precision) == ("cuda", "bf16")
        assert settle(replace(asked, precision="fp16"), GPU).precision == "fp16"


def seen() -> tuple:
    """Everything that belongs to the process."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    compiling = torch._dynamo.config.optimize_ddp, torch._functorch.config.ban_recompute_materialized_backward
    return (
        torch.get_default_dtype(),
        *deterministic,
        filled,
        dict(os.environ),
        compiling,
        symbolic_shapes.use_duck_shape,
    )


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_settings_of_the_process_are_taken_back(before, monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    untouched = seen()
    with settings(CPU):
        assert seen()[:4] == (torch.float32, True, False, False)
        assert seen()[4] == untouched[4] | {"THP_MEM_ALLOC_ENABLE": "1"}
        compile_layers()
        assert seen()[5:] == ((False, False), False)
    assert seen() == untouched
    with pytest.raises(KeyError), settings(GPU):
        assert seen()[:4] == (torch.float32, False, False, False)
        raise KeyError
    assert seen() == untouched
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    with settings(CPU):
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


FREED_AND_TAKEN_AGAIN = """
from resource import RUSAGE_SELF, getrusage
import torch
from grpo.run.machine import settings


def new_pages() -> int:
    for _ in range(2):
        before = getrusage(RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(1_000_000) for _ in range(100)]
        tensors.clear()
    return getrusage(RUSAGE_SELF).ru_minflt - before


with settings(torch.device("cpu")):
    pass
after = new_pages()
with settings(torch.device("cpu")):
    print(new_pages(), after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to keep freed memory")
def test_memory_that_was_freed_is_not_new_again_while_the_settings_hold():
    done = subprocess.run(  # small pages, so that each is seen
        [sys.executable, "-c", FREED_AND_TAKEN_AGAIN],
        cwd=ROOT,
        env=os.environ | {"THP_MEM_ALLOC_ENABLE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    within, after = map(int, done.stdout.split())
    assert within < 400_000_000 / 4096 / 10 < after


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
