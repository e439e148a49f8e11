"""The child that runs a program: as a script that reads and prints, or as a module whose functions are called.

It is sealed before it reads the program. What it says afterwards is an answer and never a verdict, since the program
may have taken over everything in here. Left out: what is expected, which never enters this process.
"""

import atexit
import ctypes
import gc
import os
import random
import struct
import sys
import threading
import types
from typing import Any

from rewards.sandbox import wire

TASK, OUT, LINK = 3, 4, 5
"""Descriptors of every child: what it has to do, what it tells the worker, and a socket to the other child."""
RAISED, NOT_COMPILED = 1, 65
"""Exit codes, beside 0 and those that a program chooses."""


def script() -> None:
    """Run the program as `python program.py`, and end this process as it would end."""
    code = _compiled()
    module = _module("__main__")
    status = _status_of(lambda: exec(code, module.__dict__))
    for last in (threading._shutdown, atexit._run_exitfuncs, _flush):
        status = status or _status_of(last)
    for last in (module.__dict__.clear, gc.collect, _flush):  # closes the program's own files, which writes them
        _status_of(last)
    os._exit(status)


def solution() -> None:
    """Execute the program as the module `solution`, then answer calls of its functions until nobody asks."""
    code = _compiled()
    module = _module("solution")
    exec(code, module.__dict__)
    wire.send(LINK, {"ready": True})
    while True:
        try:
            call = wire.receive(LINK)
        except EOFError:
            os._exit(0)
        answer = _answer(module, call)
        try:
            wire.send(LINK, answer)
        except (ValueError, RecursionError):
            wire.send(LINK, {"raised": "ValueError", "message": "the answer is too long to be sent"})


def read_task() -> bytes:
    """What this child has to do, as the worker wrote it."""
    parts = []
    while part := os.pread(TASK, 2**20, sum(map(len, parts))):
        parts.append(part)
    return b"".join(parts)


def prepare(seals: bool) -> None:
    """Make the standard streams, which are not those of the box. Files can no longer be opened after the seal."""
    streams = [open(fd, mode, encoding="utf-8", closefd=False) for fd, mode in enumerate("rww")]  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams
    if seals:
        os.fstat = _fstat
    sys.argv = [""]
    random.seed(0)


def _compiled() -> types.CodeType:
    """The program's code, or the end of this process. The worker is told, and then nothing can tell it more."""
    try:
        code = compile(read_task(), "<program>", "exec", dont_inherit=True)
        os.write(OUT, b"compiled")
    except BaseException:
        os._exit(NOT_COMPILED)
    os.closerange(TASK, LINK)
    return code


def _module(name: str) -> types.ModuleType:
    """A new module, also where others look for it: dataclasses and pickle do."""
    module = sys.modules[name] = types.ModuleType(name)
    return module


def _status_of(run) -> int:
    """The exit code with which Python would end after it: 0 if it returns."""
    try:
        run()
    except SystemExit as end:
        return 0 if end.code is None else int(end.code) & 0xFF if isinstance(end.code, int) else RAISED
    except BaseException:
        return RAISED
    return 0


def _flush() -> None:
    """Flush the standard output, and that which the program may have put in its place."""
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def _answer(module: types.ModuleType, call: dict) -> dict:
    """Call a function of the program. Its arguments come back only where it returns None: it may have changed them."""
    try:
        args = [wire.decode(value) for value in call["args"]]
        kwargs = {name: wire.decode(value) for name, value in call["kwargs"].items()}
        value = _find(module, call["name"])(*args, **kwargs)
        answer = {"value": wire.encode(value)}
        if value is None:
            answer["args"] = [wire.encode(arg) for arg in args]
    except BaseException as error:
        bases = [base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"]
        answer = {"raised": bases[0], "message": str(error)[:1000]}
    return answer


def _find(module: types.ModuleType, name: str) -> Any:
    """A function of the program, or a method of its class `Solution`, as some sites ask for."""
    if not hasattr(module, name) and isinstance(getattr(module, "Solution", None), type):
        return getattr(module.Solution(), name)
    return getattr(module, name)


_LAYOUT = struct.Struct("QQQIII4xQqqqQQQQQQ24x")
"""`struct stat` of x86_64."""
_libc_syscall = ctypes.CDLL(None).syscall


def _fstat(fd: int) -> os.stat_result:
    """`os.fstat` by its own system call. That of the C library could also tell of paths, so the filter refuses it."""
    buffer = ctypes.create_string_buffer(_LAYOUT.size)
    if _libc_syscall(5, int(fd), buffer):
        raise OSError(9, "Bad file descriptor")
    device, inode, links, mode, user, group, _, size, _, _, *times = _LAYOUT.unpack(buffer)
    return os.stat_result((mode, inode, device, links, user, group, size, times[0], times[2], times[4]))
