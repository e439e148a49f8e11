"""The GSM8K rewards: is the answer on one line of the right form, and is it right?

The right form is `#### The final answer is 18`; both rewards together are at most 1.5. They grade exactly the given
text: cutting at a stop string is the caller's. Lines end at `\\n` only, digits are ASCII, time is linear in the text.
"""

import re

from data.problem import Problem

NUMBER = r"[+\-\u2212]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.[0-9]+)?|\.[0-9]+)"
ANSWER_LINE = re.compile(rf"#### The final answer is \$?{NUMBER}(?:%| ?[A-Za-z]+)?\.?")
GOLD = re.compile(
    r"(?P<sign>[+\-\u2212]?)\$? ?(?P<after>[+\-\u2212]?)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?P<exponent>[eE][+\-]?[0-9]+)?"
)
"""A gold that is one number. Commas stand between groups of three digits only: `3,4` is a pair, not 34."""
TOLERANCE = 1e-3


def format(completion: str, problem: Problem) -> float:
    """0.5 if exactly one line reads `#### The final answer is NUMBER`, else 0.

    The number may have a `$` before it, and after it a `%` or one word, and a period. Spaces, tabs and `\\r` at the
    end of the line are ignored; at its start nothing is.
    """
    lines = [line for line in completion.split("\n") if ANSWER_LINE.fullmatch(line.rstrip(" \t\r"))]
    return 0.5 if len(lines) == 1 else 0.0


format.full_value = 0.5


def correctness(completion: str, problem: Problem) -> float:
    """1.0 if the last line that starts with `####` holds exactly one number, within 1e-3 of the gold answer, else 0.

    A gold may have a sign, a `$` and commas between groups of three digits. A gold that is not one number (`3,4`,
    `10 20`, `18%`) is matched by nothing; the doctor names it.
    """
    return _equals(marked_number(completion), problem)


def last_number(completion: str, problem: Problem) -> float:
    """1.0 if the last number of the text, wherever it stands, is within 1e-3 of the gold answer, else 0.

    The lenient reading: what `correctness` would be if the format did not matter.
    """
    return _equals(final_number(completion), problem)


def marked_number(completion: str) -> str | None:
    """The one number on the last line that starts with `####`, as it stands there; None with another count of them."""
    answers = [line for line in completion.split("\n") if line.startswith("####")]
    numbers = re.findall(NUMBER, answers[-1]) if answers else []
    return numbers[0] if len(numbers) == 1 else None


def final_number(completion: str) -> str | None:
    """The last number of the text, as it stands there."""
    numbers = re.findall(NUMBER, completion)
    return numbers[-1] if numbers else None


def one_number(gold: str) -> float | None:
    """The value of a gold that is one number as a whole; None if it is anything else, such as a pair or a list."""
    match = GOLD.fullmatch(gold.strip())
    if match is None or (match["sign"] and match["after"]):
        return None
    sign = -1.0 if (match["sign"] or match["after"]) in ("-", "\N{MINUS SIGN}") else 1.0
    return sign * float(match["digits"].replace(",", "") + (match["exponent"] or ""))


def _equals(number: str | None, problem: Problem) -> float:
    gold = one_number(problem.answer)
    if number is None or gold is None:
        return 0.0
    return 1.0 if abs(one_number(number) - gold) <= TOLERANCE else 0.0
