"""The box: a process that closes itself in, then forks a sealed child for each program it is asked to run.

It serves one request at a time: some children with their descriptors, of which the last one decides when all end. It
never reads what they run, so nothing of one program is in the memory of the next. Left out: verdicts, and the side
that asks (`client.py`).
"""

import builtins
import contextlib
import encodings
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import site
import socket
import sys
import time
import warnings
from array import array

from rewards.sandbox import checker, layers, program
from rewards.sandbox.filter import seal

LIBRARY = """
abc argparse array ast asyncio atexit base64 bdb binascii bisect bz2 calendar cmath cmd code codecs collections
collections.abc colorsys cProfile concurrent.futures concurrent.futures.thread configparser contextlib contextvars copy
copyreg csv ctypes dataclasses datetime decimal difflib dis doctest email.message enum errno faulthandler fileinput
fnmatch fractions functools gc getopt glob gzip hashlib heapq hmac html html.parser http importlib.abc importlib.util
inspect io ipaddress itertools json keyword linecache locale logging lzma math mimetypes mmap multiprocessing numbers
opcode operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform pprint profile pstats queue quopri
random re reprlib resource sched secrets select selectors shelve shlex shutil signal socket sqlite3 stat statistics
string stringprep struct subprocess symtable sys sysconfig tempfile textwrap threading time timeit token tokenize trace
traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request uuid warnings weakref
xml.etree.ElementTree zipfile zlib zoneinfo _strptime _pydecimal _pydatetime __future__ graphlib
"""
"""What programs may import: after the seal nothing else can be found."""
ROLES = {"script": program.script, "solution": program.solution, "checker": checker.main, "function": checker.function}
"""What a child can be."""
BUSY, MOST_WALLS = 0.1, 3.0
"""A child that uses such a share of a processor does not sleep, and its wall time is so many times as long."""
LONGER = 2.0
"""Seconds by which a checker outlasts the program that it asks."""
CPU_CLOCK = 2
"""With the number of a process, the clock of its CPU time."""
FAILED = 70
"""The exit code of a child that could not begin."""


def main(number: int) -> None:
    """Close in and serve, until the client closes its end of the socket.

    Args:
        number: the descriptor of the socket. The first message says what to import, from where, and what to leave out.
    """
    control = socket.socket(fileno=os.dup(number))
    os.close(number)
    asked, _ = receive(control)
    load(asked["preload"], asked["path"])
    nothing = os.open(os.devnull, os.O_RDWR)
    base = layers.own_bytes()  # while there is a /proc
    unsealed = "" if asked["unsafe"] else layers.why_not()
    names = [] if asked["unsafe"] or unsealed else layers.close_in(asked["without"])
    gc.collect()
    gc.freeze()  # what is never looked at again by the collector is not copied by each child
    tell(control, {"layers": names, "unsealed": unsealed, "pid": os.getpid()})
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    own = "own user" in names
    settings = {"seals": not asked["unsafe"], "base": base, "own_user": own, "pid": os.getpid()}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request, fds = receive(control)
            if "children" in request:  # not a late `stop`
                tell(control, {"ended": serve(control, request["children"], fds, nothing, wake, settings)})


