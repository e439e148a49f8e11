"""The rows of a file, whatever kind it is: JSON lines or array, parquet, Arrow or CSV, also compressed or in UTF-16.

The kind is found from the content, not from the name. Only CSV is known by its name, since any text may have commas. A
file of another kind is one sentence that says what it is.
Left out: what the fields of a row mean (`jsonl.py`, `gsm8k.py`, `code_formats.py`).
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data.problem import Problem
from data.splits import part_of

ENDINGS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".csv", ".tsv", ".arrow")
"""Of the files of a split, in the order in which they are looked for."""
PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\0": lzma.decompress}
UNREADABLE = {
    b"PK\x03\x04": "a zip archive (an Excel file is one too)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"SQLite format": "an SQLite database",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull gets it)",
    b"<": "HTML or XML (a page that was downloaded instead of the file?)",
}
TABLES = {b"PAR1": "parquet", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream"}
"""What pyarrow reads, by its first bytes."""
READ = (
    "JSON lines (one object on each line), a JSON array, parquet, Arrow, and CSV in a file named .csv or .tsv are "
    "read, also packed with gzip, bz2 or xz"
)


def file_of(directory: Path, split: str) -> Path:
    """The file of a split in a directory, such as `train.jsonl` or `train.parquet`.

    Raises:
      ValueError: there is none; says what the directory does hold.
    """
    for ending in ENDINGS:
        if (directory / f"{split}{ending}").exists():
            return directory / f"{split}{ending}"
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    held = f"; the directory holds {', '.join(found[:5])}{', ...' if found[5:] else ''}" if found else ""
    if directory.is_file():
        raise ValueError(f"data_path: {directory} is a file: must be a directory, or read by data 'hub'")
    reason = "No such file or directory"
    raise ValueError(f"data_path: {directory / f'{split}.jsonl'} cannot be read ({reason}){held}")


def read_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a file, each with the words for its place (`FILE, line 3`); blank lines are skipped.

    Raises:
      ValueError: the file cannot be read or is of another kind, or a line (named) is no JSON object.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"data_path: {file} cannot be read ({error.strerror})") from error
    for start, unpack in PACKED.items():
        if content.startswith(start):
            try:
                content = unpack(content)
            except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
                raise ValueError(f"data_path: {file} is compressed, and damaged ({error})") from error
            break
    for start, kind in UNREADABLE.items():
        if content.lstrip().startswith(start):
            raise ValueError(f"data_path: {file} is {kind}; {READ}")
    table = next((kind for start, kind in TABLES.items() if content.startswith(start)), "")
    if table:
        rows, unit = _table(content, file, table), "row"
    elif {".csv", ".tsv"} & set(file.suffixes):
        rows, unit = _csv(_utf8(content, file), file), "row"
    else:
        content = _utf8(content, file)
        array = _array(content)
        rows = _lines(content, file) if array is None else enumerate(array, start=1)
        unit = "line" if array is None else "row"
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{file}, {unit} {number}: not a JSON object but {row!r}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"{error.object[error.start]!r} is half of a character (a lone surrogate)"
            raise ValueError(f"{file}, {unit} {number}: {half}, which no file can hold") from None
        yield f"{file}, {unit} {number}", row


def split_of_files(split: str, place: Path, seed: int, read: Callable[[Path], list[Problem]]) -> list[Problem]:
    """The problems of a split of one's own files.

    A tenth of the training problems, at most 500, is the validation split, and of a single file such a tenth is the
    test split before. Equal prompts stay in one split.

    Args:
      split: `train`, `validation` or `test`.
      place: a directory with files of train and test, or one file.
      seed: draws the splits.
      read: gives the problems of a file.
    """
    parts = {"train": partial(read, place)}
    if place.is_dir():
        parts = {name: lambda name=name: read(file_of(place, name)) for name in ("train", "test")}
    return part_of(split, parts, seed, key=_prompt)


def _prompt(problem: Problem) -> str:
    return problem.prompt


def fields_of(row: dict) -> str:
    """For the sentence about a field that is missing: those that are there."""
    return f"its fields are {', '.join(map(repr, row))}" if row else "it has no fields"


def plain(row: dict) -> dict:
    """A row as JSON has it: dates and the like are texts."""
    return json.loads(json.dumps(row, default=str))


def _table(content: bytes, file: Path, kind: str) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow.parquet  # here, so that other files do not need its time
    except ImportError as error:
        raise ValueError(f"data_path: {file} is {kind}, which needs the package pyarrow") from error
    readers = {
        "parquet": pyarrow.parquet.read_table,
        "an Arrow file": lambda source: pyarrow.ipc.open_file(source).read_all(),
        "an Arrow stream": lambda source: pyarrow.ipc.open_stream(source).read_all(),
    }
    try:
        rows = readers[kind](io.BytesIO(content)).to_pylist()
    except Exception as error:  # pyarrow's own types
        raise ValueError(f"data_path: {file} is {kind}, and damaged ({' '.join(str(error).split())})") from error
    for number, row in enumerate(rows, start=1):
        yield number, plain(row)


def _csv(content: bytes, file: Path) -> Iterator[tuple[int, dict]]:
    """The rows below the line with the names of the columns; every value is a text."""
    first = content.split(b"\n")[0]
    separator = "\t" if ".tsv" in file.suffixes else ";" if b";" in first and b"," not in first else ","
    try:
        table = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=separator, strict=True)
        names = next(table, [])
        if len(set(names)) < len(names):
            raise ValueError(f"data_path: {file} has two columns of the same name ({', '.join(map(repr, names))})")
        for number, values in enumerate(table, start=1):
            if values and len(values) != len(names):
                raise ValueError(f"{file}, row {number}: {len(values)} values for {len(names)} columns")
            if values:
                yield number, dict(zip(names, values, strict=True))
    except UnicodeError as error:
        raise ValueError(f"data_path: {file} is not UTF-8; save the file as that ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{file}, line {table.line_num}: not CSV ({error})") from error


def _utf8(content: bytes, file: Path) -> bytes:
    """UTF-16 and UTF-32 in UTF-8; JSON begins with an ASCII character, so that they show without a mark too."""
    head = content[:4]
    encoding = "utf-32" if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") else ""
    if not encoding and head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif not encoding and head[:2].strip(b"\0") in (b"{", b"[") and 0 in head[:2]:
        encoding = "utf-16-le" if head[1] == 0 else "utf-16-be"
    if not encoding:
        return content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode(encoding).removeprefix("\ufeff").encode()
    except UnicodeError as error:
        raise ValueError(f"data_path: {file} is neither text nor parquet ({error}); {READ}") from error


def _array(content: bytes) -> list | None:
    """The content as one JSON array; None if it is anything else."""
    if not content.lstrip().startswith(b"["):
        return None
    try:
        return json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object whose names are all different; JSON would take the last of two in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def _lines(content: bytes, file: Path) -> Iterator[tuple[int, object]]:
    first = True
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            kind = _kind(content) if first and isinstance(error, json.JSONDecodeError | UnicodeError) else ""
            if kind:
                raise ValueError(f"data_path: {file} is {kind}; {READ}") from error
            encoding = ", because it is not UTF-8; save the file as that" if isinstance(error, UnicodeError) else ""
            raise ValueError(f"{file}, line {number}: not JSON{encoding} ({error})") from error
        first = False


def _kind(content: bytes) -> str:
    """What a file is whose first line is no JSON, in words; empty if that does not show."""
    if 0 in content[:4096]:
        return "neither text nor parquet"
    first, start = content.lstrip().split(b"\n")[0].strip(), content.lstrip()[:1]
    if start == b"{":
        try:
            return f"one JSON object over several lines ({fields_of(json.loads(content))})"
        except ValueError:
            return ""
    for separator, name in ((b"\t", "tab-separated text"), (b",", "CSV"), (b";", "CSV")):
        if start != b"[" and separator in first and b"\n" in content.strip():
            columns = first.decode(errors="replace").split(separator.decode())
            return f"{name} (its columns are {', '.join(map(repr, columns[:8]))})"
    return ""
