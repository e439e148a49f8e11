"""Programming problems, to be graded by running what the policy writes. Your own lines, or files in a usual format.

The files are those of `jsonl.py`: a directory with train and test, or one file that is divided. Formats are known by
their fields (`code_formats.py`): HumanEval, MBPP, APPS, TACO, LiveCodeBench, `verification_info`, and lines such as

    {"prompt": .., "tests": [{"input": "1 2\\n", "output": "3\\n"}, ..]}                        a whole program
    {"prompt": .., "entry_point": "add", "tests": [{"args": [1, 2], "result": 3}, ..]}          a function
    {"prompt": .., "entry_point": "add", "asserts": ["assert add(1, 2) == 3", ..]}              or "test": their code

- `checker`, beside tests of whole programs, is for problems with several right outputs: Python code that is run as
  `checker.py INPUT OUTPUT PRINTED`, on three files, and prints 1 if what was printed is right. `generated_checker` of
  open-r1/codeforces has this form.
- `test` may be a file of pytest as in KodCode: functions `test_...` without arguments, which call what they import from
  `solution`. Of pytest they may use `pytest.raises(Error)`.
- A line may have `solution`, `stop`, `question`, `seconds` (of the processor, for one program), `id` and `setup` (code
  before the asserts).
- `form: block`, the default: the program is what the completion has between ```python and ```. Without a chat template
  or `stop`, the end of the first block ends the completion. `form: continue`: the program is the prompt, or `prefix`,
  and the completion.
- HumanEval is for testing only. As the test file of a directory it stands beside another training file.
- At most 16 tests of a problem are kept. Problems whose tests pass the program a class, or an object of one of its
  classes, are left out by name.

`python -m data.check FILE` runs every solution that is in a file. Left out: grading (`rewards/code.py`).
"""

import os
import sys
from functools import cache
from pathlib import Path

from data.code_formats import Parts, read_row
from data.code_tests import MOST, Unfit
from data.problem import Problem, Task
from data.rows import fields_of, read_rows, split_of_files

MOST_SECONDS = 15
"""Of the processor, that a line may allow its program."""
CLOSED = "\n```\n"
"""Ends a block. A base model, which is asked without a chat template, would go on. Others end by themselves, and may
write several blocks."""
TASK = Task(
    rewards=("code.correctness", "code.compiles"),
    reward_weights=(1.0, 1.0),
    timeout=20.0,  # a program that hangs ends by its own limit long before
    correct="code.correctness",
    format=None,
    graders=("code.correctness",),
    lenient=None,
)


def load(split: str, *, path: str | None, num_shots: int, seed: int) -> list[Problem]:
    """The problems of a split; the arguments are those of `data.load`. Each has in `info`, beside the usual:

    - `tests`: {"kind": "stdin", "cases": [{"input", "output"}, ..], "checker"?}, or {"kind": "call", "entry_point",
      "cases": [{"args", "kwargs"?, "result"}, ..]}, or {"kind": "asserts", "code", "names", "setup"}, where `names` are
      the functions of the program that the code calls;
    - `form`, and with `continue` the `prefix`; `name`; `format`; `seconds` if the line has it.

    The answer is the solution, or empty.

    Args:
      split: `train`, `validation` or `test`.
      path: a directory with files of train and test, or one file.
      num_shots: must be 0.
      seed: draws the splits.

    Raises:
      ValueError: there is no path, a file is missing or malformed (with the line), it is HumanEval and the split is
        not test, or `num_shots` is not 0.
    """
    if path is None:
        raise ValueError("data_path: data 'code' needs a file of problems, or a directory with train and test")
    if num_shots != 0:
        raise ValueError(f"num_shots: {num_shots} is not 0, but the prompts of data 'code' have no worked examples")
    place, read = Path(path).expanduser(), cache(problems_of)
    if split == "test" and not place.is_dir() and all(problem.info["format"] == "HumanEval" for problem in read(place)):
        return read(place)
    problems = split_of_files(split, place, seed, read)
    if split != "test" and any(problem.info["format"] == "HumanEval" for problem in problems):
        raise ValueError(
            f"data_path: {place} is HumanEval, which is for testing only: make a directory with another training file "
            "and it as the test file; or, to train on it all the same, rename 'canonical_solution' to 'solution' in "
            "its lines and add the field 'form' with 'continue'"
        )
    return problems


def problems_of(file: Path) -> list[Problem]:
    """All problems of a file. What was left out is said on stderr, once."""
    problems, unfit, cut = [], [], 0
    for where, row in read_rows(file):
        name = str(row.get("task_id") or row.get("question_id") or row.get("id") or where.rpartition(", ")[2])
        try:
            form, parts = read_row(row)
            problems.append(_problem(row, name, form, parts))
        except Unfit as error:
            unfit.append(f"{name} {error}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}; {fields_of(row)}") from error
        else:
            cut += parts.cut
    if unfit:
        _say(f"data: {file}: {len(unfit)} of {len(problems) + len(unfit)} problems are left out: {'; '.join(unfit)}")
    if cut:
        _say(f"data: {file}: of {cut} of {len(problems)} problems the {MOST} tests with the longest inputs are kept")
    return problems


def _problem(row: dict, name: str, form: str, parts: Parts) -> Problem:
    info = {"question": parts.prompt, "shots": [], "stop": [], "form": "block"} | parts.info
    info |= {"name": name, "format": form, "tests": parts.tests}
    if info["form"] == "block" and row.get("stop") is None:
        info["stop_plain"] = [CLOSED]
    stop, seconds = info["stop"], row.get("seconds")
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"'stop' must be a list of strings, none empty, not {stop!r}")
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MOST_SECONDS:
            raise ValueError(f"'seconds' must be a number > 0 and <= {MOST_SECONDS}, not {seconds!r}")
        info["seconds"] = seconds
    if isinstance(row.get("system"), str):
        info["system"] = row["system"]
    return Problem(parts.prompt, parts.answer, info)


@cache
def _say(sentence: str) -> None:
    """Once in a process, and by one process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)
