"""Files that appear whole or not at all, JSON checked as it is read, directories of one process. Not checkpoints."""

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write text (UTF-8) so that a crash at any moment leaves the old file or the new one.

    Raises:
        OSError: the path can not be written; the old file, if any, is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror})") from error


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
    """Write JSON objects, a line each, as `write_whole` does."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_object(text: bytes, where: object, kinds: Mapping[str, Any]) -> dict:
    """The JSON object in a UTF-8 text, with NaN and infinities, for which JSON has no place, as None.

    Raises:
        ValueError: names `where` and what is wrong, such as a name of `kinds` that is missing or of another type.
    """
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: must be a JSON object, not {found!r:.60}")
    check_kinds(found, where, kinds)
    return found


def check_kinds(found: dict, where: object, kinds: Mapping[str, Any]) -> None:
    """Raise ValueError, naming `where`, for the first name that is missing in an object or of another type."""
    for name, kind in kinds.items():
        if name not in found:
            raise ValueError(f"{where}: lacks {name!r}")
        if not isinstance(found[name], kind):
            allowed = getattr(kind, "__name__", kind)
            raise ValueError(f"{where}: {name} is {found[name]!r:.60}: must be of type {allowed}")


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


def lock_directory(directory: Path) -> int:
    """Keep other processes out until the returned descriptor is closed, or this process ends.

    Raises:
        ValueError: another process has it. File systems without locks are taken as free.
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
