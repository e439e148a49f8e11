"""The form of an answer that begins with reasoning: `<think>reasoning</think><answer>answer</answer>`.

The templates `r1_zero` and `think` of `data/prompts.py` ask for it. Left out: whether the answer is right. That is for
another reward, such as `gsm8k.last_number`, with the option `reasoning_end: </think>`.
"""

import re

from data.problem import Problem

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORM = re.compile(r"\s*<think>(.+)</think>\s*<answer>(.+)</answer>\s*", re.DOTALL)


def format(completion: str, problem: Problem, *, whole: str) -> float:
    """1 if the whole text is reasoning and then an answer, each in its tags, none of which stands there twice.

    The format reward of DeepSeek-R1, https://arxiv.org/abs/2501.12948 section 2.2.2. Neither part is empty.
    """
    found = FORM.fullmatch(whole)
    once = all(whole.count(tag) == 1 for tag in TAGS)
    return float(found is not None and once and all(part.strip() for part in found.groups()))


def sample(problem: Problem) -> str:
    """Some reasoning, then the gold answer."""
    return f"<think>Step by step.</think><answer>{problem.answer}</answer>"
