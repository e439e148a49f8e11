"""The names of the splits, and a seeded division of examples into two of them. Reads nothing."""

import math
import random
from collections.abc import Callable, Sequence

SPLITS = ("train", "validation", "test")


def hold_out(examples: Sequence, seed: int, *, at_most: int, key: Callable[[object], str]) -> tuple[list, list]:
    """Hold out a tenth of the examples, drawn by the seed.

    Examples with equal keys stay on one side, so nothing is both trained on and held out. Both sides keep the order of
    the data. A single example is kept; of two, one is held out.

    Args:
      examples: to divide.
      seed: decides which examples are held out.
      at_most: hold out at most this many keys.
      key: gives the text that identifies an example.

    Returns:
      (kept, held_out)
    """
    keys = list(dict.fromkeys(map(key, examples)))
    size = min(at_most, math.ceil((len(keys) - 1) / 10))
    drawn = set(random.Random(f"hold out {seed}").sample(keys, size))
    kept = [example for example in examples if key(example) not in drawn]
    return kept, [example for example in examples if key(example) in drawn]
