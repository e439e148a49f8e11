"""Texts of an evaluation on disk: a file per model and number of shots, a line per text; whole, or as far as it came.

Beside the texts of an evaluation that was cut short lies `unfinished.json`, which says what they are made of: the same
evaluation goes on from them, and no other takes them for its own. Left out: what a text is worth (`grading.py`).
"""

import json
import shutil
from pathlib import Path

from grpo.evaluation.protocol import NO_RESULT, EvalOptions
from grpo.files import read_object, write_whole

ROW = dict.fromkeys(("model", "question", "prompt", "answer", "completion", "ended"), str)
ROW |= dict.fromkeys(("shots", "index", "sample", "tokens"), int)
ROW |= {"info": dict, "stop": list, "stop_early": bool, "stop_tokens": int | None}
"""What a line holds."""

UNFINISHED = "unfinished.json"


def refuse_taken(out: Path) -> None:
    """Raise ValueError where a whole evaluation lies."""
    if (out / "eval.json").exists():
        raise ValueError(f"out: {out} holds an evaluation already; choose another directory")


def made_of(options: EvalOptions, precision: str, models: dict[str, str]) -> dict:
    """What texts depend on, beside their problems.

    Args:
        options: of the evaluation.
        precision: what `auto` means here.
        models: name -> directory or hub name.

    Returns:
        Plain values, equal to what comes back from a file of JSON.
    """
    files = {name: [_file(path) for path in sorted(Path(source).glob("*"))] for name, source in models.items()}
    chosen = sorted(vars(options).keys() - NO_RESULT - {"shots", "graders", "format"})
    content = {name: getattr(options, name) for name in chosen} | {"precision": precision}
    return json.loads(json.dumps(content | {"models": {name: files[name] or models[name] for name in models}}))


def _file(path: Path) -> list:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def left(out: Path, ingredients: dict, instead: bool = False) -> dict[str, list[dict]]:
    """What the same evaluation has left in its directory when it was cut short.

    Args:
        out: the directory; it need not be there.
        ingredients: what `made_of` says of this evaluation.
        instead: whether something else that is there is no obstacle.

    Returns:
        Rows by name of file without its suffix, as `read` gives them.

    Raises:
        ValueError: another evaluation is there, whole or a part of it.
    """
    if not instead:
        refuse_taken(out)
    if _goes_on(out, ingredients):
        return {path.stem: read(path, "out") for path in out.glob("*_*shots.jsonl")}
    if not instead and (out / UNFINISHED).exists():
        before = _unfinished(out)
        names = sorted(name for name in before | ingredients if before.get(name) != ingredients.get(name))
        raise ValueError(
            f"out: {out} holds a part of an evaluation with other options or weights ({', '.join(names)}); choose "
            "another directory, or delete it"
        )
    return {}


def begin(out: Path, ingredients: dict, instead: bool = False) -> None:
    """Make the directory, unfinished until `finish`; `instead` of something else that is there, which is deleted.

    Raises:
        OSError: it can not be made.
    """
    if instead and not _goes_on(out, ingredients):
        shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out: {out} can not be made ({error.strerror})") from error
    write_whole(out / UNFINISHED, json.dumps(ingredients) + "\n")


def _goes_on(out: Path, ingredients: dict) -> bool:
    return (out / UNFINISHED).exists() and _unfinished(out) == ingredients


def _unfinished(out: Path) -> dict:
    return read_object((out / UNFINISHED).read_bytes(), out / UNFINISHED, {})


def finish(out: Path, result: dict) -> None:
    """Write `eval.json`, which stands for a whole evaluation."""
    write_whole(out / "eval.json", json.dumps(result, indent=1) + "\n")
    (out / UNFINISHED).unlink(missing_ok=True)


def read(path: Path, option: str) -> list[dict]:
    """The rows of a file.

    Raises:
        ValueError: a line is none; names the option, the file and the line.
    """
    with open(path, "rb") as lines:  # not splitlines: a completion may hold other line separators
        return [read_object(line, f"{option}: {path}, line {i}", ROW) for i, line in enumerate(lines, start=1)]


def refuse_partial(texts: dict[str, list[dict]], directory: Path) -> None:
    """Raise ValueError if a transcript has lost lines, or base and tuned did not answer the same problems."""
    asked: dict[int, list[int]] = {}
    for name, rows in texts.items():
        index, samples = list(dict.fromkeys(row["index"] for row in rows)), 1 + max(row["sample"] for row in rows)
        whole = len(rows) == len(index) * samples
        whole = whole and all(row["sample"] == i % samples for i, row in enumerate(rows))
        if not whole or asked.setdefault(rows[0]["shots"], index) != index:
            raise ValueError(
                f"regrade: {directory / name}.jsonl must hold {samples} of every problem that the others hold"
            )
        if not all(isinstance(text, str) for row in rows for text in row["stop"]):
            raise ValueError(f"regrade: {directory / name}.jsonl: stop must be texts")
