"""The transcripts of an evaluation on disk: one file per model and number of shots, one line per answer.

An evaluation that is not finished also leaves `unfinished.json`, which records the options and model files behind its
texts. The same evaluation continues from them, and any other refuses them. Left out: making the answers
(`transcribe.py`) and grading them (`grading.py`).
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from grpo.evaluation.protocol import NO_RESULT, EvalOptions
from grpo.files import make_directory, read_object, write_lines, write_whole

ROW = dict.fromkeys(("model", "question", "prompt", "answer", "completion", "ended"), str)
ROW |= dict.fromkeys(("shots", "index", "sample", "tokens"), int)
ROW |= {"info": dict, "stop": list, "stop_early": bool, "stop_tokens": int | None}
"""The fields of a line, and their types."""

FILE = "{model}_{shots}shots.jsonl"
FILES = FILE.format(model="*", shots="*")
UNFINISHED = "unfinished.json"


def made_of(options: EvalOptions, precision: str, models: dict[str, str]) -> dict:
    """Everything that the texts depend on, except their problems.

    Args:
        options: of the evaluation.
        precision: the precision used, with `auto` resolved.
        models: name -> directory or hub name.

    Returns:
        Plain values that are equal after a round trip through JSON.
    """
    others = NO_RESULT | {"shots", "graders", "lenient", "format", "threshold", "reasoning_end"}
    content = {name: value for name, value in vars(options).items() if name not in others}
    content |= {"precision": precision, "models": {}}
    for name, source in models.items():
        files = [(path.name, path.stat()) for path in sorted(Path(source).glob("*"))]
        content["models"][name] = [[file, status.st_size, status.st_mtime_ns] for file, status in files] or source
    return json.loads(json.dumps(content))


def begin(out: Path, ingredients: dict, instead: bool = False) -> None:
    """Make the directory and mark it as unfinished.

    Args:
        out: the directory. It may hold what the same evaluation left when it was interrupted.
        ingredients: what `made_of` returned for this evaluation.
        instead: whether to replace another evaluation that is there.

    Raises:
        ValueError: another evaluation is there, finished or not.
        OSError: the directory cannot be made.
    """
    mark = out / UNFINISHED
    before = read_object(mark.read_bytes(), mark, {}) if mark.exists() else {}
    if instead and before != ingredients:
        shutil.rmtree(out, ignore_errors=True)
    refuse_taken(out)
    if any(out.glob(FILES)) and before != ingredients:
        names = sorted(name for name in before | ingredients if before.get(name) != ingredients.get(name))
        raise ValueError(
            f"out: {out} holds an unfinished evaluation with other options or weights ({', '.join(names)}); choose "
            "another directory, or delete this one"
        )
    make_directory(out, "out")
    write_whole(mark, json.dumps(ingredients) + "\n")


def refuse_taken(out: Path) -> None:
    """Raise ValueError if `out` holds a finished evaluation."""
    if (out / "eval.json").exists():
        raise ValueError(f"out: {out} holds an evaluation already; choose another directory")


def refuse_missing(directory: Path, models: Sequence[str], shots: Sequence[int]) -> None:
    """Raise ValueError if a file of these models and numbers of shots is not there."""
    names = [FILE.format(model=model, shots=number) for model in models for number in shots]
    if missing := [name for name in names if not (directory / name).exists()]:
        raise ValueError(f"regrade: {directory} has no {missing[0]}, but its options.yaml says it has; put it back")


def finish(out: Path, result: dict) -> None:
    """Write `eval.json` and remove the mark: the evaluation is finished."""
    write_whole(out / "eval.json", json.dumps(result, indent=1) + "\n")
    (out / UNFINISHED).unlink(missing_ok=True)


def append(file: Path, rows: list[dict]) -> None:
    """Add rows to a file."""
    with open(file, "a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answered(file: Path, asks: list[dict], samples: int) -> list[dict]:
    """The rows of a file that answer their problem, all samples of it. Nothing else stays in the file.

    Args:
        file: of an evaluation that was interrupted, perhaps in the middle of a line; it need not exist.
        asks: for each problem, the fields of a row that describe it.
        samples: per problem.
    """
    content = file.read_bytes() if file.exists() else b""
    rows = parse(content[: content.rfind(b"\n") + 1], f"out: {file}")
    asks = json.loads(json.dumps(asks))  # as a file has them
    rows = [row for row in rows if row["index"] < len(asks) and row.items() >= asks[row["index"]].items()]
    counts = Counter(row["index"] for row in rows)
    rows = [row for row in rows if counts[row["index"]] == samples]
    write_lines(file, rows)
    return rows


def parse(content: bytes, where: str) -> list[dict]:
    """The rows of a file.

    Raises:
        ValueError: a line is not a row; the message begins with `where` and the number of the line.
    """
    # A completion may hold other line separators, but bytes are split at line breaks only.
    return [read_object(line, f"{where}, line {i}", ROW) for i, line in enumerate(content.splitlines(), start=1)]


def read_all(directory: Path) -> list[list[dict]]:
    """The rows of each file of an evaluation, to be graded again.

    Raises:
        ValueError: there is no file, the evaluation is not finished, a line is not a row, or a file has lost lines.
    """
    files = sorted(directory.glob(FILES))
    if not files:
        raise ValueError(f"regrade: {directory} holds no transcripts (base_0shots.jsonl, ...)")
    if (directory / UNFINISHED).exists() and not (directory / "eval.json").exists():
        raise ValueError(f"regrade: {directory} holds an unfinished evaluation; finish it with its own command")
    texts = []
    asked: dict[int, list[int]] = {}
    for file in files:
        rows = parse(file.read_bytes(), f"regrade: {file}")
        if not rows:
            raise ValueError(f"regrade: a transcript in {directory} is empty")
        index = list(dict.fromkeys(row["index"] for row in rows))
        samples = 1 + max(row["sample"] for row in rows)
        whole = len(rows) == len(index) * samples and all(row["sample"] == i % samples for i, row in enumerate(rows))
        if not whole or asked.setdefault(rows[0]["shots"], index) != index:
            raise ValueError(f"regrade: {file} must hold {samples} sample(s) of each problem that the others hold")
        if not all(isinstance(text, str) for row in rows for text in row["stop"]):
            raise ValueError(f"regrade: {file}: stop must be a list of texts")
        texts.append(rows)
    return texts
