r"""Two published graders of answers in `\boxed{}`, with their faults: both compare texts changed by rules.

They read the last box. `boxed.math_verify` compares values, and counts more answers as right. The rules are written
anew from the published ones. Left out: the second step of Minerva's harness, which asks sympy.
"""

import re
from collections.abc import Callable

from data.problem import Problem

Graded = tuple[str | None, bool]
LONGEST = 1000
"""Characters of a box. A longer one is wrong, since some rules take quadratic time."""

HENDRYCKS = (
    *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")),
)
HENDRYCKS_AFTER_UNITS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))
MINERVA = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
MINERVA_WORDS = """
square ways integers dollars mph inches ft hours km units \\ldots sue points feet minutes digits cents
degrees cm gm pounds meters meals edges students childrentickets multiples
"""
MINERVA_REMOVED = (
    *MINERVA_WORDS.split(),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}"),
    *("^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
"""In their order: later rules see what earlier ones left. A comma is missing in `childrentickets`, as published."""
MINERVA_SHAPES = (
    *((r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"), (r"(\\text\{)(.*?)(\})", r"\2"), (r"(\\textbf\{)(.*?)(\})", r"\2")),
    *((r"(\\overline\{)(.*?)(\})", r"\2"), (r"(\\boxed\{)(.*)(\})", r"\2")),
    *((r"(frac)([^{])(.)", r"frac{\2}{\3}"), (r"(sqrt)([^{])", r"sqrt{\2}")),
)


def hendrycks(completion: str, problem: Problem) -> Graded:
    r"""`is_equiv` of MATH, https://arxiv.org/abs/2103.03874 and https://github.com/hendrycks/math.

    - Texts are equal or not: `0.25` is not `\frac{1}{4}` (only `0.5` is `\frac{1}{2}`), `1+x` is not `x+1`, `10,080` is
      not `10080`, and `2 and 3` is not `2, 3`.
    - Where a rule fails (two units, `\sqrt` at the end), the texts are compared as they stand.
    """
    return _graded(completion, problem, _equal_by_hendrycks)


def minerva(completion: str, problem: Problem) -> Graded:
    r"""The normalisation of Minerva, https://arxiv.org/abs/2206.14858 appendix D.1 (there in front of an equality).

    - What stands before the last `=` is dropped, so `x = 3` is `y = 3`, and an equation is its right side.
    - Words are removed anywhere: `points` also in `\text{midpoints}`, and `a ` at the end of any word.
    - Fractions are not reduced, and decimals are no fractions.
    """
    return _graded(completion, problem, lambda box, gold: _by_minerva(box) == _by_minerva(gold))


def _graded(completion: str, problem: Problem, equal: Callable[[str, str], bool]) -> Graded:
    box = _last_box(completion)
    return box, box is not None and len(box) <= LONGEST and equal(box, problem.answer)


def _last_box(text: str) -> str | None:
    r"""As MATH reads it: from the last `\boxed`, or else `\fbox`, to the brace that closes; no escapes are known."""
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start) if start >= 0 else ():
        depth += 1 if match[0] == "{" else -1
        if depth == 0 and match[0] == "}":
            whole = text[start : match.end()]
            return whole.removeprefix("\\boxed{")[:-1] if whole.startswith("\\boxed{") else None
    return None


def _equal_by_hendrycks(box: str, gold: str) -> bool:
    try:
        return _by_hendrycks(box) == _by_hendrycks(gold)
    except (IndexError, ValueError):  # published: any failure compares the texts as they stand
        return box == gold


def _by_hendrycks(text: str) -> str:
    """Raises ValueError or IndexError where the published rules fail."""
    for before, after in HENDRYCKS:
        text = text.replace(before, after)
    if "\\text{ " in text:
        text, _ = text.split("\\text{ ")  # units; two of them fail
    for before, after in HENDRYCKS_AFTER_UNITS:
        text = text.replace(before, after)
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text
    first, *roots = text.split("\\sqrt")
    text = first + "".join("\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots)
    text = _fractions(text.replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    over = re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", text)
    return f"\\frac{{{over[1]}}}{{{over[2]}}}" if over else text


def _fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{72}` with braces; unchanged if one of them has less than two characters."""
    first, *parts = text.split("\\frac")
    for i, part in enumerate(parts):
        if part[0] != "{":
            if len(part) < 2:
                return text
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            parts[i] = f"{{{part[0]}}}{below}"
    return "\\frac".join([first, *parts])


def _by_minerva(text: str) -> str:
    text = text.split("=")[-1]
    for before, after in (*MINERVA, *((word, "") for word in MINERVA_REMOVED)):
        text = text.replace(before, after)
    for pattern, kept in MINERVA_SHAPES:
        text = re.sub(pattern, kept, text)
    text = text.replace("$", "")
    return text.replace(",", "") if text.replace(",", "").isdigit() else text


GRADERS = {"hendrycks": hendrycks, "minerva": minerva}
