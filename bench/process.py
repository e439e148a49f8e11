"""Run each measurement in its own process. So its peak memory is its own, a crash is one result, and time is limited.

`call` runs a function of `bench` in a fresh Python and returns its result or its error as a dict. Arguments and results
are JSON. Left out: the measurements themselves.
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
    """Call a function in its own process.

    Args:
        function: `module:name`. It takes keyword arguments and returns a dict, all JSON values.
        arguments: its keyword arguments.
        limit: seconds after which the process is ended.
        max_bytes: resident memory above which the process is ended; checked every 0.1 s, on Linux only.
        threads: number of torch threads in the process; 0: torch decides.

    Returns:
        The function's result, or `{"error": sentence}`. `"out_of_memory": True` is added if that was the reason.
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
            why = "probably out of memory" if killed else " ".join(log.read_text().split("\n")[-2:]).strip()
            failed = {"error": f"ended with code {process.returncode}: {why}", "out_of_memory": killed}
        if "error" in failed and (said := log.read_text()[-4000:].strip()):
            print(said, file=sys.stderr)
        return failed


def _wait(process: subprocess.Popen, limit: float, max_bytes: float) -> dict:
    """Wait until the process ends, and return {}. If it exceeds a limit, return the error."""
    deadline = time.monotonic() + limit
    while process.poll() is None:
        if time.monotonic() > deadline:
            return {"error": f"took longer than {limit:.0f} s"}
        if _resident_bytes(process.pid) > max_bytes:
            return {"error": f"needs more than {max_bytes / 1e9:.0f} GB", "out_of_memory": True}
        time.sleep(POLL_SECONDS)
    return {}


def _resident_bytes(pid: int) -> int:
    """The resident memory of a process in bytes, or 0 if it cannot be read."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine(device: str) -> dict:
    """Describe this machine. torch is imported only for a GPU.

    The caller must stay small, because a process inherits the peak resident memory of the process that starts it.
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
    """The versions of Python and of `PACKAGES`, and the commit. None if a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"commit": commit()}


def _answer(function: str, arguments: dict) -> dict:
    """Call the function in this process. If it raises, return the error."""
    module, name = function.split(":")
    try:
        return getattr(importlib.import_module(module), name)(**arguments)
    except Exception as error:  # any error is a result, and must not stop other measurements
        if not isinstance(error, ValueError):  # the sentence of a ValueError is enough
            traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        kind = type(error).__name__
        memory = isinstance(error, MemoryError) or "out of memory" in first or "can't allocate memory" in first
        sentence = first if kind == "ValueError" else f"{kind}: {first}"
        return {"error": sentence, "out_of_memory": memory}


def _end_with_parent() -> None:
    """End this process when stdin closes, that is, when the process that started it has ended."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name, asked, answered = sys.argv[1:]
    result = _answer(name, json.loads(Path(asked).read_text()))
    Path(answered).write_text(json.dumps(result))
