"""What glibc keeps of freed memory: given back where memory is short, and only there."""

import subprocess
import sys

import pytest

from grpo.kernels import heap
from tests.fakes.runs import ROOT

HOLES = """
from pathlib import Path

import torch

from grpo.kernels import heap


def resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


heap.keep_freed()
blocks = [torch.ones(size) for _ in range(20) for size in (2_500_000, 100)]  # 10 MB, with a little between
full = resident()
blocks[::2] = [None] * 20
kept, (free, total) = resident(), heap.memory()
heap.SHORT = (free - 10**9) / total
assert not heap.give_back()
enough = resident()
heap.SHORT = 1.0
assert heap.give_back()
print(full, kept, enough, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told what to keep")
def test_holes_are_given_back_where_memory_is_short():
    done = subprocess.run([sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, check=True)
    full, kept, enough, given = map(int, done.stdout.split())
    assert min(kept, enough) > full - 20_000_000 and given < full - 150_000_000


def test_free_memory_is_less_than_all_of_it(monkeypatch, tmp_path):
    free, total = heap.memory()
    assert 10**8 < free < total < 10**15
    monkeypatch.setattr(heap, "Path", lambda _: tmp_path / "none")
    assert heap.memory() == (total, total)


def test_another_system_has_nothing_to_give(monkeypatch):
    monkeypatch.setattr(heap, "SHORT", 2.0)
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    heap.keep_freed()
    assert not heap.give_back()
