"""Problems of others: a data set of the Hugging Face hub, or files of JSON, parquet, Arrow or CSV (`rows.py`).

`path` is one of:

- a file, which is divided in three;
- a directory with files of the splits, such as `train.csv`, `data/test-00000-of-00002.parquet` or what `save_to_disk`
  of the library `datasets` wrote;
- `org/name` on the hub, also `org/name:configuration`, `org/name:configuration:split` (this split is divided in three)
  and, behind these, `@revision`.

A test or validation split that is missing is held out of train: a tenth, at most 500, drawn by the seed. A prompt is a
text or a list of chat messages. Left out: worked examples, several answers to one prompt, and streaming.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from data.boxes import last_box
from data.jsonl import as_problem
from data.problem import Problem
from data.rows import ENDINGS, fields_of, plain, read_rows
from data.splits import SPLITS, part_of

PROMPTS = ("prompt", "question", "problem")
ANSWERS = ("answer", "solution")
"""Columns that are taken if no option names one; the first that is there."""
NAME = re.compile(
    r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]*))?(:(?P<split>\w+))?(@(?P<revision>[\w./-]+))?"
)
ROLES = ("system", "user", "assistant")
Rows = Iterable[tuple[str, dict]]
"""Rows, each with the words for its place."""


def load(
    split: str,
    *,
    path: str | None,
    num_shots: int,
    seed: int,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    answer_rule: str | None = None,
) -> list[Problem]:
    """The problems of a split.

    Args:
      split: `train`, `validation` or `test`.
      path: as above.
      num_shots: must be 0.
      seed: draws the splits that are missing.
      prompt_column, answer_column: their columns, `a.b` for the entry b of column a; None: of `PROMPTS`, of `ANSWERS`.
      answer_rule: how the answer is taken from its column, see `reader`; None: as it is.

    Raises:
      ValueError: the data cannot be read, a column is missing (those that are there are listed), or a row (named) has
        no prompt, or no answer by the rule.
    """
    if path is None:
        raise ValueError("data_path: data 'hub' needs org/name on the Hugging Face hub, a directory or a file")
    if num_shots != 0:
        raise ValueError(f"num_shots: {num_shots} is not 0, but data 'hub' has no worked examples")
    columns = {"prompt_column": (prompt_column, PROMPTS), "answer_column": (answer_column, ANSWERS)}
    read = reader(answer_rule)
    parts = _parts(path)
    if split not in parts and "train" not in parts:
        raise ValueError(f"data_path: {path} has the splits {', '.join(parts)}, so there is no {split!r} split")

    def problems_of(rows: Rows) -> list[Problem]:
        return [_problem(row, where, columns, read) for where, row in rows]

    makers = {name: partial(problems_of, rows) for name, rows in parts.items()}
    return part_of(split, makers, seed, key=lambda problem: problem.prompt)


def reader(rule: str | None) -> Callable[[str], str | None]:
    """The function that takes an answer from the text of its column, or None where there is none.

    - `as_is`: all of it.
    - `after_hashes`: what stands behind the last `####`.
    - `boxed`: what stands inside the last `\\boxed{}`, whose braces are balanced (`boxes.py`).
    - `regex:PATTERN`: the first group of the last match, or all of it if the pattern has no group.
    """
    if rule in (None, "as_is"):
        return lambda text: text
    if rule == "after_hashes":
        return lambda text: text.rpartition("####")[2].strip() if "####" in text else None
    if rule == "boxed":
        return last_box
    kind, _, pattern = rule.partition(":")
    if kind != "regex" or not pattern:
        raise ValueError(f"answer_rule: {rule!r} must be as_is, after_hashes, boxed or regex:PATTERN")
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer_rule: {pattern!r} is no regular expression ({error})") from error

    def last_match(text: str) -> str | None:
        found = list(expression.finditer(text))
        return found[-1][1 if expression.groups else 0] if found else None

    return last_match


def _parts(path: str) -> Mapping[str, Rows]:
    """{split: its rows, which are read when they are asked for}."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = {split: found for split in SPLITS if (found := _files(place, split))}
        if not files:
            held = ", ".join(sorted(file.name for file in place.iterdir())[:5]) or "nothing"
            raise ValueError(f"data_path: {place} has no file for train, validation or test; it holds {held}")
        return {split: chain.from_iterable(map(read_rows, found)) for split, found in files.items()}
    named = NAME.fullmatch(path)
    if place.is_file() or named is None or place.name.endswith(ENDINGS):
        return {"train": read_rows(place)}  # if it is not there, this says so
    return _on_the_hub(**{name: named[name] or None for name in ("name", "config", "split", "revision")})


