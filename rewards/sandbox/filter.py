"""The seccomp filter: the system calls that a program may make, as our own BPF code, loaded with ctypes.

Everything that is not named here fails with EPERM. There is no open, no socket, no new process and no memory that can
be made executable. Left out: processors other than x86_64, whose numbers differ.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

ARCH = 0xC000003E
"""AUDIT_ARCH_X86_64."""
X32 = 0x40000000
"""From this number on, system calls are those of the x32 ABI."""
ALLOW, KILL = 0x7FFF0000, 0x80000000
DENY = 0x00050000
"""SECCOMP_RET_ERRNO; the error is added."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""BPF: load a word, the three comparisons, and return."""

FREE = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "munmap": 11, "brk": 12, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37,
    "setitimer": 38, "getpid": 39, "exit": 60, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
    "set_tid_address": 218, "restart_syscall": 219,
    "exit_group": 231, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "pipe2": 293,
    "getrandom": 318, "membarrier": 324, "rseq": 334, "close_range": 436,
}  # fmt: skip
"""System calls that are allowed with any arguments."""
MMAP, MPROTECT, MADVISE, CLONE, KILL_CALL, FCNTL, TGKILL, PRLIMIT, CLONE3 = 9, 10, 28, 56, 62, 72, 234, 302, 435
AFFINITY = 204
THREAD = (0x3D0F00, 0x7D0F00)
"""The flags with which glibc and musl start a thread: any others would make a process."""
EXECUTABLE = 4
HARMLESS_FCNTL = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL and F_DUPFD_CLOEXEC. Others own signals, leases and locks. F_SETFL would leave a
mark on /dev/null, which the next program has too."""
CLOCKS, OF_A_PROCESS = (228, 229, 230), 2**31
"""clock_gettime, clock_getres and clock_nanosleep. From this number on, a clock is the CPU time of a process."""
STACK = 3
"""RLIMIT_STACK, the only limit that a program may set."""
ADVICE = 100
"""From this number on, advice on memory breaks pages."""
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2

Code = list[tuple[int, int, int, int]]
"""BPF instructions: (operation, jump if true, jump if false, constant)."""


def argument(index: int, high: bool = False) -> tuple[int, int, int, int]:
    """Load half of an argument of the system call."""
    return LOAD, 0, 0, 16 + 8 * index + 4 * high


def one_of(index: int, values: tuple[int, ...]) -> Code:
    """Allow if the argument's low word is one of the values."""
    tests = [(EQUAL, len(values) - 1 - i, 0, value) for i, value in enumerate(values)]
    tests[-1] = (EQUAL, 0, 1, values[-1])
    return [argument(index), *tests, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY | errno.EPERM)]


def none_if(operation: int, index: int, value: int) -> Code:
    """Deny if the comparison of the argument's low word is true."""
    deny, allow = (RETURN, 0, 0, DENY | errno.EPERM), (RETURN, 0, 0, ALLOW)
    return [argument(index), (operation, 0, 1, value), deny, allow]


def program(pid: int) -> Code:
    """The filter of the process `pid`, which may send signals to itself alone."""
    deny, allow = (RETURN, 0, 0, DENY | errno.EPERM), (RETURN, 0, 0, ALLOW)
    read_limit = [argument(2), (EQUAL, 0, 3, 0), argument(2, high=True), (EQUAL, 0, 1, 0), allow, deny]
    own = [argument(0), (EQUAL, 1, 0, 0), deny, argument(1), (EQUAL, 0, 1, STACK), allow, *read_limit]
    checked: dict[int, Code] = {
        MMAP: none_if(ANY_BIT, 2, EXECUTABLE),
        MPROTECT: none_if(ANY_BIT, 2, EXECUTABLE),
        MADVISE: none_if(AT_LEAST, 2, ADVICE),
        CLONE: one_of(0, THREAD),
        KILL_CALL: one_of(0, (pid,)),
        TGKILL: one_of(0, (pid,)),
        AFFINITY: one_of(0, (0, pid)),
        FCNTL: one_of(1, HARMLESS_FCNTL),
        PRLIMIT: own,
        CLONE3: [(RETURN, 0, 0, DENY | errno.ENOSYS)],  # glibc then takes clone, whose flags can be seen
    }
    checked |= {clock: none_if(AT_LEAST, 0, OF_A_PROCESS) for clock in CLOCKS}
    code: Code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCH), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for number in FREE.values():
        code += [(EQUAL, 0, 1, number), allow]
    for number, block in checked.items():
        code += [(EQUAL, 0, len(block), number), *block]
    return [*code, deny]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def seal() -> None:
    """Put the filter on this process, for good.

    Raises:
        OSError: the machine can not. The text says what is missing.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"seccomp is part of Linux, and this is {sys.platform}")
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, f"the filter knows x86_64, and this is {platform.machine()}")
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program(os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    asked = _Program(len(code) // 8, ctypes.addressof(buffer))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.addressof(asked))


def prctl(option: int, *values: int) -> None:
    """The system call of that name. Raises OSError if it fails."""
    words = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *words):
        error = ctypes.get_errno()
        name = "seccomp" if option == PR_SET_SECCOMP else f"prctl {option}"
        raise OSError(error, f"{name}: {os.strerror(error)}")
