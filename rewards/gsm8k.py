"""The GSM8K rewards: is the answer on one line of the right form, and is it right?

The right form is `#### The final answer is 18`. Both rewards together are at most 1.5. Lines end only at `\\n`, digits
are ASCII, and the time is linear in the length of the text. Left out: cutting the text at a stop string, which the
caller does.
"""

import re

from data.problem import Problem

NUMBER = r"(?:[+\-\u2212]\$?)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.[0-9]+)?|\.[0-9]+)"
RUN = re.compile(r"(?:[+\-\u2212]\$?)?(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)")
"""Digits and commas in one piece. It is one number as a whole, or none: `3,4` in a text is neither 34 nor 4."""
ANSWER_LINE = re.compile(rf"#### The final answer is \$?{NUMBER}(?:%| ?[A-Za-z]+)?\.?")
GOLD = re.compile(
    r"(?P<sign>[+\-\u2212]?)\$? ?(?P<after>[+\-\u2212]?)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?P<exponent>[eE][+\-]?[0-9]+)?"
)
"""A gold that is one number. Commas stand between groups of three digits only: `3,4` is a pair, not 34."""
TOLERANCE = 1e-3


def format(completion: str, problem: Problem) -> float:
    """0.5 if exactly one line reads `#### The final answer is NUMBER`, else 0.

    A `$` may stand before the number. After it may stand a `%` or one word, and a period. Spaces, tabs and `\\r` are
    ignored at the end of the line, but not at its start.
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
    """1.0 if the last number anywhere in the text is within 1e-3 of the gold answer, else 0.

    This is the lenient form of `correctness`, in which the format does not matter.
    """
    return _equals(final_number(completion), problem)


def marked_number(completion: str) -> str | None:
    """The only number on the last line that starts with `####`, as text. None if there is no number or several."""
    answers = [line for line in completion.split("\n") if line.startswith("####")]
    numbers = _numbers(answers[-1]) if answers else []
    return numbers[0] if len(numbers) == 1 else None


def final_number(completion: str) -> str | None:
    """The last number of the text, as text. None if there is none, or if the last piece of digits is not one number."""
    numbers = _numbers(completion)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[str | None]:
    """Every piece of digits in a text, without its `$`; None for one that is not one number, such as `3,4`."""
    runs = RUN.findall(text)
    return [run.replace("$", "") if re.fullmatch(NUMBER, run) else None for run in runs]


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
