"""The GSM8K rewards of the published work with their faults, to reproduce it. Otherwise use `rewards/gsm8k.py`.

Known faults, kept:
- `format` needs a newline before the marker, so a completion that begins with the answer line gets 0.
- `format` accepts a marker anywhere, even in a later question that the model wrote itself, and any text after it.
- `correctness` grades the first marker instead of the last, so `#### Step 1` is read as the answer 1.
- It reads the first number after the marker: `#### 6 * 3 = 18` is read as 6, and `18 or maybe 20` as 18.
- It ignores the sign: -7 is read as 7.
- A gold with a comma (`1,080`) cannot be parsed, so no completion can be right.
- A comma alone is read as a number and then cannot be parsed. Digits of every script count as digits.
"""

import re

from data.problem import Problem

NUMBER = re.compile(r"[\d,]+(?:\.\d+)?")
TOLERANCE = 1e-3


def format(completion: str, problem: Problem) -> float:
    """0.5 if `\\n#### The final answer is \\d+` is found anywhere, else 0."""
    return 0.5 if re.search(r"\n#### The final answer is \d+", completion) else 0.0


format.full_value = 0.5


def correctness(completion: str, problem: Problem) -> float:
    """1.0 if the first match of `####.*?([\\d,]+(?:\\.\\d+)?)` is within 1e-3 of the gold, else 0.

    Commas are removed from the match, not from the gold.
    """
    try:
        answer, gold = float(_first_answer(completion).replace(",", "")), float(problem.answer)
    except ValueError:
        return 0.0
    return 1.0 if abs(answer - gold) <= TOLERANCE else 0.0


def _first_answer(completion: str) -> str:
    """The group of that expression, or "". The expression itself takes quadratic time on a long row of `#`."""
    for line in completion.split("\n"):
        marker = line.find("####")
        if marker >= 0 and (number := NUMBER.search(line, marker)):
            return number[0]
    return ""
