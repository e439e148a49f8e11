"""GSM8K: grade-school word problems with worked solutions (arXiv 2110.14168), from the hub or from local JSON lines.

A row is `{"question", "answer"}`. The answer is a solution with calculator marks (`<<48/2=24>>`, removed here) and a
last line `#### 72`.

- The test file is the test split.
- A tenth of the training file, at most 500 problems drawn by the seed, is the validation split. The rest is train.
- Exemplars are drawn from the `8 * num_shots` shortest rows (question + answer as in the file), and then removed from
  train and validation.

Left out: grading (`rewards/gsm8k.py`).
"""

import re
from pathlib import Path

from data import prompts
from data.hub import from_hub
from data.problem import Problem
from data.rows import fields_of, file_of, read_rows
from data.splits import hold_out

HUB_NAME = "openai/gsm8k"
CALCULATOR_MARK = re.compile(r"<<[^>]*>>")


def load(split: str, *, path: str | None, num_shots: int, seed: int) -> list[Problem]:
    """The problems of a split; the arguments are those of `data.load`.

    Args:
      split: `train`, `validation` or `test`.
      path: a directory with train.jsonl and test.jsonl; None: the hub.
      num_shots: exemplars in each prompt.
      seed: decides the exemplars and the validation split.

    Raises:
      ValueError: a file is missing or malformed (with the line), the hub cannot be reached, there are too many shots,
        or a test question is also an exemplar.
    """
    rows = _rows("train", path)
    shots = [
        _example(row)
        for row in prompts.choose_shots(rows, num_shots, seed, length=lambda row: len(row["question"] + row["answer"]))
    ]
    if split == "test":
        rows = _rows("test", path)
        prompts.check_no_leak(rows, shots)
    else:
        kept, held_out = hold_out(rows, seed, at_most=500, key=lambda row: row["question"])
        rows = prompts.without_shots(kept if split == "train" else held_out, shots)
    return [_problem(**_example(row), shots=shots) for row in rows]


def _problem(question: str, solution: str, answer: str, shots: list[dict]) -> Problem:
    info = {"question": question, "solution": solution, "shots": shots, "stop": prompts.STOP}
    return Problem(prompts.completion_prompt(question, shots), answer, info)


def _example(row: dict) -> dict:
    """Split a row into its parts at the last marker `####`. An earlier one would belong to the solution."""
    solution, gold = row["answer"].rsplit("#### ", 1)
    return {
        "question": row["question"],
        "solution": CALCULATOR_MARK.sub("", solution).rstrip(),
        "answer": gold.rstrip(),
    }


def _rows(split: str, path: str | None) -> list[dict]:
    return _hub_rows(split) if path is None else _local_rows(file_of(Path(path).expanduser(), split))


def _local_rows(file: Path) -> list[dict]:
    rows = []
    for where, row in read_rows(file):
        for field in ("question", "answer"):
            if not isinstance(row.get(field), str):
                raise ValueError(f"{where}: {field!r} must be a string, not {row.get(field)!r}; {fields_of(row)}")
        if "#### " not in row["answer"]:
            raise ValueError(f"{where}: 'answer' has no '#### ' before the gold answer")
        rows.append(row)
    return rows


def _hub_rows(split: str) -> list[dict]:
    try:
        return list(from_hub(HUB_NAME, "main", split))
    except ValueError as error:
        advice = "connect, or set data_path to a directory with train.jsonl and test.jsonl"
        raise ValueError(f"data: {error}; {advice}") from error