def _files(directory: Path, split: str) -> list[Path]:
    """The files of a split, all of one kind: named after it, or in a folder of its name."""
    beside = [*directory.glob(f"{split}*"), *directory.glob(f"data/{split}*")]
    found = [file for file in beside if re.match(rf"{split}[-_.]", file.name)]
    found += [file for file in directory.glob(f"{split}/*") if file.name not in ("dataset_info.json", "state.json")]
    for ending in ENDINGS:
        if of_kind := sorted(file for file in found if file.is_file() and file.name.endswith(ending)):
            return of_kind
    return []


def from_hub(name: str, config: str | None, split: str | None, revision: str | None = None) -> Any:
    """What the library `datasets` reads from the Hugging Face hub: the rows of a split, or without one {split: rows}.

    Raises:
      ValueError: it could not be read; the message begins with the name.
    """
    import datasets  # imported here, because it takes a second and local files do not need it

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the libraries below raise many types: offline, unknown name, no such configuration
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name!r} could not be read from the Hugging Face hub ({reason})") from error


def _on_the_hub(name: str, config: str | None, split: str | None, revision: str | None) -> Mapping[str, Rows]:
    try:
        found = from_hub(name, config, split, revision)
    except ValueError as error:
        advice = "it is no file here either; is it org/name:configuration, and is there a connection?"
        raise ValueError(f"data_path: {error}; {advice}") from error
    tables = {"train": found} if split else dict(found)
    return {part: _rows_of(table, f"{name}, {split or part}") for part, table in tables.items()}


def _rows_of(table: Iterable[dict], where: str) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(table, start=1):
        yield f"{where} row {number}", plain(row)


def _problem(
    row: dict, where: str, columns: Mapping[str, tuple[str | None, tuple]], read: Callable[[str], str | None]
) -> Problem:
    asked, answer = (_value(row, where, option, *named) for option, named in columns.items())
    if isinstance(answer, str):
        text, answer = answer, read(answer)
        if answer is None:
            raise ValueError(f"{where}: answer_rule finds no answer in {text[-80:]!r}")
    if isinstance(asked, list):
        turns = _turns(asked, where)
        row = {**row, "system": turns[0]["content"] if turns[0]["role"] == "system" else None}
        asked = turns[-1]["content"]
        if len(turns) > 1 + (row["system"] is not None):
            row["turns"] = turns
    return as_problem({**row, "prompt": asked, "question": asked, "answer": answer}, where)


def _value(row: dict, where: str, option: str, named: str | None, usual: tuple[str, ...]) -> object:
    """The value of a column, or of an entry in it."""
    column = named or next((name for name in usual if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"{where}: there is no {' or '.join(usual)}; {fields_of(row)}; name one with {option}")
    value: object = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            raise ValueError(f"{where}: {option} is {column!r}, which is not there; {fields_of(row)}")
        value = value[part]
    return value


def _turns(messages: list, where: str) -> list[dict]:
    """Chat messages with role and content and nothing else; the last one is the user's."""
    for message in messages:
        known = isinstance(message, dict) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            shown = repr(message)[:80]
            raise ValueError(f"{where}: a message must have a role ({', '.join(ROLES)}) and a text, not {shown}")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message of a prompt must be the user's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
