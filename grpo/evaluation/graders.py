"""Graders read the answer from a completion and say whether it is right. They are pure functions of text and problem.

A grader is `(completion, problem) -> (value read or None, correct)`. Graders differ in where they look for the answer,
and this alone can change a published accuracy by tens of points. Evaluation therefore applies several of them to the
same transcripts. The caller has cut the text at the stop string, or kept it whole. Left out: statistics over many
answers (`statistics.py`).
"""

import re

from data.problem import Problem
from grpo.evaluation import graders_math
from grpo.evaluation.graders_math import Graded
from rewards import gsm8k, gsm8k_published

LM_EVAL_STRICT = re.compile(r"#### (-?[0-9.,]+)")
LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def reaches(value: float | None, needed: float) -> bool:
    """Whether the value of a reward is enough to count: partial credit is not, a rounding error of a sum is no lack."""
    return value is not None and value >= needed - 1e-6


def marker(completion: str, problem: Problem) -> Graded:
    """The training reward (`gsm8k.correctness`): the one number on the last line that starts with `####`."""
    return gsm8k.marked_number(completion), reaches(gsm8k.correctness(completion, problem), 1.0)


def marker_first(completion: str, problem: Problem) -> Graded:
    """The published training reward (`gsm8k_published.correctness`): the first number after the first `####`."""
    value = gsm8k_published._first_answer(completion)
    return value or None, reaches(gsm8k_published.correctness(completion, problem), 1.0)


def last_number(completion: str, problem: Problem) -> Graded:
    """The last number of the completion, wherever it stands."""
    return gsm8k.final_number(completion), reaches(gsm8k.last_number(completion, problem), 1.0)


def published(completion: str, problem: Problem) -> Graded:
    """The published evaluation with its faults: compare the last integer of prompt + completion with the gold, as text.

    - It reads no sign, comma or decimals, so no completion can match a gold of `1,080` or `-7`.
    - If the completion has no number, it takes the last number of the prompt.
    - If the text runs on, it takes the last number of some later question.
    """
    integers = re.findall(r"\d+", problem.prompt + completion)
    return (integers[-1], integers[-1] == problem.answer) if integers else (None, False)


def lm_eval_strict(completion: str, problem: Problem) -> Graded:
    """lm-evaluation-harness, gsm8k, filter `strict-match`: the first `#### (-?[0-9.,]+)`."""
    match = LM_EVAL_STRICT.search(completion)
    return _lm_eval(match[1] if match else None, problem)


def lm_eval_flexible(completion: str, problem: Problem) -> Graded:
    """lm-evaluation-harness, gsm8k, filter `flexible-extract`: the last `(-?[$0-9.,]{2,})|(-?[0-9]+)`."""
    matches = LM_EVAL_FLEXIBLE.findall(completion)
    return _lm_eval((matches[-1][0] or matches[-1][1]).strip() if matches else None, problem)


def _lm_eval(value: str | None, problem: Problem) -> Graded:
    """Compare as the harness does: as text, after removing `,`, `$` and a final period from both sides."""
    if value is None:
        return None, False
    plain = [re.sub(r"\.$", "", re.sub(r"[,$]", "", text)) for text in (value, problem.answer)]
    return value, plain[0] == plain[1]


GRADERS = {
    "marker": marker,
    "marker_first": marker_first,
    "last_number": last_number,
    "published": published,
    "lm_eval_strict": lm_eval_strict,
    "lm_eval_flexible": lm_eval_flexible,
    **graders_math.GRADERS,
}
ALSO_CALLED = {"gsm8k.correctness": "marker", "gsm8k_published.correctness": "marker_first"}
"""Reward functions that are graders by another name."""
