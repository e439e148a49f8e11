"""One's own problems: JSON lines with `prompt` and `answer`. The prompt reaches the policy exactly as written.

`path` is a directory with train.jsonl and test.jsonl, or one .jsonl file of which a tenth (at most 500 problems) is the
test split. A tenth of the training lines (at most 500) is validation. Both are drawn by the seed; equal prompts stay on
one side. Instead of JSON lines, a JSON array and parquet are read too, also packed (`rows.py`). There is no prompt
format here, hence no exemplars: write them into the prompts.

Optional fields of a line: `stop`, a list of strings that end a completion (default none, so only EOS does), the same in
all lines, and `question`, what a chat template is given (default the prompt). Every other field is found in
`Problem.info`.
"""

import json
from pathlib import Path

from data.problem import Problem
from data.rows import fields_of, file_of, read_rows
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
            return _problems(file_of(place, "test"))
        train = _problems(file_of(place, "train"))
    else:
        train, test = hold_out(_problems(place), seed, at_most=500, key=_prompt)
        if split == "test":
            return test
    train, validation = hold_out(train, seed, at_most=500, key=_prompt)
    return train if split == "train" else validation


def _problems(file: Path) -> list[Problem]:
    return [_problem(row, where) for where, row in read_rows(file)]


def _problem(row: dict, where: str) -> Problem:
    info = {"question": row.get("prompt"), "shots": [], "stop": [], **row}
    prompt, answer = info.pop("prompt", None), info.pop("answer", None)
    if not isinstance(prompt, str):
        gsm8k = "; rows of GSM8K's form are read by --data gsm8k" if "#### " in str(answer) else ""
        raise ValueError(f"{where}: 'prompt' must be a string, not {prompt!r}; {fields_of(row)}{gsm8k}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: 'answer' must be a string or a number, not {answer!r}; {fields_of(row)}")
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