def load(preload: list[str], path: list[str]) -> None:
    """Import everything that programs may need. A preload `module:function` is also called, without arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARY.split():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        sys.path += [place for place in path if place not in sys.path]
        for name in preload:
            module, _, function = name.partition(":")
            loaded = importlib.import_module(module)
            if function:
                getattr(loaded, function)()
    for codec in pkgutil.iter_modules(encodings.__path__):
        with contextlib.suppress(ImportError):  # those of Windows
            importlib.import_module(f"encodings.{codec.name}")
    time.strptime("2000", "%Y")
    site.setquit()
    builtins.copyright = builtins.credits = builtins.license = None
    sys.path.clear()
    sys.path_importer_cache.clear()


def serve(
    control: socket.socket, children: list[dict], fds: list[int], nothing: int, wake: int, settings: dict
) -> list:
    """Run the children of a request to their end.

    Args:
        control: a message on it means stop.
        children: of each its `role`, its `cpu` and `wall` seconds, and the `places` of its descriptors.
        fds: the descriptors, in the order of the places of all children.
        nothing: /dev/null.
        wake: is readable when a child has ended.
        settings: whether children are sealed, and what they begin with.

    Returns:
        [exit code or minus the signal, CPU seconds, whether its wall time was over], for each child.
    """
    left = iter(fds)
    started = time.monotonic()
    running: dict[int, int] = {}
    ends = [started + child["wall"] for child in children]
    ended: list = [None] * len(children)
    late = [False] * len(children)
    for i, child in enumerate(children):
        own = {place: next(left) for place in child["places"]}
        pid = os.fork()
        if pid == 0:
            begin(child, own, nothing, settings)
        running[pid] = i
    for fd in fds:
        os.close(fd)
    while running:
        wait = max(0.0, min(ends[i] for i in running.values()) - time.monotonic())
        ready = {fd for fd, _ in polled(control.fileno(), wake, wait)}
        if control.fileno() in ready:
            receive(control)
            ends = [0.0] * len(ends)
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
        while running:
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if not pid:
                break
            i = running.pop(pid, None)
            if i is not None:
                ended[i] = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, late[i]]
                if i == len(children) - 1:
                    ends = [0.0] * len(ends)  # it decides, so the others have nothing left to do
        for pid, i in running.items():
            if time.monotonic() >= ends[i]:
                if ends[i] and computes(pid, children[i]["wall"], time.monotonic() - started):
                    ends[i] += 1
                    ends[-1] = max(ends[-1], ends[i] + LONGER)  # so what waits for it goes on too
                    continue
                late[i] = late[i] or ends[i] > 0
                os.kill(pid, signal.SIGKILL)
    return ended


def computes(pid: int, wall: float, passed: float) -> bool:
    """Whether a child whose wall time is over has not slept, but waited for a processor. It then goes on for a while.

    Args:
        pid: of the child.
        wall: its wall time, in seconds.
        passed: seconds since it began.
    """
    if sys.platform != "linux":
        return False
    used = time.clock_gettime((~pid << 3) | CPU_CLOCK)
    return used > BUSY * passed and passed < MOST_WALLS * wall


def polled(control: int, wake: int, seconds: float) -> list:
    """Which of two descriptors can be read, after waiting up to some seconds."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(wake, select.POLLIN)
    return poller.poll(1000 * seconds + 1)


def begin(child: dict, own: dict[int, int], nothing: int, settings: dict) -> None:
    """Become a child: only its own descriptors, its limits, the seal, and then its role. Never returns."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        layers.die_with_parent()
        assert os.getppid() == settings["pid"], "the box has ended before"
        for place in range(6):
            os.dup2(own.get(place, nothing), place + 64)
        os.closerange(0, 64)
        for place in range(6):
            if place < 3 or place in own:
                os.dup2(place + 64, place)
        os.closerange(6, 256)
        program.prepare(settings["seals"])
        layers.limit(child["cpu"], settings["base"], settings["own_user"])
        if settings["seals"]:
            seal()
    except BaseException:
        os._exit(FAILED)
    try:
        ROLES[child["role"]]()
    except BaseException:
        os._exit(program.RAISED)
    os._exit(0)


def receive(control: socket.socket) -> tuple[dict, list[int]]:
    """A message and its descriptors. Raises EOFError when the client is gone."""
    numbers = array("i")
    head, extra, _, _ = control.recvmsg(4, socket.CMSG_SPACE(16 * numbers.itemsize))
    if len(head) < 4:
        raise EOFError
    for _, _, data in extra:
        numbers.frombytes(data[: len(data) // numbers.itemsize * numbers.itemsize])
    size, text = int.from_bytes(head, "big"), b""
    while len(text) < size:
        part = control.recv(size - len(text))
        if not part:
            raise EOFError
        text += part
    return json.loads(text), list(numbers)


def tell(control: socket.socket, message: dict) -> None:
    """Answer the client."""
    text = json.dumps(message).encode()
    control.sendall(len(text).to_bytes(4, "big") + text)
