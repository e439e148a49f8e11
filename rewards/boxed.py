r"""The rewards of answers in `\boxed{}`: is there exactly one at the end, and does Math-Verify take it for the gold?

Math-Verify runs sealed and with a limit of CPU time (`sandbox/`, `verify_math.py`): a text on which it hangs earns 0.
It would also take the question for its answer, since `17 \cdot 23` is equal to 391. So two things must hold besides:

- Where the gold is one number, the answer is one too: digits, a reduced fraction, a mixed number, `6.7 \times 10^{5}`.
  A sign, a unit, `x =`, `\$`, `\%` and degrees may be around it.
- A formula that stands in the question word for word earns nothing, if the gold is not written so.

Needs the extra `math`. Left out: a formula of the question that was changed in a way that does not matter.
"""

import importlib.util
import re
from math import gcd

from data.boxes import boxes, last_box
from data.problem import Problem
from rewards import sandbox

LONGEST = 300
"""Characters of an answer."""
CPU_SECONDS = 2.0
LEAST_SECONDS = 30.0
"""Of a call: a text on which Math-Verify hangs ends before, also where the machine is busy, and earns 0."""
PRELOAD = ("rewards.verify_math:warm",)
CLOSING = re.compile(r"(?:[\s$.]|\\[\])]|\\end\{[a-z]+\*?\})*")
"""What may follow the box at the end."""

AROUND = re.compile(
    r"\\left|\\right|\\[!,;: ]|\\?[$%]|\^\{?\\circ\}?|\\(?:text|mbox|textrm|mathrm)\{[^{}]*\}(?:\^\{?[23]\}?)?"
)
"""What does not make a number another formula: spaces, brackets, units, per cent and degrees."""
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = re.compile(
    rf"(?:[A-Za-z]=)?[+-]?(?:(?P<plain>{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(?P<whole>[0-9]*)\\frac(?:\{(?P<above>[0-9]+)\}|(?P<one>[0-9]))(?:\{(?P<below>[0-9]+)\}|(?P<other>[0-9]))"
    r"|(?P<over>[0-9]+)/(?P<under>[0-9]+)"
    r"|[0-9](?:\.[0-9]+)?(?:\\times|\\cdot)10\^(?:\{[+-]?[0-9]+\}|[0-9]))"
)
FORMULA = re.compile(r".[-+*/^!(_]|\\(?:d?frac|sqrt|cdot|times|binom|pm|log|sin|cos|tan)")
"""What has an operation in it."""


def math_verify(completion: str, problem: Problem) -> float:
    r"""1.0 if the last `\boxed{}` holds a value that Math-Verify takes for the gold answer, else 0.

    Raises:
      ValueError: the machine can not seal a process.
    """
    answer = last_box(completion)
    if answer is None or not _is_an_answer(answer, problem):
        return 0.0
    asked = "rewards.verify_math:equal", [answer, problem.answer]
    return float(sandbox.run_trusted(*asked, CPU_SECONDS, PRELOAD).value is True)


def format(completion: str, problem: Problem) -> float:
    r"""0.5 if there is exactly one `\boxed{}`, closed, not empty and at the end, else 0.

    Behind it may stand white space, `$`, periods, `\]`, `\)` and `\end{...}`.
    """
    found = boxes(completion)
    if len(found) != 1 or not found[0][2]:
        return 0.0
    return 0.5 if CLOSING.fullmatch(completion, found[0][1]) else 0.0


format.full_value = 0.5


def sample(problem: Problem) -> str:
    """The gold answer in its box."""
    return rf"\boxed{{{problem.answer}}}"


def prepare() -> dict[str, str]:
    """Start the sandbox with Math-Verify in it. ValueError if that is missing, or nothing can be sealed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("rewards: 'boxed' needs the package math-verify: pip install 'grpo[math]'")
    return {"sandbox": sandbox.described(sandbox.box(PRELOAD))}


def _is_an_answer(answer: str, problem: Problem) -> bool:
    """Whether a text is an answer to the problem, right or wrong, and not the question again."""
    if len(answer) > LONGEST:
        return False
    if _bare(answer) == _bare(problem.answer):
        return True
    if is_number(problem.answer) and not is_number(answer):
        return False
    fraction = is_number(answer) and "times" not in answer and "cdot" not in answer
    asked = _bare(str(problem.info.get("question", "")))
    return fraction or not FORMULA.search(_bare(answer)) or _bare(answer) not in asked


def is_number(text: str) -> bool:
    r"""Whether a text in LaTeX is one number as a result is written: `-7`, `10,080`, `\frac{3}{4}`, `$5.40`, `x=5`."""
    if re.search(r"[0-9]\s+[0-9]", text):
        return False
    match = NUMBER.fullmatch(_bare(text))
    if match is None:
        return False
    above = match["above"] or match["one"] or match["over"]
    below = match["below"] or match["other"] or match["under"]
    return below is None or (int(below) > 1 and gcd(int(above), int(below)) == 1)


def _bare(text: str) -> str:
    """Without white space and what does not matter."""
    return (
        re.sub(r"\s+", "", AROUND.sub("", text)).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").rstrip(".")
    )
