"""Files that appear whole or not at all, and directories that one process works in. Checkpoints have their own file."""

import fcntl
import os
from pathlib import Path


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
