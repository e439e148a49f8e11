"""Values and texts of a program in a few printable characters, for people.

Nothing that a program says can go wrong here, or reach a terminal as it is. Left out: what is right (`equal.py`).
"""

from os.path import commonprefix
from typing import Any

MOST = 60
"""Characters of a text that is shown."""
LOOKED_AT = 10_000
"""Characters in which two texts are searched for their first difference."""
BEFORE = 20
"""Characters that are shown before it."""


def shown(value: Any) -> str:
    """A value as Python writes it, in at most `MOST` characters."""
    return short(_written(value))


def short(text: str) -> str:
    """At most `MOST` printable characters of a text, from its beginning."""
    text = "".join(letter if letter.isprintable() else " " for letter in text[: MOST + 1])
    return text if len(text) <= MOST else text[: MOST - 3] + "..."


def apart(got: Any, expected: Any) -> str:
    """`got 4, expected 3`. Long values are shown from a little before their first difference."""
    texts = [_written(value)[:LOOKED_AT] for value in (got, expected)]
    start = len(commonprefix(texts)) - BEFORE
    if start > 0 and max(map(len, texts)) > MOST:
        texts = ["..." + text[start:] for text in texts]
    return f"got {short(texts[0])}, expected {short(texts[1])}"


def _written(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # a number of too many digits, or a value that is too deep
        return f"<{type(value).__name__} that can not be written>"
