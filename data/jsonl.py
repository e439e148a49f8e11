"""One's own problems: JSON lines with `prompt` and `answer`. The prompt reaches the policy exactly as written.

`path` is a directory with train.jsonl and test.jsonl, or one .jsonl file of which a tenth (at most 500 problems) is the
test split. A tenth of the training lines (at most 500) is validation. Both are drawn by the seed; equal prompts stay on
one side. There is no prompt format here, hence no exemplars: write them into the prompts.

Optional fields of a line: `stop`, a list of strings that end a completion (default none, so only EOS does), the same in
all lines; `question`, what a chat template is given (default the prompt); `system`, the system turn that it is given
(default none). Every other field is found in `Problem.info`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data.problem import Problem
from data.splits import hold_out


def load(split: str, *, path: str | None, num_shots: int, seed: int) -> list[Problem]:
    """The problems of a split; `path` is a directory with train.jsonl and test.jsonl, or one .jsonl file.

    Raises:
      ValueError: no path, a file that is missing or malformed (with its line), or `num_shots` other than 0.
    """
    if path is None:
        raise ValueError("data_path: data 'jsonl' needs a .jsonl file or a directory with train.jsonl and test.jsonl")
    if num_shots != 0:
        raise ValueError(f"num_shots: {num_shots} is not 0, but the prompts of data 'jsonl' are used as written")
    place = Path(path).expanduser()
    if place.is_dir():
        if split == "test":
            return _problems(place / "test.jsonl")
        train = _problems(place / "train.jsonl")
    else:
        train, test = hold_out(_problems(place), seed, at_most=500, key=_prompt)
        if split == "test":
            return test
    train, validation = hold_out(train, seed, at_most=500, key=_prompt)
    return train if split == "train" else validation


def read_lines(file: Path) -> Iterator[tuple[int, dict]]:
    """The JSON objects of a file, each with its line number from 1; blank lines are skipped.

    Raises:
      ValueError: the file cannot be read, or a line (named) is no JSON object.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"data_path: {file} cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: not a JSON object but {row!r}")
        yield number, row


def _problems(file: Path) -> list[Problem]:
    return [_problem(row, f"{file}, line {number}") for number, row in read_lines(file)]


def _problem(row: dict, where: str) -> Problem:
    info = {"question": row.get("prompt"), "shots": [], "stop": [], **row}
    prompt, answer = info.pop("prompt", None), info.pop("answer", None)
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: 'prompt' must be a string, not {prompt!r}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: 'answer' must be a string or a number, not {answer!r}")
    if not isinstance(info["question"], str):
        raise ValueError(f"{where}: 'question' must be a string, not {info['question']!r}")
    if not isinstance(info["stop"], list) or not all(isinstance(stop, str) and stop for stop in info["stop"]):
        raise ValueError(f"{where}: 'stop' must be a list of strings, none empty, not {info['stop']!r}")
    if info["shots"] != []:
        raise ValueError(f"{where}: 'shots' is taken (the exemplars of a prompt format); name the field otherwise")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {error.object[error.start]!r} is half of a character, which no file can hold"
        ) from None
    return Problem(prompt, str(answer), info)


def _prompt(problem: Problem) -> str:
    return problem.prompt
