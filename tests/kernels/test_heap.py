"""What glibc keeps of freed memory: given back where memory is short, and only there."""

import os
import subprocess
import sys

import pytest

from grpo.kernels import heap
from tests.fakes.runs import ROOT

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Bytes of memory, whatever a container allows."""

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
    monkeypatch.setattr(heap, "SYSTEM", tmp_path)
    assert heap.memory() == (MACHINE, MACHINE)


def system(root, **files: str) -> None:
    """Files of a Linux system below `root`, by path; the machine has 40 MB free."""
    for name, text in {
        "proc/meminfo": "MemTotal: 90000 kB\nMemAvailable: 40000 kB\nHugePages_Total: 0",
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def group(place: str, limit: str, held: int, cache: int, version: int = 2) -> dict[str, str]:
    """The files of one control group."""
    inside, outer = ("max", "current"), ""
    if version == 1:
        inside, outer = ("limit_in_bytes", "usage_in_bytes"), "total_"
    stat = f"anon 5\n{outer}inactive_file {cache - 1}\n{outer}active_file 1"
    texts = dict(zip((*inside, "stat"), (limit, str(held), stat), strict=True))
    return {f"sys/fs/cgroup/{place}memory.{name}": text for name, text in texts.items()}


@pytest.mark.parametrize(
    ("line", "files", "free", "total"),
    [
        ("0::/job/step", group("job/step/", "max", 10**6, 1), 40_960_000, None),  # without a limit
        ("0::/job/step", group("job/step/", "9000000", 4_000_000, 500_000), 5_500_000, 9_000_000),
        ("0::/job/step", group("job/", "9000000", 4_000_000, 500_000), 5_500_000, 9_000_000),  # an outer group's
        ("0::/", group("", "9000000", 9_500_000, 1), 0, 9_000_000),  # a container that holds more than it may
        ("7:hugetlb,memory:/docker/a", group("memory/", "9000000", 10**6, 7, 1), 8_000_007, 9_000_000),  # outermost
        ("7:memory:/a", group("memory/a/", "9223372036854771712", 10**6, 1, 1), 40_960_000, None),  # without, version 1
        ("3:cpu:/a", group("cpu/a/", "9000000", 10**6, 1), 40_960_000, None),  # not of memory
        ("0::/gone", {}, 40_960_000, None),
    ],
)
def test_memory_of_a_container_counts(monkeypatch, tmp_path, line, files, free, total):
    system(tmp_path, **files, **{"proc/self/cgroup": line})
    monkeypatch.setattr(heap, "SYSTEM", tmp_path)
    assert heap.memory() == (free, total or MACHINE)


def test_an_outer_group_that_is_full_is_seen_beside_an_inner_one_that_is_not(monkeypatch, tmp_path):
    full, empty = group("job/", "90000000", 60_000_001, 1), group("job/step/", "40000000", 1_000_001, 1)
    plenty = {"proc/meminfo": f"MemAvailable: {10**12} kB"}
    system(tmp_path, **plenty, **{"proc/self/cgroup": "0::/job/step"}, **full, **empty)
    monkeypatch.setattr(heap, "SYSTEM", tmp_path)
    monkeypatch.setattr(heap, "_libc", lambda _: lambda _: 1)
    assert heap.memory() == (30_000_000, 40_000_000)
    assert heap.give_back()
    monkeypatch.setattr(heap, "SHORT", 0.0)
    assert not heap.give_back()


def test_another_system_has_nothing_to_give(monkeypatch):
    monkeypatch.setattr(heap, "SHORT", 2.0)
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    heap.keep_freed()
    assert not heap.give_back()
