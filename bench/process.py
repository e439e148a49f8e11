"""Run each measurement in its own process. So its peak memory is its own, a crash is one result, and time is limited.

`call` runs a function of `bench` in a fresh Python and returns its result or its error as a dict. Arguments and results
are JSON. Left out: the measurements themselves.
"""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grpo.run.version import commit

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


def call(function: str, arguments: dict, *, limit: float, threads: int = 0) -> dict:
    """Call a function in its own process.

    Args:
        function: `module:name`. It takes keyword arguments and returns a dict, all JSON values.
        arguments: its keyword arguments.
        limit: seconds after which the process is ended.
        threads: number of torch threads in the process; 0: torch decides.

    Returns:
        The function's result, or `{"error": sentence}`.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as place:
        asked, answered, log = (Path(place) / name for name in ("asked.json", "answered.json", "log"))
        asked.write_text(json.dumps(arguments))
        command = [sys.executable, "-m", "bench.process", function, str(asked), str(answered)]
        with log.open("w") as stream:
            try:
                code = subprocess.run(command, stdout=stream, stderr=stream, env=environment, timeout=limit).returncode
                why = " (killed, probably out of memory)" if code == -9 else ""
                result = {"error": f"ended with code {code}{why}"}
            except subprocess.TimeoutExpired:
                result = {"error": f"took longer than {limit:.0f} s"}
        if answered.exists():
            result = json.loads(answered.read_text())
        if "error" in result:
            print(log.read_text()[-4000:].strip(), file=sys.stderr)
        return result


def surroundings() -> dict:
    """This machine, the versions of Python and of `PACKAGES` (None: not installed), and the commit.

    Nothing large is imported: a process inherits the peak resident memory of the process that starts it.
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "commit": commit()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    return {"machine": machine, "versions": versions}


def _processor() -> str:
    """The name of the processor. Only Linux says more than its kind."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def answer(function: str, arguments: dict) -> dict:
    """Call the function in this process. If it raises, return the error."""
    module, name = function.split(":")
    try:
        return getattr(importlib.import_module(module), name)(**arguments)
    except ValueError as error:  # its sentence is enough
        return {"error": str(error)}
    except Exception as error:  # any error is a result, and must not stop other measurements
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


if __name__ == "__main__":
    name, asked, answered = sys.argv[1:]
    result = answer(name, json.loads(Path(asked).read_text()))
    Path(answered).write_text(json.dumps(result))
