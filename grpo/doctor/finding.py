"""A finding of the doctor: something in a recipe that is wrong or worth knowing. Left out: who finds it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something that a check found in a recipe."""

    level: Literal["sure", "warning", "note"]
    """`sure`: the run cannot do what it is for; `warning`: probably not intended; `note`: good to know."""
    what: str
    """What was found, in a clause."""
    means: str
    """What follows from it."""
    do: str
    """What to do about it."""
