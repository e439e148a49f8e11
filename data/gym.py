"""The tasks of Reasoning Gym (https://github.com/open-thought/reasoning-gym) by name: generated, with a scorer each.

`data_path` is a task with its own options: `countdown:size=2000,min_numbers=3`. A list is written `a|b`. `size` is that
of the train split. Splits come from seeds that lie far apart, since the library draws item i of seed s as item i + 1 of
seed s - 1. A question of the test or validation split is never in train. Some tasks are refused (`REFUSED`).

Needs the extra `gym`. Left out: composite tasks and curricula, and scoring (`rewards/gym.py`).
"""

import ast
import dataclasses

from data import prompts
from data.options import did_you_mean, split_path, whole
from data.problem import Problem, Task

TASK = Task(
    rewards=("gym.format", "gym.correctness"),
    correct="gym.correctness",
    format="gym.format",
    graders=("gym.correctness",),
    lenient=None,
)
SIZES = {"train": 2000, "validation": 100, "test": 200}
LARGEST = 10**6
"""Of a train split, and how far the seeds of two splits lie apart."""
REFUSED = {
    "game_of_life_halting": "its scorer pays in full for any text",
    "coin_flip": "its scorer pays in full for 0",
    "complex_arithmetic": "its scorer pays in full for nan",
    "puzzle24": "its scorer pays in full for any four numbers that make 24",
    "list_functions": "it does not follow its seed, so no two runs have the same problems",
    "composite": "it takes data sets as its options",
}
"""As measured with version 0.1.25."""


def load(split: str, *, path: str | None, num_shots: int, seed: int) -> list[Problem]:
    """The problems of a split. `info` has `task`, `options`, and `entry`: what the scorer needs, as a Python literal.

    Args:
      split: `train`, `validation` or `test`.
      path: the task and its options.
      num_shots: exemplars in each prompt, which show an answer without a solution. They are left out of train.
      seed: decides the train split and the exemplars. Validation and test have the same problems for every seed.

    Raises:
      ValueError: the library is missing, the task is unknown or refused, an option is wrong, or the task has no gold
        answers to show.
    """
    name, options = split_path(path or "")
    size = whole(options.pop("size", str(SIZES["train"])), "size", 1, LARGEST)
    settings = _settings(name, options)
    held_out = {part: _entries(name, settings, SIZES[part], place) for place, part in enumerate(("test", "validation"))}
    asked = {question for entries in held_out.values() for question in entries}
    place = 2 + seed % 2000  # numpy takes seeds below 2**32
    drawn = _entries(name, settings, size, place) if split == "train" or num_shots else {}
    train = {question: entry for question, entry in drawn.items() if question not in asked}
    examples = [{"question": q, "solution": "", "answer": entry["answer"] or ""} for q, entry in train.items()]
    shots = prompts.choose_shots(examples, num_shots, seed)
    if any(not shot["answer"] for shot in shots):
        raise ValueError(f"num_shots: {num_shots}, but task {name!r} of data 'gym' has no gold answers to show")
    shown = {shot["question"] for shot in shots}
    entries = held_out.get(split, {question: entry for question, entry in train.items() if question not in shown})
    told = {"task": name, "options": settings, "shots": shots, "stop": prompts.STOP}
    return [
        Problem(
            _prompt(question, shots),
            entry["answer"] or "",
            {"question": question, "entry": repr(_plain(entry)), **told},
        )
        for question, entry in entries.items()
    ]


def _prompt(question: str, shots: list[dict]) -> str:
    exemplars = "".join(f"{_ask(shot['question'])} <answer>{shot['answer']}</answer>\n\n" for shot in shots)
    return exemplars + _ask(question)


def _ask(question: str) -> str:
    return f"Question: {question}\nPut the answer between <answer> and </answer>.\nSolution:"


def _settings(name: str, options: dict[str, str]) -> dict:
    """The options of a task as values. Raises ValueError as `load` does."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError("data: 'gym' needs the package reasoning-gym: pip install 'grpo[gym]'") from error
    if name in REFUSED:
        raise ValueError(f"data_path: task {name!r} of data 'gym' is refused: {REFUSED[name]}")
    if name not in DATASETS:
        tasks = sorted(set(DATASETS) - set(REFUSED))
        hint = did_you_mean(name, tasks) or "; name a task, such as countdown:size=2000"
        raise ValueError(f"data_path: {name!r} is not one of {', '.join(tasks)}{hint}")
    kind = DATASETS[name][1]
    known = [field.name for field in dataclasses.fields(kind) if field.name not in ("seed", "size")]
    for option in options:
        if option not in known:
            raise ValueError(f"data_path: {option!r} is not one of the options of {name!r}: {', '.join(known)}, size")
    settings = {option: _value(text) for option, text in options.items()}
    try:
        made = kind(**settings)
        if hasattr(made, "validate"):
            made.validate()
    except Exception as error:  # an assertion of the library, or a text where it compares numbers
        raise ValueError(f"data_path: {name!r} does not take {options}: {' '.join(str(error).split())}") from error
    return settings


def _value(text: str) -> object:
    if "|" in text:
        return [_value(part) for part in text.split("|")]
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _plain(value: object) -> object:
    """Without the types of numpy, whose names are no Python literals; tuples stay what they are."""
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(map(_plain, value))
    return value.item() if hasattr(value, "dtype") else value


def _entries(name: str, settings: dict, size: int, place: int) -> dict[str, dict]:
    """{question: entry} of one split, each question once."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, **settings, seed=2 * LARGEST * place, size=size)
    try:
        entries = [dataset[i] for i in range(size)]
    except Exception as error:
        raise ValueError(f"data_path: {name!r} with {settings} can not be drawn ({error})") from error
    return {entry["question"]: entry for entry in reversed(entries)}
