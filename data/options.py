"""Options inside of `data_path`: `NAME:key=value,key=value`, for data sets that are generated or chosen from.

`derivative:level=2` is the name `derivative` and {"level": "2"}. The hint for a name that is misspelt is here too. Left
out: what a name or a key means.
"""

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint `; did you mean X?`, or an empty text if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def split_path(path: str, known: Collection[str] | None = None) -> tuple[str, dict[str, str]]:
    """The name in front of the last `:` that an option follows, and the options behind it, as text.

    Args:
      path: the value of `data_path`.
      known: the keys that there are; None: any.

    Raises:
      ValueError: an option is not `key=value`, is not known, or stands there twice.
    """
    name, colon, rest = path.rpartition(":")
    if not colon or "=" not in rest:
        return path, {}
    found: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"data_path: {part!r} in {path!r} is not of the form key=value")
        if known is not None and key not in known:
            raise ValueError(f"data_path: {key!r} in {path!r} is not one of {', '.join(known)}")
        if key in found:
            raise ValueError(f"data_path: {key!r} stands twice in {path!r}")
        found[key] = value
    return name, found


def whole(text: str, key: str, lowest: int, highest: int) -> int:
    """The whole number that an option gives, from `lowest` to `highest`; ValueError for anything else."""
    if not (text.isascii() and text.isdigit() and lowest <= int(text[:20]) <= highest):
        raise ValueError(f"data_path: {key}={text} must be a whole number from {lowest} to {highest}")
    return int(text)


def span(text: str, key: str, lowest: int, highest: int) -> range:
    """The numbers of `2` or of `1-3`, both ends included; ValueError for anything else."""
    first, dash, last = text.partition("-")
    numbers = range(whole(first, key, lowest, highest), whole(last if dash else first, key, lowest, highest) + 1)
    if not numbers:
        raise ValueError(f"data_path: {key}={text} ends before it begins")
    return numbers
