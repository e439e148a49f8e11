"""Memory of a CPU: how much of it is free, and what glibc does with memory that was freed.

glibc keeps freed memory for the next step, which saves page faults. But a large block rarely fits into a hole of its
own size, so a process grows to about twice what it holds. Where memory gets short, it is given back in between. Left
out: memory of a GPU, and any other allocator, on which nothing here acts.
"""

import ctypes
import os
import sys
from pathlib import Path

SHORT = 0.5
"""Share of the machine's memory: with less than that free, `give_back` acts."""


def memory() -> tuple[int, int]:
    """(free, total) bytes of the machine. If the system does not say, all counts as free."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = Path("/proc/meminfo")
    lines = told.read_text().splitlines() if told.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1]), total
    return total, total


def keep_freed() -> None:
    """Let glibc keep what is freed. It takes memory for blocks below a gigabyte from its heap."""
    _set(-1, 2**30)


def as_usual() -> None:
    """Take `keep_freed` back. These are glibc's own numbers: what was set before can not be read."""
    _set(2**17, 2**17)


def give_back() -> bool:
    """Give all freed memory back to the system, if it is short. Returns whether glibc had any to give."""
    free, total = memory()
    return free < SHORT * total and bool(_libc("malloc_trim")(0))


def _set(trim_threshold: int, mmap_threshold: int) -> None:
    """Tell glibc how many freed bytes it gives back (-1: none), and from what size on it maps memory by itself."""
    _libc("mallopt")(-1, trim_threshold)  # M_TRIM_THRESHOLD
    _libc("mallopt")(-3, mmap_threshold)  # M_MMAP_THRESHOLD


def _libc(name: str):
    """A function of glibc; elsewhere one that does nothing."""
    return getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, name, lambda *_: 0)
