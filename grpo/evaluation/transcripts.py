"""The transcripts of an evaluation on disk: one file per model and number of shots, one line per answer.

An interrupted evaluation also leaves `unfinished.json`, which records the options and model files behind its texts. The
same evaluation continues from them, and any other refuses them. Left out: grading (`grading.py`).
"""

import json
import shutil
from pathlib import Path

from grpo.evaluation.protocol import NO_RESULT, EvalOptions
from grpo.files import read_object, write_whole

ROW = dict.fromkeys(("model", "question", "prompt", "answer", "completion", "ended"), str)
ROW |= dict.fromkeys(("shots", "index", "sample", "tokens"), int)
ROW |= {"info": dict, "stop": list, "stop_early": bool, "stop_tokens": int | None}
"""The fields of a line, and their types."""

UNFINISHED = "unfinished.json"


def refuse_taken(out: Path) -> None:
    """Raise ValueError if `out` holds a finished evaluation."""
    if (out / "eval.json").exists():
        raise ValueError(f"out: {out} holds an evaluation already; choose another directory")


def made_of(options: EvalOptions, precision: str, models: dict[str, str]) -> dict:
    """Everything that the texts depend on, except their problems.

    Args:
        options: of the evaluation.
        precision: the precision used, with `auto` resolved.
        models: name -> directory or hub name.

    Returns:
        Plain values that are equal after a round trip through JSON.
    """
    files = {name: [_file(path) for path in sorted(Path(source).glob("*"))] for name, source in models.items()}
    chosen = sorted(vars(options).keys() - NO_RESULT - {"shots", "graders", "format", "threshold"})
    content = {name: getattr(options, name) for name in chosen} | {"precision": precision}
    return json.loads(json.dumps(content | {"models": {name: files[name] or models[name] for name in models}}))


def _file(path: Path) -> list:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def left(out: Path, ingredients: dict, instead: bool = False) -> dict[str, list[dict]]:
    """The rows that the same evaluation left when it was interrupted.

    Args:
        out: the directory; it need not exist.
        ingredients: what `made_of` returned for this evaluation.
        instead: whether another evaluation in `out` may be replaced.

    Returns:
        {file name without suffix: its rows, as `read` returns them}.

    Raises:
        ValueError: another evaluation is there, finished or not.
    """
    if not instead:
        refuse_taken(out)
    if _goes_on(out, ingredients):
        return {path.stem: read(path, "out") for path in out.glob("*_*shots.jsonl")}
    if not instead and (out / UNFINISHED).exists():
        before = _unfinished(out)
        names = sorted(name for name in before | ingredients if before.get(name) != ingredients.get(name))
        raise ValueError(
            f"out: {out} holds an unfinished evaluation with other options or weights ({', '.join(names)}); choose "
            "another directory, or delete this one"
        )
    return {}


def begin(out: Path, ingredients: dict, instead: bool = False) -> None:
    """Make the directory and mark it as unfinished. With `instead`, delete another evaluation that is there.

    Raises:
        OSError: the directory cannot be made.
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
    """Write `eval.json` and remove the mark: the evaluation is finished."""
    write_whole(out / "eval.json", json.dumps(result, indent=1) + "\n")
    (out / UNFINISHED).unlink(missing_ok=True)


def read(path: Path, option: str) -> list[dict]:
    """The rows of a file.

    Raises:
        ValueError: a line is not a row; the message names the option, the file and the line.
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
                f"regrade: {directory / name}.jsonl must hold {samples} sample(s) of each problem that the others hold"
            )
        if not all(isinstance(text, str) for row in rows for text in row["stop"]):
            raise ValueError(f"regrade: {directory / name}.jsonl: stop must be a list of texts")
