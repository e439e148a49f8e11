"""Files of rank 0 for ranks on hosts without a shared disk. Left out: who reads them, and data sets."""

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo import distributed

PIECE = 1 << 26
"""Bytes that are sent at once."""


@contextmanager
def at_hand(path: str | None) -> Iterator[str | None]:
    """A directory of rank 0 on every rank: where it is, or a temporary copy for ranks that see no such directory.

    A collective call. A directory of the same name with other files, of an earlier run perhaps, is not the same. What
    is no directory of rank 0, such as a name on the hub, stays as it is.

    Raises:
        OSError: the copy of this rank can not be written.
    """
    files = distributed.broadcast_object(_files(path))
    missing = files is not None and _files(path) != files
    hosts = distributed.gather_objects(socket.gethostname() if missing else None)
    if not any(hosts):
        yield path
        return
    copy = Path(tempfile.gettempdir()) / distributed.broadcast_object(f"grpo-{uuid.uuid4().hex}")
    writes = missing and hosts.index(hosts[distributed.rank()]) == distributed.rank()  # one of each host
    try:
        _send(Path(path), list(files), copy if writes else None)
        distributed.gather_objects(None)  # until all have written it
        yield str(copy) if missing else path
        distributed.gather_objects(None)  # until all have read it
    finally:
        if writes:
            shutil.rmtree(copy, ignore_errors=True)


def _files(path: str | None) -> dict[str, tuple[int, int]] | None:
    """{name: (bytes, time of the last change)} of the files in a directory; None if it is none."""
    if path is None or not Path(path).is_dir():
        return None
    status = {file.name: file.stat() for file in sorted(Path(path).iterdir()) if file.is_file()}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in status.items()}


def _send(source: Path, names: list[str], copy: Path | None) -> None:
    """Rank 0 sends its files to all ranks, and each that has a place for a copy writes them there."""
    if copy is not None:
        copy.mkdir()
    for name in names:
        from_here = source / name if distributed.is_main() else os.devnull
        to_here = os.devnull if copy is None else copy / name
        with open(from_here, "rb") as read, open(to_here, "wb") as written:
            while piece := distributed.broadcast_object(read.read(PIECE)):
                written.write(piece)
