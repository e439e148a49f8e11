"""Write files whole or not at all, check JSON while reading it, and lock directories.

Left out: checkpoints (`run/checkpoint.py`).
"""

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes. A crash at any moment leaves the old file or the new one.

    Raises:
        OSError: the path cannot be written; an old file is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror})") from error


def make_directory(directory: Path, option: str) -> None:
    """Make a directory if it is missing.

    Raises:
        OSError: it cannot be made; the sentence begins with the option that names it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option}: {directory} can not be made ({error.strerror})") from error


def give_usual_mode(directory: Path) -> None:
    """Give every file of a directory the mode that umask gives to a new file.

    Libraries that write through a temporary file, as safetensors does, leave files that no other user can read.
    """
    umask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(umask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write JSON objects, one per line, with `write_whole`."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_object(text: bytes, where: object, kinds: Mapping[str, Any]) -> dict:
    """Read a JSON object. NaN and infinities, which JSON does not allow, become None.

    Args:
        text: UTF-8.
        where: the place of the text, for messages.
        kinds: {name: type} that the object must have.

    Raises:
        ValueError: the text is not such an object; the message names `where` and what is wrong.
    """
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: must be a JSON object, not {found!r:.60}")
    check_kinds(found, where, kinds)
    return found


def read_metrics(file: Path) -> list[dict[str, float | None]]:
    """The lines of a run's `metrics.jsonl`, one for each step. The run may still be writing.

    Raises:
        ValueError: a line (named) is none that a run writes.
        OSError: the file can not be read.
    """
    lines = []
    for i, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):  # the last line may not be whole
        where = f"{file}, line {i}"
        lines.append(read_object(line, where, {"step": int}))
        check_kinds(lines[-1], where, dict.fromkeys(lines[-1], int | float | None))
    return lines


def check_kinds(found: dict, where: object, kinds: Mapping[str, Any]) -> None:
    """Raise ValueError for the first name of `kinds` that is missing or has another type. It names `where`."""
    for name, kind in kinds.items():
        if name not in found:
            raise ValueError(f"{where}: lacks {name!r}")
        if not isinstance(found[name], kind):
            allowed = getattr(kind, "__name__", kind)
            raise ValueError(f"{where}: {name} is {found[name]!r:.60}: must be of type {allowed}")


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def lock_directory(directory: Path) -> int:
    """Lock a directory against other processes, until this process ends or closes the returned descriptor.

    On a file system without locks nothing is locked and nothing is raised.

    Raises:
        ValueError: another process has locked it.
    """
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ValueError(f"run_name: another process works in {directory}; wait for it, or take another name") from None
    except OSError:
        pass
    return held
