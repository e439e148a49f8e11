"""The rewards of Reasoning Gym (`data/gym.py`): the answer is what stands between the last `<answer>` and `</answer>`.

Its scorers run sealed and with a limit of CPU time (`sandbox/`, `score_gym.py`). A scorer that fails or hangs gives 0.
Eight of them execute the answer, which could then give itself any score, so what they get is limited to what an answer
needs. Needs the extra `gym`. Left out: a reward between 0 and 1 as a default, since many scorers pay a part for the
question itself or for any text that contains the gold answer.
"""

import functools
import importlib.util
import json
import re

from data.problem import Problem
from rewards import sandbox

LONGEST = 4000
"""Characters of an answer."""
CPU_SECONDS = 4.0
LEAST_SECONDS = 60.0
"""Of a call: a scorer that hangs ends before, also where the machine is busy."""
PRELOAD = ("rewards.score_gym:warm",)
TIP = 0.05
"""What scorers give to any text at all, at most. It counts as nothing."""
TAGS = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)

PLAIN = re.compile(r"[A-Z0-9_,\s'\"\[\]-]*")
"""Numbers, capital letters, and lists of both: not a name of Python, nor of a variable of the scorer."""
ARITHMETIC = re.compile(r"(?:[0-9]|[-+()\s]|\*(?!\*)|/(?!/))*+")
"""Whole numbers and the four operations. With a letter x any number could be made, of x/x."""
WORDS = r"(?:sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi|Abs|[A-Za-z])(?![A-Za-z])"
FORMULA = re.compile(rf"(?:(?<![A-Za-z0-9.]){WORDS}|(?<=[0-9]){WORDS}|[0-9]++(?:\.[0-9]*+)?|\.[0-9]++|[-+*/^(),\s])*+")
"""Numbers, letters and functions with operators between them."""
ALLOWED = dict.fromkeys(("string_insertion", "spiral_matrix", "binary_matrix", "n_queens"), PLAIN)
ALLOWED |= dict.fromkeys(("simple_integration", "intermediate_integration", "polynomial_multiplication"), FORMULA)
ALLOWED["countdown"] = ARITHMETIC
"""What an answer may be, for the tasks whose scorers execute it."""


def correctness(completion: str, problem: Problem) -> float:
    """1.0 if the scorer of the task gives the full 1, else 0."""
    return float(score(completion, problem) >= 1.0 - 1e-9)


def score(completion: str, problem: Problem) -> float:
    """What the scorer of the task gives, from 0 to 1. A tip for any text at all counts as 0.

    Raises:
      ValueError: the machine can not seal a process.
    """
    found = TAGS.findall(completion)
    answer = found[-1].strip() if found else ""
    task = problem.info["task"]
    if not answer or len(answer) > LONGEST or (task in ALLOWED and not ALLOWED[task].fullmatch(answer)):
        return 0.0
    value = _scored(task, json.dumps(problem.info["options"]), problem.info["entry"], answer)
    return min(value, 1.0) if value > TIP else 0.0  # nan is not above it


def format(completion: str, problem: Problem) -> float:
    """0.5 if there is exactly one pair of the tags, something between them and only white space behind them, else 0."""
    found = list(TAGS.finditer(completion))
    alone = completion.count("<answer>") == completion.count("</answer>") == len(found) == 1
    return 0.5 if alone and found[0][1].strip() and not completion[found[0].end() :].strip() else 0.0


format.full_value = 0.5


def sample(problem: Problem) -> str:
    """The gold answer between the tags."""
    return f"<answer>{problem.answer}</answer>"


def prepare() -> dict[str, str]:
    """Start the sandbox with the scorers in it. ValueError if the library is missing, or nothing can be sealed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("rewards: 'gym' needs the package reasoning-gym: pip install 'grpo[gym]'")
    return {"sandbox": sandbox.described(sandbox.box(PRELOAD))}


@functools.lru_cache(maxsize=1024)
def _scored(task: str, options: str, entry: str, answer: str) -> float:
    """What the scorer gives; several rewards ask for the same."""
    asked = "rewards.score_gym:score", [task, json.loads(options), entry, answer]
    value = sandbox.run_trusted(*asked, CPU_SECONDS, PRELOAD).value
    return value if isinstance(value, float) else 0.0
