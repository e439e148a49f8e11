r"""Competition mathematics: files in the form of Hendrycks' MATH (arXiv 2103.03874), of which MATH-500 is a part.

A row is `{"problem", "solution", "answer"?, "level"?, "subject"? or "type"?}`. The solution ends in `\boxed{}`. Without
an `answer` the gold is what stands in that box.

- `path` is a directory with train.jsonl and test.jsonl (MATH-500 has only the second), or one file, which is divided.
- `DIRECTORY:level=3-5,subject=Algebra+Geometry` takes a part of it. Subjects may be in small letters, and with `_`.

Left out: grading (`rewards/boxed.py`), and the hub, from which `hf download` gets such files.
"""

from functools import partial
from pathlib import Path

from data import prompts
from data.boxes import last_box
from data.options import span, split_path
from data.problem import Problem, Task
from data.rows import fields_of, read_rows, split_of_files

TASK = Task(
    rewards=("boxed.format", "boxed.math_verify"),
    correct="boxed.math_verify",
    format="boxed.format",
    graders=("boxed.math_verify", "hendrycks", "minerva"),
    lenient=None,
)
STOP = ["\n\nProblem:"]
LEVELS = (1, 5)


def load(split: str, *, path: str | None, num_shots: int, seed: int) -> list[Problem]:
    """The problems of a split. `info` has `level` (1 to 5, or None) and `subject` (or "") too.

    Args:
      split: `train`, `validation` or `test`.
      path: as above.
      num_shots: exemplars in each prompt, drawn from the shortest training rows and left out of train and validation.
      seed: decides the exemplars and what is held out.

    Raises:
      ValueError: there is no path, a file or a row is not of this form, an option is unknown or leaves nothing, or
        exemplars are asked for without a file of train.
    """
    if path is None:
        raise ValueError(
            "data_path: data 'hendrycks_math' needs a file, or a directory with train.jsonl and test.jsonl"
        )
    name, options = split_path(path, ("level", "subject"))
    place = Path(name).expanduser()
    read = partial(_problems, options=options)
    shots = []
    if num_shots:
        train = split_of_files("train", place, seed, read)
        shots = prompts.choose_shots([_shot(problem) for problem in train], num_shots, seed)
    problems = split_of_files(split, place, seed, read)
    if split == "test":
        prompts.check_no_leak([problem.info for problem in problems], shots)
    else:
        shown = {shot["question"] for shot in shots}
        problems = [problem for problem in problems if problem.info["question"] not in shown]
    return [_with_shots(problem, shots) for problem in problems]


def ask(question: str) -> str:
    """The question in the prompt format, with the form that the answer must have."""
    return f"Problem: {question}\nPut the final answer into \\boxed{{}}.\nSolution:"


def _problems(file: Path, options: dict[str, str]) -> list[Problem]:
    levels = span(options["level"], "level", *LEVELS) if "level" in options else None
    subjects = [_plain(subject) for subject in options.get("subject", "").split("+") if subject]
    problems = [_problem(row, where) for where, row in read_rows(file)]
    known = sorted({problem.info["subject"] for problem in problems})
    for subject in subjects:
        if subject not in map(_plain, known):
            raise ValueError(f"data_path: subject {subject!r} is not one of {', '.join(known)}")
    return [
        problem
        for problem in problems
        if (levels is None or problem.info["level"] in levels)
        and (not subjects or _plain(problem.info["subject"]) in subjects)
    ]


def _problem(row: dict, where: str) -> Problem:
    for field in ("problem", "solution"):
        if not isinstance(row.get(field), str):
            raise ValueError(f"{where}: {field!r} must be a string, not {row.get(field)!r}; {fields_of(row)}")
    answer = row.get("answer", last_box(row["solution"]))
    if not isinstance(answer, str):
        raise ValueError(f"{where}: there is no 'answer', and no closed \\boxed{{}} in the solution")
    level = str(row.get("level", "")).removeprefix("Level ")
    told = {"level": int(level) if level in ("1", "2", "3", "4", "5") else None}
    told["subject"] = str(row.get("subject", row.get("type", "")))
    question, solution = row["problem"].strip(), row["solution"].strip()
    return Problem(
        ask(question), answer, {"question": question, "solution": solution, "shots": [], "stop": STOP, **told}
    )


def _with_shots(problem: Problem, shots: list[dict]) -> Problem:
    exemplars = "".join(f"{ask(shot['question'])} {shot['solution']}\n\n" for shot in shots)
    return Problem(exemplars + problem.prompt, problem.answer, {**problem.info, "shots": shots})


def _shot(problem: Problem) -> dict:
    return {"question": problem.info["question"], "solution": problem.info["solution"], "answer": problem.answer}


def _plain(subject: str) -> str:
    return subject.lower().replace("_", " ").replace("&", "and").strip()
