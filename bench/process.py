"""One measurement, one process: its peak memory is its own, its crash is an entry in the results, and it has a limit.

`call` runs a function of bench in a fresh Python and gives its result, or the reason why there is none, as a dict.
Arguments and results are JSON. Left out: what is measured.
"""

import importlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grpo.run.version import commit

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 0.1
PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


def call(function: str, arguments: dict, *, limit: float, max_bytes: float = math.inf, threads: int = 0) -> dict:
    """What a function returns for these arguments, called in a process of its own.

    Args:
        function: `module:name`; takes keyword arguments and returns a dict, both as JSON has them.
        arguments: its arguments.
        limit: seconds after which the process is ended.
        max_bytes: resident memory beyond which it is ended (looked at every 0.1 s; Linux only).
        threads: of torch in the process; 0: as torch decides.

    Returns:
        the function's result; or `{"error": sentence}`, with `"out_of_memory": True` where that was the reason.
    """
    threads_of = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | threads_of | {"PYTHONPATH": paths}
    with tempfile.TemporaryDirectory() as place:
        asked, answered, log = (Path(place) / name for name in ("asked.json", "answered.json", "log"))
        asked.write_text(json.dumps(arguments))
        command = [sys.executable, "-m", "bench.process", function, str(asked), str(answered)]
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, env=environment
            )
            try:
                failed = _wait(process, limit, max_bytes)
            finally:
                process.kill()
                process.communicate()
        if not failed and answered.exists():
            failed = json.loads(answered.read_text())
        elif not failed:
            killed = process.returncode == -9
            why = "most likely for want of memory" if killed else " ".join(log.read_text().split("\n")[-2:]).strip()
            failed = {"error": f"ended with code {process.returncode}: {why}", "out_of_memory": killed}
        if "error" in failed and (said := log.read_text()[-4000:].strip()):
            print(said, file=sys.stderr)
        return failed


def _wait(process: subprocess.Popen, limit: float, max_bytes: float) -> dict:
    """Wait until the process has ended: {}. Over a limit: the error."""
    deadline = time.monotonic() + limit
    while process.poll() is None:
        if time.monotonic() > deadline:
            return {"error": f"took longer than {limit:.0f} s"}
        if _resident_bytes(process.pid) > max_bytes:
            return {"error": f"needs more than {max_bytes / 1e9:.0f} GB", "out_of_memory": True}
        time.sleep(POLL_SECONDS)
    return {}


def _resident_bytes(pid: int) -> int:
    """Of a process, now; 0 where that can not be read."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine(device: str) -> dict:
    """What this machine is, in words and numbers. Imports torch only for a GPU: on a CPU the caller stays small.

    A process inherits the peak of resident memory of the one that starts it, so that one must hold little.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    gpu = None
    if device == "cuda":
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu,
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and what matters here, and the commit; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"commit": commit()}


def _answer(function: str, arguments: dict) -> dict:
    """Call the function here; what it raises becomes the error."""
    module, name = function.split(":")
    try:
        return getattr(importlib.import_module(module), name)(**arguments)
    except Exception as error:  # whatever a library does: it is a result, and stops no other measurement
        if not isinstance(error, ValueError):  # which says what is wrong in its sentence
            traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        kind = type(error).__name__
        memory = isinstance(error, MemoryError) or "out of memory" in first or "can't allocate memory" in first
        sentence = first if kind == "ValueError" else f"{kind}: {first}"
        return {"error": sentence, "out_of_memory": memory}


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, and with it the other end of stdin."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name, asked, answered = sys.argv[1:]
    result = _answer(name, json.loads(Path(asked).read_text()))
    Path(answered).write_text(json.dumps(result))
