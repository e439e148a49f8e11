"""Memory of a CPU: how much of it is free, and what glibc does with memory that was freed.

glibc keeps freed memory for the next step, which saves page faults. But a large block rarely fits into a hole of its
own size, so a process grows to about twice what it holds. Where memory gets short, it is given back in between. Left
out: memory of a GPU, and any other allocator, on which nothing here acts.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SHORT = 0.5
"""Share of the memory: with less than that free, `give_back` acts."""
SYSTEM = Path("/")
"""Where Linux tells of itself, in `proc` and `sys`."""
GROUPS = {
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
}
"""Control groups, version 1 and 2: the files of the limit and of what is held, and what of it only caches files."""


def memory() -> tuple[int, int]:
    """(free, total) bytes: of the machine, or of the container or job where that has less.

    If the system does not say, all counts as free.
    """
    free, total = zip(*_places(), strict=True)
    return min(free), min(total)


def _places() -> Iterator[tuple[int, int]]:
    """(free, total) bytes of the machine, and of every control group with a limit that this process is in.

    A container may see its own group as the outermost one, though `proc` calls it by a longer path.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield 1024 * _table(SYSTEM / "proc/meminfo").get("MemAvailable:", total // 1024), total
    for line in _lines(SYSTEM / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version not in GROUPS:
            continue
        of_limit, of_held, of_cache = GROUPS[version]
        parts = Path(path).parts[1:]
        for depth in range(len(parts) + 1):
            group = (SYSTEM / "sys/fs/cgroup" / version).joinpath(*parts[:depth])
            limit, held = ("".join(_lines(group / name)) for name in (of_limit, of_held))
            if limit.isdigit() and held.isdigit():
                known = _table(group / "memory.stat")
                cache = sum(known.get(name, 0) for name in of_cache)
                yield max(int(limit) - int(held) + cache, 0), int(limit)


def keep_freed() -> None:
    """Let glibc keep what is freed. It takes memory for blocks below a gigabyte from its heap."""
    _set(-1, 2**30)


def as_usual() -> None:
    """Take `keep_freed` back. These are glibc's own numbers: what was set before can not be read."""
    _set(2**17, 2**17)


def give_back() -> bool:
    """Give all freed memory back to the system, if it is short. Returns whether glibc had any to give."""
    short = any(free < SHORT * total for free, total in _places())
    return short and bool(_libc("malloc_trim")(0))


def _lines(path: Path) -> list[str]:
    """The lines of a file; none where it can not be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _table(path: Path) -> dict[str, int]:
    """The second word of each line, a number, by the first."""
    words = [line.split() for line in _lines(path)]
    return {word[0]: int(word[1]) for word in words if len(word) > 1}


def _set(trim_threshold: int, mmap_threshold: int) -> None:
    """Tell glibc how many freed bytes it gives back (-1: none), and from what size on it maps memory by itself."""
    _libc("mallopt")(-1, trim_threshold)  # M_TRIM_THRESHOLD
    _libc("mallopt")(-3, mmap_threshold)  # M_MMAP_THRESHOLD


def _libc(name: str):
    """A function of glibc; elsewhere one that does nothing."""
    return getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, name, lambda *_: 0)
