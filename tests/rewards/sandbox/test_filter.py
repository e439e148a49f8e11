"""The filter, run by a small interpreter of BPF: what each system call gets. `test_box.py` shows that it holds."""

import errno

import pytest

from rewards.sandbox import filter as seccomp

PID = 77
EPERM = seccomp.DENY | errno.EPERM
CODE = seccomp.program(PID)


def decided(number: int, *args: int, arch: int = seccomp.ARCH) -> int:
    """What the filter says of a system call."""
    data = {0: number, 4: arch}
    for i, arg in enumerate((*args, 0, 0, 0, 0, 0, 0)[:6]):
        data[16 + 8 * i], data[20 + 8 * i] = arg & 0xFFFFFFFF, arg >> 32 & 0xFFFFFFFF
    at = word = 0
    while True:
        operation, yes, no, constant = CODE[at]
        at += 1
        if operation == seccomp.RETURN:
            return constant
        if operation == seccomp.LOAD:
            word = data[constant]
            continue
        true = {
            seccomp.EQUAL: word == constant,
            seccomp.AT_LEAST: word >= constant,
            seccomp.ANY_BIT: bool(word & constant),
        }[operation]
        at += yes if true else no


def test_every_number_that_is_not_named_is_refused():
    named = {*seccomp.FREE.values(), 9, 10, 28, 56, 62, 72, 234, 302, 435, 204, 228, 229, 230}
    for number in range(600):
        if number in seccomp.FREE.values():
            assert decided(number) == seccomp.ALLOW
        elif number not in named:
            assert decided(number) == EPERM, number


@pytest.mark.parametrize("number", [2, 257, 437, 41, 53, 57, 58, 59, 322, 101, 310, 311, 16, 157, 262, 63, 425, 200])
def test_what_opens_connects_starts_or_traces_is_refused(number):
    """open, openat, openat2, socket, socketpair, fork, vfork, execve, execveat, ptrace, process_vm_*, ioctl, ..."""
    assert decided(number) == EPERM


def test_another_processor_and_x32_kill():
    assert decided(0, arch=0x40000003) == decided(0x40000000) == decided(0x40000039) == seccomp.KILL
    assert decided(0xFFFFFFFF) == seccomp.KILL


@pytest.mark.parametrize(
    ("number", "allowed", "refused"),
    [
        (9, [(0, 4096, 3), (0, 4096, 0)], [(0, 4096, 4), (0, 4096, 7), (0, 4096, 5)]),
        (10, [(0, 4096, 1)], [(0, 4096, 5)]),
        (28, [(0, 1, 4), (0, 1, 99)], [(0, 1, 100), (0, 1, 101)]),
        (56, [(0x3D0F00,), (0x7D0F00,)], [(17,), (0x11000011,), (0x10000,), (0x3D0F00 | 0x10000000,), (0,)]),
        (62, [(PID, 9)], [(1, 9), (0, 9), (0xFFFFFFFF, 9), (PID + 1, 0)]),
        (234, [(PID, 5, 6)], [(PID - 1, 5, 6), (0, 5, 6)]),
        (72, [(0, 1), (0, 3), (0, 1030)], [(0, 8), (0, 10), (0, 1024), (0, 1031), (0, 1033), (0, 37), (0, 4)]),
        (204, [(0,), (PID,)], [(1,), (PID + 1,)]),
        (228, [(0,), (3,)], [(~1 << 3 | 2,), (0xFFFFFFFF,)]),
        (229, [(1,)], [(~PID << 3 | 2,)]),
        (230, [(1,)], [(~PID << 3 | 6,)]),
        (302, [(0, 7, 0, 1), (0, 3, 1, 0)], [(0, 7, 1, 0), (0, 7, 1 << 32, 0), (1, 3, 1, 0), (1, 7, 0, 1)]),
    ],
)
def test_arguments_decide(number, allowed, refused):
    assert {decided(number, *args) for args in allowed} == {seccomp.ALLOW}
    assert {decided(number, *args) for args in refused} == {EPERM}


def test_clone3_is_said_to_be_missing():
    assert decided(435) == seccomp.DENY | errno.ENOSYS


def test_another_system_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(seccomp.sys, "platform", "darwin")
    with pytest.raises(OSError, match="seccomp is part of Linux, and this is darwin"):
        seccomp.seal()
    monkeypatch.setattr(seccomp.sys, "platform", "linux")
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "aarch64")
    with pytest.raises(OSError, match="knows x86_64, and this is aarch64"):
        seccomp.seal()
