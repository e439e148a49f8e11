"""Files of rank 0 for ranks on hosts without a shared disk. Left out: who reads them, and data sets."""

import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from grpo import distributed

PIECE = 1 << 26
"""Bytes that are sent at once."""


@contextmanager
def at_hand(path: str | None) -> Iterator[str | None]:
    """A directory of rank 0 on every rank: where it is, or a temporary copy for ranks that see no such directory.

    A collective call. A directory of the same name with other files, of an earlier run perhaps, is not the same. What
    is no directory of rank 0, such as a name on the hub, stays as it is.

    Raises:
        OSError: a copy can not be written.
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
        _refuse_failed(_receive(Path(path), files, copy if writes else None))
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


def _receive(source: Path, files: dict[str, tuple[int, int]], copy: Path | None) -> str:
    """Rank 0 sends its files, and who has a place for a copy writes them; returns what went wrong in writing."""
    trouble = ""
    for name, (size, _) in files.items():
        if distributed.is_main():
            file = open(source / name, "rb")  # noqa: SIM115
        if copy is not None and not trouble:
            trouble = _append(copy / name, b"")  # a file may be empty
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
            if distributed.is_main():
                piece = torch.frombuffer(bytearray(file.read(len(piece))), dtype=torch.uint8)
            distributed.broadcast_tensor(piece)
            if copy is not None and not trouble:
                trouble = _append(copy / name, piece.numpy().tobytes())
        if distributed.is_main():
            file.close()
    return trouble


def _append(file: Path, content: bytes) -> str:
    """Returns what went wrong, in words."""
    try:
        file.parent.mkdir(exist_ok=True)
        with open(file, "ab") as written:
            written.write(content)
    except OSError as error:
        return f"{file} can not be written ({error.strerror})"
    return ""


def _refuse_failed(trouble: str) -> None:
    """Raise OSError on every rank if one of them has had trouble."""
    if said := [each for each in distributed.gather_objects(trouble) if each]:
        raise OSError(said[0])
