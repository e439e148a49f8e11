"""Your own problems: JSON lines with `prompt` and `answer`. The policy gets the prompt exactly as written.

`path` is a directory with train.jsonl and test.jsonl, or one .jsonl file. Of one file a tenth (at most 500 problems) is
the test split. A tenth of the training lines (at most 500) is the validation split. The seed draws both, and equal
prompts stay in one split. JSON arrays and parquet files are read too, also compressed (`rows.py`). Left out: a prompt
format. So there are no exemplars unless the prompts contain them.

A line may have more fields:

- `stop`: a list of strings that end a completion, the same in all lines. By default only EOS ends it.
- `question`: the text for a chat template. By default this is the prompt.
- `system`: the system turn for a chat template. By default there is none.
- Every other field is passed on in `Problem.info`.
"""

import math
from pathlib import Path

from data.problem import Problem
from data.rows import fields_of, read_rows, split_of_files


def load(split: str, *, path: str | None, num_shots: int, seed: int) -> list[Problem]:
    """The problems of a split; the arguments are those of `data.load`.

    Args:
      split: `train`, `validation` or `test`.
      path: a directory with train.jsonl and test.jsonl, or one .jsonl file.
      num_shots: must be 0.
      seed: draws the splits.

    Raises:
      ValueError: there is no path, a file is missing or malformed (with the line), or `num_shots` is not 0.
    """
    if path is None:
        raise ValueError("data_path: data 'jsonl' needs a .jsonl file or a directory with train.jsonl and test.jsonl")
    if num_shots != 0:
        raise ValueError(f"num_shots: {num_shots} is not 0, but the prompts of data 'jsonl' are used as written")
    return split_of_files(split, Path(path).expanduser(), seed, _problems)


def _problems(file: Path) -> list[Problem]:
    return [_problem(row, where) for where, row in read_rows(file)]


def _problem(row: dict, where: str) -> Problem:
    given = {name: value for name, value in row.items() if value is not None or name in ("prompt", "answer")}
    info = {"question": row.get("prompt"), "shots": [], "stop": [], **given}
    prompt, answer = info.pop("prompt", None), info.pop("answer", None)
    if not isinstance(prompt, str):
        gsm8k = "; rows of GSM8K's form are read by --data gsm8k" if "#### " in str(answer) else ""
        raise ValueError(f"{where}: 'prompt' must be a string, not {prompt!r}; {fields_of(row)}{gsm8k}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: 'answer' must be a string or a number, not {answer!r}; {fields_of(row)}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{where}: 'answer' must be a string or a finite number, not {answer!r}")
    if not isinstance(info["question"], str):
        raise ValueError(f"{where}: 'question' must be a string, not {info['question']!r}")
    if not isinstance(info["stop"], list) or not all(isinstance(stop, str) and stop for stop in info["stop"]):
        raise ValueError(f"{where}: 'stop' must be a list of strings, none empty, not {info['stop']!r}")
    if info["shots"] != []:
        raise ValueError(f"{where}: 'shots' is reserved for exemplars; give the field another name")
    return Problem(prompt, str(answer), info)
