"""The side that asks: start a box, hand it programs and their input, and take in what they print.

Everything is sent in memory files that can not be changed, and read from pipes up to a limit. Left out: what the
answers are worth (`judge.py`), and when a box may be trusted (`proof.py`).
"""

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rewards.sandbox.box import MOST_WALLS, receive, tell
from rewards.sandbox.program import LINK, OUT, TASK

MOST_OUTPUT = 4 * 2**20
"""Bytes that a program may print. One that prints more is killed."""
PATIENCE = 10.0
"""Seconds that the box itself may take, beyond the wall time of what it runs."""
START_SECONDS = 120.0
UNSAFE = "GRPO_UNSAFE_CODE"
START = "import sys; sys.path.insert(0, sys.argv[2]); from rewards.sandbox.box import main; main(int(sys.argv[1]))"
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""All variables that the box and its programs have."""
ADD_SEALS, ALL_SEALS = 1033, 15
"""fcntl: nobody may shrink, grow or write a memory file, nor take that back."""
STDIN, STDOUT = 0, 1


class Dead(RuntimeError):
    """The box ended, or does not answer."""


@dataclass(frozen=True)
class Child:
    """A process to run.

    Attributes:
      role: of `box.ROLES`.
      task: what it reads: a program, or JSON.
      cpu: seconds of CPU time.
      wall: seconds after which it is killed if it sleeps; up to three times as long if it computes.
      stdin: its standard input; None: empty.
    """

    role: str
    task: bytes
    cpu: float
    wall: float
    stdin: bytes | None = None


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code or minus the signal, what it used, printed and told."""

    status: int
    seconds: float
    late: bool
    printed: bytes
    told: bytes

    @property
    def flooded(self) -> bool:
        """Whether it printed too much."""
        return len(self.printed) > MOST_OUTPUT


class Box:
    """A box process. Start it, then `run` children in it, one request after the other."""

    def __init__(self, preload: Sequence[str] = (), without: Sequence[str] = ()):
        """Start a box.

        Args:
          preload: modules that programs may use beside the standard library, and `module:function` to call once.
          without: layers to leave out, to imitate a machine that lacks them.

        Raises:
          Dead: it did not come up.
        """
        self._asked = {"preload": list(preload), "path": sys.path if preload else [], "without": list(without)}
        self._asked["unsafe"] = self.unsafe = os.environ.get(UNSAFE) == "1"
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        python = [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", START]
        self.process = subprocess.Popen(
            [*python, str(theirs.fileno()), str(Path(__file__).parents[2])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        self._control = ours
        ours.settimeout(START_SECONDS)
        tell(ours, self._asked)
        ready = self._answer()
        self.layers, self.unsealed = ready["layers"], ready["unsealed"]

    def run(self, children: Sequence[Child]) -> list[Ended]:
        """Run children side by side until the last one ends, which ends the others. Two of them have a link.

        A box that dies is started again, and the children too. If they end it twice, they count as killed.

        Raises:
          Dead: no box can be started any more.
        """
        for _ in range(2):
            if self.process is None:
                self._start()
            with suppress(Dead, OSError):
                return self._run(children)
            self.close()
        return [Ended(-9, 0.0, True, b"", b"")] * len(children)

    def _run(self, children: Sequence[Child]) -> list[Ended]:
        sent: list[int] = []  # in the order of `places`
        pipes: dict[int, tuple[int, int, bytearray]] = {}
        links = [end.detach() for end in socket.socketpair()] if len(children) == 2 else []
        request = []
        try:
            for i, child in enumerate(children):
                places = [TASK, OUT]
                sent += [memory_file(child.task), self._pipe(pipes, i, OUT)]
                if child.stdin is not None:
                    places += [STDIN, STDOUT]
                    sent += [memory_file(child.stdin), self._pipe(pipes, i, STDOUT)]
                if links:
                    places.append(LINK)
                    sent.append(links.pop())
                request.append({"role": child.role, "cpu": child.cpu, "wall": child.wall, "places": places})
            text = json.dumps({"children": request}).encode()
            socket.send_fds(self._control, [len(text).to_bytes(4, "big") + text], sent)
            while sent:  # or a pipe would not end with the child
                os.close(sent.pop())
            ended = self._watch(pipes, time.monotonic() + MOST_WALLS * max(child.wall for child in children) + PATIENCE)
        finally:
            for fd in (*sent, *links, *pipes):
                os.close(fd)
        texts = {(i, place): bytes(text) for i, place, text in pipes.values()}
        return [
            Ended(status, seconds, late, texts.get((i, STDOUT), b""), texts[i, OUT])
            for i, (status, seconds, late) in enumerate(ended)
        ]

    @staticmethod
    def _pipe(pipes: dict, child: int, place: int) -> int:
        """A pipe whose end to read is entered in `pipes`; returns the other end."""
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        pipes[ours] = child, place, bytearray()
        return theirs

    def _watch(self, pipes: dict[int, tuple[int, int, bytearray]], end: float) -> list:
        """Read the pipes until the box says that all is over. Raises Dead if it does not in time."""
        poller = select.poll()
        control = self._control.fileno()
        for fd in (control, *pipes):
            poller.register(fd, select.POLLIN)
        stopped = over = False
        while not over:
            ready = {fd for fd, _ in poller.poll(max(0.0, 1000 * (end - time.monotonic())))}
            if not ready:
                raise Dead("the box does not answer")
            over = control in ready
            for fd in pipes if over else ready & pipes.keys():  # at the end, what is left in them
                text = pipes[fd][2]
                with suppress(BlockingIOError):
                    while len(text) <= MOST_OUTPUT:
                        part = os.read(fd, 2**16)
                        text += part
                        if not part:
                            poller.unregister(fd) if not over else None
                            break
                if len(text) > MOST_OUTPUT and not stopped and not over:
                    stopped = True
                    tell(self._control, {"stop": True})
                    poller.unregister(fd)
        return self._answer()["ended"]

    def _answer(self) -> dict:
        try:
            return receive(self._control)[0]
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise Dead("the box for programs ended; its own message, if any, is above") from error

    def close(self) -> None:
        """End the box and what runs in it."""
        if self.process is not None:
            self._control.close()
            with suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def memory_file(content: bytes) -> int:
    """A descriptor of a file in memory that nobody can change any more."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("task", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]
    if hasattr(os, "memfd_create"):
        fcntl.fcntl(fd, ADD_SEALS, ALL_SEALS)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
