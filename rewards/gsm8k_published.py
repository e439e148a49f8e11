"""The GSM8K rewards of the published work, faults included, to reproduce it. For anything else use `rewards/gsm8k.py`.

Known faults, kept:
- `format` needs a newline before the marker, so a completion that begins with its answer line has no format.
- `format` is paid wherever the marker stands, also after the model ran on into another question, and whatever follows.
- `correctness` grades the first marker of the text, not the last: `#### Step 1` is read as the answer 1.
- It reads the first number after the marker: `#### 6 * 3 = 18` is 6, and `18 or maybe 20` is 18.
- A sign is never read: -7 and 7 are both 7.
- A gold with a comma (`1,080`) does not parse, so that no completion can be right.
- A comma alone passes for a number and then does not parse; digits of every script are digits.
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
    """What the group of that expression would hold, or "". The expression itself is quadratic in a row of `#`."""
    for line in completion.split("\n"):
        marker = line.find("####")
        if marker >= 0 and (number := NUMBER.search(line, marker)):
            return number[0]
    return ""
