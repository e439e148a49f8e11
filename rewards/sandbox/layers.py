"""What holds a program, layer by layer: limits, then another user, namespaces and Landlock where the machine has them.

The box puts the last three on itself before it serves, so every program inherits them. The limits and the filter are
put on each program. Left out: the filter (`filter.py`).
"""

import ctypes
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from rewards.sandbox.filter import prctl, seal

NOBODY = 65534
MEMORY = 2**30
"""Bytes of address space that a program may take beyond the box's own."""
STACK = 64 * 2**20
PROCESSES = 1024
"""Threads of one other user. It counts nothing where the user is the trainer's own, so it is not set there."""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
NEW_USER, NEW_PID, NEW_NET, NEW_MOUNT, NEW_IPC, NEW_UTS = 2**28, 2**29, 2**30, 2**17, 2**27, 2**26
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 16384, 2**18
DETACH = 2
PIVOT_ROOT, LANDLOCK_CREATE, LANDLOCK_RESTRICT, CAPSET = 155, 444, 446, 126
"""Numbers of system calls; those of Landlock are the same on every processor."""


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it ends."""
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def close_in(without: Collection[str] = ()) -> list[str]:
    """Put every layer on this process that the machine has. Returns their names.

    Namespaces cost a fork: the caller goes on as process 1 of the new ones, and the old process waits for its end.

    Args:
        without: layers to leave out, as on a machine that lacks them: `user`, `namespaces`, `landlock`. `root` becomes
            another user and does not call it a layer, as where the trainer is no root.
    """
    names = []
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, a program ends first
    if os.getuid() == 0 and "user" not in without:
        become_nobody()
        names += ["own user"] * ("root" not in without)
    if "namespaces" not in without and _succeeds(enter_namespaces):
        enter_namespaces()
        _go_on_as_first_process()
        names.append("namespaces")
    drop_capabilities()
    if "landlock" not in without and (version := restrict_files()):
        names.append(f"landlock {version}")
    if sys.platform == "linux":
        prctl(PR_SET_DUMPABLE, 0)
        die_with_parent()  # a change of the user forgets it
    return names


def limit(cpu_seconds: float, base_bytes: int, own_user: bool) -> None:
    """Set the limits of a program.

    Args:
        cpu_seconds: Linux sends SIGXCPU after them, rounded up, and kills a second later.
        base_bytes: address space of the box, which the program begins with.
        own_user: whether the programs have a user of their own.
    """
    seconds = max(1, math.ceil(cpu_seconds))
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (base_bytes + MEMORY,) * 2,
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
    }
    if own_user:
        limits[resource.RLIMIT_NPROC] = (PROCESSES,) * 2
    for name, values in limits.items():
        if sys.platform == "linux" or name != resource.RLIMIT_AS:  # macOS refuses it
            resource.setrlimit(name, values)
    most = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (STACK if most < 0 else min(STACK, most), most))


def own_bytes() -> int:
    """The address space of this process, in bytes."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 2**30


def why_not() -> str:
    """Why this machine can not seal a program; empty if it can. A child tries, because a seal is for good."""

    def attempt() -> None:
        try:
            seal()
        except OSError as error:
            os.write(theirs, (error.strerror or str(error)).encode())
            raise

    ours, theirs = os.pipe()
    done = _succeeds(attempt)
    os.close(theirs)
    with open(ours, "rb") as text:
        return text.read().decode() if not done else ""


def become_nobody() -> None:
    """Change from root to the user and group that own nothing."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def enter_namespaces() -> None:
    """Leave the host's processes, network, files and user names. Raises OSError where that is refused.

    The new root is empty and read-only. The process itself stays in its old process namespace; its next child is the
    first of the new one.
    """
    user, group = os.getuid(), os.getgid()
    prctl(PR_SET_DUMPABLE, 1)  # otherwise the files below belong to root
    _call("unshare", ctypes.c_int(NEW_USER | NEW_PID | NEW_NET | NEW_MOUNT | NEW_IPC | NEW_UTS))
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{file}").write_text(text)
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("none", "/tmp", "tmpfs", NO_SUID | NO_DEV | NO_EXEC, b"size=4k,nr_inodes=2,mode=555")
    os.chdir("/tmp")
    _call("syscall", ctypes.c_long(PIVOT_ROOT), b".", b".")
    _call("umount2", b".", ctypes.c_int(DETACH))
    mount("none", "/", None, REMOUNT | READ_ONLY | NO_SUID | NO_DEV | NO_EXEC)
    os.chdir("/")


def mount(source: str, target: str, kind: str | None, flags: int, data: bytes | None = None) -> None:
    """The system call of that name."""
    _call("mount", source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data)


def restrict_files() -> int:
    """Forbid every file, TCP port, abstract socket and signal to others. Returns Landlock's version, 0: has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    create, restrict = ctypes.c_long(LANDLOCK_CREATE), ctypes.c_long(LANDLOCK_RESTRICT)
    version = libc.syscall(create, None, ctypes.c_size_t(0), ctypes.c_uint(1)) if sys.platform == "linux" else 0
    if version < 1:
        return 0
    files = 2 ** {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16) - 1
    rules = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(create, rules, ctypes.c_size_t(size), ctypes.c_uint(0))
    if ruleset < 0:
        return 0
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    failed = libc.syscall(restrict, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)
    return 0 if failed else version


def drop_capabilities() -> None:
    """Give up what a process may do beyond its user, also inside of its namespaces."""
    if sys.platform == "linux":
        with suppress(OSError):
            for capability in range(64):  # those that the kernel does not know end the loop
                prctl(PR_CAPBSET_DROP, capability)
        header, none = struct.pack("II", 0x20080522, 0), bytes(24)
        with suppress(OSError):
            _call("syscall", ctypes.c_long(CAPSET), header, none)


def _go_on_as_first_process() -> None:
    """Return in a child, which is process 1 of the new namespace. The caller waits for it and ends."""
    child = os.fork()
    if child:
        with suppress(ChildProcessError, OSError):
            die_with_parent()
            os.closerange(0, 64)
            os.waitpid(child, 0)
        os._exit(0)


def _succeeds(attempt) -> bool:
    """Whether a function returns, tried in a child that is thrown away.

    What fails half way, such as the namespaces of a process whose maps are refused, would otherwise stay half made.
    """
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            attempt()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _call(name: str, *arguments) -> None:
    """A function of the C library. Raises OSError if it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
